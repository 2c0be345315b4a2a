//! AVX2 with FMA and F16C: 8 lanes, units of 16 channels.
//!
//! FP8 codes become f16 by shifting and F16C widens those exactly, subnormals included. An E5M2
//! code is the upper byte of an f16. An E4M3 code sign-extended to 16 bits and shifted left by 7
//! has its fields where f16 has them, once bit 14 (a copy of the sign) is cleared; its exponent
//! bias is then 8 too large (7 for FNUZ), a factor of 2^-8 that `decode_scale` hands to the
//! caller. NaN codes are found by comparison and set to all ones.

use std::arch::x86_64::*;

use super::kernels::{Ahead, Decode, Direct, Kernels, Pv, Qk, Softmax};
use super::panel::{self, Product, Slots};
use super::simd::{Simd, copy_tail};
use super::{avx2_e4m3, kernels};
use crate::codec::Codec;
use crate::format::KvFormat;

/// The kernels for elements of format `F`.
pub(super) fn kernels<F: Codec>() -> Kernels {
    let e4m3 = matches!(F::FORMAT, KvFormat::Fp8E4M3 | KvFormat::Fp8E4M3Fnuz);
    Kernels {
        qk: if e4m3 { avx2_e4m3::qk::<F> } else { qk::<F> },
        pv: if e4m3 { avx2_e4m3::pv::<F> } else { pv::<F> },
        decode: decode::<F>,
        decode_transposed: decode_transposed::<F>,
        product,
        dots,
        transpose_slots,
        softmax,
        prefetch,
        decode_scale: Avx2::decode_scale(F::FORMAT),
    }
}

macro_rules! with_features {
    ($(unsafe fn $name:ident $(<$F:ident: Codec>)? ($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name $(<$F: Codec>)? ($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the caller's promises; this function enables what `Avx2` executes.
            unsafe { $body }
        }
    )*};
}

with_features! {
    unsafe fn qk<F: Codec>(a: &Qk<'_>) = kernels::qk::<Direct<Avx2, F>, 8, 4, 2, 1>(a);
    unsafe fn pv<F: Codec>(a: &Pv<'_>) = kernels::pv::<Direct<Avx2, F>>(a);
    unsafe fn decode<F: Codec>(a: &Decode<'_>) = kernels::decode::<Avx2, F>(a);
    unsafe fn decode_transposed<F: Codec>(a: &Decode<'_>) = panel::decode_transposed::<Avx2, F>(a);
    unsafe fn product(a: &Product<'_>) = panel::product::<Avx2>(a);
    unsafe fn dots(a: &Product<'_>) = panel::dots::<Avx2>(a);
    unsafe fn transpose_slots(a: &Slots) -> usize = panel::transpose_slots::<Avx2>(a);
    unsafe fn prefetch(a: &Ahead<'_>, tokens: usize) = kernels::prefetch::<Avx2>(a, tokens);
    unsafe fn softmax(a: &Softmax) -> (f32, f32) = kernels::softmax::<Avx2>(a);
}

/// The methods of `Avx2` that are instructions and nothing else.
macro_rules! instructions {
    ($(unsafe fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[allow(clippy::needless_range_loop)] // see transpose_decoded
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the instructions belong to the features `Isa::Avx2` tests for and the shells
            // enable; accesses are those the trait names for this method.
            unsafe { $body }
        }
    )*};
}

/// The AVX2 implementation of [`Simd`].
#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// 16 f16 to 16 f32.
#[inline(always)]
unsafe fn widen(halves: __m256i) -> [__m256; 2] {
    // SAFETY: F16C, see `Avx2`.
    unsafe { [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves))] }
}

/// 16 elements.
#[inline(always)]
unsafe fn decode_unit<F: Codec>(src: *const u8) -> [__m256; 2] {
    // SAFETY: AVX2 and F16C, see `Avx2`; the caller vouches for 16 readable elements.
    unsafe {
        match F::FORMAT {
            KvFormat::F32 => [_mm256_loadu_ps(src.cast()), _mm256_loadu_ps(src.add(32).cast())],
            KvFormat::F16 => widen(_mm256_loadu_si256(src.cast())),
            KvFormat::BF16 => {
                let load = |p: *const u8| {
                    let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
                };
                [load(src), load(src.add(16))]
            }
            KvFormat::Fp8E5M2 => {
                let x = _mm_loadu_si128(src.cast());
                let zero = _mm_setzero_si128();
                [_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, x)), _mm256_cvtph_ps(_mm_unpackhi_epi8(zero, x))]
            }
            KvFormat::Fp8E4M3 => {
                let x = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(src.cast())));
                let magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x3f80));
                let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
                let half = _mm256_and_si256(x, _mm256_set1_epi16(0xbf80u16 as i16));
                widen(_mm256_or_si256(half, nan))
            }
            KvFormat::Fp8E4M3Fnuz => {
                let x = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(src.cast())));
                let half = _mm256_and_si256(x, _mm256_set1_epi16(0xbf80u16 as i16));
                let nan = _mm256_cmpeq_epi16(half, _mm256_set1_epi16(i16::MIN));
                widen(_mm256_or_si256(half, nan))
            }
        }
    }
}

