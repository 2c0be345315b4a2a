//! The transformer itself, over a [`Compute`] backend and a [`PagedKvCache`].
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
//!
//! Scratch buffers grow to the largest step and are reused. The MLP, whose intermediate rows are
//! the widest, runs over `MLP_ROWS` rows at a time; the result of a row does not depend on that
//! ([`Compute`]'s contract).

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::batch::Batch;
use super::compute::Compute;
use super::config::Config;
use super::weights::{HostTensor, Weights};
use crate::args::{Absmax, AttentionParams, RowStrides};
use crate::cache::{AttentionBatch, AttentionHeads, AttentionIo, PagedKvCache};
use crate::error::{Error, Result};
use crate::format::{DType, Element, Pod};
use crate::layout::{CacheSpec, Half, checked_product};
use crate::memory::BufferLen;

/// Rows the MLP computes at a time.
const MLP_ROWS: usize = 128;
/// Divisors of the first-batch scales: vLLM's `K_SCALE_CONSTANT` and `V_SCALE_CONSTANT`.
const FIRST_BATCH_DIVISORS: [(Half, f32); 2] = [(Half::K, 200.0), (Half::V, 100.0)];

/// A linear layer: weight and optional bias.
struct Projection<B: Compute<A>, A: Element> {
    weight: B::Matrix,
    bias: Option<B::Buffer<A>>,
}

struct Layer<B: Compute<A>, A: Element> {
    input_norm: B::Buffer<A>,
    q: Projection<B, A>,
    k: Projection<B, A>,
    v: Projection<B, A>,
    /// Per-head norms of q and k (Qwen3).
    qk_norms: Option<(B::Buffer<A>, B::Buffer<A>)>,
    o: Projection<B, A>,
    post_norm: B::Buffer<A>,
    gate: Projection<B, A>,
    up: Projection<B, A>,
    down: Projection<B, A>,
}

/// A loaded model.
pub struct Model<B: Compute<A>, A: Element = f32> {
    backend: Arc<B>,
    config: Config,
    weights: Weights,
    dtype: DType,
    embedding: B::Matrix,
    layers: Vec<Layer<B, A>>,
    norm: B::Buffer<A>,
    /// `None` where the embedding is used.
    lm_head: Option<B::Matrix>,
    inv_freq: B::Buffer<f32>,
    scratch: Scratch<B, A>,
    scales_from_next_step: bool,
    /// Rows of the last step that have logits.
    wanted_rows: Vec<i32>,
    logits: Vec<f32>,
}

impl<B: Compute<A>, A: Element> std::fmt::Debug for Model<B, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.config).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

impl<B: Compute<A>, A: Element> Model<B, A> {
    /// Loads the model in `dir`: `config.json` and its safetensors.
    ///
    /// # Errors
    /// What [`Config::from_dir`] and [`Weights::open`] refuse; [`Error::InvalidFile`] naming a
    /// tensor that is missing or has another shape; [`Error::UnsupportedModel`] naming a tensor of
    /// another type.
    pub fn load(dir: &Path, backend: Arc<B>) -> Result<Self> {
        let config = Config::from_dir(dir)?;
        let weights = Weights::open(dir)?;
        Model::from_parts(config, weights, backend)
    }

