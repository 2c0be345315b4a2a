//! [`Quantize`] and [`Dequantize`], fast: threads own ranges of tokens.
//!
//! Where heads are gapless and their scales read as one row, a token is one row of
//! `heads * dim` channels.

use super::rows::ScaleRows;
use super::threads::{self, Job};
use super::*;
use crate::args::RowStrides;
use crate::codec::{decode_slice, encode_slice};

pub(super) fn quantize<T: Element>(op: Quantize<'_, CpuBackend, T>, isa: Isa) {
    let Some(scales) = ScaleRows::new(op.format, &op.scale) else { return scalar::quantize(op) };
    let dense = Dense::new(isa, op.format, op.num_heads, op.head_dim, op.strides, scales);
    let bytes = op.num_tokens * dense.heads * dense.dim * (size_of::<T>() + op.format.bytes());
    let codes = &mut op.codes[..op.num_tokens * dense.code_bytes()];
    threads::run(Encode { dense: &dense, tokens: op.num_tokens, input: op.input, codes }, bytes);
}

pub(super) fn dequantize<T: Element>(op: Dequantize<'_, CpuBackend, T>, isa: Isa) {
    let Some(scales) = ScaleRows::new(op.format, &op.scale) else { return scalar::dequantize(op) };
    let dense = Dense::new(isa, op.format, op.num_heads, op.head_dim, op.strides, scales);
    let bytes = op.num_tokens * dense.heads * dense.dim * (size_of::<T>() + op.format.bytes());
    let codes = &op.codes[..op.num_tokens * dense.code_bytes()];
    threads::run(Decode { dense: &dense, tokens: op.num_tokens, codes, output: op.output }, bytes);
}

/// The shape of both: `[tokens, heads, dim]` with strides on one side, gapless codes on the other.
struct Dense<'a> {
    isa: Isa,
    format: KvFormat,
    heads: usize,
    dim: usize,
    strides: RowStrides,
    scales: ScaleRows<'a>,
}

impl<'a> Dense<'a> {
    fn new(
        isa: Isa,
        format: KvFormat,
        mut heads: usize,
        mut dim: usize,
        strides: RowStrides,
        scales: ScaleRows<'a>,
    ) -> Self {
        if strides.head == dim && scales.heads_merge(dim) {
            (heads, dim) = (1, heads * dim);
        }
        Dense { isa, format, heads, dim, strides, scales }
    }

    /// Bytes of the codes of one token.
    fn code_bytes(&self) -> usize {
        self.heads * self.dim * self.format.bytes()
    }
}

/// Tokens quantized by one thread.
struct Encode<'j, T> {
    dense: &'j Dense<'j>,
    tokens: usize,
    input: &'j [T],
    codes: &'j mut [u8],
}

impl<T: Element> Job for Encode<'_, T> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Encode { dense, tokens, input, codes } = self;
        let cut = tokens * left / parts;
        let (codes, rest) = threads::split_rows(codes, cut, dense.code_bytes());
        let input_rest = &input[(cut * dense.strides.token).min(input.len())..];
        (
            Encode { dense, tokens: cut, input, codes },
            Encode { dense, tokens: tokens - cut, input: input_rest, codes: rest },
        )
    }

    fn run(self) {
        let dense = self.dense;
        for (token, codes) in self.codes.chunks_exact_mut(dense.code_bytes()).enumerate() {
            for (head, codes) in codes.chunks_exact_mut(dense.dim * dense.format.bytes()).enumerate() {
                let row = &self.input[dense.strides.index(token, head)..][..dense.dim];
                encode_slice(dense.isa, dense.format, row, dense.scales.row(head, dense.dim), codes);
            }
        }
    }
}

/// Tokens dequantized by one thread.
struct Decode<'j, T> {
    dense: &'j Dense<'j>,
    tokens: usize,
    codes: &'j [u8],
    output: &'j mut [T],
}

impl<T: Element> Job for Decode<'_, T> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Decode { dense, tokens, codes, output } = self;
        let cut = tokens * left / parts;
        let (output, rest) = threads::split_rows(output, cut, dense.strides.token);
        let (codes, codes_rest) = codes.split_at(cut * dense.code_bytes());
        (
            Decode { dense, tokens: cut, codes, output },
            Decode { dense, tokens: tokens - cut, codes: codes_rest, output: rest },
        )
    }

    fn run(self) {
        let dense = self.dense;
        for (token, codes) in self.codes.chunks_exact(dense.code_bytes()).enumerate() {
            for (head, codes) in codes.chunks_exact(dense.dim * dense.format.bytes()).enumerate() {
                let row = &mut self.output[dense.strides.index(token, head)..][..dense.dim];
                decode_slice(dense.isa, dense.format, codes, dense.scales.row(head, dense.dim), row);
            }
        }
    }
}
