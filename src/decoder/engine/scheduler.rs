//! Which tokens of which sequences the next step computes, and what must move in the cache first.
//! Bookkeeping only: no model, no bytes.
//!
//! ```text
//! waiting ──admit──> running ──finish──> (gone)
//!    ^                │   ^
//!    └── recompute ───┤   │ swap in
//!                swap out │
//!                     v   │
//!                    swapped
//! ```
//! A step goes through the running sequences in order and gives each its next tokens: one when
//! decoding, a chunk within the step's budget when prefilling. A sequence that finds no block
//! preempts the last of the running: its blocks move to host memory, or where that is full are
//! dropped, to be computed again. So the first of the running always goes on, and since every
//! sequence fits into an otherwise empty cache (checked when it is added) all of them end.
//! Only a step without preemption brings sequences back, and only when all are back it admits new
//! ones; both leave a block for each that runs.

use std::collections::VecDeque;

use super::sequence::Sequence;
use crate::args::BlockPair;
use crate::blocks::{BlockAllocator, BlockPool, BlockTable, SwappedTable, WritePlan};
use crate::error::{Error, Result};

/// Blocks to move before the step's forward pass, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// Inside the cache.
    Copy(Vec<BlockPair>),
    /// From the cache to host memory.
    SwapOut(Vec<BlockPair>),
    /// From host memory to the cache.
    SwapIn(Vec<BlockPair>),
}

/// Tokens `start..start + len` of the running sequence `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub index: usize,
    pub start: usize,
    pub len: usize,
    /// Whether these are the last of its tokens, so that the next one can be sampled.
    pub samples: bool,
    /// Prefill, of a prompt or of what was dropped; else decode.
    pub prefill: bool,
}

/// One step.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub moves: Vec<Move>,
    pub rows: Vec<Row>,
    pub shared_tokens: usize,
    pub recomputed: usize,
}

/// A sequence with blocks in the cache.
#[derive(Debug)]
pub(super) struct Running {
    pub sequence: Sequence,
    pub table: BlockTable,
}

#[derive(Debug)]
struct Swapped {
    sequence: Sequence,
    table: SwappedTable,
}

/// Limits of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub max_prefill_tokens: usize,
    pub max_num_seqs: usize,
}

/// All sequences and all blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    pub pool: BlockPool,
    host: BlockAllocator,
    limits: Limits,
    waiting: VecDeque<Sequence>,
    pub running: Vec<Running>,
    swapped: VecDeque<Swapped>,
}

impl Scheduler {
    pub fn new(pool: BlockPool, host_blocks: usize, limits: Limits) -> Result<Self> {
        let host = BlockAllocator::new(host_blocks)?;
        let (waiting, running, swapped) = Default::default();
        Ok(Scheduler { pool, host, limits, waiting, running, swapped })
    }

