//! Which work there is, and how it is handed to threads.
//!
//! A *group* is up to MAX_ROWS query rows of one sequence that attend together. Its keys are cut
//! into *chunks* of equal length, a multiple of the tile, chosen from the sequence's length and
//! the number of query rows in the batch: never from the number of threads or from other
//! sequences. A group, a chunk and a KV head are an *item*.
//!
//! The workspace holds a state for each (token, query head, chunk) where there is more than one
//! chunk. The more tokens a call has the fewer chunks a sequence gets: their product is bounded,
//! and with many tokens there are items enough without.

use super::kernels::{DIRECT_ROWS, TILE};
use super::tile::MAX_ROWS;
use crate::args::PagedAttention;
use crate::cpu::CpuBackend;
use crate::cpu::ragged::{sequence_len, sequence_rows};
use crate::faults::FaultWord;
use crate::format::Element;
use crate::layout::CacheShape;

/// Positions in a chunk at least: about 30 µs of work at FP8 and head dim 128, so that what starts
/// and ends an item is a few per cent.
const MIN_CHUNK: usize = 1024;
/// Chunks of a sequence at most.
const MAX_CHUNKS: usize = 64;
/// (token, chunk) pairs in the workspace at most, a head.
const MAX_TOKEN_CHUNKS: usize = 1024;

/// Floats of one state: values, maximum, sum.
pub(super) const fn partial_len(v_head_dim: usize) -> usize {
    v_head_dim.saturating_add(2)
}

/// Chunks a sequence may have in a call of `num_tokens`.
fn max_chunks(shape: &CacheShape, num_tokens: usize) -> usize {
    (MAX_TOKEN_CHUNKS / num_tokens.max(1)).clamp(1, MAX_CHUNKS).min(shape.num_slots().div_ceil(MIN_CHUNK))
}

/// Floats of workspace `paged_attention` needs for at most `num_tokens`. Fewer tokens get more
/// chunks each, so this bounds every smaller batch too.
pub(in crate::cpu) fn workspace_len(shape: &CacheShape, num_heads: usize, num_tokens: usize) -> usize {
    match max_chunks(shape, 1) {
        0 | 1 => 0,
        chunks => {
            let states = num_tokens.saturating_mul(chunks).min(MAX_TOKEN_CHUNKS);
            states.saturating_mul(num_heads).saturating_mul(partial_len(shape.spec.v_head_dim))
        }
    }
}

/// Query rows of one sequence that attend together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) seq: usize,
    /// Row of the first query in the batch.
    pub(super) first_token: usize,
    pub(super) num_queries: usize,
    /// Its position in the sequence.
    pub(super) first_position: i64,
    chunk_len: usize,
    seq_len: usize,
    /// Chunks some query sees a key of: `first_chunk..=last_chunk`.
    pub(super) first_chunk: usize,
    last_chunk: usize,
}

impl Group {
    pub(super) fn num_chunks(&self) -> usize {
        self.last_chunk - self.first_chunk + 1
    }

    /// Key positions of a chunk.
    pub(super) fn chunk(&self, chunk: usize) -> (usize, usize) {
        let start = (chunk * self.chunk_len).min(self.seq_len);
        (start, (start + self.chunk_len).min(self.seq_len))
    }
}

/// A group's work on one chunk and `num_heads` KV heads. Merges ignore the chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) group: usize,
    pub(super) chunk: usize,
    pub(super) kv_head: usize,
    pub(super) num_heads: usize,
}

/// The work of one call.
pub(super) struct Plan {
    pub(super) groups: Vec<Group>,
    pub(super) items: Vec<Item>,
    pub(super) merges: Vec<Item>,
    /// Query rows of the largest group.
    pub(super) max_rows: usize,
    /// Chunks the workspace has room for.
    pub(super) max_chunks: usize,
    /// KV heads of an item at most.
    pub(super) heads_at_once: usize,
    /// Whether other threads are worth waking.
    #[cfg_attr(not(feature = "parallel"), allow(dead_code))]
    parallel: bool,
}

