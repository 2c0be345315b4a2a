//! AVX2 products over rows of E4M3 and its FNUZ form.
//!
//! Decoding between the products, as `Direct` does, is bound by the ports that also multiply: a third
//! of the instructions that make 16 codes 16 f32 are theirs alone, and the check for NaN doubles that.
//! Here codes become f16 some tokens before their products, in scratch that stays in the L1 cache:
//!
//! ```text
//! a later token: load 16 codes, to 16 bits, shift, mask; store 16 f16
//! this token:    8 f16 to f32 straight from memory, twice;  R x 2 FMA
//! ```
//! From memory `VCVTPH2PS` needs no shuffle, and the upper half no extract. NaN codes come out finite
//! and are only noticed, by one or two instructions for 16 codes; products that met one are made again
//! by `Direct`. Both sum the same products in the same order, so which it was does not show.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::avx2::Avx2;
use super::kernels::{self, Direct, Products, Pv, Qk, TILE, prefetch_row, store_sums};
use super::simd::Simd;
use crate::codec::Codec;
use crate::format::KvFormat;
use crate::layout::MAX_HEAD_DIM;

/// Channels converted at once.
const UNIT: usize = 16;

/// Tokens by which conversion is ahead of `pv`: the time a store takes to be loaded again.
const AHEAD: usize = 4;

/// `kernels::qk` over E4M3 rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn qk<F: Codec>(a: &Qk<'_>) {
    // SAFETY: the caller's promises; this function enables what `Avx2` executes.
    unsafe { kernels::qk::<E4m3<F>, 8, 4, 2, 1>(a) }
}

/// `kernels::pv` over E4M3 rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn pv<F: Codec>(a: &Pv<'_>) {
    // SAFETY: the caller's promises; this function enables what `Avx2` executes.
    unsafe { kernels::pv::<E4m3<F>>(a) }
}

/// Products that convert ahead.
struct E4m3<F>(PhantomData<F>);

/// f16 of `R` rows of `N` channels, written before they are read.
#[repr(align(64))]
struct Halves<const R: usize, const N: usize>([[MaybeUninit<u16>; N]; R]);

impl<const R: usize, const N: usize> Halves<R, N> {
    #[inline(always)]
    fn new() -> Self {
        Halves([[MaybeUninit::uninit(); N]; R])
    }

    #[inline(always)]
    fn as_mut_ptr(&mut self) -> *mut u16 {
        self.0.as_mut_ptr().cast()
    }
}

/// Codes as f16 too small by `decode_scale`. Codes whose f16 is not NaN though they are go into
/// `seen`: see `saw_nan`.
#[inline(always)]
unsafe fn halve<F: Codec>(codes: __m128i, seen: &mut __m128i) -> __m256i {
    // SAFETY: AVX2, see `Avx2`.
    unsafe {
        *seen = match F::FORMAT {
            KvFormat::Fp8E4M3Fnuz => _mm_min_epi8(*seen, codes),
            _ => _mm_max_epu8(*seen, _mm_or_si128(codes, _mm_set1_epi8(i8::MIN))),
        };
        let fields = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(codes));
        _mm256_and_si256(fields, _mm256_set1_epi16(0xbf80u16 as i16))
    }
}

/// Whether a NaN code is among those `halve` has noted: 0x7F or 0xFF, of FNUZ 0x80.
#[inline(always)]
unsafe fn saw_nan<F: Codec>(seen: __m128i) -> bool {
    let nan = match F::FORMAT {
        KvFormat::Fp8E4M3Fnuz => i8::MIN,
        _ => -1,
    };
    // SAFETY: AVX2, see `Avx2`.
    unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(seen, _mm_set1_epi8(nan))) != 0 }
}

/// Converts the UNIT codes at `src` to `dst[..UNIT]`.
#[inline(always)]
unsafe fn convert<F: Codec>(src: *const u8, dst: *mut u16, seen: &mut __m128i) {
    // SAFETY: AVX2, see `Avx2`; the caller vouches for UNIT codes and f16.
    unsafe { _mm256_storeu_si256(dst.cast(), halve::<F>(_mm_loadu_si128(src.cast()), seen)) };
}

