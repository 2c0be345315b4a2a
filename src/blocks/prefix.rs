//! [`PrefixCache`]: which full block holds which tokens after which others, so that sequences that
//! begin alike share blocks.
//!
//! A cached value depends on every token before it, so a block stands for the whole prefix that
//! ends with it. An entry's key is *(the prefix before it, its own tokens)*:
//!
//! ```text
//! root(extra) ──[5 9 2 7]──> block 3, generation 11 ──[1 1 4 0]──> block 8, generation 12
//!                                                   └─[6 2 2 3]──> block 5, generation 15
//! ```
//! The prefix before a block is named by [`PrefixId`]: the block that ends it and the generation
//! in which that block got its content (never used twice). Keys are compared whole, tokens
//! included, after the hash has found them, so a hash collision costs time and never shares a wrong
//! block: by induction equal keys are equal prefixes.
//!
//! Only full blocks are entered: a shared block is never written again.
//!
//! An entry nobody uses is *idle*. Idle entries are evicted least recently used first, and
//! sequences give their blocks back last block first, so a prefix outlives what continues it.
//! (Two sequences that computed the same block side by side share its entry but not the block. If
//! the entry goes first, what the other entered after it is not found again and goes in its turn.)

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::error::{Error, Result};

/// Names a prefix of whole blocks, from the first token on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefixId(Node);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Node {
    /// No tokens yet. `epoch` is the generation of the last flush.
    Root { extra: u64, epoch: u64 },
    /// The prefix that ends with what `block` has held since `generation`.
    Block { block: u32, generation: u64 },
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    before: PrefixId,
    tokens: Vec<u32>,
}

#[derive(Debug)]
struct Entry {
    key: Arc<Key>,
    generation: u64,
    /// The key in `idle`, if nobody uses the block.
    idle_since: Option<u64>,
}

/// The longest cached prefix of some tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixMatch {
    /// Its blocks, in order.
    pub blocks: Vec<u32>,
    /// Its name, under which the next block is inserted.
    pub id: PrefixId,
}

/// What [`PrefixCache::insert`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The block is in the cache now; the caller must keep it from being reused.
    New(PrefixId),
    /// The cache has that prefix already, in this block or another; nothing changed.
    Known(PrefixId),
    /// The prefix before it was evicted or flushed, or the block stands for something else, so
    /// nobody could find it; nothing changed.
    Refused,
}

/// Counters since the cache was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PrefixStats {
    /// Tokens looked up.
    pub tokens_looked_up: u64,
    /// Tokens of those found.
    pub tokens_found: u64,
    /// Blocks inserted.
    pub blocks_inserted: u64,
    /// Blocks evicted to make room.
    pub blocks_evicted: u64,
}

/// Full blocks by content.
#[derive(Debug)]
pub struct PrefixCache {
    num_blocks: usize,
    block_size: usize,
    /// The entry of each block that has one, up to the last block ever entered.
    entries: Vec<Option<Entry>>,
    /// The block of each key.
    index: HashMap<Arc<Key>, u32>,
    /// Idle blocks by the moment they became idle.
    idle: BTreeMap<u64, u32>,
    /// Generations and idle moments so far; only grows.
    clock: u64,
    epoch: u64,
    stats: PrefixStats,
}