    /// Builds the model from a configuration and weights already opened.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_parts(config: Config, weights: Weights, backend: Arc<B>) -> Result<Self> {
        let loader = Loader { backend: &*backend, weights: &weights, config: &config, _activation: Default::default() };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = weights.tensor_of_shape("model.embed_tokens.weight", &[vocab, hidden])?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(backend.load_matrix(&weights.tensor_of_shape("lm_head.weight", &[vocab, hidden])?)?),
        };
        let inverse_frequencies = config.rope.inverse_frequencies();
        let mut inv_freq = backend.zeros("inverse frequencies", inverse_frequencies.len())?;
        backend.upload(&inverse_frequencies, &mut inv_freq)?;
        Ok(Model {
            dtype: config.dtype.unwrap_or(embedding.dtype()),
            embedding: backend.load_matrix(&embedding)?,
            layers: (0..config.num_layers).map(|layer| loader.layer(layer)).collect::<Result<_>>()?,
            norm: loader.vector("model.norm.weight", hidden)?,
            lm_head,
            inv_freq,
            scratch: Scratch::new(&*backend)?,
            scales_from_next_step: false,
            wanted_rows: Vec::new(),
            logits: Vec::new(),
            config,
            weights,
            backend,
        })
    }

    /// What `config.json` said.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The checkpoint's tensors, for KV scales.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The model's own dtype, which `auto` means for the cache.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The backend the weights live on.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Takes the static scales of the cache from the next step: before its first write, each
    /// layer's K scale becomes max|K| / 200 and its V scale max|V| / 100 (1.0 where all is zero),
    /// in the granularity the cache has. Frozen afterwards. For a cache that holds nothing yet.
    pub fn scales_from_next_step(&mut self) {
        self.scales_from_next_step = true;
    }

    /// Runs one step: writes the keys and values of all tokens of `batch` to `cache` and returns
    /// the logits of the rows wanted, `[batch.num_logits_rows(), vocab_size]`.
    ///
    /// # Errors
    /// As [`Model::compute`].
    pub fn forward(&mut self, batch: &Batch, cache: &mut PagedKvCache<B>) -> Result<&[f32]> {
        self.compute(batch, cache)?;
        self.logits(0..batch.num_logits_rows())
    }

    /// Runs one step without its logits: [`Model::logits`] gives them, as many rows at a time as
    /// the caller has memory for.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for a batch that does not fit the vocabulary or the cache;
    /// [`Error::GeometryMismatch`] for a cache of another model; [`Error::OutOfMemory`]; the
    /// backend's own.
    pub fn compute(&mut self, batch: &Batch, cache: &mut PagedKvCache<B>) -> Result<()> {
        self.wanted_rows.clear();
        self.check_cache(cache)?;
        batch.validate(self.config.vocab_size, cache.shape())?;
        let rows = batch.num_tokens();
        self.scratch.prepare(&*self.backend, &self.config, batch, cache)?;
        let scratch = &mut self.scratch;
        self.backend.embed(&self.embedding, &scratch.ids, rows, &mut scratch.x)?;
        let (positions, scaling) = (&scratch.positions, self.config.rope.attention_scaling());
        self.backend.rope_table(positions, rows, &self.inv_freq, scaling, &mut scratch.cos, &mut scratch.sin)?;
        for index in 0..self.layers.len() {
            self.attention(index, rows, cache)?;
            self.mlp(index, rows)?;
        }
        self.scales_from_next_step = false;
        self.wanted_rows.extend_from_slice(&batch.logits_rows);
        Ok(())
    }

    fn check_cache(&self, cache: &PagedKvCache<B>) -> Result<()> {
        let (config, spec) = (&self.config, &cache.shape().spec);
        let model = (config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim);
        let given = (cache.num_layers(), spec.num_kv_heads, spec.k_head_dim, spec.v_head_dim);
        if model != given {
            return Err(Error::GeometryMismatch {
                what: "the model and the cache",
                reason: format!("(layers, KV heads, K dim, V dim) are {model:?} and {given:?}"),
            });
        }
        Ok(())
    }

    /// `x += o_proj(attention(rms_norm(x)))`, through the cache.
    fn attention(&mut self, index: usize, rows: usize, cache: &mut PagedKvCache<B>) -> Result<()> {
        let (backend, config, layer, s) = (&*self.backend, &self.config, &self.layers[index], &mut self.scratch);
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
        backend.rope(&mut s.k, rows, kv_heads, dim, &s.cos, &s.sin)?;
        if self.scales_from_next_step {
            self.scales_from_step(index, rows, cache)?;
        }

        let (backend, config, layer, s) = (&*self.backend, &self.config, &self.layers[index], &mut self.scratch);
        let kv_strides = RowStrides::contiguous(kv_heads, dim);
        let (key, value) = (backend.view(&s.k), backend.view(&s.v));
        cache.write(index, key, kv_strides, value, kv_strides, backend.view(&s.slots))?;
        let step = AttentionBatch {
            num_tokens: rows,
            query_starts: backend.view(&s.query_starts),
            seq_lens: backend.view(&s.seq_lens),
            block_tables: backend.view(&s.block_tables),
            block_table_stride: s.block_table_stride,
        };
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
        cache.attend(index, &step, &AttentionHeads::new(heads, params), io)?;
        backend.linear(&s.attended, rows, &layer.o.weight, layer.o.bias.as_ref(), &mut s.update)?;
        backend.add(&mut s.x, 0, &s.update, rows * config.hidden_size)
    }

    /// Sets one layer's static scales from the keys and values about to be written.
    fn scales_from_step(&self, index: usize, rows: usize, cache: &mut PagedKvCache<B>) -> Result<()> {
        let (backend, config, s) = (&*self.backend, &self.config, &self.scratch);
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

    /// `x += down(silu(gate(n)) * up(n))`, `n = rms_norm(x)`.
    fn mlp(&mut self, index: usize, rows: usize) -> Result<()> {
        let (backend, config, layer, s) = (&*self.backend, &self.config, &self.layers[index], &mut self.scratch);
        for first in (0..rows).step_by(MLP_ROWS) {
            let rows = MLP_ROWS.min(rows - first);
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

    /// Logits `[range.len(), vocab_size]` of rows `range` among those that the batch of the last
    /// [`Model::compute`] wanted.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for rows it did not want; [`Error::OutOfMemory`]; the backend's own.
    pub fn logits(&mut self, range: Range<usize>) -> Result<&[f32]> {
        let (backend, config, s) = (&*self.backend, &self.config, &mut self.scratch);
        let Some(wanted) = self.wanted_rows.get(range.clone()) else {
            let have = self.wanted_rows.len();
            return Err(Error::InvalidRequest(format!("logits of rows {range:?}; the last step wanted {have}")));
        };
        let rows = wanted.len();
        replace(backend, wanted, &mut s.logits_rows)?;
        self.logits.clear();
        if rows > 0 {
            let len = checked_product("logits", &[rows, config.vocab_size])?;
            grow(backend, "logits", len, &mut s.logits)?;
            backend.gather_rows(&s.x, &s.logits_rows, rows, config.hidden_size, &mut s.update)?;
            backend.rms_norm(&s.update, 0, rows, &self.norm, config.rms_norm_eps, &mut s.normed)?;
            let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
            backend.logits(&s.normed, rows, head, &mut s.logits)?;
            let bytes = len * size_of::<f32>();
            self.logits.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { what: "logits", bytes })?;
            self.logits.resize(len, 0.0);
            backend.download(&s.logits, &mut self.logits)?;
        }
        Ok(&self.logits)
    }

    /// The cache geometry this model needs.
    ///
    /// # Errors
    /// [`CacheSpec::new`].
    pub fn cache_spec(&self, block_size: usize, format: crate::format::KvFormat) -> Result<CacheSpec> {
        CacheSpec::new(self.config.num_kv_heads, self.config.head_dim, block_size, format)
    }
}

/// Reads tensors by their names in Hugging Face checkpoints.
struct Loader<'a, B, A> {
    backend: &'a B,
    weights: &'a Weights,
    config: &'a Config,
    _activation: std::marker::PhantomData<A>,
}

