//! The engine: many requests through one model and one paged cache.
//!
//! ```text
//! add_request ──> Scheduler ──Step──> copy_blocks, swap_blocks ──> Model::forward ──> Sampler
//!                     ^                                                                  │
//!                     └──────────── one token more for each row that samples <───────────┘
//! ```
//! A step mixes decoding sequences, one token each, with chunks of prompts (continuous batching).
//! Sequences that begin alike share blocks; samples of one prompt share all of them until they
//! write (copy-on-write through `copy_blocks`); when blocks run out sequences wait in host memory
//! (`swap_blocks`). None of this changes what is generated: a row of the model depends on its own
//! sequence alone, and every sample draws from a generator of its own. (Scales that are computed on the
//! way depend on the requests before: `scales.rs` says on what.)

mod request;
mod scales;
mod scheduler;
mod sequence;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

pub use request::{Event, FinishReason, LastStep, Output, Request, Stats};
use scales::Scales;
use scheduler::{Limits, Move, Row, Scheduler, Step};
use sequence::Sequence;

use super::compute::Compute;
use super::kv_scales::KvScales;
use super::model::Model;
use super::sampling::Sampler;
use super::text::TextStream;
use super::tokenizer::Tokenizer;
use super::{Batch, WantedLogits};
use crate::blocks::BlockPool;
use crate::cache::{HostPool, PagedKvCache};
use crate::error::{Error, Result};
use crate::format::{Element, KvFormat};

/// Samples one request may ask for.
const MAX_SAMPLES: usize = 4096;

/// Sizes and switches of an [`Engine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// How keys and values are stored.
    pub format: KvFormat,
    /// Tokens in a block.
    pub block_size: usize,
    /// Blocks in the cache.
    pub num_blocks: usize,
    /// Blocks in host memory for preempted sequences; allocated when the first one is. Where they
    /// do not suffice, sequences are computed again.
    pub swap_blocks: usize,
    /// Prompt tokens computed in one step.
    pub max_prefill_tokens: usize,
    /// Sequences that run at once (samples forked from them come on top).
    pub max_num_seqs: usize,
    /// Whether sequences that begin alike share blocks.
    pub prefix_sharing: bool,
}

impl EngineConfig {
    /// A cache of `num_blocks` blocks of 16 tokens, as many in host memory, prompts in chunks of
    /// 512, 32 sequences at once, with prefix sharing.
    pub fn new(format: KvFormat, num_blocks: usize) -> Self {
        EngineConfig {
            format,
            block_size: 16,
            num_blocks,
            swap_blocks: num_blocks,
            max_prefill_tokens: 512,
            max_num_seqs: 32,
            prefix_sharing: true,
        }
    }
}

/// Generates text. Borrows the model, so that several caches can be tried with it.
#[derive(Debug)]
pub struct Engine<'m, B: Compute<A>, A: Element = f32> {
    model: &'m mut Model<B, A>,
    tokenizer: Option<Arc<Tokenizer>>,
    config: EngineConfig,
    cache: PagedKvCache<B>,
    host: Option<HostPool>,
    scheduler: Scheduler,
    requests: Vec<(Request, Vec<Output>)>,
    scales: Scales,
    stats: Stats,
    last_step: LastStep,
    batch: Batch,
}

