//! Which block belongs to whom: pure host bookkeeping, no backend, no bytes.
//!
//! ```text
//! BlockTable ── a sequence: its blocks in order, its length ── append, fork, swap_out ──┐
//!     │ retain, release                                                                 │
//! BlockPool ─┬─ BlockAllocator   a reference count a block, a free list                 │
//!            └─ PrefixCache      full blocks by content, idle ones evicted LRU          │
//!                                                          slots and BlockPairs to run ─┘
//! ```
//!
//! Every method that decides something returns what has to happen in the cache as data: slots for
//! `cache_write`, [`crate::args::BlockPair`]s for `copy_blocks`, `swap_out` and `swap_in`. One step of an engine
//! is
//!
//! 1. [`BlockTable::append`] for each sequence into one [`WritePlan`],
//! 2. `copy_blocks(plan.copies)`,
//! 3. the forward pass: `cache_write` to `plan.slots`, then attention, layer by layer,
//! 4. [`BlockTable::publish`] for each sequence: its full blocks may now be shared.
//!
//! Reference counts are sums: a block counts one for each table it stands in, and one more if the
//! prefix cache holds it.
//!
//! ```
//! use quantkv::blocks::{BlockPool, BlockTable, WritePlan};
//!
//! let mut pool = BlockPool::with_prefix_cache(8, 4)?; // 8 blocks of 4 tokens
//! let mut plan = WritePlan::default();
//! let mut first = BlockTable::with_prefix_of(&mut pool, 0, &[1, 2, 3, 4, 5, 6])?;
//! first.append(&mut pool, &[1, 2, 3, 4, 5, 6], &mut plan)?;
//! assert_eq!(plan.slots, [0, 1, 2, 3, 4, 5]);
//! first.publish(&mut pool)?; // once written
//!
//! // A second sequence that begins alike shares the full block.
//! let second = BlockTable::with_prefix_of(&mut pool, 0, &[1, 2, 3, 4, 9])?;
//! assert_eq!((second.len(), second.blocks()), (4, &first.blocks()[..1]));
//!
//! // A parallel sample shares all; the first to go on copies the partly filled block.
//! let sample = first.fork(&mut pool)?;
//! plan.clear();
//! first.append(&mut pool, &[7], &mut plan)?;
//! assert_eq!((plan.copies[0].src, plan.copies[0].dst), (1, 2));
//! assert_eq!(plan.slots, [2 * 4 + 2]);
//!
//! for table in [first, second, sample] {
//!     table.release(&mut pool)?;
//! }
//! assert_eq!(pool.num_available(), 8);
//! # Ok::<(), quantkv::Error>(())
//! ```

mod allocator;
mod pool;
mod prefix;
mod table;

pub use allocator::BlockAllocator;
pub use pool::BlockPool;
pub use prefix::{Inserted, PrefixCache, PrefixId, PrefixMatch, PrefixStats};
pub use table::{BlockTable, SwappedTable, WritePlan};
