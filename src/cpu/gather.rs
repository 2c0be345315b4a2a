//! [`Gather`] and [`GatherBytes`], fast.
//!
//! Threads own ranges of output rows, K and V one after the other. Inside a range, rows that lie
//! side by side in one block form a run; a run is decoded in place where the layout keeps rows
//! contiguous, through a tile ([`super::rows`]) where it does not. The two operations differ only
//! in how a row of codes becomes a row of output: [`Emit`].

use std::ops::Range;

use super::ragged::Table;
use super::rows::{ScaleRows, TILE_SLOTS, Tile, collect};
use super::threads::{self, Job};
use super::*;
use crate::args::RowStrides;
use crate::codec::decode_slice;
use crate::layout::{AddressMap, Half};

pub(super) fn run<T: Element>(op: Gather<'_, CpuBackend, T>, isa: Isa, faults: &FaultWord) {
    let (shape, cache) = (&op.shape, &op.cache);
    let spec = &shape.spec;
    let (Some(k_scales), Some(v_scales)) =
        (ScaleRows::new(spec.k_format, &op.k_scale), ScaleRows::new(spec.v_format, &op.v_scale))
    else {
        return scalar::gather(op, faults);
    };
    let table = Table { blocks: op.block_tables, stride: op.block_table_stride, starts: op.starts, shape, faults };
    let read = |half, bytes, strides| Read::new(&table, op.cu_seq_lens, op.num_tokens, half, bytes, strides);

    let emit = Decode { isa, format: spec.k_format, scales: k_scales, dynamic: cache.k_dynamic, shape };
    read(Half::K, cache.k, op.key_strides).run(&emit, op.key);
    let emit = Decode { format: spec.v_format, scales: v_scales, dynamic: cache.v_dynamic, ..emit };
    read(Half::V, cache.v, op.value_strides).run(&emit, op.value);
}

pub(super) fn run_bytes(op: GatherBytes<'_, CpuBackend>, faults: &FaultWord) {
    let shape = &op.shape;
    let table = Table { blocks: op.block_tables, stride: op.block_table_stride, starts: op.starts, shape, faults };
    for (half, bytes, out) in [(Half::K, op.cache.k, op.key), (Half::V, op.cache.v, op.value)] {
        let row = shape.spec.head_dim(half) * shape.spec.format(half).bytes();
        let strides = RowStrides::contiguous(shape.spec.num_kv_heads, row);
        let read = Read::new(&table, op.cu_seq_lens, op.num_tokens, half, bytes, strides);
        read.run(&Copy, out);
    }
}

/// How a row of codes becomes a row of output.
trait Emit<T>: Sync {
    /// Output elements of `dim` channels of `size` bytes.
    fn row_len(&self, dim: usize, size: usize) -> usize;

    /// Whether the rows of all heads can be emitted as one, if they are contiguous on both sides.
    fn heads_merge(&self, dim: usize) -> bool;

    /// Turns the codes of `head` at `(block, slot)` into `out`.
    fn emit(&self, codes: &[u8], head: usize, place: (usize, usize), out: &mut [T]);
}

/// Unchanged.
struct Copy;

impl Emit<u8> for Copy {
    fn row_len(&self, dim: usize, size: usize) -> usize {
        dim * size
    }

    fn heads_merge(&self, _dim: usize) -> bool {
        true
    }

    fn emit(&self, codes: &[u8], _head: usize, _place: (usize, usize), out: &mut [u8]) {
        out.copy_from_slice(codes);
    }
}

/// Dequantized.
struct Decode<'a> {
    isa: Isa,
    format: KvFormat,
    scales: ScaleRows<'a>,
    dynamic: Option<&'a [f32]>,
    shape: &'a CacheShape,
}

impl<T: Element> Emit<T> for Decode<'_> {
    fn row_len(&self, dim: usize, _size: usize) -> usize {
        dim
    }

    fn heads_merge(&self, dim: usize) -> bool {
        self.dynamic.is_none() && self.scales.heads_merge(dim)
    }

    fn emit(&self, codes: &[u8], head: usize, (block, slot): (usize, usize), out: &mut [T]) {
        let mut scale = self.scales.row(head, out.len());
        if let Some(dynamic) = self.dynamic {
            scale = scale.with_dynamic(dynamic[self.shape.dynamic_scale_index(block, head, slot)]);
        }
        decode_slice(self.isa, self.format, codes, scale, out);
    }
}

