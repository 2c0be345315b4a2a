//! Matrix products over a decoded tile, where many query rows share it.
//!
//! ```text
//! scores[r][t] = sum_d q[r][d] kt[d][t]                 kt  keys, decoded and transposed: [dim, TILE]
//! acc[r][d]    = acc[r][d] alpha[r] + sum_t p[r][t] v[t][d]    v  values, decoded: [TILE, stride]
//! ```
//! Both multiply an element of a row on the left, in all lanes, by a row on the right, so that nothing is summed across
//! lanes. Sums are those of the kernels for few rows, bit by bit. [`ROWS`] rows times a unit of columns stay in registers
//! while the depth is walked (24 of 32 vectors of AVX-512, 12 of 16 of AVX2): `VECS + ROWS` loads for `VECS * ROWS` fused
//! products.

use std::mem::MaybeUninit;

use super::kernels::{Ahead, Decode, Kernels, Pv, Qk, TILE, prefetch_row};
use super::simd::Simd;
use crate::codec::Codec;

/// Rows of `left` at a time.
const ROWS: usize = 6;

/// Factors of rows that have been scaled. Enough of them: an item has more than MAX_ROWS only of one query, whose rows see the
/// same.
const ONES: [f32; super::tile::MAX_ROWS] = [1.0; super::tile::MAX_ROWS];

/// What `kernels.qk` does, by way of a tile decoded to `tile`.
///
/// # Safety
/// As `kernels.qk`; `tile` has `TILE` f32 for each channel, up to a whole unit.
pub(super) unsafe fn qk(kernels: &Kernels, a: &Qk<'_>, tile: *mut f32) {
    let decode = Decode { rows: a.keys, tokens: a.tokens, dim: a.dim, dst: tile, stride: TILE };
    let product = Product {
        left: a.q,
        left_stride: a.q_stride,
        rows: a.rows,
        right: tile,
        right_stride: TILE,
        depth: a.dim,
        columns: a.tokens,
        factors: &[],
        out: a.scores,
        out_stride: TILE,
        ahead: a.ahead,
    };
    // SAFETY: the caller's promises.
    unsafe {
        (kernels.decode_transposed)(&decode);
        (kernels.dots)(&product);
    }
}

/// What `kernels.pv` does over `tokens` rows, by way of a tile decoded to `tile`.
///
/// # Safety
/// As `kernels.pv`; `tile` has `acc_stride` f32 for each of `tokens` rows.
pub(super) unsafe fn pv(kernels: &Kernels, a: &Pv<'_>, tokens: usize, tile: *mut f32) {
    let stride = a.acc_stride;
    let decode = Decode { rows: a.values, tokens, dim: a.dim, dst: tile, stride };
    let product = |rows: std::ops::Range<usize>, lo: usize, hi: usize, factors: &[f32], ahead: Ahead<'_>| {
        let product = Product {
            left: a.p.wrapping_add(rows.start * TILE + lo),
            left_stride: TILE,
            rows: rows.len(),
            right: tile.wrapping_add(lo * stride),
            right_stride: stride,
            depth: hi - lo,
            columns: a.dim,
            factors,
            out: a.acc.wrapping_add(rows.start * stride),
            out_stride: stride,
            ahead,
        };
        // SAFETY: the caller's promises: these rows, positions lo..hi of the tile.
        unsafe { (kernels.product)(&product) };
    };
    // SAFETY: the caller's promises.
    unsafe { (kernels.decode)(&decode) };
    // Positions in their order for every row, and nobody's sums get a zero times what it does not see. So what all rows
    // see, if they begin there; then runs of rows that see the same.
    let visible = &a.visible[..a.rows];
    let nothing = Ahead { bytes: 0, ..a.ahead };
    let (lo, hi) = (visible[0].0, visible.iter().map(|range| range.1).min().unwrap_or(0));
    let together = visible.iter().all(|range| range.0 == lo) && lo <= hi;
    if together {
        product(0..a.rows, lo, hi, a.alpha, a.ahead);
    }
    let mut row = 0;
    for run in visible.chunk_by(|a, b| a == b) {
        let (rows, (first, end)) = (row..row + run.len(), run[0]);
        row = rows.end;
        if !together {
            let (alpha, ahead) = (&a.alpha[rows.clone()], if rows.start == 0 { a.ahead } else { nothing });
            product(rows, first, end, alpha, ahead);
        } else if hi < end {
            product(rows, hi, end, &ONES[..run.len()], nothing);
        }
    }
}

