//! Storage formats by table: `decode` is torch's, `encode` searches it for the nearest value.

use std::sync::LazyLock;

use quantkv::{DType, KvFormat};
use safetensors::SafeTensors;

use super::fixtures::fixture_path;

/// The fixture `fp8_tables.safetensors`, made by torch and ml_dtypes.
static FIXTURE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let path = fixture_path("fp8_golden/fp8_tables.safetensors");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
});

static E4M3: LazyLock<Vec<f32>> = LazyLock::new(|| decode_table("e4m3fn"));
static E5M2: LazyLock<Vec<f32>> = LazyLock::new(|| decode_table("e5m2"));
static FNUZ: LazyLock<Vec<f32>> = LazyLock::new(|| decode_table("e4m3fnuz"));

fn decode_table(name: &str) -> Vec<f32> {
    let table: Vec<f32> = fixture(&format!("decode.{name}"))
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    assert_eq!(table.len(), 256);
    table
}

/// The raw bytes of a tensor of the fixture.
pub fn fixture(tensor: &str) -> Vec<u8> {
    SafeTensors::deserialize(&FIXTURE).unwrap().tensor(tensor).unwrap().data().to_vec()
}

/// Values of the 256 codes of an FP8 format.
pub fn table(format: KvFormat) -> &'static [f32] {
    match format {
        KvFormat::Fp8E4M3 => &E4M3,
        KvFormat::Fp8E5M2 => &E5M2,
        KvFormat::Fp8E4M3Fnuz => &FNUZ,
        other => panic!("{other} is not an 8-bit float"),
    }
}

/// The code of the largest finite value, and the value (design: 448, 57344, 240).
pub fn largest(format: KvFormat) -> (u8, f32) {
    match format {
        KvFormat::Fp8E4M3 => (0x7e, 448.0),
        KvFormat::Fp8E5M2 => (0x7b, 57344.0),
        KvFormat::Fp8E4M3Fnuz => (0x7f, 240.0),
        other => panic!("{other} is not an 8-bit float"),
    }
}

/// The canonical NaN.
pub fn nan_code(format: KvFormat) -> u8 {
    if format == KvFormat::Fp8E4M3Fnuz { 0x80 } else { 0x7f }
}

/// Bytes of a stored element.
pub fn bytes_of(format: KvFormat) -> usize {
    match format {
        KvFormat::F32 => 4,
        KvFormat::F16 | KvFormat::BF16 => 2,
        _ => 1,
    }
}

/// Whether a format stores codes that scales apply to.
pub fn quantized(format: KvFormat) -> bool {
    bytes_of(format) == 1
}

/// Nearest code, ties to the even code, saturating; NaN is canonical, FNUZ has no negative zero.
pub fn encode_fp8(format: KvFormat, x: f32) -> u8 {
    if x.is_nan() {
        return nan_code(format);
    }
    let (table, (max_code, _)) = (table(format), largest(format));
    let magnitude = f64::from(x.abs());
    // Positive codes ascend: `above` is the first one larger than |x|.
    let above = table[..=usize::from(max_code)].partition_point(|&value| f64::from(value) <= magnitude);
    let below = above - 1;
    let code = if above > usize::from(max_code) {
        below
    } else {
        // Exact in f64: both have at most four significant bits.
        let middle = (f64::from(table[below]) + f64::from(table[above])) / 2.0;
        match magnitude.partial_cmp(&middle).unwrap() {
            std::cmp::Ordering::Less => below,
            std::cmp::Ordering::Greater => above,
            std::cmp::Ordering::Equal => below + below % 2,
        }
    } as u8;
    match (x.is_sign_negative(), format, code) {
        (false, ..) | (true, KvFormat::Fp8E4M3Fnuz, 0) => code,
        (true, ..) => code | 0x80,
    }
}

/// `x` rounded to nearest even with `digits` significant bits, smallest normal exponent `emin`
/// and largest finite value `max`; overflow gives infinity, as IEEE 754 does.
fn round_binary(x: f64, digits: i32, emin: i32, max: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    // |x| is far above the f64 subnormals here, so the exponent field is the exponent.
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let quantum = 2f64.powi(exponent.max(emin) - digits + 1);
    let rounded = (x / quantum).round_ties_even() * quantum;
    if rounded.abs() > max { f64::INFINITY.copysign(x) } else { rounded.copysign(x) }
}

/// `x` rounded to what an activation type can hold, as a f32 (which holds it exactly).
pub fn round_to(dtype: DType, x: f64) -> f32 {
    match dtype {
        DType::F32 => x as f32,
        DType::F16 => round_binary(x, 11, -14, 65504.0) as f32,
        DType::BF16 => round_binary(x, 8, -126, f64::from(f32::from_bits(0x7f7f_0000))) as f32,
    }
}

/// Half the gap between neighbours, relative: the error of one rounding to `dtype`.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
    }
}

/// The smallest subnormal of `dtype`.
pub fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-149),
        DType::F16 => 2f64.powi(-24),
        DType::BF16 => 2f64.powi(-133),
    }
}

/// Writes one element of `format`; `x` has been divided by its scale.
pub fn store(format: KvFormat, x: f32, dst: &mut [u8]) {
    match format {
        KvFormat::F32 => dst.copy_from_slice(&x.to_bits().to_le_bytes()),
        KvFormat::F16 => {
            // The rounded value is one of f16's: this conversion is exact.
            let rounded = half::f16::from_f32(round_to(DType::F16, x.into()));
            dst.copy_from_slice(&rounded.to_bits().to_le_bytes());
        }
        KvFormat::BF16 => {
            let rounded = round_to(DType::BF16, x.into());
            dst.copy_from_slice(&((rounded.to_bits() >> 16) as u16).to_le_bytes());
        }
        _ => dst[0] = encode_fp8(format, x),
    }
}

/// Reads one element of `format`, before its scale.
pub fn load(format: KvFormat, src: &[u8]) -> f32 {
    match format {
        KvFormat::F32 => f32::from_le_bytes(src.try_into().unwrap()),
        KvFormat::F16 => half::f16::from_le_bytes(src.try_into().unwrap()).to_f32(),
        KvFormat::BF16 => f32::from_bits(u32::from(u16::from_le_bytes(src.try_into().unwrap())) << 16),
        _ => table(format)[usize::from(src[0])],
    }
}

/// Writes a NaN of `format`.
pub fn store_nan(format: KvFormat, dst: &mut [u8]) {
    match format {
        KvFormat::F32 => dst.copy_from_slice(&f32::NAN.to_le_bytes()),
        KvFormat::F16 => dst.copy_from_slice(&0x7e00u16.to_le_bytes()),
        KvFormat::BF16 => dst.copy_from_slice(&0x7fc0u16.to_le_bytes()),
        _ => dst[0] = nan_code(format),
    }
}

/// Whether two stored elements are the same bytes, or (unquantized) both NaN of any payload.
pub fn same_stored(format: KvFormat, a: &[u8], b: &[u8]) -> bool {
    a == b || (!quantized(format) && load(format, a).is_nan() && load(format, b).is_nan())
}

/// Whether two activations are the same bits, or both NaN of any payload.
pub fn same_value(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}
