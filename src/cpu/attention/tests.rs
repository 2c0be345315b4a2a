//! What tests outside cannot reach: the portable kernels on a machine that has better ones, every
//! code of every format, and the error of `exp2`.

use super::kernels::{Decode, Kernels, TILE};
use super::portable::Portable;
use super::simd::{Simd, exp2, tanh};
use crate::codec::{Codec, with_codec};
use crate::format::KvFormat;
use crate::isa::Isa;

fn isas() -> impl Iterator<Item = Isa> {
    // Neon is the portable form, which runs anywhere.
    Isa::ALL.into_iter().filter(|isa| *isa == Isa::Neon || (*isa != Isa::Scalar && isa.is_available()))
}

/// Every code, at every length of row from 1 to 256, decodes to the codec's value.
#[test]
fn all_codes_decode_exactly() {
    for format in KvFormat::ALL {
        with_codec!(format, F => for isa in isas() {
            let kernels = Kernels::of(isa, format);
            let step = if F::BYTES == 1 { 1 } else { 257 };
            for first in (0..if F::BYTES == 1 { 1 } else { 1 << 16 }).step_by(256) {
                for dim in [256, 1, 15, 63, 64, 65, 100] {
                    let codes: Vec<u32> = (0..dim as u32).map(|i| match F::BYTES {
                        1 => (i * step) & 0xff,
                        2 => first + i,
                        _ => (first + i) << 16 | 0x1234,
                    }).collect();
                    let bytes: Vec<u8> =
                        codes.iter().flat_map(|code| code.to_le_bytes()[..F::BYTES].to_vec()).collect();
                    let mut out = vec![f32::NAN; 320];
                    let op = Decode { rows: &[bytes.as_ptr(); TILE], tokens: 1, dim, dst: out.as_mut_ptr(), stride: 320 };
                    // SAFETY: the machine has `isa`; the row holds `dim` elements, `out` whole units.
                    unsafe { (kernels.decode)(&op) };
                    for (i, got) in out[..dim].iter().enumerate() {
                        let want = F::load(&bytes[i * F::BYTES..]);
                        let got = got * kernels.decode_scale;
                        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                        assert!(same, "{format} on {isa}: {:#x} is {got}, not {want}", codes[i]);
                    }
                }
            }
        });
    }
}

/// `f` on vectors of `S`.
fn lanes<S: Simd>(x: &[f32], f: impl Fn(S::V) -> S::V) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for i in (0..x.len()).step_by(S::LANES) {
        // SAFETY: `x` and `out` are whole vectors long; Portable runs anywhere.
        unsafe { S::store(out.as_mut_ptr().add(i), f(S::load(x.as_ptr().add(i)))) };
    }
    out
}

#[test]
fn exp2_and_tanh_keep_their_bounds() {
    let x: Vec<f32> = (0..1 << 20).map(|i| -130.0 + i as f32 * (140.0 / (1 << 20) as f32)).collect();
    // SAFETY: Portable runs anywhere.
    let powers = lanes::<Portable>(&x, |v| unsafe { exp2::<Portable>(v) });
    for (x, got) in x.iter().zip(powers) {
        let want = f64::from(*x).exp2();
        let error = (f64::from(got) / want - 1.0).abs();
        assert!(if *x < -126.0 { got == 0.0 } else { error <= 2f64.powi(-23) }, "2^{x}: {got}, not {want}");
    }
    // SAFETY: as above.
    let tangents = lanes::<Portable>(&x, |v| unsafe { tanh::<Portable>(v) });
    for (x, got) in x.iter().zip(tangents) {
        let want = f64::from(*x).tanh();
        assert!((f64::from(got) - want).abs() <= 2f64.powi(-22), "tanh {x}: {got}, not {want}");
    }
    let special = [f32::NAN, f32::NEG_INFINITY, -1e30, -0.0, 0.0, 1.0, -1.0, f32::NAN];
    // SAFETY: as above.
    let got = lanes::<Portable>(&special, |v| unsafe { exp2::<Portable>(v) });
    assert!(got[0].is_nan() && got[7].is_nan());
    assert_eq!(got[1..7], [0.0, 0.0, 1.0, 1.0, 2.0, 0.5]);
}