/// What all threads share: one half of the cache and where its rows go.
struct Read<'a> {
    table: &'a Table<'a>,
    cu_seq_lens: &'a [i32],
    num_tokens: usize,
    bytes: &'a [u8],
    format: KvFormat,
    map: AddressMap,
    heads: usize,
    dim: usize,
    /// Of the output, in its own elements.
    strides: RowStrides,
}

impl<'a> Read<'a> {
    fn new(
        table: &'a Table<'a>,
        cu_seq_lens: &'a [i32],
        num_tokens: usize,
        half: Half,
        bytes: &'a [u8],
        strides: RowStrides,
    ) -> Self {
        let spec = &table.shape.spec;
        let (heads, dim, map) = (spec.num_kv_heads, spec.head_dim(half), *table.shape.map(half));
        Read { table, cu_seq_lens, num_tokens, bytes, format: spec.format(half), map, heads, dim, strides }
    }

    fn run<T: Pod, E: Emit<T>>(mut self, emit: &E, out: &mut [T]) {
        let size = self.format.bytes();
        let row_len = emit.row_len(self.dim, size);
        let row_bytes = self.heads * (self.dim * size + row_len * size_of::<T>());
        let contiguous = self.map.rows_are_contiguous(self.dim) && self.map.head_stride == self.dim;
        if contiguous && self.strides.head == row_len && emit.heads_merge(self.dim) {
            (self.heads, self.dim) = (1, self.heads * self.dim);
            (self.map.chunk, self.map.chunk_stride) = (self.dim, self.dim);
        }
        let part = Part { read: &self, emit, rows: 0..self.num_tokens, out };
        threads::run(part, self.num_tokens.saturating_mul(row_bytes));
    }
}

/// A range of output rows, owned by one thread.
struct Part<'r, 'a, 'o, T, E> {
    read: &'r Read<'a>,
    emit: &'r E,
    rows: Range<usize>,
    /// The output from the first row of the range on.
    out: &'o mut [T],
}

impl<T: Pod, E: Emit<T>> Job for Part<'_, '_, '_, T, E> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Part { read, emit, rows, out } = self;
        let count = rows.len() * left / parts;
        let (out, rest) = threads::split_rows(out, count, read.strides.token);
        let cut = rows.start + count;
        (Part { read, emit, rows: rows.start..cut, out }, Part { read, emit, rows: cut..rows.end, out: rest })
    }

    fn run(self) {
        let Part { read, emit, rows, out } = self;
        let mut tile = Tile::new();
        for (row, count, place) in read.table.runs(read.cu_seq_lens, read.num_tokens, rows.clone()) {
            let out = &mut out[(row - rows.start) * read.strides.token..];
            match place {
                Some(place) => read.run_of_rows(emit, place, count, out, &mut tile),
                None => read.zero_rows(emit, count, out),
            }
        }
    }
}

impl Read<'_> {
    /// The output row of the `i`-th token of a run and `head`.
    fn out_row<'o, T, E: Emit<T>>(&self, emit: &E, i: usize, head: usize, out: &'o mut [T]) -> &'o mut [T] {
        &mut out[self.strides.index(i, head)..][..emit.row_len(self.dim, self.format.bytes())]
    }

    fn run_of_rows<T, E: Emit<T>>(
        &self,
        emit: &E,
        (block, slot): (usize, usize),
        count: usize,
        out: &mut [T],
        tile: &mut Tile,
    ) {
        let (map, dim, size) = (&self.map, self.dim, self.format.bytes());
        let base = block * map.block_stride;
        if map.rows_are_contiguous(dim) {
            for i in 0..count {
                for head in 0..self.heads {
                    let at = (base + head * map.head_stride + (slot + i) * map.slot_stride) * size;
                    let codes = &self.bytes[at..at + dim * size];
                    emit.emit(codes, head, (block, slot + i), self.out_row(emit, i, head, out));
                }
            }
            return;
        }
        for head in 0..self.heads {
            let head_bytes = &self.bytes[(base + head * map.head_stride) * size..];
            for first in (0..count).step_by(TILE_SLOTS) {
                let tile = tile.bytes(TILE_SLOTS.min(count - first) * dim * size);
                collect(map, size, dim, head_bytes, slot + first, tile);
                for (i, codes) in (first..).zip(tile.chunks_exact(dim * size)) {
                    emit.emit(codes, head, (block, slot + i), self.out_row(emit, i, head, out));
                }
            }
        }
    }

    fn zero_rows<T: Pod, E: Emit<T>>(&self, emit: &E, count: usize, out: &mut [T]) {
        for i in 0..count {
            for head in 0..self.heads {
                self.out_row(emit, i, head, out).fill(T::default());
            }
        }
    }
}
