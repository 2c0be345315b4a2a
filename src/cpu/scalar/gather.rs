//! [`Gather`] and [`GatherBytes`], specified.

use super::super::ragged::Table;
use super::*;

pub(in crate::cpu) fn gather<T: Element>(op: Gather<'_, CpuBackend, T>, faults: &FaultWord) {
    let spec = op.shape.spec;
    let (shape, cache) = (op.shape, op.cache);
    let k = HalfRef { shape, half: Half::K, bytes: cache.k, dynamic: cache.k_dynamic, scale: op.k_scale };
    let v = HalfRef { shape, half: Half::V, bytes: cache.v, dynamic: cache.v_dynamic, scale: op.v_scale };
    let table =
        Table { blocks: op.block_tables, stride: op.block_table_stride, starts: op.starts, shape: &op.shape, faults };
    for (row, place) in table.rows(op.cu_seq_lens, op.num_tokens) {
        for head in 0..spec.num_kv_heads {
            let key = &mut op.key[op.key_strides.index(row, head)..][..spec.k_head_dim];
            gather_row(&k, place, head, key);
            let value = &mut op.value[op.value_strides.index(row, head)..][..spec.v_head_dim];
            gather_row(&v, place, head, value);
        }
    }
}

fn gather_row<T: Element>(from: &HalfRef<'_>, place: Option<(usize, usize)>, head: usize, row: &mut [T]) {
    for (channel, y) in row.iter_mut().enumerate() {
        *y = match place {
            Some((block, slot)) => from.value(block, head, slot, channel),
            None => T::default(),
        };
    }
}

pub(in crate::cpu) fn gather_bytes(op: GatherBytes<'_, CpuBackend>, faults: &FaultWord) {
    let table =
        Table { blocks: op.block_tables, stride: op.block_table_stride, starts: op.starts, shape: &op.shape, faults };
    for (row, place) in table.rows(op.cu_seq_lens, op.num_tokens) {
        gather_codes(&op.shape, Half::K, op.cache.k, row, place, op.key);
        gather_codes(&op.shape, Half::V, op.cache.v, row, place, op.value);
    }
}

/// Copies the codes of one token, all heads, to row `row` of `[tokens, heads, dim]`.
fn gather_codes(shape: &CacheShape, half: Half, from: &[u8], row: usize, place: Option<(usize, usize)>, to: &mut [u8]) {
    let (heads, dim, size) = (shape.spec.num_kv_heads, shape.spec.head_dim(half), shape.spec.format(half).bytes());
    for head in 0..heads {
        for channel in 0..dim {
            let code = &mut to[((row * heads + head) * dim + channel) * size..][..size];
            match place {
                Some((block, slot)) => {
                    let at = shape.map(half).index(block, head, slot, channel) * size;
                    code.copy_from_slice(&from[at..at + size]);
                }
                None => code.fill(0),
            }
        }
    }
}
