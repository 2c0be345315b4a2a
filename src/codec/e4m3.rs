//! OCP FP8 E4M3 ("e4m3fn"): sign, 4 exponent bits (bias 7), 3 mantissa bits.
//!
//! Largest value 448 (0x7E), smallest subnormal 2^-9, no infinities, NaN 0x7F and 0xFF.

use super::{Codec, fp8};
use crate::format::KvFormat;

/// OCP FP8 E4M3.
#[derive(Clone, Copy, Debug)]
pub struct E4M3;

/// Every code's value.
pub static DECODE: [f32; 256] = fp8::decode_table!(decode);

/// Nearest code, ties to even, saturating at ±448; every NaN gives 0x7F.
#[inline]
pub const fn encode(x: f32) -> u8 {
    fp8::encode::<3, 7, 0x7e>(x)
}

/// The value of a code, exactly.
#[inline]
pub const fn decode(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    fp8::decode_finite::<3, 7>(code)
}

impl Codec for E4M3 {
    fp8::impl_codec!(KvFormat::Fp8E4M3);
}
