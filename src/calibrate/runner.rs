//! [`Runner`]: samples through a model and an unquantized cache, seen layer by layer.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::Calibration;
use crate::cache::PagedKvCache;
use crate::decoder::{Batch, Compute, Model, WantedLogits};
use crate::error::{Error, Result};
use crate::format::{Element, KvCacheDtype};
use crate::scale::LayerScales;

/// Tokens computed in one step.
const TOKENS_AT_ONCE: usize = 512;
const BLOCK_SIZE: usize = 16;

/// Told after each step how many tokens it had; `Break` ends the run.
pub type Progress<'a> = &'a mut dyn FnMut(usize) -> ControlFlow<()>;

/// A model, and a cache for one sample.
#[derive(Debug)]
pub struct Runner<'m, B: Compute<A>, A: Element> {
    model: &'m mut Model<B, A>,
    cache: PagedKvCache<B>,
    blocks: Vec<u32>,
    longest: usize,
}

impl<'m, B: Compute<A>, A: Element> Runner<'m, B, A> {
    /// Samples of at most `longest` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and what else the backend answers.
    pub fn new(model: &'m mut Model<B, A>, longest: usize) -> Result<Self> {
        let spec = model.cache_spec(BLOCK_SIZE, KvCacheDtype::Auto.resolve(A::DTYPE))?;
        let num_blocks = spec.blocks_for_tokens(longest.max(1));
        let blocks = u32::try_from(num_blocks).map_err(|_| Error::Overflow { what: "blocks of a sample" })?;
        let scales = vec![LayerScales::one(); model.config().num_layers];
        let cache = PagedKvCache::new(Arc::clone(model.backend()), spec, num_blocks, &scales)?;
        Ok(Runner { model, cache, blocks: (0..blocks).collect(), longest })
    }

    /// Runs a sample from an empty cache and shows it to `calibration`. `false` if `progress` ended it, the
    /// sample being half seen.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for a sample that is empty, too long, or not of the model's vocabulary;
    /// those of [`Calibration::observe`] and [`Model::compute_observed`].
    pub fn sample(&mut self, ids: &[u32], calibration: &mut Calibration, progress: Progress<'_>) -> Result<bool> {
        if ids.is_empty() || ids.len() > self.longest {
            let message = format!("a sample has {} tokens, expected 1 to {}", ids.len(), self.longest);
            return Err(Error::InvalidRequest(message));
        }
        let vocab_size = self.model.config().vocab_size;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(Error::InvalidRequest(format!("token id {id} is outside the vocabulary of {vocab_size}")));
        }
        let mut batch = Batch::new();
        let mut done = 0;
        for tokens in ids.chunks(TOKENS_AT_ONCE) {
            batch.clear();
            batch.push_sequence(tokens, done, &self.blocks, BLOCK_SIZE, WantedLogits::None)?;
            self.model.compute_observed(&batch, &mut self.cache, |layer| calibration.observe(&layer))?;
            done += tokens.len();
            if progress(tokens.len()).is_break() {
                return Ok(false);
            }
        }
        calibration.end_sample(done);
        Ok(true)
    }
}
