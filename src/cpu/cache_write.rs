//! [`CacheWrite`], fast.
//!
//! Threads own *ranges of blocks*: each scans the whole slot mapping (8 bytes a token, against
//! hundreds it writes) in order and writes the tokens whose block is its own. So two tokens that
//! name one slot always meet on one thread, where the later one wins, and the threads' parts of
//! the cache are disjoint by construction. The ranges are cut at quantiles of a sample of the
//! slots, so that they hold about equally many tokens wherever the blocks lie in the pool.
//!
//! Inside a range, tokens in consecutive slots of one block form a *run*. Layouts with contiguous
//! rows are encoded into in place; the packed ones through a tile ([`super::rows`]).

use std::ops::Range;

use super::ragged::checked_slot;
use super::rows::{ScaleRows, TILE_SLOTS, Tile, scatter};
use super::threads::{self, Job};
use super::*;
use crate::args::RowStrides;
use crate::codec::{ScaleRow, absmax_scaled_slice, absmax_slice, encode_slice};
use crate::layout::{AddressMap, Half};
use crate::scale::dynamic_scale;

pub(super) fn run<T: Element>(op: CacheWrite<'_, CpuBackend, T>, isa: Isa, faults: &FaultWord) {
    let spec = &op.shape.spec;
    let (Some(k_scales), Some(v_scales)) =
        (ScaleRows::new(spec.k_format, &op.k_scale), ScaleRows::new(spec.v_format, &op.v_scale))
    else {
        return scalar::cache_write(op, faults);
    };
    let key = Rows { data: op.key, strides: op.key_strides, scales: k_scales };
    Write::new(&op.shape, Half::K, isa, key, op.slot_mapping, faults).run(op.cache.k, op.cache.k_dynamic);
    let value = Rows { data: op.value, strides: op.value_strides, scales: v_scales };
    Write::new(&op.shape, Half::V, isa, value, op.slot_mapping, faults).run(op.cache.v, op.cache.v_dynamic);
}

/// New keys or values, `[tokens, heads, dim]`, and their static scales.
struct Rows<'a, T> {
    data: &'a [T],
    strides: RowStrides,
    scales: ScaleRows<'a>,
}

/// What all threads share: one half's new rows and where they go.
struct Write<'a, T> {
    shape: &'a CacheShape,
    isa: Isa,
    format: KvFormat,
    map: AddressMap,
    /// Heads and channels as iterated: all heads count as one where rows of all of them are
    /// contiguous on both sides.
    heads: usize,
    dim: usize,
    rows: Rows<'a, T>,
    slot_mapping: &'a [i64],
    faults: &'a FaultWord,
}

impl<'a, T: Element> Write<'a, T> {
    fn new(
        shape: &'a CacheShape,
        half: Half,
        isa: Isa,
        rows: Rows<'a, T>,
        slot_mapping: &'a [i64],
        faults: &'a FaultWord,
    ) -> Self {
        let (mut heads, mut dim) = (shape.spec.num_kv_heads, shape.spec.head_dim(half));
        let mut map = *shape.map(half);
        let contiguous = map.rows_are_contiguous(dim) && map.head_stride == dim && rows.strides.head == dim;
        if contiguous && rows.scales.heads_merge(dim) && !shape.spec.has_dynamic_scales(half) {
            (heads, dim) = (1, heads * dim);
            (map.chunk, map.chunk_stride) = (dim, dim);
        }
        let format = shape.spec.format(half);
        Write { shape, isa, format, map, heads, dim, rows, slot_mapping, faults }
    }

    fn run(&self, bytes: &mut [u8], dynamic: Option<&mut [f32]>) {
        let row_bytes = self.heads * self.dim * (size_of::<T>() + self.format.bytes());
        let blocks = 0..self.shape.num_blocks;
        threads::run(Part { write: self, blocks, bytes, dynamic }, self.slot_mapping.len() * row_bytes);
    }
}

/// A range of blocks, owned by one thread.
struct Part<'w, 'a, 'b, T> {
    write: &'w Write<'a, T>,
    blocks: Range<usize>,
    /// The cache from the first block of the range on.
    bytes: &'b mut [u8],
    dynamic: Option<&'b mut [f32]>,
}

impl<T: Element> Job for Part<'_, '_, '_, T> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Part { write, blocks, bytes, dynamic } = self;
        let cut = quantile_block(write, &blocks, left, parts);
        let count = cut - blocks.start;
        let (bytes, rest) = threads::split_rows(bytes, count, write.map.block_stride * write.format.bytes());
        let tile = write.shape.spec.num_kv_heads * write.shape.spec.block_size;
        let (dynamic, dynamic_rest) = dynamic.map(|scales| scales.split_at_mut(count * tile)).unzip();
        (
            Part { write, blocks: blocks.start..cut, bytes, dynamic },
            Part { write, blocks: cut..blocks.end, bytes: rest, dynamic: dynamic_rest },
        )
    }

    fn run(mut self) {
        let mut tile = Tile::new();
        let mut token = 0;
        while let Some(run) = next_run(self.write, &self.blocks, &mut token) {
            self.write_run(&run, &mut tile);
        }
    }
}

