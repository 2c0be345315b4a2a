//! [`CopyBlocks`]: all layers in one launch.
//!
//! The kernel reads two lists from device memory:
//!
//! ```text
//! memories [2 to 4 a layer]   base, block stride, block bytes         K, V and their dynamic scales
//! pairs    [pairs, 2] i64     source, destination
//! ```
//! The host writes both into one piece of scratch memory, as far as it grows and is kept. Upload and
//! launch are in the order of the stream, so a call cannot disturb the one before it.

use std::sync::PoisonError;

use super::CudaBackend;
use super::buffer::Allocation;
use super::driver;
use crate::args::CopyBlocks;
use crate::error::Result;
use crate::layout::checked_product;
use crate::raw::PtrRef;
use crate::raw::cuda::{CopyPlan, block_memories, copy_blocks};
use crate::raw::gpu::encode_copy_lists;
use crate::raw::views::layer_pointers;

impl CudaBackend {
    pub(super) fn copy_blocks_through_lists(&self, op: CopyBlocks<'_, '_, Self>) -> Result<()> {
        op.validate()?;
        self.bind()?;
        driver::refuse_capture(self.stream(), "copy_blocks")?;
        let layers =
            op.layers.iter_mut().map(|layer| layer_pointers(layer, self.stream())).collect::<Result<Vec<_>>>()?;
        let memories = block_memories(&op.shape, &layers)?;
        if memories.is_empty() || op.pairs.is_empty() {
            return Ok(());
        }
        let lists = encode_copy_lists(&memories, op.pairs);
        let mut scratch = self.shared.copy_lists.lock().unwrap_or_else(PoisonError::into_inner);
        if scratch.bytes < lists.len() {
            *scratch = Allocation::zeros(self.stream(), "lists of copy_blocks", lists.len().next_power_of_two())?;
        }
        // SAFETY: the scratch memory has room, and is of this stream.
        unsafe { driver::upload(self.stream(), &lists, scratch.address) }?;
        let at = |offset: usize| scratch.address as usize + offset;
        let plan = CopyPlan {
            memories: PtrRef::new(std::ptr::with_exposed_provenance(at(0)), memories.len()),
            pairs: PtrRef::new(
                std::ptr::with_exposed_provenance(at(size_of_val(&memories[..]))),
                checked_product("pairs", &[2, op.pairs.len()])?,
            ),
            num_blocks: op.shape.num_blocks,
            max_block_bytes: memories.iter().map(|memory| memory.block_bytes as usize).max().unwrap_or(0),
        };
        // SAFETY: the lists were uploaded before, in the stream's order, and describe live buffers that are
        // borrowed exclusively; no block is both read and written.
        self.enqueue(|launch| unsafe { copy_blocks(plan, launch) })
    }
}
