//! [`PagedAttention`], specified: for each query row and head, all scores, then the softmax over
//! them, then the weighted sum of values.

use super::super::ragged::{checked_block, sequence_len, sequence_rows};
use super::*;

pub(in crate::cpu) fn paged_attention<T: Element>(mut op: PagedAttention<'_, CpuBackend, T>, faults: &FaultWord) {
    let (shape, cache) = (op.shape, op.cache);
    let k = HalfRef { shape, half: Half::K, bytes: cache.k, dynamic: cache.k_dynamic, scale: op.k_scale };
    let v = HalfRef { shape, half: Half::V, bytes: cache.v, dynamic: cache.v_dynamic, scale: op.v_scale };
    let capacity = op.block_table_stride.saturating_mul(shape.spec.block_size);
    let starts = &op.query_starts[..op.num_seqs() + 1];
    let mut keys = Vec::new();

    for (seq, rows) in sequence_rows(starts, op.num_tokens, op.longest_query(), faults) {
        let seq_len = sequence_len(op.seq_lens[seq], capacity, faults);
        let blocks = &op.block_tables[seq * op.block_table_stride..][..op.block_table_stride];
        for row in rows.clone() {
            // The last query stands at the last cached token. A query before the first one (more
            // queries than tokens) sees nothing.
            let position = (seq_len + row).checked_sub(rows.end);
            if let Some(position) = position {
                visible_keys(&op, blocks, position, faults, &mut keys);
            }
            for head in 0..op.num_heads {
                attend(&mut op, &k, &v, &mut keys, row, head, position.unwrap_or(0));
            }
            keys.clear();
        }
    }
}

/// A visible key: its position and place; its score and softmax weight once known.
struct Key {
    position: usize,
    block: usize,
    slot: usize,
    score: f32,
    weight: f32,
}

/// The keys a query at `position` sees: itself and those before it, in the window, in the cache.
fn visible_keys<T: Element>(
    op: &PagedAttention<'_, CpuBackend, T>,
    blocks: &[i32],
    position: usize,
    faults: &FaultWord,
    keys: &mut Vec<Key>,
) {
    let block_size = op.shape.spec.block_size;
    let first = op.params.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
    keys.extend((first..=position).filter_map(|j| {
        let block = checked_block(blocks[j / block_size], op.shape.num_blocks, faults)?;
        Some(Key { position: j, block, slot: j % block_size, score: 0.0, weight: 0.0 })
    }));
}

/// One query row and head: softmax over `keys`, weighted sum of their values.
fn attend<T: Element>(
    op: &mut PagedAttention<'_, CpuBackend, T>,
    k: &HalfRef<'_>,
    v: &HalfRef<'_>,
    keys: &mut [Key],
    row: usize,
    head: usize,
    position: usize,
) {
    let spec = op.shape.spec;
    let kv_head = head / op.group_size();
    let query = &op.query[op.query_strides.index(row, head)..][..spec.k_head_dim];

    // Scores.
    for key in keys.iter_mut() {
        let products = query.iter().enumerate();
        let products = products.map(|(d, q)| q.to_f32() * k.value::<f32>(key.block, kv_head, key.slot, d));
        key.score = op.params.softmax_scale * products.fold(0.0, |sum, product| sum + product);
        if let Some(cap) = op.params.soft_cap {
            key.score = cap * (key.score / cap).tanh();
        }
        if let Some(slopes) = op.alibi_slopes {
            key.score -= slopes[head] * (position - key.position) as f32;
        }
    }

    // Softmax, relative to the largest score. If there is none (no key, no sink, or every score
    // -inf) any finite reference will do: all weights are zero.
    let sink = op.sinks.map(|sinks| sinks[head]);
    let max = keys.iter().map(|key| key.score).chain(sink).fold(f32::NEG_INFINITY, f32::max);
    let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
    for key in keys.iter_mut() {
        key.weight = (key.score - max).exp();
    }
    let sink_weight = sink.map(|sink| (sink - max).exp());
    let sum = keys.iter().map(|key| key.weight).chain(sink_weight).fold(0.0, |sum, weight| sum + weight);

    // Weighted sum.
    let output = &mut op.output[op.output_strides.index(row, head)..][..spec.v_head_dim];
    for (channel, out) in output.iter_mut().enumerate() {
        let products = keys.iter().map(|key| key.weight * v.value::<f32>(key.block, kv_head, key.slot, channel));
        let total = products.fold(0.0, |total, product| total + product);
        *out = T::from_f32(if sum == 0.0 { 0.0 } else { total / sum });
    }
    if let Some(lse) = op.lse.as_deref_mut() {
        // ln(0) is -inf: no mass, no LSE.
        lse[row * op.num_heads + head] = max + sum.ln();
    }
}