impl Simd for Avx2 {
    type V = __m256;
    type Unit = [__m256; 2];
    const LANES: usize = 8;
    const VECS: usize = 2;
    const SUM_ORDER: &'static [usize] = &[0, 1, 2, 3, 4, 5, 6, 7];
    const SLOT_CHANNELS: usize = 32;

    instructions! {
        unsafe fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        unsafe fn load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        unsafe fn store(p: *mut f32, v: __m256) = _mm256_storeu_ps(p, v);
        unsafe fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        unsafe fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        unsafe fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        unsafe fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        unsafe fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        unsafe fn abs(a: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        unsafe fn copysign(magnitude: __m256, sign: __m256) -> __m256 = {
            let mask = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_and_ps(mask, sign), _mm256_andnot_ps(mask, magnitude))
        };
        unsafe fn round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        unsafe fn pow2(n: __m256) -> __m256 = {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        };
        unsafe fn zero_where_less(x: __m256, limit: __m256, v: __m256) -> __m256 = {
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit), v)
        };
        unsafe fn largest(v: __m256) -> f32 = {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        unsafe fn sum(v: __m256) -> f32 = {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        };
        unsafe fn sum_each(a: &[__m256; 16]) -> __m256 = {
            let quads = |i: usize| _mm256_hadd_ps(_mm256_hadd_ps(a[i], a[i + 1]), _mm256_hadd_ps(a[i + 2], a[i + 3]));
            let (x, y) = (quads(0), quads(4));
            _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(x, y), _mm256_permute2f128_ps::<0x31>(x, y))
        };
        unsafe fn transpose(a: &mut [__m256; 16]) = {
            // Of each four rows: vector k has in its 128-bit lane L the four elements of column 4L + k.
            for i in [0, 4] {
                let x = _mm256_castps_pd(_mm256_unpacklo_ps(a[i], a[i + 1]));
                let y = _mm256_castps_pd(_mm256_unpacklo_ps(a[i + 2], a[i + 3]));
                let z = _mm256_castps_pd(_mm256_unpackhi_ps(a[i], a[i + 1]));
                let w = _mm256_castps_pd(_mm256_unpackhi_ps(a[i + 2], a[i + 3]));
                a[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
                a[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
                a[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(z, w));
                a[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(z, w));
            }
            for k in 0..4 {
                let (x, y) = (a[k], a[4 + k]);
                a[k] = _mm256_permute2f128_ps::<0x20>(x, y);
                a[4 + k] = _mm256_permute2f128_ps::<0x31>(x, y);
            }
        };
        unsafe fn transpose_slots(src: *const u8, src_stride: usize, dst: *mut u8, dst_stride: usize, wide: bool) = {
            let mut x = [_mm256_setzero_si256(); 16];
            for i in 0..16 {
                // Lane L: the slots of channel 16L + i.
                let first = src.add(i * src_stride).cast::<__m128i>();
                x[i] = _mm256_set_m128i(_mm_loadu_si128(first.byte_add(16 * src_stride)), _mm_loadu_si128(first));
            }
            // In each lane, byte i of vector j becomes byte j of vector i: four times, bytes of vectors i and i + 8 are
            // interleaved.
            for _ in 0..4 {
                let y = x;
                for i in 0..8 {
                    x[2 * i] = _mm256_unpacklo_epi8(y[i], y[i + 8]);
                    x[2 * i + 1] = _mm256_unpackhi_epi8(y[i], y[i + 8]);
                }
            }
            if !wide {
                for i in 0..16 {
                    _mm256_storeu_si256(dst.add(i * dst_stride).cast(), x[i]);
                }
                return;
            }
            // Vectors 2i and 2i + 1 have the lower and the upper bytes of slot i.
            for i in 0..8 {
                let (y, z) = (_mm256_unpacklo_epi8(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_epi8(x[2 * i], x[2 * i + 1]));
                let row = dst.add(i * dst_stride);
                _mm256_storeu_si256(row.cast(), _mm256_permute2x128_si256::<0x20>(y, z));
                _mm256_storeu_si256(row.add(32).cast(), _mm256_permute2x128_si256::<0x31>(y, z));
            }
        };
        unsafe fn prefetch(p: *const u8) = _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }

    #[inline(always)]
    unsafe fn decode<F: Codec>(src: *const u8, n: usize) -> [__m256; 2] {
        // SAFETY: as in `instructions`; a short row is copied first.
        unsafe {
            if n < Self::UNIT {
                return decode_unit::<F>(copy_tail::<64>(src, n * F::BYTES).as_ptr());
            }
            decode_unit::<F>(src)
        }
    }

    fn decode_scale(format: KvFormat) -> f32 {
        match format {
            KvFormat::Fp8E4M3 => 256.0,
            KvFormat::Fp8E4M3Fnuz => 128.0,
            _ => 1.0,
        }
    }
}

/// The kernels that decode between the products, whatever `kernels` gives.
#[cfg(test)]
pub(super) fn direct<F: Codec>() -> Kernels {
    Kernels { qk: qk::<F>, pv: pv::<F>, ..kernels::<F>() }
}
