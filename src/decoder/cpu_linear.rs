//! `out = x · wᵀ` on the CPU, weights as stored.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::isa::Isa;

/// Weight elements, row-major `[outputs, inputs]`.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Placeholder order: 16 partial sums a product, folded in halves.
pub(super) fn linear(_isa: Isa, x: &[f32], inputs: usize, w: Stored<'_>, out: &mut [f32], outputs: usize) {
    fn dot(x: &[f32], w: impl Iterator<Item = f32>) -> f32 {
        let mut sums = [0.0f32; 16];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            sums[i % 16] += x * w;
        }
        let mut width = 8;
        while width > 0 {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
            width /= 2;
        }
        sums[0]
    }
    out.par_chunks_mut(outputs).zip(x.par_chunks(inputs)).for_each(|(out, x)| {
        for (j, out) in out.iter_mut().enumerate() {
            let row = j * inputs..(j + 1) * inputs;
            *out = match w {
                Stored::F32(w) => dot(x, w[row].iter().copied()),
                Stored::F16(w) => dot(x, w[row].iter().map(|w| w.to_f32())),
                Stored::BF16(w) => dot(x, w[row].iter().map(|w| w.to_f32())),
            };
        }
    });
}