/// Arguments of `product` and `dots`.
pub(super) struct Product<'a> {
    /// `[rows, left_stride]`, of which `depth` elements are read.
    pub(super) left: *const f32,
    pub(super) left_stride: usize,
    pub(super) rows: usize,
    /// `[depth, right_stride]`.
    pub(super) right: *const f32,
    pub(super) right_stride: usize,
    pub(super) depth: usize,
    /// Columns; `right` and `out` have them up to a whole unit.
    pub(super) columns: usize,
    /// Factor of what is in `out`, `[rows]`; `dots` has none, and does not read `out`.
    pub(super) factors: &'a [f32],
    /// `[rows, out_stride]`.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    pub(super) ahead: Ahead<'a>,
}

/// Rows of a product in registers.
type Block<S, const R: usize> = [[<S as Simd>::V; 4]; R];

/// Adds an element of each row of `left` times a row of `right`.
// Index loops of constant length over arrays of registers: what the compiler unrolls. Closures and iterators may become calls,
// which have not the caller's instructions.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn add_step<S: Simd, const R: usize>(
    a: &Product<'_>,
    left: *const f32,
    right: *const f32,
    step: usize,
    acc: &mut Block<S, R>,
) {
    const { assert!(S::VECS <= 4) }
    // SAFETY: the caller's promises: R rows of `left`, a unit of columns of `right`, more than `step` steps.
    unsafe {
        let mut x = [S::splat(0.0); 4];
        for v in 0..S::VECS {
            x[v] = S::load(right.add(step * a.right_stride + v * S::LANES));
        }
        for r in 0..R {
            let y = S::splat(*left.add(r * a.left_stride + step));
            for v in 0..S::VECS {
                acc[r][v] = S::fma(y, x[v], acc[r][v]);
            }
        }
    }
}

/// R rows of a unit of columns to `out`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn store<S: Simd, const R: usize>(a: &Product<'_>, out: *mut f32, acc: &Block<S, R>) {
    for r in 0..R {
        for v in 0..S::VECS {
            // SAFETY: the caller's promise.
            unsafe { S::store(out.add(r * a.out_stride + v * S::LANES), acc[r][v]) };
        }
    }
}

/// Calls `$rows::<S, R>(a, row)` for rows [`ROWS`] at a time, and prefetches a share of what is ahead with each.
macro_rules! for_rows {
    ($a:expr, $rows:ident) => {{
        let share = TILE.div_ceil($a.rows.div_ceil(ROWS).max(1));
        let (mut row, mut at) = (0, 0);
        while row < $a.rows {
            for ahead in at..TILE.min(at + share) {
                prefetch_row::<S>($a.ahead.rows[ahead], $a.ahead.bytes);
            }
            at += share;
            row += match $a.rows - row {
                1 => $rows::<S, 1>($a, row),
                2 => $rows::<S, 2>($a, row),
                3 => $rows::<S, 3>($a, row),
                4 => $rows::<S, 4>($a, row),
                5 => $rows::<S, 5>($a, row),
                _ => $rows::<S, ROWS>($a, row),
            };
        }
    }};
}

/// `out = out * factors + left * right`, the depth in its order.
///
/// # Safety
/// As [`Simd`]; pointers are valid for what [`Product`] says of them.
#[inline(always)]
pub(super) unsafe fn product<S: Simd>(a: &Product<'_>) {
    // SAFETY: the caller's promises; row + R <= rows.
    unsafe { for_rows!(a, product_rows) }
}

/// `out = left * right`, summed as `kernels::qk` sums: every `LANES`-th product, then those sums as [`Simd::sum_each`] does.
/// So a query's scores do not depend on how many others there are.
///
/// # Safety
/// As `product`.
#[inline(always)]
pub(super) unsafe fn dots<S: Simd>(a: &Product<'_>) {
    // SAFETY: the caller's promises; row + R <= rows.
    unsafe { for_rows!(a, dots_rows) }
}

