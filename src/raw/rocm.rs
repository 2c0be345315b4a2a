//! The ROCm entry points over device pointers: one `unsafe fn` for each function of `quantkv.h`, as
//! `quantkv_hip.h` names them (feature `rocm`).
//!
//! An engine that owns its device memory and its `hipStream_t` fills the argument structs of [`crate::args`] over
//! [`Pointers`] with *device* addresses and calls these. Shapes, strides and lengths are validated on the host; then
//! one C call enqueues the kernels on the stream. Nothing here allocates device memory, synchronises, or reads device
//! memory on the host.
//!
//! Before the first of them, once a device that is used: [`prepare`], which loads the HIP runtime of this process and
//! the kernels on the current device. Without it they answer [`Error::NoDevice`].
//!
//! # Contract
//!
//! For each function of this module:
//! * the device that the pointers and the stream belong to is current on the calling thread (`hipSetDevice`);
//! * a [`PtrRef`](crate::raw::PtrRef) points to `len` elements of device memory, aligned for their type, a
//!   [`PtrMut`](crate::raw::PtrMut) likewise to memory that no other work touches; both until the work is
//!   done *on the device*, and for a captured call as long as the graph may be replayed;
//! * an empty buffer may have any pointer, null included;
//! * [`Launch::faults`] is null or points to one aligned word of device memory.
//!
//! What lies in the buffers may be anything: kernels check slots, block ids and lengths.
//! K and V, or the layers of a model, may interleave in one allocation, as described in
//! [`crate::raw`]: kernels touch nothing but the blocks.

#[cfg(not(quantkv_stub))]
use std::ffi::{CStr, c_char};
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
const ROCM: &str = "rocm";

/// `quantkv_hip_runtime`: what the C library calls of the HIP runtime. `Option`, as C has it: none may be null.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RuntimeFunctions {
    pub get_device: Option<unsafe extern "C" fn(*mut c_int) -> c_int>,
    pub get_attribute: Option<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int>,
    pub load_module: Option<unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> c_int>,
    pub get_function: Option<unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const std::ffi::c_char) -> c_int>,
    pub launch: Option<HipModuleLaunchKernel>,
    pub copy: Option<unsafe extern "C" fn(*mut c_void, *const c_void, usize, c_int, *mut c_void) -> c_int>,
    pub error_text: Option<unsafe extern "C" fn(c_int) -> *const std::ffi::c_char>,
}