impl<B: Compute<A>, A: Element> Loader<'_, B, A> {
    fn vector(&self, name: &str, len: usize) -> Result<B::Buffer<A>> {
        let tensor: HostTensor = self.weights.tensor_of_shape(name, &[len])?;
        let values: Vec<A> = tensor.to_f32().into_iter().map(A::from_f32).collect();
        let mut buffer = self.backend.zeros("a weight vector", len)?;
        self.backend.upload(&values, &mut buffer)?;
        Ok(buffer)
    }

    fn projection(&self, name: &str, out: usize, input: usize, bias: bool) -> Result<Projection<B, A>> {
        let weight = self.weights.tensor_of_shape(&format!("{name}.weight"), &[out, input])?;
        Ok(Projection {
            weight: self.backend.load_matrix(&weight)?,
            bias: if bias { Some(self.vector(&format!("{name}.bias"), out)?) } else { None },
        })
    }

    fn layer(&self, index: usize) -> Result<Layer<B, A>> {
        let c = self.config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let attention =
            |part: &str, out, input, bias| self.projection(&name(&format!("self_attn.{part}")), out, input, bias);
        let mlp = |part: &str, out, input| self.projection(&name(&format!("mlp.{part}")), out, input, c.mlp_bias);
        let qk_norms = if c.qk_norm {
            let norm = |part| self.vector(&name(part), c.head_dim);
            Some((norm("self_attn.q_norm.weight")?, norm("self_attn.k_norm.weight")?))
        } else {
            None
        };
        Ok(Layer {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            q: attention("q_proj", q_width, hidden, c.qkv_bias)?,
            k: attention("k_proj", kv_width, hidden, c.qkv_bias)?,
            v: attention("v_proj", kv_width, hidden, c.qkv_bias)?,
            qk_norms,
            o: attention("o_proj", hidden, q_width, c.o_bias)?,
            post_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate: mlp("gate_proj", inner, hidden)?,
            up: mlp("up_proj", inner, hidden)?,
            down: mlp("down_proj", hidden, inner)?,
        })
    }
}

