//! OCP FP8 E5M2: sign, 5 exponent bits (bias 15), 2 mantissa bits: the upper byte of a binary16.
//!
//! Largest value 57344 (0x7B), smallest subnormal 2^-16, infinities 0x7C and 0xFC, NaN
//! s.11111.{01,10,11}. Encoding never produces an infinity: it saturates.

use super::{Codec, fp8};
use crate::format::KvFormat;

/// OCP FP8 E5M2.
#[derive(Clone, Copy, Debug)]
pub struct E5M2;

/// Every code's value.
pub static DECODE: [f32; 256] = fp8::decode_table!(decode);

/// Nearest code, ties to even, saturating at ±57344; every NaN gives 0x7F.
#[inline]
pub const fn encode(x: f32) -> u8 {
    fp8::encode::<2, 15, 0x7b>(x)
}

/// The value of a code, exactly.
#[inline]
pub const fn decode(code: u8) -> f32 {
    match code & 0x7f {
        0x7c if code < 0x80 => f32::INFINITY,
        0x7c => f32::NEG_INFINITY,
        0x7d..=0x7f => f32::NAN,
        _ => fp8::decode_finite::<2, 15>(code),
    }
}

impl Codec for E5M2 {
    fp8::impl_codec!(KvFormat::Fp8E5M2);
}
