//! AVX-512: 16 lanes, units of 64 channels.
//!
//! FP8 codes are decoded 64 at a time by table: every value is a bf16, so two 128-entry byte
//! tables (`VPERMI2B`: one instruction each) give the upper and the lower byte of its f32's upper
//! half, exactly, subnormals, infinities and NaN included. Ten instructions make 64 f32; the codes
//! are permuted first so that the vectors come out in channel order:
//!
//! ```text
//! x' = permute(x)            byte 16L+2j of x' is channel 4L+j, 16L+2j+1 channel 16+4L+j, ...
//! h, l = HI[x' & 127] | sign, LO[x' & 127]
//! a, b = interleave(l, h)    bf16 of 32 channels each
//! a << 16, a & ~0xffff, b << 16, b & ~0xffff
//! ```

use std::arch::x86_64::*;

use super::kernels::{Ahead, Decode, Direct, Kernels, Pv, Qk, Softmax};
use super::panel::{self, Product, Slots};
use super::{
    kernels,
    simd::{Simd, transpose_decoded},
};
use crate::codec::{Codec, e4m3, e4m3fnuz, e5m2};
use crate::format::KvFormat;

/// The kernels for elements of format `F`.
pub(super) fn kernels<F: Codec>() -> Kernels {
    Kernels {
        qk: qk::<F>,
        pv: pv::<F>,
        decode: decode::<F>,
        decode_transposed: decode_transposed::<F>,
        product,
        dots,
        transpose_slots,
        softmax,
        prefetch,
        decode_scale: Avx512::decode_scale(F::FORMAT),
    }
}

macro_rules! with_features {
    ($(unsafe fn $name:ident $(<$F:ident: Codec>)? ($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
        unsafe fn $name $(<$F: Codec>)? ($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the caller's promises; this function enables what `Avx512` executes.
            unsafe { $body }
        }
    )*};
}

with_features! {
    unsafe fn qk<F: Codec>(a: &Qk<'_>) = kernels::qk::<Direct<Avx512, F>, 16, 8, 4, 2>(a);
    unsafe fn pv<F: Codec>(a: &Pv<'_>) = kernels::pv::<Direct<Avx512, F>>(a);
    unsafe fn decode<F: Codec>(a: &Decode<'_>) = kernels::decode::<Avx512, F>(a);
    unsafe fn decode_transposed<F: Codec>(a: &Decode<'_>) = panel::decode_transposed::<Avx512, F>(a);
    unsafe fn product(a: &Product<'_>) = panel::product::<Avx512>(a);
    unsafe fn dots(a: &Product<'_>) = panel::dots::<Avx512>(a);
    unsafe fn transpose_slots(a: &Slots) -> usize = panel::transpose_slots::<Avx512>(a);
    unsafe fn prefetch(a: &Ahead<'_>, tokens: usize) = kernels::prefetch::<Avx512>(a, tokens);
    unsafe fn softmax(a: &Softmax) -> (f32, f32) = kernels::softmax::<Avx512>(a);
}

/// The upper and the lower byte of the upper half of the f32 of codes 0..128.
#[repr(align(64))]
struct Table {
    hi: [u8; 128],
    lo: [u8; 128],
}

macro_rules! table {
    ($decode:path) => {{
        let mut table = Table { hi: [0; 128], lo: [0; 128] };
        let mut code = 0;
        while code < 128 {
            let bits = $decode(code as u8).to_bits();
            assert!(bits & 0xffff == 0);
            table.hi[code] = (bits >> 24) as u8;
            table.lo[code] = (bits >> 16) as u8;
            code += 1;
        }
        table
    }};
}

static E4M3: Table = table!(e4m3::decode);
static E5M2: Table = table!(e5m2::decode);
static FNUZ: Table = table!(e4m3fnuz::decode);

#[repr(align(64))]
struct Bytes([u8; 64]);

/// Which channel stands at each byte before the lookup.
static ORDER: Bytes = {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (lane, byte) = (i / 16, i % 16);
        let vector = 2 * (byte / 8) + byte % 2;
        order[i] = (16 * vector + 4 * lane + (byte % 8) / 2) as u8;
        i += 1;
    }
    Bytes(order)
};

/// 64 codes to 64 f32 in channel order.
#[inline(always)]
unsafe fn lookup<F: Codec>(codes: __m512i) -> [__m512; 4] {
    let table = match F::FORMAT {
        KvFormat::Fp8E5M2 => &E5M2,
        KvFormat::Fp8E4M3Fnuz => &FNUZ,
        _ => &E4M3,
    };
    // SAFETY: the tables are 64-byte aligned and 128 bytes each.
    unsafe {
        let half = |bytes: &[u8; 128], i: usize| _mm512_load_si512(bytes.as_ptr().add(64 * i).cast());
        let x = _mm512_permutexvar_epi8(_mm512_load_si512(ORDER.0.as_ptr().cast()), codes);
        let sign = _mm512_set1_epi8(i8::MIN);
        let mut hi = _mm512_permutex2var_epi8(half(&table.hi, 0), x, half(&table.hi, 1));
        let mut lo = _mm512_permutex2var_epi8(half(&table.lo, 0), x, half(&table.lo, 1));
        // hi | (x & sign)
        hi = _mm512_ternarylogic_epi32::<0xf8>(hi, x, sign);
        if let KvFormat::Fp8E4M3Fnuz = F::FORMAT {
            // The one NaN, 0x80, is where OCP formats have -0.
            let nan = _mm512_cmpeq_epi8_mask(x, sign);
            hi = _mm512_mask_blend_epi8(nan, hi, _mm512_set1_epi8(0x7f));
            lo = _mm512_mask_blend_epi8(nan, lo, _mm512_set1_epi8(i8::MIN | 0x40));
        }
        let (a, b) = (_mm512_unpacklo_epi8(lo, hi), _mm512_unpackhi_epi8(lo, hi));
        let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
            _mm512_castsi512_ps(_mm512_and_si512(a, upper)),
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)),
            _mm512_castsi512_ps(_mm512_and_si512(b, upper)),
        ]
    }
}

/// (x, y): x0+x2, y0+y2, x1+x3, y1+y3 of each 128-bit lane.
#[inline(always)]
unsafe fn sum_pairs(x: __m512, y: __m512) -> __m512d {
    // SAFETY: AVX-512 F, see `Avx512`.
    unsafe { _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y))) }
}

/// Four inputs: their lane sums, side by side in each 128-bit lane.
#[inline(always)]
unsafe fn sum_quads(a: &[__m512; 16], i: usize) -> __m512 {
    // SAFETY: AVX-512 F, see `Avx512`.
    unsafe {
        let (x, y) = (sum_pairs(a[i], a[i + 1]), sum_pairs(a[i + 2], a[i + 3]));
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))
    }
}

