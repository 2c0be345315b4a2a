//! The inner kernels of attention over one tile, written once over [`Simd`].
//!
//! A *tile* is up to [`TILE`] consecutive positions of one (sequence, KV head). Its rows are given
//! as pointers, one a position, so that pages, padding and bad blocks cost nothing inside: a
//! position without a row points at zeros. *Query rows* are the (token, query head) pairs that
//! share the KV head.
//!
//! ```text
//! qk       scores[r][t] = q[r] . decode(k[t])       R rows x T tokens of accumulators, R*T = LANES
//! softmax  scores[r][t] -> probabilities, and the row's running maximum
//! pv       acc[r] = acc[r]*alpha[r] + sum_t p[r][t] * decode(v[t])
//! decode   f32 rows, for blocks of many query rows that share a tile: panel.rs multiplies them
//! ```
//! `qk` ends each group of dot products with one transposing reduction that leaves `LANES` sums in
//! one vector: horizontal sums one by one would cost more than the products.

use std::marker::PhantomData;

use super::panel::{Product, Slots};
use super::simd::{LOG2_E, Simd, exp2, tanh};
use crate::codec::{Codec, with_codec};
use crate::format::KvFormat;
use crate::isa::Isa;

/// Positions in a tile.
pub(super) const TILE: usize = 64;

/// Channels are padded to a multiple of this in f32 scratch: the largest unit.
pub(super) const PAD: usize = 64;

/// Query rows that read codes directly. More of them go through a decoded tile.
pub(super) const DIRECT_ROWS: usize = 8;

/// One pointer a position.
pub(super) type Rows = [*const u8; TILE];

/// Rows to prefetch while a kernel works: those its successor will read.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a> {
    pub(super) rows: &'a Rows,
    pub(super) bytes: usize,
}

/// Arguments of `qk`.
pub(super) struct Qk<'a> {
    /// Queries `[padded rows, q_stride]`, zero past `dim` and past `rows`; see [`padded_rows`].
    pub(super) q: *const f32,
    pub(super) q_stride: usize,
    pub(super) rows: usize,
    pub(super) keys: &'a Rows,
    /// Positions; pointers past them must be readable too.
    pub(super) tokens: usize,
    pub(super) dim: usize,
    pub(super) ahead: Ahead<'a>,
    /// `[padded rows, TILE]`.
    pub(super) scores: *mut f32,
}

/// Arguments of `pv`.
pub(super) struct Pv<'a> {
    /// Probabilities `[rows, TILE]`.
    pub(super) p: *const f32,
    pub(super) rows: usize,
    pub(super) values: &'a Rows,
    /// Positions each row sees; the others are not multiplied, whatever they hold.
    pub(super) visible: &'a [(usize, usize)],
    pub(super) dim: usize,
    pub(super) ahead: Ahead<'a>,
    /// Factor of what is accumulated already, `[rows]`.
    pub(super) alpha: &'a [f32],
    /// `[rows, acc_stride]`.
    pub(super) acc: *mut f32,
    pub(super) acc_stride: usize,
}

/// Arguments of `softmax`, for one row of one tile.
pub(super) struct Softmax {
    /// `[TILE]`: dot products in, probabilities out.
    pub(super) scores: *mut f32,
    /// Factor of the dot products: natural units with a soft cap, else times log2(e).
    pub(super) scale: f32,
    /// Dynamic scales of the tile's keys, `[TILE]`, or null.
    pub(super) k_dynamic: *const f32,
    /// Dynamic scales of the tile's values, `[TILE]`, or null; they go into the probabilities.
    pub(super) v_dynamic: *const f32,
    pub(super) soft_cap: Option<f32>,
    /// Slope times log2(e), and position of the tile relative to the query.
    pub(super) alibi: Option<(f32, f32)>,
    /// Positions the row sees.
    pub(super) visible: (usize, usize),
    /// Positions in blocks outside the cache.
    pub(super) bad: u64,
    /// The running maximum, in exp2 units.
    pub(super) max: f32,
}

/// Arguments of `decode`.
pub(super) struct Decode<'a> {
    pub(super) rows: &'a Rows,
    pub(super) tokens: usize,
    pub(super) dim: usize,
    /// `[tokens, stride]`, zero from `dim` to the end of its last unit.
    pub(super) dst: *mut f32,
    pub(super) stride: usize,
}

