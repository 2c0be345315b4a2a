//! Random weights: the specification of what every backend makes.
//!
//! ```text
//! hash       = splitmix64(seed + i)                        64 bits
//! sum        = its four 16-bit words added                 0 ..= 4 * 65535, mean 131070
//! element i  = (sum - 131070) * (deviation / 37837.227)    one f32 product, then the storage type
//! ```
//! Four uniform words added are close to normal, without a tail beyond 3.5 deviations; integers and one
//! product give the same bits everywhere. The device's twin is `csrc/ops/decoder/random.h`.

use rayon::prelude::*;

use super::compute::RandomMatrix;
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::checked_product;

/// Standard deviation of the sum: `sqrt(4 * (2^32 - 1) / 12)`.
const SUM_DEVIATION: f32 = 37837.227;

/// The sum of element `index`, less its mean.
fn centred(seed: u64, index: u64) -> i32 {
    let mut z = seed.wrapping_add((index.wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let words = [z, z >> 16, z >> 32, z >> 48].map(|word| (word & 0xffff) as i32);
    words.iter().sum::<i32>() - 131_070
}

/// Elements `0..out.len()` of the generator `seed`.
pub fn fill<T: Element>(seed: u64, deviation: f32, out: &mut [T]) {
    const CHUNK: usize = 1 << 16;
    let factor = deviation / SUM_DEVIATION;
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
        let first = (chunk * CHUNK) as u64;
        for (i, x) in out.iter_mut().enumerate() {
            *x = T::from_f32(centred(seed, first + i as u64) as f32 * factor);
        }
    });
}

/// A random matrix in host memory.
///
/// # Errors
/// [`Error::Overflow`], [`Error::OutOfMemory`].
pub(crate) fn matrix<T: Element>(matrix: &RandomMatrix) -> Result<Vec<T>> {
    const WHAT: &str = "random weights";
    let len = checked_product(WHAT, &[matrix.rows, matrix.cols])?;
    let bytes = checked_product(WHAT, &[len, size_of::<T>()])?;
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { what: WHAT, bytes })?;
    values.resize(len, T::default());
    fill(matrix.seed, matrix.deviation, &mut values);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_independence_of_length() {
        let mut values = vec![0.0f32; 1 << 17];
        fill(7, 0.5, &mut values);
        let n = values.len() as f64;
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let variance = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
        // Four standard errors: sigma / sqrt(n), and for the variance about sigma² * sqrt(2 / n).
        assert!(mean.abs() < 4.0 * 0.5 / n.sqrt(), "mean {mean}");
        assert!((variance - 0.25).abs() < 4.0 * 0.25 * (2.0 / n).sqrt(), "variance {variance}");
        assert!(values.iter().all(|x| x.abs() < 0.5 * 3.47));

        let mut head = vec![0.0f32; 1000];
        fill(7, 0.5, &mut head);
        assert_eq!(head, values[..1000]);
        fill(8, 0.5, &mut head);
        let equal = head.iter().zip(&values).filter(|(a, b)| a == b).count();
        assert!(equal < 10, "{equal} of 1000 elements are those of another seed");
    }
}
