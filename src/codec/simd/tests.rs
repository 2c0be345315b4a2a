//! Every vector form against the scalar one, bit for bit: the instruction sets of this machine
//! through the public functions, and NEON's file over its twin. `tests/golden_codec.rs` compares
//! with independent implementations.

use super::{neon, rows};
use crate::codec::slice::{absmax_scalar, as_bytes, decode_scalar, encode_scalar};
use crate::codec::{E4M3, E4M3Fnuz, E5M2, PlainBF16, PlainF16, PlainF32, ScaleRow};
use crate::isa::Isa;

/// What runs: an instruction set of this machine, or NEON over its twin.
#[derive(Clone, Copy, Debug)]
enum Form {
    Machine(Isa),
    NeonFile,
}

fn forms() -> Vec<Form> {
    let here = Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar && isa.is_available()).map(Form::Machine);
    here.chain([Form::NeonFile]).collect()
}

fn encode<A: super::Lanes, B: super::Lanes>(form: Form, src: &[u8], scale: ScaleRow<'_>) -> Vec<u8> {
    let mut dst = vec![0xa5; src.len() / A::BYTES * B::BYTES];
    match form {
        // SAFETY: `forms` lists available instruction sets only.
        Form::Machine(isa) => assert!(unsafe { super::encode::<A, B>(isa, src, scale, &mut dst) }),
        Form::NeonFile => rows::encode::<_, A, B>(neon::NEON, src, scale, &mut dst),
    }
    dst
}

fn decode<A: super::Lanes, B: super::Lanes>(form: Form, src: &[u8], scale: ScaleRow<'_>) -> Vec<u8> {
    let mut dst = vec![0xa5; src.len() / A::BYTES * B::BYTES];
    match form {
        // SAFETY: `forms` lists available instruction sets only.
        Form::Machine(isa) => assert!(unsafe { super::decode::<A, B>(isa, src, scale, &mut dst) }),
        Form::NeonFile => rows::decode::<_, A, B>(neon::NEON, src, scale, &mut dst),
    }
    dst
}

fn absmax<A: super::Lanes>(form: Form, src: &[u8], scale: ScaleRow<'_>) -> f32 {
    match form {
        // SAFETY: `forms` lists available instruction sets only.
        Form::Machine(isa) => unsafe { super::absmax::<A>(isa, src, scale) }.unwrap(),
        Form::NeonFile => rows::absmax::<_, A>(neon::NEON, src, scale),
    }
}

/// Every exponent and sign with mantissas that round every way, and a spread of others.
fn f32_patterns() -> Vec<u8> {
    let mut patterns = Vec::new();
    for top in 0..=0xffff_u32 {
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, top.wrapping_mul(0x9e37) & 0xffff] {
            patterns.extend((top << 16 | low).to_le_bytes());
        }
    }
    patterns
}

/// Every 16-bit pattern.
fn half_patterns() -> Vec<u8> {
    (0..=u16::MAX).flat_map(u16::to_le_bytes).collect()
}

/// Positive scales with all sorts of mantissas, some extreme.
fn scales(len: usize) -> Vec<f32> {
    let odd = |i: usize| f32::from_bits(0x3f00_0000 ^ ((i as u32).wrapping_mul(0x9e37_79b9) >> 7));
    (0..len)
        .map(|i| match i % 61 {
            0 => f32::MIN_POSITIVE,
            1 => 1e-42,
            2 => f32::MAX,
            _ => odd(i),
        })
        .collect()
}

fn first_difference(got: &[u8], expected: &[u8]) -> Option<usize> {
    (0..expected.len()).find(|&i| got.get(i) != expected.get(i))
}

fn check_encode<A: super::Lanes, B: super::Lanes>(src: &[u8]) {
    let each = scales(src.len() / A::BYTES);
    let rows = [
        ScaleRow::One(1.0),
        ScaleRow::One(0.037),
        ScaleRow::One(3e38),
        ScaleRow::Each(&each),
        ScaleRow::EachTimes(&each, 0.01),
        ScaleRow::EachTimes(&each, 1e-38),
    ];
    for scale in rows {
        let mut expected = vec![0; each.len() * B::BYTES];
        encode_scalar::<A, B>(src, scale, &mut expected);
        for form in forms() {
            let got = encode::<A, B>(form, src, scale);
            let at = first_difference(&got, &expected);
            assert_eq!(at, None, "{form:?} {:?} -> {:?}", A::FORMAT, B::FORMAT);
        }
    }
}

