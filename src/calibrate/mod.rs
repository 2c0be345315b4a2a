//! Scales from data: a model is run over samples, and what its keys (after RoPE) and values reach in each
//! layer becomes the scales of an FP8 E4M3 cache.
//!
//! ```text
//! Runner        model + unquantized cache: a sample in, the keys and values of each layer out
//! Calibration   for each (layer, K or V) and group: largest |x|, moving minimum and maximum, histogram
//! Observer      which of these become a scale
//! Report        the scales, and what they would have done to the data seen
//! ```
//! A *group* is what shares a scale: the tensor, a KV head, or a channel of a KV head ([`Granularity`]).
//! Each sample runs from an empty cache of the activations' own type, so ranges are those of the model
//! without quantization.
//!
//! # Which observer
//!
//! [`Observer::Absmax`], unless there is a reason. E4M3 is a floating-point format: between its largest
//! and its smallest normal number the relative error is the same everywhere, so a scale twice too large
//! costs next to nothing, while one too small cuts off the largest keys, which are those that decide what
//! attention looks at. Clipping is the failure to fear.
//!
//! | observer | scale covers | use it for |
//! |---|---|---|
//! | `absmax` | everything seen | serving |
//! | `llmcompressor` | a moving average of each sample's extremes, dominated by the first sample | the same scales as LLM Compressor's default gives |
//! | `mse` | what minimises the squared round-trip error | experiments; gains little on a floating-point format |
//! | `percentile=P` | P % of the values | data with outliers that are known to be garbage |
//!
//! Strategies: `tensor` is what every reader takes, `head` helps where heads differ in range by more than
//! E4M3's 2^15 (rare) and is read by vLLM with some attention backends, `channel` is this crate's own
//! extension and is read by nothing else.

mod group;
mod histogram;
mod moving;
mod mse;
mod observer;
mod report;
mod runner;

use rayon::prelude::*;

use crate::decoder::{Config, ObservedLayer};
use crate::error::{Error, Result};
use crate::format::{DType, Element};
use crate::scale::Granularity;

use group::Group;

pub use histogram::Histogram;
pub use moving::MovingRange;
pub use mse::SquaredErrorSearch;
pub use observer::Observer;
pub use report::{HalfReport, LayerReport};
pub use runner::{Progress, Runner};

/// The largest code of FP8 E4M3, which the format of calibrated scales is.
pub(crate) const LARGEST_CODE: f32 = 448.0;

/// What was seen of the keys and of the values of a model.
#[derive(Debug)]
pub struct Calibration {
    observer: Observer,
    granularity: Granularity,
    /// What the moving average is computed in.
    dtype: DType,
    num_kv_heads: usize,
    head_dim: usize,
    /// `[layer][K, V][group]`
    layers: Vec<[Vec<Group>; 2]>,
    samples: usize,
    tokens: usize,
}

impl Calibration {
    /// Nothing seen yet. `dtype` is the model's own, in which LLM Compressor computes.
    pub fn new(observer: Observer, granularity: Granularity, config: &Config, dtype: DType) -> Self {
        let (num_kv_heads, head_dim) = (config.num_kv_heads, config.head_dim);
        let groups = || vec![Group::new(granularity); granularity.len(num_kv_heads, head_dim)];
        let layers = (0..config.num_layers).map(|_| [groups(), groups()]).collect();
        Calibration { observer, granularity, dtype, num_kv_heads, head_dim, layers, samples: 0, tokens: 0 }
    }

    /// Takes in a part of the current sample in one layer.
    ///
    /// # Errors
    /// [`Error::GeometryMismatch`] for a layer of another model; [`Error::InLayer`] with
    /// [`Error::InvalidNumber`] for a key or value that is not finite.
    pub fn observe<A: Element>(&mut self, seen: &ObservedLayer<'_, A>) -> Result<()> {
        let (heads, dim) = (seen.num_kv_heads, seen.head_dim);
        let len = seen.num_tokens.saturating_mul(heads).saturating_mul(dim);
        let known = (self.num_kv_heads, self.head_dim);
        if known != (heads, dim) || len != seen.k.len() || len != seen.v.len() || seen.layer >= self.layers.len() {
            let reason = format!(
                "(KV heads, head dim) are {known:?} in {} layers and {:?} in layer {} with {} and {} elements",
                self.layers.len(),
                (heads, dim),
                seen.layer,
                seen.k.len(),
                seen.v.len()
            );
            return Err(Error::GeometryMismatch { what: "the calibration and the model", reason });
        }
        let [k, v] = &mut self.layers[seen.layer];
        let (k, v) =
            rayon::join(|| record("a key", k, seen.k, heads, dim), || record("a value", v, seen.v, heads, dim));
        k.and(v).map_err(|error| error.in_layer(seen.layer))
    }

    /// The current sample of `tokens` tokens has been observed in every layer.
    pub fn end_sample(&mut self, tokens: usize) {
        let dtype = self.dtype;
        self.layers.iter_mut().flatten().flatten().for_each(|group| group.end_sample(dtype));
        self.samples += 1;
        self.tokens += tokens;
    }

    /// Samples ended.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Their tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How scales are chosen.
    pub fn observer(&self) -> Observer {
        self.observer
    }

    /// What shares a scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }
}

/// Adds `rows` `[tokens, heads, dim]` to the groups of one half.
fn record<A: Element>(what: &'static str, groups: &mut [Group], rows: &[A], heads: usize, dim: usize) -> Result<()> {
    let finite = |x: f32| match x.is_finite() {
        true => Ok(x),
        false => Err(Error::InvalidNumber { what, value: x.into(), expected: "finite" }),
    };
    let groups_a_head = groups.len() / heads;
    if groups_a_head == 0 {
        return rows.iter().try_for_each(|x| finite(x.to_f32()).map(|x| groups[0].record(x)));
    }
    groups.par_chunks_mut(groups_a_head).enumerate().try_for_each(|(head, groups)| {
        for row in rows.chunks_exact(heads * dim) {
            for (channel, x) in row[head * dim..][..dim].iter().enumerate() {
                groups[channel % groups_a_head].record(finite(x.to_f32())?);
            }
        }
        Ok(())
    })
}
