//! `out = x · wᵀ` on the CPU by the `gemm` crate, always called with one shape.
//!
//! ```text
//! x   [rows, inputs]      f32
//! w   [outputs, inputs]   f32, f16 or bf16
//! out [rows, outputs]     f32
//!
//! for each panel of 8 rows of w, the panels shared among threads:
//!     f32: in place;   f16, bf16: widened to a scratch of 8 rows
//!     for each row of x:   out[row, panel] = gemm(panel, row)      [8, inputs] · [inputs]
//! ```
//!
//! A row must give the same bits alone, in a batch and in a chunk of any size. GEMM libraries do not
//! promise that: which kernel runs, and so the order of the sum, depends on the shape of the product.
//! Here the shape depends on the weight alone: one row of activations a call, and a last panel
//! that is short for every batch. On another instruction set `gemm` may add in another order.
//!
//! What it costs, as multiples of the time of plain `gemm` over the weights widened beforehand
//! (4096×4096, two Zen 5 cores, medians of five runs):
//!
//! | rows of x a call | 1 row, bf16 | 1 row, f32 | 512 rows |
//! |---|---|---|---|
//! | 1 | 1.2 | 0.8 | 2.7 |
//! | 16, padded with zeros | 2.6 | 2.1 | 1.4 |
//!
//! Decoding is the first two columns, hence one row. Panels of 8 rows stay in a second-level cache
//! even with the widest models; wider panels were no faster.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::codec::{ScaleRow, as_bytes, decode_slice};
use crate::format::Element;
use crate::isa::Isa;

/// Weight elements, row-major `[outputs, inputs]`.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl Stored<'_> {
    fn len(&self) -> usize {
        match self {
            Stored::F32(w) => w.len(),
            Stored::F16(w) => w.len(),
            Stored::BF16(w) => w.len(),
        }
    }

    /// The elements of `range` as f32: themselves, or widened into `scratch`.
    fn widened<'s>(&'s self, isa: Isa, range: Range<usize>, scratch: &'s mut Vec<f32>) -> &'s [f32] {
        match self {
            Stored::F32(w) => &w[range],
            Stored::F16(w) => widen(isa, &w[range], scratch),
            Stored::BF16(w) => widen(isa, &w[range], scratch),
        }
    }
}

fn widen<'s, T: Element>(isa: Isa, w: &[T], scratch: &'s mut Vec<f32>) -> &'s [f32] {
    scratch.resize(w.len(), 0.0);
    decode_slice(isa, T::DTYPE.as_kv_format(), as_bytes(w), ScaleRow::One(1.0), scratch);
    scratch
}

/// Weight rows one call multiplies by.
const PANEL: usize = 8;
/// Multiply-adds below which everything stays on the calling thread.
const PARALLEL_WORK: usize = 1 << 16;

/// `out = x · wᵀ` for the `out.len() / outputs` rows of `x`. Lengths must agree.
pub(super) fn linear(isa: Isa, x: &[f32], inputs: usize, w: Stored<'_>, out: &mut [f32], outputs: usize) {
    assert!(inputs > 0 && outputs > 0, "an empty product");
    let rows = out.len() / outputs;
    assert!(x.len() == rows * inputs && w.len() == inputs * outputs && out.len() == rows * outputs);
    let shared = Output(out.as_mut_ptr());
    let panel = |scratch: &mut Vec<f32>, index: usize| {
        let first = index * PANEL;
        let count = PANEL.min(outputs - first);
        let w = w.widened(isa, first * inputs..(first + count) * inputs, scratch);
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            // SAFETY: `first + count <= outputs` and `row < rows`, so this stays inside `out`, which
            // outlives the loops below; no other panel has these columns.
            unsafe { matrix_times_vector(w, x, shared.at(row * outputs + first)) };
        }
    };
    let panels = outputs.div_ceil(PANEL);
    if rows * inputs * outputs < PARALLEL_WORK {
        let mut scratch = Vec::new();
        (0..panels).for_each(|index| panel(&mut scratch, index));
    } else {
        (0..panels).into_par_iter().for_each_init(Vec::new, panel);
    }
}

/// The output matrix, written by several threads, each to its own columns.
struct Output(*mut f32);

// SAFETY: threads write disjoint elements (see `linear`) and read none.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// `index` lies in the matrix.
    unsafe fn at(&self, index: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }
}

/// `out = w · x`, `w` row-major with rows as long as `x`.
///
/// # Safety
/// `out` may be written for each row of `w`, and nobody else uses it meanwhile.
unsafe fn matrix_times_vector(w: &[f32], x: &[f32], out: *mut f32) {
    let (m, n, k) = (w.len() / x.len(), 1, x.len());
    let row_stride = k as isize;
    // SAFETY: the strides of `w` (1 along a row) and of `x` and `out` (gapless columns) keep gemm
    // inside the slices and the caller's `out`; old values of `out` are not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            m as isize,
            1,
            false,
            w.as_ptr(),
            1,
            row_stride,
            x.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values in (-1, 1) that use the whole mantissa: sums must round, or their order
    /// would not show.
    fn values<T: Element>(len: usize, seed: u32) -> Vec<T> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            T::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..len).map(|_| next()).collect()
    }

    fn bits(isa: Isa, x: &[f32], inputs: usize, w: Stored<'_>, outputs: usize) -> Vec<u32> {
        let mut out = vec![f32::NAN; x.len() / inputs * outputs];
        linear(isa, x, inputs, w, &mut out, outputs);
        out.iter().map(|x| x.to_bits()).collect()
    }

    fn check<T: Element>(stored: fn(&[T]) -> Stored<'_>) {
        // With one, two and many inputs, a last panel of one row, and enough work for several threads.
        for (rows, inputs, outputs) in [
            (1, 1, 1),
            (3, 2, 9),
            (1, 16, 4),
            (7, 48, 37),
            (6, 17, 5),
            (13, 100, 33),
            (2, 15, 70),
            (25, 300, 64),
            (40, 1100, 25),
        ] {
            let (x, weights) = (values::<f32>(rows * inputs, 1), values::<T>(outputs * inputs, 2));
            let w = stored(&weights);
            let batch = bits(Isa::Scalar, &x, inputs, w, outputs);
            for (index, got) in batch.iter().enumerate() {
                let (x, w) = (&x[index / outputs * inputs..], &weights[index % outputs * inputs..]);
                let products = (0..inputs).map(|i| f64::from(x[i]) * f64::from(w[i].to_f32()));
                let (exact, magnitude) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                // Products and sums round at most `inputs` times each, in any order, by epsilon / 2.
                let bound = inputs as f64 * f64::from(f32::EPSILON) * magnitude;
                let got = f64::from(f32::from_bits(*got));
                assert!((got - exact).abs() <= bound, "{rows}x{inputs}x{outputs}: {got} {exact}");
            }
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                for chunk in [1, 2, 5, rows] {
                    let chunked: Vec<u32> =
                        x.chunks(chunk * inputs).flat_map(|x| bits(isa, x, inputs, w, outputs)).collect();
                    assert_eq!(chunked, batch, "{isa}, {rows}x{inputs}x{outputs} by {chunk} rows");
                }
            }
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let alone = pool.install(|| bits(Isa::detect(), &x, inputs, w, outputs));
                assert_eq!(alone, batch, "{threads} threads");
            }
        }
    }

    #[test]
    fn products_match_f64_and_do_not_depend_on_batch_threads_or_widening() {
        check::<f32>(|w| Stored::F32(w));
        check::<f16>(|w| Stored::F16(w));
        check::<bf16>(|w| Stored::BF16(w));
    }
}
