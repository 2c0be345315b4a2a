//! All rows of one model.
//!
//! ```text
//! calibration texts ──> calibration.rs ──> each row's scales
//! each text:  the reference's logits, then every row's, position by position     (score.rs)
//! each row:   greedy continuations of all prompts, against the reference's       (greedy.rs)
//! ```

use std::sync::Arc;

use indicatif::ProgressBar;
use quantkv::decoder::tokenizer::Tokenizer;
use quantkv::decoder::{Batch, Compute, Model, WantedLogits};
use quantkv::layout::CacheSpec;
use quantkv::scale::LayerScales;
use quantkv::{Element, KvFormat, Result};

use crate::cache::{CachePlan, RowCache};
use crate::calibration::Calibrations;
use crate::data::{Data, Prompt};
use crate::greedy::{self, Greedy};
use crate::metrics::{Position, Summary, first_divergence};
use crate::rows::{HandOver, Row, Scales, reference_of};
use crate::score::{Reference, blocks_for, score};
use crate::tales;

/// Tokens in a block.
pub const BLOCK_SIZE: usize = 16;

/// What a row came to.
pub struct Measured {
    pub row: &'static Row,
    /// Of the cache that is read.
    pub format: KvFormat,
    pub bytes_per_token: usize,
    /// Smallest and largest static scale of K and of V of all layers, of the cache that is read.
    pub k_scale: (f32, f32),
    pub v_scale: (f32, f32),
    pub scores: Summary,
    /// For each prompt the first token that differs from the reference's.
    pub divergence: Vec<Option<usize>>,
    /// Answers to tales that repeat the fact, and tales.
    pub recalled: usize,
    pub tales: usize,
}

/// The cache or caches of a row.
struct Plan {
    row: &'static Row,
    writer: CachePlan,
    reader: Option<CachePlan>,
}

impl Plan {
    /// What is read in the end.
    fn read(&self) -> &CachePlan {
        self.reader.as_ref().unwrap_or(&self.writer)
    }

    fn allocate<B: Compute<A>, A: Element>(&self, model: &Model<B, A>, num_blocks: usize) -> Result<RowCache<B>> {
        RowCache::new(model.backend(), &self.writer, self.reader.as_ref(), num_blocks)
    }
}

/// Everything that rows of one model need.
pub struct Run<'a> {
    pub data: &'a Data,
    pub calibrations: &'a Calibrations,
    pub tokenizer: Option<&'a Arc<Tokenizer>>,
    pub greedy: Greedy<'a>,
    pub bar: &'a ProgressBar,
}

impl Run<'_> {
    /// Measures `rows`, all of one model, against its reference.
    pub fn measure<B: Compute<A>, A: Element>(
        &self,
        model: &mut Model<B, A>,
        rows: &[&'static Row],
    ) -> Result<Vec<Measured>> {
        let plans: Vec<Plan> = rows.iter().map(|row| self.plan(model, row)).collect::<Result<_>>()?;
        let reference = self.plan(model, reference_of(rows[0].variant))?;
        let scores = self.scores(model, &plans, &reference)?;
        let expected = self.continuations(model, &reference)?;
        let mut measured = Vec::new();
        for (plan, texts) in plans.iter().zip(&scores) {
            let got = self.continuations(model, plan)?;
            let right = |(prompt, tokens): (&Prompt, &Vec<u32>)| self.is_recalled(prompt, tokens);
            measured.push(Measured {
                row: plan.row,
                format: plan.read().spec.k_format,
                bytes_per_token: plan.read().bytes_per_token()?,
                k_scale: span(plan.read().scales.iter().flat_map(|layer| layer.k.values())),
                v_scale: span(plan.read().scales.iter().flat_map(|layer| layer.v.values())),
                scores: Summary::new(texts),
                divergence: got.iter().zip(&expected).map(|(a, b)| first_divergence(a, b)).collect(),
                recalled: self.data.prompts.iter().zip(&got).map(right).sum::<Result<usize>>()?,
                tales: self.data.prompts.iter().filter(|prompt| prompt.answer.is_some()).count(),
            });
        }
        Ok(measured)
    }

    fn plan<B: Compute<A>, A: Element>(&self, model: &mut Model<B, A>, row: &'static Row) -> Result<Plan> {
        let format = row.format.unwrap_or(model.dtype().as_kv_format());
        let spec = model.cache_spec(BLOCK_SIZE, format)?;
        let scales = match row.scales {
            Scales::Unused | Scales::One | Scales::Dynamic => vec![LayerScales::one(); model.config().num_layers],
            Scales::Calibrated(observer, granularity) => self.calibrations.scales(observer, granularity),
            Scales::TooSmall(by) => self.calibrations.too_small(by)?,
            Scales::FirstBatch => first_batch_scales(model, spec, &self.data.calibration[0])?,
        };
        let spec = if row.scales == Scales::Dynamic { spec.with_dynamic_scales()? } else { spec };
        // Scales are made for the codes of OCP; a FNUZ code of the same byte is half of it.
        let doubled = format == KvFormat::Fp8E4M3Fnuz && row.hand_over != Some(HandOver::NotDoubled);
        let written = if doubled { double(&scales)? } else { scales.clone() };
        let reader = match row.hand_over {
            None => None,
            Some(hand_over) => Some(CachePlan {
                spec: model.cache_spec(BLOCK_SIZE, KvFormat::Fp8E4M3)?,
                scales: match hand_over {
                    HandOver::WritersScales => written.clone(),
                    HandOver::NotDoubled | HandOver::CheckpointScales => scales,
                },
            }),
        };
        Ok(Plan { row, writer: CachePlan { spec, scales: written }, reader })
    }

    /// For each row the positions of each text.
    fn scores<B: Compute<A>, A: Element>(
        &self,
        model: &mut Model<B, A>,
        plans: &[Plan],
        reference: &Plan,
    ) -> Result<Vec<Vec<Vec<Position>>>> {
        let longest = self.data.evaluation.iter().map(Vec::len).max().unwrap_or(0);
        let num_blocks = blocks_for(longest, BLOCK_SIZE).len();
        let mut caches = plans.iter().map(|plan| plan.allocate(model, num_blocks)).collect::<Result<Vec<_>>>()?;
        let mut reference_cache = reference.allocate(model, num_blocks)?;
        let mut scores = vec![Vec::new(); plans.len()];
        for text in &self.data.evaluation {
            let reference = Reference::new(model, &mut reference_cache, text)?;
            let distributions = reference.distributions();
            for (cache, scores) in caches.iter_mut().zip(&mut scores) {
                scores.push(score(model, cache, text, &distributions)?);
                self.bar.inc(1);
            }
        }
        Ok(scores)
    }

    fn continuations<B: Compute<A>, A: Element>(&self, model: &mut Model<B, A>, plan: &Plan) -> Result<Vec<Vec<u32>>> {
        let prompts: Vec<&[u32]> = self.data.prompts.iter().map(|prompt| &prompt.ids[..]).collect();
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let mut cache = plan.allocate(model, self.greedy.blocks_needed(longest, BLOCK_SIZE))?;
        self.greedy.run(model, &mut cache, &prompts, || self.bar.inc(1))
    }

    fn is_recalled(&self, prompt: &Prompt, tokens: &[u32]) -> Result<usize> {
        match (self.tokenizer, &prompt.answer) {
            (Some(tokenizer), Some(answer)) => {
                Ok(usize::from(tales::recalls(&tokenizer.decode(tokens, true)?, answer)))
            }
            _ => Ok(0),
        }
    }
}