/// Function, grid, block, bytes of shared memory, stream, parameters, extra.
pub(crate) type HipModuleLaunchKernel = unsafe extern "C" fn(
    *mut c_void,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    *mut c_void,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_int;

#[cfg(not(quantkv_stub))]
unsafe extern "C" {
    fn quantkv_hip_abi_version() -> u32;
    fn quantkv_hip_status_string(status: c_int) -> *const c_char;
    fn quantkv_hip_use_runtime(functions: *const RuntimeFunctions) -> c_int;
    fn quantkv_hip_load_kernels() -> c_int;
    fn quantkv_hip_cache_write(op: *const quantkv_cache_write, stream: *mut c_void) -> c_int;
    fn quantkv_hip_copy_blocks(op: *const quantkv_copy_blocks, stream: *mut c_void) -> c_int;
    fn quantkv_hip_swap_blocks(copies: *const quantkv_memory_copy, num_copies: usize, stream: *mut c_void) -> c_int;
    fn quantkv_hip_gather(op: *const quantkv_gather, stream: *mut c_void) -> c_int;
    fn quantkv_hip_absmax(op: *const quantkv_absmax, stream: *mut c_void) -> c_int;
    fn quantkv_hip_update_scales(op: *const quantkv_update_scales, stream: *mut c_void) -> c_int;
    fn quantkv_hip_quantize(op: *const quantkv_convert, stream: *mut c_void) -> c_int;
    fn quantkv_hip_dequantize(op: *const quantkv_convert, stream: *mut c_void) -> c_int;
    fn quantkv_hip_paged_attention_workspace_bytes(op: *const quantkv_paged_attention, bytes: *mut usize) -> c_int;
    fn quantkv_hip_paged_attention(op: *const quantkv_paged_attention, stream: *mut c_void) -> c_int;
    fn quantkv_hip_merge_states(op: *const quantkv_merge_states, stream: *mut c_void) -> c_int;
}

/// `quantkv_hip.h`, as clang compiled it.
pub(crate) struct Rocm;

impl Library for Rocm {
    const BACKEND: &'static str = ROCM;
    const NO_DEVICE: &'static str = "the HIP runtime was not loaded, or finds no device";

    #[cfg(not(quantkv_stub))]
    fn status_text(status: c_int) -> String {
        // SAFETY: any status gets a static string that ends with a zero byte.
        let text = unsafe { CStr::from_ptr(quantkv_hip_status_string(status)) };
        text.to_string_lossy().into_owned()
    }

    #[cfg(quantkv_stub)]
    fn status_text(status: c_int) -> String {
        format!("status {status}")
    }

    library_functions! {
        cache_write = quantkv_hip_cache_write(op: *const quantkv_cache_write, stream: *mut c_void);
        copy_blocks = quantkv_hip_copy_blocks(op: *const quantkv_copy_blocks, stream: *mut c_void);
        swap_blocks = quantkv_hip_swap_blocks(
            copies: *const quantkv_memory_copy, num_copies: usize, stream: *mut c_void
        );
        gather = quantkv_hip_gather(op: *const quantkv_gather, stream: *mut c_void);
        absmax = quantkv_hip_absmax(op: *const quantkv_absmax, stream: *mut c_void);
        update_scales = quantkv_hip_update_scales(op: *const quantkv_update_scales, stream: *mut c_void);
        quantize = quantkv_hip_quantize(op: *const quantkv_convert, stream: *mut c_void);
        dequantize = quantkv_hip_dequantize(op: *const quantkv_convert, stream: *mut c_void);
        paged_attention_workspace_bytes = quantkv_hip_paged_attention_workspace_bytes(
            op: *const quantkv_paged_attention, bytes: *mut usize
        );
        paged_attention = quantkv_hip_paged_attention(op: *const quantkv_paged_attention, stream: *mut c_void);
        merge_states = quantkv_hip_merge_states(op: *const quantkv_merge_states, stream: *mut c_void);
    }
}

/// Checks that the C library linked is the one this crate declares.
///
/// # Errors
/// [`Error::NotCompiled`] in a build without kernels; [`Error::Device`] for another version.
pub fn check_version() -> Result<()> {
    #[cfg(quantkv_stub)]
    return Err(Error::NotCompiled { backend: ROCM, call: "quantkv_hip_abi_version" });
    #[cfg(not(quantkv_stub))]
    // SAFETY: takes nothing and returns a constant.
    super::gpu::check_version::<Rocm>("quantkv_hip_abi_version", unsafe { quantkv_hip_abi_version() })
}

/// Loads the HIP runtime of this process, once, and the kernels on its current device.
///
/// # Errors
/// [`Error::NoDevice`] without a runtime or a device; [`Error::NoKernel`] if this build has no code for the device;
/// [`Error::NotCompiled`], [`Error::Device`].
pub fn prepare() -> Result<()> {
    check_version()?;
    let runtime = crate::rocm::runtime()?;
    runtime.count_devices()?;
    load_kernels(&runtime.for_library())
}

#[cfg(not(quantkv_stub))]
fn load_kernels(functions: &RuntimeFunctions) -> Result<()> {
    use super::gpu::check;
    // SAFETY: the table is copied; its functions are those of a library that stays loaded.
    check::<Rocm>("quantkv_hip_use_runtime", unsafe { quantkv_hip_use_runtime(functions) })?;
    // SAFETY: loads this library's own code on the current device.
    check::<Rocm>("quantkv_hip_load_kernels", unsafe { quantkv_hip_load_kernels() })
}

#[cfg(quantkv_stub)]
fn load_kernels(_: &RuntimeFunctions) -> Result<()> {
    Err(Error::NotCompiled { backend: ROCM, call: "quantkv_hip_load_kernels" })
}

entry_points!(Rocm);