/// The kernels over pages, features and splits are the same code for every instruction set; this
/// holds the portable instance to the others, over one batch with everything in it.
#[test]
fn portable_agrees_with_the_specification() {
    use crate::args::{AttentionParams, LayerRef, PagedAttention, RowStrides};
    use crate::cpu::CpuBackend;
    use crate::faults::FaultWord;
    use crate::layout::{CacheLayout, CacheSpec, Half};
    use crate::scale::ScaleRef;

    for layout in CacheLayout::ALL {
        for format in [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz, KvFormat::F16] {
            let spec = CacheSpec::new(2, 48, 16, format).and_then(|spec| spec.with_layout(layout)).unwrap();
            let shape = spec.shape(80).unwrap();
            // Small finite codes of every format: fields of 0x00..0x37, either sign.
            let fill = |half: Half, seed: usize| -> Vec<u8> {
                (0..shape.buffer_bytes(half))
                    .map(|i| ((i * 2654435761 + seed) >> 7) as u8 & 0xb7)
                    .map(|c| if c == 0x80 { 0 } else { c })
                    .collect()
            };
            let (k, v) = (fill(Half::K, 1), fill(Half::V, 2));
            let (heads, tokens) = (6, 5);
            let query: Vec<f32> = (0..tokens * heads * 48).map(|i| ((i * 37) % 23) as f32 / 23.0 - 0.5).collect();
            let tables: Vec<i32> = (0..80).map(|i| (i * 29) % 80).collect();
            let slopes: Vec<f32> = (0..heads).map(|h| 0.01 * h as f32).collect();
            let run = |isa: Isa| {
                let (mut output, mut lse) = (vec![0.0f32; tokens * heads * 48], vec![0.0f32; tokens * heads]);
                let mut workspace = vec![0.0; super::workspace_len(&shape, heads, tokens)];
                let op = PagedAttention::<CpuBackend, f32> {
                    shape,
                    cache: LayerRef { k: &k, v: &v, k_dynamic: None, v_dynamic: None },
                    k_scale: ScaleRef { values: &[0.7], strides: Default::default() },
                    v_scale: ScaleRef { values: &[1.1], strides: Default::default() },
                    params: AttentionParams { soft_cap: Some(15.0), ..AttentionParams::new(0.15) },
                    num_heads: heads,
                    num_tokens: tokens,
                    max_query_len: None,
                    query: &query,
                    query_strides: RowStrides::contiguous(heads, 48),
                    query_starts: &[0, 1, 5],
                    seq_lens: &[633, 70],
                    block_tables: &tables,
                    block_table_stride: 40,
                    alibi_slopes: Some(&slopes),
                    sinks: Some(&slopes),
                    output: &mut output,
                    output_strides: RowStrides::contiguous(heads, 48),
                    lse: Some(&mut lse),
                    workspace: &mut workspace,
                    plan_is_ready: false,
                };
                op.validate().unwrap();
                let faults = FaultWord::default();
                match isa {
                    Isa::Scalar => crate::cpu::scalar::paged_attention(op, &faults),
                    isa => super::run(op, isa, &faults),
                }
                assert!(faults.take().is_empty());
                output.into_iter().chain(lse).collect::<Vec<f32>>()
            };
            // Scores and values are below 4 here: 2^-20 of a value is 4 ulps of f32 a weight, and
            // sums of 633 terms add sqrt(633) more.
            let tolerance = 4.0 * (8.0 + 633f32.sqrt()) * 2f32.powi(-22);
            for (i, (got, want)) in run(Isa::Neon).iter().zip(run(Isa::Scalar)).enumerate() {
                assert!((got - want).abs() <= tolerance, "{format} {layout:?} [{i}]: {got}, not {want}");
            }
        }
    }
}

/// Where AVX2 converts E4M3 ahead of the products, the bits are those of decoding between them, with NaN
/// codes among the rows and without.
#[cfg(target_arch = "x86_64")]
#[test]
fn converting_ahead_equals_decoding_between() {
    use super::kernels::{Ahead, Pv, Qk, Rows, padded_rows};

    if !Isa::Avx2.is_available() {
        return;
    }
    let formats = [
        (Kernels::of(Isa::Avx2, KvFormat::Fp8E4M3), super::avx2::direct::<crate::codec::E4M3>(), 0xffu8),
        (Kernels::of(Isa::Avx2, KvFormat::Fp8E4M3Fnuz), super::avx2::direct::<crate::codec::E4M3Fnuz>(), 0x80),
    ];
    for (kernels, direct, nan) in formats {
        for dim in [16, 40, 64, 80, 128, 512] {
            for (rows, visible) in
                [(1, (0, TILE)), (2, (3, 60)), (3, (7, 7)), (4, (0, 5)), (4, (1, TILE)), (8, (0, TILE))]
            {
                for nans in [0, 1, 3] {
                    let mut codes: Vec<u8> = (0..TILE * dim).map(|i| ((i * 2654435761) >> 9) as u8).collect();
                    codes.iter_mut().filter(|code| **code | 0x80 == nan | 0x80).for_each(|code| *code = 1);
                    for i in 0..nans {
                        codes[(i + 1) * 7919 % (TILE * dim)] = nan;
                    }
                    let tile: Rows = std::array::from_fn(|t| codes[t * dim..].as_ptr());
                    let ahead = Ahead { rows: &tile, bytes: dim };
                    let float = |i: usize| (i * 37 % 61) as f32 / 61.0 - 0.5;
                    let q: Vec<f32> = (0..8 * 512).map(|i| if i % 512 < dim { float(i) } else { 0.0 }).collect();
                    let p: Vec<f32> = (0..8 * TILE).map(float).collect();
                    let run = |kernels: &Kernels| {
                        let (mut scores, mut acc) = (vec![0.0; 8 * TILE], vec![0.25; 8 * 512]);
                        let (q, scores_out) = (q.as_ptr(), scores.as_mut_ptr());
                        let (keys, values) = (&tile, &tile);
                        let qk = Qk { q, q_stride: 512, rows, keys, tokens: TILE, dim, ahead, scores: scores_out };
                        let pv = Pv {
                            p: p.as_ptr(),
                            rows,
                            values,
                            visible: &vec![visible; rows],
                            dim,
                            ahead,
                            alpha: &[0.75; 8],
                            acc: acc.as_mut_ptr(),
                            acc_stride: 512,
                        };
                        // SAFETY: the machine has AVX2; TILE rows of `dim` codes, 8 rows of everything else.
                        unsafe {
                            (kernels.qk)(&qk);
                            (kernels.pv)(&pv);
                        }
                        scores.truncate(rows * TILE);
                        scores.into_iter().chain(acc).map(|x: f32| if x.is_nan() { None } else { Some(x.to_bits()) })
                    };
                    assert!(padded_rows(rows) <= 8);
                    assert!(run(&kernels).eq(run(&direct)), "dim {dim}, {rows} rows, {visible:?}, {nans} NaN");
                }
            }
        }
    }
}