#[inline(always)]
unsafe fn widen(src: *const u16) -> __m256 {
    // SAFETY: F16C, see `Avx2`; the caller vouches for 8 f16.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) }
}

impl<F: Codec> Products for E4m3<F> {
    const UNIT: usize = UNIT;

    #[inline(always)]
    unsafe fn qk_rows<const R: usize, const T: usize>(a: &Qk<'_>, row: usize) -> usize {
        // SAFETY: the caller's promises.
        unsafe {
            match T {
                _ if !a.dim.is_multiple_of(UNIT) => exact_qk_rows::<F, R, T>(a, row),
                1 => qk_rows::<F, R, T, 1>(a, row),
                _ => qk_rows::<F, R, T, 2>(a, row),
            }
        }
    }

    #[inline(always)]
    unsafe fn pv_unit<const R: usize>(a: &Pv<'_>, row: usize, d: usize, n: usize) {
        // SAFETY: the caller's promises.
        unsafe {
            match n {
                UNIT => pv_unit::<F, R>(a, row, d),
                _ => exact_pv_unit::<F, R>(a, row, d, n),
            }
        }
    }
}

/// `P` tokens are multiplied while the next `P` are converted.
// Index loops of constant length over arrays of registers: what the compiler unrolls.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn qk_rows<F: Codec, const R: usize, const T: usize, const P: usize>(a: &Qk<'_>, row: usize) -> usize {
    const { assert!(R * T == Avx2::LANES && TILE.is_multiple_of(T)) }
    let ahead_bytes = if row == 0 { a.ahead.bytes } else { 0 };
    let mut halves = [Halves::<P, MAX_HEAD_DIM>::new(), Halves::new()];
    let [mut now, mut next] = halves.each_mut().map(Halves::as_mut_ptr);
    // SAFETY: rows row..row+R of `q` and `scores` exist (padded); every pointer of the tile is readable
    // for `dim <= MAX_HEAD_DIM` codes, and P of them start at every multiple of P; `dim` is whole units.
    unsafe {
        let q = a.q.add(row * a.q_stride);
        let mut seen = _mm_setzero_si128();
        for i in 0..P {
            for d in (0..a.dim).step_by(UNIT) {
                convert::<F>(a.keys[i].add(d), now.add(i * MAX_HEAD_DIM + d), &mut seen);
            }
        }
        let mut t0 = 0;
        while t0 < a.tokens {
            let mut acc = [Avx2::splat(0.0); 16];
            for t in t0..t0 + T {
                prefetch_row::<Avx2>(*a.ahead.rows.as_ptr().add(t), ahead_bytes);
            }
            for t in (0..T).step_by(P) {
                // After the last ones the last ones again.
                let after = a.keys.as_ptr().add((t0 + t + P).min(TILE - P));
                let mut own = [[Avx2::splat(0.0); P]; R];
                let mut d = 0;
                while d < a.dim {
                    for i in 0..P {
                        convert::<F>((*after.add(i)).add(d), next.add(i * MAX_HEAD_DIM + d), &mut seen);
                    }
                    for d in [d, d + 8] {
                        let mut x = [Avx2::splat(0.0); P];
                        for i in 0..P {
                            x[i] = widen(now.add(i * MAX_HEAD_DIM + d));
                        }
                        for r in 0..R {
                            let q = Avx2::load(q.add(r * a.q_stride + d));
                            for i in 0..P {
                                own[r][i] = Avx2::fma(x[i], q, own[r][i]);
                            }
                        }
                    }
                    d += UNIT;
                }
                for r in 0..R {
                    for i in 0..P {
                        acc[r * T + t + i] = own[r][i];
                    }
                }
                (now, next) = (next, now);
            }
            store_sums::<Avx2, R, T>(&acc, a.scores.add(row * TILE + t0));
            t0 += T;
        }
        if saw_nan::<F>(seen) {
            exact_qk_rows::<F, R, T>(a, row);
        }
    }
    R
}

