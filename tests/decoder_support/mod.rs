//! What the decoder's golden tests share: fixtures, golden tensors, and greedy decoding by hand.
#![allow(dead_code)]

#[path = "../../testing/fixtures.rs"]
pub mod fixtures;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantkv::decoder::{Batch, Compute, Model, WantedLogits};
use quantkv::scale::LayerScales;
use quantkv::{CacheSpec, CpuBackend, Element, PagedKvCache};
use safetensors::SafeTensors;

pub fn fixture(name: &str) -> PathBuf {
    fixtures::fixture_path(name)
}

/// f32 and i32 tensors of a golden file, as f32 (ids are small integers).
pub fn golden_tensors(path: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |data: &[u8]| -> Vec<[u8; 4]> { data.chunks_exact(4).map(|b| b.try_into().unwrap()).collect() };
    let value = |view: safetensors::tensor::TensorView<'_>| match view.dtype() {
        safetensors::Dtype::F32 => words(view.data()).into_iter().map(f32::from_le_bytes).collect(),
        safetensors::Dtype::I32 => words(view.data()).into_iter().map(|b| i32::from_le_bytes(b) as f32).collect(),
        other => panic!("{other:?} in {}", path.display()),
    };
    file.tensors().into_iter().map(|(name, view)| (name, value(view))).collect()
}

pub fn ids(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| *x as u32).collect()
}

pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    worst.fold(0.0, |max, d| if d.is_nan() || d > max { d } else { max })
}

pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}

pub fn load(dir: &Path) -> Model<CpuBackend> {
    Model::load(dir, Arc::new(CpuBackend::new())).unwrap()
}

pub fn load_on<B: Compute<A>, A: Element>(dir: &Path, backend: &Arc<B>) -> Model<B, A> {
    Model::load(dir, Arc::clone(backend)).unwrap()
}

/// A cache of scattered blocks for one sequence of `tokens` tokens, and that sequence's table.
pub fn cache_for<B: Compute<A>, A: Element>(
    model: &Model<B, A>,
    spec: CacheSpec,
    scales: &[LayerScales],
    tokens: usize,
) -> (PagedKvCache<B>, Vec<u32>) {
    let blocks = spec.blocks_for_tokens(tokens);
    let cache = PagedKvCache::new(model.backend().clone(), spec, blocks + 3, scales).unwrap();
    // Backwards and not from zero: block order must not matter.
    let table = (0..blocks as u32).rev().map(|block| block + 2).collect();
    (cache, table)
}

pub struct Greedy {
    /// `[prompt, vocab]`.
    pub prefill_logits: Vec<f32>,
    pub tokens: Vec<u32>,
    /// `[tokens, vocab]`: what each token was chosen from.
    pub decode_logits: Vec<f32>,
}

/// Prefills `prompt` in chunks of `chunk` and decodes `count` tokens, the largest logit each.
pub fn greedy<B: Compute<A>, A: Element>(
    model: &mut Model<B, A>,
    cache: &mut PagedKvCache<B>,
    table: &[u32],
    prompt: &[u32],
    chunk: usize,
    count: usize,
) -> Greedy {
    let block_size = cache.shape().spec.block_size;
    let vocab = model.config().vocab_size;
    let mut batch = Batch::new();
    let mut prefill_logits = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        batch.clear();
        batch.push_sequence(tokens, index * chunk, table, block_size, WantedLogits::All).unwrap();
        prefill_logits.extend_from_slice(model.forward(&batch, cache).unwrap());
    }
    let mut last = prefill_logits[prefill_logits.len() - vocab..].to_vec();
    let (mut tokens, mut decode_logits) = (Vec::new(), Vec::new());
    for step in 0..count {
        let token = argmax(&last);
        tokens.push(token);
        decode_logits.extend_from_slice(&last);
        batch.clear();
        batch.push_sequence(&[token], prompt.len() + step, table, block_size, WantedLogits::Last).unwrap();
        last = model.forward(&batch, cache).unwrap().to_vec();
    }
    Greedy { prefill_logits, tokens, decode_logits }
}
