//! Elements of every format as f32 lanes, and back: `codec::fp8` and `half`, lane by lane.
//!
//! Branches of the scalar forms become selects; the steps are the same and so are the bits.

use super::{Codec, Fp8, Simd};
use crate::codec::{PlainBF16, PlainF16, PlainF32};

/// A format whose elements can be loaded and stored `LANES` at a time.
pub(in crate::codec) trait Lanes: Codec {
    /// `LANES` elements from the front of `src`, as [`Codec::load`].
    fn load_lanes<S: Simd>(simd: S, src: &[u8]) -> S::F32;
    /// `LANES` elements to the front of `dst`, as [`Codec::store`].
    fn store_lanes<S: Simd>(simd: S, x: S::F32, dst: &mut [u8]);
}

impl Lanes for PlainF32 {
    #[inline(always)]
    fn load_lanes<S: Simd>(simd: S, src: &[u8]) -> S::F32 {
        simd.floats(simd.load_u32(src))
    }
    #[inline(always)]
    fn store_lanes<S: Simd>(simd: S, x: S::F32, dst: &mut [u8]) {
        simd.store_u32(simd.bits(x), dst);
    }
}

impl Lanes for PlainF16 {
    #[inline(always)]
    fn load_lanes<S: Simd>(simd: S, src: &[u8]) -> S::F32 {
        simd.load_f16(src)
    }
    #[inline(always)]
    fn store_lanes<S: Simd>(simd: S, x: S::F32, dst: &mut [u8]) {
        simd.store_f16(x, dst);
    }
}

impl Lanes for PlainBF16 {
    #[inline(always)]
    fn load_lanes<S: Simd>(simd: S, src: &[u8]) -> S::F32 {
        bf16_to_f32(simd, simd.load_u16(src))
    }
    #[inline(always)]
    fn store_lanes<S: Simd>(simd: S, x: S::F32, dst: &mut [u8]) {
        simd.store_u16(f32_to_bf16(simd, x), dst);
    }
}

impl<F: Fp8> Lanes for F {
    #[inline(always)]
    fn load_lanes<S: Simd>(simd: S, src: &[u8]) -> S::F32 {
        simd.load_fp8::<F>(src)
    }
    #[inline(always)]
    fn store_lanes<S: Simd>(simd: S, x: S::F32, dst: &mut [u8]) {
        simd.store_u8(encode_fp8::<S, F>(simd, x), dst);
    }
}

const INFINITY: u32 = 0x7f80_0000;
const SIGN: u32 = 0x8000_0000;

/// |x| (as the bits of an f32, not NaN) to the nearest float of `mantissa_bits` and `bias`, ties
/// to even, with no upper limit: the rounding step of `codec::fp8::encode`.
#[inline(always)]
fn round_magnitude<S: Simd>(simd: S, magnitude: S::U32, mantissa_bits: u32, bias: u32) -> S::U32 {
    let shift = 23 - mantissa_bits;
    let smallest_normal = simd.splat_u32((127 + 1 - bias) << 23);
    let half_minus_one = simd.splat_u32((1 << (shift - 1)) - 1);
    let kept_bit = simd.and(simd.shr(magnitude, shift), simd.splat_u32(1));
    let rounded = simd.add_u32(simd.add_u32(magnitude, half_minus_one), kept_bit);
    let normal = simd.sub_u32(simd.shr(rounded, shift), simd.splat_u32((127 - bias) << mantissa_bits));
    let magic = simd.splat_u32((127 + 1 - bias + shift) << 23);
    let subnormal = simd.sub_u32(simd.bits(simd.add(simd.floats(magnitude), simd.floats(magic))), magic);
    simd.select_lt(magnitude, smallest_normal, subnormal, normal)
}

/// |value| of a code without its sign, as the bits of an f32; infinities and NaN apart.
#[inline(always)]
fn widen_magnitude<S: Simd>(simd: S, magnitude: S::U32, mantissa_bits: u32, bias: u32) -> S::U32 {
    let rebias = simd.splat_u32((127 - bias) << 23);
    let normal = simd.add_u32(simd.shl(magnitude, 23 - mantissa_bits), rebias);
    let unit = simd.splat_u32((127 + 1 - bias - mantissa_bits) << 23);
    let subnormal = simd.bits(simd.mul(simd.to_f32(magnitude), simd.floats(unit)));
    simd.select_lt(magnitude, simd.splat_u32(1 << mantissa_bits), subnormal, normal)
}

