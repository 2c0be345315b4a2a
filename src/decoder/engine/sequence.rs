//! One sample of one request as it grows.

use crate::decoder::sampling::Sampler;
use crate::decoder::text::TextStream;

/// Tokens, generator and text of a sample. Its blocks are the scheduler's business, so that
/// nothing here changes when it is preempted.
#[derive(Debug)]
pub(super) struct Sequence {
    pub request: usize,
    pub sample: usize,
    /// Prompt, then output.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Tokens it may have at most.
    pub max_len: usize,
    /// Tokens that a warm-up of scales has counted, this sequence's own or those of blocks it shares.
    pub observed: usize,
    /// Samples to be forked off when the prompt is computed.
    pub forks: usize,
    pub sampler: Sampler,
    pub text: TextStream,
    pub finished: bool,
}

impl Sequence {
    /// Whether the token at `position` belongs to a prefill: all but the last one sampled.
    pub fn is_prefill(&self, position: usize) -> bool {
        position < self.prompt_len || position + 1 < self.tokens.len()
    }

    /// Tokens to compute next after `computed` of them, at most `budget` of a prefill.
    pub fn next_chunk(&self, computed: usize, budget: usize) -> usize {
        let left = self.tokens.len() - computed;
        if self.is_prefill(computed) { left.min(budget) } else { left }
    }
}