/// Buffers of one step. Activations `[rows, ...]` only grow; index lists have the exact length,
/// which the cache operations take as the number of tokens and sequences.
struct Scratch<B: Compute<A>, A: Element> {
    x: B::Buffer<A>,
    normed: B::Buffer<A>,
    /// What is added to `x` next.
    update: B::Buffer<A>,
    q: B::Buffer<A>,
    k: B::Buffer<A>,
    v: B::Buffer<A>,
    attended: B::Buffer<A>,
    gate: B::Buffer<A>,
    up: B::Buffer<A>,
    cos: B::Buffer<f32>,
    sin: B::Buffer<f32>,
    workspace: B::Buffer<f32>,
    logits: B::Buffer<f32>,
    ids: B::Buffer<i32>,
    positions: B::Buffer<i32>,
    slots: B::Buffer<i64>,
    query_starts: B::Buffer<i32>,
    seq_lens: B::Buffer<i32>,
    block_tables: B::Buffer<i32>,
    block_table_stride: usize,
    logits_rows: B::Buffer<i32>,
    padded_tables: Vec<i32>,
}

impl<B: Compute<A>, A: Element> Scratch<B, A> {
    fn new(backend: &B) -> Result<Self> {
        let activation = || backend.zeros::<A>("activations", 0);
        let floats = || backend.zeros::<f32>("activations", 0);
        let ints = || backend.zeros::<i32>("step inputs", 0);
        Ok(Scratch {
            x: activation()?,
            normed: activation()?,
            update: activation()?,
            q: activation()?,
            k: activation()?,
            v: activation()?,
            attended: activation()?,
            gate: activation()?,
            up: activation()?,
            cos: floats()?,
            sin: floats()?,
            workspace: floats()?,
            logits: floats()?,
            ids: ints()?,
            positions: ints()?,
            slots: backend.zeros("step inputs", 0)?,
            query_starts: ints()?,
            seq_lens: ints()?,
            block_tables: ints()?,
            block_table_stride: 0,
            logits_rows: ints()?,
            padded_tables: Vec::new(),
        })
    }

    /// Makes room for the step and uploads its lists.
    fn prepare(&mut self, backend: &B, config: &Config, batch: &Batch, cache: &PagedKvCache<B>) -> Result<()> {
        let rows = batch.num_tokens();
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let mlp_rows = rows.min(MLP_ROWS);
        for (buffer, rows, width) in [
            (&mut self.x, rows, config.hidden_size),
            (&mut self.normed, rows, config.hidden_size),
            (&mut self.update, rows, config.hidden_size),
            (&mut self.q, rows, q_width),
            (&mut self.k, rows, kv_width),
            (&mut self.v, rows, kv_width),
            (&mut self.attended, rows, q_width),
            (&mut self.gate, mlp_rows, config.intermediate_size),
            (&mut self.up, mlp_rows, config.intermediate_size),
        ] {
            grow(backend, "activations", checked_product("activations", &[rows, width])?, buffer)?;
        }
        for buffer in [&mut self.cos, &mut self.sin] {
            grow(backend, "rotary tables", checked_product("rotary tables", &[rows, config.head_dim / 2])?, buffer)?;
        }
        let workspace = cache.workspace_len(config.num_heads, rows);
        grow(backend, "attention workspace", workspace, &mut self.workspace)?;

        self.block_table_stride = batch.padded_tables(&mut self.padded_tables);
        replace(backend, &batch.token_ids, &mut self.ids)?;
        replace(backend, &batch.positions, &mut self.positions)?;
        replace(backend, &batch.slot_mapping, &mut self.slots)?;
        replace(backend, &batch.query_starts, &mut self.query_starts)?;
        replace(backend, &batch.seq_lens, &mut self.seq_lens)?;
        replace(backend, &self.padded_tables, &mut self.block_tables)
    }
}

/// Makes `buffer` at least `len` elements long; its contents are lost if it grows.
fn grow<B: crate::Backend, T: Pod>(
    backend: &B,
    what: &'static str,
    len: usize,
    buffer: &mut B::Buffer<T>,
) -> Result<()> {
    if backend.view(buffer).buffer_len() < len {
        *buffer = backend.zeros(what, 0)?;
        *buffer = backend.zeros(what, len)?;
    }
    Ok(())
}

/// Makes `buffer` hold exactly `values`.
fn replace<B: crate::Backend, T: Pod>(backend: &B, values: &[T], buffer: &mut B::Buffer<T>) -> Result<()> {
    if backend.view(buffer).buffer_len() != values.len() {
        *buffer = backend.zeros("step inputs", values.len())?;
    }
    backend.upload(values, buffer)
}