impl PrefixCache {
    /// An empty cache over `num_blocks` blocks of `block_size` tokens.
    ///
    /// # Errors
    /// [`Error::Zero`] if blocks hold no token.
    pub fn new(num_blocks: usize, block_size: usize) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::Zero { what: "the block size" });
        }
        Ok(PrefixCache {
            num_blocks,
            block_size,
            entries: Vec::new(),
            index: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            epoch: 0,
            stats: PrefixStats::default(),
        })
    }

    /// The empty prefix. Sequences share blocks only under equal `extra`: give different numbers
    /// to whatever else the cached values depend on (adapter, image inputs, tenant).
    pub fn root(&self, extra: u64) -> PrefixId {
        PrefixId(Node::Root { extra, epoch: self.epoch })
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Entries nobody uses: what [`PrefixCache::evict`] can give.
    pub fn num_idle(&self) -> usize {
        self.idle.len()
    }

    /// Whether `block` is in the cache.
    pub fn contains(&self, block: u32) -> bool {
        self.entry(block).is_some()
    }

    /// The counters.
    pub fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// The longest cached prefix of `tokens` in whole blocks. The caller retains the blocks and
    /// calls [`PrefixCache::mark_used`].
    ///
    /// To have a token left whose logits to compute, look up all but the last.
    pub fn lookup(&mut self, extra: u64, tokens: &[u32]) -> PrefixMatch {
        let mut key = Key { before: self.root(extra), tokens: Vec::with_capacity(self.block_size) };
        let mut blocks = Vec::new();
        for chunk in tokens.chunks_exact(self.block_size) {
            key.tokens.clear();
            key.tokens.extend_from_slice(chunk);
            let Some((&block, entry)) = self.index.get(&key).and_then(|block| Some((block, self.entry(*block)?)))
            else {
                break;
            };
            key.before = PrefixId(Node::Block { block, generation: entry.generation });
            blocks.push(block);
        }
        self.stats.tokens_looked_up += tokens.len() as u64;
        self.stats.tokens_found += (blocks.len() * self.block_size) as u64;
        PrefixMatch { blocks, id: key.before }
    }

    /// Enters `block`, which holds `tokens` after the prefix `before`. It counts as used until
    /// [`PrefixCache::mark_idle`].
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] unless `tokens` fill a block; [`Error::BlockOutOfRange`].
    pub fn insert(&mut self, before: PrefixId, tokens: &[u32], block: u32) -> Result<Inserted> {
        if tokens.len() != self.block_size {
            return Err(Error::LengthMismatch {
                what: "the tokens of a shared block",
                expected: self.block_size,
                got: tokens.len(),
            });
        }
        let index = block as usize;
        if index >= self.num_blocks {
            let num_blocks = self.num_blocks;
            return Err(Error::BlockOutOfRange { what: "prefix cache", block: block.into(), num_blocks });
        }
        if !self.is_current(before) {
            return Ok(Inserted::Refused);
        }
        let key = Key { before, tokens: tokens.to_vec() };
        if let Some((&block, entry)) = self.index.get(&key).and_then(|block| Some((block, self.entry(*block)?))) {
            return Ok(Inserted::Known(PrefixId(Node::Block { block, generation: entry.generation })));
        }
        if self.contains(block) {
            return Ok(Inserted::Refused);
        }
        let generation = self.tick();
        let key = Arc::new(key);
        self.index.insert(Arc::clone(&key), block);
        if index >= self.entries.len() {
            self.entries.resize_with(index + 1, || None);
        }
        self.entries[index] = Some(Entry { key, generation, idle_since: None });
        self.stats.blocks_inserted += 1;
        Ok(Inserted::New(PrefixId(Node::Block { block, generation })))
    }

    /// Says that nobody uses `block` any more: it may be evicted, the longest idle first.
    pub fn mark_idle(&mut self, block: u32) {
        self.mark_used(block);
        let now = self.tick();
        if let Some(entry) = self.entry_mut(block) {
            entry.idle_since = Some(now);
            self.idle.insert(now, block);
        }
    }

    /// Says that somebody uses `block` again.
    pub fn mark_used(&mut self, block: u32) {
        if let Some(since) = self.entry_mut(block).and_then(|entry| entry.idle_since.take()) {
            self.idle.remove(&since);
        }
    }

    /// Forgets the block that has been idle longest, and returns it for reuse.
    pub fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        let entry = self.entries[block as usize].take()?;
        self.index.remove(&entry.key);
        self.stats.blocks_evicted += 1;
        Some(block)
    }

    /// Forgets everything, and returns the blocks that were in the cache, idle or not. Sequences
    /// that began before the flush enter nothing afterwards.
    ///
    /// For when cached bytes change their meaning: new static scales, new weights.
    pub fn flush(&mut self) -> Vec<u32> {
        self.epoch = self.tick();
        self.index.clear();
        self.idle.clear();
        let entries = self.entries.iter_mut().zip(0u32..);
        entries.filter_map(|(entry, block)| entry.take().map(|_| block)).collect()
    }

    /// Whether a block can still be found after `id`.
    fn is_current(&self, id: PrefixId) -> bool {
        match id.0 {
            Node::Root { epoch, .. } => epoch == self.epoch,
            Node::Block { block, generation } => self.entry(block).is_some_and(|entry| entry.generation == generation),
        }
    }

    fn entry(&self, block: u32) -> Option<&Entry> {
        self.entries.get(block as usize)?.as_ref()
    }

    fn entry_mut(&mut self, block: u32) -> Option<&mut Entry> {
        self.entries.get_mut(block as usize)?.as_mut()
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(cache: &mut PrefixCache, before: PrefixId, tokens: &[u32], block: u32) -> PrefixId {
        match cache.insert(before, tokens, block).unwrap() {
            Inserted::New(id) => id,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn finds_the_longest_prefix_in_whole_blocks() {
        let mut cache = PrefixCache::new(8, 2).unwrap();
        let root = cache.root(0);
        let a = insert(&mut cache, root, &[1, 2], 3);
        insert(&mut cache, a, &[3, 4], 5);
        assert_eq!(cache.lookup(0, &[1, 2, 3, 4, 5, 6]).blocks, [3, 5]);
        assert_eq!(cache.lookup(0, &[1, 2, 3]).blocks, [3], "no partial block");
        assert_eq!(cache.lookup(0, &[3, 4]).blocks, [0u32; 0], "the same tokens after another prefix are not the same");
        assert_eq!(cache.lookup(1, &[1, 2]).blocks, [0u32; 0], "another extra key");
        let PrefixStats { tokens_looked_up, tokens_found, blocks_inserted, blocks_evicted } = cache.stats();
        assert_eq!((tokens_looked_up, tokens_found, blocks_inserted, blocks_evicted), (13, 6, 2, 0));
    }

    #[test]
    fn the_first_block_of_a_prefix_stays() {
        let mut cache = PrefixCache::new(8, 2).unwrap();
        let root = cache.root(0);
        let a = insert(&mut cache, root, &[1, 2], 3);
        assert_eq!(cache.insert(root, &[1, 2], 4).unwrap(), Inserted::Known(a));
        assert_eq!(cache.insert(root, &[7, 7], 3).unwrap(), Inserted::Refused, "block 3 stands for [1, 2]");
        assert!(matches!(cache.insert(root, &[1], 4), Err(Error::LengthMismatch { expected: 2, got: 1, .. })));
        assert!(matches!(cache.insert(root, &[1, 2], 8), Err(Error::BlockOutOfRange { block: 8, .. })));
    }

    #[test]
    fn evicts_the_longest_idle_and_nothing_in_use() {
        let mut cache = PrefixCache::new(8, 1).unwrap();
        let root = cache.root(0);
        for block in 0..4 {
            insert(&mut cache, root, &[block], block);
        }
        assert_eq!(cache.evict(), None, "all in use");
        for block in [2, 0, 3] {
            cache.mark_idle(block);
        }
        cache.mark_used(0);
        cache.mark_idle(2);
        assert_eq!((cache.evict(), cache.evict(), cache.evict()), (Some(3), Some(2), None));
        assert!(cache.contains(0) && cache.contains(1) && !cache.contains(2));
        assert_eq!(cache.lookup(0, &[2]).blocks, [0u32; 0]);
    }

    #[test]
    fn what_was_evicted_or_flushed_takes_no_successors() {
        let mut cache = PrefixCache::new(8, 1).unwrap();
        let root = cache.root(0);
        let a = insert(&mut cache, root, &[1], 0);
        cache.mark_idle(0);
        assert_eq!(cache.evict(), Some(0));
        // The block comes back with other content: the old name must not mean it.
        insert(&mut cache, root, &[9], 0);
        assert_eq!(cache.insert(a, &[2], 1).unwrap(), Inserted::Refused);
        assert_eq!(cache.flush(), [0]);
        assert_eq!(cache.insert(root, &[1], 2).unwrap(), Inserted::Refused, "a root from before the flush");
        assert!(cache.is_empty() && cache.lookup(0, &[9]).blocks.is_empty());
    }
}
