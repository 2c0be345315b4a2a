//! Copies of blocks: on the device in one launch, and between device and host.
//!
//! The kernel of [`CopyBlocks`] reads two lists, which the host writes into one piece of device memory that grows as it
//! must and is kept ([`CopyPlan`]).
//!
//! [`SwapBlocks`] has a stream of its own:
//!
//! ```text
//! caller's stream   ...work so far... ─┐                    ┌─ ...work from now on...
//! side stream                          └─► copies ──────────┤
//! host                                                      └─ returns
//! ```
//! The host's slices are borrowed for the call alone, so the host waits for the copies; work that
//! other threads enqueue meanwhile runs beside them.

use std::sync::PoisonError;

use super::RocmBackend;
use super::buffer::Allocation;
use crate::args::{CopyBlocks, SwapBlocks};
use crate::error::Result;
use crate::layout::checked_product;
use crate::memory::Host;
use crate::raw::gpu::encode_copy_lists;
use crate::raw::rocm::{CopyPlan, block_memories, copy_blocks, swap_blocks};
use crate::raw::views::{IntoPointers, host_mut, host_ref, layer_pointers};
use crate::raw::{Pointers, PtrRef};

impl RocmBackend {
    pub(super) fn copy_blocks_through_lists(&self, op: CopyBlocks<'_, '_, Self>) -> Result<()> {
        op.validate()?;
        let stream = self.stream();
        stream.bind()?;
        stream.refuse_capture("copy_blocks")?;
        let layers = op.layers.iter_mut().map(|layer| layer_pointers(layer, stream)).collect::<Result<Vec<_>>>()?;
        let memories = block_memories(&op.shape, &layers)?;
        if memories.is_empty() || op.pairs.is_empty() {
            return Ok(());
        }
        let lists = encode_copy_lists(&memories, op.pairs);
        let mut scratch = self.shared.copy_lists.lock().unwrap_or_else(PoisonError::into_inner);
        if scratch.bytes < lists.len() {
            let bytes = lists.len().next_power_of_two();
            *scratch = Allocation::zeros(&self.shared.stream, "lists of copy_blocks", bytes)?;
        }
        // SAFETY: the scratch memory has room, and is of this stream.
        unsafe { stream.upload(&lists, scratch.at(0)) }?;
        let plan = CopyPlan {
            memories: PtrRef::new(scratch.at(0).cast_const().cast(), memories.len()),
            pairs: PtrRef::new(
                scratch.at(size_of_val(&memories[..])).cast_const().cast(),
                checked_product("pairs", &[2, op.pairs.len()])?,
            ),
            num_blocks: op.shape.num_blocks,
            max_block_bytes: memories.iter().map(|memory| memory.block_bytes as usize).max().unwrap_or(0),
        };
        // SAFETY: the lists were uploaded before, in the stream's order, and describe live buffers that are
        // borrowed exclusively; no block is both read and written.
        self.enqueue(|launch| unsafe { copy_blocks(plan, launch) })
    }

    pub(super) fn swap_to_host(&self, op: SwapBlocks<'_, '_, Self, Host>) -> Result<()> {
        let stream = self.stream();
        let src = op.src.iter().map(|layer| layer.into_pointers(stream, "layer")).collect::<Result<Vec<_>>>()?;
        let mut dst: Vec<_> = op.dst.iter_mut().map(host_mut).collect();
        let SwapBlocks { src_shape, dst_shape, pairs, .. } = op;
        self.swap(SwapBlocks { src_shape, src: &src, dst_shape, dst: &mut dst, pairs })
    }

    pub(super) fn swap_from_host(&self, op: SwapBlocks<'_, '_, Host, Self>) -> Result<()> {
        let src: Vec<_> = op.src.iter().map(host_ref).collect();
        let mut dst =
            op.dst.iter_mut().map(|layer| layer_pointers(layer, self.stream())).collect::<Result<Vec<_>>>()?;
        let SwapBlocks { src_shape, dst_shape, pairs, .. } = op;
        self.swap(SwapBlocks { src_shape, src: &src, dst_shape, dst: &mut dst, pairs })
    }

    /// Both ways: the buffers are borrowed by the caller until this returns.
    fn swap(&self, op: SwapBlocks<'_, '_, Pointers, Pointers>) -> Result<()> {
        op.validate()?;
        let (stream, side) = (self.stream(), &self.shared.side);
        stream.bind()?;
        stream.refuse_capture("swap_blocks")?;
        // SAFETY: live streams of the device that is current.
        unsafe { stream.runtime.order(stream.handle, side.handle) }?;
        // SAFETY: live buffers of the device and of the host, each kind borrowed as it is used; device memory is ordered
        // by the events, host memory by the wait below, which nothing skips.
        let enqueued = unsafe { swap_blocks(op, side.handle) };
        // SAFETY: as above.
        let ordered = unsafe { stream.runtime.order(side.handle, stream.handle) };
        let copied = side.synchronize();
        enqueued.and(ordered).and(copied)
    }
}
