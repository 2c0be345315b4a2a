//! E4M3 "FNUZ", what AMD gfx94x computes in: sign, 4 exponent bits (bias 8), 3 mantissa bits.
//!
//! Largest value 240 (0x7F), smallest subnormal 2^-10, no infinities, no negative zero; 0x80 is
//! the only NaN. A byte other than 0x7F, 0x80, 0xFF means half of what it means in OCP E4M3.
//! Encoding saturates at ±240 and gives 0x80 for every NaN; what rounds to zero gives 0x00
//! whatever its sign.

use super::fp8::{Fp8, fp8_codec};
use crate::format::KvFormat;

/// One E4M3 FNUZ code; as a type, the format. Not `PartialEq`: compare codes by
/// `to_bits`, values by `to_f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct E4M3Fnuz(u8);

impl Fp8 for E4M3Fnuz {
    const MANTISSA_BITS: u32 = 3;
    const BIAS: u32 = 8;
    const MAX_CODE: u8 = 0x7f;
    const INF_CODE: Option<u8> = None;
    const NAN_CODE: u8 = 0x80;
    const NEGATIVE_ZERO: bool = false;
}

fp8_codec!(E4M3Fnuz, KvFormat::Fp8E4M3Fnuz);
