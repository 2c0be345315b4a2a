//! The buffers of a step: activations, and the lists that say which tokens they are of.
//!
//! ```text
//! Scratch     activations [rows, ...], rotary tables, workspace, logits     they only grow
//! StepInputs  ids, positions, slots, lengths, block tables of one step      exact lengths
//! ```
//! A recorded step (a CUDA graph) holds addresses. Its inputs are therefore a set of its own, written
//! before each replay; and whenever a scratch buffer grows, its `generation` says so and recordings
//! are forgotten.

use super::batch::Batch;
use super::compute::Compute;
use super::config::Config;
use crate::backend::Backend;
use crate::cache::{AttentionBatch, PagedKvCache};
use crate::error::Result;
use crate::format::{Element, Pod};
use crate::layout::checked_product;
use crate::memory::BufferLen;

/// Activations of one step. They only grow.
pub(super) struct Scratch<B: Compute<A>, A: Element> {
    pub x: B::Buffer<A>,
    pub normed: B::Buffer<A>,
    /// What is added to `x` next.
    pub update: B::Buffer<A>,
    pub q: B::Buffer<A>,
    pub k: B::Buffer<A>,
    pub v: B::Buffer<A>,
    pub attended: B::Buffer<A>,
    pub gate: B::Buffer<A>,
    pub up: B::Buffer<A>,
    pub cos: B::Buffer<f32>,
    pub sin: B::Buffer<f32>,
    pub workspace: B::Buffer<f32>,
    pub logits: B::Buffer<f32>,
    /// Rows of `x` that logits are computed of.
    pub logits_rows: B::Buffer<i32>,
    /// The largest logit of each.
    pub greedy: B::Buffer<i32>,
    /// Changes with any address.
    pub generation: u64,
}

impl<B: Compute<A>, A: Element> Scratch<B, A> {
    pub fn new(backend: &B) -> Result<Self> {
        let activation = || backend.zeros::<A>("activations", 0);
        let floats = || backend.zeros::<f32>("activations", 0);
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
            logits_rows: backend.zeros("logit rows", 0)?,
            greedy: backend.zeros("greedy tokens", 0)?,
            generation: 0,
        })
    }

    /// Makes room for a step of `rows` tokens.
    pub fn reserve(&mut self, backend: &B, config: &Config, rows: usize, cache: &PagedKvCache<B>) -> Result<()> {
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let mlp_rows = rows.min(backend.rows_at_once().mlp);
        let generation = &mut self.generation;
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
            grow(backend, "activations", checked_product("activations", &[rows, width])?, buffer, generation)?;
        }
        for buffer in [&mut self.cos, &mut self.sin] {
            let len = checked_product("rotary tables", &[rows, config.head_dim / 2])?;
            grow(backend, "rotary tables", len, buffer, generation)?;
        }
        let workspace = cache.workspace_len(config.num_heads, rows);
        grow(backend, "attention workspace", workspace, &mut self.workspace, generation)
    }

    /// Makes room for the logits of `rows` rows.
    pub fn reserve_logits(&mut self, backend: &B, vocab_size: usize, rows: usize) -> Result<()> {
        let generation = &mut self.generation;
        let len = checked_product("logits", &[rows, vocab_size])?;
        grow(backend, "logits", len, &mut self.logits, generation)?;
        grow(backend, "logit rows", rows, &mut self.logits_rows, generation)?;
        grow(backend, "greedy tokens", rows, &mut self.greedy, generation)
    }
}

/// Makes `buffer` at least `len` elements long; its contents are lost if it grows.
fn grow<B: Backend, T: Pod>(
    backend: &B,
    what: &'static str,
    len: usize,
    buffer: &mut B::Buffer<T>,
    generation: &mut u64,
) -> Result<()> {
    if backend.view(buffer).buffer_len() < len {
        *generation += 1;
        *buffer = backend.zeros(what, 0)?;
        *buffer = backend.zeros(what, len)?;
    }
    Ok(())
}

/// A list in the backend's memory, and what was last written there.
struct Uploaded<B: Backend, T: Pod> {
    device: B::Buffer<T>,
    host: Vec<T>,
}

impl<B: Backend, T: Pod + PartialEq> Uploaded<B, T> {
    fn new(backend: &B) -> Result<Self> {
        Ok(Uploaded { device: backend.zeros("step inputs", 0)?, host: Vec::new() })
    }

    /// Makes the list exactly `values`; in place unless its length changes.
    fn set(&mut self, backend: &B, values: &[T]) -> Result<()> {
        if self.host == values {
            return Ok(());
        }
        if backend.view(&self.device).buffer_len() != values.len() {
            self.device = backend.zeros("step inputs", values.len())?;
        }
        self.host.clear();
        backend.upload(values, &mut self.device)?;
        self.host.extend_from_slice(values);
        Ok(())
    }
}

/// The lists of one step, of the exact lengths that the cache operations take as the number of tokens
/// and sequences.
pub(super) struct StepInputs<B: Backend> {
    ids: Uploaded<B, i32>,
    positions: Uploaded<B, i32>,
    slots: Uploaded<B, i64>,
    query_starts: Uploaded<B, i32>,
    seq_lens: Uploaded<B, i32>,
    block_tables: Uploaded<B, i32>,
    block_table_stride: usize,
    max_query_len: usize,
}

impl<B: Backend> StepInputs<B> {
    pub fn new(backend: &B) -> Result<Self> {
        Ok(StepInputs {
            ids: Uploaded::new(backend)?,
            positions: Uploaded::new(backend)?,
            slots: Uploaded::new(backend)?,
            query_starts: Uploaded::new(backend)?,
            seq_lens: Uploaded::new(backend)?,
            block_tables: Uploaded::new(backend)?,
            block_table_stride: 0,
            max_query_len: 0,
        })
    }

    /// Uploads the lists of `batch` and its tables, `[sequences, stride]`. A list as long as the one
    /// before keeps its address.
    pub fn set(&mut self, backend: &B, batch: &Batch, tables: &[i32], stride: usize) -> Result<()> {
        self.block_table_stride = stride;
        self.max_query_len = batch.max_query_len();
        self.ids.set(backend, &batch.token_ids)?;
        self.positions.set(backend, &batch.positions)?;
        self.slots.set(backend, &batch.slot_mapping)?;
        self.query_starts.set(backend, &batch.query_starts)?;
        self.seq_lens.set(backend, &batch.seq_lens)?;
        self.block_tables.set(backend, tables)
    }

    pub fn ids(&self) -> &B::Buffer<i32> {
        &self.ids.device
    }

    pub fn positions(&self) -> &B::Buffer<i32> {
        &self.positions.device
    }

    pub fn slots<'a>(&'a self, backend: &B) -> B::Ref<'a, i64> {
        backend.view(&self.slots.device)
    }

    /// What attention needs of them.
    pub fn attention<'a>(&'a self, backend: &B, num_tokens: usize) -> AttentionBatch<'a, B> {
        AttentionBatch {
            num_tokens,
            max_query_len: Some(self.max_query_len),
            query_starts: backend.view(&self.query_starts.device),
            seq_lens: backend.view(&self.seq_lens.device),
            block_tables: backend.view(&self.block_tables.device),
            block_table_stride: self.block_table_stride,
        }
    }
}
