//! Whole rows: full vectors, then one more that overlaps the last (elements are independent, so
//! doing some twice changes nothing), or one padded vector where the row is shorter than that.

use super::{Lanes, ScaleRow, Simd};

/// The most lanes, and bytes of an element, of any instruction set and format.
const MAX_LANES: usize = 16;
const MAX_BYTES: usize = 4;

/// What happens between load and store: a row of divisors, of factors, or nothing.
trait Scaling<S: Simd> {
    /// Lanes `i..i + LANES` of the row.
    fn apply(&self, simd: S, x: S::F32, i: usize) -> S::F32;
}

struct Unscaled;
struct Divide<R>(R);
struct Multiply<R>(R);

impl<S: Simd> Scaling<S> for Unscaled {
    #[inline(always)]
    fn apply(&self, _: S, x: S::F32, _: usize) -> S::F32 {
        x
    }
}
impl<S: Simd, R: ScaleLanes> Scaling<S> for Divide<R> {
    #[inline(always)]
    fn apply(&self, simd: S, x: S::F32, i: usize) -> S::F32 {
        simd.div(x, self.0.lanes(simd, i))
    }
}
impl<S: Simd, R: ScaleLanes> Scaling<S> for Multiply<R> {
    #[inline(always)]
    fn apply(&self, simd: S, x: S::F32, i: usize) -> S::F32 {
        simd.mul(x, self.0.lanes(simd, i))
    }
}

/// A variant of [`ScaleRow`], known at compile time.
trait ScaleLanes {
    /// Scales `i..i + LANES`; 1.0 past the end.
    fn lanes<S: Simd>(&self, simd: S, i: usize) -> S::F32;
}

struct One(f32);
struct Each<'a>(&'a [f32]);
struct EachTimes<'a>(&'a [f32], f32);

impl ScaleLanes for One {
    #[inline(always)]
    fn lanes<S: Simd>(&self, simd: S, _: usize) -> S::F32 {
        simd.splat(self.0)
    }
}
impl ScaleLanes for Each<'_> {
    #[inline(always)]
    fn lanes<S: Simd>(&self, simd: S, i: usize) -> S::F32 {
        match self.0.get(i..i + S::LANES) {
            Some(full) => load_f32(simd, full),
            None => {
                let mut padded = [1.0; MAX_LANES];
                let rest = &self.0[i..];
                padded[..rest.len()].copy_from_slice(rest);
                load_f32(simd, &padded)
            }
        }
    }
}
impl ScaleLanes for EachTimes<'_> {
    /// [`crate::scale::combined_scale`].
    #[inline(always)]
    fn lanes<S: Simd>(&self, simd: S, i: usize) -> S::F32 {
        let product = simd.mul(Each(self.0).lanes(simd, i), simd.splat(self.1));
        simd.max(simd.splat(f32::MIN_POSITIVE), simd.min(simd.splat(f32::MAX), product))
    }
}

#[inline(always)]
fn load_f32<S: Simd>(simd: S, src: &[f32]) -> S::F32 {
    simd.floats(simd.load_u32(crate::codec::slice::as_bytes(src)))
}

/// `dst[i] = B(A(src[i]) / scale[i])`, unscaled if `B` is unquantized.
#[inline(always)]
pub(super) fn encode<S: Simd, A: Lanes, B: Lanes>(simd: S, src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
    match scale {
        _ if !B::QUANTIZED => convert::<S, A, B>(simd, src, &Unscaled, dst),
        // x / 1 is x.
        ScaleRow::One(1.0) => convert::<S, A, B>(simd, src, &Unscaled, dst),
        ScaleRow::One(s) => convert::<S, A, B>(simd, src, &Divide(One(s)), dst),
        ScaleRow::Each(each) => convert::<S, A, B>(simd, src, &Divide(Each(each)), dst),
        ScaleRow::EachTimes(each, row) => convert::<S, A, B>(simd, src, &Divide(EachTimes(each, row)), dst),
    }
}

/// `dst[i] = B(A(src[i]) * scale[i])`, unscaled if `A` is unquantized.
#[inline(always)]
pub(super) fn decode<S: Simd, A: Lanes, B: Lanes>(simd: S, src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
    match scale {
        _ if !A::QUANTIZED => convert::<S, A, B>(simd, src, &Unscaled, dst),
        ScaleRow::One(s) => convert::<S, A, B>(simd, src, &Multiply(One(s)), dst),
        ScaleRow::Each(each) => convert::<S, A, B>(simd, src, &Multiply(Each(each)), dst),
        ScaleRow::EachTimes(each, row) => convert::<S, A, B>(simd, src, &Multiply(EachTimes(each, row)), dst),
    }
}

