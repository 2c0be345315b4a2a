//! The range LLM Compressor keeps by default: a moving average of each sample's minimum and maximum.
//!
//! ```text
//! first sample   min, max            = the sample's
//! later          min                 = min * (1 - c) + sample's min * c,  c = 0.01, max alike
//! scale          max(|min(min, 0)|, |max(max, 0)|) / 448;  the dtype's epsilon if that is 0
//! ```
//! All of it in the model's dtype: each product, sum and quotient is computed in f32 and rounded. With
//! bf16's eight bits most updates of 1 % are rounded away. It is the tool's arithmetic, not ours: it is
//! here so that its scales come out to the bit (`observer: null` or `minmax` of LLM Compressor 0.14).

use half::{bf16, f16};

use super::LARGEST_CODE;
use crate::format::DType;

/// The share of a new sample.
const AVERAGING_CONSTANT: f64 = 0.01;

/// A moving minimum and maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MovingRange {
    range: Option<(f32, f32)>,
}

impl MovingRange {
    /// Takes in the smallest and the largest value of a sample.
    pub fn update(&mut self, dtype: DType, min: f32, max: f32) {
        let round = |x| rounded(dtype, x);
        let average = |old: f32, new: f32| {
            let keep = round(old * (1.0 - AVERAGING_CONSTANT) as f32);
            round(keep + round(new * AVERAGING_CONSTANT as f32))
        };
        let (min, max) = (round(min), round(max));
        self.range = Some(match self.range {
            None => (min, max),
            Some((old_min, old_max)) => (average(old_min, min), average(old_max, max)),
        });
    }

    /// Minimum and maximum now; `None` before the first sample.
    pub fn range(&self) -> Option<(f32, f32)> {
        self.range
    }

    /// The scale that covers the range; of nothing at all, the dtype's epsilon.
    pub fn scale(&self, dtype: DType) -> f32 {
        let (min, max) = self.range.unwrap_or_default();
        let absmax = min.min(0.0).abs().max(max.max(0.0).abs());
        match rounded(dtype, absmax / LARGEST_CODE) {
            0.0 => epsilon(dtype),
            scale => scale,
        }
    }
}

fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
    }
}

/// The distance from 1 to the next number.
fn epsilon(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::EPSILON,
        DType::F16 => f16::EPSILON.to_f32(),
        DType::BF16 => bf16::EPSILON.to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_or_zeros_give_the_epsilon() {
        for (dtype, expected) in [(DType::F32, 1.1920929e-7), (DType::F16, 0.0009765625), (DType::BF16, 0.0078125)] {
            let mut range = MovingRange::default();
            assert_eq!(range.scale(dtype), expected);
            range.update(dtype, 0.0, 0.0);
            assert_eq!(range.scale(dtype), expected);
        }
    }

    #[test]
    fn a_range_on_one_side_of_zero_reaches_to_zero() {
        let mut range = MovingRange::default();
        range.update(DType::F32, 224.0, 448.0);
        assert_eq!(range.scale(DType::F32), 1.0);
        let mut range = MovingRange::default();
        range.update(DType::F32, -896.0, -1.0);
        assert_eq!(range.scale(DType::F32), 2.0);
    }

    #[test]
    fn bf16_loses_small_updates() {
        // 1 % of a difference of 0.1 is less than half a step of bf16 at 1.
        let (mut narrow, mut wide) = (MovingRange::default(), MovingRange::default());
        for (range, dtype) in [(&mut narrow, DType::BF16), (&mut wide, DType::F32)] {
            range.update(dtype, -1.0, 1.0);
            (0..100).for_each(|_| range.update(dtype, -1.125, 1.125));
        }
        assert!(wide.range().unwrap().1 > 1.07);
        assert!(narrow.range().unwrap().1 < 1.02, "{narrow:?}");
    }
}