impl<'m, B: Compute<A>, A: Element> Engine<'m, B, A> {
    /// Allocates the cache. Without a tokenizer there is no text, and no stop strings.
    ///
    /// # Errors
    /// What [`Model::cache_spec`], [`PagedKvCache::new`] and [`BlockPool::new`] refuse;
    /// [`Error::Zero`] for limits of zero.
    pub fn new(
        model: &'m mut Model<B, A>,
        tokenizer: Option<Arc<Tokenizer>>,
        config: EngineConfig,
        scales: &KvScales,
    ) -> Result<Self> {
        if config.max_prefill_tokens == 0 {
            return Err(Error::Zero { what: "the prompt tokens of a step" });
        }
        if config.max_num_seqs == 0 {
            return Err(Error::Zero { what: "the number of sequences that run at once" });
        }
        let spec = scales.cache_spec(model.cache_spec(config.block_size, config.format)?)?;
        let cache = PagedKvCache::new(Arc::clone(model.backend()), spec, config.num_blocks, &scales.layers)?;
        let pool = match config.prefix_sharing {
            true => BlockPool::with_prefix_cache(config.num_blocks, config.block_size)?,
            false => BlockPool::new(config.num_blocks, config.block_size)?,
        };
        let limits = Limits { max_prefill_tokens: config.max_prefill_tokens, max_num_seqs: config.max_num_seqs };
        Ok(Engine {
            scheduler: Scheduler::new(pool, config.swap_blocks, limits)?,
            scales: Scales::new(scales, spec)?,
            host: None,
            requests: Vec::new(),
            stats: Stats::default(),
            last_step: LastStep::default(),
            batch: Batch::new(),
            model,
            tokenizer,
            config,
            cache,
        })
    }

    /// The cache.
    pub fn cache(&self) -> &PagedKvCache<B> {
        &self.cache
    }

    /// Counters so far.
    pub fn stats(&self) -> Stats {
        let scales_frozen = self.scales.are_frozen();
        Stats { blocks_peak: self.scheduler.pool.peak_in_use(), scales_frozen, ..self.stats }
    }

    /// What the latest step computed, and how long it took.
    pub fn last_step(&self) -> LastStep {
        self.last_step
    }

    /// Blocks that sequences use now; blocks kept for sharing alone are not among them.
    pub fn blocks_in_use(&self) -> usize {
        self.scheduler.pool.num_in_use()
    }

    /// Whether some request has not ended.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    /// The samples of a request so far.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for a number [`Engine::add_request`] did not give.
    pub fn outputs(&self, request: usize) -> Result<&[Output]> {
        match self.requests.get(request) {
            Some((_, outputs)) => Ok(outputs),
            None => Err(Error::InvalidRequest(format!("there is no request {request}"))),
        }
    }

    /// Queues a request and returns its number: 0 for the first, and so on.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for a request that cannot be served, such as a prompt longer than
    /// the model's positions, or one that an otherwise empty cache has too few blocks for.
    pub fn add_request(&mut self, request: Request) -> Result<usize> {
        let max_len = self.check(&request)?;
        let number = self.requests.len();
        self.scheduler.add(Sequence {
            request: number,
            sample: 0,
            tokens: request.prompt.clone(),
            prompt_len: request.prompt.len(),
            max_len,
            observed: 0,
            forks: request.n - 1,
            sampler: Sampler::new(request.sampling, 0)?,
            text: TextStream::default(),
            finished: false,
        });
        let outputs = vec![Output::default(); request.n];
        self.requests.push((request, outputs));
        Ok(number)
    }

