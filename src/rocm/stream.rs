//! A stream of a device: what backends and buffers share.

use std::ffi::{c_int, c_void};

use super::runtime::Runtime;
use crate::error::{Error, Result};

/// A `hipStream_t`, the caller's own or one made here.
#[derive(Debug)]
pub struct RocmStream {
    pub(super) handle: *mut c_void,
    device: c_int,
    is_owned: bool,
    pub(super) runtime: &'static Runtime,
}

// SAFETY: HIP's functions may be called from any thread, each of which makes the device current first.
unsafe impl Send for RocmStream {}
// SAFETY: as above; the handle does not change.
unsafe impl Sync for RocmStream {}

impl RocmStream {
    /// A new one.
    pub(super) fn new(runtime: &'static Runtime, device: c_int) -> Result<Self> {
        runtime.set_device(device)?;
        Ok(RocmStream { handle: runtime.create_stream()?, device, is_owned: true, runtime })
    }

    /// The caller's, who destroys it.
    pub(super) fn borrowed(runtime: &'static Runtime, device: c_int, handle: *mut c_void) -> Self {
        RocmStream { handle, device, is_owned: false, runtime }
    }

    /// The `hipStream_t`.
    pub fn handle(&self) -> *mut c_void {
        self.handle
    }

    /// The device's number.
    pub fn device(&self) -> usize {
        self.device as usize
    }

    /// Whether both are the same stream.
    pub(crate) fn is_same(&self, other: &RocmStream) -> bool {
        self.handle == other.handle && self.device == other.device
    }

    /// Makes the device current on this thread.
    pub(crate) fn bind(&self) -> Result<()> {
        self.runtime.set_device(self.device)
    }

    /// Waits until everything enqueued so far is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: live: ours, or the caller's, who keeps it as long as the backend.
        unsafe { self.runtime.synchronize(self.handle) }
    }

    /// Refuses calls that would leave a host pointer in a graph.
    pub(crate) fn refuse_capture(&self, call: &'static str) -> Result<()> {
        // SAFETY: live, as above.
        if unsafe { self.runtime.is_capturing(self.handle) }? { Err(Error::InCapture { call }) } else { Ok(()) }
    }

    /// Copies host memory to the device. The source may be anything again when this returns.
    ///
    /// # Safety
    /// `dst` has room for `src` and is used in the order of this stream only; the device is current.
    pub(super) unsafe fn upload(&self, src: &[u8], dst: *mut c_void) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's; `src` is borrowed until the copy is done.
        let copied = unsafe { self.runtime.copy(dst, src.as_ptr().cast(), src.len(), self.handle) };
        let done = self.synchronize();
        copied.and(done)
    }

    /// Copies device memory to the host, and waits.
    ///
    /// # Safety
    /// `src` holds as much as `dst` and is used in the order of this stream only; the device is current.
    pub(super) unsafe fn download(&self, src: *const c_void, dst: &mut [u8]) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's; `dst` is borrowed until the copy is done.
        let copied = unsafe { self.runtime.copy(dst.as_mut_ptr().cast(), src, dst.len(), self.handle) };
        let done = self.synchronize();
        copied.and(done)
    }
}

impl Drop for RocmStream {
    fn drop(&mut self) {
        if self.is_owned && self.bind().is_ok() {
            // SAFETY: created in `new`, destroyed once. Work still in it ends before its resources go. Nobody is left
            // to be told of an error.
            let _ = unsafe { self.runtime.destroy_stream(self.handle) };
        }
    }
}
