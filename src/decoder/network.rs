//! The layers: what a step enqueues, over weights, a scratch and a cache.
//!
//! ```text
//! x = embed(ids)
//! for each layer:
//!     q, k, v = linear(rms_norm(x));  qwen3: rms_norm over each head of q, k;  rope(q, k)
//!     cache.write(k, v)                           first the cache,
//!     x += o_proj(cache.attend(q))                then attention over it, prefill included
//!     x += down(silu(gate(n)) * up(n)),  n = rms_norm(x)
//! logits = lm_head(rms_norm(x[rows wanted]))
//! ```
//! Nothing here depends on what the buffers hold: a step of the same sizes enqueues the same work,
//! which is what makes it recordable.

use std::sync::Arc;

use super::compute::Compute;
use super::config::Config;
use super::kv_scales::Divisors;
use super::scratch::{Scratch, StepInputs};
use super::warm_up::WarmUp;
use crate::args::{Absmax, AttentionParams, RowStrides};
use crate::cache::{AttentionHeads, AttentionIo, PagedKvCache};
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::Half;
use crate::scale::Granularity;

/// What a step does to the static scales of the cache, layer by layer, before it writes to it.
#[derive(Debug)]
pub(super) enum NewScales<'a> {
    /// Nothing.
    None,
    /// They become those of this step's tokens, for a cache that holds nothing.
    FirstBatch(Divisors),
    /// They grow with the first `rows` tokens of the step, and `written` blocks with them.
    Running { warm_up: &'a mut WarmUp, rows: usize, written: &'a [u32] },
}

/// A linear layer: weight and optional bias.
pub(super) struct Projection<B: Compute<A>, A: Element> {
    pub weight: B::Matrix,
    pub bias: Option<B::Buffer<A>>,
}

pub(super) struct Layer<B: Compute<A>, A: Element> {
    pub input_norm: B::Buffer<A>,
    pub q: Projection<B, A>,
    pub k: Projection<B, A>,
    pub v: Projection<B, A>,
    /// Per-head norms of q and k (Qwen3).
    pub qk_norms: Option<(B::Buffer<A>, B::Buffer<A>)>,
    pub o: Projection<B, A>,
    pub post_norm: B::Buffer<A>,
    pub gate: Projection<B, A>,
    pub up: Projection<B, A>,
    pub down: Projection<B, A>,
}

/// A model's weights and what to do with them.
pub(super) struct Network<B: Compute<A>, A: Element> {
    pub backend: Arc<B>,
    pub config: Config,
    pub embedding: B::Matrix,
    pub layers: Vec<Layer<B, A>>,
    pub norm: B::Buffer<A>,
    /// `None` where the embedding is used.
    pub lm_head: Option<B::Matrix>,
    pub inv_freq: B::Buffer<f32>,
}

impl<B: Compute<A>, A: Element> Network<B, A> {
    /// All layers over `rows` tokens.
    pub fn step(
        &self,
        s: &mut Scratch<B, A>,
        inputs: &StepInputs<B>,
        rows: usize,
        cache: &mut PagedKvCache<B>,
        mut new_scales: NewScales<'_>,
    ) -> Result<()> {
        self.begin(s, inputs, rows)?;
        for index in 0..self.layers.len() {
            self.keys_and_queries(index, s, rows)?;
            match &mut new_scales {
                NewScales::None => {}
                NewScales::FirstBatch(divisors) => self.scales_from_step(index, s, rows, *divisors, cache)?,
                NewScales::Running { warm_up, rows, written } => {
                    self.grow_scales(index, s, *rows, warm_up, written, cache)?;
                }
            }
            self.attention(index, s, inputs, rows, cache)?;
            self.mlp(index, s, rows)?;
        }
        Ok(())
    }

