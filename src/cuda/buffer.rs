//! Typed device memory: [`CudaBuffer`] owns it, [`CudaView`] and [`CudaViewMut`] borrow it or a part.
//!
//! A buffer belongs to a stream: it is allocated, used and freed in that stream's order, so that dropping
//! one while kernels that use it are still to run is no error. Operations refuse a view of another
//! stream ([`Error::OtherStream`]). While a stream records a graph none of its buffers should be dropped:
//! the release would become a part of the graph.

use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUresult};
use cudarc::driver::{CudaStream, DeviceSlice, DriverError, SyncOnDrop, result};

use super::driver::error;
use crate::error::{Error, Result};
use crate::format::Pod;
use crate::layout::checked_product;
use crate::memory::BufferLen;
use crate::raw::{PtrMut, PtrRef};

/// Bytes of device memory in the order of one stream.
#[derive(Debug)]
pub(super) struct Allocation {
    /// Null where there are no bytes.
    pub(super) address: CUdeviceptr,
    pub(super) bytes: usize,
    pub(super) stream: Arc<CudaStream>,
}

impl Allocation {
    /// All zero bits.
    pub(super) fn zeros(stream: &Arc<CudaStream>, what: &'static str, bytes: usize) -> Result<Self> {
        let context = stream.context();
        context.bind_to_thread().map_err(error("cuCtxSetCurrent"))?;
        if bytes == 0 {
            return Ok(Allocation { address: 0, bytes, stream: stream.clone() });
        }
        // SAFETY: a stream of the current context.
        let address = unsafe {
            if context.has_async_alloc() {
                result::malloc_async(stream.cu_stream(), bytes)
            } else {
                result::malloc_sync(bytes)
            }
        };
        let address = address.map_err(|DriverError(code)| match code {
            // A size that no device could have is an invalid value to some drivers.
            CUresult::CUDA_ERROR_OUT_OF_MEMORY | CUresult::CUDA_ERROR_INVALID_VALUE => {
                Error::OutOfMemory { what, bytes }
            }
            _ => error("cuMemAlloc")(DriverError(code)),
        })?;
        let allocation = Allocation { address, bytes, stream: stream.clone() };
        // SAFETY: allocated just now, `bytes` long, in the order of this stream.
        unsafe { result::memset_d8_async(address, 0, bytes, stream.cu_stream()) }.map_err(error("cuMemsetD8Async"))?;
        Ok(allocation)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: from `malloc_async` or `malloc_sync` by the same rule, freed once, after all uses: those are
        // in the stream's order.
        unsafe {
            if context.has_async_alloc() {
                context.record_err(result::free_async(self.address, self.stream.cu_stream()));
            } else {
                context.record_err(self.stream.synchronize());
                context.record_err(result::free_sync(self.address));
            }
        }
    }
}

/// An owned buffer of `len` elements in device memory.
#[derive(Debug)]
pub struct CudaBuffer<T> {
    pub(super) memory: Allocation,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> CudaBuffer<T> {
    pub(super) fn zeros(stream: &Arc<CudaStream>, what: &'static str, len: usize) -> Result<Self> {
        let bytes = checked_product(what, &[len, size_of::<T>()])?;
        Ok(CudaBuffer { memory: Allocation::zeros(stream, what, bytes)?, len, element: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address on the device, for kernels of one's own; 0 for an empty buffer. Use it in the order of
    /// [`CudaBuffer::stream`].
    pub fn device_ptr(&self) -> CUdeviceptr {
        self.memory.address
    }

    /// The stream the buffer belongs to.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.memory.stream
    }

    /// Borrows all of it.
    pub fn view(&self) -> CudaView<'_, T> {
        let stream = Some(&*self.memory.stream);
        CudaView { address: self.memory.address, len: self.len, stream, element: PhantomData }
    }

    /// Borrows all of it for writing.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        let stream = Some(&*self.memory.stream);
        CudaViewMut { address: self.memory.address, len: self.len, stream, element: PhantomData }
    }
}

/// Device memory borrowed for reading.
#[derive(Clone, Copy, Debug)]
pub struct CudaView<'a, T> {
    address: CUdeviceptr,
    len: usize,
    /// `None`: the caller of [`CudaView::from_raw_parts`] answers for the order.
    stream: Option<&'a CudaStream>,
    element: PhantomData<&'a T>,
}

/// Device memory borrowed for writing.
#[derive(Debug)]
pub struct CudaViewMut<'a, T> {
    address: CUdeviceptr,
    len: usize,
    stream: Option<&'a CudaStream>,
    element: PhantomData<&'a mut T>,
}

impl<'a, T: Pod> CudaView<'a, T> {
    /// A view of memory that is known by its address alone. Operations of any backend take it.
    ///
    /// # Safety
    /// `len` initialized elements at `address`, aligned for `T`, in memory that the backend's context can
    /// reach; nobody writes them or frees them before the operations that get the view are done on the
    /// device.
    pub const unsafe fn from_raw_parts(address: CUdeviceptr, len: usize) -> Self {
        CudaView { address, len, stream: None, element: PhantomData }
    }