fn check_decode<A: super::Lanes, B: super::Lanes>(src: &[u8]) {
    let each = scales(src.len() / A::BYTES);
    for scale in [ScaleRow::One(0.037), ScaleRow::One(1e35), ScaleRow::Each(&each), ScaleRow::EachTimes(&each, 7e4)] {
        let mut expected = vec![0; each.len() * B::BYTES];
        decode_scalar::<A, B>(src, scale, &mut expected);
        for form in forms() {
            let got = decode::<A, B>(form, src, scale);
            let at = first_difference(&got, &expected);
            assert_eq!(at, None, "{form:?} {:?} -> {:?}", A::FORMAT, B::FORMAT);
        }
    }
}

#[test]
fn encode_is_bit_identical() {
    fn every_format<A: super::Lanes>(src: &[u8]) {
        check_encode::<A, E4M3>(src);
        check_encode::<A, E5M2>(src);
        check_encode::<A, E4M3Fnuz>(src);
        check_encode::<A, PlainF32>(src);
        check_encode::<A, PlainF16>(src);
        check_encode::<A, PlainBF16>(src);
    }
    every_format::<PlainF32>(&f32_patterns());
    every_format::<PlainF16>(&half_patterns());
    every_format::<PlainBF16>(&half_patterns());
}

#[test]
fn absmax_is_bit_identical() {
    fn rows_of<A: super::Lanes>(src: &[u8]) {
        let each = scales(37);
        for row in src.chunks(37 * A::BYTES) {
            for scale in
                [ScaleRow::One(1.0), ScaleRow::One(0.3), ScaleRow::Each(&each), ScaleRow::EachTimes(&each, 2.5)]
            {
                let expected = absmax_scalar::<A>(row, scale);
                for form in forms() {
                    assert_eq!(absmax::<A>(form, row, scale).to_bits(), expected.to_bits(), "{form:?} {:?}", A::FORMAT);
                }
            }
        }
    }
    rows_of::<PlainF32>(&f32_patterns());
    rows_of::<PlainF16>(&half_patterns());
    rows_of::<PlainBF16>(&half_patterns());
}

#[test]
fn decode_is_bit_identical() {
    fn every_type<A: super::Lanes>(src: &[u8]) {
        check_decode::<A, PlainF32>(src);
        check_decode::<A, PlainF16>(src);
        check_decode::<A, PlainBF16>(src);
    }
    // Eight times, for different scales.
    let codes: Vec<u8> = (0..2048).map(|i| i as u8).collect();
    every_type::<E4M3>(&codes);
    every_type::<E5M2>(&codes);
    every_type::<E4M3Fnuz>(&codes);
    every_type::<PlainF32>(&f32_patterns());
    every_type::<PlainF16>(&half_patterns());
    every_type::<PlainBF16>(&half_patterns());
}

#[test]
fn every_length_and_offset() {
    let values: Vec<f32> = (0..200).map(|i| (i as f32 - 77.3) * 1.7).collect();
    let each = scales(values.len());
    for form in forms() {
        for len in 0..70 {
            for offset in [0, 1, 3] {
                let src = as_bytes(&values[offset..offset + len]);
                let scale = ScaleRow::Each(&each[offset..]);
                let mut codes = vec![0; len];
                encode_scalar::<PlainF32, E4M3>(src, scale, &mut codes);
                assert_eq!(encode::<PlainF32, E4M3>(form, src, scale), codes, "{form:?} {len} {offset}");
                let mut back = vec![0; len * 2];
                decode_scalar::<E4M3, PlainBF16>(&codes, scale, &mut back);
                assert_eq!(decode::<E4M3, PlainBF16>(form, &codes, scale), back, "{form:?} {len} {offset}");
                let expected = absmax_scalar::<PlainF32>(src, scale);
                assert_eq!(absmax::<PlainF32>(form, src, scale), expected, "{form:?} {len} {offset}");
            }
        }
    }
}
