//! `out = x · wᵀ` on the CPU: f32 activations, weights read where and as they are stored.
//!
//! ```text
//! x   [rows, inputs]      f32
//! w   [outputs, inputs]   f32, f16 or bf16: widened in registers, never in memory
//! out [rows, outputs]     f32
//!
//! out[r, o] = fold(lanes),   lanes[l] = Σ_{i ≡ l mod 16} x[r, i] * w[o, i]    fused, i ascending
//! ```
//!
//! A product is 16 running sums over its own two rows, folded in halves at the end, whatever tile,
//! thread or instruction set computes it. So a row's result is the same bits alone or in a batch
//! of any size. General GEMM libraries do not promise that: they cut the sum by the shape of the
//! whole product, and take other kernels for one row than for many. It costs no speed: both operands are
//! contiguous along the sum, so nothing is packed or transposed. A tile of R×C products loads R + C
//! vectors for R·C fused multiply-adds, and one row of activations streams the weights
//! at the speed of memory.

use half::{bf16, f16};
use rayon::prelude::*;

use super::cpu_lanes::{LANES, Lanes, Portable};
use crate::format::Element;
use crate::isa::Isa;

/// Weight elements, row-major `[outputs, inputs]`.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Weight rows one task computes at a time: with the widest models about 1 MB of weights, which
/// stay in a core's second-level cache while the activations stream past.
const PANEL: usize = 32;
/// Multiply-adds below which everything stays on the calling thread.
const PARALLEL_WORK: usize = 1 << 16;

/// `out = x · wᵀ` for the `out.len() / outputs` rows of `x`. Lengths must agree.
pub(super) fn linear(isa: Isa, x: &[f32], inputs: usize, w: Stored<'_>, out: &mut [f32], outputs: usize) {
    match w {
        Stored::F32(w) => run(isa, x, inputs, w, out, outputs),
        Stored::F16(w) => run(isa, x, inputs, w, out, outputs),
        Stored::BF16(w) => run(isa, x, inputs, w, out, outputs),
    }
}

fn run<T: Element>(isa: Isa, x: &[f32], inputs: usize, w: &[T], out: &mut [f32], outputs: usize) {
    assert!(inputs > 0 && outputs > 0, "an empty product");
    let rows = out.len() / outputs;
    assert!(x.len() == rows * inputs && w.len() == inputs * outputs && out.len() == rows * outputs);
    let shared = Output { data: out.as_mut_ptr(), outputs };
    let panel = |index: usize| {
        let first = index * PANEL;
        let count = PANEL.min(outputs - first);
        let w = &w[first * inputs..(first + count) * inputs];
        // SAFETY: panels name disjoint columns of `out`, which outlives the loop below.
        unsafe { dispatch(isa, x, w, inputs, &shared, first) };
    };
    let panels = outputs.div_ceil(PANEL);
    if rows * inputs * outputs < PARALLEL_WORK {
        (0..panels).for_each(panel);
    } else {
        (0..panels).into_par_iter().for_each(panel);
    }
}

/// The output matrix, written by several threads, each to its own columns.
struct Output {
    data: *mut f32,
    outputs: usize,
}

// SAFETY: threads write disjoint elements (see `run`) and read none.
unsafe impl Sync for Output {}

/// # Safety
/// No other thread may touch the columns `first .. first + w.len() / inputs` of `out`; `isa` is
/// available.
unsafe fn dispatch<T: Element>(isa: Isa, x: &[f32], w: &[T], inputs: usize, out: &Output, first: usize) {
    // SAFETY: each arm runs only where its instructions exist, as `Isa` values promise; the rest is
    // the caller's promise.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::panel_avx512(x, w, inputs, out, first),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::panel_avx2(x, w, inputs, out, first),
            // Fused multiply-add is part of every AArch64; the portable loops vectorize there.
            _ => panel::<Portable, T, 1, 2>(x, w, inputs, out, first),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::cpu_lanes::x86::{Avx2, Avx512};
    use super::{Element, Output, panel};

    /// # Safety
    /// As `panel`, and AVX-512 F, BW, DQ, VL.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn panel_avx512<T: Element>(x: &[f32], w: &[T], inputs: usize, out: &Output, first: usize) {
        // 6 × 4 sums, 4 weights and an activation: 29 of 32 registers.
        // SAFETY: the caller's promise.
        unsafe { panel::<Avx512, T, 6, 4>(x, w, inputs, out, first) }
    }

    /// # Safety
    /// As `panel`, and AVX2, FMA, F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn panel_avx2<T: Element>(x: &[f32], w: &[T], inputs: usize, out: &Output, first: usize) {
        // 2 × 2 sums of two registers each, 4 of weights, 2 of activations: 14 of 16.
        // SAFETY: the caller's promise.
        unsafe { panel::<Avx2, T, 2, 2>(x, w, inputs, out, first) }
    }
}

/// All rows of `x` times the rows of `w`, in tiles of R×C and what is left over.
///
/// # Safety
/// The instructions of `L` exist; no other thread touches these columns of `out`.
#[inline(always)]
unsafe fn panel<L: Lanes, T: Element, const R: usize, const C: usize>(
    x: &[f32],
    w: &[T],
    inputs: usize,
    out: &Output,
    first: usize,
) {
    let (rows, columns) = (x.len() / inputs, w.len() / inputs);
    let mut row = 0;
    // SAFETY: the caller's promise; tiles stay inside `rows` × `columns`.
    unsafe {
        while row < rows {
            // Few rows are what decoding has: the widest tile that fits reads the weights fewest
            // times, and four columns keep enough sums in flight even with one row.
            row += match rows - row {
                left if left >= R => row_of_tiles::<L, T, R, C>(x, w, inputs, row, columns, out, first),
                left if left >= 4 && R > 4 => row_of_tiles::<L, T, 4, 4>(x, w, inputs, row, columns, out, first),
                left if left >= 2 && R > 2 => row_of_tiles::<L, T, 2, 4>(x, w, inputs, row, columns, out, first),
                _ => row_of_tiles::<L, T, 1, 4>(x, w, inputs, row, columns, out, first),
            };
        }
    }
}

