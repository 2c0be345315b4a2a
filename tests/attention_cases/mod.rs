//! Calls of `paged_attention` for tests: what is random of one, and the tensors that follow from it.
#![allow(dead_code)] // each test uses a part

use std::collections::HashSet;

use proptest::prelude::*;
use quantkv::DType;
use quantkv::args::AttentionParams;
use quantkv::layout::Half;

use crate::oracle::attention::{self, AttentionCase};
use crate::oracle::formats::round_to;
use crate::oracle::geometry::{Geometry, Layer};
use crate::oracle::strategy::{self, Padding, Rng, ScaleKind};

/// What of a case is random; the numbers follow from the seed.
#[derive(Clone, Debug)]
pub struct Parameters {
    pub geometry: Geometry,
    pub dtype: DType,
    pub group: usize,
    /// (cached tokens before the new ones, new tokens) of each sequence.
    pub sequences: Vec<(usize, usize)>,
    /// Whether the call says how many queries the longest sequence has.
    pub says_longest: bool,
    /// Unclaimed rows after each sequence's, as a padded batch has them.
    pub spare_rows: usize,
    pub table_spare: usize,
    pub percent_bad_blocks: u64,
    pub window: Option<usize>,
    pub soft_cap: Option<f32>,
    pub alibi: bool,
    pub sinks: bool,
    pub lse: bool,
    pub scales: (ScaleKind, ScaleKind),
    pub padding: (Padding, Padding),
    pub seed: u64,
}

/// Lengths around a block and around nothing, as offsets from whole blocks of 16.
fn sequence() -> impl Strategy<Value = (usize, usize)> {
    let before = prop_oneof![
        2 => Just(0usize),
        4 => prop::sample::select(vec![6usize, 7, 8, 14, 15, 16, 30, 31, 32, 63]),
        3 => 0usize..100,
        1 => 200usize..300,
    ];
    let new = prop_oneof![1 => Just(0usize), 5 => Just(1usize), 2 => 2usize..=16, 1 => 17usize..50];
    (before, new)
}

