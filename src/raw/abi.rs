//! From argument structs over pointers to the structs of `quantkv.h`. The only place that knows both.
//!
//! Structs come here validated, so every length and every product of sizes is within memory. A stride that
//! is never multiplied by anything but zero, or a window, may still be any `usize`: those are cut to
//! [`MEMORY`].

use std::ffi::c_void;

use super::bindings::*;
use super::{Pointers, PtrMut, PtrRef};
use crate::args::{LayerMut, LayerRef, RowStrides};
use crate::error::{Error, Result};
use crate::faults::Faults;
use crate::format::{DType, KvFormat};
use crate::layout::{AddressMap, CacheShape, Half};
use crate::scale::ScaleRef;

// The fault word that kernels write is read as `Faults`.
const _: () = {
    assert!(Faults::SLOT_OUT_OF_RANGE.bits() == QUANTKV_FAULT_SLOT as u32);
    assert!(Faults::BLOCK_OUT_OF_RANGE.bits() == QUANTKV_FAULT_BLOCK as u32);
    assert!(Faults::SEQ_LEN_OUT_OF_RANGE.bits() == QUANTKV_FAULT_SEQ_LEN as u32);
    assert!(Faults::QUERY_START_OUT_OF_RANGE.bits() == QUANTKV_FAULT_QUERY_START as u32);
    assert!(Faults::NOT_THE_PLAN.bits() == QUANTKV_FAULT_PLAN as u32);
};

/// One half of a layer by address: codes, dynamic scales (null: none), static scales.
pub(super) struct HalfPointers<'a> {
    pub codes: *mut u8,
    pub dynamic: *mut f32,
    pub scale: Option<ScaleRef<'a, Pointers>>,
}

/// K and V of a layer that is only read. The kernels that get it write to neither.
pub(super) fn read_only<'a>(
    layer: &LayerRef<'_, Pointers>,
    k_scale: Option<ScaleRef<'a, Pointers>>,
    v_scale: Option<ScaleRef<'a, Pointers>>,
) -> [HalfPointers<'a>; 2] {
    let dynamic = |scales: Option<PtrRef<f32>>| optional(scales).cast_mut();
    [
        HalfPointers { codes: layer.k.ptr.cast_mut(), dynamic: dynamic(layer.k_dynamic), scale: k_scale },
        HalfPointers { codes: layer.v.ptr.cast_mut(), dynamic: dynamic(layer.v_dynamic), scale: v_scale },
    ]
}

/// K and V of a layer that is written to.
pub(super) fn writable<'a>(
    layer: &LayerMut<'_, Pointers>,
    k_scale: Option<ScaleRef<'a, Pointers>>,
    v_scale: Option<ScaleRef<'a, Pointers>>,
) -> [HalfPointers<'a>; 2] {
    [
        HalfPointers { codes: layer.k.ptr, dynamic: optional_mut(layer.k_dynamic), scale: k_scale },
        HalfPointers { codes: layer.v.ptr, dynamic: optional_mut(layer.v_dynamic), scale: v_scale },
    ]
}

pub(super) fn cache(shape: &CacheShape, [k, v]: [HalfPointers<'_>; 2], faults: *mut u32) -> Result<quantkv_cache> {
    Ok(quantkv_cache {
        k: half(shape, Half::K, k)?,
        v: half(shape, Half::V, v)?,
        num_blocks: int64(shape.num_blocks),
        block_size: int32("block size", shape.spec.block_size)?,
        num_kv_heads: int32("the number of KV heads", shape.spec.num_kv_heads)?,
        faults,
    })
}

fn half(shape: &CacheShape, which: Half, pointers: HalfPointers<'_>) -> Result<quantkv_half> {
    let spec = &shape.spec;
    let stored = spec.format(which);
    check_aligned("the cache", pointers.codes, stored.bytes())?;
    Ok(quantkv_half {
        codes: pointers.codes.cast(),
        dynamic: pointers.dynamic,
        scale: scale(stored, pointers.scale),
        map: address_map(shape.map(which)),
        format: format(stored),
        head_dim: int32("head dim", spec.head_dim(which))?,
    })
}

/// Static scales; those of an unquantized format are not read and may be anything.
pub(super) fn scale(stored: KvFormat, scale: Option<ScaleRef<'_, Pointers>>) -> quantkv_scale {
    match scale.filter(|_| stored.is_quantized()) {
        Some(ScaleRef { values, strides }) => quantkv_scale {
            values: values.ptr,
            head_stride: int64(strides.head),
            channel_stride: int64(strides.channel),
        },
        None => quantkv_scale { values: std::ptr::null(), head_stride: 0, channel_stride: 0 },
    }
}

fn address_map(map: &AddressMap) -> quantkv_address_map {
    quantkv_address_map {
        block_stride: int64(map.block_stride),
        head_stride: int64(map.head_stride),
        slot_stride: int64(map.slot_stride),
        chunk: int64(map.chunk),
        chunk_stride: int64(map.chunk_stride),
    }
}

/// Rows that are read.
pub(super) fn rows_in<T>(data: PtrRef<T>, strides: RowStrides) -> quantkv_rows {
    rows(data.ptr.cast_mut().cast(), strides)
}

/// Rows that are written.
pub(super) fn rows_out<T>(data: PtrMut<T>, strides: RowStrides) -> quantkv_rows {
    rows(data.ptr.cast(), strides)
}

fn rows(data: *mut c_void, strides: RowStrides) -> quantkv_rows {
    quantkv_rows { data, token_stride: int64(strides.token), head_stride: int64(strides.head) }
}

pub(super) fn optional<T>(buffer: Option<PtrRef<T>>) -> *const T {
    buffer.map_or(std::ptr::null(), |buffer| buffer.ptr)
}

pub(super) fn optional_mut<T>(buffer: Option<PtrMut<T>>) -> *mut T {
    buffer.map_or(std::ptr::null_mut(), |buffer| buffer.ptr)
}

pub(super) fn format(stored: KvFormat) -> i32 {
    match stored {
        KvFormat::F32 => QUANTKV_F32,
        KvFormat::F16 => QUANTKV_F16,
        KvFormat::BF16 => QUANTKV_BF16,
        KvFormat::Fp8E4M3 => QUANTKV_FP8_E4M3,
        KvFormat::Fp8E5M2 => QUANTKV_FP8_E5M2,
        KvFormat::Fp8E4M3Fnuz => QUANTKV_FP8_E4M3_FNUZ,
    }
}

pub(crate) fn activation(dtype: DType) -> i32 {
    format(dtype.as_kv_format())
}

pub(super) fn int32(what: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Unsupported { what, value, supported: "at most 2147483647" })
}

/// More than any memory holds, and the largest size and stride that the C side takes.
const MEMORY: i64 = 1 << 60;

pub(super) fn int64(value: usize) -> i64 {
    i64::try_from(value).map_or(MEMORY, |value| value.min(MEMORY))
}

/// Refuses bytes that do not start where one of their elements may.
pub(super) fn check_aligned<T>(what: &'static str, data: *const T, align: usize) -> Result<()> {
    if data.addr().is_multiple_of(align) { Ok(()) } else { Err(Error::Misaligned { what, align }) }
}

/// The same for a buffer, which may be empty and anywhere.
pub(super) fn check_buffer_aligned<T>(what: &'static str, buffer: PtrRef<T>, align: usize) -> Result<()> {
    if buffer.len == 0 { Ok(()) } else { check_aligned(what, buffer.ptr, align) }
}
