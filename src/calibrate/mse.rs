//! The scale that loses least: a grid search for the smallest squared error of FP8 E4M3's round trip.
//!
//! ```text
//! candidates   absmax * (1 - i/100), i = 0 ..= 50
//! error        sum over the histogram of count * (x - decode(encode(x / scale)) * scale)²
//! ```
//! One power of two of candidates is enough: below it the mantissas of E4M3 repeat, only more is cut off.
//! A bucket stands for its middle, at most 2^-9 of it away from its values (2^-6 per channel), where
//! E4M3 rounds by up to 2^-4.
//!
//! LLM Compressor's `mse` differs: it searches each sample by itself (|error|^2.4, at most 20 % less than
//! absmax, stopping after 5 candidates without gain) and averages what it finds as its `minmax` does.

use super::LARGEST_CODE;
use super::histogram::Histogram;
use crate::codec::{Codec, E4M3};

/// What is searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SquaredErrorSearch {
    /// Candidates from 1 down to 0 times the largest magnitude.
    pub grid: usize,
    /// The largest share of it that is tried to be cut off.
    pub max_shrink: f64,
}

impl Default for SquaredErrorSearch {
    fn default() -> Self {
        SquaredErrorSearch { grid: 100, max_shrink: 0.5 }
    }
}

impl SquaredErrorSearch {
    /// The magnitude to cover, at most `absmax`, the largest of those counted.
    pub fn range(&self, histogram: &Histogram, absmax: f32) -> f32 {
        let steps = (self.max_shrink * self.grid as f64) as usize;
        let candidate = |step: usize| absmax * (1.0 - step as f64 / self.grid as f64) as f32;
        let mut best = (f64::INFINITY, absmax);
        for range in (0..=steps).map(candidate) {
            let error = squared_error(histogram, absmax, range / LARGEST_CODE);
            if error < best.0 {
                best = (error, range);
            }
        }
        best.1
    }
}

/// The error of all values counted, each at the middle of its bucket, but none beyond `absmax`.
pub(super) fn squared_error(histogram: &Histogram, absmax: f32, scale: f32) -> f64 {
    let error = |x: f32| f64::from(x) - f64::from(E4M3::decode(E4M3::encode(x / scale)) * scale);
    let buckets = histogram.buckets();
    buckets.map(|b| b.count as f64 * error(((b.lower + b.upper) / 2.0).min(absmax)).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_minimum_of_its_grid() {
        // Nine values in ten sit between two codes of the scale that covers the tenth.
        let mut histogram = Histogram::new(12);
        let values = [[1.0625f32; 9].as_slice(), &[1.75]].concat();
        values.iter().for_each(|x| histogram.record(*x));
        let error = |range: f32| -> f64 {
            let scale = range / 448.0;
            values.iter().map(|x| f64::from(x - E4M3::decode(E4M3::encode(x / scale)) * scale).powi(2)).sum()
        };
        let best = (0..=50).map(|i| error(1.75 * (1.0 - f64::from(i) / 100.0) as f32)).fold(f64::INFINITY, f64::min);
        let range = SquaredErrorSearch::default().range(&histogram, 1.75);
        // A bucket's middle is within 2^-13 of its values, whose errors here are above 2^-9.
        assert!(error(range) <= best * 1.1, "{} {best}", error(range));
        assert!(range < 1.75 && error(range) < error(1.75) / 2.0);
    }

    #[test]
    fn one_large_value_among_many_is_cut_off() {
        let mut histogram = Histogram::new(8);
        (0..1_000_000).for_each(|i| histogram.record(0.5 + (i % 1000) as f32 / 2000.0));
        histogram.record(1.1);
        let range = SquaredErrorSearch::default().range(&histogram, 1.1);
        let error = |range: f32| squared_error(&histogram, 1.1, range / LARGEST_CODE);
        assert!(range < 1.1 && error(range) < error(1.1));
    }
}
