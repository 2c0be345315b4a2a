//! Plain Rust: 8 lanes, units of 16 channels, in loops that compilers vectorize; two 4-lane
//! registers a vector on AArch64 (NEON is part of its baseline).
//!
//! 8- and 16-bit floats are widened by integer arithmetic and selects, without tables or branches:
//! the fields are shifted into place and rebiased; subnormals are their mantissa as an integer
//! times the format's smallest value.

use super::kernels::{self, Ahead, Decode, Direct, Kernels, Pv, Qk, Softmax};
use super::panel::{self, Product, Slots};
use super::simd::{Simd, copy_tail};
use crate::codec::Codec;
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
        decode_scale: 1.0,
    }
}

unsafe fn qk<F: Codec>(a: &Qk<'_>) {
    // SAFETY: the caller's promises.
    unsafe { kernels::qk::<Direct<Portable, F>, 8, 4, 2, 1>(a) }
}
unsafe fn pv<F: Codec>(a: &Pv<'_>) {
    // SAFETY: the caller's promises.
    unsafe { kernels::pv::<Direct<Portable, F>>(a) }
}
unsafe fn decode<F: Codec>(a: &Decode<'_>) {
    // SAFETY: the caller's promises.
    unsafe { kernels::decode::<Portable, F>(a) }
}
unsafe fn decode_transposed<F: Codec>(a: &Decode<'_>) {
    // SAFETY: the caller's promises.
    unsafe { panel::decode_transposed::<Portable, F>(a) }
}
unsafe fn product(a: &Product<'_>) {
    // SAFETY: the caller's promises.
    unsafe { panel::product::<Portable>(a) }
}
unsafe fn dots(a: &Product<'_>) {
    // SAFETY: the caller's promises.
    unsafe { panel::dots::<Portable>(a) }
}
unsafe fn transpose_slots(a: &Slots) -> usize {
    // SAFETY: the caller's promises.
    unsafe { panel::transpose_slots::<Portable>(a) }
}
unsafe fn prefetch(a: &Ahead<'_>, tokens: usize) {
    // SAFETY: the caller's promises.
    unsafe { kernels::prefetch::<Portable>(a, tokens) }
}
unsafe fn softmax(a: &Softmax) -> (f32, f32) {
    // SAFETY: the caller's promises.
    unsafe { kernels::softmax::<Portable>(a) }
}

/// The portable implementation of [`Simd`].
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Eight f32.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct F32x8([f32; 8]);

#[inline(always)]
fn map(a: F32x8, f: impl Fn(f32) -> f32) -> F32x8 {
    F32x8(std::array::from_fn(|i| f(a.0[i])))
}

#[inline(always)]
fn zip(a: F32x8, b: F32x8, f: impl Fn(f32, f32) -> f32) -> F32x8 {
    F32x8(std::array::from_fn(|i| f(a.0[i], b.0[i])))
}

/// An IEEE-like float of `E` exponent bits (bias `BIAS`) and `M` mantissa bits, in the low bits of
/// `code`. With `INF`, the largest exponent is for infinities and NaN.
#[inline(always)]
fn widen<const E: u32, const M: u32, const BIAS: u32, const INF: bool>(code: u32) -> f32 {
    let sign = ((code >> (E + M)) & 1) << 31;
    let magnitude = code & ((1 << (E + M)) - 1);
    let normal = (magnitude << (23 - M)) + ((127 - BIAS) << 23);
    let subnormal = (magnitude as f32 * f32::from_bits((128 - BIAS - M) << 23)).to_bits();
    let mut bits = if magnitude < (1 << M) { subnormal } else { normal };
    if INF && magnitude >= ((1 << E) - 1) << M {
        bits = normal | 0x7f80_0000;
    }
    f32::from_bits(sign | bits)
}

#[inline(always)]
fn decode_one<F: Codec>(code: u32) -> f32 {
    match F::FORMAT {
        KvFormat::F32 => f32::from_bits(code),
        KvFormat::BF16 => f32::from_bits(code << 16),
        KvFormat::F16 => widen::<5, 10, 15, true>(code),
        KvFormat::Fp8E5M2 => widen::<5, 2, 15, true>(code),
        KvFormat::Fp8E4M3 if code & 0x7f == 0x7f => f32::NAN,
        KvFormat::Fp8E4M3 => widen::<4, 3, 7, false>(code),
        KvFormat::Fp8E4M3Fnuz if code == 0x80 => f32::NAN,
        KvFormat::Fp8E4M3Fnuz => widen::<4, 3, 8, false>(code),
    }
}

