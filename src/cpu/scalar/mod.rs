//! The specification: every operation as straight loops over tokens, heads and channels.
//!
//! Written for reading: one element at a time, placed by
//! [`AddressMap`](crate::layout::AddressMap), in the order the formulas of [`crate::args`] are
//! written. The fast forms are held to these bytes.

mod absmax;
mod cache_write;
mod convert;
mod gather;
mod merge_states;
mod paged_attention;

pub(super) use absmax::{absmax, raise, update_scales};
pub(super) use cache_write::cache_write;
pub(super) use convert::{dequantize, quantize};
pub(super) use gather::{gather, gather_bytes};
pub(super) use merge_states::{Merge, merge_states, weighted_mean};
pub(super) use paged_attention::paged_attention;

use super::*;
use crate::codec::{ScaleRow, decode_slice, encode_slice};
use crate::layout::Half;
use crate::scale::{ScaleRef, combined_scale};

/// One half (K or V) of a layer's cache, for reading.
struct HalfRef<'a> {
    shape: CacheShape,
    half: Half,
    bytes: &'a [u8],
    dynamic: Option<&'a [f32]>,
    scale: ScaleRef<'a, CpuBackend>,
}

impl HalfRef<'_> {
    /// The dequantized value of `(block, head, slot, channel)`.
    fn value<T: Element>(&self, block: usize, head: usize, slot: usize, channel: usize) -> T {
        let format = self.shape.spec.format(self.half);
        let at = self.shape.map(self.half).index(block, head, slot, channel) * format.bytes();
        let own = self.dynamic.map(|dynamic| dynamic[self.shape.dynamic_scale_index(block, head, slot)]);
        let scale = static_and_dynamic(format, &self.scale, head, channel, own);
        load(format, &self.bytes[at..at + format.bytes()], scale)
    }
}

impl ScaleRef<'_, CpuBackend> {
    /// The static scale of `(head, channel)`.
    fn at(&self, head: usize, channel: usize) -> f32 {
        self.values[self.strides.index(head, channel)]
    }
}

/// The scale of one value. Unquantized formats have none: theirs is not read.
fn static_and_dynamic(
    format: KvFormat,
    fixed: &ScaleRef<'_, CpuBackend>,
    head: usize,
    channel: usize,
    own: Option<f32>,
) -> f32 {
    match own {
        _ if !format.is_quantized() => 1.0,
        None => fixed.at(head, channel),
        Some(own) => combined_scale(fixed.at(head, channel), own),
    }
}

/// Writes `encode(x / scale)`.
fn store<T: Element>(format: KvFormat, x: T, scale: f32, code: &mut [u8]) {
    encode_slice(Isa::Scalar, format, &[x], ScaleRow::One(scale), code);
}

/// Reads `decode(code) * scale`.
fn load<T: Element>(format: KvFormat, code: &[u8], scale: f32) -> T {
    let mut x = [T::default()];
    decode_slice(Isa::Scalar, format, code, ScaleRow::One(scale), &mut x);
    x[0]
}
