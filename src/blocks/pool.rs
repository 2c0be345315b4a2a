//! [`BlockPool`]: an allocator and, if wanted, a prefix cache that keeps freed blocks findable
//! until their memory is needed.
//!
//! The prefix cache holds one reference to each block it knows. So a block is free at count zero,
//! *idle* at count one if that one is the cache's, and in use otherwise. `alloc` takes a free
//! block, or else the block that has been idle longest.

use super::{BlockAllocator, Inserted, PrefixCache, PrefixId, PrefixMatch, PrefixStats};
use crate::error::{Error, Result};

/// The blocks of one cache, shared by all sequences.
#[derive(Debug)]
pub struct BlockPool {
    allocator: BlockAllocator,
    prefix: Option<PrefixCache>,
    block_size: usize,
    peak: usize,
}

impl BlockPool {
    /// All of `num_blocks` blocks of `block_size` tokens free, without prefix sharing.
    ///
    /// # Errors
    /// [`Error::Zero`] for a block size of zero; [`Error::Unsupported`] for too many blocks.
    pub fn new(num_blocks: usize, block_size: usize) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::Zero { what: "the block size" });
        }
        Ok(BlockPool { allocator: BlockAllocator::new(num_blocks)?, prefix: None, block_size, peak: 0 })
    }

    /// The same with prefix sharing.
    ///
    /// # Errors
    /// As [`BlockPool::new`].
    pub fn with_prefix_cache(num_blocks: usize, block_size: usize) -> Result<Self> {
        let pool = BlockPool::new(num_blocks, block_size)?;
        Ok(BlockPool { prefix: Some(PrefixCache::new(num_blocks, block_size)?), ..pool })
    }

    /// Token slots in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks, free or not.
    pub fn num_blocks(&self) -> usize {
        self.allocator.num_blocks()
    }

    /// Blocks [`BlockPool::alloc`] can give: free and idle ones. An engine admits a sequence if
    /// it leaves some for those that run.
    pub fn num_available(&self) -> usize {
        self.allocator.num_free() + self.num_idle()
    }

    /// Blocks that sequences use.
    pub fn num_in_use(&self) -> usize {
        self.num_blocks() - self.num_available()
    }

    /// The most blocks ever in use at once.
    pub fn peak_in_use(&self) -> usize {
        self.peak
    }

    /// Every block that holds something, in order: those in use and those that the prefix cache keeps.
    pub fn occupied(&self) -> impl Iterator<Item = u32> + '_ {
        self.allocator.allocated()
    }

    /// References to `block`, the prefix cache's included.
    pub fn ref_count(&self, block: u32) -> u32 {
        self.allocator.ref_count(block)
    }

    /// Whether the prefix cache holds `block`.
    pub fn is_cached(&self, block: u32) -> bool {
        self.prefix.as_ref().is_some_and(|prefix| prefix.contains(block))
    }

    /// The prefix cache's counters; zeros without one.
    pub fn prefix_stats(&self) -> PrefixStats {
        self.prefix.as_ref().map(PrefixCache::stats).unwrap_or_default()
    }

    /// A block of undefined content, with one reference.
    ///
    /// # Errors
    /// [`Error::NoFreeBlocks`].
    pub fn alloc(&mut self) -> Result<u32> {
        if self.allocator.num_free() == 0
            && let Some(block) = self.prefix.as_mut().and_then(PrefixCache::evict)
        {
            self.allocator.release(block)?;
        }
        let block = self.allocator.alloc()?;
        self.peak = self.peak.max(self.num_in_use());
        Ok(block)
    }

    /// One more reference to a block that is not free.
    ///
    /// # Errors
    /// [`Error::NotAllocated`].
    pub fn retain(&mut self, block: u32) -> Result<()> {
        self.allocator.retain(block)?;
        if let Some(prefix) = &mut self.prefix {
            prefix.mark_used(block);
        }
        self.peak = self.peak.max(self.num_in_use());
        Ok(())
    }

    /// One reference less. A block that nobody uses is free, or idle if the prefix cache knows it.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] if nobody uses the block: it was freed twice.
    pub fn release(&mut self, block: u32) -> Result<()> {
        let Some(prefix) = self.prefix.as_mut().filter(|prefix| prefix.contains(block)) else {
            return self.allocator.release(block).map(|_| ());
        };
        match self.allocator.ref_count(block) {
            // The last reference is the cache's, which is not the caller's to give back.
            0 | 1 => Err(Error::NotAllocated { block }),
            _ => {
                if self.allocator.release(block)? == 1 {
                    prefix.mark_idle(block);
                }
                Ok(())
            }
        }
    }

    /// The empty prefix under `extra` (see [`PrefixCache::root`]); `None` without prefix sharing.
    pub fn root(&self, extra: u64) -> Option<PrefixId> {
        self.prefix.as_ref().map(|prefix| prefix.root(extra))
    }

    /// Finds the longest cached prefix of `tokens` and retains its blocks; `None` without prefix
    /// sharing.
    ///
    /// # Errors
    /// [`Error::Overflow`] at 2³² references to one block.
    pub fn share(&mut self, extra: u64, tokens: &[u32]) -> Result<Option<PrefixMatch>> {
        let Some(prefix) = &mut self.prefix else { return Ok(None) };
        let found = prefix.lookup(extra, tokens);
        for (done, &block) in found.blocks.iter().enumerate() {
            if let Err(error) = self.retain(block) {
                found.blocks[..done].iter().try_for_each(|&block| self.release(block))?;
                return Err(error);
            }
        }
        Ok(Some(found))
    }

    /// Makes a full block, which the caller uses and will not write again, findable: `tokens`
    /// after the prefix `before`. Returns the prefix that ends with it, or `None` if `before` is
    /// no longer findable (or nothing is, without prefix sharing).
    ///
    /// # Errors
    /// [`Error::NotAllocated`]; [`Error::LengthMismatch`] unless `tokens` fill a block.
    pub fn publish(&mut self, before: PrefixId, tokens: &[u32], block: u32) -> Result<Option<PrefixId>> {
        let Some(prefix) = &mut self.prefix else { return Ok(None) };
        self.allocator.retain(block)?;
        let inserted = prefix.insert(before, tokens, block);
        if let Ok(Inserted::New(id)) = inserted {
            return Ok(Some(id));
        }
        self.allocator.release(block)?;
        inserted.map(|inserted| match inserted {
            Inserted::New(id) | Inserted::Known(id) => Some(id),
            Inserted::Refused => None,
        })
    }

    /// Forgets all cached prefixes: for new scales or weights. Blocks in use stay with their
    /// sequences; what those write from now on is not shared either. Returns the entries dropped.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn flush_prefixes(&mut self) -> Result<usize> {
        let blocks = self.prefix.as_mut().map(PrefixCache::flush).unwrap_or_default();
        blocks.iter().try_for_each(|&block| self.allocator.release(block).map(|_| ()))?;
        Ok(blocks.len())
    }

    fn num_idle(&self) -> usize {
        self.prefix.as_ref().map_or(0, PrefixCache::num_idle)
    }
}