/// Rows `row..row + R`. Returns `R`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn dots_rows<S: Simd, const R: usize>(a: &Product<'_>, row: usize) -> usize {
    const { assert!(S::LANES.is_power_of_two() && S::LANES <= 16) }
    for column in (0..a.columns).step_by(S::UNIT) {
        // SAFETY: the caller's promises: rows row..row + R, the unit of columns at `column`, `depth` steps. Sums of level n
        // are there where bit n of `leaf` is set.
        unsafe {
            let (left, right) = (a.left.add(row * a.left_stride), a.right.add(column));
            // Sums of 1, 2, 4 and 8 lanes that wait for their other half.
            let mut sums = [const { MaybeUninit::<Block<S, R>>::uninit() }; 4];
            for leaf in 0..S::LANES {
                let mut acc = [[S::splat(0.0); 4]; R];
                let mut step = S::SUM_ORDER[leaf];
                while step < a.depth {
                    add_step::<S, R>(a, left, right, step, &mut acc);
                    step += S::LANES;
                }
                let mut level = 0;
                while leaf >> level & 1 == 1 {
                    let other = sums[level].assume_init_ref();
                    for r in 0..R {
                        for v in 0..S::VECS {
                            acc[r][v] = S::add(other[r][v], acc[r][v]);
                        }
                    }
                    level += 1;
                }
                if leaf + 1 < S::LANES {
                    sums[level].write(acc);
                } else {
                    store::<S, R>(a, a.out.add(row * a.out_stride + column), &acc);
                }
            }
        }
    }
    R
}

/// Rows `row..row + R`. Returns `R`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn product_rows<S: Simd, const R: usize>(a: &Product<'_>, row: usize) -> usize {
    for column in (0..a.columns).step_by(S::UNIT) {
        // SAFETY: the caller's promises: rows row..row + R, the unit of columns at `column`, `depth` steps.
        unsafe {
            let out = a.out.add(row * a.out_stride + column);
            let mut acc = [[S::splat(0.0); 4]; R];
            for r in 0..R {
                let factor = S::splat(a.factors[row + r]);
                for v in 0..S::VECS {
                    acc[r][v] = S::mul(S::load(out.add(r * a.out_stride + v * S::LANES)), factor);
                }
            }
            let (left, right) = (a.left.add(row * a.left_stride), a.right.add(column));
            for step in 0..a.depth {
                add_step::<S, R>(a, left, right, step, &mut acc);
            }
            store::<S, R>(a, out, &acc);
        }
    }
    R
}

/// Decodes rows as `kernels::decode` does, but to `dst[channel][token]`, `stride` f32 a channel: channels up to a whole
/// unit, tokens up to a whole vector, whose rows must be readable.
///
/// # Safety
/// As [`Simd`]; `dst` has `stride` f32 for each channel, up to a whole unit.
#[inline(always)]
pub(super) unsafe fn decode_transposed<S: Simd, F: Codec>(a: &Decode<'_>) {
    for d in (0..a.dim).step_by(S::UNIT) {
        for t in (0..a.tokens).step_by(S::LANES) {
            let n = S::UNIT.min(a.dim - d);
            // SAFETY: rows t..t + LANES hold `dim` elements; TILE is whole vectors.
            unsafe {
                let rows = &a.rows[t..t + S::LANES];
                S::decode_transposed::<F>(rows, d * F::BYTES, n, a.dst.add(d * a.stride + t), a.stride);
            }
        }
    }
}

/// Arguments of `transpose_slots`: slots of one or two bytes, 16 bytes of them, of `channels` channels.
pub(super) struct Slots {
    /// `[channels, src_stride]` bytes, of which 16 each are read.
    pub(super) src: *const u8,
    pub(super) src_stride: usize,
    pub(super) channels: usize,
    /// Two bytes.
    pub(super) wide: bool,
    /// `[slots, dst_stride]` bytes, of which one or two each channel are written.
    pub(super) dst: *mut u8,
    pub(super) dst_stride: usize,
}

/// Rows of the slots, of as many channels as are answered.
///
/// # Safety
/// As [`Simd`]; pointers are valid for what [`Slots`] says of them.
#[inline(always)]
pub(super) unsafe fn transpose_slots<S: Simd>(a: &Slots) -> usize {
    if S::SLOT_CHANNELS == 0 {
        return 0;
    }
    let bytes = if a.wide { 2 } else { 1 };
    let mut done = 0;
    while done + S::SLOT_CHANNELS <= a.channels {
        // SAFETY: the caller's promises.
        unsafe {
            S::transpose_slots(
                a.src.add(done * a.src_stride),
                a.src_stride,
                a.dst.add(done * bytes),
                a.dst_stride,
                a.wide,
            );
        }
        done += S::SLOT_CHANNELS;
    }
    done
}