/// Lanes 0 + 2 and 1 + 3 of x, then those of y.
#[inline(always)]
unsafe fn sum_halves(x: __m512, y: __m512) -> __m512 {
    // SAFETY: AVX-512 F, see `Avx512`.
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(x, y), _mm512_shuffle_f32x4::<0xee>(x, y)) }
}

/// In each 128-bit lane, byte `i` of vector `j` becomes byte `j` of vector `i`: four times, bytes of vectors `i` and
/// `i + 8` are interleaved.
#[inline(always)]
unsafe fn transpose_bytes(x: &mut [__m512i; 16]) {
    // SAFETY: AVX-512 BW, see `Avx512`.
    unsafe {
        for _ in 0..4 {
            let y = *x;
            for i in 0..8 {
                x[2 * i] = _mm512_unpacklo_epi8(y[i], y[i + 8]);
                x[2 * i + 1] = _mm512_unpackhi_epi8(y[i], y[i + 8]);
            }
        }
    }
}

/// The methods of `Avx512` that are instructions and nothing else.
macro_rules! instructions {
    ($(unsafe fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {$(
        #[allow(clippy::needless_range_loop)] // see transpose_decoded
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the instructions belong to the features `Isa::Avx512` tests for and the shells
            // enable; accesses are those the trait names for this method.
            unsafe { $body }
        }
    )*};
}

/// The AVX-512 implementation of [`Simd`].
#[derive(Clone, Copy)]
pub(super) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    type Unit = [__m512; 4];
    const LANES: usize = 16;
    const VECS: usize = 4;
    const SUM_ORDER: &'static [usize] = &[0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
    const SLOT_CHANNELS: usize = 64;

    instructions! {
        unsafe fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        unsafe fn load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        unsafe fn store(p: *mut f32, v: __m512) = _mm512_storeu_ps(p, v);
        unsafe fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        unsafe fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        unsafe fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        unsafe fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        unsafe fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        unsafe fn abs(a: __m512) -> __m512 = _mm512_abs_ps(a);
        unsafe fn copysign(magnitude: __m512, sign: __m512) -> __m512 = {
            let mask = _mm512_set1_epi32(i32::MIN);
            // mask ? sign : magnitude
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xca>(
                mask,
                _mm512_castps_si512(sign),
                _mm512_castps_si512(magnitude),
            ))
        };
        unsafe fn round(a: __m512) -> __m512 = {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        };
        unsafe fn pow2(n: __m512) -> __m512 = _mm512_scalef_ps(_mm512_set1_ps(1.0), n);
        unsafe fn zero_where_less(x: __m512, limit: __m512, v: __m512) -> __m512 = {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), v)
        };
        unsafe fn largest(v: __m512) -> f32 = _mm512_reduce_max_ps(v);
        unsafe fn sum(v: __m512) -> f32 = _mm512_reduce_add_ps(v);
        unsafe fn sum_each(a: &[__m512; 16]) -> __m512 = {
            let x = sum_halves(sum_quads(a, 0), sum_quads(a, 4));
            let y = sum_halves(sum_quads(a, 8), sum_quads(a, 12));
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(x, y), _mm512_shuffle_f32x4::<0xdd>(x, y))
        };
        unsafe fn transpose(a: &mut [__m512; 16]) = {
            // Of each four rows: vector k has in its 128-bit lane L the four elements of column 4L + k.
            for i in [0, 4, 8, 12] {
                let x = _mm512_castps_pd(_mm512_unpacklo_ps(a[i], a[i + 1]));
                let y = _mm512_castps_pd(_mm512_unpacklo_ps(a[i + 2], a[i + 3]));
                let z = _mm512_castps_pd(_mm512_unpackhi_ps(a[i], a[i + 1]));
                let w = _mm512_castps_pd(_mm512_unpackhi_ps(a[i + 2], a[i + 3]));
                a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
                a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(z, w));
                a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(z, w));
            }
            for k in 0..4 {
                let (x, y) = (_mm512_shuffle_f32x4::<0x88>(a[k], a[4 + k]), _mm512_shuffle_f32x4::<0xdd>(a[k], a[4 + k]));
                let (z, w) = (_mm512_shuffle_f32x4::<0x88>(a[8 + k], a[12 + k]), _mm512_shuffle_f32x4::<0xdd>(a[8 + k], a[12 + k]));
                a[k] = _mm512_shuffle_f32x4::<0x88>(x, z);
                a[4 + k] = _mm512_shuffle_f32x4::<0x88>(y, w);
                a[8 + k] = _mm512_shuffle_f32x4::<0xdd>(x, z);
                a[12 + k] = _mm512_shuffle_f32x4::<0xdd>(y, w);
            }
        };
        unsafe fn transpose_slots(src: *const u8, src_stride: usize, dst: *mut u8, dst_stride: usize, wide: bool) = {
            let mut x = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                // Lane L: the slots of channel 16L + i.
                let first = src.add(i * src_stride).cast::<__m128i>();
                let step = 16 * src_stride;
                x[i] = _mm512_castsi128_si512(_mm_loadu_si128(first));
                x[i] = _mm512_inserti32x4::<1>(x[i], _mm_loadu_si128(first.byte_add(step)));
                x[i] = _mm512_inserti32x4::<2>(x[i], _mm_loadu_si128(first.byte_add(2 * step)));
                x[i] = _mm512_inserti32x4::<3>(x[i], _mm_loadu_si128(first.byte_add(3 * step)));
            }
            transpose_bytes(&mut x);
            if !wide {
                for i in 0..16 {
                    _mm512_storeu_si512(dst.add(i * dst_stride).cast(), x[i]);
                }
                return;
            }
            // Vectors 2i and 2i + 1 have the lower and the upper bytes of slot i.
            let (first, second) = (_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
            for i in 0..8 {
                let (y, z) = (_mm512_unpacklo_epi8(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_epi8(x[2 * i], x[2 * i + 1]));
                let row = dst.add(i * dst_stride);
                _mm512_storeu_si512(row.cast(), _mm512_permutex2var_epi64(y, first, z));
                _mm512_storeu_si512(row.add(64).cast(), _mm512_permutex2var_epi64(y, second, z));
            }
        };
        unsafe fn prefetch(p: *const u8) = _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }

    #[inline(always)]
    unsafe fn decode<F: Codec>(src: *const u8, n: usize) -> [__m512; 4] {
        let mask = if n >= 64 { u64::MAX } else { (1 << n) - 1 };
        let part = |v: usize| (mask >> (16 * v)) as u16;
        // SAFETY: as in `instructions`; the masks keep loads to the first `n` elements.
        unsafe {
            match F::FORMAT {
                KvFormat::F32 => {
                    let load = |v: usize| _mm512_maskz_loadu_ps(part(v), src.wrapping_add(64 * v).cast());
                    [load(0), load(1), load(2), load(3)]
                }
                KvFormat::F16 => {
                    let load =
                        |v: usize| _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(part(v), src.wrapping_add(32 * v).cast()));
                    [load(0), load(1), load(2), load(3)]
                }
                KvFormat::BF16 => {
                    let load = |v: usize| {
                        let x = _mm256_maskz_loadu_epi16(part(v), src.wrapping_add(32 * v).cast());
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
                    };
                    [load(0), load(1), load(2), load(3)]
                }
                _ => lookup::<F>(_mm512_maskz_loadu_epi8(mask, src.cast())),
            }
        }
    }

    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn decode_transposed<F: Codec>(rows: &[*const u8], at: usize, n: usize, dst: *mut f32, stride: usize) {
        // SAFETY: as in `instructions` and `decode`; the caller's promises of `rows` and `dst`.
        unsafe {
            if F::BYTES != 1 {
                return transpose_decoded::<Self, F>(rows, at, n, dst, stride);
            }
            // Codes are transposed, a quarter of the work: lane L of vector i then has the 16 codes of channel 16L + i.
            let mask = if n >= 64 { u64::MAX } else { (1 << n) - 1 };
            let mut x = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                x[i] = _mm512_maskz_loadu_epi8(mask, rows[i].add(at).cast());
            }
            transpose_bytes(&mut x);
            for i in 0..16 {
                let channels = lookup::<F>(x[i]);
                for v in 0..4 {
                    _mm512_storeu_ps(dst.add((16 * v + i) * stride), channels[v]);
                }
            }
        }
    }

    fn decode_scale(_: KvFormat) -> f32 {
        1.0
    }
}
