//! OCP FP8 E5M2: sign, 5 exponent bits (bias 15), 2 mantissa bits: the upper byte of a binary16.
//!
//! Largest value 57344 (0x7B), smallest subnormal 2^-16, infinities 0x7C and 0xFC, NaN
//! s.11111.{01,10,11}. Encoding never produces an infinity: it saturates at ±57344. Every NaN
//! gives 0x7F.

use super::fp8::{Fp8, fp8_codec};
use crate::format::KvFormat;

/// One OCP FP8 E5M2 code; as a type, the format. Not `PartialEq`: compare codes by
/// `to_bits`, values by `to_f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct E5M2(u8);

impl Fp8 for E5M2 {
    const MANTISSA_BITS: u32 = 2;
    const BIAS: u32 = 15;
    const MAX_CODE: u8 = 0x7b;
    const INF_CODE: Option<u8> = Some(0x7c);
    const NAN_CODE: u8 = 0x7f;
    const NEGATIVE_ZERO: bool = true;
}

fp8_codec!(E5M2, KvFormat::Fp8E5M2);