/// 16 little-endian elements.
#[inline(always)]
unsafe fn decode_unit<F: Codec>(src: *const u8) -> [F32x8; 2] {
    // SAFETY: the caller vouches for 16 readable elements.
    let code = |i: usize| unsafe {
        match F::BYTES {
            1 => u32::from(*src.add(i)),
            2 => u32::from(u16::from_le(src.cast::<u16>().add(i).read_unaligned())),
            _ => u32::from_le(src.cast::<u32>().add(i).read_unaligned()),
        }
    };
    [0, 8].map(|first| F32x8(std::array::from_fn(|i| decode_one::<F>(code(first + i)))))
}

impl Simd for Portable {
    type V = F32x8;
    type Unit = [F32x8; 2];
    const LANES: usize = 8;
    const VECS: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F32x8 {
        F32x8([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F32x8 {
        // SAFETY: the caller vouches for 8 readable f32.
        F32x8(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F32x8) {
        // SAFETY: the caller vouches for 8 writable f32.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v.0) }
    }
    #[inline(always)]
    unsafe fn add(a: F32x8, b: F32x8) -> F32x8 {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: F32x8, b: F32x8) -> F32x8 {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: F32x8, b: F32x8) -> F32x8 {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: F32x8, b: F32x8) -> F32x8 {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: F32x8, b: F32x8, c: F32x8) -> F32x8 {
        // Where fusing is not an instruction `mul_add` is a slow library call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            F32x8(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
        } else {
            F32x8(std::array::from_fn(|i| a.0[i] * b.0[i] + c.0[i]))
        }
    }
    #[inline(always)]
    unsafe fn max(a: F32x8, b: F32x8) -> F32x8 {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: F32x8) -> F32x8 {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn copysign(magnitude: F32x8, sign: F32x8) -> F32x8 {
        zip(magnitude, sign, f32::copysign)
    }
    #[inline(always)]
    unsafe fn round(a: F32x8) -> F32x8 {
        // Adding 1.5 * 2^23 leaves no bits below one: |a| stays below 2^22 here.
        const MAGIC: f32 = 12_582_912.0;
        map(a, |a| (a + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn pow2(n: F32x8) -> F32x8 {
        map(n, |n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn zero_where_less(x: F32x8, limit: F32x8, v: F32x8) -> F32x8 {
        F32x8(std::array::from_fn(|i| if x.0[i] < limit.0[i] { 0.0 } else { v.0[i] }))
    }
    #[inline(always)]
    unsafe fn largest(v: F32x8) -> f32 {
        v.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn sum(v: F32x8) -> f32 {
        let [a, b, c, d, e, f, g, h] = v.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    unsafe fn sum_each(acc: &[F32x8; 16]) -> F32x8 {
        // SAFETY: `sum` accesses no memory.
        F32x8(std::array::from_fn(|i| unsafe { Self::sum(acc[i]) }))
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [F32x8; 16]) {
        for i in 0..8 {
            for j in 0..i {
                (rows[i].0[j], rows[j].0[i]) = (rows[j].0[i], rows[i].0[j]);
            }
        }
    }
    const SUM_ORDER: &'static [usize] = &[0, 4, 2, 6, 1, 5, 3, 7];
    const SLOT_CHANNELS: usize = 0;
    #[inline(always)]
    unsafe fn transpose_slots(_: *const u8, _: usize, _: *mut u8, _: usize, _: bool) {}
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn decode<F: Codec>(src: *const u8, n: usize) -> [F32x8; 2] {
        // SAFETY: the caller vouches for `n` elements; a short row is copied first.
        unsafe {
            if n < Self::UNIT {
                return decode_unit::<F>(copy_tail::<64>(src, n * F::BYTES).as_ptr());
            }
            decode_unit::<F>(src)
        }
    }

    fn decode_scale(_: KvFormat) -> f32 {
        1.0
    }
}
