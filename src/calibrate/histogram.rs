//! A histogram of |x| with buckets of equal ratio, in bounded memory.
//!
//! ```text
//! bucket of x    the leading bits of its float: exponent, and `bits` bits of mantissa
//! width          at most 2^-bits of its lower edge
//! window         the 25 powers of two up to the largest value seen; what is smaller is only counted
//! ```
//! 2^-24 of the largest value is below half the smallest number of an E4M3 code with a scale that
//! covers that value (2^-18.8 of it): what is only counted rounds to zero.

/// Powers of two that have buckets.
const BINADES: usize = 25;
const MANTISSA_BITS: u32 = 23;

/// Counts of magnitudes, by size.
#[derive(Clone, Debug)]
pub struct Histogram {
    bits: u32,
    /// The bucket of `counts[0]`, a whole power of two.
    first: usize,
    /// Empty until something was seen.
    counts: Vec<u64>,
    below: u64,
    total: u64,
}

/// One bucket that is not empty.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// The smallest value in it.
    pub lower: f32,
    /// The smallest value above it.
    pub upper: f32,
    /// Values in it.
    pub count: u64,
}

impl Histogram {
    /// An empty one with 2^`bits` buckets (1 to 2^16) for each power of two.
    pub fn new(bits: u32) -> Self {
        Histogram { bits: bits.min(16), first: 0, counts: Vec::new(), below: 0, total: 0 }
    }

    /// Counts a magnitude: finite, not negative.
    #[inline]
    pub fn record(&mut self, x: f32) {
        let bucket = (x.to_bits() >> (MANTISSA_BITS - self.bits)) as usize;
        self.total += 1;
        if bucket >= self.first + self.counts.len() {
            self.reach(bucket);
        }
        match bucket.checked_sub(self.first) {
            Some(index) => self.counts[index] += 1,
            None => self.below += 1,
        }
    }

    /// Moves the window up to hold `bucket`.
    #[cold]
    fn reach(&mut self, bucket: usize) {
        let len = BINADES << self.bits;
        let binade_end = ((bucket >> self.bits) + 1) << self.bits;
        let first = binade_end.saturating_sub(len);
        let gone = (first - self.first).min(self.counts.len());
        self.below += self.counts.drain(..gone).sum::<u64>();
        self.counts.resize(len, 0);
        self.first = first;
    }

    fn edge(&self, index: usize) -> f32 {
        f32::from_bits(((self.first + index) as u32) << (MANTISSA_BITS - self.bits))
    }

    /// Values counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The buckets that hold something, from small to large; not those too small for one.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> {
        let bucket = |(index, count): (usize, &u64)| Bucket {
            lower: self.edge(index),
            upper: self.edge(index + 1),
            count: *count,
        };
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(bucket)
    }

    /// A value that at least `percent` % of all are below or at: the smallest such value, rounded up by
    /// less than 2^-bits of it. 0 if nothing was seen.
    pub fn percentile(&self, percent: f64) -> f32 {
        if self.total == 0 {
            return 0.0;
        }
        let rank = ((percent / 100.0 * self.total as f64).ceil() as u64).clamp(1, self.total);
        let mut passed = self.below;
        if passed >= rank {
            return self.edge(0);
        }
        for bucket in self.buckets() {
            passed += bucket.count;
            if passed >= rank {
                return bucket.upper;
            }
        }
        self.edge(self.counts.len())
    }

    /// How many values are above `x`; those of the bucket that holds `x` are not counted.
    pub fn above(&self, x: f32) -> u64 {
        self.buckets().filter(|bucket| bucket.lower > x).map(|bucket| bucket.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_rounded_up_by_less_than_a_bucket() {
        let mut state = 7u64;
        let mut values: Vec<f32> = (0..5000)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let unit = (state >> 40) as f32 / (1u64 << 24) as f32;
                (unit * 12.0 - 6.0).exp2()
            })
            .collect();
        for bits in [4, 8] {
            let mut histogram = Histogram::new(bits);
            values.iter().for_each(|x| histogram.record(*x));
            values.sort_by(f32::total_cmp);
            for percent in [0.0, 1.0, 50.0, 99.0, 99.9, 100.0] {
                let rank = ((percent / 100.0 * 5000.0f64).ceil() as usize).max(1);
                let (exact, found) = (values[rank - 1], histogram.percentile(percent));
                assert!(found > exact && found <= exact * (1.0 + (-(bits as f32)).exp2()), "{exact} {found}");
            }
            for threshold in [0.01, 1.0, 17.3] {
                let exact = values.iter().filter(|x| **x > threshold).count() as u64;
                let bucket_end = threshold * (1.0 + (-(bits as f32)).exp2());
                let least = values.iter().filter(|x| **x > bucket_end).count() as u64;
                assert!((least..=exact).contains(&histogram.above(threshold)));
            }
        }
    }

    #[test]
    fn memory_is_bounded_and_nothing_is_lost() {
        let mut histogram = Histogram::new(3);
        for exponent in -140..127 {
            histogram.record((exponent as f32).exp2());
        }
        histogram.record(0.0);
        histogram.record(f32::MAX);
        assert_eq!(histogram.counts.len(), BINADES << 3);
        assert_eq!(histogram.total(), 269);
        assert_eq!(histogram.below + histogram.buckets().map(|bucket| bucket.count).sum::<u64>(), 269);
        assert_eq!(histogram.buckets().next().unwrap().lower, 103f32.exp2());
        assert_eq!(Histogram::new(8).percentile(50.0), 0.0);
    }
}
