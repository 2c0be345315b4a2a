//! E4M3 "FNUZ", what AMD gfx94x computes in: sign, 4 exponent bits (bias 8), 3 mantissa bits.
//!
//! Largest value 240 (0x7F), smallest subnormal 2^-10, no infinities, no negative zero; 0x80 is
//! the only NaN. A byte other than 0x7F, 0x80, 0xFF means half of what it means in OCP E4M3.

use super::{Codec, fp8};
use crate::format::KvFormat;

/// E4M3 FNUZ.
#[derive(Clone, Copy, Debug)]
pub struct E4M3Fnuz;

/// Every code's value.
pub static DECODE: [f32; 256] = fp8::decode_table!(decode);

/// Nearest code, ties to even, saturating at ±240; every NaN gives 0x80, what rounds to zero
/// gives 0x00 whatever its sign.
#[inline]
pub const fn encode(x: f32) -> u8 {
    if x.is_nan() {
        return 0x80;
    }
    match fp8::encode::<3, 8, 0x7f>(x) {
        0x80 => 0x00,
        code => code,
    }
}

/// The value of a code, exactly.
#[inline]
pub const fn decode(code: u8) -> f32 {
    if code == 0x80 {
        return f32::NAN;
    }
    fp8::decode_finite::<3, 8>(code)
}

impl Codec for E4M3Fnuz {
    fp8::impl_codec!(KvFormat::Fp8E4M3Fnuz);
}
