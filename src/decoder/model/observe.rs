//! A step whose keys and values the caller sees, layer by layer, on the host: for calibration.

use super::{LastStep, Model};
use crate::cache::PagedKvCache;
use crate::decoder::batch::Batch;
use crate::decoder::compute::Compute;
use crate::error::Result;
use crate::format::Element;
use crate::layout::checked_product;

/// The keys and values of a step's tokens in one layer, as they are about to be written to the cache:
/// keys after RoPE. `[num_tokens, num_kv_heads, head_dim]`, gapless.
#[derive(Clone, Copy, Debug)]
pub struct ObservedLayer<'a, A> {
    /// The layer.
    pub layer: usize,
    /// Tokens of the step, in the order of its batch.
    pub num_tokens: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Keys.
    pub k: &'a [A],
    /// Values.
    pub v: &'a [A],
}

impl<B: Compute<A>, A: Element> Model<B, A> {
    /// [`Model::compute`] that shows `see` the keys and values of every layer, in order, copied to the host.
    /// An error of `see` ends the step. Scales that were to come from this step stay to come.
    ///
    /// # Errors
    /// As [`Model::compute`], and those of `see`.
    pub fn compute_observed(
        &mut self,
        batch: &Batch,
        cache: &mut PagedKvCache<B>,
        mut see: impl FnMut(ObservedLayer<'_, A>) -> Result<()>,
    ) -> Result<()> {
        self.last = LastStep::default();
        self.check_cache(cache)?;
        batch.validate(self.config().vocab_size, cache.shape())?;
        let num_tokens = batch.num_tokens();
        let Model { network, scratch, inputs, padded_tables, .. } = self;
        let backend = &*network.backend;
        scratch.reserve(backend, &network.config, num_tokens, cache)?;
        let stride = batch.longest_table();
        batch.padded_tables(stride, padded_tables);
        inputs.set(backend, batch, padded_tables, stride)?;
        let (num_kv_heads, head_dim) = (network.config.num_kv_heads, network.config.head_dim);
        let len = checked_product("keys of a step", &[num_tokens, num_kv_heads, head_dim])?;
        let (mut k, mut v) = (vec![A::default(); len], vec![A::default(); len]);
        network.step_observed(scratch, inputs, num_tokens, cache, &mut |layer, scratch| {
            backend.download(&scratch.k, &mut k)?;
            backend.download(&scratch.v, &mut v)?;
            see(ObservedLayer { layer, num_tokens, num_kv_heads, head_dim, k: &k, v: &v })
        })?;
        self.last = LastStep { wanted: batch.logits_rows.clone(), recorded: false };
        Ok(())
    }
}