/// The kernels of one instruction set for one storage format.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub(super) qk: unsafe fn(&Qk<'_>),
    pub(super) pv: unsafe fn(&Pv<'_>),
    pub(super) decode: unsafe fn(&Decode<'_>),
    /// See [`super::panel`].
    pub(super) decode_transposed: unsafe fn(&Decode<'_>),
    pub(super) product: unsafe fn(&Product<'_>),
    pub(super) dots: unsafe fn(&Product<'_>),
    pub(super) transpose_slots: unsafe fn(&Slots) -> usize,
    /// Returns the new maximum and the sum of the probabilities.
    pub(super) softmax: unsafe fn(&Softmax) -> (f32, f32),
    /// Prefetches the first rows.
    pub(super) prefetch: unsafe fn(&Ahead<'_>, usize),
    /// See [`Simd::decode_scale`].
    pub(super) decode_scale: f32,
}

impl Kernels {
    /// The kernels `isa` has for `format`. The caller has checked that the machine runs `isa`.
    pub(super) fn of(isa: Isa, format: KvFormat) -> Kernels {
        with_codec!(format, F => match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => super::avx512::kernels::<F>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => super::avx2::kernels::<F>(),
            _ => super::portable::kernels::<F>(),
        })
    }
}

/// Rows the buffers of `rows` query rows must have: `qk` takes them 1, 2, 4 or 8 at a time.
pub(super) const fn padded_rows(rows: usize) -> usize {
    let rest = rows % 8;
    rows - rest + if rest > 4 { 8 } else { rest.next_power_of_two() * (rest > 0) as usize }
}

/// How a block of `R` query rows is multiplied with the rows of a tile.
///
/// # Safety
/// As [`Simd`]; rows `row..row + R` of the arguments exist, for `qk_rows` padded.
pub(super) trait Products {
    /// Channels of a whole `pv_unit`.
    const UNIT: usize;
    /// `qk` of rows `row..row + R`, `T` tokens at a time. Returns `R`.
    unsafe fn qk_rows<const R: usize, const T: usize>(a: &Qk<'_>, row: usize) -> usize;
    /// `pv` of rows `row..row + R`, which see the same positions, and channels `d..d + n`.
    unsafe fn pv_unit<const R: usize>(a: &Pv<'_>, row: usize, d: usize, n: usize);
}

/// Products that decode elements as they go.
pub(super) struct Direct<S, F>(PhantomData<(S, F)>);

impl<S: Simd, F: Codec> Products for Direct<S, F> {
    const UNIT: usize = S::UNIT;

    #[inline(always)]
    unsafe fn qk_rows<const R: usize, const T: usize>(a: &Qk<'_>, row: usize) -> usize {
        // SAFETY: the caller's promises.
        unsafe { qk_rows::<S, F, R, T>(a, row) }
    }

    #[inline(always)]
    unsafe fn pv_unit<const R: usize>(a: &Pv<'_>, row: usize, d: usize, n: usize) {
        // SAFETY: the caller's promises.
        unsafe { pv_unit::<S, F, R>(a, row, d, n) }
    }
}

/// `qk`, see the module. `T1..T8` are `LANES` divided by 1, 2, 4 and 8 rows.
#[inline(always)]
pub(super) unsafe fn qk<P: Products, const T1: usize, const T2: usize, const T4: usize, const T8: usize>(a: &Qk<'_>) {
    let mut row = 0;
    while row < a.rows {
        // SAFETY: the caller's promises; row + R stays within the padded rows.
        row += unsafe {
            match a.rows - row {
                1 => P::qk_rows::<1, T1>(a, row),
                2 => P::qk_rows::<2, T2>(a, row),
                3 | 4 => P::qk_rows::<4, T4>(a, row),
                _ => P::qk_rows::<8, T8>(a, row),
            }
        };
    }
}

#[inline(always)]
unsafe fn qk_rows<S: Simd, F: Codec, const R: usize, const T: usize>(a: &Qk<'_>, row: usize) -> usize {
    const { assert!(R * T == S::LANES && S::LANES <= 16 && TILE.is_multiple_of(S::LANES)) }
    let ahead_bytes = if row == 0 { a.ahead.bytes } else { 0 };
    // SAFETY: rows row..row+R of `q` and `scores` exist (padded), each `q` row is PAD-padded; T
    // divides TILE, so t0 + t < TILE and every pointer is readable for `dim` elements.
    unsafe {
        let q = a.q.add(row * a.q_stride);
        let scores = a.scores.add(row * TILE);
        let mut t0 = 0;
        while t0 < a.tokens {
            let mut acc = [S::splat(0.0); 16];
            for t in 0..T {
                prefetch_row::<S>(a.ahead.rows[t0 + t], ahead_bytes);
            }
            for t in (0..T).step_by(2) {
                match T {
                    1 => qk_tokens::<S, F, R, T, 1>(a, q, t0, t, &mut acc),
                    _ => qk_tokens::<S, F, R, T, 2>(a, q, t0, t, &mut acc),
                }
            }
            store_sums::<S, R, T>(&acc, scores.add(t0));
            t0 += T;
        }
    }
    R
}

/// The sums of `acc[r*T + t]` to `scores[r][t]`.
#[inline(always)]
pub(super) unsafe fn store_sums<S: Simd, const R: usize, const T: usize>(acc: &[S::V; 16], scores: *mut f32) {
    let mut sums = [0.0f32; 16];
    // SAFETY: LANES <= 16 sums; the caller vouches for `R` rows of TILE scores, of which `T` are written.
    unsafe {
        S::store(sums.as_mut_ptr(), S::sum_each(acc));
        for r in 0..R {
            std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * T), scores.add(r * TILE), T);
        }
    }
}

/// The products of `P` tokens, all of them in registers, so that each query vector loaded serves `P`
/// rows; `acc[r*T + t]` at the end.
// Index loops of constant length over arrays of registers: what the compiler unrolls.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn qk_tokens<S: Simd, F: Codec, const R: usize, const T: usize, const P: usize>(
    a: &Qk<'_>,
    q: *const f32,
    t0: usize,
    t: usize,
    acc: &mut [S::V; 16],
) {
    // SAFETY: see `qk_rows`; t + P <= T.
    unsafe {
        let mut own = [[S::splat(0.0); P]; R];
        let mut rows = [a.keys[t0 + t]; P];
        for i in 1..P {
            rows[i] = a.keys[t0 + t + i];
        }
        let mut d = 0;
        while d + S::UNIT <= a.dim {
            qk_unit::<S, F, R, P>(a.q_stride, q, &rows, d, S::UNIT, &mut own);
            d += S::UNIT;
        }
        if d < a.dim {
            qk_unit::<S, F, R, P>(a.q_stride, q, &rows, d, a.dim - d, &mut own);
        }
        for r in 0..R {
            for i in 0..P {
                acc[r * T + t + i] = own[r][i];
            }
        }
    }
}

/// Prefetches the first `tokens` rows: an item's first tile, which no kernel before it could.
#[inline(always)]
pub(super) unsafe fn prefetch<S: Simd>(a: &Ahead<'_>, tokens: usize) {
    for row in &a.rows[..tokens] {
        // SAFETY: as in `prefetch_row`.
        unsafe { prefetch_row::<S>(*row, a.bytes) };
    }
}

/// Adds the products of channels `d..d+n`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn qk_unit<S: Simd, F: Codec, const R: usize, const P: usize>(
    q_stride: usize,
    q: *const f32,
    rows: &[*const u8; P],
    d: usize,
    n: usize,
    acc: &mut [[S::V; P]; R],
) {
    // SAFETY: see `qk_rows`; d + n <= dim, and `q` rows are padded to whole units.
    unsafe {
        let mut x = [S::decode::<F>(rows[0].add(d * F::BYTES), n); P];
        for i in 1..P {
            x[i] = S::decode::<F>(rows[i].add(d * F::BYTES), n);
        }
        for v in 0..S::VECS {
            for r in 0..R {
                let q = S::load(q.add(r * q_stride + d + v * S::LANES));
                for i in 0..P {
                    acc[r][i] = S::fma(x[i].as_ref()[v], q, acc[r][i]);
                }
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn prefetch_row<S: Simd>(row: *const u8, bytes: usize) {
    let mut line = 0;
    while line < bytes {
        // SAFETY: a prefetch may name any address.
        unsafe { S::prefetch(row.wrapping_add(line)) };
        line += 64;
    }
}

/// `pv`, see the module.
#[inline(always)]
pub(super) unsafe fn pv<P: Products>(a: &Pv<'_>) {
    let mut row = 0;
    while row < a.rows {
        let end = a.rows.min(row + 4);
        let together = a.visible[row..end].iter().all(|range| *range == a.visible[row]);
        // SAFETY: the caller's promises; row + R <= rows.
        row += unsafe {
            match end - row {
                1 => pv_rows::<P, 1>(a, row),
                _ if !together => pv_rows::<P, 1>(a, row),
                2 => pv_rows::<P, 2>(a, row),
                3 => pv_rows::<P, 3>(a, row),
                _ => pv_rows::<P, 4>(a, row),
            }
        };
    }
}

#[inline(always)]
unsafe fn pv_rows<P: Products, const R: usize>(a: &Pv<'_>, row: usize) -> usize {
    // SAFETY: rows row..row+R of `p`, `alpha` and `acc` exist, `acc` rows are PAD-padded.
    unsafe {
        let mut d = 0;
        while d + P::UNIT <= a.dim {
            P::pv_unit::<R>(a, row, d, P::UNIT);
            d += P::UNIT;
        }
        if d < a.dim {
            P::pv_unit::<R>(a, row, d, a.dim - d);
        }
    }
    R
}

// Index loops of constant length over arrays of registers: what the compiler unrolls.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn pv_unit<S: Simd, F: Codec, const R: usize>(a: &Pv<'_>, row: usize, d: usize, n: usize) {
    let (lo, hi) = a.visible[row];
    let ahead_bytes = if row == 0 && d == 0 { a.ahead.bytes } else { 0 };
    // SAFETY: see `pv_rows`; lo..hi lies in the tile, whose rows hold `dim >= d + n` elements.
    unsafe {
        let acc_rows = a.acc.add(row * a.acc_stride + d);
        let mut acc = [[S::splat(0.0); 4]; R];
        for r in 0..R {
            let alpha = S::splat(a.alpha[row + r]);
            for v in 0..S::VECS {
                acc[r][v] = S::mul(S::load(acc_rows.add(r * a.acc_stride + v * S::LANES)), alpha);
            }
        }
        let p = a.p.add(row * TILE);
        for t in lo..hi {
            prefetch_row::<S>(a.ahead.rows[t], ahead_bytes);
            let x = S::decode::<F>(a.values[t].add(d * F::BYTES), n);
            for r in 0..R {
                let p = S::splat(*p.add(r * TILE + t));
                for (v, &x) in x.as_ref().iter().enumerate() {
                    acc[r][v] = S::fma(p, x, acc[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..S::VECS {
                S::store(acc_rows.add(r * a.acc_stride + v * S::LANES), acc[r][v]);
            }
        }
    }
}

/// `decode`, see the module.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd, F: Codec>(a: &Decode<'_>) {
    for t in 0..a.tokens {
        let mut d = 0;
        while d < a.dim {
            // SAFETY: row `t` holds `dim` elements, `dst` rows are PAD-padded.
            unsafe {
                let src = a.rows[t].add(d * F::BYTES);
                let x = S::decode::<F>(src, S::UNIT.min(a.dim - d));
                for (v, &x) in x.as_ref().iter().enumerate() {
                    S::store(a.dst.add(t * a.stride + d + v * S::LANES), x);
                }
            }
            d += S::UNIT;
        }
    }
}

/// 0, 1, 2, …: positions inside a tile.
static IOTA: [f32; TILE] = {
    let mut iota = [0.0; TILE];
    let mut i = 0;
    while i < TILE {
        iota[i] = i as f32;
        i += 1;
    }
    iota
};

/// `softmax`, see the module.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd>(a: &Softmax) -> (f32, f32) {
    // SAFETY: `scores` and the dynamic scales, where not null, are TILE floats; LANES divides TILE.
    unsafe {
        let scores = a.scores;
        for i in (0..TILE).step_by(S::LANES) {
            let mut s = S::mul(S::load(scores.add(i)), S::splat(a.scale));
            if !a.k_dynamic.is_null() {
                s = S::mul(s, S::load(a.k_dynamic.add(i)));
            }
            if let Some(cap) = a.soft_cap {
                s = S::mul(tanh::<S>(S::div(s, S::splat(cap))), S::splat(cap * LOG2_E));
            }
            if let Some((slope, base)) = a.alibi {
                let relative = S::add(S::load(IOTA.as_ptr().add(i)), S::splat(base));
                s = S::fma(relative, S::splat(slope), s);
            }
            S::store(scores.add(i), s);
        }
        mask(std::slice::from_raw_parts_mut(scores, TILE), a.visible, a.bad);

        // Two chains of half the length. NaN is the first operand, and so ignored.
        let mut max = [S::splat(a.max); 2];
        for i in (0..TILE).step_by(2 * S::LANES) {
            max[0] = S::max(S::load(scores.add(i)), max[0]);
            max[1] = S::max(S::load(scores.add(i + S::LANES)), max[1]);
        }
        let max = S::largest(S::max(max[0], max[1]));
        // Nothing visible yet: any finite reference gives probabilities of zero.
        let reference = S::splat(if max == f32::NEG_INFINITY { 0.0 } else { max });

        let mut sum = S::splat(0.0);
        for i in (0..TILE).step_by(S::LANES) {
            let mut p = exp2::<S>(S::sub(S::load(scores.add(i)), reference));
            sum = S::add(sum, p);
            if !a.v_dynamic.is_null() {
                p = S::mul(p, S::load(a.v_dynamic.add(i)));
            }
            S::store(scores.add(i), p);
        }
        (max, S::sum(sum))
    }
}

/// Scores of positions a row does not see become -inf.
#[inline(always)]
fn mask(scores: &mut [f32], (lo, hi): (usize, usize), bad: u64) {
    scores[..lo].fill(f32::NEG_INFINITY);
    scores[hi..].fill(f32::NEG_INFINITY);
    let mut bad = bad;
    while bad != 0 {
        scores[bad.trailing_zeros() as usize] = f32::NEG_INFINITY;
        bad &= bad - 1;
    }
}
