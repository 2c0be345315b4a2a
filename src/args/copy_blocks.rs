//! `copy_blocks`: duplicate whole blocks inside one pool, all layers at once: the second half of
//! copy-on-write. Dynamic scales travel with their blocks.

use super::LayerMut;
use crate::error::{Error, Result};
use crate::layout::CacheShape;
use crate::memory::Memory;

/// One copy: block `src` onto block `dst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockPair {
    /// The block read.
    pub src: u32,
    /// The block written.
    pub dst: u32,
}

impl BlockPair {
    /// `src` onto `dst`.
    pub const fn new(src: u32, dst: u32) -> Self {
        BlockPair { src, dst }
    }
}

/// Arguments of [`crate::Backend::copy_blocks`].
#[derive(Debug)]
pub struct CopyBlocks<'a, 'l, M: Memory> {
    /// Geometry of every layer's cache.
    pub shape: CacheShape,
    /// The layers.
    pub layers: &'l mut [LayerMut<'a, M>],
    /// The copies. They run in no order, so a block may be written once at most, and not be both
    /// read and written.
    pub pairs: &'l [BlockPair],
}

impl<M: Memory> CopyBlocks<'_, '_, M> {
    /// Checks buffers and pairs.
    ///
    /// # Errors
    /// [`Error::BlockOutOfRange`], [`Error::OverlappingPairs`], buffer variants.
    pub fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        self.layers.iter().try_for_each(|layer| layer.validate(&self.shape))?;
        check_pairs("copy_blocks", self.pairs, self.shape.num_blocks, self.shape.num_blocks)?;
        let mut sources: Vec<u32> = self.pairs.iter().map(|pair| pair.src).collect();
        sources.sort_unstable();
        match self.pairs.iter().find(|pair| sources.binary_search(&pair.dst).is_ok()) {
            Some(pair) => Err(Error::OverlappingPairs {
                what: "copy_blocks",
                block: pair.dst,
                conflict: "both source and destination",
            }),
            None => Ok(()),
        }
    }
}

/// Refuses ids outside the pools and a destination named twice.
pub(super) fn check_pairs(what: &'static str, pairs: &[BlockPair], src_blocks: usize, dst_blocks: usize) -> Result<()> {
    for pair in pairs {
        for (block, num_blocks) in [(pair.src, src_blocks), (pair.dst, dst_blocks)] {
            if block as usize >= num_blocks {
                return Err(Error::BlockOutOfRange { what, block: block.into(), num_blocks });
            }
        }
    }
    let mut written: Vec<u32> = pairs.iter().map(|pair| pair.dst).collect();
    written.sort_unstable();
    match written.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(Error::OverlappingPairs { what, block: two[0], conflict: "written twice" }),
        None => Ok(()),
    }
}
