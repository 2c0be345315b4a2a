//! [`BlockTable`]: one sequence's blocks in order.
//!
//! ```text
//! tokens    t0 t1 t2 t3 | t4 t5 t6 t7 | t8 t9           block size 4, length 10
//! blocks         7      |      2      |    5            slot of t9 = 5 * 4 + 1
//!           ── published ─────────────  pending
//! ```
//! A block may stand in several tables: after [`BlockTable::fork`], or found by prefix. All but the
//! last block of a table are full and never written again. So sharing ends only where a sequence
//! appends to a shared, partly filled last block: it gets a block of its own first, and the
//! [`WritePlan`] says what to copy (copy-on-write).

use super::{BlockAllocator, BlockPool, PrefixId, PrefixMatch};
use crate::args::BlockPair;
use crate::error::{Error, Result};

/// What one step must do to the cache, gathered over its sequences.
///
/// Run `copies` first, all in one call, then write the tokens. Run them before any table is
/// released or forked: a block freed and handed out again could be source and destination at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WritePlan {
    /// The slot of each token appended, in order: the slot mapping of `cache_write`.
    pub slots: Vec<i64>,
    /// Blocks to copy before anything is written.
    pub copies: Vec<BlockPair>,
}

impl WritePlan {
    /// Forgets both lists, keeping their memory.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.copies.clear();
    }
}

/// The blocks of one sequence.
///
/// It holds references in a [`BlockPool`]; give them back with [`BlockTable::release`] to the pool
/// they came from. Dropping a table leaks them.
#[derive(Debug)]
#[must_use = "a table dropped without `release` leaks its blocks"]
pub struct BlockTable {
    blocks: Vec<u32>,
    len: usize,
    sharing: Sharing,
}

/// How far a sequence has been made findable.
#[derive(Clone, Debug)]
struct Sharing {
    /// The prefix of the blocks published; `None` once no further block can be.
    prefix: Option<PrefixId>,
    published_blocks: usize,
    /// The tokens after them; empty if `prefix` is `None`.
    pending: Vec<u32>,
}

impl BlockTable {
    /// An empty sequence. `extra`: see [`super::PrefixCache::root`].
    pub fn new(pool: &BlockPool, extra: u64) -> Self {
        let sharing = Sharing { prefix: pool.root(extra), published_blocks: 0, pending: Vec::new() };
        BlockTable { blocks: Vec::new(), len: 0, sharing }
    }

    /// A sequence about to get `tokens`, that shares the blocks of their longest cached prefix;
    /// [`BlockTable::len`] says how many tokens those hold. The rest is to be appended. At least
    /// the last token is, so that there is a query to compute logits from.
    ///
    /// # Errors
    /// Those of [`BlockPool::share`].
    pub fn with_prefix_of(pool: &mut BlockPool, extra: u64, tokens: &[u32]) -> Result<Self> {
        let all_but_last = &tokens[..tokens.len().saturating_sub(1)];
        match pool.share(extra, all_but_last)? {
            None => Ok(BlockTable::new(pool, extra)),
            Some(PrefixMatch { blocks, id }) => Ok(BlockTable {
                len: blocks.len() * pool.block_size(),
                sharing: Sharing { prefix: Some(id), published_blocks: blocks.len(), pending: Vec::new() },
                blocks,
            }),
        }
    }

    /// Tokens with a slot.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Writes the blocks to this sequence's row of a block table, and -1 after them.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`].
    pub fn write_row(&self, row: &mut [i32]) -> Result<()> {
        if row.len() < self.blocks.len() {
            return Err(Error::BufferTooSmall {
                what: "a row of block_tables",
                needed: self.blocks.len(),
                got: row.len(),
            });
        }
        row.fill(-1);
        // The allocator has no blocks past i32::MAX.
        row.iter_mut().zip(&self.blocks).for_each(|(entry, &block)| *entry = block as i32);
        Ok(())
    }

    /// Blocks that appending `num_tokens` tokens takes from the pool, the copy of a shared last
    /// block included.
    pub fn blocks_needed(&self, pool: &BlockPool, num_tokens: usize) -> usize {
        let total = self.len.saturating_add(num_tokens).div_ceil(pool.block_size());
        let copied = num_tokens > 0 && self.shared_partial_block(pool).is_some();
        total - self.blocks.len() + usize::from(copied)
    }

    /// Gives each of `tokens` a slot, and adds to `plan` what has to be done in the cache.
    ///
    /// # Errors
    /// [`Error::NoFreeBlocks`], and then nothing has changed.
    pub fn append(&mut self, pool: &mut BlockPool, tokens: &[u32], plan: &mut WritePlan) -> Result<()> {
        let (requested, free) = (self.blocks_needed(pool, tokens.len()), pool.num_available());
        if requested > free {
            return Err(Error::NoFreeBlocks { requested, free });
        }
        if tokens.is_empty() {
            return Ok(());
        }
        if let Some(shared) = self.shared_partial_block(pool) {
            let own = pool.alloc()?;
            pool.release(shared)?;
            plan.copies.push(BlockPair::new(shared, own));
            self.blocks.pop();
            self.blocks.push(own);
        }
        let block_size = pool.block_size();
        plan.slots.reserve(tokens.len());
        for position in self.len..self.len + tokens.len() {
            if position / block_size == self.blocks.len() {
                self.blocks.push(pool.alloc()?);
            }
            let block = self.blocks[position / block_size] as usize;
            plan.slots.push((block * block_size + position % block_size) as i64);
        }
        self.len += tokens.len();
        if self.sharing.prefix.is_some() {
            self.sharing.pending.extend_from_slice(tokens);
        }
        Ok(())
    }

