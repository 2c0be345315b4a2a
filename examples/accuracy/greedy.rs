//! Greedy continuations of many prompts over the cache of one row.
//!
//! Not the crate's engine: a row may hand its prompts over to another device, and where a cache is ruined
//! a step may compute no number at all. A prompt whose model has nothing to say ends there.

use quantkv::decoder::{Batch, Compute, Model, WantedLogits};
use quantkv::{Element, Result};

use crate::cache::RowCache;
use crate::metrics;

/// Prompts continued side by side.
pub const GROUP: usize = 16;

struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
    ended: bool,
}

/// What to continue, and when to stop.
pub struct Greedy<'a> {
    pub max_tokens: usize,
    pub eos: &'a [u32],
}

impl Greedy<'_> {
    /// Blocks of a cache that [`Greedy::run`] can continue these prompts in.
    pub fn blocks_needed(&self, longest_prompt: usize, block_size: usize) -> usize {
        GROUP * (longest_prompt + self.max_tokens).div_ceil(block_size)
    }

    /// The tokens that follow each prompt; `done` is called after each.
    pub fn run<B: Compute<A>, A: Element>(
        &self,
        model: &mut Model<B, A>,
        cache: &mut RowCache<B>,
        prompts: &[&[u32]],
        mut done: impl FnMut(),
    ) -> Result<Vec<Vec<u32>>> {
        let mut continuations = Vec::new();
        for group in prompts.chunks(GROUP) {
            let mut sequences = self.sequences(group, cache.writer().shape().spec.block_size);
            self.prefill(model, cache, &mut sequences)?;
            self.decode(model, cache, &mut sequences)?;
            for (sequence, prompt) in sequences.into_iter().zip(group) {
                continuations.push(sequence.tokens[prompt.len()..].to_vec());
                done();
            }
        }
        Ok(continuations)
    }

    /// Each sequence has blocks of its own, for all it may become.
    fn sequences(&self, prompts: &[&[u32]], block_size: usize) -> Vec<Sequence> {
        let mut next = 0;
        let sequence = |prompt: &&[u32]| {
            let first = next;
            next += (prompt.len() + self.max_tokens).div_ceil(block_size) as u32;
            Sequence { tokens: prompt.to_vec(), blocks: (first..next).collect(), ended: false }
        };
        prompts.iter().map(sequence).collect()
    }

    fn prefill<B: Compute<A>, A: Element>(
        &self,
        model: &mut Model<B, A>,
        cache: &mut RowCache<B>,
        sequences: &mut [Sequence],
    ) -> Result<()> {
        let block_size = cache.writer().shape().spec.block_size;
        let mut batch = Batch::new();
        for sequence in sequences {
            batch.clear();
            batch.push_sequence(&sequence.tokens, 0, &sequence.blocks, block_size, WantedLogits::Last)?;
            model.compute(&batch, cache.writer())?;
            cache.hand_over(&sequence.blocks[..sequence.tokens.len().div_ceil(block_size)])?;
            let token = metrics::greedy(model.logits(0..1)?);
            self.extend(sequence, token, 1);
        }
        Ok(())
    }

    fn decode<B: Compute<A>, A: Element>(
        &self,
        model: &mut Model<B, A>,
        cache: &mut RowCache<B>,
        sequences: &mut [Sequence],
    ) -> Result<()> {
        let block_size = cache.writer().shape().spec.block_size;
        let vocab_size = model.config().vocab_size;
        let mut batch = Batch::new();
        for generated in 2..=self.max_tokens {
            let mut running: Vec<&mut Sequence> = sequences.iter_mut().filter(|sequence| !sequence.ended).collect();
            if running.is_empty() {
                break;
            }
            batch.clear();
            for sequence in &running {
                let last = sequence.tokens.len() - 1;
                let token = &sequence.tokens[last..];
                batch.push_sequence(token, last, &sequence.blocks, block_size, WantedLogits::Last)?;
            }
            model.compute(&batch, cache.reader())?;
            let logits = model.logits(0..running.len())?;
            for (sequence, row) in running.iter_mut().zip(logits.chunks_exact(vocab_size)) {
                self.extend(sequence, metrics::greedy(row), generated);
            }
        }
        Ok(())
    }

    fn extend(&self, sequence: &mut Sequence, token: Option<u32>, generated: usize) {
        sequence.tokens.extend(token);
        sequence.ended = generated == self.max_tokens || token.is_none_or(|token| self.eos.contains(&token));
    }
}