impl Plan {
    /// Reads lengths and query starts; what is out of range is clamped or skipped and sets a fault.
    pub(super) fn new<T: Element>(op: &PagedAttention<'_, CpuBackend, T>, faults: &FaultWord) -> Plan {
        let spec = &op.shape.spec;
        let max_chunks = max_chunks(&op.shape, op.num_tokens);
        let queries_at_once = (MAX_ROWS / op.group_size()).max(1);
        let mut plan = Plan {
            groups: vec![],
            items: vec![],
            merges: vec![],
            max_rows: 0,
            max_chunks,
            heads_at_once: 1,
            parallel: false,
        };
        let capacity = op.block_table_stride.saturating_mul(spec.block_size);
        let mut positions: usize = 0;
        let starts = &op.query_starts[..op.num_seqs() + 1];
        for (seq, rows) in sequence_rows(starts, op.num_tokens, op.longest_query(), faults) {
            let (first, end) = (rows.start, rows.end);
            let seq_len = sequence_len(op.seq_lens[seq], capacity, faults);
            let chunk_len = seq_len.div_ceil(max_chunks).max(MIN_CHUNK).next_multiple_of(TILE);
            for first_token in (first..end).step_by(queries_at_once) {
                let num_queries = queries_at_once.min(end - first_token);
                let first_position = seq_len as i64 - (end - first_token) as i64;
                let mut group = Group {
                    seq,
                    first_token,
                    num_queries,
                    first_position,
                    chunk_len,
                    seq_len,
                    first_chunk: 0,
                    last_chunk: 0,
                };
                let last_key = (first_position + num_queries as i64 - 1).max(0) as usize;
                let first_key = match op.params.sliding_window {
                    Some(window) => (first_position.max(0) as usize + 1).saturating_sub(window),
                    None => 0,
                };
                (group.first_chunk, group.last_chunk) = (first_key / chunk_len, last_key / chunk_len);
                positions = positions.saturating_add(last_key + 1 - first_key.min(last_key));
                plan.max_rows = plan.max_rows.max(num_queries * op.group_size());
                plan.groups.push(group);
            }
        }
        plan.make_items(spec.num_kv_heads);
        let bytes = (spec.k_head_dim * spec.k_format.bytes() + spec.v_head_dim * spec.v_format.bytes())
            .saturating_mul(spec.num_kv_heads);
        plan.parallel = positions.saturating_mul(bytes) >= PARALLEL_BYTES;
        plan
    }

    /// Items of all groups. How many heads an item takes does not show in any result.
    fn make_items(&mut self, kv_heads: usize) {
        if self.max_rows <= DIRECT_ROWS {
            let chunks: usize = self.groups.iter().map(Group::num_chunks).sum();
            self.heads_at_once = (chunks * kv_heads / items_wanted()).clamp(1, kv_heads);
        }
        for (index, group) in self.groups.iter().enumerate() {
            let heads = (0..kv_heads).step_by(self.heads_at_once);
            let item = |chunk, kv_head| Item {
                group: index,
                chunk,
                kv_head,
                num_heads: self.heads_at_once.min(kv_heads - kv_head),
            };
            for chunk in group.first_chunk..=group.last_chunk {
                self.items.extend(heads.clone().map(|head| item(chunk, head)));
            }
            if group.num_chunks() > 1 {
                self.merges.extend(heads.clone().map(|head| item(0, head)));
            }
        }
    }

    /// Runs `work` on every item, each thread with buffers of its own. Items are independent.
    pub(super) fn for_each_item<B>(
        &self,
        items: &[Item],
        buffers: impl Fn() -> B + Send + Sync,
        work: impl Fn(&mut B, &Item) + Send + Sync,
    ) {
        #[cfg(feature = "parallel")]
        if self.parallel && items.len() > 1 && rayon::current_num_threads() > 1 {
            use rayon::prelude::*;
            return items.par_iter().for_each_init(buffers, work);
        }
        if !items.is_empty() {
            let mut buffers = buffers();
            items.iter().for_each(|item| work(&mut buffers, item));
        }
    }
}

/// Items to leave for sharing out, before an item takes several KV heads: two a thread, so that
/// one that starts late leaves something to take over, and what starts and ends an item is paid
/// rarely.
fn items_wanted() -> usize {
    #[cfg(feature = "parallel")]
    let threads = rayon::current_num_threads();
    #[cfg(not(feature = "parallel"))]
    let threads = 1;
    2 * threads
}

/// Below this many cached bytes waking other threads costs more than they save.
const PARALLEL_BYTES: usize = 1 << 18;
