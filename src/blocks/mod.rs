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

mod allocator;
mod pool;
mod prefix;
mod table;

pub use allocator::BlockAllocator;
pub use pool::BlockPool;
pub use prefix::{Inserted, PrefixCache, PrefixId, PrefixMatch, PrefixStats};
pub use table::{BlockTable, SwappedTable, WritePlan};
