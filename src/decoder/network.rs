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
use super::scratch::{Scratch, StepInputs};
use crate::args::{Absmax, AttentionParams, RowStrides};
use crate::cache::{AttentionHeads, AttentionIo, PagedKvCache};
use crate::error::Result;
use crate::format::Element;
use crate::layout::Half;

/// Divisors of the first-batch scales: vLLM's `K_SCALE_CONSTANT` and `V_SCALE_CONSTANT`.
const FIRST_BATCH_DIVISORS: [(Half, f32); 2] = [(Half::K, 200.0), (Half::V, 100.0)];

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
    /// All layers over `rows` tokens. `new_scales`: each layer's scales come from these tokens.
    pub fn step(
        &self,
        s: &mut Scratch<B, A>,
        inputs: &StepInputs<B>,
        rows: usize,
        cache: &mut PagedKvCache<B>,
        new_scales: bool,
    ) -> Result<()> {
        self.begin(s, inputs, rows)?;
        for index in 0..self.layers.len() {
            self.keys_and_queries(index, s, rows)?;
            if new_scales {
                self.scales_from_step(index, s, rows, cache)?;
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
        see: &mut dyn FnMut(usize, &Scratch<B, A>) -> Result<()>,
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
        cache: &mut PagedKvCache<B>,
    ) -> Result<()> {
        let (backend, config) = (&*self.backend, &self.config);
        let scales = cache.scales(index)?;
        for (half, divisor) in FIRST_BATCH_DIVISORS {
            let (input, granularity) = match half {
                Half::K => (&s.k, scales.k.granularity()),
                Half::V => (&s.v, scales.v.granularity()),
            };
            let (num_heads, head_dim) = (config.num_kv_heads, config.head_dim);
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
            cache.update_scales(index, half, backend.view(&running), divisor)?;
        }
        Ok(())
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
