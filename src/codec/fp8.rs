//! The arithmetic the three FP8 codecs share, on bit patterns alone.
//!
//! An 8-bit float with `M` mantissa bits and exponent bias `BIAS` has value
//! `2^(e-BIAS) * (1 + m/2^M)` for exponent field `e > 0`, and `2^(1-BIAS) * m/2^M` for `e = 0`.

/// Nearest code of |x| with x's sign, ties to even, at most `MAX_CODE`; NaN gives 0x7F.
///
/// Normal results: drop `23-M` mantissa bits of the f32 with the usual "add half minus one plus
/// the kept bit" and rebias the exponent; a carry out of the mantissa lands in the exponent, as it
/// should. Subnormal results: adding a power of two whose unit in the last place is the
/// subnormals' spacing makes the f32 adder do the rounding.
#[inline(always)]
pub(super) const fn encode<const M: u32, const BIAS: u32, const MAX_CODE: u8>(x: f32) -> u8 {
    let bits = x.to_bits();
    let sign = ((bits >> 24) & 0x80) as u8;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return 0x7f;
    }
    let shift = 23 - M;
    let smallest_normal = (127 + 1 - BIAS) << 23;
    let code = if magnitude >= smallest_normal {
        let half_minus_one = (1 << (shift - 1)) - 1;
        let kept_bit = (magnitude >> shift) & 1;
        let rounded = magnitude + half_minus_one + kept_bit;
        (rounded >> shift) - ((127 - BIAS) << M)
    } else {
        let magic_bits = (127 + 1 - BIAS + shift) << 23;
        let magic = f32::from_bits(magic_bits);
        (f32::from_bits(magnitude) + magic).to_bits() - magic_bits
    };
    let code = if code > MAX_CODE as u32 { MAX_CODE } else { code as u8 };
    sign | code
}

/// The value of a code that is neither NaN nor infinite.
#[inline(always)]
pub(super) const fn decode_finite<const M: u32, const BIAS: u32>(code: u8) -> f32 {
    let sign = ((code & 0x80) as u32) << 24;
    let exponent = ((code & 0x7f) >> M) as u32;
    let mantissa = (code & ((1 << M) - 1)) as u32;
    if exponent == 0 {
        // 2^(1 - BIAS - M) is a normal f32 and mantissa a small integer: the product is exact.
        let unit = f32::from_bits((127 + 1 - BIAS - M) << 23);
        let value = mantissa as f32 * unit;
        return f32::from_bits(sign | value.to_bits());
    }
    f32::from_bits(sign | ((exponent + 127 - BIAS) << 23) | (mantissa << (23 - M)))
}

/// The values of all 256 codes, evaluated at compile time.
macro_rules! decode_table {
    ($decode:path) => {{
        let mut table = [0.0f32; 256];
        let mut code = 0;
        while code < 256 {
            table[code] = $decode(code as u8);
            code += 1;
        }
        table
    }};
}

/// The body of `impl Codec` for an 8-bit format whose module has `encode` and `DECODE`.
macro_rules! impl_codec {
    ($format:expr) => {
        const FORMAT: KvFormat = $format;
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
    };
}

pub(super) use {decode_table, impl_codec};
