//! [`RocmBackend`] as a [`Backend`]: device views become device pointers, then one call of
//! [`crate::raw::rocm`], which validates and enqueues.

use std::sync::PoisonError;

use super::buffer::{RocmBuffer, RocmView, RocmViewMut};
use super::stream::RocmStream;
use super::{ROCM, RocmBackend};
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
use crate::raw::rocm as raw;
use crate::raw::views::{DeviceMemory, IntoPointers, operations, pointers};
use crate::raw::{PtrMut, PtrRef};

impl<T: Pod> IntoPointers<RocmStream> for RocmView<'_, T> {
    type Pointers = PtrRef<T>;

    fn into_pointers(self, stream: &RocmStream, what: &'static str) -> Result<PtrRef<T>> {
        self.pointer(stream, what)
    }
}

impl<T: Pod> IntoPointers<RocmStream> for RocmViewMut<'_, T> {
    type Pointers = PtrMut<T>;

    fn into_pointers(self, stream: &RocmStream, what: &'static str) -> Result<PtrMut<T>> {
        self.pointer(stream, what)
    }
}

impl DeviceMemory<RocmStream> for RocmBackend {
    fn pointer<T: Pod>(view: RocmView<'_, T>, stream: &RocmStream, what: &'static str) -> Result<PtrRef<T>> {
        view.pointer(stream, what)
    }

    fn pointer_mut<T: Pod>(view: RocmViewMut<'_, T>, stream: &RocmStream, what: &'static str) -> Result<PtrMut<T>> {
        view.pointer(stream, what)
    }

    fn reborrow<'a, T: Pod>(view: &'a mut RocmViewMut<'_, T>) -> RocmViewMut<'a, T> {
        view.reborrow()
    }
}

impl Memory for RocmBackend {
    type Ref<'a, T: Pod> = RocmView<'a, T>;
    type Mut<'a, T: Pod> = RocmViewMut<'a, T>;

    fn shorten<'short, 'long: 'short, T: Pod>(buffer: RocmView<'long, T>) -> RocmView<'short, T> {
        buffer
    }

    fn shorten_mut<'short, 'long: 'short, T: Pod>(buffer: RocmViewMut<'long, T>) -> RocmViewMut<'short, T> {
        buffer
    }
}

impl Backend for RocmBackend {
    type Buffer<T: Pod> = RocmBuffer<T>;

    fn name(&self) -> &'static str {
        ROCM
    }

    fn zeros<T: Pod>(&self, what: &'static str, len: usize) -> Result<RocmBuffer<T>> {
        RocmBuffer::zeros(&self.shared.stream, what, len)
    }

    fn upload<T: Pod>(&self, src: &[T], dst: &mut RocmBuffer<T>) -> Result<()> {
        let (needed, got) = (src.len(), dst.len());
        if needed > got {
            return Err(Error::BufferTooSmall { what: "upload", needed, got });
        }
        dst.view_mut().pointer(self.stream(), "upload")?;
        self.stream().bind()?;
        self.stream().refuse_capture("upload")?;
        // SAFETY: `dst` has room, and is of this stream.
        unsafe { self.stream().upload(bytes_of(src), dst.memory.at(0)) }
    }

    fn download<T: Pod>(&self, src: &RocmBuffer<T>, dst: &mut [T]) -> Result<()> {
        let (needed, got) = (dst.len(), src.len());
        if needed > got {
            return Err(Error::BufferTooSmall { what: "download", needed, got });
        }
        src.view().pointer(self.stream(), "download")?;
        self.stream().bind()?;
        self.stream().refuse_capture("download")?;
        // SAFETY: `src` is long enough, and of this stream; any bytes are a `Pod`.
        unsafe { self.stream().download(src.memory.at(0), bytes_of_mut(dst)) }
    }

    fn view<'a, T: Pod>(&self, buffer: &'a RocmBuffer<T>) -> RocmView<'a, T> {
        buffer.view()
    }

    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut RocmBuffer<T>) -> RocmViewMut<'a, T> {
        buffer.view_mut()
    }

    unsafe fn page_lock(&self, memory: &mut [u8]) -> Result<PageLock> {
        if memory.is_empty() {
            return Ok(PageLock::none());
        }
        let stream = self.shared.stream.clone();
        stream.bind()?;
        let address = memory.as_mut_ptr().expose_provenance();
        // SAFETY: the caller's: it is unlocked before it is freed.
        unsafe { stream.runtime.page_lock(memory.as_mut_ptr().cast(), memory.len()) }?;
        Ok(PageLock::new(move || {
            if stream.bind().is_ok() {
                // SAFETY: locked above, once, by this address.
                let _ = unsafe { stream.runtime.page_unlock(std::ptr::with_exposed_provenance_mut(address)) };
            }
        }))
    }

    operations!();

    fn attention_workspace_len(&self, shape: &CacheShape, num_heads: usize, num_tokens: usize) -> usize {
        // A sequence without a query needs no room.
        let bytes = |dtype| raw::attention_workspace_bytes(shape, dtype, num_heads, num_tokens, num_tokens);
        let largest = self.stream().bind().and_then(|()| {
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
        let stream = self.stream();
        stream.bind()?;
        stream.refuse_capture("faults")?;
        let (word, copy) = (self.shared.faults.at(0), self.shared.faults.at(size_of::<u32>()));
        let _reading = self.shared.reading_faults.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let _no_launches = self.shared.launches.write().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the two words are ours, and used in this stream's order.
            unsafe {
                stream.runtime.copy(copy, word, size_of::<u32>(), stream.handle)?;
                stream.runtime.clear(word, size_of::<u32>(), stream.handle)?;
            }
        }
        let mut bits = [0u8; size_of::<u32>()];
        // SAFETY: the copy is ours; nobody else reads or writes it while the lock is held.
        unsafe { stream.download(copy, &mut bits) }?;
        Ok(Faults::from_bits(u32::from_ne_bytes(bits)))
    }
}