    /// [`Network::step`] with the scales the cache has. `see` is called for each layer, when its keys and
    /// values lie in the scratch and before they are written.
    pub fn step_observed(
        &self,
        s: &mut Scratch<B, A>,
        inputs: &StepInputs<B>,
        rows: usize,
        cache: &mut PagedKvCache<B>,
        mut see: impl FnMut(usize, &Scratch<B, A>) -> Result<()>,
    ) -> Result<()> {
        self.begin(s, inputs, rows)?;
        for index in 0..self.layers.len() {
            self.keys_and_queries(index, s, rows)?;
            see(index, s)?;
            self.attention(index, s, inputs, rows, cache)?;
            self.mlp(index, s, rows)?;
        }
        Ok(())
    }

    /// `x` and the rotary tables of the step's tokens.
    fn begin(&self, s: &mut Scratch<B, A>, inputs: &StepInputs<B>, rows: usize) -> Result<()> {
        self.backend.embed(&self.embedding, inputs.ids(), rows, &mut s.x)?;
        let scaling = self.config.rope.attention_scaling();
        self.backend.rope_table(inputs.positions(), rows, &self.inv_freq, scaling, &mut s.cos, &mut s.sin)
    }

    /// q, k and v of `rms_norm(x)`, turned to their positions.
    fn keys_and_queries(&self, index: usize, s: &mut Scratch<B, A>, rows: usize) -> Result<()> {
        let (backend, config, layer) = (&*self.backend, &self.config, &self.layers[index]);
        let (heads, kv_heads, dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
        backend.rms_norm(&s.x, 0, rows, &layer.input_norm, config.rms_norm_eps, &mut s.normed)?;
        for (projection, out) in [(&layer.q, &mut s.q), (&layer.k, &mut s.k), (&layer.v, &mut s.v)] {
            backend.linear(&s.normed, rows, &projection.weight, projection.bias.as_ref(), out)?;
        }
        if let Some((q_norm, k_norm)) = &layer.qk_norms {
            backend.rms_norm_in_place(&mut s.q, rows * heads, q_norm, config.rms_norm_eps)?;
            backend.rms_norm_in_place(&mut s.k, rows * kv_heads, k_norm, config.rms_norm_eps)?;
        }
        backend.rope(&mut s.q, rows, heads, dim, &s.cos, &s.sin)?;
        backend.rope(&mut s.k, rows, kv_heads, dim, &s.cos, &s.sin)
    }

    /// `x += o_proj(attention(q))`, through the cache.
    fn attention(
        &self,
        index: usize,
        s: &mut Scratch<B, A>,
        inputs: &StepInputs<B>,
        rows: usize,
        cache: &mut PagedKvCache<B>,
    ) -> Result<()> {
        let (backend, config, layer) = (&*self.backend, &self.config, &self.layers[index]);
        let (heads, kv_heads, dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let kv_strides = RowStrides::contiguous(kv_heads, dim);
        let (key, value) = (backend.view(&s.k), backend.view(&s.v));
        cache.write(index, key, kv_strides, value, kv_strides, inputs.slots(backend))?;
        let sliding_window = config.sliding_windows[index];
        let params = AttentionParams { sliding_window, ..AttentionParams::new((dim as f64).powf(-0.5) as f32) };
        let strides = RowStrides::contiguous(heads, dim);
        let io = AttentionIo {
            query: backend.view(&s.q),
            query_strides: strides,
            output: backend.view_mut(&mut s.attended),
            output_strides: strides,
            lse: None,
            workspace: backend.view_mut(&mut s.workspace),
            // Layers of one step differ in their window alone.
            plan_is_ready: index > 0 && config.sliding_windows[index - 1] == sliding_window,
        };
        let batch = inputs.attention(backend, rows);
        cache.attend(index, &batch, &AttentionHeads::new(heads, params), io)?;
        backend.linear(&s.attended, rows, &layer.o.weight, layer.o.bias.as_ref(), &mut s.update)?;
        backend.add(&mut s.x, 0, &s.update, rows * config.hidden_size)
    }

    /// Sets one layer's static scales from the keys and values about to be written.
    fn scales_from_step(
        &self,
        index: usize,
        s: &Scratch<B, A>,
        rows: usize,
        divisors: Divisors,
        cache: &mut PagedKvCache<B>,
    ) -> Result<()> {
        let scales = cache.scales(index)?;
        for (half, input, scale, divisor) in
            [(Half::K, &s.k, scales.k, divisors.k), (Half::V, &s.v, scales.v, divisors.v)]
        {
            let maxima = self.maxima(input, rows, scale.granularity())?;
            cache.update_scales(index, half, self.backend.view(&maxima), divisor)?;
        }
        Ok(())
    }

    /// Makes one layer's static scales cover the keys and values about to be written, with all that the
    /// cache holds already.
    fn grow_scales(
        &self,
        index: usize,
        s: &Scratch<B, A>,
        rows: usize,
        warm_up: &mut WarmUp,
        written: &[u32],
        cache: &mut PagedKvCache<B>,
    ) -> Result<()> {
        let seen = |input, half| {
            let granularity = warm_up.granularity(index, half);
            let mut seen = vec![0.0; granularity.len(self.config.num_kv_heads, self.config.head_dim)];
            self.backend.download(&self.maxima(input, rows, granularity)?, &mut seen)?;
            Ok::<_, Error>(seen)
        };
        let (k, v) = (seen(&s.k, Half::K)?, seen(&s.v, Half::V)?);
        match warm_up.observe(index, &k, &v)? {
            Some(scales) => cache.requantize(index, &scales, written),
            None => Ok(()),
        }
    }

    /// The largest magnitudes of the first `rows` rows of new keys or values.
    fn maxima(&self, input: &B::Buffer<A>, rows: usize, granularity: Granularity) -> Result<B::Buffer<f32>> {
        let (backend, num_heads, head_dim) = (&*self.backend, self.config.num_kv_heads, self.config.head_dim);
        let mut running = backend.zeros("running maxima", granularity.len(num_heads, head_dim))?;
        backend.absmax(Absmax {
            input: backend.view(input),
            strides: RowStrides::contiguous(num_heads, head_dim),
            num_tokens: rows,
            num_heads,
            head_dim,
            granularity,
            running: backend.view_mut(&mut running),
        })?;
        Ok(running)
    }

    /// `x += down(silu(gate(n)) * up(n))`, `n = rms_norm(x)`. Its rows are the widest: some at a time.
    fn mlp(&self, index: usize, s: &mut Scratch<B, A>, rows: usize) -> Result<()> {
        let (backend, config, layer) = (&*self.backend, &self.config, &self.layers[index]);
        let at_once = backend.rows_at_once().mlp;
        for first in (0..rows).step_by(at_once) {
            let rows = at_once.min(rows - first);
            backend.rms_norm(&s.x, first, rows, &layer.post_norm, config.rms_norm_eps, &mut s.normed)?;
            for (projection, out) in [(&layer.gate, &mut s.gate), (&layer.up, &mut s.up)] {
                backend.linear(&s.normed, rows, &projection.weight, projection.bias.as_ref(), out)?;
            }
            backend.silu_mul(&mut s.gate, &s.up, rows * config.intermediate_size)?;
            backend.linear(&s.gate, rows, &layer.down.weight, layer.down.bias.as_ref(), &mut s.update)?;
            backend.add(&mut s.x, first * config.hidden_size, &s.update, rows * config.hidden_size)?;
        }
        Ok(())
    }

    /// Logits of the rows of `x` that `s.logits_rows` names.
    pub fn logits(&self, s: &mut Scratch<B, A>, rows: usize) -> Result<()> {
        let (backend, config) = (&*self.backend, &self.config);
        backend.gather_rows(&s.x, &s.logits_rows, rows, config.hidden_size, &mut s.update)?;
        backend.rms_norm(&s.update, 0, rows, &self.norm, config.rms_norm_eps, &mut s.normed)?;
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        backend.logits(&s.normed, rows, head, &mut s.logits)
    }
}
