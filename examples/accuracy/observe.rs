//! The ranges of keys and values over the calibration texts, and the scales that follow from them.
//!
//! ```text
//! each text ──> model over an f32 cache ──> gather: K, V [tokens, heads, dim] ──> extremes of each channel
//! ```
//! Extremes of heads and of whole tensors are those of their channels. K is seen after RoPE, as it is
//! cached.

use quantkv::args::{Gather, RowStrides};
use quantkv::decoder::{Batch, Compute, Model, WantedLogits};
use quantkv::layout::Half;
use quantkv::scale::{LayerScales, StaticScale};
use quantkv::{Backend, Element, KvFormat, PagedKvCache, Result};

use crate::cache::CachePlan;
use crate::rows::Strategy;
use crate::score::blocks_for;

/// LLM Compressor's `averaging_constant`.
const AVERAGING: f32 = 0.01;

/// What was seen of one half of one layer.
#[derive(Clone, Debug)]
pub struct Range {
    /// Largest magnitude of each channel, `[heads, dim]`.
    absmax: Vec<f32>,
    /// Moving averages of each text's smallest and largest value.
    average: Option<(f32, f32)>,
}

impl Range {
    fn observe(&mut self, values: &[f32]) {
        for row in values.chunks_exact(self.absmax.len()) {
            for (max, value) in self.absmax.iter_mut().zip(row) {
                *max = max.max(value.abs());
            }
        }
        let min = values.iter().copied().fold(0.0, f32::min);
        let max = values.iter().copied().fold(0.0, f32::max);
        let mix = |old: f32, new: f32| old * (1.0 - AVERAGING) + new * AVERAGING;
        self.average = Some(match self.average {
            None => (min, max),
            Some((old_min, old_max)) => (mix(old_min, min), mix(old_max, max)),
        });
    }

    /// The largest magnitude of all channels.
    pub fn absmax(&self) -> f32 {
        self.absmax.iter().copied().fold(0.0, f32::max)
    }
}

/// What was seen of every layer: K and V.
pub struct Ranges {
    layers: Vec<[Range; 2]>,
    head_dim: usize,
}

impl Ranges {
    /// Runs the texts; `done` is called after each.
    pub fn observe<B: Compute<A>, A: Element>(
        model: &mut Model<B, A>,
        block_size: usize,
        texts: &[Vec<u32>],
        mut done: impl FnMut(),
    ) -> Result<Ranges> {
        let config = model.config();
        let (layers, heads, head_dim) = (config.num_layers, config.num_kv_heads, config.head_dim);
        let unseen = Range { absmax: vec![0.0; heads * head_dim], average: None };
        let mut ranges = Ranges { layers: vec![[unseen.clone(), unseen]; layers], head_dim };
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let plan =
            CachePlan { spec: model.cache_spec(block_size, KvFormat::F32)?, scales: vec![LayerScales::one(); layers] };
        let mut cache = plan.allocate(model.backend(), blocks_for(longest, block_size).len())?;
        for text in texts {
            let blocks = blocks_for(text.len(), block_size);
            let mut batch = Batch::new();
            batch.push_sequence(text, 0, &blocks, block_size, WantedLogits::None)?;
            model.compute(&batch, &mut cache)?;
            for (layer, halves) in ranges.layers.iter_mut().enumerate() {
                let seen = gather(&**model.backend(), &cache, layer, &blocks, text.len())?;
                halves.iter_mut().zip(seen).for_each(|(range, values)| range.observe(&values));
            }
            done();
        }
        Ok(ranges)
    }

    /// The smallest and the largest of the layers' largest keys.
    pub fn largest_keys(&self) -> (f32, f32) {
        let keys = self.layers.iter().map(|[k, _]| k.absmax());
        keys.fold((f32::INFINITY, 0.0), |(min, max), key| (min.min(key), max.max(key)))
    }

