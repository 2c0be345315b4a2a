//! The oracle itself against tables made by torch and ml_dtypes, before anything relies on it.

#[path = "../testing/oracle/mod.rs"]
mod oracle;

use half::{bf16, f16};
use oracle::formats::{encode_fp8, fixture, nan_code, round_to, table};
use quantkv::{DType, KvFormat};

const FORMATS: [(KvFormat, &str); 3] =
    [(KvFormat::Fp8E4M3, "e4m3fn"), (KvFormat::Fp8E5M2, "e5m2"), (KvFormat::Fp8E4M3Fnuz, "e4m3fnuz")];

/// Every f16 and bf16 pattern: the search in the decode table finds the code torch's conversion
/// gives after clamping. NaN inputs are the contract's (one canonical NaN, sign dropped).
#[test]
fn encoding_by_search_matches_the_tables() {
    for (format, name) in FORMATS {
        for (dtype, widen) in [
            ("f16", (|bits| f16::from_bits(bits).to_f32()) as fn(u16) -> f32),
            ("bf16", |bits| bf16::from_bits(bits).to_f32()),
        ] {
            let golden = fixture(&format!("enc_sat.{dtype}.{name}"));
            assert_eq!(golden.len(), 1 << 16);
            for bits in 0..=u16::MAX {
                let x = widen(bits);
                let expected = if x.is_nan() { nan_code(format) } else { golden[usize::from(bits)] };
                assert_eq!(encode_fp8(format, x), expected, "{name} of {dtype} {bits:#06x} = {x}");
            }
        }
    }
}

/// Codes of finite values survive decode and encode; the rest are NaN or infinite.
#[test]
fn codes_round_trip() {
    for (format, name) in FORMATS {
        for code in 0..=255u8 {
            let value = table(format)[usize::from(code)];
            if value.is_finite() {
                assert_eq!(encode_fp8(format, value), code, "{name} {code:#04x} = {value}");
            }
        }
    }
}

/// Rounding to f16 and bf16 agrees with `half` on every pattern, its neighbours and midpoints.
#[test]
fn rounding_matches_half() {
    for bits in 0..=u16::MAX {
        for (dtype, x) in [(DType::F16, f16::from_bits(bits).to_f32()), (DType::BF16, bf16::from_bits(bits).to_f32())] {
            let half_step = match dtype {
                DType::F16 => 1 << 12,
                _ => 1 << 15,
            };
            for offset in [0, 1, half_step - 1, half_step, half_step + 1] {
                let x = f32::from_bits(x.to_bits().wrapping_add(offset));
                if x.is_nan() {
                    continue;
                }
                let expected = match dtype {
                    DType::F16 => f16::from_f32(x).to_f32(),
                    _ => bf16::from_f32(x).to_f32(),
                };
                assert_eq!(round_to(dtype, x.into()).to_bits(), expected.to_bits(), "{dtype} of {x:e}");
            }
        }
    }
}
