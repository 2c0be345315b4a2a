//! `swap_blocks`: move whole blocks between two pools, all layers at once: device to host when a
//! sequence is preempted, host to device when it comes back. Dynamic scales travel along.
//!
//! The two pools may lie in different memories and have different numbers of blocks and block
//! strides; the geometry inside a block must be the same.

use super::copy_blocks::check_pairs;
use super::{BlockPair, LayerMut, LayerRef, check_equal};
use crate::error::{Error, Result};
use crate::layout::CacheShape;
use crate::memory::Memory;

/// Arguments of [`crate::Backend::swap_out`] (`Src` the backend, `Dst` the host) and
/// [`crate::Backend::swap_in`] (the reverse).
#[derive(Debug)]
pub struct SwapBlocks<'a, 'l, Src: Memory, Dst: Memory> {
    /// Geometry of the pool read.
    pub src_shape: CacheShape,
    /// Its layers.
    pub src: &'l [LayerRef<'a, Src>],
    /// Geometry of the pool written.
    pub dst_shape: CacheShape,
    /// Its layers, as many.
    pub dst: &'l mut [LayerMut<'a, Dst>],
    /// The moves: `src` names a block of the pool read, `dst` one of the pool written.
    pub pairs: &'l [BlockPair],
}

impl<Src: Memory, Dst: Memory> SwapBlocks<'_, '_, Src, Dst> {
    /// Checks buffers, geometry and pairs.
    ///
    /// # Errors
    /// [`Error::GeometryMismatch`], [`Error::BlockOutOfRange`], [`Error::OverlappingPairs`],
    /// buffer variants.
    pub fn validate(&self) -> Result<()> {
        self.src_shape.validate()?;
        self.dst_shape.validate()?;
        if self.src_shape.spec != self.dst_shape.spec {
            return Err(Error::GeometryMismatch {
                what: "the pools of swap_blocks",
                reason: format!("{:?} and {:?}", self.src_shape.spec, self.dst_shape.spec),
            });
        }
        check_equal("the number of layers swapped", self.src.len(), self.dst.len())?;
        self.src.iter().try_for_each(|layer| layer.validate(&self.src_shape))?;
        self.dst.iter().try_for_each(|layer| layer.validate(&self.dst_shape))?;
        check_pairs("swap_blocks", self.pairs, self.src_shape.num_blocks, self.dst_shape.num_blocks)
    }
}
