//! The codecs against independent truth, on every instruction set of this machine:
//!
//! * `fixtures/fp8_golden`: every code decoded and every f16 and bf16 pattern encoded, made by
//!   torch and ml_dtypes (`make_tables.py` beside it);
//! * every f32, against the definition of "nearest, ties to even" on sorted decoded values;
//! * the `float8` crate, where it is right.

#[path = "../testing/fixtures.rs"]
mod fixtures;

use std::sync::atomic::{AtomicU32, Ordering};

use half::{bf16, f16};
use quantkv::codec::{
    self, ScaleRow, absmax_scaled_slice, absmax_slice, decode_slice, e4m3, e4m3fnuz, e5m2, encode_slice,
};
use quantkv::{Element, Isa, KvFormat};
use safetensors::SafeTensors;

/// Our formats and what the golden tables call them.
const FP8: [(KvFormat, &str); 3] =
    [(KvFormat::Fp8E4M3, "e4m3fn"), (KvFormat::Fp8E5M2, "e5m2"), (KvFormat::Fp8E4M3Fnuz, "e4m3fnuz")];

/// The code every NaN becomes: the contract's, not the tables' (they keep the sign).
fn nan_code(format: KvFormat) -> u8 {
    if format == KvFormat::Fp8E4M3Fnuz { 0x80 } else { 0x7f }
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

struct Golden(Vec<u8>);

impl Golden {
    fn read() -> Self {
        Golden(std::fs::read(fixtures::fixture_path("fp8_golden/fp8_tables.safetensors")).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// The value of each code.
    fn decode(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(&format!("decode.{name}"));
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(values.len(), 256);
        values
    }

    /// The code of each 16-bit pattern of `source`, NaN as the contract has it.
    fn encode(&self, source: &str, name: &str, format: KvFormat, is_nan: impl Fn(u16) -> bool) -> Vec<u8> {
        let mut codes = self.bytes(&format!("enc_sat.{source}.{name}"));
        assert_eq!(codes.len(), 1 << 16);
        for (pattern, code) in codes.iter_mut().enumerate() {
            if is_nan(pattern as u16) {
                *code = nan_code(format);
            }
        }
        codes
    }
}

/// OCP and FNUZ bytes of a cache, every one of them: twice the scale on one side keeps all values but
/// those the numerics contract lists. The tables are torch's and ml_dtypes'.
#[test]
fn ocp_and_fnuz_codes_convert_as_stated() {
    let golden = Golden::read();
    let (ocp, fnuz) = (golden.decode("e4m3fn"), golden.decode("e4m3fnuz"));
    let all: Vec<u8> = (0..=255).collect();

    let mut to_fnuz = all.clone();
    codec::e4m3_to_fnuz_slice(&mut to_fnuz);
    for code in 0..=255u8 {
        let converted = codec::e4m3_to_fnuz(code);
        assert_eq!(to_fnuz[usize::from(code)], converted);
        let (before, after) = (ocp[usize::from(code)], 2.0 * fnuz[usize::from(converted)]);
        // `==`: -0 becomes +0, the only change there is.
        assert!(before == after || before.is_nan() && after.is_nan(), "{code:#x}: {before} to {after}");
        assert_eq!(before.to_bits() == after.to_bits() || before.is_nan(), code != 0x80, "{code:#x}");
        assert_eq!(code == converted, !matches!(code, 0x80 | 0x7f | 0xff), "{code:#x}");
    }

    let mut to_ocp = all;
    assert_eq!(codec::fnuz_to_e4m3_slice(&mut to_ocp), 2);
    for code in 0..=255u8 {
        let converted = codec::fnuz_to_e4m3(code);
        assert_eq!(to_ocp[usize::from(code)], converted);
        let (before, after) = (fnuz[usize::from(code)], ocp[usize::from(converted)] / 2.0);
        match code {
            0x7f => assert_eq!((before, after), (240.0, 224.0)),
            0xff => assert_eq!((before, after), (-240.0, -224.0)),
            0x80 => assert!(before.is_nan() && after.is_nan()),
            _ => assert_eq!(before.to_bits(), after.to_bits(), "{code:#x}"),
        }
        // There and back, either way.
        let back = codec::e4m3_to_fnuz(converted);
        assert_eq!(back == code, !matches!(code, 0x7f | 0xff), "{code:#x}");
        let back = codec::fnuz_to_e4m3(codec::e4m3_to_fnuz(code));
        assert_eq!(back == code, !matches!(code, 0x80 | 0xff), "{code:#x}");
    }
}

/// With the scale left as it is: the largest OCP values saturate, and odd multiples of 2^-10 below 2^-6
/// have no OCP code. All else is exact.
#[test]
fn ocp_and_fnuz_values_under_one_scale() {
    let golden = Golden::read();
    let (ocp, fnuz) = (golden.decode("e4m3fn"), golden.decode("e4m3fnuz"));
    for code in 0..=255u8 {
        let value = ocp[usize::from(code)];
        let got = fnuz[usize::from(e4m3fnuz::encode(e4m3::decode(code)))];
        let want = if value.abs() > 240.0 { value.signum() * 240.0 } else { value };
        assert!(got == want || got.is_nan() && value.is_nan(), "{code:#x}: {value} to {got}");

        let value = fnuz[usize::from(code)];
        let got = ocp[usize::from(e4m3::encode(e4m3fnuz::decode(code)))];
        let odd = value.abs() < 2f32.powi(-6) && (value * 1024.0) % 2.0 != 0.0;
        assert_eq!(got == value || value.is_nan(), !odd, "{code:#x}: {value} to {got}");
        assert!((got - value).abs() <= 2f32.powi(-10) || value.is_nan());
    }
}

/// Equal, or both NaN.
fn same<T: Element>(a: T, b: f32) -> bool {
    let a = a.to_f32();
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn every_code_decodes_to_the_golden_value() {
    fn into<T: Element>(isa: Isa, format: KvFormat, codes: &[u8], expected: &[f32]) {
        let mut values = vec![T::default(); codes.len()];
        decode_slice(isa, format, codes, ScaleRow::One(1.0), &mut values);
        for (code, (value, expected)) in codes.iter().zip(values.iter().zip(expected)) {
            // Every FP8 value is a value of f16 and of bf16.
            assert!(same(*value, *expected), "{isa} {format} {code:#x}: {value:?}, golden {expected}");
        }
    }
    let golden = Golden::read();
    let codes: Vec<u8> = (0..=255).collect();
    type Scalar = (fn(u8) -> f32, &'static [f32; 256]);
    let scalar: [Scalar; 3] =
        [(e4m3::decode, &e4m3::DECODE), (e5m2::decode, &e5m2::DECODE), (e4m3fnuz::decode, &e4m3fnuz::DECODE)];
    for ((format, name), (decode, table)) in FP8.into_iter().zip(scalar) {
        let expected = golden.decode(name);
        for code in 0..=255u8 {
            let golden = expected[usize::from(code)];
            assert!(same(decode(code), golden) && same(table[usize::from(code)], golden), "{format} {code:#x}");
        }
        for isa in isas() {
            into::<f32>(isa, format, &codes, &expected);
            into::<f16>(isa, format, &codes, &expected);
            into::<bf16>(isa, format, &codes, &expected);
            for offset in 1..40 {
                into::<f32>(isa, format, &codes[offset..3 * offset], &expected[offset..3 * offset]);
            }
        }
    }
}

#[test]
fn every_half_pattern_encodes_to_the_golden_code() {
    /// In one row, and in rows of 1, 2, 3, ... elements, so at every alignment.
    fn check<T: Element>(format: KvFormat, patterns: &[T], golden: &[u8]) {
        for isa in isas() {
            let mut codes = vec![0; patterns.len()];
            encode_slice(isa, format, patterns, ScaleRow::One(1.0), &mut codes);
            assert_eq!(codes, golden, "{isa} {format} from {}", T::DTYPE);
            let (mut start, mut len) = (0, 1);
            while start < patterns.len() {
                let end = (start + len).min(patterns.len());
                let row = &mut codes[..end - start];
                encode_slice(isa, format, &patterns[start..end], ScaleRow::One(1.0), row);
                assert_eq!(row, &golden[start..end], "{isa} {format} from {} row {start}..{end}", T::DTYPE);
                (start, len) = (end, len % 131 + 1);
            }
        }
    }
    let golden = Golden::read();
    let f16s: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let bf16s: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let encoders = [e4m3::encode, e5m2::encode, e4m3fnuz::encode];
    for ((format, name), encode) in FP8.into_iter().zip(encoders) {
        let from_f16 = golden.encode("f16", name, format, |bits| f16::from_bits(bits).is_nan());
        let from_bf16 = golden.encode("bf16", name, format, |bits| bf16::from_bits(bits).is_nan());
        check(format, &f16s, &from_f16);
        check(format, &bf16s, &from_bf16);
        // The same numbers as f32.
        check(format, &f16s.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), &from_f16);
        check(format, &bf16s.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), &from_bf16);
        for (x, golden) in bf16s.iter().zip(&from_bf16) {
            assert_eq!(encode(x.to_f32()), *golden, "{format} {x}");
        }
    }
}

/// "Nearest, ties to even, saturating" by its definition: for magnitudes, sorted as their f32 bits
/// are, the first bits of each code's interval. Codes are consecutive, so the intervals are too.
struct Nearest {
    /// `starts[c]`: the smallest f32 bits whose code is `c`.
    starts: Vec<u32>,
}

impl Nearest {
    /// From the values of codes 0, 1, 2, ...: the boundary of `c` and `c + 1` is their midpoint,
    /// exact in f64 (and a value of f32), which belongs to the even one.
    fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        let mut starts = vec![0];
        for (code, pair) in values.windows(2).enumerate() {
            assert!(pair[0] < pair[1]);
            let midpoint = (pair[0] + pair[1]) / 2.0;
            assert_eq!(f64::from(midpoint as f32), midpoint);
            let next_is_even = code % 2 == 1;
            starts.push((midpoint as f32).to_bits() + u32::from(!next_is_even));
        }
        Nearest { starts }
    }

    fn fp8(golden: &Golden, name: &str) -> Self {
        let positive = golden.decode(name).into_iter().take(0x80);
        Self::new(positive.take_while(|x| x.is_finite()).map(f64::from))
    }

    /// A 16-bit format by its field widths; overflow rounds to the infinity's code as if it were
    /// the next value.
    fn ieee(mantissa_bits: i32, bias: i32) -> Self {
        let infinity = 0x7fff_u32 >> mantissa_bits << mantissa_bits;
        Self::new((0..=infinity).map(|code| {
            let (exponent, mantissa) = ((code >> mantissa_bits) as i32, code & ((1 << mantissa_bits) - 1));
            let fraction = f64::from(mantissa) / f64::from(1 << mantissa_bits);
            let normal = 2f64.powi(exponent - bias) * (1.0 + fraction);
            if exponent == 0 { 2f64.powi(1 - bias) * fraction } else { normal }
        }))
    }

    fn code(&self, magnitude: u32) -> usize {
        self.starts.partition_point(|start| *start <= magnitude) - 1
    }

    /// Writes the codes of `expected.len()` consecutive magnitudes.
    fn fill(&self, first: u32, expected: &mut [u16]) {
        let mut code = self.code(first);
        let (mut from, len) = (0, expected.len());
        while from < len {
            let to = self.starts.get(code + 1).map_or(len, |next| len.min((next - first) as usize));
            expected[from..to].fill(code as u16);
            (from, code) = (to, code + 1);
        }
    }
}

/// The oracle of each format that rounds, with the sign bit of its codes.
fn oracles() -> Vec<(KvFormat, Nearest, u16)> {
    let golden = Golden::read();
    let mut all: Vec<_> = FP8.into_iter().map(|(format, name)| (format, Nearest::fp8(&golden, name), 0x80)).collect();
    all.push((KvFormat::F16, Nearest::ieee(10, 15), 0x8000));
    all.push((KvFormat::BF16, Nearest::ieee(7, 127), 0x8000));
    all
}

/// Encodes the f32s of bits `first..first + N` on every instruction set and compares.
fn check_f32_chunk(oracles: &[(KvFormat, Nearest, u16)], first: u32, len: usize) {
    const SIGN: u32 = 0x8000_0000;
    const INFINITY: u32 = 0x7f80_0000;
    let inputs: Vec<f32> = (0..len as u32).map(|i| f32::from_bits(first + i)).collect();
    let (mut wide, mut got) = (vec![0u16; len], vec![0u8; 2 * len]);
    for (format, nearest, sign) in oracles {
        let nan_from = (INFINITY + 1).saturating_sub(first & !SIGN).min(len as u32) as usize;
        nearest.fill(first & !SIGN, &mut wide[..nan_from]);
        if first & SIGN != 0 {
            let keeps_zero_sign = *format != KvFormat::Fp8E4M3Fnuz;
            wide.iter_mut().filter(|code| keeps_zero_sign || **code != 0).for_each(|code| *code |= sign);
        }
        let quantized = format.is_quantized();
        let got = &mut got[..len * format.bytes()];
        let expected: Vec<u8> = if quantized {
            wide[nan_from..].fill(nan_code(*format).into());
            wide.iter().map(|code| *code as u8).collect()
        } else {
            wide.iter().flat_map(|code| code.to_le_bytes()).collect()
        };
        for isa in isas() {
            encode_slice(isa, *format, &inputs, ScaleRow::One(1.0), got);
            let numbers = if quantized { len } else { 2 * nan_from };
            if got[..numbers] != expected[..numbers] {
                let at = (0..numbers).find(|&i| got[i] != expected[i]).unwrap() / format.bytes();
                panic!("{isa} {format} of {:?} ({:#010x})", inputs[at], first + at as u32);
            }
            // 16-bit formats keep a NaN a NaN of its sign.
            for (x, bits) in inputs[nan_from..].iter().zip(got.chunks_exact(2).skip(nan_from)).filter(|_| !quantized) {
                let bits = u16::from_le_bytes([bits[0], bits[1]]);
                let infinity = if *format == KvFormat::F16 { 0x7c00 } else { 0x7f80 };
                let negative = bits & 0x8000 != 0;
                assert!(bits & 0x7fff > infinity && negative == x.is_sign_negative(), "{isa} {format} of {x:?}");
            }
        }
    }
}

const CHUNK: u32 = 1 << 15;

#[test]
fn a_spread_of_f32_encodes_to_the_nearest_code() {
    let oracles = oracles();
    // A sign and exponent is 256 chunks: at least one of each.
    for chunk in (0..1u32 << 17).step_by(251) {
        check_f32_chunk(&oracles, chunk * CHUNK, CHUNK as usize);
    }
    // Around every boundary of the FP8 formats, both signs.
    for (_, nearest, _) in &oracles[..FP8.len()] {
        for start in &nearest.starts {
            check_f32_chunk(&oracles, start.saturating_sub(3), 7);
            check_f32_chunk(&oracles, 0x8000_0000 | start.saturating_sub(3), 7);
        }
    }
}

/// Checks the wanted ones of all 2^17 chunks of f32, on every core.
fn check_chunks(wanted: impl Fn(u32) -> bool + Sync) {
    let oracles = oracles();
    let next = AtomicU32::new(0);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let chunk = next.fetch_add(1, Ordering::Relaxed);
                    if chunk >= 1 << 17 {
                        break;
                    }
                    if wanted(chunk) {
                        check_f32_chunk(&oracles, chunk * CHUNK, CHUNK as usize);
                    }
                }
            });
        }
    });
}

