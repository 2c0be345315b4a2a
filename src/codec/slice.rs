//! The codecs over slices: what every CPU kernel encodes, decodes and measures rows with.
//!
//! The instruction set is an argument, decided once by the caller; one test of it a call, none
//! inside a loop. Every [`Isa`] gives the same bits as the scalar loops here
//! (`docs/numerics.md`), which are the specification.

use super::{Codec, with_codec};
use crate::format::{Element, KvFormat, Pod};
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
    if T::DTYPE.as_kv_format() == format {
        return dst.copy_from_slice(as_bytes(src));
    }
    assert!(!format.is_quantized() || scale.covers(src.len()), "scales of {} elements", src.len());
    let _ = isa;
    with_codec!(format, C => encode_scalar::<T, C>(src, scale, dst))
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
    if T::DTYPE.as_kv_format() == format {
        return as_bytes_mut(dst).copy_from_slice(src);
    }
    assert!(!format.is_quantized() || scale.covers(dst.len()), "scales of {} elements", dst.len());
    let _ = isa;
    with_codec!(format, C => decode_scalar::<T, C>(src, scale, dst))
}

/// The largest |x| of a row: 0 if it is empty, NaN ignored, infinities count as `f32::MAX`.
#[inline]
pub fn absmax_slice<T: Element>(isa: Isa, src: &[T]) -> f32 {
    absmax_scaled_slice(isa, src, ScaleRow::One(1.0))
}

/// The largest |x / scale| of a row, what [`dynamic_scale`](crate::scale::dynamic_scale) is made
/// from: 0 if it is empty, NaN ignored, infinities count as `f32::MAX`.
///
/// # Panics
/// Unless the scale covers `src`.
#[inline]
pub fn absmax_scaled_slice<T: Element>(isa: Isa, src: &[T], scale: ScaleRow<'_>) -> f32 {
    assert!(scale.covers(src.len()), "scales of {} elements", src.len());
    let _ = isa;
    absmax_scalar(src, scale)
}

fn encode_scalar<T: Element, C: Codec>(src: &[T], scale: ScaleRow<'_>, dst: &mut [u8]) {
    for (i, (x, dst)) in src.iter().zip(dst.chunks_exact_mut(C::BYTES)).enumerate() {
        let x = x.to_f32();
        C::store(if C::QUANTIZED { x / scale.get(i) } else { x }, dst);
    }
}

fn decode_scalar<T: Element, C: Codec>(src: &[u8], scale: ScaleRow<'_>, dst: &mut [T]) {
    for (i, (src, y)) in src.chunks_exact(C::BYTES).zip(dst).enumerate() {
        let x = C::load(src);
        *y = T::from_f32(if C::QUANTIZED { x * scale.get(i) } else { x });
    }
}

fn absmax_scalar<T: Element>(src: &[T], scale: ScaleRow<'_>) -> f32 {
    // f32::max ignores a NaN operand.
    let max = src.iter().enumerate().fold(0.0f32, |max, (i, x)| max.max((x.to_f32() / scale.get(i)).abs()));
    max.min(f32::MAX)
}

/// The bytes of a row of plain numbers.
fn as_bytes<T: Pod>(row: &[T]) -> &[u8] {
    // SAFETY: `Pod` types have no padding; the slice covers the same memory for the same lifetime.
    unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), size_of_val(row)) }
}

/// The bytes of a row of plain numbers, writable.
fn as_bytes_mut<T: Pod>(row: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a valid `Pod`; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(row.as_mut_ptr().cast(), size_of_val(row)) }
}
