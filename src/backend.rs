//! The seam between operations and the machines that run them.
//!
//! A [`Backend`] is a handle the caller owns: there is no global state. It is a [`Memory`] that
//! can also allocate, and it runs every operation of [`crate::args`]. Code written over `B:
//! Backend` (the cache, the reference decoder, the parity tests) runs on every backend unchanged.
//!
//! Every operation validates its arguments first and then only enqueues work: no allocation in the
//! backend's memory (but for a list that `copy_blocks` keeps there and that grows), no synchronisation, no
//! host read of device data. On the CPU the work is done when the call returns, and attention takes a few
//! small scratch vectors of its own a call. The calls that borrow host memory, `upload`, `download` and the two
//! swaps, are done with it when they return.

use crate::args::{
    Absmax, CacheWrite, CopyBlocks, Dequantize, Gather, GatherBytes, MergeStates, PagedAttention, Quantize, SwapBlocks,
    UpdateScales,
};
use crate::error::Result;
use crate::faults::Faults;
use crate::format::{Element, Pod};
use crate::layout::CacheShape;
use crate::memory::{Host, Memory, PageLock};

/// Something that owns memory and runs the operations.
pub trait Backend: Memory + Send + Sync + Sized + 'static {
    /// An owned buffer.
    type Buffer<T: Pod>: Send + Sync + std::fmt::Debug;

    /// The name shown to users: `cpu`, `cuda`, `rocm`.
    fn name(&self) -> &'static str;

    /// Allocates `len` elements, all zero bits.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Overflow`].
    fn zeros<T: Pod>(&self, what: &'static str, len: usize) -> Result<Self::Buffer<T>>;

    /// Copies `src` to the first `src.len()` elements of `dst`. `src` may change once this returns.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn upload<T: Pod>(&self, src: &[T], dst: &mut Self::Buffer<T>) -> Result<()>;

    /// Copies the first `dst.len()` elements of `src` to `dst`, and waits for them.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn download<T: Pod>(&self, src: &Self::Buffer<T>, dst: &mut [T]) -> Result<()>;

    /// Borrows a whole buffer for reading.
    fn view<'a, T: Pod>(&self, buffer: &'a Self::Buffer<T>) -> Self::Ref<'a, T>;

    /// Borrows a whole buffer for writing.
    fn view_mut<'a, T: Pod>(&self, buffer: &'a mut Self::Buffer<T>) -> Self::Mut<'a, T>;

    /// Locks pages of host memory, so that the device copies from and to it directly and without waiting:
    /// what a pool to swap to should be made of. Locking is slow, and takes whole pages. A backend
    /// that works in host memory has nothing to do.
    ///
    /// # Errors
    /// The device's own: part of the memory is locked already, or the system refuses.
    ///
    /// # Safety
    /// The memory is not freed before the lock is dropped.
    unsafe fn page_lock(&self, memory: &mut [u8]) -> Result<PageLock> {
        let _ = memory;
        Ok(PageLock::none())
    }

    /// Quantizes keys and values and scatters them to their slots.
    ///
    /// # Errors
    /// [`CacheWrite::validate`].
    fn cache_write<T: Element>(&self, op: CacheWrite<'_, Self, T>) -> Result<()>;

    /// Copies blocks inside one pool.
    ///
    /// # Errors
    /// [`CopyBlocks::validate`].
    fn copy_blocks(&self, op: CopyBlocks<'_, '_, Self>) -> Result<()>;

    /// Moves blocks from this backend's memory to the host, and waits for them.
    ///
    /// # Errors
    /// [`SwapBlocks::validate`].
    fn swap_out(&self, op: SwapBlocks<'_, '_, Self, Host>) -> Result<()>;

    /// Moves blocks from the host to this backend's memory. The host's may change once this returns.
    ///
    /// # Errors
    /// [`SwapBlocks::validate`].
    fn swap_in(&self, op: SwapBlocks<'_, '_, Host, Self>) -> Result<()>;

    /// Floats of workspace [`Backend::paged_attention`] needs for at most `num_tokens` query rows
    /// of `num_heads` heads over a cache of this shape.
    fn attention_workspace_len(&self, shape: &CacheShape, num_heads: usize, num_tokens: usize) -> usize;

    /// Attends over the cache. Results do not depend on the number of threads and are the same
    /// run to run.
    ///
    /// # Errors
    /// [`PagedAttention::validate`]; [`crate::Error::BufferTooSmall`] for the workspace.
    fn paged_attention<T: Element>(&self, op: PagedAttention<'_, Self, T>) -> Result<()>;

    /// Merges two partial outputs by LSE.
    ///
    /// # Errors
    /// [`MergeStates::validate`].
    fn merge_states<T: Element>(&self, op: MergeStates<'_, Self, T>) -> Result<()>;

    /// Paged to dense, dequantized.
    ///
    /// # Errors
    /// [`Gather::validate`].
    fn gather<T: Element>(&self, op: Gather<'_, Self, T>) -> Result<()>;

    /// Paged to dense, raw codes.
    ///
    /// # Errors
    /// [`GatherBytes::validate`].
    fn gather_bytes(&self, op: GatherBytes<'_, Self>) -> Result<()>;

    /// Updates running maxima of |x|.
    ///
    /// # Errors
    /// [`Absmax::validate`].
    fn absmax<T: Element>(&self, op: Absmax<'_, Self, T>) -> Result<()>;

    /// Turns running maxima into scales.
    ///
    /// # Errors
    /// [`UpdateScales::validate`].
    fn update_scales(&self, op: UpdateScales<'_, Self>) -> Result<()>;

    /// Dense quantization.
    ///
    /// # Errors
    /// [`Quantize::validate`].
    fn quantize<T: Element>(&self, op: Quantize<'_, Self, T>) -> Result<()>;

    /// Dense dequantization.
    ///
    /// # Errors
    /// [`Dequantize::validate`].
    fn dequantize<T: Element>(&self, op: Dequantize<'_, Self, T>) -> Result<()>;

    /// The faults kernels have set since the last call, which clears them; waits for work enqueued.
    ///
    /// # Errors
    /// The device's own.
    fn faults(&self) -> Result<Faults>;
}
