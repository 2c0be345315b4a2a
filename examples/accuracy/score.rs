//! Teacher-forced scoring: every token of a text is read, and what the model expected next is compared
//! with what the reference expected.
//!
//! A text is computed in one step, since a cached token gives the same results in any chunking. Where a
//! cache is handed over, its first half is the prompt and only the second half is scored.

use quantkv::decoder::{Batch, Compute, Model, WantedLogits};
use quantkv::{Element, Result};
use rayon::prelude::*;

use crate::cache::RowCache;
use crate::metrics::{Distribution, Position};

/// Rows of logits compared at a time: they take memory beside the reference's.
const ROWS_AT_ONCE: usize = 64;

/// The reference's logits of one text.
pub struct Reference {
    logits: Vec<f32>,
    vocab_size: usize,
}

impl Reference {
    pub fn new<B: Compute<A>, A: Element>(
        model: &mut Model<B, A>,
        cache: &mut RowCache<B>,
        tokens: &[u32],
    ) -> Result<Self> {
        let mut logits = Vec::new();
        read_text(model, cache, tokens, |_, rows| logits.extend_from_slice(rows))?;
        Ok(Reference { logits, vocab_size: model.config().vocab_size })
    }

    /// Of each position that a token follows.
    pub fn distributions(&self) -> Vec<Distribution<'_>> {
        self.logits.par_chunks_exact(self.vocab_size).map(Distribution::new).collect()
    }
}

/// The scored positions of one text over `cache`.
pub fn score<B: Compute<A>, A: Element>(
    model: &mut Model<B, A>,
    cache: &mut RowCache<B>,
    tokens: &[u32],
    reference: &[Distribution<'_>],
) -> Result<Vec<Position>> {
    let vocab_size = model.config().vocab_size;
    let mut positions = Vec::with_capacity(tokens.len());
    read_text(model, cache, tokens, |first, rows| {
        let compare = |(at, row): (usize, &[f32])| {
            let position = first + at;
            Position::new(reference[position], Distribution::new(row), tokens[position + 1] as usize)
        };
        positions.par_extend(rows.par_chunks_exact(vocab_size).enumerate().map(compare));
    })?;
    Ok(positions)
}

/// Blocks that [`read_text`] writes: the first ones of the cache.
pub fn blocks_for(tokens: usize, block_size: usize) -> Vec<u32> {
    (0..tokens.div_ceil(block_size) as u32).collect()
}

/// Runs a text and calls `visit` with the first position and the logits of some rows at a time, of all
/// scored positions that a token follows.
fn read_text<B: Compute<A>, A: Element>(
    model: &mut Model<B, A>,
    cache: &mut RowCache<B>,
    tokens: &[u32],
    mut visit: impl FnMut(usize, &[f32]),
) -> Result<()> {
    let block_size = cache.writer().shape().spec.block_size;
    let blocks = blocks_for(tokens.len(), block_size);
    let mut batch = Batch::new();
    let scored_from = if cache.is_handed_over() { tokens.len() / 2 } else { 0 };
    if scored_from > 0 {
        batch.push_sequence(&tokens[..scored_from], 0, &blocks, block_size, WantedLogits::None)?;
        model.compute(&batch, cache.writer())?;
        cache.hand_over(&blocks_for(scored_from, block_size))?;
        batch.clear();
    }
    // The last token is only ever a target.
    let read = tokens.len() - 1;
    batch.push_sequence(&tokens[scored_from..read], scored_from, &blocks, block_size, WantedLogits::All)?;
    model.compute(&batch, cache.reader())?;
    let rows = read - scored_from;
    for first in (0..rows).step_by(ROWS_AT_ONCE) {
        let last = rows.min(first + ROWS_AT_ONCE);
        visit(scored_from + first, model.logits(first..last)?);
    }
    Ok(())
}