    /// Scales that make the largest magnitude seen `format`'s largest code, divided by `too_small`.
    pub fn absmax_scales(&self, format: KvFormat, strategy: Strategy, too_small: f32) -> Result<Vec<LayerScales>> {
        let divisor = format.max_finite() * too_small;
        self.scales(|layer, half, range| {
            let what = name_of(layer, half);
            let heads = || range.absmax.chunks_exact(self.head_dim);
            match (strategy, half) {
                (Strategy::Tensor, _) => StaticScale::per_tensor(&what, scale(range.absmax(), divisor)),
                (Strategy::Channel, Half::K) => {
                    let values = range.absmax.iter().map(|max| scale(*max, divisor)).collect();
                    StaticScale::per_channel(&what, self.head_dim, values)
                }
                (Strategy::Head, _) | (Strategy::Channel, Half::V) => {
                    let head = |head: &[f32]| scale(head.iter().copied().fold(0.0, f32::max), divisor);
                    StaticScale::per_head(&what, heads().map(head).collect())
                }
            }
        })
    }

    /// Scales from the moving averages.
    pub fn average_scales(&self, format: KvFormat) -> Result<Vec<LayerScales>> {
        self.scales(|layer, half, range| {
            let (min, max) = range.average.unwrap_or_default();
            StaticScale::per_tensor(&name_of(layer, half), scale(min.abs().max(max), format.max_finite()))
        })
    }

    fn scales(&self, of: impl Fn(usize, Half, &Range) -> Result<StaticScale>) -> Result<Vec<LayerScales>> {
        let layer = |(layer, [k, v]): (usize, &[Range; 2])| {
            Ok(LayerScales { k: of(layer, Half::K, k)?, v: of(layer, Half::V, v)? })
        };
        self.layers.iter().enumerate().map(layer).collect()
    }
}

/// 1.0 where nothing but zeros was seen.
fn scale(absmax: f32, divisor: f32) -> f32 {
    if absmax > 0.0 { (absmax.min(f32::MAX) / divisor).max(f32::MIN_POSITIVE) } else { 1.0 }
}

fn name_of(layer: usize, half: Half) -> String {
    format!("layer {layer} {}_scale", if half == Half::K { "k" } else { "v" })
}

/// Keys and values of the first `tokens` tokens of these blocks.
fn gather<B: Backend>(
    backend: &B,
    cache: &PagedKvCache<B>,
    layer: usize,
    blocks: &[u32],
    tokens: usize,
) -> Result<[Vec<f32>; 2]> {
    let shape = *cache.shape();
    let (heads, dim) = (shape.spec.num_kv_heads, shape.spec.k_head_dim);
    let len = tokens * heads * dim;
    let (mut key, mut value) = (backend.zeros("gathered keys", len)?, backend.zeros("gathered values", len)?);
    let table: Vec<i32> = blocks.iter().map(|block| *block as i32).collect();
    let bounds = [0, tokens as i32];
    let (mut device_table, mut device_bounds) =
        (backend.zeros("a block table", table.len())?, backend.zeros("sequence bounds", bounds.len())?);
    backend.upload(&table, &mut device_table)?;
    backend.upload(&bounds, &mut device_bounds)?;
    backend.gather::<f32>(Gather {
        shape,
        cache: cache.layer_ref(layer)?,
        k_scale: cache.scale(layer, Half::K)?,
        v_scale: cache.scale(layer, Half::V)?,
        block_tables: backend.view(&device_table),
        block_table_stride: table.len(),
        cu_seq_lens: backend.view(&device_bounds),
        starts: None,
        num_tokens: tokens,
        key: backend.view_mut(&mut key),
        key_strides: RowStrides::contiguous(heads, dim),
        value: backend.view_mut(&mut value),
        value_strides: RowStrides::contiguous(heads, dim),
    })?;
    let (mut keys, mut values) = (vec![0.0; len], vec![0.0; len]);
    backend.download(&key, &mut keys)?;
    backend.download(&value, &mut values)?;
    Ok([keys, values])
}
