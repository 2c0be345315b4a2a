//! A loaded model over a [`Compute`] backend and a [`PagedKvCache`]: batches in, logits or greedy
//! tokens out. What a step computes is in `network.rs`.
//!
//! Scratch buffers grow to the largest step and are reused. A step of decoding alone, one token a
//! sequence, is recorded where the backend records (`recorded.rs`); any other is run as it is.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::batch::Batch;
use super::compute::Compute;
use super::config::Config;
use super::loader::{Loader, Source};
use super::network::Network;
use super::recorded::{LogitsKind, Recordings, StepKind, recorded_stride};
use super::sampling::no_logit;
use super::scratch::{Scratch, StepInputs};
use super::weights::Weights;
use crate::cache::PagedKvCache;
use crate::error::{Error, Result};
use crate::format::{DType, Element};
use crate::layout::{CacheSpec, checked_product};

mod observe;

pub use observe::ObservedLayer;

/// A loaded model with activations of type `A`.
pub struct Model<B: Compute<A>, A: Element = f32> {
    network: Network<B, A>,
    weights: Weights,
    dtype: DType,
    scratch: Scratch<B, A>,
    inputs: StepInputs<B>,
    recordings: Recordings<B, A>,
    padded_tables: Vec<i32>,
    scales_from_next_step: bool,
    last: LastStep,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

/// What the last step left in the scratch.
#[derive(Default)]
struct LastStep {
    /// Rows that have logits.
    wanted: Vec<i32>,
    /// Whether it was one that is recorded.
    recorded: bool,
}

impl<B: Compute<A>, A: Element> std::fmt::Debug for Model<B, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", self.config()).field("dtype", &self.dtype).finish_non_exhaustive()
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
        let stored = weights.tensor("model.embed_tokens.weight")?.dtype();
        let network = Network::load(config, Source::Checkpoint(&weights), backend)?;
        Model::new(network, weights, stored)
    }

    /// A model of this configuration with made-up weights, stored in the configuration's dtype (bf16 if
    /// it names none): the same ones on every backend for the same seed. It says nothing of sense, at
    /// the speed of a real one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and what else the backend answers.
    pub fn random(config: Config, seed: u64, backend: Arc<B>) -> Result<Self> {
        let dtype = config.dtype.unwrap_or(DType::BF16);
        let network = Network::load(config, Source::Random { dtype, seed }, backend)?;
        Model::new(network, Weights::none(), dtype)
    }

    fn new(network: Network<B, A>, weights: Weights, stored: DType) -> Result<Self> {
        let backend = &*network.backend;
        Ok(Model {
            scratch: Scratch::new(backend)?,
            inputs: StepInputs::new(backend)?,
            recordings: Recordings::new(),
            padded_tables: Vec::new(),
            dtype: network.config.dtype.unwrap_or(stored),
            scales_from_next_step: false,
            last: LastStep::default(),
            logits: Vec::new(),
            tokens: Vec::new(),
            network,
            weights,
        })
    }

    /// What `config.json` said.
    pub fn config(&self) -> &Config {
        &self.network.config
    }

    /// The checkpoint's tensors, for KV scales; none if the weights are made up.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The model's own dtype, which `auto` means for the cache.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The backend the weights live on.
    pub fn backend(&self) -> &Arc<B> {
        &self.network.backend
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
    /// the caller has memory for, or [`Model::greedy`] the tokens they say.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for a batch that does not fit the vocabulary or the cache;
    /// [`Error::GeometryMismatch`] for a cache of another model; [`Error::OutOfMemory`]; the
    /// backend's own.
    pub fn compute(&mut self, batch: &Batch, cache: &mut PagedKvCache<B>) -> Result<()> {
        self.last = LastStep::default();
        self.check_cache(cache)?;
        batch.validate(self.config().vocab_size, cache.shape())?;
        let Model { network, scratch, .. } = self;
        scratch.reserve(&*network.backend, &network.config, batch.num_tokens(), cache)?;
        let recorded = network.backend.records() && batch.is_decode() && !self.scales_from_next_step;
        if recorded {
            self.replay(batch, cache)?;
        } else {
            self.run(batch, cache)?;
        }
        self.scales_from_next_step = false;
        self.last = LastStep { wanted: batch.logits_rows.clone(), recorded };
        Ok(())
    }

    fn run(&mut self, batch: &Batch, cache: &mut PagedKvCache<B>) -> Result<()> {
        let Model { network, scratch, inputs, padded_tables, .. } = self;
        let stride = batch.longest_table();
        batch.padded_tables(stride, padded_tables);
        inputs.set(&*network.backend, batch, padded_tables, stride)?;
        network.step(scratch, inputs, batch.num_tokens(), cache, self.scales_from_next_step)
    }

    fn replay(&mut self, batch: &Batch, cache: &mut PagedKvCache<B>) -> Result<()> {
        let Model { network, scratch, recordings, padded_tables, .. } = self;
        let (backend, rows) = (&*network.backend, batch.num_tokens());
        let stride = recorded_stride(batch.longest_table());
        batch.padded_tables(stride, padded_tables);
        let kind = StepKind { sequences: rows, stride };
        let step = recordings.step(backend, kind, scratch.generation, cache.identity())?;
        step.inputs.set(backend, batch, padded_tables, stride)?;
        let (inputs, recording) = (&step.inputs, &mut step.recording);
        let mut work = || network.step(scratch, inputs, rows, cache, false);
        // SAFETY: the recording is one of this kind of step over this generation of the scratch, this
        // cache and its own inputs, whose lengths the kind fixes: the work is the same, and all of
        // these are borrowed here, hence alive. The weights are this model's, as the recording is.
        unsafe { backend.run_recorded(recording, &mut work) }
    }

    fn check_cache(&self, cache: &PagedKvCache<B>) -> Result<()> {
        let (config, spec) = (self.config(), &cache.shape().spec);
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

    /// Rows of logits that are best computed at a time.
    pub fn logits_rows_at_once(&self) -> usize {
        self.backend().rows_at_once().logits
    }

    /// Logits `[range.len(), vocab_size]` of rows `range` among those that the batch of the last
    /// [`Model::compute`] wanted.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for rows it did not want; [`Error::OutOfMemory`]; the backend's own.
    pub fn logits(&mut self, range: Range<usize>) -> Result<&[f32]> {
        let rows = self.compute_logits(range, false)?;
        self.logits.clear();
        let len = checked_product("logits", &[rows, self.config().vocab_size])?;
        let bytes = len * size_of::<f32>();
        self.logits.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { what: "logits", bytes })?;
        self.logits.resize(len, 0.0);
        if rows > 0 {
            self.network.backend.download(&self.scratch.logits, &mut self.logits)?;
        }
        Ok(&self.logits)
    }

    /// The greedy tokens of rows `range` among those that the batch of the last [`Model::compute`]
    /// wanted: of each the largest logit, the lowest id of equals. The logits stay where they are; only
    /// the ids come back.
    ///
    /// # Errors
    /// As [`Model::logits`], and [`Error::InvalidNumber`] if no logit of a row is a number.
    pub fn greedy(&mut self, range: Range<usize>) -> Result<&[u32]> {
        let rows = self.compute_logits(range, true)?;
        let mut ids = vec![0; rows];
        if rows > 0 {
            self.network.backend.download(&self.scratch.greedy, &mut ids)?;
        }
        self.tokens.clear();
        for id in ids {
            self.tokens.push(u32::try_from(id).map_err(|_| no_logit())?);
        }
        Ok(&self.tokens)
    }

    /// Leaves the logits of these rows, and if `greedy` their tokens, in the scratch; how many rows.
    fn compute_logits(&mut self, range: Range<usize>, greedy: bool) -> Result<usize> {
        let Model { network, scratch, recordings, last, .. } = self;
        let (backend, vocab_size) = (&*network.backend, network.config.vocab_size);
        let Some(wanted) = last.wanted.get(range.clone()) else {
            let have = last.wanted.len();
            return Err(Error::InvalidRequest(format!("logits of rows {range:?}; the last step wanted {have}")));
        };
        let rows = wanted.len();
        if rows == 0 {
            return Ok(0);
        }
        scratch.reserve_logits(backend, vocab_size, rows)?;
        backend.upload(wanted, &mut scratch.logits_rows)?;
        let generation = scratch.generation;
        let mut work = || {
            network.logits(scratch, rows)?;
            if greedy {
                backend.greedy(&scratch.logits, rows, vocab_size, &mut scratch.greedy)?;
            }
            Ok(())
        };
        if last.recorded {
            let recording = recordings.logits(LogitsKind { rows, greedy }, generation);
            // SAFETY: the recording is one of this many rows over this generation of the scratch, which
            // is borrowed here, as are the weights.
            unsafe { backend.run_recorded(recording, &mut work) }?;
        } else {
            work()?;
        }
        Ok(rows)
    }

    /// The cache geometry this model needs.
    ///
    /// # Errors
    /// [`CacheSpec::new`].
    pub fn cache_spec(&self, block_size: usize, format: crate::format::KvFormat) -> Result<CacheSpec> {
        CacheSpec::new(self.config().num_kv_heads, self.config().head_dim, block_size, format)
    }
}

impl<B: Compute<A>, A: Element> Network<B, A> {
    fn load(config: Config, source: Source<'_>, backend: Arc<B>) -> Result<Self> {
        let loader = Loader { backend: &*backend, source, config: &config };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let inverse_frequencies = config.rope.inverse_frequencies();
        let mut inv_freq = backend.zeros("inverse frequencies", inverse_frequencies.len())?;
        backend.upload(&inverse_frequencies, &mut inv_freq)?;
        Ok(Network {
            embedding: loader.matrix::<A>("model.embed_tokens.weight", vocab, hidden)?,
            layers: (0..config.num_layers).map(|layer| loader.layer(layer)).collect::<Result<_>>()?,
            norm: loader.vector("model.norm.weight", hidden, 1.0)?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(loader.matrix::<A>("lm_head.weight", vocab, hidden)?),
            },
            inv_freq,
            config,
            backend,
        })
    }
}
