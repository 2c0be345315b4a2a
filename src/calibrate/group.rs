//! What is kept of the values that share a scale.

use super::histogram::Histogram;
use super::moving::MovingRange;
use crate::format::DType;
use crate::scale::Granularity;

/// Buckets of a histogram for each power of two, as a power of two itself: 0.4 % a bucket, and 3.2 % where
/// there are thousands of groups.
const FINE: u32 = 8;
const COARSE: u32 = 5;

#[derive(Clone, Debug)]
pub(super) struct Group {
    /// Smallest and largest value of the current sample.
    sample: Option<(f32, f32)>,
    pub moving: MovingRange,
    pub absmax: f32,
    pub histogram: Histogram,
}

impl Group {
    pub fn new(granularity: Granularity) -> Self {
        let bits = if granularity == Granularity::Channel { COARSE } else { FINE };
        Group { sample: None, moving: MovingRange::default(), absmax: 0.0, histogram: Histogram::new(bits) }
    }

    /// Takes in a finite value.
    #[inline]
    pub fn record(&mut self, x: f32) {
        let (min, max) = self.sample.unwrap_or((x, x));
        self.sample = Some((min.min(x), max.max(x)));
        self.absmax = self.absmax.max(x.abs());
        self.histogram.record(x.abs());
    }

    pub fn end_sample(&mut self, dtype: DType) {
        if let Some((min, max)) = self.sample.take() {
            self.moving.update(dtype, min, max);
        }
    }
}
