//! The codecs over slices: what every CPU kernel encodes, decodes and measures rows with.
//!
//! The instruction set is an argument, decided once by the caller; one test of it a call, none
//! inside a loop. Every [`Isa`] gives the same bits as the scalar loops here
//! (`docs/numerics.md`), which are the specification.

use super::{Codec, PlainBF16, PlainF16, PlainF32, simd, with_codec};
use crate::format::{DType, Element, KvFormat, Pod};
use crate::isa::Isa;
use crate::scale::combined_scale;

/// The scales of one row of elements.
#[derive(Clone, Copy, Debug)]
pub enum ScaleRow<'a> {
    /// One scale for all of them.
    One(f32),
    /// A scale for each.
    Each(&'a [f32]),
    /// A static scale for each, and a dynamic one for the row:
    /// [`combined_scale`]`(each[i], row)`.
    EachTimes(&'a [f32], f32),
}

impl<'a> ScaleRow<'a> {
    /// These static scales with the row's dynamic scale on top. A dynamic scale of a row that has
    /// one already replaces it.
    #[inline]
    pub fn with_dynamic(self, dynamic: f32) -> Self {
        match self {
            ScaleRow::One(s) => ScaleRow::One(combined_scale(s, dynamic)),
            ScaleRow::Each(each) | ScaleRow::EachTimes(each, _) => ScaleRow::EachTimes(each, dynamic),
        }
    }

    /// The scale of element `i`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match *self {
            ScaleRow::One(s) => s,
            ScaleRow::Each(each) => each[i],
            ScaleRow::EachTimes(each, row) => combined_scale(each[i], row),
        }
    }

    /// Whether there is a scale for each of `len` elements.
    #[inline]
    fn covers(&self, len: usize) -> bool {
        match self {
            ScaleRow::One(_) => true,
            ScaleRow::Each(each) | ScaleRow::EachTimes(each, _) => each.len() >= len,
        }
    }
}

/// `dst[i] = encode(src[i] / scale[i])` in `format`; `dst` is little-endian storage bytes.
///
/// Unquantized formats ignore the scale; where `T` is the storage type the row is copied, NaN
/// payloads included.
///
/// # Panics
/// Unless `dst` is `src.len() * format.bytes()` bytes and the scale covers `src`.
#[inline]
pub fn encode_slice<T: Element>(isa: Isa, format: KvFormat, src: &[T], scale: ScaleRow<'_>, dst: &mut [u8]) {
    assert_eq!(dst.len(), src.len() * format.bytes(), "bytes of {} elements of {format}", src.len());
    assert!(!format.is_quantized() || scale.covers(src.len()), "scales of {} elements", src.len());
    encode_row(isa, T::DTYPE, format, as_bytes(src), scale, dst);
}

/// `dst[i] = T::from_f32(decode(src[i]) * scale[i])` from `format`; `src` is little-endian storage
/// bytes.
///
/// Unquantized formats ignore the scale; where `T` is the storage type the row is copied, NaN
/// payloads included.
///
/// # Panics
/// Unless `src` is `dst.len() * format.bytes()` bytes and the scale covers `dst`.
#[inline]
pub fn decode_slice<T: Element>(isa: Isa, format: KvFormat, src: &[u8], scale: ScaleRow<'_>, dst: &mut [T]) {
    assert_eq!(src.len(), dst.len() * format.bytes(), "bytes of {} elements of {format}", dst.len());
    assert!(!format.is_quantized() || scale.covers(dst.len()), "scales of {} elements", dst.len());
    decode_row(isa, T::DTYPE, format, src, scale, as_bytes_mut(dst));
}

/// The largest |x| of a row: 0 if it is empty, NaN ignored, infinities count as `f32::MAX`.
#[inline]
pub fn absmax_slice<T: Element>(isa: Isa, src: &[T]) -> f32 {
    absmax_row(isa, T::DTYPE, as_bytes(src), ScaleRow::One(1.0))
}