#[test]
#[ignore = "all 2^32 f32 for every format and instruction set: run with --release"]
fn every_f32_encodes_to_the_nearest_code() {
    check_chunks(|_| true);
}

/// An eighth of them. What rounds to a code of an FP8 format begins and ends at f32s of at most four bits of fraction, which
/// are multiples of 16 chunks: these are the chunks before and after each.
#[test]
#[ignore = "2^29 f32 for every format and instruction set: run with --release"]
fn every_f32_around_a_boundary_encodes_to_the_nearest_code() {
    const APART: u32 = 16;
    for (format, nearest, _) in &oracles()[..FP8.len()] {
        let is_between = |start: &&u32| {
            let apart = **start % (APART * CHUNK);
            apart > 1 && apart < APART * CHUNK - 1
        };
        assert_eq!(nearest.starts.iter().find(is_between), None, "{format}");
    }
    check_chunks(|chunk| matches!(chunk % APART, 0 | 15));
}

/// A cheap deterministic sequence of f32 of all magnitudes, some special.
fn varied(len: usize, mut seed: u64) -> Vec<f32> {
    (0..len)
        .map(|i| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            match i % 97 {
                0 => 0.0,
                1 => -0.0,
                2 => f32::INFINITY,
                3 => f32::NAN,
                4 => f32::from_bits((seed >> 33) as u32),
                _ => ((seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 2f32.powi((seed % 23) as i32 - 11),
            }
        })
        .collect()
}

/// The contract's scale of element `i`, written out.
fn scale_at(row: &ScaleRow<'_>, i: usize) -> f32 {
    match row {
        ScaleRow::One(s) => *s,
        ScaleRow::Each(each) => each[i],
        ScaleRow::EachTimes(each, dynamic) => {
            let product = each[i] * dynamic;
            if product < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { product.min(f32::MAX) }
        }
    }
}

#[test]
fn scales_divide_and_multiply_in_f32() {
    fn check<T: Element>(format: KvFormat, nearest: &Nearest, values: &[f32]) {
        let source: Vec<T> = varied(509, 7).into_iter().map(T::from_f32).collect();
        let each: Vec<f32> = varied(509, 8).into_iter().map(|x| if x.is_normal() { x.abs() } else { 0.7 }).collect();
        let rows = [
            ScaleRow::One(0.013),
            ScaleRow::One(3.0),
            ScaleRow::Each(&each),
            ScaleRow::EachTimes(&each, 0.37),
            ScaleRow::EachTimes(&each, 1e-38),
            ScaleRow::One(0.4).with_dynamic(2.5),
            ScaleRow::Each(&each).with_dynamic(3e38),
        ];
        for (isa, row) in isas().flat_map(|isa| rows.iter().map(move |row| (isa, row))) {
            let mut codes = vec![0; source.len()];
            encode_slice(isa, format, &source, *row, &mut codes);
            let mut back = vec![T::default(); codes.len()];
            decode_slice(isa, format, &codes, *row, &mut back);
            let mut largest = 0.0f64;
            for (i, x) in source.iter().enumerate() {
                let scale = scale_at(row, i);
                let quotient = x.to_f32() / scale;
                let sign = if quotient.is_sign_negative() { 0x80 } else { 0 };
                let expected = match nearest.code(quotient.to_bits() & 0x7fff_ffff) as u8 {
                    _ if quotient.is_nan() => nan_code(format),
                    0 if format == KvFormat::Fp8E4M3Fnuz => 0,
                    code => code | sign,
                };
                assert_eq!(codes[i], expected, "{isa} {format} {x:?} / {scale}");
                let expected = T::from_f32(values[usize::from(expected)] * scale);
                assert!(same(back[i], expected.to_f32()), "{isa} {format} {:#x} * {scale}", codes[i]);
                if !quotient.is_nan() {
                    largest = largest.max(f64::from(quotient.abs()).min(f32::MAX.into()));
                }
            }
            assert_eq!(f64::from(absmax_scaled_slice(isa, &source, *row)), largest, "{isa} {row:?}");
        }
    }
    let golden = Golden::read();
    for (format, name) in FP8 {
        let (nearest, values) = (Nearest::fp8(&golden, name), golden.decode(name));
        check::<f32>(format, &nearest, &values);
        check::<f16>(format, &nearest, &values);
        check::<bf16>(format, &nearest, &values);
    }
}

#[test]
fn unquantized_rows_are_copied_or_converted() {
    let nan = f32::from_bits(0xff81_2345);
    for isa in isas() {
        // Same type: bytes, a signalling NaN's payload included; scales are not read.
        let mut stored = [0; 8];
        encode_slice(isa, KvFormat::F32, &[nan, 1.5], ScaleRow::One(f32::NAN), &mut stored);
        assert_eq!(stored[..4], 0xff81_2345_u32.to_le_bytes());
        let mut back = [0.0f32; 2];
        decode_slice(isa, KvFormat::F32, &stored, ScaleRow::Each(&[]), &mut back);
        assert_eq!((back[0].to_bits(), back[1]), (0xff81_2345, 1.5));
        // Another type: no saturation, widening exact.
        let mut stored = [0; 8];
        encode_slice(isa, KvFormat::F16, &[1e6f32, -0.0, 65519.0, 65520.0], ScaleRow::One(9.0), &mut stored);
        assert_eq!(stored, [0x00, 0x7c, 0x00, 0x80, 0xff, 0x7b, 0x00, 0x7c]);
        let mut wide = [0.0f32; 4];
        decode_slice(isa, KvFormat::F16, &stored, ScaleRow::One(9.0), &mut wide);
        assert_eq!(wide, [f32::INFINITY, 0.0, 65504.0, f32::INFINITY]);
        assert!(wide[1].is_sign_negative());
    }
}

#[test]
fn absmax_ignores_nan_and_bounds_infinity() {
    for isa in isas() {
        assert_eq!(absmax_slice::<f32>(isa, &[]), 0.0);
        assert_eq!(absmax_slice(isa, &[f32::NAN; 33]), 0.0);
        for at in 0..35 {
            let mut row = [bf16::from_f32(-0.5); 35];
            row[at] = bf16::from_f32(-7.25);
            row[(at + 1) % 35] = bf16::NAN;
            assert_eq!(absmax_slice(isa, &row), 7.25, "{isa} {at}");
            row[at] = bf16::NEG_INFINITY;
            assert_eq!(absmax_slice(isa, &row), f32::MAX, "{isa} {at}");
            assert_eq!(absmax_scaled_slice(isa, &[1.0f32, 3e38][..], ScaleRow::One(1e-3)), f32::MAX, "{isa}");
        }
    }
}

/// `float8` 0.7 encodes and decodes E4M3 right, and E5M2 but for the NaN it chooses; both keep a
/// NaN's sign, ours do not.
#[test]
fn float8_agrees_where_it_is_right() {
    for bits in (0..=u32::MAX).step_by(4999) {
        let x = f32::from_bits(bits);
        if x.is_nan() {
            continue;
        }
        assert_eq!(codec::e4m3::encode(x), float8::F8E4M3::from_f32(x).to_bits(), "{x}");
        assert_eq!(codec::e5m2::encode(x), float8::F8E5M2::from_f32(x).to_bits(), "{x}");
    }
    for code in 0..=255 {
        assert!(same(e4m3::decode(code), float8::F8E4M3::from_bits(code).to_f32()), "{code:#x}");
        assert!(same(e5m2::decode(code), float8::F8E5M2::from_bits(code).to_f32()), "{code:#x}");
    }
}