    /// Makes the full blocks findable for other sequences. Does nothing without prefix sharing.
    ///
    /// Call it once the tokens appended are written in every layer. Before, in the same step, only
    /// if a layer writes the tokens of all sequences before any of them attends there, and if the
    /// pool's prefixes are flushed should the step fail.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] for a pool that is not this table's.
    pub fn publish(&mut self, pool: &mut BlockPool) -> Result<()> {
        let Sharing { prefix, published_blocks, pending } = &mut self.sharing;
        let mut done = 0;
        for tokens in pending.chunks_exact(pool.block_size()) {
            let Some(before) = *prefix else { break };
            *prefix = pool.publish(before, tokens, self.blocks[*published_blocks])?;
            *published_blocks += 1;
            done += tokens.len();
        }
        match prefix {
            Some(_) => drop(pending.drain(..done)),
            None => *pending = Vec::new(),
        }
        Ok(())
    }

    /// Another sequence with the same tokens in the same blocks.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] for a pool that is not this table's.
    pub fn fork(&self, pool: &mut BlockPool) -> Result<Self> {
        for (done, &block) in self.blocks.iter().enumerate() {
            if let Err(error) = pool.retain(block) {
                self.blocks[..done].iter().try_for_each(|&block| pool.release(block))?;
                return Err(error);
            }
        }
        Ok(BlockTable { blocks: self.blocks.clone(), len: self.len, sharing: self.sharing.clone() })
    }

    /// Gives all blocks back, the last one first: of an idle prefix the end is evicted first.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] for a pool that is not this table's.
    pub fn release(mut self, pool: &mut BlockPool) -> Result<()> {
        self.release_blocks(pool)
    }

    /// Preempts the sequence: its content moves to blocks of `host`, its own blocks go back to the
    /// pool. Run `pairs` (pushed here: `src` in the cache, `dst` in the host pool) through
    /// `swap_out` before anything is written to the cache.
    ///
    /// The table is empty afterwards and needs no release.
    ///
    /// # Errors
    /// [`Error::NoFreeBlocks`] of `host`, and then nothing has changed.
    pub fn swap_out(
        &mut self,
        pool: &mut BlockPool,
        host: &mut BlockAllocator,
        pairs: &mut Vec<BlockPair>,
    ) -> Result<SwappedTable> {
        let (requested, free) = (self.blocks.len(), host.num_free());
        if requested > free {
            return Err(Error::NoFreeBlocks { requested, free });
        }
        let host_blocks = self.blocks.iter().map(|_| host.alloc()).collect::<Result<Vec<_>>>()?;
        pairs.extend(self.blocks.iter().zip(&host_blocks).map(|(&src, &dst)| BlockPair::new(src, dst)));
        self.release_blocks(pool)?;
        let sharing = self.sharing.clone();
        Ok(SwappedTable { host_blocks, len: std::mem::take(&mut self.len), sharing })
    }

    fn release_blocks(&mut self, pool: &mut BlockPool) -> Result<()> {
        while let Some(block) = self.blocks.pop() {
            pool.release(block)?;
        }
        Ok(())
    }

    /// The last block, if the next token goes into it and other tables have it too.
    fn shared_partial_block(&self, pool: &BlockPool) -> Option<u32> {
        let partial = !self.len.is_multiple_of(pool.block_size());
        self.blocks.last().copied().filter(|&block| partial && pool.ref_count(block) > 1)
    }
}

/// A preempted sequence: its blocks are in host memory.
#[derive(Debug)]
#[must_use = "a table dropped without `swap_in` or `release` leaks its host blocks"]
pub struct SwappedTable {
    host_blocks: Vec<u32>,
    len: usize,
    sharing: Sharing,
}

impl SwappedTable {
    /// Tokens it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Blocks it needs to come back.
    pub fn num_blocks(&self) -> usize {
        self.host_blocks.len()
    }

    /// Brings the sequence back to blocks of its own. Run `pairs` (pushed here: `src` in the host
    /// pool, `dst` in the cache) through `swap_in` before the cache is read or anything else is
    /// swapped out. The table is empty afterwards and needs no release.
    ///
    /// # Errors
    /// [`Error::NoFreeBlocks`] of `pool`, and then nothing has changed.
    pub fn swap_in(
        &mut self,
        pool: &mut BlockPool,
        host: &mut BlockAllocator,
        pairs: &mut Vec<BlockPair>,
    ) -> Result<BlockTable> {
        let (requested, free) = (self.host_blocks.len(), pool.num_available());
        if requested > free {
            return Err(Error::NoFreeBlocks { requested, free });
        }
        let blocks = self.host_blocks.iter().map(|_| pool.alloc()).collect::<Result<Vec<_>>>()?;
        pairs.extend(self.host_blocks.iter().zip(&blocks).map(|(&src, &dst)| BlockPair::new(src, dst)));
        self.release_blocks(host)?;
        let sharing = self.sharing.clone();
        Ok(BlockTable { blocks, len: std::mem::take(&mut self.len), sharing })
    }

    /// Gives the host blocks back without bringing the sequence back.
    ///
    /// # Errors
    /// [`Error::NotAllocated`] for an allocator that is not this table's.
    pub fn release(mut self, host: &mut BlockAllocator) -> Result<()> {
        self.release_blocks(host)
    }

    fn release_blocks(&mut self, host: &mut BlockAllocator) -> Result<()> {
        while let Some(block) = self.host_blocks.pop() {
            host.release(block)?;
        }
        Ok(())
    }
}
