//! [`BlockAllocator`]: a reference count for each block, and a stack of those given back.
//!
//! The stack is last-in first-out, so a block freed a moment ago, whose bytes may still be in a
//! CPU's cache, is the next one used. While it is empty blocks are handed out from 0 upwards; what
//! was never used costs nothing, however many blocks a pool is said to have.

use crate::error::{Error, Result};

/// Reference-counted blocks `0..num_blocks`.
#[derive(Clone, Debug)]
pub struct BlockAllocator {
    num_blocks: usize,
    /// References to each block used so far; zero means free.
    counts: Vec<u32>,
    /// The blocks given back, next one last.
    free: Vec<u32>,
    peak: usize,
}

impl BlockAllocator {
    /// All of `num_blocks` blocks free. None at all is allowed: a host pool may be absent.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more blocks than an `i32` block table can name.
    pub fn new(num_blocks: usize) -> Result<Self> {
        match i32::try_from(num_blocks) {
            Ok(_) => Ok(BlockAllocator { num_blocks, counts: Vec::new(), free: Vec::new(), peak: 0 }),
            Err(_) => Err(Error::Unsupported {
                what: "the number of blocks",
                value: num_blocks,
                supported: "at most 2147483647, what an i32 block table can name",
            }),
        }
    }

    /// Blocks, free or not.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Blocks nobody refers to.
    pub fn num_free(&self) -> usize {
        self.num_blocks - self.num_allocated()
    }

    /// Blocks somebody refers to.
    pub fn num_allocated(&self) -> usize {
        self.counts.len() - self.free.len()
    }

    /// The blocks somebody refers to, in order.
    pub fn allocated(&self) -> impl Iterator<Item = u32> + '_ {
        self.counts.iter().zip(0u32..).filter_map(|(count, block)| (*count > 0).then_some(block))
    }

    /// The most blocks ever allocated at once.
    pub fn peak_allocated(&self) -> usize {
        self.peak
    }

    /// References to `block`; zero if it is free or does not exist.
    pub fn ref_count(&self, block: u32) -> u32 {
        self.counts.get(block as usize).copied().unwrap_or(0)
    }

    /// A free block, with one reference.
    ///
    /// # Errors
    /// [`Error::NoFreeBlocks`].
    pub fn alloc(&mut self) -> Result<u32> {
        let block = match self.free.pop() {
            Some(block) => {
                self.counts[block as usize] = 1;
                block
            }
            None if self.counts.len() < self.num_blocks => {
                self.counts.push(1);
                // `new` has checked that ids fit.
                (self.counts.len() - 1) as u32
            }
            None => return Err(Error::NoFreeBlocks { requested: 1, free: 0 }),
        };
        self.peak = self.peak.max(self.num_allocated());
        Ok(block)
    }

    /// One more reference to an allocated block.
    ///
    /// # Errors
    /// [`Error::NotAllocated`]; [`Error::Overflow`] at 2³² references.
    pub fn retain(&mut self, block: u32) -> Result<()> {
        let count = self.count_mut(block)?;
        *count = count.checked_add(1).ok_or(Error::Overflow { what: "the reference count of a block" })?;
        Ok(())
    }

    /// One reference less; at zero the block is free. Returns the references left.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] if the block is free already (a double free), or does not exist.
    pub fn release(&mut self, block: u32) -> Result<u32> {
        let count = self.count_mut(block)?;
        *count -= 1;
        let left = *count;
        if left == 0 {
            self.free.push(block);
        }
        Ok(left)
    }

    /// The count of an allocated block.
    fn count_mut(&mut self, block: u32) -> Result<&mut u32> {
        self.counts.get_mut(block as usize).filter(|count| **count > 0).ok_or(Error::NotAllocated { block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_references_and_refuses_a_double_free() {
        let mut blocks = BlockAllocator::new(2).unwrap();
        assert_eq!((blocks.alloc().unwrap(), blocks.alloc().unwrap()), (0, 1));
        assert!(matches!(blocks.alloc(), Err(Error::NoFreeBlocks { requested: 1, free: 0 })));
        blocks.retain(1).unwrap();
        assert_eq!(blocks.release(1).unwrap(), 1);
        assert_eq!((blocks.num_free(), blocks.ref_count(1)), (0, 1));
        assert!(blocks.allocated().eq([0, 1]));
        assert_eq!(blocks.release(1).unwrap(), 0);
        assert_eq!((blocks.num_free(), blocks.num_allocated(), blocks.peak_allocated()), (1, 1, 2));
        assert!(blocks.allocated().eq([0]));
        assert!(matches!(blocks.release(1), Err(Error::NotAllocated { block: 1 })));
        assert!(matches!(blocks.retain(1), Err(Error::NotAllocated { block: 1 })));
        assert!(matches!(blocks.release(2), Err(Error::NotAllocated { block: 2 })));
        assert_eq!(blocks.num_free(), 1, "a refused release frees nothing");
    }

    #[test]
    fn refuses_more_blocks_than_a_table_can_name() {
        let too_many = i32::MAX as usize + 1;
        assert!(matches!(BlockAllocator::new(too_many), Err(Error::Unsupported { value, .. }) if value == too_many));
        assert!(matches!(BlockAllocator::new(0).unwrap().alloc(), Err(Error::NoFreeBlocks { .. })));
    }
}
