//! What a vector unit must offer the attention kernels: a dozen operations on one vector of f32,
//! and the decoding of stored elements into such vectors.
//!
//! [`crate::cpu::attention::kernels`] is written once over this trait. Each instruction set
//! implements it in its own file and instantiates the kernels inside functions that enable its
//! target features, so everything here is `inline(always)`.

use crate::codec::Codec;
use crate::format::KvFormat;

/// Vectors of f32 of one instruction set.
///
/// A *unit* is what one call of [`Simd::decode`] yields: `VECS` vectors, `UNIT` channels.
///
/// # Safety
/// Every method may execute instructions of the implementor's instruction set: call them only
/// where the CPU has it. Pointers must be valid for the accesses each method names.
pub(super) trait Simd: Copy + 'static {
    /// One vector.
    type V: Copy;
    /// One decoded unit, `[V; VECS]`.
    type Unit: Copy + AsRef<[Self::V]>;
    /// f32 in a vector: 8 or 16.
    const LANES: usize;
    /// Vectors in a unit.
    const VECS: usize;
    /// Channels in a unit.
    const UNIT: usize = Self::LANES * Self::VECS;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// Reads `LANES` f32 at `p`.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Writes `LANES` f32 at `p`.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`; fused where the instruction set fuses.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` if either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// |a|.
    unsafe fn abs(a: Self::V) -> Self::V;
    /// |magnitude| with the sign of `sign`.
    unsafe fn copysign(magnitude: Self::V, sign: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` for integers `n` in -126..=127.
    unsafe fn pow2(n: Self::V) -> Self::V;
    /// Lanes of `v` where `x < limit` become zero. NaN compares false.
    unsafe fn zero_where_less(x: Self::V, limit: Self::V, v: Self::V) -> Self::V;
    /// The largest lane.
    unsafe fn largest(v: Self::V) -> f32;
    /// The sum of the lanes, in a fixed order.
    unsafe fn sum(v: Self::V) -> f32;
    /// Lane `i` of the result is the sum of the lanes of `acc[i]`; the first `LANES` are used.
    unsafe fn sum_each(acc: &[Self::V; 16]) -> Self::V;
    /// Lane `i` of `rows[j]` becomes lane `j` of what `rows[i]` was; of the first `LANES` of them.
    unsafe fn transpose(rows: &mut [Self::V; 16]);
    /// The lanes, as leaves of the binary tree by which [`Simd::sum_each`] adds them.
    const SUM_ORDER: &'static [usize];
    /// Channels that [`Simd::transpose_slots`] takes at a time; none: it does nothing.
    const SLOT_CHANNELS: usize;
    /// 16 bytes of each of `SLOT_CHANNELS` channels, `src_stride` bytes apart, which are 16 slots of one byte or, if `wide`, 8
    /// of two, to a row for each slot, `dst_stride` bytes apart.
    unsafe fn transpose_slots(src: *const u8, src_stride: usize, dst: *mut u8, dst_stride: usize, wide: bool);
    /// Starts loading the cache line at `p`, which need not be readable.
    unsafe fn prefetch(p: *const u8);

    /// The first `n <= UNIT` elements at `src`, decoded and divided by
    /// [`Simd::decode_scale`]; the rest is zero. Reads no byte past the `n`th element.
    unsafe fn decode<F: Codec>(src: *const u8, n: usize) -> Self::Unit;

    /// [`Simd::decode`] of the elements `at` bytes into each of `LANES` rows, transposed: element `i` of all rows goes to
    /// `dst + i * stride`; of a whole unit, and zeros from `n` on.
    #[inline(always)]
    unsafe fn decode_transposed<F: Codec>(rows: &[*const u8], at: usize, n: usize, dst: *mut f32, stride: usize) {
        // SAFETY: the caller's promises.
        unsafe { transpose_decoded::<Self, F>(rows, at, n, dst, stride) }
    }

    /// The power of two by which decoded elements are too small; the caller folds it into its
    /// own scale.
    fn decode_scale(format: KvFormat) -> f32;
}

/// [`Simd::decode_transposed`] by transposing f32, for every format.
// Index loops of constant length over arrays of registers: what the compiler unrolls. Closures and iterators may become
// calls, which have not the caller's instructions.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
pub(super) unsafe fn transpose_decoded<S: Simd, F: Codec>(
    rows: &[*const u8],
    at: usize,
    n: usize,
    dst: *mut f32,
    stride: usize,
) {
    const { assert!(S::VECS <= 4 && S::LANES <= 16) }
    // SAFETY: the caller's promises.
    unsafe {
        let mut x = [[S::splat(0.0); 16]; 4];
        for i in 0..S::LANES {
            let unit = S::decode::<F>(rows[i].add(at), n);
            for v in 0..S::VECS {
                x[v][i] = unit.as_ref()[v];
            }
        }
        for v in 0..S::VECS {
            S::transpose(&mut x[v]);
            for i in 0..S::LANES {
                S::store(dst.add((v * S::LANES + i) * stride), x[v][i]);
            }
        }
    }
}

/// `log2(e)`: scores are kept in the exp2 domain.
pub(super) const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// Below this exponent a probability counts as zero: the largest one of a row is 2^0.
const EXP2_MIN: f32 = -126.0;

/// `(2^f - 1) / f` on [-0.5, 0.5]: interpolation at the Chebyshev nodes. With these coefficients
/// `1 + f q(f)` is within 9.2e-9 of `2^f`, relatively.
const EXP2_COEFFICIENTS: [f32; 6] =
    [std::f32::consts::LN_2, 0.240_226_5, 0.055_503_57, 0.009_618_083, 0.001_339_086_3, 0.000_154_531_63];

/// `2^x` for `x <= 127`: 0 below -126, NaN for NaN, otherwise within 2^-23 relatively (half an ulp
/// from the last step, a quarter from the step before, 2^-26.7 from the polynomial).
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller runs on this instruction set; no memory is accessed.
    unsafe {
        let limit = S::splat(EXP2_MIN);
        // NaN is the second operand of `max`, so it survives.
        let clamped = S::max(limit, x);
        let n = S::round(clamped);
        let f = S::sub(clamped, n);
        let c = EXP2_COEFFICIENTS;
        let mut q = S::splat(c[5]);
        for k in (0..5).rev() {
            q = S::fma(q, f, S::splat(c[k]));
        }
        let mantissa = S::fma(q, f, S::splat(1.0));
        S::zero_where_less(x, limit, S::mul(mantissa, S::pow2(n)))
    }
}

/// `tanh(y)`, within 2^-22 absolutely: `(1 - t) / (1 + t)` with `t = e^(-2|y|)`.
#[inline(always)]
pub(super) unsafe fn tanh<S: Simd>(y: S::V) -> S::V {
    // SAFETY: as in `exp2`.
    unsafe {
        let one = S::splat(1.0);
        let t = exp2::<S>(S::mul(S::abs(y), S::splat(-2.0 * LOG2_E)));
        S::copysign(S::div(S::sub(one, t), S::add(one, t)), y)
    }
}

/// Copies the first `n` elements of `BYTES` bytes at `src` into a zeroed buffer, for tails shorter
/// than a unit where the instruction set has no masked loads.
#[inline(always)]
pub(super) unsafe fn copy_tail<const BUFFER: usize>(src: *const u8, bytes: usize) -> [u8; BUFFER] {
    let mut buffer = [0u8; BUFFER];
    debug_assert!(bytes <= BUFFER);
    // SAFETY: the caller vouches for `bytes` readable bytes; the buffer is longer.
    unsafe { std::ptr::copy_nonoverlapping(src, buffer.as_mut_ptr(), bytes) };
    buffer
}
