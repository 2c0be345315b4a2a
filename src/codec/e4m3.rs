//! OCP FP8 E4M3 ("e4m3fn"): sign, 4 exponent bits (bias 7), 3 mantissa bits.
//!
//! Largest value 448 (0x7E), smallest subnormal 2^-9, no infinities, NaN 0x7F and 0xFF. Encoding
//! saturates at ±448 and gives 0x7F for every NaN.

use super::fp8::{Fp8, fp8_codec};
use crate::format::KvFormat;

/// One OCP FP8 E4M3 code; as a type, the format. Not `PartialEq`: compare codes by
/// `to_bits`, values by `to_f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct E4M3(u8);

impl Fp8 for E4M3 {
    const MANTISSA_BITS: u32 = 3;
    const BIAS: u32 = 7;
    const MAX_CODE: u8 = 0x7e;
    const INF_CODE: Option<u8> = None;
    const NAN_CODE: u8 = 0x7f;
    const NEGATIVE_ZERO: bool = true;
}

fp8_codec!(E4M3, KvFormat::Fp8E4M3);
