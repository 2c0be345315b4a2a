//! What the raw entry points of all GPUs have in common: arguments are validated and become the structs of
//! `quantkv.h`, then one function of a vendor's library is called.
//!
//! [`Library`] is such a library. `entry_points!` ([`super::entry_points`]) gives its module the public functions.

use std::ffi::{c_int, c_void};

use super::abi::{self, activation, int32, int64, optional, optional_mut, rows_in, rows_out};
use super::bindings::*;
use super::{BlockPointers, Pointers, PtrRef, block_range};
use crate::args::{
    Absmax, BlockPair, CacheWrite, Dequantize, Gather, GatherBytes, LayerMut, MergeStates, PagedAttention, Quantize,
    RowStrides, SwapBlocks, UpdateScales,
};
use crate::error::{Error, Result};
use crate::format::{DType, Element};
use crate::layout::{CacheShape, Half};

/// Where an operation is enqueued, and where its kernels report.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// A `CUstream` (equally a `cudaStream_t`) of the current context, or a `hipStream_t` of the current device;
    /// null is the default stream.
    pub stream: *mut c_void,
    /// One word of device memory that gets the bits of [`crate::Faults`]; or null, then what is out of
    /// range is skipped all the same and not reported.
    pub faults: *mut u32,
}

/// Which attention kernel to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AttentionKernel {
    /// The fastest one that has the shape.
    #[default]
    Auto,
    /// f32 arithmetic; every shape and format.
    Portable,
    /// Tensor cores, or AMD's matrix cores: products of f16 or bf16 with f32 sums, sm_80 and newer. Answers
    /// [`Error::NoKernel`] where there is none.
    TensorCore,
}

/// The C functions of one vendor. None keeps a reference to its struct.
///
/// # Safety
/// Of each function: pointers in the struct are as `quantkv.h` has it.
pub(crate) trait Library {
    /// Its name in errors.
    const BACKEND: &'static str;
    /// What [`QUANTKV_NO_DEVICE`] means.
    const NO_DEVICE: &'static str;

    /// The library's words for a status.
    fn status_text(status: c_int) -> String;
    unsafe fn cache_write(op: *const quantkv_cache_write, stream: *mut c_void) -> Result<()>;
    unsafe fn copy_blocks(op: *const quantkv_copy_blocks, stream: *mut c_void) -> Result<()>;
    unsafe fn swap_blocks(copies: *const quantkv_memory_copy, num_copies: usize, stream: *mut c_void) -> Result<()>;
    unsafe fn gather(op: *const quantkv_gather, stream: *mut c_void) -> Result<()>;
    unsafe fn absmax(op: *const quantkv_absmax, stream: *mut c_void) -> Result<()>;
    unsafe fn update_scales(op: *const quantkv_update_scales, stream: *mut c_void) -> Result<()>;
    unsafe fn quantize(op: *const quantkv_convert, stream: *mut c_void) -> Result<()>;
    unsafe fn dequantize(op: *const quantkv_convert, stream: *mut c_void) -> Result<()>;
    unsafe fn paged_attention_workspace_bytes(op: *const quantkv_paged_attention, bytes: *mut usize) -> Result<()>;
    unsafe fn paged_attention(op: *const quantkv_paged_attention, stream: *mut c_void) -> Result<()>;
    unsafe fn merge_states(op: *const quantkv_merge_states, stream: *mut c_void) -> Result<()>;
}

