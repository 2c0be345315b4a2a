//! [`MergeStates`], fast: threads own ranges of tokens; rows are widened, merged and narrowed a
//! piece at a time by the SIMD codecs.

use super::scalar::{Merge, weighted_mean};
use super::threads::{self, Job};
use super::*;
use crate::args::RowStrides;
use crate::codec::{ScaleRow, as_bytes, as_bytes_mut, decode_slice, encode_slice};

pub(super) fn run<T: Element>(op: MergeStates<'_, CpuBackend, T>, isa: Isa) {
    let (heads, dim) = (op.num_heads, op.head_dim);
    let input = Input { isa, heads, dim, a: op.a, a_lse: op.a_lse, b: op.b, b_lse: op.b_lse, strides: op.strides };
    let bytes = op.num_tokens * heads * dim * 3 * size_of::<T>();
    threads::run(Part { input: &input, tokens: 0..op.num_tokens, output: op.output, lse: op.lse }, bytes);
}

/// What all threads read.
struct Input<'a, T> {
    isa: Isa,
    heads: usize,
    dim: usize,
    a: &'a [T],
    a_lse: &'a [f32],
    b: &'a [T],
    b_lse: &'a [f32],
    strides: RowStrides,
}

/// A range of tokens, owned by one thread.
struct Part<'i, 'o, T> {
    input: &'i Input<'i, T>,
    tokens: std::ops::Range<usize>,
    /// Output rows and LSE from the first token of the range on.
    output: &'o mut [T],
    lse: Option<&'o mut [f32]>,
}

impl<T: Element> Job for Part<'_, '_, T> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Part { input, tokens, output, lse } = self;
        let count = tokens.len() * left / parts;
        let (output, rest) = threads::split_rows(output, count, input.strides.token);
        let (lse, lse_rest) = lse.map(|lse| lse.split_at_mut(count * input.heads)).unzip();
        let cut = tokens.start + count;
        (
            Part { input, tokens: tokens.start..cut, output, lse },
            Part { input, tokens: cut..tokens.end, output: rest, lse: lse_rest },
        )
    }

    fn run(mut self) {
        let input = self.input;
        for (i, token) in self.tokens.enumerate() {
            for head in 0..input.heads {
                let state = token * input.heads + head;
                let merge = Merge::new(input.a_lse[state], input.b_lse[state]);
                if let Some(lse) = self.lse.as_deref_mut() {
                    lse[i * input.heads + head] = merge.lse();
                }
                let row = &mut self.output[input.strides.index(i, head)..][..input.dim];
                let at = input.strides.index(token, head);
                let (a, b) = (&input.a[at..at + input.dim], &input.b[at..at + input.dim]);
                match merge {
                    Merge::Neither => row.fill(T::default()),
                    Merge::OnlyA { .. } => row.copy_from_slice(a),
                    Merge::OnlyB { .. } => row.copy_from_slice(b),
                    Merge::Both { weight_a, weight_b, .. } => mean_row(input.isa, (a, weight_a), (b, weight_b), row),
                }
            }
        }
    }
}

/// `row = a * weight_a + b * weight_b`.
fn mean_row<T: Element>(isa: Isa, (a, weight_a): (&[T], f32), (b, weight_b): (&[T], f32), row: &mut [T]) {
    const PIECE: usize = 128;
    let (mut wide_a, mut wide_b) = ([0.0f32; PIECE], [0.0f32; PIECE]);
    let format = T::DTYPE.as_kv_format();
    for ((a, b), row) in a.chunks(PIECE).zip(b.chunks(PIECE)).zip(row.chunks_mut(PIECE)) {
        let (wide_a, wide_b) = (&mut wide_a[..a.len()], &mut wide_b[..a.len()]);
        decode_slice(isa, format, as_bytes(a), ScaleRow::One(1.0), wide_a);
        decode_slice(isa, format, as_bytes(b), ScaleRow::One(1.0), wide_b);
        for (a, b) in wide_a.iter_mut().zip(wide_b) {
            *a = weighted_mean(*a, weight_a, *b, weight_b);
        }
        encode_slice(isa, format, wide_a, ScaleRow::One(1.0), as_bytes_mut(row));
    }
}
