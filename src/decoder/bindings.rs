//! `csrc/quantkv_decoder.h` in Rust. Made by scripts/bindings.sh from that file: read it there.
#![allow(missing_docs, non_camel_case_types, clippy::all)]
#![allow(rustdoc::all)]
#![allow(unused_imports)] // in a stub build
use crate::raw::bindings::*;
#[doc = "out[r] = table[ids[r]]"]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_embed {
    #[doc = "device [vocab, width], of `weight`"]
    pub table: *const ::core::ffi::c_void,
    #[doc = "device [rows]"]
    pub ids: *const i32,
    #[doc = "device [rows, width], of `activation`"]
    pub out: *mut ::core::ffi::c_void,
    pub rows: i64,
    pub vocab: i64,
    pub width: i64,
    #[doc = "quantkv_format: F32, F16 or BF16"]
    pub weight: i32,
    #[doc = "quantkv_format: F32, F16 or BF16"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_embed"][::core::mem::size_of::<quantkv_decoder_embed>() - 56usize];
    ["Alignment of quantkv_decoder_embed"][::core::mem::align_of::<quantkv_decoder_embed>() - 8usize];
    ["Offset of field: quantkv_decoder_embed::table"][::core::mem::offset_of!(quantkv_decoder_embed, table) - 0usize];
    ["Offset of field: quantkv_decoder_embed::ids"][::core::mem::offset_of!(quantkv_decoder_embed, ids) - 8usize];
    ["Offset of field: quantkv_decoder_embed::out"][::core::mem::offset_of!(quantkv_decoder_embed, out) - 16usize];
    ["Offset of field: quantkv_decoder_embed::rows"][::core::mem::offset_of!(quantkv_decoder_embed, rows) - 24usize];
    ["Offset of field: quantkv_decoder_embed::vocab"][::core::mem::offset_of!(quantkv_decoder_embed, vocab) - 32usize];
    ["Offset of field: quantkv_decoder_embed::width"][::core::mem::offset_of!(quantkv_decoder_embed, width) - 40usize];
    ["Offset of field: quantkv_decoder_embed::weight"]
        [::core::mem::offset_of!(quantkv_decoder_embed, weight) - 48usize];
    ["Offset of field: quantkv_decoder_embed::activation"]
        [::core::mem::offset_of!(quantkv_decoder_embed, activation) - 52usize];
};
impl Default for quantkv_decoder_embed {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "out[r] = weight * (x[r] / sqrt(mean(x[r]^2) + eps)); `out` may be `x`."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_rms_norm {
    #[doc = "device [rows, width]"]
    pub x: *const ::core::ffi::c_void,
    #[doc = "device [width]"]
    pub weight: *const ::core::ffi::c_void,
    #[doc = "device [rows, width]"]
    pub out: *mut ::core::ffi::c_void,
    pub rows: i64,
    pub width: i64,
    pub eps: f32,
    #[doc = "of all three"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_rms_norm"][::core::mem::size_of::<quantkv_decoder_rms_norm>() - 48usize];
    ["Alignment of quantkv_decoder_rms_norm"][::core::mem::align_of::<quantkv_decoder_rms_norm>() - 8usize];
    ["Offset of field: quantkv_decoder_rms_norm::x"][::core::mem::offset_of!(quantkv_decoder_rms_norm, x) - 0usize];
    ["Offset of field: quantkv_decoder_rms_norm::weight"]
        [::core::mem::offset_of!(quantkv_decoder_rms_norm, weight) - 8usize];
    ["Offset of field: quantkv_decoder_rms_norm::out"]
        [::core::mem::offset_of!(quantkv_decoder_rms_norm, out) - 16usize];
    ["Offset of field: quantkv_decoder_rms_norm::rows"]
        [::core::mem::offset_of!(quantkv_decoder_rms_norm, rows) - 24usize];
    ["Offset of field: quantkv_decoder_rms_norm::width"]
        [::core::mem::offset_of!(quantkv_decoder_rms_norm, width) - 32usize];
    ["Offset of field: quantkv_decoder_rms_norm::eps"]
        [::core::mem::offset_of!(quantkv_decoder_rms_norm, eps) - 40usize];
    ["Offset of field: quantkv_decoder_rms_norm::activation"]
        [::core::mem::offset_of!(quantkv_decoder_rms_norm, activation) - 44usize];
};
impl Default for quantkv_decoder_rms_norm {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "cos[r, i], sin[r, i] = scaling * cos, sin(positions[r] * inv_freq[i]), the angle rounded to f32."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_rope_table {
    #[doc = "device [rows]"]
    pub positions: *const i32,
    #[doc = "device [half]"]
    pub inv_freq: *const f32,
    #[doc = "device [rows, half]"]
    pub cos: *mut f32,
    #[doc = "device [rows, half]"]
    pub sin: *mut f32,
    pub rows: i64,
    pub half: i64,
    pub scaling: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_rope_table"][::core::mem::size_of::<quantkv_decoder_rope_table>() - 56usize];
    ["Alignment of quantkv_decoder_rope_table"][::core::mem::align_of::<quantkv_decoder_rope_table>() - 8usize];
    ["Offset of field: quantkv_decoder_rope_table::positions"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, positions) - 0usize];
    ["Offset of field: quantkv_decoder_rope_table::inv_freq"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, inv_freq) - 8usize];
    ["Offset of field: quantkv_decoder_rope_table::cos"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, cos) - 16usize];
    ["Offset of field: quantkv_decoder_rope_table::sin"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, sin) - 24usize];
    ["Offset of field: quantkv_decoder_rope_table::rows"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, rows) - 32usize];
    ["Offset of field: quantkv_decoder_rope_table::half"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, half) - 40usize];
    ["Offset of field: quantkv_decoder_rope_table::scaling"]
        [::core::mem::offset_of!(quantkv_decoder_rope_table, scaling) - 48usize];
};
impl Default for quantkv_decoder_rope_table {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "Turns channels i and i + head_dim/2 of each head in place: (a cos - b sin, b cos + a sin)."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_rope {
    #[doc = "device [rows, heads, head_dim]"]
    pub x: *mut ::core::ffi::c_void,
    #[doc = "device [rows, head_dim / 2]"]
    pub cos: *const f32,
    #[doc = "device [rows, head_dim / 2]"]
    pub sin: *const f32,
    pub rows: i64,
    pub heads: i64,
    #[doc = "even"]
    pub head_dim: i64,
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_rope"][::core::mem::size_of::<quantkv_decoder_rope>() - 56usize];
    ["Alignment of quantkv_decoder_rope"][::core::mem::align_of::<quantkv_decoder_rope>() - 8usize];
    ["Offset of field: quantkv_decoder_rope::x"][::core::mem::offset_of!(quantkv_decoder_rope, x) - 0usize];
    ["Offset of field: quantkv_decoder_rope::cos"][::core::mem::offset_of!(quantkv_decoder_rope, cos) - 8usize];
    ["Offset of field: quantkv_decoder_rope::sin"][::core::mem::offset_of!(quantkv_decoder_rope, sin) - 16usize];
    ["Offset of field: quantkv_decoder_rope::rows"][::core::mem::offset_of!(quantkv_decoder_rope, rows) - 24usize];
    ["Offset of field: quantkv_decoder_rope::heads"][::core::mem::offset_of!(quantkv_decoder_rope, heads) - 32usize];
    ["Offset of field: quantkv_decoder_rope::head_dim"]
        [::core::mem::offset_of!(quantkv_decoder_rope, head_dim) - 40usize];
    ["Offset of field: quantkv_decoder_rope::activation"]
        [::core::mem::offset_of!(quantkv_decoder_rope, activation) - 48usize];
};
impl Default for quantkv_decoder_rope {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "silu_mul: x[i] = silu(x[i]) * y[i].   add: x[i] += y[i]."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_binary {
    #[doc = "device [len], in and out"]
    pub x: *mut ::core::ffi::c_void,
    #[doc = "device [len]"]
    pub y: *const ::core::ffi::c_void,
    pub len: i64,
    #[doc = "of both"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_binary"][::core::mem::size_of::<quantkv_decoder_binary>() - 32usize];
    ["Alignment of quantkv_decoder_binary"][::core::mem::align_of::<quantkv_decoder_binary>() - 8usize];
    ["Offset of field: quantkv_decoder_binary::x"][::core::mem::offset_of!(quantkv_decoder_binary, x) - 0usize];
    ["Offset of field: quantkv_decoder_binary::y"][::core::mem::offset_of!(quantkv_decoder_binary, y) - 8usize];
    ["Offset of field: quantkv_decoder_binary::len"][::core::mem::offset_of!(quantkv_decoder_binary, len) - 16usize];
    ["Offset of field: quantkv_decoder_binary::activation"]
        [::core::mem::offset_of!(quantkv_decoder_binary, activation) - 24usize];
};
impl Default for quantkv_decoder_binary {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "out[i] = x[rows[i]]"]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_gather_rows {
    #[doc = "device [num_rows, width]"]
    pub x: *const ::core::ffi::c_void,
    #[doc = "device [count]"]
    pub rows: *const i32,
    #[doc = "device [count, width]"]
    pub out: *mut ::core::ffi::c_void,
    pub count: i64,
    pub num_rows: i64,
    pub width: i64,
    #[doc = "of both"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_gather_rows"][::core::mem::size_of::<quantkv_decoder_gather_rows>() - 56usize];
    ["Alignment of quantkv_decoder_gather_rows"][::core::mem::align_of::<quantkv_decoder_gather_rows>() - 8usize];
    ["Offset of field: quantkv_decoder_gather_rows::x"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, x) - 0usize];
    ["Offset of field: quantkv_decoder_gather_rows::rows"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, rows) - 8usize];
    ["Offset of field: quantkv_decoder_gather_rows::out"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, out) - 16usize];
    ["Offset of field: quantkv_decoder_gather_rows::count"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, count) - 24usize];
    ["Offset of field: quantkv_decoder_gather_rows::num_rows"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, num_rows) - 32usize];
    ["Offset of field: quantkv_decoder_gather_rows::width"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, width) - 40usize];
    ["Offset of field: quantkv_decoder_gather_rows::activation"]
        [::core::mem::offset_of!(quantkv_decoder_gather_rows, activation) - 48usize];
};
impl Default for quantkv_decoder_gather_rows {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "out[r, o] = sum_i x[r, i] * weight[o, i] + bias[o]. For any shape, without tensor cores: the fallback where no matrix\n library is there, and what tests compare one with."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_linear {
    #[doc = "device [rows, inputs], of `activation`"]
    pub x: *const ::core::ffi::c_void,
    #[doc = "device [outputs, inputs], of `weight_format`"]
    pub weight: *const ::core::ffi::c_void,
    #[doc = "device [outputs], of `activation`, or null"]
    pub bias: *const ::core::ffi::c_void,
    #[doc = "device [rows, outputs], of `output`"]
    pub out: *mut ::core::ffi::c_void,
    pub rows: i64,
    pub inputs: i64,
    pub outputs: i64,
    pub activation: i32,
    pub weight_format: i32,
    #[doc = "`activation`, or F32"]
    pub output: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_linear"][::core::mem::size_of::<quantkv_decoder_linear>() - 72usize];
    ["Alignment of quantkv_decoder_linear"][::core::mem::align_of::<quantkv_decoder_linear>() - 8usize];
    ["Offset of field: quantkv_decoder_linear::x"][::core::mem::offset_of!(quantkv_decoder_linear, x) - 0usize];
    ["Offset of field: quantkv_decoder_linear::weight"]
        [::core::mem::offset_of!(quantkv_decoder_linear, weight) - 8usize];
    ["Offset of field: quantkv_decoder_linear::bias"][::core::mem::offset_of!(quantkv_decoder_linear, bias) - 16usize];
    ["Offset of field: quantkv_decoder_linear::out"][::core::mem::offset_of!(quantkv_decoder_linear, out) - 24usize];
    ["Offset of field: quantkv_decoder_linear::rows"][::core::mem::offset_of!(quantkv_decoder_linear, rows) - 32usize];
    ["Offset of field: quantkv_decoder_linear::inputs"]
        [::core::mem::offset_of!(quantkv_decoder_linear, inputs) - 40usize];
    ["Offset of field: quantkv_decoder_linear::outputs"]
        [::core::mem::offset_of!(quantkv_decoder_linear, outputs) - 48usize];
    ["Offset of field: quantkv_decoder_linear::activation"]
        [::core::mem::offset_of!(quantkv_decoder_linear, activation) - 56usize];
    ["Offset of field: quantkv_decoder_linear::weight_format"]
        [::core::mem::offset_of!(quantkv_decoder_linear, weight_format) - 60usize];
    ["Offset of field: quantkv_decoder_linear::output"]
        [::core::mem::offset_of!(quantkv_decoder_linear, output) - 64usize];
};
impl Default for quantkv_decoder_linear {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "Greedy sampling: the index of each row's largest logit, the lowest of equals; NaN is passed over. -1 where no logit\n is a number above -inf."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_argmax {
    #[doc = "device [rows, vocab]"]
    pub logits: *const f32,
    #[doc = "device [rows]"]
    pub ids: *mut i32,
    pub rows: i64,
    pub vocab: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_argmax"][::core::mem::size_of::<quantkv_decoder_argmax>() - 32usize];
    ["Alignment of quantkv_decoder_argmax"][::core::mem::align_of::<quantkv_decoder_argmax>() - 8usize];
    ["Offset of field: quantkv_decoder_argmax::logits"]
        [::core::mem::offset_of!(quantkv_decoder_argmax, logits) - 0usize];
    ["Offset of field: quantkv_decoder_argmax::ids"][::core::mem::offset_of!(quantkv_decoder_argmax, ids) - 8usize];
    ["Offset of field: quantkv_decoder_argmax::rows"][::core::mem::offset_of!(quantkv_decoder_argmax, rows) - 16usize];
    ["Offset of field: quantkv_decoder_argmax::vocab"]
        [::core::mem::offset_of!(quantkv_decoder_argmax, vocab) - 24usize];
};
impl Default for quantkv_decoder_argmax {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "Random weights: element i is a number of mean 0 and of standard deviation `deviation` made from (seed, i) alone, the\n same bits on every device: the sum of the four 16-bit words of a hash, centred and scaled (csrc/ops/decoder/random.h)."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_decoder_random {
    #[doc = "device [len]"]
    pub out: *mut ::core::ffi::c_void,
    pub len: i64,
    pub seed: u64,
    pub deviation: f32,
    #[doc = "quantkv_format: F32, F16 or BF16"]
    pub format: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_decoder_random"][::core::mem::size_of::<quantkv_decoder_random>() - 32usize];
    ["Alignment of quantkv_decoder_random"][::core::mem::align_of::<quantkv_decoder_random>() - 8usize];
    ["Offset of field: quantkv_decoder_random::out"][::core::mem::offset_of!(quantkv_decoder_random, out) - 0usize];
    ["Offset of field: quantkv_decoder_random::len"][::core::mem::offset_of!(quantkv_decoder_random, len) - 8usize];
    ["Offset of field: quantkv_decoder_random::seed"][::core::mem::offset_of!(quantkv_decoder_random, seed) - 16usize];
    ["Offset of field: quantkv_decoder_random::deviation"]
        [::core::mem::offset_of!(quantkv_decoder_random, deviation) - 24usize];
    ["Offset of field: quantkv_decoder_random::format"]
        [::core::mem::offset_of!(quantkv_decoder_random, format) - 28usize];
};
impl Default for quantkv_decoder_random {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[cfg(not(quantkv_stub))]
unsafe extern "C" {
    pub fn quantkv_cuda_decoder_embed(op: *const quantkv_decoder_embed, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_rms_norm(
        op: *const quantkv_decoder_rms_norm,
        stream: quantkv_stream,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_rope_table(
        op: *const quantkv_decoder_rope_table,
        stream: quantkv_stream,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_rope(op: *const quantkv_decoder_rope, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_silu_mul(
        op: *const quantkv_decoder_binary,
        stream: quantkv_stream,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_add(op: *const quantkv_decoder_binary, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_gather_rows(
        op: *const quantkv_decoder_gather_rows,
        stream: quantkv_stream,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_linear(op: *const quantkv_decoder_linear, stream: quantkv_stream)
    -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_argmax(op: *const quantkv_decoder_argmax, stream: quantkv_stream)
    -> ::core::ffi::c_int;
    pub fn quantkv_cuda_decoder_random(op: *const quantkv_decoder_random, stream: quantkv_stream)
    -> ::core::ffi::c_int;
}
