//! Typed device memory: [`RocmBuffer`] owns it, [`RocmView`] and [`RocmViewMut`] borrow it or a part.
//!
//! A buffer belongs to a stream and is used in that stream's order. Dropping one waits for the stream, since `hipFree`
//! knows no order: kernels that use it end first. Operations refuse a view of another stream
//! ([`Error::OtherStream`]). While a stream records a graph none of its buffers may be made or dropped.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use super::stream::RocmStream;
use crate::error::{Error, Result};
use crate::format::Pod;
use crate::layout::checked_product;
use crate::memory::BufferLen;
use crate::raw::{PtrMut, PtrRef};

/// Bytes of device memory in the order of one stream.
#[derive(Debug)]
pub(super) struct Allocation {
    /// 0 where there are no bytes.
    pub(super) address: u64,
    pub(super) bytes: usize,
    pub(super) stream: Arc<RocmStream>,
}

impl Allocation {
    /// All zero bits.
    pub(super) fn zeros(stream: &Arc<RocmStream>, what: &'static str, bytes: usize) -> Result<Self> {
        stream.bind()?;
        if bytes == 0 {
            return Ok(Allocation { address: 0, bytes, stream: stream.clone() });
        }
        let address = stream.runtime.allocate(what, bytes)?.expose_provenance() as u64;
        let allocation = Allocation { address, bytes, stream: stream.clone() };
        // SAFETY: allocated just now, `bytes` long, in the order of this stream.
        unsafe { stream.runtime.clear(allocation.at(0), bytes, stream.handle) }?;
        Ok(allocation)
    }

    /// The address of a byte.
    pub(super) fn at(&self, offset: usize) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.address as usize + offset)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        // Freed even after an error, which then is the stream's: whoever waits for it next is told.
        let _ = self.stream.synchronize();
        // SAFETY: from `allocate`, freed once, after all uses: those were in the stream's order.
        let _ = unsafe { self.stream.runtime.free(self.at(0)) };
    }
}

/// An owned buffer of `len` elements in device memory.
#[derive(Debug)]
pub struct RocmBuffer<T> {
    pub(super) memory: Allocation,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> RocmBuffer<T> {
    pub(super) fn zeros(stream: &Arc<RocmStream>, what: &'static str, len: usize) -> Result<Self> {
        let bytes = checked_product(what, &[len, size_of::<T>()])?;
        Ok(RocmBuffer { memory: Allocation::zeros(stream, what, bytes)?, len, element: PhantomData })
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
    /// [`RocmBuffer::stream`].
    pub fn device_ptr(&self) -> u64 {
        self.memory.address
    }

    /// The stream the buffer belongs to.
    pub fn stream(&self) -> &Arc<RocmStream> {
        &self.memory.stream
    }

    /// Borrows all of it.
    pub fn view(&self) -> RocmView<'_, T> {
        let stream = Some(&*self.memory.stream);
        RocmView { address: self.memory.address, len: self.len, stream, element: PhantomData }
    }

    /// Borrows all of it for writing.
    pub fn view_mut(&mut self) -> RocmViewMut<'_, T> {
        let stream = Some(&*self.memory.stream);
        RocmViewMut { address: self.memory.address, len: self.len, stream, element: PhantomData }
    }
}

/// Device memory borrowed for reading.
#[derive(Clone, Copy, Debug)]
pub struct RocmView<'a, T> {
    address: u64,
    len: usize,
    /// `None`: the caller of [`RocmView::from_raw_parts`] answers for the order.
    stream: Option<&'a RocmStream>,
    element: PhantomData<&'a T>,
}

/// Device memory borrowed for writing.
#[derive(Debug)]
pub struct RocmViewMut<'a, T> {
    address: u64,
    len: usize,
    stream: Option<&'a RocmStream>,
    element: PhantomData<&'a mut T>,
}

impl<'a, T: Pod> RocmView<'a, T> {
    /// A view of memory that is known by its address alone. Operations of any backend take it.
    ///
    /// # Safety
    /// `len` initialized elements at `address`, aligned for `T`, in memory that the backend's device can
    /// reach; nobody writes them or frees them before the operations that get the view are done on the
    /// device.
    pub const unsafe fn from_raw_parts(address: u64, len: usize) -> Self {
        RocmView { address, len, stream: None, element: PhantomData }
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
    pub const fn device_ptr(&self) -> u64 {
        self.address
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if the range ends outside.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<RocmView<'a, T>> {
        let (address, len) = part::<T>(self.address, self.len, range)?;
        Ok(RocmView { address, len, ..*self })
    }

    pub(super) fn pointer(self, stream: &RocmStream, what: &'static str) -> Result<PtrRef<T>> {
        check_stream(self.stream, stream, what)?;
        Ok(PtrRef::new(std::ptr::with_exposed_provenance(self.address as usize), self.len))
    }
}

impl<'a, T: Pod> RocmViewMut<'a, T> {
    /// A view of memory that is known by its address alone. Operations of any backend take it.
    ///
    /// # Safety
    /// `len` elements at `address`, aligned for `T`, in memory that the backend's device can reach; nobody
    /// else uses or frees them before the operations that get the view are done on the device.
    pub const unsafe fn from_raw_parts(address: u64, len: usize) -> Self {
        RocmViewMut { address, len, stream: None, element: PhantomData }
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
    pub const fn device_ptr(&self) -> u64 {
        self.address
    }

    /// The same elements, for a shorter time.
    pub fn reborrow(&mut self) -> RocmViewMut<'_, T> {
        RocmViewMut { address: self.address, len: self.len, stream: self.stream, element: PhantomData }
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if the range ends outside.
    pub fn slice_mut(self, range: impl RangeBounds<usize>) -> Result<RocmViewMut<'a, T>> {
        let (address, len) = part::<T>(self.address, self.len, range)?;
        Ok(RocmViewMut { address, len, stream: self.stream, element: PhantomData })
    }

    /// The first `mid` elements, and the others.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if there are fewer than `mid`.
    pub fn split_at_mut(self, mid: usize) -> Result<(RocmViewMut<'a, T>, RocmViewMut<'a, T>)> {
        let view = |(address, len)| RocmViewMut { address, len, stream: self.stream, element: PhantomData };
        let tail = part::<T>(self.address, self.len, mid..)?;
        Ok((view(part::<T>(self.address, self.len, ..mid)?), view(tail)))
    }

    pub(super) fn pointer(self, stream: &RocmStream, what: &'static str) -> Result<PtrMut<T>> {
        check_stream(self.stream, stream, what)?;
        Ok(PtrMut::new(std::ptr::with_exposed_provenance_mut(self.address as usize), self.len))
    }
}

/// The address and length of a part of `len` elements.
fn part<T>(address: u64, len: usize, range: impl RangeBounds<usize>) -> Result<(u64, usize)> {
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
    Ok((address + (start * size_of::<T>()) as u64, end - start))
}

/// Refuses a buffer that nothing would order with this stream's work.
pub(crate) fn check_stream(of_buffer: Option<&RocmStream>, stream: &RocmStream, what: &'static str) -> Result<()> {
    match of_buffer {
        Some(other) if !other.is_same(stream) => Err(Error::OtherStream { what }),
        _ => Ok(()),
    }
}

impl<T> BufferLen for RocmView<'_, T> {
    fn buffer_len(&self) -> usize {
        self.len
    }
}

impl<T> BufferLen for RocmViewMut<'_, T> {
    fn buffer_len(&self) -> usize {
        self.len
    }
}
