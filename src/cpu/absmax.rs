//! [`Absmax`], fast: a maximum is the same in any order, so threads take tokens (one maximum for
//! the tensor) or heads (their own maxima).

use super::scalar::raise;
use super::threads::{self, Job};
use super::*;
use crate::args::RowStrides;
use crate::codec::{ScaleRow, absmax_slice, as_bytes, decode_slice};
use crate::scale::Granularity;

pub(super) fn run<T: Element>(op: Absmax<'_, CpuBackend, T>, isa: Isa) {
    let bytes = op.num_tokens * op.num_heads * op.head_dim * size_of::<T>();
    let mut rows = Rows { isa, data: op.input, strides: op.strides, tokens: op.num_tokens, dim: op.head_dim };
    match op.granularity {
        Granularity::Tensor => {
            let mut heads = op.num_heads;
            if rows.strides.head == rows.dim {
                (heads, rows.dim) = (1, heads * rows.dim);
            }
            let max = tensor_max(rows, heads, threads::parts_for(bytes));
            raise(&mut op.running[0], max);
        }
        Granularity::Head | Granularity::Channel => {
            let per_head = op.running.len() / op.num_heads;
            threads::run(Heads { rows, first: 0, per_head, running: op.running }, bytes);
        }
    }
}

/// The data, `[tokens, heads, dim]`.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    isa: Isa,
    data: &'a [T],
    strides: RowStrides,
    tokens: usize,
    dim: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    fn row(&self, token: usize, head: usize) -> &'a [T] {
        &self.data[self.strides.index(token, head)..][..self.dim]
    }

    /// The tokens before `token`, and the others.
    fn split(self, token: usize) -> (Self, Self) {
        let rest = &self.data[(token * self.strides.token).min(self.data.len())..];
        (Rows { tokens: token, ..self }, Rows { tokens: self.tokens - token, data: rest, ..self })
    }
}

/// The maximum of everything.
fn tensor_max<T: Element>(rows: Rows<'_, T>, heads: usize, parts: usize) -> f32 {
    if parts > 1 {
        let left = parts / 2;
        let (a, b) = rows.split(rows.tokens * left / parts);
        let (a, b) = threads::join(|| tensor_max(a, heads, left), || tensor_max(b, heads, parts - left));
        return a.max(b);
    }
    let row_max = |token, head| absmax_slice(rows.isa, rows.row(token, head));
    (0..rows.tokens).flat_map(|token| (0..heads).map(move |head| row_max(token, head))).fold(0.0, f32::max)
}

/// Heads owned by one thread, with their maxima.
struct Heads<'a, 'r, T> {
    rows: Rows<'a, T>,
    first: usize,
    per_head: usize,
    running: &'r mut [f32],
}

impl<T: Element> Job for Heads<'_, '_, T> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Heads { rows, first, per_head, running } = self;
        let count = running.len() / per_head * left / parts;
        let (running, rest) = running.split_at_mut(count * per_head);
        (Heads { rows, first, per_head, running }, Heads { rows, first: first + count, per_head, running: rest })
    }

    fn run(self) {
        for token in 0..self.rows.tokens {
            for (head, running) in self.running.chunks_exact_mut(self.per_head).enumerate() {
                let row = self.rows.row(token, self.first + head);
                match running {
                    [running] => raise(running, absmax_slice(self.rows.isa, row)),
                    running => channel_max(self.rows.isa, row, running),
                }
            }
        }
    }
}

/// `running[d] = max(running[d], |row[d]|)`, NaN ignored, infinities as `f32::MAX`.
fn channel_max<T: Element>(isa: Isa, row: &[T], running: &mut [f32]) {
    const PIECE: usize = 128;
    let mut wide = [0.0f32; PIECE];
    for (row, running) in row.chunks(PIECE).zip(running.chunks_mut(PIECE)) {
        let wide = &mut wide[..row.len()];
        decode_slice(isa, T::DTYPE.as_kv_format(), as_bytes(row), ScaleRow::One(1.0), wide);
        for (running, x) in running.iter_mut().zip(wide) {
            raise(running, *x);
        }
    }
}
