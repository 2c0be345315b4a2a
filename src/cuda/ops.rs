//! [`CudaBackend`] as a [`Backend`]: device views become device pointers, then one call of
//! [`crate::raw::cuda`], which validates and enqueues.

use std::sync::PoisonError;

use cudarc::driver::{CudaStream, result};

use super::buffer::{CudaBuffer, CudaView, CudaViewMut};
use super::driver::{self, error};
use super::{CUDA, CudaBackend};
use crate::args::{
    Absmax, CacheWrite, CopyBlocks, Dequantize, Gather, GatherBytes, MergeStates, PagedAttention, Quantize, SwapBlocks,
    UpdateScales,
};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::faults::Faults;
use crate::format::{DType, Element, Pod, bytes_of, bytes_of_mut};
use crate::layout::CacheShape;
use crate::memory::{Host, Memory, PageLock};
use crate::raw::cuda as raw;
use crate::raw::views::{DeviceMemory, IntoPointers, operations, pointers};
use crate::raw::{PtrMut, PtrRef};

impl<T: Pod> IntoPointers<CudaStream> for CudaView<'_, T> {
    type Pointers = PtrRef<T>;

    fn into_pointers(self, stream: &CudaStream, what: &'static str) -> Result<PtrRef<T>> {
        self.pointer(stream, what)
    }
}

impl<T: Pod> IntoPointers<CudaStream> for CudaViewMut<'_, T> {
    type Pointers = PtrMut<T>;

    fn into_pointers(self, stream: &CudaStream, what: &'static str) -> Result<PtrMut<T>> {
        self.pointer(stream, what)
    }
}

impl DeviceMemory<CudaStream> for CudaBackend {
    fn pointer<T: Pod>(view: CudaView<'_, T>, stream: &CudaStream, what: &'static str) -> Result<PtrRef<T>> {
        view.pointer(stream, what)
    }

    fn pointer_mut<T: Pod>(view: CudaViewMut<'_, T>, stream: &CudaStream, what: &'static str) -> Result<PtrMut<T>> {
        view.pointer(stream, what)
    }

    fn reborrow<'a, T: Pod>(view: &'a mut CudaViewMut<'_, T>) -> CudaViewMut<'a, T> {
        view.reborrow()
    }
}

impl Memory for CudaBackend {
    type Ref<'a, T: Pod> = CudaView<'a, T>;
    type Mut<'a, T: Pod> = CudaViewMut<'a, T>;

    fn shorten<'short, 'long: 'short, T: Pod>(buffer: CudaView<'long, T>) -> CudaView<'short, T> {
        buffer
    }

    fn shorten_mut<'short, 'long: 'short, T: Pod>(buffer: CudaViewMut<'long, T>) -> CudaViewMut<'short, T> {
        buffer
    }
}

impl Backend for CudaBackend {
    type Buffer<T: Pod> = CudaBuffer<T>;

    fn name(&self) -> &'static str {
        CUDA
    }

    fn zeros<T: Pod>(&self, what: &'static str, len: usize) -> Result<CudaBuffer<T>> {
        CudaBuffer::zeros(self.stream(), what, len)
    }

    fn upload<T: Pod>(&self, src: &[T], dst: &mut CudaBuffer<T>) -> Result<()> {
        let (needed, got) = (src.len(), dst.len());
        if needed > got {
            return Err(Error::BufferTooSmall { what: "upload", needed, got });
        }
        let dst = dst.view_mut().into_pointers(self.stream(), "upload")?;
        self.bind()?;
        driver::refuse_capture(self.stream(), "upload")?;
        // SAFETY: `dst` has room, and is of this stream.
        unsafe { driver::upload(self.stream(), bytes_of(src), dst.address()) }
    }

    fn download<T: Pod>(&self, src: &CudaBuffer<T>, dst: &mut [T]) -> Result<()> {
        let (needed, got) = (dst.len(), src.len());
        if needed > got {
            return Err(Error::BufferTooSmall { what: "download", needed, got });
        }
        let src = src.view().into_pointers(self.stream(), "download")?;
        self.bind()?;
        driver::refuse_capture(self.stream(), "download")?;
        // SAFETY: `src` is long enough, and of this stream; any bytes are a `Pod`.
        unsafe { driver::download(self.stream(), src.address(), bytes_of_mut(dst)) }
    }

    fn view<'a, T: Pod>(&self, buffer: &'a CudaBuffer<T>) -> CudaView<'a, T> {
        buffer.view()
    }

    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut CudaBuffer<T>) -> CudaViewMut<'a, T> {
        buffer.view_mut()
    }

    unsafe fn page_lock(&self, memory: &mut [u8]) -> Result<PageLock> {
        // SAFETY: the caller's.
        unsafe { driver::page_lock(self.context(), memory) }
    }

    operations!();

    fn attention_workspace_len(&self, shape: &CacheShape, num_heads: usize, num_tokens: usize) -> usize {
        // A sequence without a query needs no room.
        let bytes = |dtype| raw::attention_workspace_bytes(shape, dtype, num_heads, num_tokens, num_tokens);
        let largest = self.bind().and_then(|()| {
            [DType::F32, DType::F16, DType::BF16].into_iter().try_fold(0, |most, dtype| Ok(bytes(dtype)?.max(most)))
        });
        match largest {
            Ok(bytes) => bytes.div_ceil(size_of::<f32>()),
            // The call itself will say what is wrong with the device.
            Err(Error::Device { .. } | Error::NoDevice { .. }) => 0,
            // As the other sizes of what validation refuses: no buffer is that long.
            Err(_) => usize::MAX,
        }
    }

    fn paged_attention<T: Element>(&self, op: PagedAttention<'_, Self, T>) -> Result<()> {
        let op = pointers!(op as PagedAttention {
            shape, params, num_heads, num_tokens, max_query_len, query_strides, block_table_stride, output_strides,
            plan_is_ready;
            cache, k_scale, v_scale, query, query_starts, seq_lens, block_tables, alibi_slopes, sinks, output, lse,
            workspace
        } on self.stream());
        // SAFETY: as for the operations above.
        self.enqueue(|launch| unsafe { raw::paged_attention(op, self.attention_kernel, launch) })
    }

    fn copy_blocks(&self, op: CopyBlocks<'_, '_, Self>) -> Result<()> {
        self.copy_blocks_through_lists(op)
    }

    fn swap_out(&self, op: SwapBlocks<'_, '_, Self, Host>) -> Result<()> {
        self.swap_to_host(op)
    }

    fn swap_in(&self, op: SwapBlocks<'_, '_, Host, Self>) -> Result<()> {
        self.swap_from_host(op)
    }

    fn faults(&self) -> Result<Faults> {
        self.bind()?;
        driver::refuse_capture(self.stream(), "faults")?;
        let (stream, word) = (self.stream().cu_stream(), self.shared.faults.address);
        let copy = word + size_of::<u32>() as u64;
        let _reading = self.shared.reading_faults.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let _no_launches = self.shared.launches.write().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the two words are ours, and used in this stream's order.
            unsafe {
                result::memcpy_dtod_async(copy, word, size_of::<u32>(), stream).map_err(error("cuMemcpyDtoDAsync"))?;
                result::memset_d8_async(word, 0, size_of::<u32>(), stream).map_err(error("cuMemsetD8Async"))?;
            }
        }
        let mut bits = [0u8; size_of::<u32>()];
        // SAFETY: the copy is ours; nobody else reads or writes it while the lock is held.
        unsafe { driver::download(self.stream(), copy, &mut bits) }?;
        Ok(Faults::from_bits(u32::from_ne_bytes(bits)))
    }
}