/// Rows `row .. row + R` of `x` times all rows of `w`; returns R.
///
/// # Safety
/// As `panel`; the rows exist.
#[inline(always)]
unsafe fn row_of_tiles<L: Lanes, T: Element, const R: usize, const C: usize>(
    x: &[f32],
    w: &[T],
    inputs: usize,
    row: usize,
    columns: usize,
    out: &Output,
    first: usize,
) -> usize {
    let x = &x[row * inputs..(row + R) * inputs];
    let tiles = columns - columns % C;
    // SAFETY: the caller's promise.
    unsafe {
        for column in (0..tiles).step_by(C) {
            let sums = tile::<L, T, R, C>(x, &w[column * inputs..(column + C) * inputs], inputs);
            for (r, sums) in sums.iter().enumerate() {
                for (c, sum) in sums.iter().enumerate() {
                    out.data.add((row + r) * out.outputs + first + column + c).write(*sum);
                }
            }
        }
        for column in tiles..columns {
            let sums = tile::<L, T, R, 1>(x, &w[column * inputs..(column + 1) * inputs], inputs);
            for (r, sums) in sums.iter().enumerate() {
                out.data.add((row + r) * out.outputs + first + column).write(sums[0]);
            }
        }
    }
    R
}

/// R rows of `x` times C rows of `w`, all `inputs` long.
///
/// # Safety
/// The instructions of `L` exist.
#[inline(always)]
unsafe fn tile<L: Lanes, T: Element, const R: usize, const C: usize>(
    x: &[f32],
    w: &[T],
    inputs: usize,
) -> [[f32; C]; R] {
    debug_assert!(x.len() == R * inputs && w.len() == C * inputs);
    let whole = inputs - inputs % LANES;
    // SAFETY: the instructions exist by the caller's promise; `i + LANES <= whole <= inputs` keeps
    // every load inside its row.
    unsafe {
        let mut sums = [[L::zero(); C]; R];
        for i in (0..whole).step_by(LANES) {
            let mut weights = [L::zero(); C];
            for (c, weight) in weights.iter_mut().enumerate() {
                *weight = L::load(w.as_ptr().add(c * inputs + i));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = L::load(x.as_ptr().add(r * inputs + i));
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = L::fma(x, weight, *sum);
                }
            }
        }
        if whole < inputs {
            // The last, short vector: padded with zeros, which add nothing.
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = padded(&x[r * inputs + whole..(r + 1) * inputs]);
                for (c, sum) in sums.iter_mut().enumerate() {
                    let weight = padded(&w[c * inputs + whole..(c + 1) * inputs]);
                    *sum = L::fma(L::load(x.as_ptr()), L::load(weight.as_ptr()), *sum);
                }
            }
        }
        // No closures: they would not inherit the caller's instruction set.
        let mut folded = [[0.0; C]; R];
        for (folded, sums) in folded.iter_mut().zip(sums) {
            for (folded, sum) in folded.iter_mut().zip(sums) {
                *folded = sum.fold();
            }
        }
        folded
    }
}

#[inline(always)]
fn padded<T: Element>(values: &[T]) -> [T; LANES] {
    let mut padded = [T::default(); LANES];
    padded[..values.len()].copy_from_slice(values);
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values in (-1, 1), exact in bf16 and f16.
    fn values<T: Element>(len: usize, seed: u32) -> Vec<T> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            T::from_f32(((state >> 24) as f32 - 127.5) / 128.0)
        };
        (0..len).map(|_| next()).collect()
    }

    fn check<T: Element>() {
        for (rows, inputs, outputs) in
            [(1, 1, 1), (1, 16, 4), (7, 48, 37), (6, 17, 5), (13, 100, 33), (2, 15, 70), (25, 300, 64)]
        {
            let (x, w) = (values::<f32>(rows * inputs, 1), values::<T>(outputs * inputs, 2));
            let mut reference: Option<Vec<u32>> = None;
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let mut out = vec![f32::NAN; rows * outputs];
                run(isa, &x, inputs, &w, &mut out, outputs);
                for (index, got) in out.iter().enumerate() {
                    let (r, o) = (index / outputs, index % outputs);
                    let exact: f64 =
                        (0..inputs).map(|i| f64::from(x[r * inputs + i]) * f64::from(w[o * inputs + i].to_f32())).sum();
                    // inputs/16 + 4 roundings of sums below `inputs`.
                    let bound = inputs as f64 * (inputs as f64 / 16.0 + 5.0) * f64::from(f32::EPSILON);
                    assert!((f64::from(*got) - exact).abs() <= bound, "{isa} {rows}x{inputs}x{outputs}: {got} {exact}");
                }
                let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                // Row by row: the same bits.
                let mut single = vec![f32::NAN; outputs];
                for r in 0..rows {
                    run(isa, &x[r * inputs..(r + 1) * inputs], inputs, &w, &mut single, outputs);
                    assert!(single.iter().zip(&bits[r * outputs..]).all(|(a, b)| a.to_bits() == *b), "{isa} row {r}");
                }
                // And on every instruction set.
                assert_eq!(*reference.get_or_insert(bits.clone()), bits, "{isa}");
            }
        }
    }

    #[test]
    fn products_match_f64_and_do_not_depend_on_batch_or_isa() {
        check::<f32>();
        check::<f16>();
        check::<bf16>();
    }
}
