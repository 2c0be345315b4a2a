//! The C ABI, `csrc/quantkv.h`, in Rust. Made by scripts/bindings.sh from that file: read it there.
#![allow(missing_docs, non_camel_case_types, clippy::all)]
#![allow(rustdoc::all)]
pub const QUANTKV_ABI_VERSION: u32 = 1;
pub const QUANTKV_OK: quantkv_status = 0;
#[doc = "A shape, stride, format or pointer in the struct is not possible."]
pub const QUANTKV_INVALID_ARGUMENT: quantkv_status = 1;
#[doc = "Possible, but there is no kernel for it on this device."]
pub const QUANTKV_UNSUPPORTED: quantkv_status = 2;
#[doc = "The workspace is smaller than the matching *_workspace_bytes() says."]
pub const QUANTKV_WORKSPACE_TOO_SMALL: quantkv_status = 3;
#[doc = "The library holds no code for this device (see QUANTKV_CUDA_ARCHS)."]
pub const QUANTKV_NO_KERNEL_FOR_DEVICE: quantkv_status = 4;
#[doc = "No driver, or no device."]
pub const QUANTKV_NO_DEVICE: quantkv_status = 5;
#[doc = "QUANTKV_DEVICE_ERROR + e: the runtime refused a launch with its error e."]
pub const QUANTKV_DEVICE_ERROR: quantkv_status = 1000;
#[doc = "What a call answers."]
pub type quantkv_status = ::core::ffi::c_int;
pub const QUANTKV_F32: quantkv_format = 0;
pub const QUANTKV_F16: quantkv_format = 1;
pub const QUANTKV_BF16: quantkv_format = 2;
pub const QUANTKV_FP8_E4M3: quantkv_format = 3;
pub const QUANTKV_FP8_E5M2: quantkv_format = 4;
pub const QUANTKV_FP8_E4M3_FNUZ: quantkv_format = 5;
#[doc = "How an element is stored (caches, dense codes) or computed with (activations: the first three)."]
pub type quantkv_format = ::core::ffi::c_int;
pub const QUANTKV_FAULT_SLOT: quantkv_fault = 1;
pub const QUANTKV_FAULT_BLOCK: quantkv_fault = 2;
pub const QUANTKV_FAULT_SEQ_LEN: quantkv_fault = 4;
pub const QUANTKV_FAULT_QUERY_START: quantkv_fault = 8;
pub const QUANTKV_FAULT_PLAN: quantkv_fault = 16;
#[doc = "Bits of the sticky fault word: what kernels found in device data."]
pub type quantkv_fault = ::core::ffi::c_int;
#[doc = "A CUstream / cudaStream_t. Null is the default stream."]
pub type quantkv_stream = *mut ::core::ffi::c_void;
#[doc = "Where element (block, head, slot, channel) lies, in elements:\n   block*block_stride + head*head_stride + slot*slot_stride + (channel/chunk)*chunk_stride + channel%chunk\n HND and NHD: chunk >= head_dim."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct quantkv_address_map {
    pub block_stride: i64,
    pub head_stride: i64,
    pub slot_stride: i64,
    pub chunk: i64,
    pub chunk_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_address_map"][::core::mem::size_of::<quantkv_address_map>() - 40usize];
    ["Alignment of quantkv_address_map"][::core::mem::align_of::<quantkv_address_map>() - 8usize];
    ["Offset of field: quantkv_address_map::block_stride"]
        [::core::mem::offset_of!(quantkv_address_map, block_stride) - 0usize];
    ["Offset of field: quantkv_address_map::head_stride"]
        [::core::mem::offset_of!(quantkv_address_map, head_stride) - 8usize];
    ["Offset of field: quantkv_address_map::slot_stride"]
        [::core::mem::offset_of!(quantkv_address_map, slot_stride) - 16usize];
    ["Offset of field: quantkv_address_map::chunk"][::core::mem::offset_of!(quantkv_address_map, chunk) - 24usize];
    ["Offset of field: quantkv_address_map::chunk_stride"]
        [::core::mem::offset_of!(quantkv_address_map, chunk_stride) - 32usize];
};
#[doc = "Static scales: device f32, value at head*head_stride + channel*channel_stride; stride 0 broadcasts.\n Ignored (may be null) where the format is not FP8."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_scale {
    pub values: *const f32,
    pub head_stride: i64,
    pub channel_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_scale"][::core::mem::size_of::<quantkv_scale>() - 24usize];
    ["Alignment of quantkv_scale"][::core::mem::align_of::<quantkv_scale>() - 8usize];
    ["Offset of field: quantkv_scale::values"][::core::mem::offset_of!(quantkv_scale, values) - 0usize];
    ["Offset of field: quantkv_scale::head_stride"][::core::mem::offset_of!(quantkv_scale, head_stride) - 8usize];
    ["Offset of field: quantkv_scale::channel_stride"]
        [::core::mem::offset_of!(quantkv_scale, channel_stride) - 16usize];
};
impl Default for quantkv_scale {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "One half (K or V) of one layer's cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_half {
    #[doc = "device [num_blocks, ...map]; aligned to 16 bytes for the fast kernels, else to an element"]
    pub codes: *mut ::core::ffi::c_void,
    #[doc = "device [num_blocks, num_kv_heads, block_size], or null: no scale per (slot, head)"]
    pub dynamic: *mut f32,
    pub scale: quantkv_scale,
    pub map: quantkv_address_map,
    #[doc = "quantkv_format"]
    pub format: i32,
    #[doc = "1 .. 512"]
    pub head_dim: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_half"][::core::mem::size_of::<quantkv_half>() - 88usize];
    ["Alignment of quantkv_half"][::core::mem::align_of::<quantkv_half>() - 8usize];
    ["Offset of field: quantkv_half::codes"][::core::mem::offset_of!(quantkv_half, codes) - 0usize];
    ["Offset of field: quantkv_half::dynamic"][::core::mem::offset_of!(quantkv_half, dynamic) - 8usize];
    ["Offset of field: quantkv_half::scale"][::core::mem::offset_of!(quantkv_half, scale) - 16usize];
    ["Offset of field: quantkv_half::map"][::core::mem::offset_of!(quantkv_half, map) - 40usize];
    ["Offset of field: quantkv_half::format"][::core::mem::offset_of!(quantkv_half, format) - 80usize];
    ["Offset of field: quantkv_half::head_dim"][::core::mem::offset_of!(quantkv_half, head_dim) - 84usize];
};
impl Default for quantkv_half {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "One layer's cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_cache {
    pub k: quantkv_half,
    pub v: quantkv_half,
    pub num_blocks: i64,
    #[doc = "a power of two, 8 .. 256"]
    pub block_size: i32,
    pub num_kv_heads: i32,
    #[doc = "device, one word, sticky; or null: checked all the same, not reported"]
    pub faults: *mut u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_cache"][::core::mem::size_of::<quantkv_cache>() - 200usize];
    ["Alignment of quantkv_cache"][::core::mem::align_of::<quantkv_cache>() - 8usize];
    ["Offset of field: quantkv_cache::k"][::core::mem::offset_of!(quantkv_cache, k) - 0usize];
    ["Offset of field: quantkv_cache::v"][::core::mem::offset_of!(quantkv_cache, v) - 88usize];
    ["Offset of field: quantkv_cache::num_blocks"][::core::mem::offset_of!(quantkv_cache, num_blocks) - 176usize];
    ["Offset of field: quantkv_cache::block_size"][::core::mem::offset_of!(quantkv_cache, block_size) - 184usize];
    ["Offset of field: quantkv_cache::num_kv_heads"][::core::mem::offset_of!(quantkv_cache, num_kv_heads) - 188usize];
    ["Offset of field: quantkv_cache::faults"][::core::mem::offset_of!(quantkv_cache, faults) - 192usize];
};
impl Default for quantkv_cache {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "Rows [tokens, heads, dim]: channels contiguous, element (t, h, d) at t*token_stride + h*head_stride + d."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_rows {
    #[doc = "device; only read where the struct says \"in\""]
    pub data: *mut ::core::ffi::c_void,
    pub token_stride: i64,
    pub head_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_rows"][::core::mem::size_of::<quantkv_rows>() - 24usize];
    ["Alignment of quantkv_rows"][::core::mem::align_of::<quantkv_rows>() - 8usize];
    ["Offset of field: quantkv_rows::data"][::core::mem::offset_of!(quantkv_rows, data) - 0usize];
    ["Offset of field: quantkv_rows::token_stride"][::core::mem::offset_of!(quantkv_rows, token_stride) - 8usize];
    ["Offset of field: quantkv_rows::head_stride"][::core::mem::offset_of!(quantkv_rows, head_stride) - 16usize];
};
impl Default for quantkv_rows {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "cache_write: quantize keys and values and scatter them to their slots"]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_cache_write {
    pub cache: quantkv_cache,
    #[doc = "in  [num_tokens.., num_kv_heads, k.head_dim]"]
    pub key: quantkv_rows,
    #[doc = "in  [num_tokens.., num_kv_heads, v.head_dim]"]
    pub value: quantkv_rows,
    #[doc = "device [num_tokens]; negative = skip. Of tokens on one slot any may win, element by\nelement: give each its own"]
    pub slot_mapping: *const i64,
    pub num_tokens: i64,
    #[doc = "quantkv_format of key and value: F32, F16 or BF16"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_cache_write"][::core::mem::size_of::<quantkv_cache_write>() - 272usize];
    ["Alignment of quantkv_cache_write"][::core::mem::align_of::<quantkv_cache_write>() - 8usize];
    ["Offset of field: quantkv_cache_write::cache"][::core::mem::offset_of!(quantkv_cache_write, cache) - 0usize];
    ["Offset of field: quantkv_cache_write::key"][::core::mem::offset_of!(quantkv_cache_write, key) - 200usize];
    ["Offset of field: quantkv_cache_write::value"][::core::mem::offset_of!(quantkv_cache_write, value) - 224usize];
    ["Offset of field: quantkv_cache_write::slot_mapping"]
        [::core::mem::offset_of!(quantkv_cache_write, slot_mapping) - 248usize];
    ["Offset of field: quantkv_cache_write::num_tokens"]
        [::core::mem::offset_of!(quantkv_cache_write, num_tokens) - 256usize];
    ["Offset of field: quantkv_cache_write::activation"]
        [::core::mem::offset_of!(quantkv_cache_write, activation) - 264usize];
};
impl Default for quantkv_cache_write {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "A run of memory that is a table of equal blocks."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_block_table_memory {
    #[doc = "device"]
    pub base: *mut ::core::ffi::c_void,
    pub block_stride_bytes: i64,
    pub block_bytes: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_block_table_memory"][::core::mem::size_of::<quantkv_block_table_memory>() - 24usize];
    ["Alignment of quantkv_block_table_memory"][::core::mem::align_of::<quantkv_block_table_memory>() - 8usize];
    ["Offset of field: quantkv_block_table_memory::base"]
        [::core::mem::offset_of!(quantkv_block_table_memory, base) - 0usize];
    ["Offset of field: quantkv_block_table_memory::block_stride_bytes"]
        [::core::mem::offset_of!(quantkv_block_table_memory, block_stride_bytes) - 8usize];
    ["Offset of field: quantkv_block_table_memory::block_bytes"]
        [::core::mem::offset_of!(quantkv_block_table_memory, block_bytes) - 16usize];
};
impl Default for quantkv_block_table_memory {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "Copies block pairs[2i] to pairs[2i+1] in each of `num_tables` memories (2 to 4 a layer: K, V and their\n dynamic scales). Sources and destinations must be disjoint: copies run in no order."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_copy_blocks {
    #[doc = "device [num_tables]"]
    pub tables: *const quantkv_block_table_memory,
    pub num_tables: i64,
    #[doc = "device [num_pairs, 2]"]
    pub pairs: *const i64,
    pub num_pairs: i64,
    #[doc = "ids outside are skipped and set QUANTKV_FAULT_BLOCK"]
    pub num_blocks: i64,
    #[doc = "the largest block_bytes: sizes the launch"]
    pub max_block_bytes: i64,
    #[doc = "device, or null"]
    pub faults: *mut u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_copy_blocks"][::core::mem::size_of::<quantkv_copy_blocks>() - 56usize];
    ["Alignment of quantkv_copy_blocks"][::core::mem::align_of::<quantkv_copy_blocks>() - 8usize];
    ["Offset of field: quantkv_copy_blocks::tables"][::core::mem::offset_of!(quantkv_copy_blocks, tables) - 0usize];
    ["Offset of field: quantkv_copy_blocks::num_tables"]
        [::core::mem::offset_of!(quantkv_copy_blocks, num_tables) - 8usize];
    ["Offset of field: quantkv_copy_blocks::pairs"][::core::mem::offset_of!(quantkv_copy_blocks, pairs) - 16usize];
    ["Offset of field: quantkv_copy_blocks::num_pairs"]
        [::core::mem::offset_of!(quantkv_copy_blocks, num_pairs) - 24usize];
    ["Offset of field: quantkv_copy_blocks::num_blocks"]
        [::core::mem::offset_of!(quantkv_copy_blocks, num_blocks) - 32usize];
    ["Offset of field: quantkv_copy_blocks::max_block_bytes"]
        [::core::mem::offset_of!(quantkv_copy_blocks, max_block_bytes) - 40usize];
    ["Offset of field: quantkv_copy_blocks::faults"][::core::mem::offset_of!(quantkv_copy_blocks, faults) - 48usize];
};
impl Default for quantkv_copy_blocks {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "One copy: `bytes` from `src` to `dst`, either in device or in (best page-locked) host memory, which is page-locked\n from end to end or not at all."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_memory_copy {
    pub dst: *mut ::core::ffi::c_void,
    pub src: *const ::core::ffi::c_void,
    pub bytes: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_memory_copy"][::core::mem::size_of::<quantkv_memory_copy>() - 24usize];
    ["Alignment of quantkv_memory_copy"][::core::mem::align_of::<quantkv_memory_copy>() - 8usize];
    ["Offset of field: quantkv_memory_copy::dst"][::core::mem::offset_of!(quantkv_memory_copy, dst) - 0usize];
    ["Offset of field: quantkv_memory_copy::src"][::core::mem::offset_of!(quantkv_memory_copy, src) - 8usize];
    ["Offset of field: quantkv_memory_copy::bytes"][::core::mem::offset_of!(quantkv_memory_copy, bytes) - 16usize];
};
impl Default for quantkv_memory_copy {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "gather: paged to dense"]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_gather {
    pub cache: quantkv_cache,
    #[doc = "device [num_seqs, block_table_stride]"]
    pub block_tables: *const i32,
    pub block_table_stride: i64,
    #[doc = "device [num_seqs + 1]: output rows of each sequence"]
    pub cu_seq_lens: *const i32,
    #[doc = "device [num_seqs]: first position of each, or null: 0"]
    pub starts: *const i32,
    pub num_seqs: i64,
    #[doc = "output rows"]
    pub num_tokens: i64,
    #[doc = "out [num_tokens, num_kv_heads, k.head_dim]"]
    pub key: quantkv_rows,
    #[doc = "out [num_tokens, num_kv_heads, v.head_dim]"]
    pub value: quantkv_rows,
    #[doc = "of key and value; or -1: the raw codes, rows gapless, strides ignored"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_gather"][::core::mem::size_of::<quantkv_gather>() - 304usize];
    ["Alignment of quantkv_gather"][::core::mem::align_of::<quantkv_gather>() - 8usize];
    ["Offset of field: quantkv_gather::cache"][::core::mem::offset_of!(quantkv_gather, cache) - 0usize];
    ["Offset of field: quantkv_gather::block_tables"][::core::mem::offset_of!(quantkv_gather, block_tables) - 200usize];
    ["Offset of field: quantkv_gather::block_table_stride"]
        [::core::mem::offset_of!(quantkv_gather, block_table_stride) - 208usize];
    ["Offset of field: quantkv_gather::cu_seq_lens"][::core::mem::offset_of!(quantkv_gather, cu_seq_lens) - 216usize];
    ["Offset of field: quantkv_gather::starts"][::core::mem::offset_of!(quantkv_gather, starts) - 224usize];
    ["Offset of field: quantkv_gather::num_seqs"][::core::mem::offset_of!(quantkv_gather, num_seqs) - 232usize];
    ["Offset of field: quantkv_gather::num_tokens"][::core::mem::offset_of!(quantkv_gather, num_tokens) - 240usize];
    ["Offset of field: quantkv_gather::key"][::core::mem::offset_of!(quantkv_gather, key) - 248usize];
    ["Offset of field: quantkv_gather::value"][::core::mem::offset_of!(quantkv_gather, value) - 272usize];
    ["Offset of field: quantkv_gather::activation"][::core::mem::offset_of!(quantkv_gather, activation) - 296usize];
};
impl Default for quantkv_gather {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "scales"]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_absmax {
    #[doc = "in [num_tokens, num_heads, head_dim]"]
    pub input: quantkv_rows,
    pub num_tokens: i64,
    pub num_heads: i32,
    pub head_dim: i32,
    pub activation: i32,
    #[doc = "of `running`: (0, 0) per tensor, (1, 0) per head, (head_dim, 1) per channel"]
    pub head_stride: i64,
    pub channel_stride: i64,
    #[doc = "device: running = max(running, |x|); NaN ignored, infinities are FLT_MAX"]
    pub running: *mut f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_absmax"][::core::mem::size_of::<quantkv_absmax>() - 72usize];
    ["Alignment of quantkv_absmax"][::core::mem::align_of::<quantkv_absmax>() - 8usize];
    ["Offset of field: quantkv_absmax::input"][::core::mem::offset_of!(quantkv_absmax, input) - 0usize];
    ["Offset of field: quantkv_absmax::num_tokens"][::core::mem::offset_of!(quantkv_absmax, num_tokens) - 24usize];
    ["Offset of field: quantkv_absmax::num_heads"][::core::mem::offset_of!(quantkv_absmax, num_heads) - 32usize];
    ["Offset of field: quantkv_absmax::head_dim"][::core::mem::offset_of!(quantkv_absmax, head_dim) - 36usize];
    ["Offset of field: quantkv_absmax::activation"][::core::mem::offset_of!(quantkv_absmax, activation) - 40usize];
    ["Offset of field: quantkv_absmax::head_stride"][::core::mem::offset_of!(quantkv_absmax, head_stride) - 48usize];
    ["Offset of field: quantkv_absmax::channel_stride"]
        [::core::mem::offset_of!(quantkv_absmax, channel_stride) - 56usize];
    ["Offset of field: quantkv_absmax::running"][::core::mem::offset_of!(quantkv_absmax, running) - 64usize];
};
impl Default for quantkv_absmax {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "scales[i] = max(absmax[i] / divisor, 2^-126), or 1.0 where absmax[i] is 0."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_update_scales {
    #[doc = "device [len]"]
    pub absmax: *const f32,
    #[doc = "device [len]"]
    pub scales: *mut f32,
    pub len: i64,
    pub divisor: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_update_scales"][::core::mem::size_of::<quantkv_update_scales>() - 32usize];
    ["Alignment of quantkv_update_scales"][::core::mem::align_of::<quantkv_update_scales>() - 8usize];
    ["Offset of field: quantkv_update_scales::absmax"][::core::mem::offset_of!(quantkv_update_scales, absmax) - 0usize];
    ["Offset of field: quantkv_update_scales::scales"][::core::mem::offset_of!(quantkv_update_scales, scales) - 8usize];
    ["Offset of field: quantkv_update_scales::len"][::core::mem::offset_of!(quantkv_update_scales, len) - 16usize];
    ["Offset of field: quantkv_update_scales::divisor"]
        [::core::mem::offset_of!(quantkv_update_scales, divisor) - 24usize];
};
impl Default for quantkv_update_scales {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "convert: dense quantize and dequantize"]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_convert {
    #[doc = "in (quantize) or out (dequantize) [num_tokens, num_heads, head_dim]"]
    pub rows: quantkv_rows,
    #[doc = "device [num_tokens, num_heads, head_dim], gapless; out or in"]
    pub codes: *mut ::core::ffi::c_void,
    pub scale: quantkv_scale,
    pub num_tokens: i64,
    pub num_heads: i32,
    pub head_dim: i32,
    #[doc = "of codes"]
    pub format: i32,
    #[doc = "of rows"]
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_convert"][::core::mem::size_of::<quantkv_convert>() - 80usize];
    ["Alignment of quantkv_convert"][::core::mem::align_of::<quantkv_convert>() - 8usize];
    ["Offset of field: quantkv_convert::rows"][::core::mem::offset_of!(quantkv_convert, rows) - 0usize];
    ["Offset of field: quantkv_convert::codes"][::core::mem::offset_of!(quantkv_convert, codes) - 24usize];
    ["Offset of field: quantkv_convert::scale"][::core::mem::offset_of!(quantkv_convert, scale) - 32usize];
    ["Offset of field: quantkv_convert::num_tokens"][::core::mem::offset_of!(quantkv_convert, num_tokens) - 56usize];
    ["Offset of field: quantkv_convert::num_heads"][::core::mem::offset_of!(quantkv_convert, num_heads) - 64usize];
    ["Offset of field: quantkv_convert::head_dim"][::core::mem::offset_of!(quantkv_convert, head_dim) - 68usize];
    ["Offset of field: quantkv_convert::format"][::core::mem::offset_of!(quantkv_convert, format) - 72usize];
    ["Offset of field: quantkv_convert::activation"][::core::mem::offset_of!(quantkv_convert, activation) - 76usize];
};
impl Default for quantkv_convert {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = "Sequence s has queries query_starts[s] .. query_starts[s+1], its newest tokens, and seq_lens[s] cached\n tokens including them. See docs/numerics.md, \"Attention\"."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_paged_attention {
    pub cache: quantkv_cache,
    #[doc = "in  [num_tokens, num_heads, k.head_dim]"]
    pub query: quantkv_rows,
    #[doc = "out [num_tokens, num_heads, v.head_dim]"]
    pub output: quantkv_rows,
    #[doc = "device [num_tokens, num_heads], natural logarithm, or null"]
    pub lse: *mut f32,
    #[doc = "device [num_seqs + 1]"]
    pub query_starts: *const i32,
    #[doc = "device [num_seqs]"]
    pub seq_lens: *const i32,
    #[doc = "device [num_seqs, block_table_stride]"]
    pub block_tables: *const i32,
    pub block_table_stride: i64,
    pub num_seqs: i64,
    pub num_tokens: i64,
    #[doc = "query heads, a multiple of num_kv_heads"]
    pub num_heads: i32,
    #[doc = "quantkv_format of query and output"]
    pub activation: i32,
    pub softmax_scale: f32,
    #[doc = "0: none"]
    pub soft_cap: f32,
    #[doc = "keys a query sees at most, its own included; 0: no window"]
    pub sliding_window: i64,
    #[doc = "device [num_heads], or null"]
    pub alibi_slopes: *const f32,
    #[doc = "device [num_heads], or null"]
    pub sinks: *const f32,
    #[doc = "device, aligned to 256 bytes"]
    pub workspace: *mut ::core::ffi::c_void,
    pub workspace_bytes: usize,
    #[doc = "not 0: the workspace holds the plan of an earlier call (another layer of the same\nstep) with the same sizes, max_query_len, lengths and window; the scheduling\nkernel is not run. If it holds anything else results are wrong, or rows are left\nalone, maybe with QUANTKV_FAULT_PLAN"]
    pub plan_is_ready: i32,
    #[doc = "quantkv_attention_kernel"]
    pub kernel: i32,
    #[doc = "the most queries of any sequence, or 0: not known. A sequence with more is skipped,\nwith QUANTKV_FAULT_QUERY_START. It chooses the kernels, by the query rows a KV\nhead, max_query_len * num_heads / num_kv_heads: up to 16 are a decode kernel's\nalone, where else one more is launched for sequences with many queries; 9 to 64\nhave one of their own on sm_90 (FP8, head dim 128), which is only taken where no\nsequence can have more; beyond these the prefill kernel's"]
    pub max_query_len: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_paged_attention"][::core::mem::size_of::<quantkv_paged_attention>() - 376usize];
    ["Alignment of quantkv_paged_attention"][::core::mem::align_of::<quantkv_paged_attention>() - 8usize];
    ["Offset of field: quantkv_paged_attention::cache"]
        [::core::mem::offset_of!(quantkv_paged_attention, cache) - 0usize];
    ["Offset of field: quantkv_paged_attention::query"]
        [::core::mem::offset_of!(quantkv_paged_attention, query) - 200usize];
    ["Offset of field: quantkv_paged_attention::output"]
        [::core::mem::offset_of!(quantkv_paged_attention, output) - 224usize];
    ["Offset of field: quantkv_paged_attention::lse"][::core::mem::offset_of!(quantkv_paged_attention, lse) - 248usize];
    ["Offset of field: quantkv_paged_attention::query_starts"]
        [::core::mem::offset_of!(quantkv_paged_attention, query_starts) - 256usize];
    ["Offset of field: quantkv_paged_attention::seq_lens"]
        [::core::mem::offset_of!(quantkv_paged_attention, seq_lens) - 264usize];
    ["Offset of field: quantkv_paged_attention::block_tables"]
        [::core::mem::offset_of!(quantkv_paged_attention, block_tables) - 272usize];
    ["Offset of field: quantkv_paged_attention::block_table_stride"]
        [::core::mem::offset_of!(quantkv_paged_attention, block_table_stride) - 280usize];
    ["Offset of field: quantkv_paged_attention::num_seqs"]
        [::core::mem::offset_of!(quantkv_paged_attention, num_seqs) - 288usize];
    ["Offset of field: quantkv_paged_attention::num_tokens"]
        [::core::mem::offset_of!(quantkv_paged_attention, num_tokens) - 296usize];
    ["Offset of field: quantkv_paged_attention::num_heads"]
        [::core::mem::offset_of!(quantkv_paged_attention, num_heads) - 304usize];
    ["Offset of field: quantkv_paged_attention::activation"]
        [::core::mem::offset_of!(quantkv_paged_attention, activation) - 308usize];
    ["Offset of field: quantkv_paged_attention::softmax_scale"]
        [::core::mem::offset_of!(quantkv_paged_attention, softmax_scale) - 312usize];
    ["Offset of field: quantkv_paged_attention::soft_cap"]
        [::core::mem::offset_of!(quantkv_paged_attention, soft_cap) - 316usize];
    ["Offset of field: quantkv_paged_attention::sliding_window"]
        [::core::mem::offset_of!(quantkv_paged_attention, sliding_window) - 320usize];
    ["Offset of field: quantkv_paged_attention::alibi_slopes"]
        [::core::mem::offset_of!(quantkv_paged_attention, alibi_slopes) - 328usize];
    ["Offset of field: quantkv_paged_attention::sinks"]
        [::core::mem::offset_of!(quantkv_paged_attention, sinks) - 336usize];
    ["Offset of field: quantkv_paged_attention::workspace"]
        [::core::mem::offset_of!(quantkv_paged_attention, workspace) - 344usize];
    ["Offset of field: quantkv_paged_attention::workspace_bytes"]
        [::core::mem::offset_of!(quantkv_paged_attention, workspace_bytes) - 352usize];
    ["Offset of field: quantkv_paged_attention::plan_is_ready"]
        [::core::mem::offset_of!(quantkv_paged_attention, plan_is_ready) - 360usize];
    ["Offset of field: quantkv_paged_attention::kernel"]
        [::core::mem::offset_of!(quantkv_paged_attention, kernel) - 364usize];
    ["Offset of field: quantkv_paged_attention::max_query_len"]
        [::core::mem::offset_of!(quantkv_paged_attention, max_query_len) - 368usize];
};
impl Default for quantkv_paged_attention {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        // SAFETY: zeros are a value of every field: numbers, pointers, structs of these.
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const QUANTKV_ATTENTION_AUTO: quantkv_attention_kernel = 0;
#[doc = "f32 arithmetic, every shape and format"]
pub const QUANTKV_ATTENTION_PORTABLE: quantkv_attention_kernel = 1;
#[doc = "sm_80 and newer, f16 or bf16 products with f32 sums"]
pub const QUANTKV_ATTENTION_TENSOR_CORE: quantkv_attention_kernel = 2;
#[doc = "Which kernel to run. Auto takes the fastest that has the shape; the others are for tests and benches and\n answer QUANTKV_UNSUPPORTED where they have not."]
pub type quantkv_attention_kernel = ::core::ffi::c_int;
#[doc = "Combines two partial attention outputs over disjoint keys by their LSE (natural logarithm); an infinite\n LSE of either sign means \"no keys\"."]
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct quantkv_merge_states {
    #[doc = "in  [num_tokens, num_heads, head_dim]; b and output share its strides"]
    pub a: quantkv_rows,
    #[doc = "device [num_tokens, num_heads]"]
    pub a_lse: *const f32,
    #[doc = "device, in"]
    pub b: *const ::core::ffi::c_void,
    pub b_lse: *const f32,
    #[doc = "device, out; may be `a` or `b`"]
    pub output: *mut ::core::ffi::c_void,
    #[doc = "device [num_tokens, num_heads], or null"]
    pub lse: *mut f32,
    pub num_tokens: i64,
    pub num_heads: i32,
    pub head_dim: i32,
    pub activation: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of quantkv_merge_states"][::core::mem::size_of::<quantkv_merge_states>() - 88usize];
    ["Alignment of quantkv_merge_states"][::core::mem::align_of::<quantkv_merge_states>() - 8usize];
    ["Offset of field: quantkv_merge_states::a"][::core::mem::offset_of!(quantkv_merge_states, a) - 0usize];
    ["Offset of field: quantkv_merge_states::a_lse"][::core::mem::offset_of!(quantkv_merge_states, a_lse) - 24usize];
    ["Offset of field: quantkv_merge_states::b"][::core::mem::offset_of!(quantkv_merge_states, b) - 32usize];
    ["Offset of field: quantkv_merge_states::b_lse"][::core::mem::offset_of!(quantkv_merge_states, b_lse) - 40usize];
    ["Offset of field: quantkv_merge_states::output"][::core::mem::offset_of!(quantkv_merge_states, output) - 48usize];
    ["Offset of field: quantkv_merge_states::lse"][::core::mem::offset_of!(quantkv_merge_states, lse) - 56usize];
    ["Offset of field: quantkv_merge_states::num_tokens"]
        [::core::mem::offset_of!(quantkv_merge_states, num_tokens) - 64usize];
    ["Offset of field: quantkv_merge_states::num_heads"]
        [::core::mem::offset_of!(quantkv_merge_states, num_heads) - 72usize];
    ["Offset of field: quantkv_merge_states::head_dim"]
        [::core::mem::offset_of!(quantkv_merge_states, head_dim) - 76usize];
    ["Offset of field: quantkv_merge_states::activation"]
        [::core::mem::offset_of!(quantkv_merge_states, activation) - 80usize];
};
impl Default for quantkv_merge_states {
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
    #[doc = "A version that grows with any change to this file."]
    pub fn quantkv_abi_version() -> u32;
    #[doc = "A sentence in English for a status; never null. Statuses above QUANTKV_DEVICE_ERROR give the\n runtime's own words."]
    pub fn quantkv_cuda_status_string(status: ::core::ffi::c_int) -> *const ::core::ffi::c_char;
    pub fn quantkv_cuda_cache_write(op: *const quantkv_cache_write, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_copy_blocks(op: *const quantkv_copy_blocks, stream: quantkv_stream) -> ::core::ffi::c_int;
    #[doc = "Enqueues the copies, in no order among themselves: small ones between this device and page-locked memory, in\n vectors of 16 bytes, by a kernel; the others by copy engines, in batches where the driver has them (12.8 and newer).\n `copies` is read on the host before the call returns. Not to be used inside a graph capture if host\n memory is pageable."]
    pub fn quantkv_cuda_swap_blocks(
        copies: *const quantkv_memory_copy,
        num_copies: usize,
        stream: quantkv_stream,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_gather(op: *const quantkv_gather, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_absmax(op: *const quantkv_absmax, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_update_scales(op: *const quantkv_update_scales, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_quantize(op: *const quantkv_convert, stream: quantkv_stream) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_dequantize(op: *const quantkv_convert, stream: quantkv_stream) -> ::core::ffi::c_int;
    #[doc = "Bytes of workspace for at most `num_tokens` query rows in `num_seqs` sequences. Reads the current device's\n number of multiprocessors (no synchronisation). Only the fields that describe shapes are looked at."]
    pub fn quantkv_cuda_paged_attention_workspace_bytes(
        op: *const quantkv_paged_attention,
        bytes: *mut usize,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_paged_attention(
        op: *const quantkv_paged_attention,
        stream: quantkv_stream,
    ) -> ::core::ffi::c_int;
    pub fn quantkv_cuda_merge_states(op: *const quantkv_merge_states, stream: quantkv_stream) -> ::core::ffi::c_int;
}