/// A block such that about `left / parts` of the tokens in `blocks` lie before it, from a sample.
fn quantile_block<T>(write: &Write<'_, T>, blocks: &Range<usize>, left: usize, parts: usize) -> usize {
    const SAMPLES: usize = 128;
    let slots = write.slot_mapping;
    let mut sample = [0; SAMPLES];
    let mut len = 0;
    for i in 0..SAMPLES {
        let slot = slots[i * slots.len() / SAMPLES];
        let block = slot / write.shape.spec.block_size as i64;
        if let Some(block) = usize::try_from(block).ok().filter(|block| blocks.contains(block)) {
            sample[len] = block;
            len += 1;
        }
    }
    let sample = &mut sample[..len];
    sample.sort_unstable();
    sample.get(len * left / parts).copied().unwrap_or(blocks.start)
}

/// Tokens that go to consecutive slots of one block.
struct Run {
    tokens: Range<usize>,
    block: usize,
    slot: usize,
}

/// The next run at or after `*token` whose block is in `blocks`; moves `*token` past it.
fn next_run<T>(write: &Write<'_, T>, blocks: &Range<usize>, token: &mut usize) -> Option<Run> {
    let slots = write.slot_mapping;
    while *token < slots.len() {
        let first = *token;
        *token += 1;
        let Some((block, slot)) = checked_slot(slots[first], write.shape, write.faults) else { continue };
        if !blocks.contains(&block) {
            continue;
        }
        let room = write.shape.spec.block_size - slot;
        let following = slots[*token..].iter().zip(slots[first] + 1..).take(room - 1);
        *token += following.take_while(|(slot, expected)| **slot == *expected).count();
        return Some(Run { tokens: first..*token, block, slot });
    }
    None
}

impl<T: Element> Part<'_, '_, '_, T> {
    fn write_run(&mut self, run: &Run, tile: &mut Tile) {
        let write = self.write;
        let (map, dim, size) = (&write.map, write.dim, write.format.bytes());
        let block = (run.block - self.blocks.start) * map.block_stride;
        if map.rows_are_contiguous(dim) {
            for (i, token) in run.tokens.clone().enumerate() {
                for head in 0..write.heads {
                    let at = (block + head * map.head_stride + (run.slot + i) * map.slot_stride) * size;
                    let (dst, dynamic) = (&mut self.bytes[at..at + dim * size], self.dynamic.as_deref_mut());
                    let own = dynamic.map(|scales| &mut scales[own_scale(write, &self.blocks, run, i, head)]);
                    write.encode(token, head, own, dst);
                }
            }
            return;
        }
        for head in 0..write.heads {
            let head_bytes = &mut self.bytes[(block + head * map.head_stride) * size..];
            for first in (0..run.tokens.len()).step_by(TILE_SLOTS) {
                let count = TILE_SLOTS.min(run.tokens.len() - first);
                let tile = tile.bytes(count * dim * size);
                for (i, dst) in (first..).zip(tile.chunks_exact_mut(dim * size)) {
                    let dynamic = self.dynamic.as_deref_mut();
                    let own = dynamic.map(|scales| &mut scales[own_scale(write, &self.blocks, run, i, head)]);
                    write.encode(run.tokens.start + i, head, own, dst);
                }
                scatter(map, size, dim, tile, run.slot + first, head_bytes);
            }
        }
    }
}

/// Where the dynamic scale of the `i`-th row of a run lies in a part's scales.
fn own_scale<T>(write: &Write<'_, T>, blocks: &Range<usize>, run: &Run, i: usize, head: usize) -> usize {
    write.shape.dynamic_scale_index(run.block - blocks.start, head, run.slot + i)
}

impl<T: Element> Write<'_, T> {
    /// Encodes one row; `own` is where its dynamic scale goes.
    #[inline]
    fn encode(&self, token: usize, head: usize, own: Option<&mut f32>, dst: &mut [u8]) {
        let row = &self.rows.data[self.rows.strides.index(token, head)..][..self.dim];
        let mut scale = self.rows.scales.row(head, self.dim);
        if let Some(own) = own {
            *own = dynamic_scale(self.absmax(row, scale), self.format);
            scale = scale.with_dynamic(*own);
        }
        encode_slice(self.isa, self.format, row, scale, dst);
    }

    /// max |x / scale| of a row. Dividing by one positive number, and rounding, keep the order, so
    /// that one division of the largest |x| will do. (Where infinities are, which count as
    /// `f32::MAX` only after the division, every element is divided.)
    #[inline]
    fn absmax(&self, row: &[T], scale: ScaleRow<'_>) -> f32 {
        if let ScaleRow::One(scale) = scale
            && let absmax = absmax_slice(self.isa, row)
            && absmax < f32::MAX
        {
            return absmax / scale;
        }
        absmax_scaled_slice(self.isa, row, scale)
    }
}
