//! Matrix products over a decoded tile, where many query rows share it.
//!
//! ```text
//! scores[r][t] = sum_d q[r][d] kt[d][t]                 kt  keys, decoded and transposed: [dim, TILE]
//! acc[r][d]    = acc[r][d] alpha[r] + sum_t p[r][t] v[t][d]    v  values, decoded: [TILE, stride]
//! ```
//! Both are `out = out * factor + left * right`: an element of `left` to all lanes times a row of `right`, so that
//! nothing is summed across lanes. [`ROWS`] rows times a unit of columns stay in registers while the depth is walked
//! (24 of 32 vectors of AVX-512, 12 of 16 of AVX2): `VECS + ROWS` loads for `VECS * ROWS` fused products.

use super::kernels::{Ahead, Decode, Kernels, Pv, Qk, TILE, prefetch_row};
use super::simd::Simd;
use crate::codec::Codec;

/// Rows of `left` at a time.
const ROWS: usize = 6;

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
        factors: None,
        out: a.scores,
        out_stride: TILE,
        ahead: a.ahead,
    };
    // SAFETY: the caller's promises.
    unsafe {
        (kernels.decode_transposed)(&decode);
        (kernels.product)(&product);
    }
}

/// What `kernels.pv` does over `tokens` rows, by way of a tile decoded to `tile`.
///
/// # Safety
/// As `kernels.pv`; `tile` has `acc_stride` f32 for each of `tokens` rows.
pub(super) unsafe fn pv(kernels: &Kernels, a: &Pv<'_>, tokens: usize, tile: *mut f32) {
    let stride = a.acc_stride;
    let decode = Decode { rows: a.values, tokens, dim: a.dim, dst: tile, stride };
    let product = |row: usize, rows: usize, lo: usize, hi: usize, is_first: bool| {
        let product = Product {
            left: a.p.wrapping_add(row * TILE + lo),
            left_stride: TILE,
            rows,
            right: tile.wrapping_add(lo * stride),
            right_stride: stride,
            depth: hi - lo,
            columns: a.dim,
            factors: Some(if is_first { &a.alpha[row..] } else { &[1.0] }),
            out: a.acc.wrapping_add(row * stride),
            out_stride: stride,
            ahead: if is_first { a.ahead } else { Ahead { bytes: 0, ..a.ahead } },
        };
        // SAFETY: the caller's promises: rows row..row + rows, positions lo..hi of the tile.
        unsafe { (kernels.product)(&product) };
    };
    // SAFETY: the caller's promises.
    unsafe { (kernels.decode)(&decode) };
    // What all rows see, then what only some do: nobody's sums get a zero times what it does not see.
    let visible = &a.visible[..a.rows];
    let lo = visible.iter().map(|range| range.0).max().unwrap_or(0);
    let hi = visible.iter().map(|range| range.1).min().unwrap_or(0).max(lo);
    product(0, a.rows, lo, hi, true);
    for (row, &(first, end)) in visible.iter().enumerate() {
        for (first, end) in [(first, end.min(lo)), (first.max(hi), end)] {
            if first < end {
                product(row, 1, first, end, false);
            }
        }
    }
}

/// Arguments of `product`.
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
    /// Factor of what is in `out`, `[rows]`; none: `out` is not read.
    pub(super) factors: Option<&'a [f32]>,
    /// `[rows, out_stride]`.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    pub(super) ahead: Ahead<'a>,
}

/// `product`, see the module.
///
/// # Safety
/// As [`Simd`]; pointers are valid for what [`Product`] says of them.
#[inline(always)]
pub(super) unsafe fn product<S: Simd>(a: &Product<'_>) {
    let share = TILE.div_ceil(a.rows.div_ceil(ROWS).max(1));
    let mut shares = a.ahead.rows.chunks(share);
    let mut row = 0;
    while row < a.rows {
        for row in shares.next().unwrap_or_default() {
            // SAFETY: the caller's promises.
            unsafe { prefetch_row::<S>(*row, a.ahead.bytes) };
        }
        // SAFETY: the caller's promises; row + R <= rows.
        row += unsafe {
            match a.rows - row {
                1 => product_rows::<S, 1>(a, row),
                2 => product_rows::<S, 2>(a, row),
                3 => product_rows::<S, 3>(a, row),
                4 => product_rows::<S, 4>(a, row),
                5 => product_rows::<S, 5>(a, row),
                _ => product_rows::<S, ROWS>(a, row),
            }
        };
    }
}

/// Rows `row..row + R`. Returns `R`.
// Index loops of constant length over arrays of registers: what the compiler unrolls. Closures and iterators may become calls,
// which have not the caller's instructions.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn product_rows<S: Simd, const R: usize>(a: &Product<'_>, row: usize) -> usize {
    const { assert!(S::VECS <= 4) }
    for column in (0..a.columns).step_by(S::UNIT) {
        // SAFETY: the caller's promises: rows row..row + R, the unit of columns at `column`, `depth` steps.
        unsafe {
            let out = a.out.add(row * a.out_stride + column);
            let mut acc = [[S::splat(0.0); 4]; R];
            if let Some(factors) = a.factors {
                for r in 0..R {
                    let factor = S::splat(factors[row + r]);
                    for v in 0..S::VECS {
                        acc[r][v] = S::mul(S::load(out.add(r * a.out_stride + v * S::LANES)), factor);
                    }
                }
            }
            let (left, right) = (a.left.add(row * a.left_stride), a.right.add(column));
            for step in 0..a.depth {
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
            for r in 0..R {
                for v in 0..S::VECS {
                    S::store(out.add(r * a.out_stride + v * S::LANES), acc[r][v]);
                }
            }
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