/// `codec::fp8::encode`.
#[inline(always)]
fn encode_fp8<S: Simd, F: Fp8>(simd: S, x: S::F32) -> S::U32 {
    let bits = simd.bits(x);
    let magnitude = simd.and(bits, simd.splat_u32(!SIGN));
    let rounded = round_magnitude(simd, magnitude, F::MANTISSA_BITS, F::BIAS);
    let code = simd.min_u32(rounded, simd.splat_u32(F::MAX_CODE.into()));
    let mut sign = simd.and(simd.shr(bits, 24), simd.splat_u32(0x80));
    if !F::NEGATIVE_ZERO {
        sign = simd.select_lt(code, simd.splat_u32(1), code, sign);
    }
    simd.select_lt(simd.splat_u32(INFINITY), magnitude, simd.splat_u32(F::NAN_CODE.into()), simd.or(code, sign))
}

/// `codec::fp8::decode`.
#[inline(always)]
pub(super) fn decode_fp8<S: Simd, F: Fp8>(simd: S, code: S::U32) -> S::F32 {
    let magnitude = simd.and(code, simd.splat_u32(0x7f));
    let sign = simd.shl(simd.and(code, simd.splat_u32(0x80)), 24);
    let mut bits = simd.or(sign, widen_magnitude(simd, magnitude, F::MANTISSA_BITS, F::BIAS));
    let nan = simd.splat_u32(f32::NAN.to_bits());
    if !F::NEGATIVE_ZERO {
        let zero_if_nan = simd.xor(code, simd.splat_u32(0x80));
        bits = simd.select_lt(zero_if_nan, simd.splat_u32(1), nan, bits);
        return simd.floats(bits);
    }
    let mut largest = F::MAX_CODE;
    if let Some(inf) = F::INF_CODE {
        let inf_bits = simd.or(sign, simd.splat_u32(INFINITY));
        bits = simd.select_lt(simd.splat_u32(largest.into()), magnitude, inf_bits, bits);
        largest = inf;
    }
    simd.floats(simd.select_lt(simd.splat_u32(largest.into()), magnitude, nan, bits))
}

/// binary16 to f32; a NaN keeps its payload and becomes quiet.
#[inline(always)]
pub(super) fn f16_to_f32<S: Simd>(simd: S, half: S::U32) -> S::F32 {
    let magnitude = simd.and(half, simd.splat_u32(0x7fff));
    let sign = simd.shl(simd.and(half, simd.splat_u32(0x8000)), 16);
    let finite = widen_magnitude(simd, magnitude, 10, 15);
    let special = simd.or(simd.shl(magnitude, 13), simd.splat_u32(INFINITY));
    let bits = simd.select_lt(simd.splat_u32(0x7bff), magnitude, special, finite);
    simd.floats(simd.or(sign, quiet(simd, bits)))
}

/// f32 to binary16 as IEEE 754 rounds; a NaN keeps the top of its payload and becomes quiet.
#[inline(always)]
pub(super) fn f32_to_f16<S: Simd>(simd: S, x: S::F32) -> S::U32 {
    let bits = simd.bits(x);
    let magnitude = simd.and(bits, simd.splat_u32(!SIGN));
    let sign = simd.and(simd.shr(bits, 16), simd.splat_u32(0x8000));
    let rounded = simd.min_u32(round_magnitude(simd, magnitude, 10, 15), simd.splat_u32(0x7c00));
    let payload = simd.and(simd.shr(magnitude, 13), simd.splat_u32(0x3ff));
    let nan = simd.or(payload, simd.splat_u32(0x7e00));
    simd.or(sign, simd.select_lt(simd.splat_u32(INFINITY), magnitude, nan, rounded))
}

/// bfloat16 to f32; a NaN keeps its payload and becomes quiet.
#[inline(always)]
fn bf16_to_f32<S: Simd>(simd: S, half: S::U32) -> S::F32 {
    simd.floats(quiet(simd, simd.shl(half, 16)))
}

/// f32 to bfloat16, nearest even; a NaN keeps the top of its payload and becomes quiet.
#[inline(always)]
fn f32_to_bf16<S: Simd>(simd: S, x: S::F32) -> S::U32 {
    let bits = simd.bits(x);
    let magnitude = simd.and(bits, simd.splat_u32(!SIGN));
    let kept_bit = simd.and(simd.shr(bits, 16), simd.splat_u32(1));
    let rounded = simd.shr(simd.add_u32(simd.add_u32(bits, simd.splat_u32(0x7fff)), kept_bit), 16);
    let nan = simd.or(simd.shr(bits, 16), simd.splat_u32(0x40));
    simd.select_lt(simd.splat_u32(INFINITY), magnitude, nan, rounded)
}

/// Sets the quiet bit of NaN lanes.
#[inline(always)]
fn quiet<S: Simd>(simd: S, bits: S::U32) -> S::U32 {
    let magnitude = simd.and(bits, simd.splat_u32(!SIGN));
    let quieted = simd.or(bits, simd.splat_u32(0x0040_0000));
    simd.select_lt(simd.splat_u32(INFINITY), magnitude, quieted, bits)
}