/// A token is multiplied while the one `AHEAD` of it is converted.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn pv_unit<F: Codec, const R: usize>(a: &Pv<'_>, row: usize, d: usize) {
    let (lo, hi) = a.visible[row];
    let mut halves = Halves::<TILE, UNIT>::new();
    let halves = halves.as_mut_ptr();
    // SAFETY: rows row..row+R of `p`, `alpha` and `acc` exist, `acc` rows are PAD-padded; lo..hi lies in
    // the tile, whose rows hold `dim >= d + UNIT` codes.
    unsafe {
        let mut seen = _mm_setzero_si128();
        let p = a.p.add(row * TILE);
        for t in lo..hi.min(lo + AHEAD) {
            convert::<F>(a.values[t].add(d), halves.add(t * UNIT), &mut seen);
        }
        let acc_rows = a.acc.add(row * a.acc_stride + d);
        let mut acc = [[Avx2::splat(0.0); 2]; R];
        for r in 0..R {
            let alpha = Avx2::splat(a.alpha[row + r]);
            for v in 0..2 {
                acc[r][v] = Avx2::mul(Avx2::load(acc_rows.add(r * a.acc_stride + 8 * v)), alpha);
            }
        }
        // The rows to prefetch are spread over the units: memory gives them no faster.
        let share = TILE.div_ceil(a.dim / UNIT);
        let a_time = share.div_ceil(TILE / AHEAD - 1);
        let mut prefetched = if row == 0 { d / UNIT * share } else { TILE };
        let prefetch_end = (prefetched + share).min(TILE);
        let mut t = lo;
        while t + 2 * AHEAD <= hi {
            for t in prefetched..prefetch_end.min(prefetched + a_time) {
                prefetch_row::<Avx2>(*a.ahead.rows.as_ptr().add(t), a.ahead.bytes);
            }
            prefetched += a_time;
            let (after, p, halves) = (a.values.as_ptr().add(t + AHEAD), p.add(t), halves.add(t * UNIT));
            for i in 0..AHEAD {
                convert::<F>((*after.add(i)).add(d), halves.add((i + AHEAD) * UNIT), &mut seen);
                pv_token(p.add(i), halves.add(i * UNIT), &mut acc);
            }
            t += AHEAD;
        }
        for t in t + AHEAD..hi {
            convert::<F>((*a.values.as_ptr().add(t)).add(d), halves.add(t * UNIT), &mut seen);
        }
        for t in t..hi {
            pv_token(p.add(t), halves.add(t * UNIT), &mut acc);
        }
        if saw_nan::<F>(seen) {
            return exact_pv_unit::<F, R>(a, row, d, UNIT);
        }
        for r in 0..R {
            for v in 0..2 {
                Avx2::store(acc_rows.add(r * a.acc_stride + 8 * v), acc[r][v]);
            }
        }
    }
}

/// Adds the products of one token's weights, `p[R, TILE]`, and f16.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn pv_token<const R: usize>(p: *const f32, halves: *const u16, acc: &mut [[__m256; 2]; R]) {
    // SAFETY: see `pv_unit`; the token is converted.
    unsafe {
        let x = [widen(halves), widen(halves.add(8))];
        for r in 0..R {
            let p = Avx2::splat(*p.add(r * TILE));
            for v in 0..2 {
                acc[r][v] = Avx2::fma(p, x[v], acc[r][v]);
            }
        }
    }
}

/// By decoding between the products: where there are NaN codes, and where `dim` is not whole units.
#[cold]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn exact_qk_rows<F: Codec, const R: usize, const T: usize>(a: &Qk<'_>, row: usize) -> usize {
    // SAFETY: the caller's promises.
    unsafe { Direct::<Avx2, F>::qk_rows::<R, T>(a, row) }
}

/// As `exact_qk_rows`.
#[cold]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn exact_pv_unit<F: Codec, const R: usize>(a: &Pv<'_>, row: usize, d: usize, n: usize) {
    // SAFETY: the caller's promises.
    unsafe { Direct::<Avx2, F>::pv_unit::<R>(a, row, d, n) }
}
