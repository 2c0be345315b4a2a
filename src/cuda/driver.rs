//! The driver: whether there is one, and its errors in this crate's words.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::CUDA;
use crate::error::{Error, Result};
use crate::memory::PageLock;

/// Whether the driver's library can be loaded. cudarc panics where it is missing, so this comes before
/// the first call of it.
pub(super) fn check_present() -> Result<()> {
    // The names cudarc tries that drivers use.
    let names: &[&CStr] = if cfg!(windows) { &[c"nvcuda.dll"] } else { &[c"libcuda.so", c"libcuda.so.1"] };
    if names.iter().any(|name| can_load(name)) {
        return Ok(());
    }
    let tried: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
    Err(Error::NoDevice { backend: CUDA, reason: format!("no CUDA driver: cannot load {}", tried.join(" or ")) })
}

/// Whether a library can be loaded; it stays so.
#[cfg(unix)]
pub(crate) fn can_load(name: &CStr) -> bool {
    unsafe extern "C" {
        fn dlopen(name: *const c_char, flags: std::ffi::c_int) -> *mut c_void;
    }
    const RTLD_LAZY: std::ffi::c_int = 1;
    // SAFETY: a string with its end. The library stays loaded: cudarc loads it next.
    !unsafe { dlopen(name.as_ptr(), RTLD_LAZY) }.is_null()
}

#[cfg(windows)]
pub(crate) fn can_load(name: &CStr) -> bool {
    unsafe extern "system" {
        fn LoadLibraryA(name: *const c_char) -> *mut c_void;
    }
    // SAFETY: a string with its end. The library stays loaded: cudarc loads it next.
    !unsafe { LoadLibraryA(name.as_ptr()) }.is_null()
}

#[cfg(not(any(unix, windows)))]
pub(crate) fn can_load(_: &CStr) -> bool {
    false
}

/// A driver error of `call`.
pub(crate) fn error(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |DriverError(code)| {
        let message = match DriverError(code).error_string() {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => format!("{code:?}"),
        };
        match code {
            CUresult::CUDA_ERROR_NO_DEVICE
            | CUresult::CUDA_ERROR_STUB_LIBRARY
            | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
                Error::NoDevice { backend: CUDA, reason: format!("{call}: {message}") }
            }
            _ => Error::Device { backend: CUDA, call, code: code as i64, message },
        }
    }
}

/// Whether a byte lies in memory the driver has page-locked or made. Copies from and to such memory do
/// not wait, others are done with the host's side when the call returns.
fn is_known_to_driver(byte: *const u8) -> bool {
    let mut kind = 0u32;
    // SAFETY: the attribute is an enum of 32 bits; any address may be asked about.
    let status = unsafe {
        sys::cuPointerGetAttribute(
            (&raw mut kind).cast(),
            sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            byte.addr() as sys::CUdeviceptr,
        )
    };
    status == CUresult::CUDA_SUCCESS
}

/// Copies host memory to the device. The source may be anything again when this returns.
///
/// # Safety
/// `dst` has room for `src` and is used in the order of `stream` only; the context is current.
pub(super) unsafe fn upload(stream: &CudaStream, src: &[u8], dst: sys::CUdeviceptr) -> Result<()> {
    let Some(last) = src.last() else { return Ok(()) };
    // SAFETY: the caller's; pageable memory is staged before the call returns.
    unsafe { result::memcpy_htod_async(dst, src, stream.cu_stream()) }.map_err(error("cuMemcpyHtoDAsync"))?;
    if is_known_to_driver(src.as_ptr()) || is_known_to_driver(last) {
        stream.synchronize().map_err(error("cuStreamSynchronize"))?;
    }
    Ok(())
}

/// Copies device memory to the host, and waits.
///
/// # Safety
/// `src` holds as much as `dst` and is used in the order of `stream` only; the context is current.
pub(super) unsafe fn download(stream: &CudaStream, src: sys::CUdeviceptr, dst: &mut [u8]) -> Result<()> {
    if dst.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller's; `dst` is borrowed until the stream has done the copy.
    let copied = unsafe { result::memcpy_dtoh_async(dst, src, stream.cu_stream()) };
    let done = stream.synchronize().map_err(error("cuStreamSynchronize"));
    copied.map_err(error("cuMemcpyDtoHAsync"))?;
    done
}

/// Refuses calls that would leave a host pointer in a graph.
pub(super) fn refuse_capture(stream: &CudaStream, call: &'static str) -> Result<()> {
    match stream.capture_status().map_err(error("cuStreamIsCapturing"))? {
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
        _ => Err(Error::InCapture { call }),
    }
}

/// Page-locks host memory for all contexts, until the guard is dropped.
///
/// # Safety
/// The memory is not freed before the guard is dropped.
pub(super) unsafe fn page_lock(context: &Arc<CudaContext>, memory: &mut [u8]) -> Result<PageLock> {
    if memory.is_empty() {
        return Ok(PageLock::none());
    }
    context.bind_to_thread().map_err(error("cuCtxSetCurrent"))?;
    // SAFETY: memory of this process; it is unregistered before it is freed.
    unsafe { sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), memory.len(), sys::CU_MEMHOSTREGISTER_PORTABLE) }
        .result()
        .map_err(error("cuMemHostRegister"))?;
    let (context, address) = (context.clone(), memory.as_mut_ptr().expose_provenance());
    Ok(PageLock::new(move || {
        context.record_err(context.bind_to_thread());
        // SAFETY: registered above, once, by this address.
        let unregistered = unsafe { sys::cuMemHostUnregister(std::ptr::with_exposed_provenance_mut(address)) };
        context.record_err(unregistered.result());
    }))
}

/// A second stream of a context, for copies beside the caller's work. Made by hand: `new_stream` would
/// switch an engine's context to tracking every buffer by events.
#[derive(Debug)]
pub(super) struct SideStream(pub(super) Arc<CudaStream>);

impl SideStream {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        context.bind_to_thread().map_err(error("cuCtxSetCurrent"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(error("cuStreamCreate"))?;
        // SAFETY: a stream of this context that lives as long as `self`, which alone has it.
        Ok(SideStream(unsafe { context.wrap_borrowed_stream(stream) }))
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        let context = self.0.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: created in `new`, destroyed once. Work still in it ends before its resources go.
        context.record_err(unsafe { result::stream::destroy(self.0.cu_stream()) });
    }
}