/// Implements [`Library`]'s functions by the C functions named; in a build without kernels, they say so.
macro_rules! library_functions {
    ($($name:ident = $function:ident($($argument:ident: $type:ty),*);)*) => {$(
        unsafe fn $name($($argument: $type),*) -> Result<()> {
            const CALL: &str = stringify!($function);
            #[cfg(not(quantkv_stub))]
            {
                // SAFETY: the caller's.
                crate::raw::gpu::check::<Self>(CALL, unsafe { $function($($argument),*) })
            }
            #[cfg(quantkv_stub)]
            {
                let _ = ($($argument,)*);
                let _: fn(&'static str, c_int) -> Result<()> = crate::raw::gpu::check::<Self>;
                Err(Error::NotCompiled { backend: Self::BACKEND, call: CALL })
            }
        }
    )*};
}
pub(super) use library_functions;

/// What a status stands for.
pub(crate) fn check<L: Library + ?Sized>(call: &'static str, status: c_int) -> Result<()> {
    match status {
        QUANTKV_OK => Ok(()),
        QUANTKV_UNSUPPORTED | QUANTKV_NO_KERNEL_FOR_DEVICE => {
            Err(Error::NoKernel { backend: L::BACKEND, call, message: L::status_text(status) })
        }
        QUANTKV_NO_DEVICE => Err(Error::NoDevice {
            backend: L::BACKEND,
            reason: format!("{}: {}", L::NO_DEVICE, L::status_text(status)),
        }),
        _ => Err(Error::Device { backend: L::BACKEND, call, code: status.into(), message: L::status_text(status) }),
    }
}

/// Whether the C library linked is the one this crate declares.
#[cfg(not(quantkv_stub))]
pub(super) fn check_version<L: Library>(call: &'static str, version: u32) -> Result<()> {
    if version == QUANTKV_ABI_VERSION {
        return Ok(());
    }
    Err(Error::Device {
        backend: L::BACKEND,
        call,
        code: version.into(),
        message: format!("the kernels linked have another ABI version; this crate needs {QUANTKV_ABI_VERSION}"),
    })
}

/// A table of equal blocks in device memory, as `copy_blocks` reads it: `base`,
/// `block_stride_bytes`, `block_bytes`.
pub type BlockMemory = quantkv_block_table_memory;

/// What `copy_blocks` copies: lists in device memory, so that a captured graph sees what they hold at
/// each replay.
#[derive(Clone, Copy, Debug)]
pub struct CopyPlan {
    /// The memories of [`block_memories`], uploaded.
    pub memories: PtrRef<BlockMemory>,
    /// Source and destination block of each copy, `[pairs, 2]`. An id outside the cache (-1 for padding)
    /// is skipped and sets a fault. No block may be both read and written, or written twice: what such
    /// a block holds afterwards is not defined.
    pub pairs: PtrRef<i64>,
    /// Blocks in the cache.
    pub num_blocks: usize,
    /// The largest `block_bytes` of `memories`.
    pub max_block_bytes: usize,
}

/// The memories of all layers that copies of blocks touch: K, V and their dynamic scales, layer by
/// layer. The engine uploads them once; they do not change while the cache stays where it is.
///
/// # Errors
/// Buffers that do not fit the shape, as [`crate::args::CopyBlocks::validate`] has it.
pub fn block_memories(shape: &CacheShape, layers: &[LayerMut<'_, Pointers>]) -> Result<Vec<BlockMemory>> {
    shape.validate()?;
    let mut memories = Vec::with_capacity(4 * layers.len());
    for layer in layers {
        layer.validate(shape)?;
        let pointers = BlockPointers::of_mut(layer);
        for (index, half) in [Half::K, Half::V].into_iter().enumerate() {
            memories.push(BlockMemory {
                base: pointers.codes[index].cast(),
                block_stride_bytes: int64(shape.map(half).block_stride * shape.spec.format(half).bytes()),
                block_bytes: int64(block_range(shape, half, 0).len()),
            });
            if let Some(scales) = pointers.dynamic[index] {
                let bytes = int64(size_of::<f32>() * shape.dynamic_scale_index(1, 0, 0));
                memories.push(BlockMemory { base: scales.cast(), block_stride_bytes: bytes, block_bytes: bytes });
            }
        }
    }
    Ok(memories)
}

pub(super) unsafe fn cache_write<L: Library, T: Element>(
    op: CacheWrite<'_, Pointers, T>,
    launch: Launch,
) -> Result<()> {
    op.validate()?;
    let halves = abi::writable(&op.cache, Some(op.k_scale), Some(op.v_scale));
    let op = quantkv_cache_write {
        cache: abi::cache(&op.shape, halves, launch.faults)?,
        key: rows_in(op.key, op.key_strides),
        value: rows_in(op.value, op.value_strides),
        slot_mapping: op.slot_mapping.ptr,
        num_tokens: int64(op.slot_mapping.len),
        activation: activation(T::DTYPE),
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::cache_write(&op, launch.stream) }
}

pub(super) unsafe fn copy_blocks<L: Library>(plan: CopyPlan, launch: Launch) -> Result<()> {
    if !plan.pairs.len.is_multiple_of(2) {
        let expected = plan.pairs.len + 1;
        return Err(Error::LengthMismatch { what: "the length of pairs", expected, got: plan.pairs.len });
    }
    let op = quantkv_copy_blocks {
        tables: plan.memories.ptr,
        num_tables: int64(plan.memories.len),
        pairs: plan.pairs.ptr,
        num_pairs: int64(plan.pairs.len / 2),
        num_blocks: int64(plan.num_blocks),
        max_block_bytes: int64(plan.max_block_bytes),
        faults: launch.faults,
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::copy_blocks(&op, launch.stream) }
}

pub(super) unsafe fn swap_blocks<L: Library>(
    op: SwapBlocks<'_, '_, Pointers, Pointers>,
    stream: *mut c_void,
) -> Result<()> {
    op.validate()?;
    let mut copies = Vec::with_capacity(4 * op.src.len() * op.pairs.len());
    for (src, dst) in op.src.iter().zip(op.dst.iter()) {
        let (src, dst) = (BlockPointers::of_ref(src), BlockPointers::of_mut(dst));
        for (index, half) in [Half::K, Half::V].into_iter().enumerate() {
            let place = |shape: &CacheShape, block: u32| block_range(shape, half, block as usize);
            append_runs(&mut copies, op.pairs, |pair| {
                let (from, to) = (place(&op.src_shape, pair.src), place(&op.dst_shape, pair.dst));
                let (from, to, bytes) = (from.start, to.start, from.len());
                (src.codes[index].wrapping_add(from), dst.codes[index].wrapping_add(to), bytes)
            });
            if let (Some(from), Some(to)) = (src.dynamic[index], dst.dynamic[index]) {
                let len = op.src_shape.dynamic_scale_index(1, 0, 0);
                append_runs(&mut copies, op.pairs, |pair| {
                    let at = |scales: *mut f32, block: u32| scales.wrapping_add(block as usize * len).cast();
                    (at(from, pair.src), at(to, pair.dst), len * size_of::<f32>())
                });
            }
        }
    }
    if copies.is_empty() {
        return Ok(());
    }
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::swap_blocks(copies.as_ptr(), copies.len(), stream) }
}

/// Appends one copy a pair, `place` giving (source, destination, bytes); neighbours become one copy.
fn append_runs(
    copies: &mut Vec<quantkv_memory_copy>,
    pairs: &[BlockPair],
    place: impl Fn(&BlockPair) -> (*mut u8, *mut u8, usize),
) {
    let first = copies.len();
    for pair in pairs {
        let (src, dst, bytes) = place(pair);
        if let Some(last) = copies[first..].last_mut()
            && last.src.addr() + last.bytes as usize == src.addr()
            && last.dst.addr() + last.bytes as usize == dst.addr()
        {
            last.bytes += int64(bytes);
            continue;
        }
        copies.push(quantkv_memory_copy { dst: dst.cast(), src: src.cast_const().cast(), bytes: int64(bytes) });
    }
}

pub(super) fn attention_workspace_bytes<L: Library>(
    shape: &CacheShape,
    activations: DType,
    num_heads: usize,
    num_tokens: usize,
    num_seqs: usize,
) -> Result<usize> {
    shape.validate()?;
    let nowhere = || abi::HalfPointers { codes: std::ptr::null_mut(), dynamic: std::ptr::null_mut(), scale: None };
    let op = quantkv_paged_attention {
        cache: abi::cache(shape, [nowhere(), nowhere()], std::ptr::null_mut())?,
        num_seqs: int64(num_seqs),
        num_tokens: int64(num_tokens),
        num_heads: int32("the number of query heads", num_heads)?,
        activation: activation(activations),
        softmax_scale: 1.0,
        ..Default::default()
    };
    let mut bytes = 0usize;
    // SAFETY: shapes alone are read; the size is written.
    unsafe { L::paged_attention_workspace_bytes(&op, &mut bytes) }?;
    Ok(bytes)
}

pub(super) unsafe fn paged_attention<L: Library, T: Element>(
    op: PagedAttention<'_, Pointers, T>,
    kernel: AttentionKernel,
    launch: Launch,
) -> Result<()> {
    op.validate()?;
    abi::check_buffer_aligned("the attention workspace", op.workspace.reading(), 256)?;
    let halves = abi::read_only(&op.cache, Some(op.k_scale), Some(op.v_scale));
    let kernel = match kernel {
        AttentionKernel::Auto => QUANTKV_ATTENTION_AUTO,
        AttentionKernel::Portable => QUANTKV_ATTENTION_PORTABLE,
        AttentionKernel::TensorCore => QUANTKV_ATTENTION_TENSOR_CORE,
    };
    let (shape, num_seqs) = (op.shape, op.num_seqs());
    let max_query_len = int64(op.longest_query());
    let (num_heads, num_tokens, floats) = (op.num_heads, op.num_tokens, op.workspace.len);
    let op = quantkv_paged_attention {
        cache: abi::cache(&shape, halves, launch.faults)?,
        query: rows_in(op.query, op.query_strides),
        output: rows_out(op.output, op.output_strides),
        lse: optional_mut(op.lse),
        query_starts: op.query_starts.ptr,
        seq_lens: op.seq_lens.ptr,
        block_tables: op.block_tables.ptr,
        block_table_stride: int64(op.block_table_stride),
        num_seqs: int64(num_seqs),
        num_tokens: int64(num_tokens),
        num_heads: int32("the number of query heads", num_heads)?,
        activation: activation(T::DTYPE),
        softmax_scale: op.params.softmax_scale,
        soft_cap: op.params.soft_cap.unwrap_or(0.0),
        sliding_window: op.params.sliding_window.map_or(0, int64),
        alibi_slopes: optional(op.alibi_slopes),
        sinks: optional(op.sinks),
        workspace: op.workspace.ptr.cast(),
        workspace_bytes: floats * size_of::<f32>(),
        plan_is_ready: op.plan_is_ready.into(),
        kernel,
        max_query_len,
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    match unsafe { L::paged_attention(&op, launch.stream) } {
        Err(Error::Device { code, .. }) if code == i64::from(QUANTKV_WORKSPACE_TOO_SMALL) => {
            let bytes = attention_workspace_bytes::<L>(&shape, T::DTYPE, num_heads, num_tokens, num_seqs)?;
            let needed = bytes.div_ceil(size_of::<f32>());
            Err(Error::BufferTooSmall { what: "attention workspace", needed, got: floats })
        }
        other => other,
    }
}

pub(super) unsafe fn merge_states<L: Library, T: Element>(
    op: MergeStates<'_, Pointers, T>,
    launch: Launch,
) -> Result<()> {
    op.validate()?;
    let op = quantkv_merge_states {
        a: rows_in(op.a, op.strides),
        a_lse: op.a_lse.ptr,
        b: op.b.ptr.cast(),
        b_lse: op.b_lse.ptr,
        output: op.output.ptr.cast(),
        lse: optional_mut(op.lse),
        num_tokens: int64(op.num_tokens),
        num_heads: int32("the number of heads", op.num_heads)?,
        head_dim: int32("head dim", op.head_dim)?,
        activation: activation(T::DTYPE),
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::merge_states(&op, launch.stream) }
}

pub(super) unsafe fn gather<L: Library, T: Element>(op: Gather<'_, Pointers, T>, launch: Launch) -> Result<()> {
    op.validate()?;
    let halves = abi::read_only(&op.cache, Some(op.k_scale), Some(op.v_scale));
    let num_seqs = op.num_seqs();
    let op = quantkv_gather {
        cache: abi::cache(&op.shape, halves, launch.faults)?,
        block_tables: op.block_tables.ptr,
        block_table_stride: int64(op.block_table_stride),
        cu_seq_lens: op.cu_seq_lens.ptr,
        starts: optional(op.starts),
        num_seqs: int64(num_seqs),
        num_tokens: int64(op.num_tokens),
        key: rows_out(op.key, op.key_strides),
        value: rows_out(op.value, op.value_strides),
        activation: activation(T::DTYPE),
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::gather(&op, launch.stream) }
}

pub(super) unsafe fn gather_bytes<L: Library>(op: GatherBytes<'_, Pointers>, launch: Launch) -> Result<()> {
    /// `quantkv_gather::activation` for raw codes.
    const RAW_CODES: i32 = -1;
    op.validate()?;
    let spec = op.shape.spec;
    abi::check_buffer_aligned("gathered key bytes", op.key.reading(), spec.k_format.bytes())?;
    abi::check_buffer_aligned("gathered value bytes", op.value.reading(), spec.v_format.bytes())?;
    let num_seqs = op.num_seqs();
    let gapless = |half| RowStrides::contiguous(spec.num_kv_heads, spec.head_dim(half));
    let op = quantkv_gather {
        cache: abi::cache(&op.shape, abi::read_only(&op.cache, None, None), launch.faults)?,
        block_tables: op.block_tables.ptr,
        block_table_stride: int64(op.block_table_stride),
        cu_seq_lens: op.cu_seq_lens.ptr,
        starts: optional(op.starts),
        num_seqs: int64(num_seqs),
        num_tokens: int64(op.num_tokens),
        key: rows_out(op.key, gapless(Half::K)),
        value: rows_out(op.value, gapless(Half::V)),
        activation: RAW_CODES,
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::gather(&op, launch.stream) }
}

pub(super) unsafe fn absmax<L: Library, T: Element>(op: Absmax<'_, Pointers, T>, launch: Launch) -> Result<()> {
    op.validate()?;
    let strides = op.granularity.strides(op.head_dim);
    let op = quantkv_absmax {
        input: rows_in(op.input, op.strides),
        num_tokens: int64(op.num_tokens),
        num_heads: int32("the number of heads", op.num_heads)?,
        head_dim: int32("head dim", op.head_dim)?,
        activation: activation(T::DTYPE),
        head_stride: int64(strides.head),
        channel_stride: int64(strides.channel),
        running: op.running.ptr,
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::absmax(&op, launch.stream) }
}

pub(super) unsafe fn update_scales<L: Library>(op: UpdateScales<'_, Pointers>, launch: Launch) -> Result<()> {
    op.validate()?;
    let op = quantkv_update_scales {
        absmax: op.absmax.ptr,
        scales: op.scales.ptr,
        len: int64(op.absmax.len),
        divisor: op.divisor,
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::update_scales(&op, launch.stream) }
}

pub(super) unsafe fn quantize<L: Library, T: Element>(op: Quantize<'_, Pointers, T>, launch: Launch) -> Result<()> {
    op.validate()?;
    abi::check_buffer_aligned("codes", op.codes.reading(), op.format.bytes())?;
    let op = quantkv_convert {
        rows: rows_in(op.input, op.strides),
        codes: op.codes.ptr.cast(),
        scale: abi::scale(op.format, Some(op.scale)),
        num_tokens: int64(op.num_tokens),
        num_heads: int32("the number of heads", op.num_heads)?,
        head_dim: int32("head dim", op.head_dim)?,
        format: abi::format(op.format),
        activation: activation(T::DTYPE),
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::quantize(&op, launch.stream) }
}

pub(super) unsafe fn dequantize<L: Library, T: Element>(op: Dequantize<'_, Pointers, T>, launch: Launch) -> Result<()> {
    op.validate()?;
    abi::check_buffer_aligned("codes", op.codes, op.format.bytes())?;
    let op = quantkv_convert {
        rows: rows_out(op.output, op.strides),
        codes: op.codes.ptr.cast_mut().cast(),
        scale: abi::scale(op.format, Some(op.scale)),
        num_tokens: int64(op.num_tokens),
        num_heads: int32("the number of heads", op.num_heads)?,
        head_dim: int32("head dim", op.head_dim)?,
        format: abi::format(op.format),
        activation: activation(T::DTYPE),
    };
    // SAFETY: the struct is built from validated arguments; its pointers are as the caller promises.
    unsafe { L::dequantize(&op, launch.stream) }
}

/// The lists of [`CopyPlan`] as the device reads them, memories first.
pub(crate) fn encode_copy_lists(memories: &[BlockMemory], pairs: &[BlockPair]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(memories) + 16 * pairs.len());
    for memory in memories {
        bytes.extend((memory.base.addr() as u64).to_ne_bytes());
        bytes.extend(memory.block_stride_bytes.to_ne_bytes());
        bytes.extend(memory.block_bytes.to_ne_bytes());
    }
    for pair in pairs {
        bytes.extend(i64::from(pair.src).to_ne_bytes());
        bytes.extend(i64::from(pair.dst).to_ne_bytes());
    }
    bytes
}