/// Bytes that caches of `rows` rows and logits of a text take at most, in f32; saturates.
pub fn memory_needed<B: Compute<A>, A: Element>(
    model: &Model<B, A>,
    data: &Data,
    max_tokens: usize,
    rows: usize,
) -> Result<usize> {
    let config = model.config();
    let spec = model.cache_spec(BLOCK_SIZE, KvFormat::F32)?;
    let token = spec.bytes_per_token()?.saturating_mul(config.num_layers);
    let longest = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or(0);
    let text = longest(&mut data.evaluation.iter().map(Vec::len));
    let prompt = longest(&mut data.prompts.iter().map(|prompt| prompt.ids.len()));
    let scoring = token.saturating_mul(text + BLOCK_SIZE).saturating_mul(rows);
    let logits = config.vocab_size.saturating_mul(text).saturating_mul(size_of::<f32>());
    let decoding = token.saturating_mul(prompt.saturating_add(max_tokens)).saturating_mul(greedy::GROUP);
    Ok(scoring.saturating_add(logits).max(decoding))
}

/// The scales that the first forward pass leaves, as vLLM's `calculate_kv_scales` does.
fn first_batch_scales<B: Compute<A>, A: Element>(
    model: &mut Model<B, A>,
    spec: CacheSpec,
    text: &[u32],
) -> Result<Vec<LayerScales>> {
    let layers = model.config().num_layers;
    let blocks = blocks_for(text.len(), BLOCK_SIZE);
    let plan = CachePlan { spec, scales: vec![LayerScales::one(); layers] };
    let mut cache = plan.allocate(model.backend(), blocks.len())?;
    let mut batch = Batch::new();
    batch.push_sequence(text, 0, &blocks, BLOCK_SIZE, WantedLogits::None)?;
    model.scales_from_next_step();
    model.compute(&batch, &mut cache)?;
    (0..layers).map(|layer| cache.scales(layer)).collect()
}

fn double(scales: &[LayerScales]) -> Result<Vec<LayerScales>> {
    let double = |(layer, scales): (usize, &LayerScales)| {
        Ok(LayerScales {
            k: scales.k.doubled_for_fnuz(&format!("layer {layer} k_scale"))?,
            v: scales.v.doubled_for_fnuz(&format!("layer {layer} v_scale"))?,
        })
    };
    scales.iter().enumerate().map(double).collect()
}

fn span<'a>(values: impl Iterator<Item = &'a f32>) -> (f32, f32) {
    values.fold((f32::INFINITY, 0.0), |(min, max), value| (min.min(*value), max.max(*value)))
}