/// Lanes `i..` of a row, at the front of `src` and `dst`.
///
/// A function and not a closure, here and below: a closure that is not inlined is compiled without
/// the shell's instruction set, and every intrinsic in it becomes a call.
#[inline(always)]
fn convert_lanes<S: Simd, A: Lanes, B: Lanes>(
    simd: S,
    src: &[u8],
    scaling: &impl Scaling<S>,
    i: usize,
    dst: &mut [u8],
) {
    let x = A::load_lanes(simd, src);
    B::store_lanes(simd, scaling.apply(simd, x, i), dst);
}

#[inline(always)]
fn convert<S: Simd, A: Lanes, B: Lanes>(simd: S, src: &[u8], scaling: &impl Scaling<S>, dst: &mut [u8]) {
    let (from, to) = (S::LANES * A::BYTES, S::LANES * B::BYTES);
    let len = src.len() / A::BYTES;
    let full = len - len % S::LANES;
    for (n, (src, dst)) in src.chunks_exact(from).zip(dst.chunks_exact_mut(to)).enumerate() {
        convert_lanes::<S, A, B>(simd, src, scaling, n * S::LANES, dst);
    }
    if full == len {
        return;
    }
    if full > 0 {
        let i = len - S::LANES;
        convert_lanes::<S, A, B>(simd, &src[i * A::BYTES..], scaling, i, &mut dst[i * B::BYTES..]);
    } else {
        let mut padded = [0; MAX_LANES * MAX_BYTES];
        let mut result = [0; MAX_LANES * MAX_BYTES];
        padded[..src.len()].copy_from_slice(src);
        convert_lanes::<S, A, B>(simd, &padded, scaling, 0, &mut result);
        dst.copy_from_slice(&result[..dst.len()]);
    }
}

/// The largest |A(src[i]) / scale[i]|: NaN ignored, infinities count as `f32::MAX`.
#[inline(always)]
pub(super) fn absmax<S: Simd, A: Lanes>(simd: S, src: &[u8], scale: ScaleRow<'_>) -> f32 {
    match scale {
        ScaleRow::One(1.0) => absmax_of::<S, A>(simd, src, &Unscaled),
        ScaleRow::One(s) => absmax_of::<S, A>(simd, src, &Divide(One(s))),
        ScaleRow::Each(each) => absmax_of::<S, A>(simd, src, &Divide(Each(each))),
        ScaleRow::EachTimes(each, row) => absmax_of::<S, A>(simd, src, &Divide(EachTimes(each, row))),
    }
}

/// `max`, and the magnitudes of lanes `i..` of a row, at the front of `src`.
#[inline(always)]
fn max_lanes<S: Simd, A: Lanes>(simd: S, max: S::U32, src: &[u8], scaling: &impl Scaling<S>, i: usize) -> S::U32 {
    // Magnitudes order as integers do. NaN, above infinity, counts as zero.
    let x = A::load_lanes(simd, src);
    let magnitude = simd.and(simd.bits(scaling.apply(simd, x, i)), simd.splat_u32(0x7fff_ffff));
    let number = simd.select_lt(simd.splat_u32(0x7f80_0000), magnitude, simd.splat_u32(0), magnitude);
    simd.max_u32(max, number)
}

#[inline(always)]
fn absmax_of<S: Simd, A: Lanes>(simd: S, src: &[u8], scaling: &impl Scaling<S>) -> f32 {
    let len = src.len() / A::BYTES;
    let full = len - len % S::LANES;
    let mut max = simd.splat_u32(0);
    for (n, src) in src.chunks_exact(S::LANES * A::BYTES).enumerate() {
        max = max_lanes::<S, A>(simd, max, src, scaling, n * S::LANES);
    }
    if full < len {
        if full > 0 {
            let i = len - S::LANES;
            max = max_lanes::<S, A>(simd, max, &src[i * A::BYTES..], scaling, i);
        } else {
            let mut padded = [0; MAX_LANES * MAX_BYTES];
            padded[..src.len()].copy_from_slice(src);
            max = max_lanes::<S, A>(simd, max, &padded, scaling, 0);
        }
    }
    let mut lanes = [0; MAX_LANES * MAX_BYTES];
    simd.store_u32(max, &mut lanes);
    let bits = lanes.chunks_exact(4).map(|lane| u32::from_le_bytes([lane[0], lane[1], lane[2], lane[3]]));
    f32::from_bits(bits.max().unwrap_or(0)).min(f32::MAX)
}