    /// The tokens the request may have at most.
    fn check(&self, request: &Request) -> Result<usize> {
        let invalid = |reason: String| Err(Error::InvalidRequest(reason));
        let (prompt_len, model) = (request.prompt.len(), self.model.config());
        let (vocab_size, positions) = (model.vocab_size, model.max_position_embeddings);
        if prompt_len == 0 {
            return invalid("the prompt has no tokens".into());
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= vocab_size) {
            return invalid(format!("token id {id} of the prompt is outside the vocabulary of {vocab_size}"));
        }
        if prompt_len >= positions {
            return invalid(format!(
                "the prompt has {prompt_len} tokens; the model has {positions} positions, one of them for an answer"
            ));
        }
        if request.n == 0 || request.max_tokens == 0 {
            return invalid("the number of samples and the tokens to generate must not be zero".into());
        }
        if request.n > MAX_SAMPLES {
            return invalid(format!("{} samples are asked for; the most are {MAX_SAMPLES}", request.n));
        }
        if request.stop.iter().any(String::is_empty) {
            return invalid("a stop text must not be empty".into());
        }
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return invalid("stop texts need a tokenizer, and the model has none".into());
        }
        request.sampling.validate()?;
        let max_len = prompt_len.saturating_add(request.max_tokens).min(positions);
        // The last token is never written to the cache.
        let (block_size, have) = (self.config.block_size, self.config.num_blocks);
        let needed = (max_len - 1).div_ceil(block_size);
        if needed > have {
            return invalid(format!(
                "a prompt of {prompt_len} tokens and up to {} more need {needed} blocks of {block_size} tokens; \
                 the cache has {have}",
                max_len - prompt_len
            ));
        }
        Ok(max_len)
    }

    /// Runs until every request has ended.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn run(&mut self, mut on_event: impl FnMut(Event<'_>)) -> Result<()> {
        while self.has_work() {
            self.step(&mut on_event)?;
        }
        Ok(())
    }

    /// Runs one step and reports the tokens it made.
    ///
    /// # Errors
    /// [`Error::InvalidNumber`] if the model computes no number; [`Error::OutOfMemory`]; the
    /// backend's own. The engine is not to be used after an error.
    pub fn step(&mut self, mut on_event: impl FnMut(Event<'_>)) -> Result<()> {
        let started = Instant::now();
        // Tokens whose values become the scales are the first requests' one after the other, so that
        // they do not depend on what else was asked.
        let step = self.scheduler.schedule(!self.scales.are_frozen())?;
        self.stats.steps += 1;
        self.last_step = LastStep::default();
        self.stats.shared_tokens += step.shared_tokens;
        self.stats.recomputed += step.recomputed;
        self.move_blocks(&step.moves)?;
        if step.rows.is_empty() {
            return Ok(());
        }
        self.fill_batch(&step.rows)?;
        self.compute(&step.rows)?;
        let sampling: Vec<usize> = step.rows.iter().filter(|row| row.samples).map(|row| row.index).collect();
        let at_once = self.model.logits_rows_at_once();
        for (chunk, running) in sampling.chunks(at_once).enumerate() {
            let first = chunk * at_once;
            self.sample(running, first..first + running.len(), &mut on_event)?;
        }
        self.scheduler.remove_finished(|sequence| sequence.finished)?;
        self.count(&step, started.elapsed().as_secs_f64());
        Ok(())
    }

    fn move_blocks(&mut self, moves: &[Move]) -> Result<()> {
        for pairs in moves {
            match pairs {
                Move::Copy(pairs) if pairs.is_empty() => {}
                Move::Copy(pairs) => {
                    self.cache.copy_blocks(pairs)?;
                    self.stats.blocks_copied += pairs.len();
                }
                Move::SwapOut(pairs) => {
                    let host = match &mut self.host {
                        Some(host) => host,
                        none => none.insert(self.cache.host_pool(self.config.swap_blocks)?),
                    };
                    self.cache.swap_out(host, pairs)?;
                    self.stats.blocks_swapped_out += pairs.len();
                }
                Move::SwapIn(pairs) => {
                    if let Some(host) = &self.host {
                        self.cache.swap_in(host, pairs)?;
                        self.stats.blocks_swapped_in += pairs.len();
                    }
                }
            }
        }
        Ok(())
    }

    fn fill_batch(&mut self, rows: &[Row]) -> Result<()> {
        self.batch.clear();
        for row in rows {
            let running = &self.scheduler.running[row.index];
            let tokens = &running.sequence.tokens[row.start..row.start + row.len];
            let wanted = if row.samples { WantedLogits::Last } else { WantedLogits::None };
            self.batch.push_sequence(tokens, row.start, running.table.blocks(), self.config.block_size, wanted)?;
        }
        Ok(())
    }

    /// Samples a token for each of the `running` sequences from its row of logits, `rows` of those that
    /// the step computed; a prompt's first one for each of its samples. Where all are greedy only the
    /// tokens leave the backend's memory.
    fn sample(&mut self, running: &[usize], rows: Range<usize>, on_event: &mut impl FnMut(Event<'_>)) -> Result<()> {
        let plain_greedy = |index: &usize| self.scheduler.running[*index].sequence.sampler.params().is_plain_greedy();
        if running.iter().all(plain_greedy) {
            let tokens = self.model.greedy(rows)?.to_vec();
            return running.iter().zip(tokens).try_for_each(|(&index, token)| {
                self.with_forks(index, |engine, index| engine.next_token(index, token, on_event))
            });
        }
        let vocab_size = self.model.config().vocab_size;
        let logits = self.model.logits(rows)?.to_vec();
        for (&index, logits) in running.iter().zip(logits.chunks_exact(vocab_size)) {
            // Penalties overwrite logits; samples of one prompt begin with the same.
            let mut scratch = Vec::new();
            self.with_forks(index, |engine, index| {
                scratch.clear();
                scratch.extend_from_slice(logits);
                let sequence = &mut engine.scheduler.running[index].sequence;
                let token = sequence.sampler.sample(&mut scratch, &sequence.tokens, sequence.prompt_len)?;
                engine.next_token(index, token, on_event)
            })?;
        }
        Ok(())
    }

    /// Calls `sample` for each sample that is still to be forked off `index`, and then for `index` itself.
    fn with_forks(&mut self, index: usize, mut sample: impl FnMut(&mut Self, usize) -> Result<()>) -> Result<()> {
        let forks = std::mem::take(&mut self.scheduler.running[index].sequence.forks);
        for number in 1..=forks {
            let fork = self.fork(index, number)?;
            sample(self, fork)?;
        }
        sample(self, index)
    }

    fn fork(&mut self, parent: usize, sample: usize) -> Result<usize> {
        let sequence = &self.scheduler.running[parent].sequence;
        let (request, _) = &self.requests[sequence.request];
        let fork = Sequence {
            sample,
            sampler: Sampler::new(request.sampling, sample as u64)?,
            tokens: sequence.tokens.clone(),
            text: TextStream::default(),
            ..*sequence
        };
        self.scheduler.fork(parent, fork)
    }

    /// Appends a token to the sequence `index` and reports it.
    fn next_token(&mut self, index: usize, token: u32, on_event: &mut impl FnMut(Event<'_>)) -> Result<()> {
        let sequence = &mut self.scheduler.running[index].sequence;
        let (request, outputs) = &mut self.requests[sequence.request];
        let output = &mut outputs[sequence.sample];
        sequence.tokens.push(token);
        output.token_ids.push(token);

        let is_eos = request.eos_token_ids.contains(&token);
        let is_full = sequence.tokens.len() >= sequence.max_len;
        let (mut text, mut stopped) = (String::new(), false);
        if let Some(tokenizer) = &self.tokenizer {
            if !is_eos {
                let progress = sequence.text.push(tokenizer, token, &request.stop)?;
                (text, stopped) = (progress.new, progress.stopped);
            }
            if (is_eos || is_full) && !stopped {
                let progress = sequence.text.finish(tokenizer, &request.stop)?;
                text.push_str(&progress.new);
                stopped = progress.stopped;
            }
        }
        output.finish_reason = match (is_eos || stopped, is_full) {
            (true, _) => Some(FinishReason::Stop),
            (_, true) => Some(FinishReason::Length),
            _ => None,
        };
        sequence.finished = output.finish_reason.is_some();
        output.text.push_str(&text);
        let (request, sample) = (sequence.request, sequence.sample);
        on_event(Event { request, sample, token, text: &text, finish_reason: output.finish_reason });
        Ok(())
    }

    fn count(&mut self, step: &Step, seconds: f64) {
        let prefill: usize = step.rows.iter().filter(|row| row.prefill).map(|row| row.len).sum();
        let all: usize = step.rows.iter().map(|row| row.len).sum();
        let share = prefill as f64 / all as f64;
        self.last_step = LastStep {
            prefill_tokens: prefill,
            decode_tokens: all - prefill,
            cached_tokens: self.batch.seq_lens.iter().map(|len| *len as usize).sum(),
            seconds,
        };
        self.stats.prefill_tokens += prefill;
        self.stats.prefill_seconds += seconds * share;
        self.stats.decode_tokens += all - prefill;
        self.stats.decode_seconds += seconds * (1.0 - share);
    }
}
