//! What the three FP8 codecs share: a description of a format, and scalar arithmetic on bit
//! patterns that follows it. This is the specification; `simd` is the same algorithm on lanes.
//!
//! An 8-bit float with `M` mantissa bits and exponent bias `B` has value
//! `2^(e-B) * (1 + m/2^M)` for exponent field `e > 0`, and `2^(1-B) * m/2^M` for `e = 0`.

use super::Codec;

/// An 8-bit float format, by its numbers.
pub trait Fp8: Codec<Bits = u8> {
    /// Bits of the mantissa field; the exponent has `7 - MANTISSA_BITS`.
    const MANTISSA_BITS: u32;
    /// Exponent bias.
    const BIAS: u32;
    /// The code of the largest finite value; every larger magnitude saturates to it.
    const MAX_CODE: u8;
    /// The code of +infinity, if there is one. Only decoding meets it.
    const INF_CODE: Option<u8>;
    /// The code every NaN is encoded as.
    const NAN_CODE: u8;
    /// Whether 0x80 is -0. Where it is not, it is the only NaN.
    const NEGATIVE_ZERO: bool;
}

/// Nearest code, ties to even, saturating; every NaN gives `NAN_CODE`.
///
/// Normal results: drop `23-M` mantissa bits of the f32 with the usual "add half minus one plus
/// the kept bit" and rebias the exponent; a carry out of the mantissa lands in the exponent, as it
/// should. Subnormal results: adding a power of two whose unit in the last place is the
/// subnormals' spacing makes the f32 adder do the rounding.
#[inline(always)]
pub(super) const fn encode<F: Fp8>(x: f32) -> u8 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return F::NAN_CODE;
    }
    let shift = 23 - F::MANTISSA_BITS;
    let smallest_normal = (127 + 1 - F::BIAS) << 23;
    let code = if magnitude >= smallest_normal {
        let half_minus_one = (1 << (shift - 1)) - 1;
        let kept_bit = (magnitude >> shift) & 1;
        let rounded = magnitude + half_minus_one + kept_bit;
        (rounded >> shift) - ((127 - F::BIAS) << F::MANTISSA_BITS)
    } else {
        let magic = (127 + 1 - F::BIAS + shift) << 23;
        (f32::from_bits(magnitude) + f32::from_bits(magic)).to_bits() - magic
    };
    let code = if code > F::MAX_CODE as u32 { F::MAX_CODE } else { code as u8 };
    if code == 0 && !F::NEGATIVE_ZERO {
        return 0;
    }
    code | ((bits >> 24) & 0x80) as u8
}

/// The value of a code, exactly; every NaN code gives the same quiet NaN.
#[inline(always)]
pub(super) const fn decode<F: Fp8>(code: u8) -> f32 {
    let magnitude = (code & 0x7f) as u32;
    let sign = ((code & 0x80) as u32) << 24;
    if !F::NEGATIVE_ZERO {
        if code == 0x80 {
            return f32::NAN;
        }
    } else if magnitude > F::MAX_CODE as u32 {
        return match F::INF_CODE {
            Some(inf) if magnitude == inf as u32 => f32::from_bits(sign | f32::INFINITY.to_bits()),
            _ => f32::NAN,
        };
    }
    let bits = if magnitude < 1 << F::MANTISSA_BITS {
        // 2^(1-B-M) is a normal f32 and the mantissa a small integer: the product is exact.
        let unit = f32::from_bits((127 + 1 - F::BIAS - F::MANTISSA_BITS) << 23);
        (magnitude as f32 * unit).to_bits()
    } else {
        (magnitude << (23 - F::MANTISSA_BITS)) + ((127 - F::BIAS) << 23)
    };
    f32::from_bits(sign | bits)
}

/// The values of all 256 codes, evaluated at compile time.
pub(super) const fn decode_table<F: Fp8>() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = decode::<F>(code as u8);
        code += 1;
    }
    table
}

/// The public face of an 8-bit format's module (`encode`, `decode`, `DECODE`) and its [`Codec`].
macro_rules! fp8_codec {
    ($ty:ty, $format:expr) => {
        /// Every code's value.
        pub static DECODE: [f32; 256] = $crate::codec::fp8::decode_table::<$ty>();

        /// Nearest code, ties to even, saturating to the largest finite value, infinities
        /// included; every NaN gives the canonical one.
        #[inline]
        pub const fn encode(x: f32) -> u8 {
            $crate::codec::fp8::encode::<$ty>(x)
        }

        /// The value of a code, exactly.
        #[inline]
        pub const fn decode(code: u8) -> f32 {
            $crate::codec::fp8::decode::<$ty>(code)
        }

        impl $ty {
            /// The code with these bits.
            pub const fn from_bits(bits: u8) -> Self {
                Self(bits)
            }
            /// Its bits.
            pub const fn to_bits(self) -> u8 {
                self.0
            }
            /// [`encode`].
            pub const fn from_f32(x: f32) -> Self {
                Self(encode(x))
            }
            /// [`decode`].
            pub const fn to_f32(self) -> f32 {
                decode(self.0)
            }
        }

        impl $crate::codec::sealed::Sealed for $ty {}

        impl $crate::codec::Codec for $ty {
            const FORMAT: $crate::format::KvFormat = $format;
            const BYTES: usize = 1;
            const QUANTIZED: bool = true;
            type Bits = u8;

            #[inline(always)]
            fn encode(x: f32) -> u8 {
                encode(x)
            }
            #[inline(always)]
            fn decode(code: u8) -> f32 {
                DECODE[code as usize]
            }
            #[inline(always)]
            fn store(x: f32, dst: &mut [u8]) {
                dst[0] = encode(x);
            }
            #[inline(always)]
            fn load(src: &[u8]) -> f32 {
                DECODE[src[0] as usize]
            }
        }
    };
}

pub(super) use fp8_codec;