pub fn parameters() -> impl Strategy<Value = Parameters> {
    let batch =
        (prop::collection::vec(sequence(), 0..4), 0usize..2, 0usize..3, prop_oneof![4 => Just(0u64), 1 => Just(15)]);
    let group = prop_oneof![3 => Just(1usize), 3 => 2usize..=5, 1 => Just(8usize), 1 => Just(17)];
    let features = (
        prop::option::weighted(0.4, prop_oneof![Just(1usize), 2usize..40, Just(usize::MAX)]),
        prop::option::weighted(0.3, prop_oneof![Just(0.5f32), Just(30.0), Just(50.0)]),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    let scales = (strategy::scale_kind(), strategy::scale_kind());
    let padding = (strategy::padding(), strategy::padding());
    (strategy::geometry(), strategy::dtype(), group, batch, features, scales, padding, any::<u64>()).prop_map(
        |(geometry, dtype, group, batch, features, scales, padding, seed)| {
            let (sequences, spare_rows, table_spare, percent_bad_blocks) = batch;
            let (window, soft_cap, alibi, sinks, lse) = features;
            Parameters {
                geometry: Geometry { num_blocks: geometry.num_blocks + 2, ..geometry },
                dtype,
                // Bound the work of a case: 17 query heads of 13 KV heads add nothing.
                group: group.min((40 / geometry.heads).max(1)),
                sequences,
                says_longest: seed % 2 == 1,
                spare_rows,
                table_spare,
                percent_bad_blocks,
                window,
                soft_cap,
                alibi,
                sinks,
                lse,
                scales,
                padding,
                seed,
            }
        },
    )
}

fn longest_query(sequences: &[(usize, usize)]) -> usize {
    sequences.iter().map(|&(_, new)| new).max().unwrap_or(0)
}

pub fn build(parameters: &Parameters) -> AttentionCase {
    let Parameters { geometry, dtype, spare_rows, scales, .. } = *parameters;
    let mut rng = Rng::new(parameters.seed);
    let num_heads = geometry.heads * parameters.group;
    let (mut query_starts, mut seq_lens) = (vec![0i32], Vec::new());
    for &(before, new) in &parameters.sequences {
        query_starts.push(query_starts.last().unwrap() + new as i32);
        seq_lens.push((before + new) as i32);
    }
    let num_tokens = *query_starts.last().unwrap() as usize + spare_rows;
    let longest = seq_lens.iter().copied().max().unwrap_or(0) as usize;
    let table_stride = longest.div_ceil(geometry.block_size) + parameters.table_spare;
    // Entries past the sequence are garbage; the last block of the pool belongs to nobody.
    let mut tables: Vec<i32> =
        (0..seq_lens.len() * table_stride).map(|_| [-1, i32::MAX, i32::MIN, 7][rng.below(4)]).collect();
    for (s, &len) in seq_lens.iter().enumerate() {
        for logical in 0..(len as usize).div_ceil(geometry.block_size) {
            tables[s * table_stride + logical] = match rng.chance(parameters.percent_bad_blocks) {
                true => [-1, geometry.num_blocks as i32, i32::MIN, i32::MAX][rng.below(4)],
                false => rng.below(geometry.num_blocks - 1) as i32,
            };
        }
    }
    let rows = |heads, dim, padding, next: &mut dyn FnMut() -> f32| {
        strategy::rows((num_tokens, heads, dim), padding, dtype, next)
    };
    let mut query = rows(num_heads, geometry.k_dim, parameters.padding.0, &mut || f32::NAN);
    for token in 0..num_tokens {
        for (head, d) in (0..num_heads).flat_map(|head| (0..geometry.k_dim).map(move |d| (head, d))) {
            query.set(token, head, d, round_to(dtype, rng.normal().into()));
        }
    }
    let output = rows(num_heads, geometry.v_dim, parameters.padding.1, &mut || 1234.0);
    let mut scale = |kind, half| strategy::scales(kind, geometry.heads, geometry.dim(half), || rng.mild_scale());
    let (k_scale, v_scale) = (scale(scales.0, Half::K), scale(scales.1, Half::V));
    let mut per_head =
        |wanted: bool, factor: f32| wanted.then(|| (0..num_heads).map(|_| rng.normal() * factor).collect::<Vec<f32>>());
    let (alibi, sinks) = (per_head(parameters.alibi, 0.3), per_head(parameters.sinks, 2.0));
    let mut params = AttentionParams::new(0.4 / (geometry.k_dim as f32).sqrt());
    (params.soft_cap, params.sliding_window) = (parameters.soft_cap, parameters.window);
    let mut case = AttentionCase {
        geometry,
        layer: Layer::poisoned(&geometry),
        k_scale,
        v_scale,
        params,
        num_heads,
        num_tokens,
        max_query_len: parameters.says_longest.then(|| longest_query(&parameters.sequences)),
        dtype,
        query,
        query_starts,
        seq_lens,
        tables,
        table_stride,
        alibi,
        sinks,
        lse: parameters.lse.then(|| vec![1234.0; num_tokens * num_heads]),
        output,
    };
    fill_visible(&mut case, &mut rng);
    case
}

/// Replaces the poison by numbers in every slot that some query sees.
pub fn fill_visible(case: &mut AttentionCase, rng: &mut Rng) {
    let mut seen = HashSet::new();
    for (s, sequence) in attention::sequences(case).0.into_iter().enumerate() {
        let Some(sequence) = sequence else { continue };
        let first = sequence.len as i64 - sequence.queries as i64;
        for j in 0..sequence.len {
            if (first..sequence.len as i64).any(|p| attention::visible(case, p, j as i64)) {
                seen.extend(attention::slot_of(case, s, j));
            }
        }
    }
    let mut seen: Vec<_> = seen.into_iter().collect();
    seen.sort_unstable();
    let geometry = case.geometry;
    for slot in seen {
        strategy::fill_slot(&geometry, &mut case.layer, slot, rng);
    }
}

/// Makes V's dynamic scales, if there are any, grow and shrink with the position: of runs of `period` tokens 1, `factor`, its
/// square, and 1 again. What a kernel's weights are relative to must follow.
/// K's are small, so that it is not scores that are followed.
pub fn swing_values(case: &mut AttentionCase, period: usize, factor: f32) {
    let geometry = case.geometry;
    for (seq, &length) in case.seq_lens.iter().enumerate() {
        for position in 0..length as usize {
            let block = case.tables[seq * case.table_stride + position / geometry.block_size] as usize;
            for head in 0..geometry.heads {
                let at = geometry.dynamic_index(block, head, position % geometry.block_size);
                let Some(scales) = case.layer.dynamic_mut(Half::V) else { return };
                scales[at] = factor.powi((position / period % 3) as i32);
                case.layer.dynamic_mut(Half::K).as_mut().unwrap()[at] = 1.0 / 1024.0;
            }
        }
    }
}

pub fn simple(geometry: Geometry, group: usize, sequences: Vec<(usize, usize)>) -> Parameters {
    Parameters {
        geometry,
        dtype: DType::F32,
        group,
        sequences,
        says_longest: false,
        spare_rows: 0,
        table_spare: 0,
        percent_bad_blocks: 0,
        window: None,
        soft_cap: None,
        alibi: false,
        sinks: false,
        lse: true,
        scales: (ScaleKind::Tensor, ScaleKind::Tensor),
        padding: ((0, 0, 0), (0, 0, 0)),
        seed: 9,
    }
}