/// The largest |x / scale| of a row, what [`dynamic_scale`](crate::scale::dynamic_scale) is made
/// from: 0 if it is empty, NaN ignored, infinities count as `f32::MAX`.
///
/// # Panics
/// Unless the scale covers `src`.
#[inline]
pub fn absmax_scaled_slice<T: Element>(isa: Isa, src: &[T], scale: ScaleRow<'_>) -> f32 {
    assert!(scale.covers(src.len()), "scales of {} elements", src.len());
    absmax_row(isa, T::DTYPE, as_bytes(src), scale)
}

/// Runs `$body` with `$C` naming the codec that stores a run-time [`DType`] unchanged.
macro_rules! with_dtype {
    ($dtype:expr, $C:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $C = PlainF32;
                $body
            }
            DType::F16 => {
                type $C = PlainF16;
                $body
            }
            DType::BF16 => {
                type $C = PlainBF16;
                $body
            }
        }
    };
}

/// [`encode_slice`] on bytes of `dtype`: not generic, so compiled once, here.
fn encode_row(isa: Isa, dtype: DType, format: KvFormat, src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
    if dtype.as_kv_format() == format {
        return dst.copy_from_slice(src);
    }
    let isa = isa.or_scalar();
    with_dtype!(dtype, A => with_codec!(format, B => {
        // SAFETY: `or_scalar` gives nothing this machine cannot run.
        if !unsafe { simd::encode::<A, B>(isa, src, scale, dst) } {
            encode_scalar::<A, B>(src, scale, dst);
        }
    }))
}

/// [`decode_slice`] to bytes of `dtype`.
fn decode_row(isa: Isa, dtype: DType, format: KvFormat, src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
    if dtype.as_kv_format() == format {
        return dst.copy_from_slice(src);
    }
    let isa = isa.or_scalar();
    with_codec!(format, A => with_dtype!(dtype, B => {
        // SAFETY: `or_scalar` gives nothing this machine cannot run.
        if !unsafe { simd::decode::<A, B>(isa, src, scale, dst) } {
            decode_scalar::<A, B>(src, scale, dst);
        }
    }))
}

/// [`absmax_scaled_slice`] of bytes of `dtype`.
fn absmax_row(isa: Isa, dtype: DType, src: &[u8], scale: ScaleRow<'_>) -> f32 {
    let isa = isa.or_scalar();
    with_dtype!(dtype, A => {
        // SAFETY: `or_scalar` gives nothing this machine cannot run.
        unsafe { simd::absmax::<A>(isa, src, scale) }.unwrap_or_else(|| absmax_scalar::<A>(src, scale))
    })
}

/// The specification of [`encode_slice`].
pub(super) fn encode_scalar<A: Codec, B: Codec>(src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
    for (i, (src, dst)) in src.chunks_exact(A::BYTES).zip(dst.chunks_exact_mut(B::BYTES)).enumerate() {
        let x = A::load(src);
        B::store(if B::QUANTIZED { x / scale.get(i) } else { x }, dst);
    }
}

/// The specification of [`decode_slice`].
pub(super) fn decode_scalar<A: Codec, B: Codec>(src: &[u8], scale: ScaleRow<'_>, dst: &mut [u8]) {
    for (i, (src, dst)) in src.chunks_exact(A::BYTES).zip(dst.chunks_exact_mut(B::BYTES)).enumerate() {
        let x = A::load(src);
        B::store(if A::QUANTIZED { x * scale.get(i) } else { x }, dst);
    }
}

/// The specification of [`absmax_scaled_slice`].
pub(super) fn absmax_scalar<A: Codec>(src: &[u8], scale: ScaleRow<'_>) -> f32 {
    // f32::max ignores a NaN operand.
    let magnitudes = src.chunks_exact(A::BYTES).enumerate().map(|(i, src)| (A::load(src) / scale.get(i)).abs());
    magnitudes.fold(0.0, f32::max).min(f32::MAX)
}

/// The bytes of a row of plain numbers.
pub(crate) fn as_bytes<T: Pod>(row: &[T]) -> &[u8] {
    // SAFETY: `Pod` types have no padding; the slice covers the same memory for the same lifetime.
    unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), size_of_val(row)) }
}

/// The bytes of a row of plain numbers, writable.
pub(crate) fn as_bytes_mut<T: Pod>(row: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a valid `Pod`; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast(), size_of_val(row)) }
}