    /// Elements.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address on the device.
    pub const fn device_ptr(&self) -> CUdeviceptr {
        self.address
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if the range ends outside.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<CudaView<'a, T>> {
        let (address, len) = part::<T>(self.address, self.len, range)?;
        Ok(CudaView { address, len, ..*self })
    }

    pub(super) fn pointer(self, stream: &CudaStream, what: &'static str) -> Result<PtrRef<T>> {
        check_stream(self.stream, stream, what)?;
        Ok(PtrRef::new(std::ptr::with_exposed_provenance(self.address as usize), self.len))
    }
}

impl<'a, T: Pod> CudaViewMut<'a, T> {
    /// A view of memory that is known by its address alone. Operations of any backend take it.
    ///
    /// # Safety
    /// `len` elements at `address`, aligned for `T`, in memory that the backend's context can reach; nobody
    /// else uses or frees them before the operations that get the view are done on the device.
    pub const unsafe fn from_raw_parts(address: CUdeviceptr, len: usize) -> Self {
        CudaViewMut { address, len, stream: None, element: PhantomData }
    }

    /// Elements.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address on the device.
    pub const fn device_ptr(&self) -> CUdeviceptr {
        self.address
    }

    /// The same elements, for a shorter time.
    pub fn reborrow(&mut self) -> CudaViewMut<'_, T> {
        CudaViewMut { address: self.address, len: self.len, stream: self.stream, element: PhantomData }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if the range ends outside.
    pub fn slice_mut(self, range: impl RangeBounds<usize>) -> Result<CudaViewMut<'a, T>> {
        let (address, len) = part::<T>(self.address, self.len, range)?;
        Ok(CudaViewMut { address, len, stream: self.stream, element: PhantomData })
    }

    /// The first `mid` elements, and the others.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if there are fewer than `mid`.
    pub fn split_at_mut(self, mid: usize) -> Result<(CudaViewMut<'a, T>, CudaViewMut<'a, T>)> {
        let view = |(address, len)| CudaViewMut { address, len, stream: self.stream, element: PhantomData };
        let tail = part::<T>(self.address, self.len, mid..)?;
        Ok((view(part::<T>(self.address, self.len, ..mid)?), view(tail)))
    }

    pub(super) fn pointer(self, stream: &CudaStream, what: &'static str) -> Result<PtrMut<T>> {
        check_stream(self.stream, stream, what)?;
        Ok(PtrMut::new(std::ptr::with_exposed_provenance_mut(self.address as usize), self.len))
    }
}

/// The address and length of a part of `len` elements.
fn part<T>(address: CUdeviceptr, len: usize, range: impl RangeBounds<usize>) -> Result<(CUdeviceptr, usize)> {
    let start = match range.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => len.max(start),
    };
    if start > end || end > len {
        return Err(Error::BufferTooSmall { what: "a part of a device buffer", needed: start.max(end), got: len });
    }
    Ok((address + (start * size_of::<T>()) as CUdeviceptr, end - start))
}

/// Refuses a buffer that nothing would order with this stream's work.
pub(crate) fn check_stream(of_buffer: Option<&CudaStream>, stream: &CudaStream, what: &'static str) -> Result<()> {
    match of_buffer {
        Some(other) if other != stream => Err(Error::OtherStream { what }),
        _ => Ok(()),
    }
}

impl<T> BufferLen for CudaView<'_, T> {
    fn buffer_len(&self) -> usize {
        self.len
    }
}

impl<T> BufferLen for CudaViewMut<'_, T> {
    fn buffer_len(&self) -> usize {
        self.len
    }
}

/// A buffer of cudarc that operations may read. Its use is recorded with cudarc when this is dropped.
pub struct Lent<'a, T> {
    view: CudaView<'a, T>,
    _recorded: SyncOnDrop<'a>,
}

/// A buffer of cudarc that operations may write. Its use is recorded with cudarc when this is dropped.
pub struct LentMut<'a, T> {
    view: CudaViewMut<'a, T>,
    _recorded: SyncOnDrop<'a>,
}

impl<'a, T: Pod> Lent<'a, T> {
    pub(super) fn new(stream: &'a CudaStream, slice: cudarc::driver::CudaView<'a, T>) -> Result<Self> {
        check_stream(Some(slice.stream()), stream, "a buffer of cudarc")?;
        let len = slice.len();
        let (address, _recorded) = slice.view_ptr(stream);
        Ok(Lent { view: CudaView { address, len, stream: Some(stream), element: PhantomData }, _recorded })
    }

    /// The elements.
    pub fn view(&self) -> CudaView<'_, T> {
        self.view
    }
}

impl<'a, T: Pod> LentMut<'a, T> {
    pub(super) fn new(stream: &'a CudaStream, slice: cudarc::driver::CudaViewMut<'a, T>) -> Result<Self> {
        check_stream(Some(slice.stream()), stream, "a buffer of cudarc")?;
        let len = slice.len();
        let (address, _recorded) = slice.view_ptr_mut(stream);
        Ok(LentMut { view: CudaViewMut { address, len, stream: Some(stream), element: PhantomData }, _recorded })
    }

    /// The elements.
    pub fn view(&self) -> CudaView<'_, T> {
        CudaView { address: self.view.address, len: self.view.len, stream: self.view.stream, element: PhantomData }
    }

    /// The elements, for writing.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.view.reborrow()
    }
}