    /// Queues a sequence. The caller has checked that it fits into an empty cache.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub fn has_work(&self) -> bool {
        !(self.waiting.is_empty() && self.running.is_empty() && self.swapped.is_empty())
    }

    /// Blocks of host memory that hold something, in order.
    pub fn host_blocks(&self) -> Vec<u32> {
        self.host.allocated().collect()
    }

    /// Decides the next step. With `alone` a sequence starts only where no other runs.
    pub fn schedule(&mut self, alone: bool) -> Result<Step> {
        let mut step = Step::default();
        let mut budget = self.limits.max_prefill_tokens;
        let preempted = self.continue_running(&mut step, &mut budget)?;
        if !preempted {
            self.swap_in(&mut step, &mut budget)?;
            if self.swapped.is_empty() {
                self.admit(&mut step, &mut budget, alone)?;
            }
        }
        Ok(step)
    }

    /// Gives every running sequence its next tokens; whether one had to be preempted.
    fn continue_running(&mut self, step: &mut Step, budget: &mut usize) -> Result<bool> {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() {
            let chunk = self.running[index].next_chunk(*budget);
            while index < self.running.len() {
                let needed = self.running[index].table.blocks_needed(&self.pool, chunk);
                let free = self.pool.num_available();
                if needed <= free {
                    break;
                }
                if self.running.len() == 1 {
                    // Cannot be, since what is added fits; but an endless loop would be worse.
                    return Err(Error::NoFreeBlocks { requested: needed, free });
                }
                self.preempt_last(step)?;
                preempted = true;
            }
            if index < self.running.len() {
                self.give(step, budget, index, chunk)?;
            }
            index += 1;
        }
        Ok(preempted)
    }

    /// Appends `chunk` tokens to the table of running sequence `index`: a row of the step.
    fn give(&mut self, step: &mut Step, budget: &mut usize, index: usize, chunk: usize) -> Result<()> {
        if chunk == 0 {
            return Ok(());
        }
        let Running { sequence, table } = &mut self.running[index];
        let start = table.len();
        let prefill = sequence.is_prefill(start);
        let mut plan = WritePlan::default();
        table.append(&mut self.pool, &sequence.tokens[start..start + chunk], &mut plan)?;
        push_copies(&mut step.moves, plan.copies);
        // The model writes a layer's keys and values of the whole step before any token attends
        // over that layer. So the blocks may be found from now on, by other sequences of this
        // step even; nothing scheduled is preempted in its own step.
        table.publish(&mut self.pool)?;
        if prefill {
            *budget -= chunk;
        }
        step.rows.push(Row { index, start, len: chunk, samples: start + chunk == sequence.tokens.len(), prefill });
        Ok(())
    }

    /// Takes the blocks of the last running sequence.
    fn preempt_last(&mut self, step: &mut Step) -> Result<()> {
        let Some(Running { sequence, mut table }) = self.running.pop() else { return Ok(()) };
        if table.blocks().len() <= self.host.num_free() {
            let mut pairs = Vec::new();
            let swapped = table.swap_out(&mut self.pool, &mut self.host, &mut pairs)?;
            match step.moves.last_mut() {
                Some(Move::SwapOut(last)) => last.extend(pairs),
                _ => step.moves.push(Move::SwapOut(pairs)),
            }
            // Preempted from the back of the running: the earliest comes back first.
            self.swapped.push_front(Swapped { sequence, table: swapped });
        } else {
            table.release(&mut self.pool)?;
            // The blocks may be written by later copies: do not let those join earlier ones.
            step.moves.push(Move::Copy(Vec::new()));
            step.recomputed += 1;
            self.waiting.push_front(sequence);
        }
        Ok(())
    }

    fn swap_in(&mut self, step: &mut Step, budget: &mut usize) -> Result<()> {
        while let Some(Swapped { sequence, table }) = self.swapped.front_mut() {
            let len = table.len();
            let chunk = sequence.next_chunk(len, *budget);
            let needed = (len + chunk).div_ceil(self.pool.block_size());
            if chunk == 0 || needed + self.running.len() > self.pool.num_available() {
                break;
            }
            let mut pairs = Vec::new();
            let table = table.swap_in(&mut self.pool, &mut self.host, &mut pairs)?;
            match step.moves.last_mut() {
                Some(Move::SwapIn(last)) => last.extend(pairs),
                _ => step.moves.push(Move::SwapIn(pairs)),
            }
            let Some(Swapped { sequence, table: empty }) = self.swapped.pop_front() else { break };
            empty.release(&mut self.host)?;
            self.running.push(Running { sequence, table });
            self.give(step, budget, self.running.len() - 1, chunk)?;
        }
        Ok(())
    }

    fn admit(&mut self, step: &mut Step, budget: &mut usize, alone: bool) -> Result<()> {
        let most = if alone { 1 } else { self.limits.max_num_seqs };
        while self.running.len() < most && *budget > 0 {
            let Some(sequence) = self.waiting.front() else { break };
            let table = BlockTable::with_prefix_of(&mut self.pool, 0, &sequence.tokens)?;
            let shared = table.len();
            let chunk = sequence.next_chunk(shared, *budget);
            if table.blocks_needed(&self.pool, chunk) + self.running.len() > self.pool.num_available() {
                table.release(&mut self.pool)?;
                break;
            }
            let Some(sequence) = self.waiting.pop_front() else { break };
            self.running.push(Running { sequence, table });
            self.give(step, budget, self.running.len() - 1, chunk)?;
            step.shared_tokens += shared;
        }
        Ok(())
    }

    /// Adds a sample that shares all blocks of running sequence `parent`.
    pub fn fork(&mut self, parent: usize, sequence: Sequence) -> Result<usize> {
        let table = self.running[parent].table.fork(&mut self.pool)?;
        self.running.push(Running { sequence, table });
        Ok(self.running.len() - 1)
    }

    /// Removes the running sequences that `finished` says have ended, and frees their blocks.
    pub fn remove_finished(&mut self, finished: impl Fn(&Sequence) -> bool) -> Result<()> {
        let mut index = 0;
        while index < self.running.len() {
            if finished(&self.running[index].sequence) {
                self.running.remove(index).table.release(&mut self.pool)?;
            } else {
                index += 1;
            }
        }
        Ok(())
    }
}

impl Running {
    fn next_chunk(&self, budget: usize) -> usize {
        self.sequence.next_chunk(self.table.len(), budget)
    }
}

fn push_copies(moves: &mut Vec<Move>, pairs: Vec<BlockPair>) {
    match moves.last_mut() {
        _ if pairs.is_empty() => {}
        Some(Move::Copy(last)) if !last.is_empty() => last.extend(pairs),
        _ => moves.push(Move::Copy(pairs)),
    }
}
