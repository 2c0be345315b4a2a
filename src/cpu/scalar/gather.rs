//! [`Gather`] and [`GatherBytes`], specified.

use super::super::ragged::{checked_block, sequence_rows};
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

/// The block tables of a gather, and where each sequence begins.
pub(in crate::cpu) struct Table<'a> {
    pub(in crate::cpu) blocks: &'a [i32],
    pub(in crate::cpu) stride: usize,
    pub(in crate::cpu) starts: Option<&'a [i32]>,
    pub(in crate::cpu) shape: &'a CacheShape,
    pub(in crate::cpu) faults: &'a FaultWord,
}

impl<'a> Table<'a> {
    /// Every output row some sequence claims, ascending, with the `(block, slot)` it comes from;
    /// `None` where that place is outside the table or the cache.
    pub(in crate::cpu) fn rows(
        &'a self,
        cu_seq_lens: &'a [i32],
        num_tokens: usize,
    ) -> impl Iterator<Item = (usize, Option<(usize, usize)>)> + 'a {
        sequence_rows(cu_seq_lens, num_tokens, self.faults).flat_map(move |(seq, rows)| {
            let first = rows.start;
            rows.map(move |row| (row, self.place(seq, row - first)))
        })
    }

    /// The `(block, slot)` of the `t`-th token gathered of a sequence.
    fn place(&self, seq: usize, t: usize) -> Option<(usize, usize)> {
        let start = self.starts.map_or(0, |starts| i64::from(starts[seq]));
        // `start` is an i32 and `t` counts elements of a buffer: their sum fits.
        let position = usize::try_from(start + t as i64).ok();
        let block_size = self.shape.spec.block_size;
        match position.filter(|position| position / block_size < self.stride) {
            Some(position) => {
                let entry = self.blocks[seq * self.stride + position / block_size];
                checked_block(entry, self.shape.num_blocks, self.faults).map(|block| (block, position % block_size))
            }
            None => {
                self.faults.set(Faults::SEQ_LEN_OUT_OF_RANGE);
                None
            }
        }
    }
}
