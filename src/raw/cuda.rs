//! The CUDA entry points over device pointers: one `unsafe fn` for each function of `quantkv.h`
//! (feature `cuda`).
//!
//! An engine that owns its device memory, its context and its stream fills the argument structs of
//! [`crate::args`] over [`Pointers`] with *device* addresses and calls these. Shapes, strides and lengths
//! are validated on the host; then one C call enqueues the kernels on the stream. Nothing here
//! allocates device memory, synchronises, or reads device memory on the host.
//!
//! # Contract
//!
//! For each function of this module:
//! * the context that the pointers and the stream belong to is current on the calling thread;
//! * a [`PtrRef`](crate::raw::PtrRef) points to `len` elements of device memory, aligned for their type, a
//!   [`PtrMut`](crate::raw::PtrMut) likewise to memory that no other work touches; both until the work is
//!   done *on the device*, and for a captured call as long as the graph may be replayed;
//! * an empty buffer may have any pointer, null included;
//! * [`Launch::faults`] is null or points to one aligned word of device memory.
//!
//! What lies in the buffers may be anything: kernels check slots, block ids and lengths.
//! K and V, or the layers of a model, may interleave in one allocation, as described in
//! [`crate::raw`]: kernels touch nothing but the blocks.
//!
//! # Graphs
//!
//! Every function but [`swap_blocks`] may be called while the stream is being captured. The graph keeps
//! the pointers and the sizes; a replay reads what the buffers hold then: tables, slots, lengths and
//! scales may change between replays. [`copy_blocks`] takes its lists from device memory for that
//! reason. [`swap_blocks`] may be captured if the host memory is page-locked and stays where it is.

#[cfg(not(quantkv_stub))]
use std::ffi::CStr;
use std::ffi::{c_int, c_void};

use super::Pointers;
use super::bindings::*;
use super::entry_points::entry_points;
pub use super::gpu::{AttentionKernel, BlockMemory, CopyPlan, Launch, block_memories};
use super::gpu::{Library, library_functions};
use crate::args::{
    Absmax, CacheWrite, Dequantize, Gather, GatherBytes, MergeStates, PagedAttention, Quantize, SwapBlocks,
    UpdateScales,
};
#[cfg_attr(not(quantkv_stub), allow(unused_imports))] // the documentation of `entry_points!` names it
use crate::error::Error;
use crate::error::Result;
use crate::format::{DType, Element};
use crate::layout::CacheShape;

/// The name of this backend in errors.
const CUDA: &str = "cuda";

/// `quantkv.h`, as nvcc compiled it.
pub(crate) struct Cuda;

impl Library for Cuda {
    const BACKEND: &'static str = CUDA;
    const NO_DEVICE: &'static str = "the CUDA runtime of this build finds no usable driver (none, or one older than the \
                                     toolkit the kernels were compiled with)";

    #[cfg(not(quantkv_stub))]
    fn status_text(status: c_int) -> String {
        // SAFETY: any status gets a static string that ends with a zero byte.
        let text = unsafe { CStr::from_ptr(quantkv_cuda_status_string(status)) };
        text.to_string_lossy().into_owned()
    }

    #[cfg(quantkv_stub)]
    fn status_text(status: c_int) -> String {
        format!("status {status}")
    }

    library_functions! {
        cache_write = quantkv_cuda_cache_write(op: *const quantkv_cache_write, stream: *mut c_void);
        copy_blocks = quantkv_cuda_copy_blocks(op: *const quantkv_copy_blocks, stream: *mut c_void);
        swap_blocks = quantkv_cuda_swap_blocks(
            copies: *const quantkv_memory_copy, num_copies: usize, stream: *mut c_void
        );
        gather = quantkv_cuda_gather(op: *const quantkv_gather, stream: *mut c_void);
        absmax = quantkv_cuda_absmax(op: *const quantkv_absmax, stream: *mut c_void);
        update_scales = quantkv_cuda_update_scales(op: *const quantkv_update_scales, stream: *mut c_void);
        quantize = quantkv_cuda_quantize(op: *const quantkv_convert, stream: *mut c_void);
        dequantize = quantkv_cuda_dequantize(op: *const quantkv_convert, stream: *mut c_void);
        paged_attention_workspace_bytes = quantkv_cuda_paged_attention_workspace_bytes(
            op: *const quantkv_paged_attention, bytes: *mut usize
        );
        paged_attention = quantkv_cuda_paged_attention(op: *const quantkv_paged_attention, stream: *mut c_void);
        merge_states = quantkv_cuda_merge_states(op: *const quantkv_merge_states, stream: *mut c_void);
    }
}

/// Checks that the C library linked is the one this crate declares.
///
/// # Errors
/// [`Error::NotCompiled`] in a build without kernels; [`Error::Device`] for another version.
pub fn check_version() -> Result<()> {
    #[cfg(quantkv_stub)]
    return Err(Error::NotCompiled { backend: CUDA, call: "quantkv_abi_version" });
    #[cfg(not(quantkv_stub))]
    // SAFETY: takes nothing and returns a constant.
    super::gpu::check_version::<Cuda>("quantkv_abi_version", unsafe { quantkv_abi_version() })
}

entry_points!(Cuda);
