//! `cache_write` against the oracle, byte for byte, on every instruction set.

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use devices::devices;
use oracle::formats::{bytes_of, same_stored};
use oracle::geometry::{Geometry, Layer, Scales};
use oracle::rows::{self, CacheWriteCase, Rows};
use oracle::run;
use oracle::strategy::{self, Padding, Rng, ScaleKind};
use proptest::prelude::*;
use quantkv::layout::Half;
use quantkv::{Backend, CacheLayout, DType, Faults, KvFormat};

/// Runs a case and compares every byte: written slots, skipped slots, gaps and tail.
fn check<B: Backend>(backend: &B, case: &CacheWriteCase) -> Result<(), String> {
    let (expected, expected_faults) = rows::cache_write(case);
    let (got, faults) = run::cache_write(backend, case).map_err(|error| error.to_string())?;
    if faults != expected_faults {
        return Err(format!("faults are {faults}, not {expected_faults}"));
    }
    compare(&case.geometry, &expected, &got)
}

fn compare(geometry: &Geometry, expected: &Layer, got: &Layer) -> Result<(), String> {
    for half in [Half::K, Half::V] {
        let format = geometry.format(half);
        let (expected_bytes, got_bytes) = (expected.bytes(half), got.bytes(half));
        let size = bytes_of(format);
        for (at, (a, b)) in expected_bytes.chunks(size).zip(got_bytes.chunks(size)).enumerate() {
            if a != b && !(a.len() == size && same_stored(format, a, b)) {
                return Err(format!("{half:?} element {at}: {b:02x?} is not {a:02x?}"));
            }
        }
        let bits = |layer: &Layer| layer.dynamic(half).as_ref().map(|all| all.iter().map(|x| x.to_bits()).collect());
        let (a, b): (Option<Vec<u32>>, Option<Vec<u32>>) = (bits(expected), bits(got));
        if a != b {
            return Err(format!(
                "{half:?} dynamic scales: {:?} are not {:?}",
                got.dynamic(half),
                expected.dynamic(half)
            ));
        }
    }
    Ok(())
}

fn check_all(case: &CacheWriteCase) {
    for device in devices() {
        if let Err(text) = on_device!(&device, |backend| check(backend, case)) {
            panic!("{}: {text}", device);
        }
    }
}

/// What of a case is random; the numbers follow from the seed.
#[derive(Clone, Debug)]
struct Parameters {
    geometry: Geometry,
    dtype: DType,
    tokens: usize,
    /// Rows of key and value beyond the slot mapping.
    extra_tokens: usize,
    padding: (Padding, Padding),
    scales: (ScaleKind, ScaleKind),
    percent_skipped: u64,
    percent_outside: u64,
    seed: u64,
}

fn parameters() -> impl Strategy<Value = Parameters> {
    let scales = (strategy::scale_kind(), strategy::scale_kind());
    let padding = (strategy::padding(), strategy::padding());
    let skips = (prop_oneof![Just(0u64), Just(30), Just(100)], prop_oneof![3 => Just(0u64), 1 => Just(25)]);
    (strategy::geometry(), strategy::dtype(), 0usize..40, 0usize..3, padding, scales, skips, any::<u64>()).prop_map(
        |(geometry, dtype, tokens, extra_tokens, padding, scales, (percent_skipped, percent_outside), seed)| {
            Parameters {
                geometry,
                dtype,
                tokens: tokens.min(geometry.num_slots()),
                extra_tokens,
                padding,
                scales,
                percent_skipped,
                percent_outside,
                seed,
            }
        },
    )
}

fn build(parameters: &Parameters) -> CacheWriteCase {
    let Parameters { geometry, dtype, tokens, extra_tokens, padding, scales, .. } = *parameters;
    let mut rng = Rng::new(parameters.seed);
    let before = strategy::any_layer(&geometry, &mut rng);
    let mut slots: Vec<i64> = (0..geometry.num_slots() as i64).collect();
    for i in (1..slots.len()).rev() {
        slots.swap(i, rng.below(i + 1));
    }
    slots.truncate(tokens);
    const OUTSIDE: [i64; 4] = [0, 1, 1 << 31, i64::MAX];
    for slot in &mut slots {
        if rng.chance(parameters.percent_skipped) {
            *slot = if rng.chance(80) { -1 } else { i64::MIN + rng.below(9) as i64 };
        } else if rng.chance(parameters.percent_outside) {
            *slot = OUTSIDE[rng.below(4)].saturating_add(geometry.num_slots() as i64);
        }
    }
    let mut tensor = |half, padding| {
        strategy::rows((tokens + extra_tokens, geometry.heads, geometry.dim(half)), padding, dtype, || {
            rng.any_activation()
        })
    };
    let (key, value) = (tensor(Half::K, padding.0), tensor(Half::V, padding.1));
    let mut scale = |kind, half| strategy::scales(kind, geometry.heads, geometry.dim(half), || rng.any_scale());
    let (k_scale, v_scale) = (scale(scales.0, Half::K), scale(scales.1, Half::V));
    CacheWriteCase { geometry, before, dtype, key, value, slot_mapping: slots, k_scale, v_scale }
}

proptest! {
    #![proptest_config(strategy::config(192))]

    #[test]
    fn any_shape_is_written_exactly(parameters in parameters()) {
        let case = build(&parameters);
        for device in devices() {
            prop_assert_eq!(on_device!(&device, |backend| check(backend, &case)), Ok(()), "on {}", device);
        }
    }
}

/// A case over `[T, 3, H, D]`-like fused rows: the token stride is `3 H D`, as after a QKV
/// projection.
fn fused_qkv(geometry: Geometry, dtype: DType, slots: Vec<i64>, k_scale: f32, v_scale: f32) -> CacheWriteCase {
    let mut rng = Rng::new(geometry.heads as u64 * 1000 + geometry.k_dim as u64);
    let row = geometry.heads * geometry.k_dim;
    let mut tensor =
        || strategy::rows((slots.len(), geometry.heads, geometry.k_dim), (0, 2 * row, 0), dtype, || rng.normal());
    let (key, value) = (tensor(), tensor());
    let before = strategy::any_layer(&geometry, &mut Rng::new(7));
    let (k_scale, v_scale) = (Scales::tensor(k_scale), Scales::tensor(v_scale));
    CacheWriteCase { geometry, before, dtype, key, value, slot_mapping: slots, k_scale, v_scale }
}

/// `count` distinct slots out of `total`.
fn some_slots(count: usize, total: usize) -> Vec<i64> {
    let mut rng = Rng::new(total as u64);
    let mut slots: Vec<i64> = (0..total as i64).collect();
    for i in (1..total).rev() {
        slots.swap(i, rng.below(i + 1));
    }
    slots.truncate(count);
    slots
}

/// vLLM's `test_reshape_and_cache`: 42 tokens, 8 heads, D 64, 80, 256, blocks of 8, 16, 32.
#[test]
fn vllm_reshape_and_cache() {
    for (dim, block_size) in [(64, 8), (80, 16), (256, 32), (64, 16)] {
        for format in KvFormat::ALL {
            for (layout, dtype) in [
                (CacheLayout::VllmPacked, DType::BF16),
                (CacheLayout::Nhd, DType::BF16),
                (CacheLayout::Hnd, DType::F32),
            ] {
                let geometry = Geometry::plain(layout, (8, dim), (block_size, 24), format);
                let slots = some_slots(42, geometry.num_slots());
                check_all(&fused_qkv(geometry, dtype, slots, 3.1 / 64.0, 2.9 / 64.0));
            }
        }
    }
}

/// 13 heads of 46 channels: no row starts on a vector boundary (vLLM #41257).
#[test]
fn unaligned_rows() {
    for format in KvFormat::ALL {
        for layout in [CacheLayout::Hnd, CacheLayout::Nhd] {
            let geometry = Geometry::plain(layout, (13, 46), (16, 8), format);
            check_all(&fused_qkv(geometry, DType::BF16, some_slots(42, 128), 0.04, 0.05));
        }
    }
}

/// More 16-byte chunks in a token than a thread block has threads: H * D / x > 512. Kernels that
/// launch one thread a chunk without a loop truncate here.
#[test]
fn more_than_512_chunks_a_token() {
    for (heads, dim) in [(40, 256), (128, 128), (33, 512)] {
        let geometry = Geometry::plain(CacheLayout::VllmPacked, (heads, dim), (8, 2), KvFormat::Fp8E4M3);
        assert!(heads * dim / 16 > 512);
        check_all(&fused_qkv(geometry, DType::BF16, vec![3, 15], 0.05, 0.05));
    }
}

/// Slots [0, -1, 1, -1]: skipped tokens touch nothing.
#[test]
fn padded_tokens_are_skipped() {
    for layout in CacheLayout::ALL {
        let geometry = Geometry::plain(layout, (2, 64), (8, 2), KvFormat::Fp8E4M3);
        check_all(&fused_qkv(geometry, DType::F32, vec![0, -1, 1, -1], 1.0, 1.0));
        check_all(&fused_qkv(geometry, DType::F32, vec![-1, -1], 1.0, 1.0));
        check_all(&fused_qkv(geometry, DType::F32, vec![], 1.0, 1.0));
    }
}

/// Whole vectors of every type, under one scale, one a channel, and dynamic ones: a kernel each on some devices.
#[test]
fn vectors_of_every_type_under_every_kind_of_scale() {
    let mut rng = Rng::new(23);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (kind, dynamic) in [(ScaleKind::Tensor, false), (ScaleKind::Channel, false), (ScaleKind::Tensor, true)] {
            for format in KvFormat::ALL {
                let mut geometry = Geometry::plain(CacheLayout::Hnd, (2, 64), (8, 2), format);
                geometry.dynamic = dynamic;
                if dynamic && !geometry.has_dynamic(Half::K) {
                    continue;
                }
                let before = strategy::any_layer(&geometry, &mut rng);
                let mut tensor = || strategy::rows((7, 2, 64), (0, 0, 0), dtype, || rng.any_activation());
                let (key, value) = (tensor(), tensor());
                let mut scale = || strategy::scales(kind, 2, 64, || rng.any_scale());
                let (k_scale, v_scale) = (scale(), scale());
                let slot_mapping = some_slots(7, geometry.num_slots());
                check_all(&CacheWriteCase { geometry, before, dtype, key, value, slot_mapping, k_scale, v_scale });
            }
        }
    }
}

/// Tokens of prompts, whose slots are side by side, eight of which CUDA stores at once in the packed layout: from the
/// beginning of a block and from inside one, of one block and of two, with padding, a slot outside the cache or out of order
/// between them, and the last few. So many that the kernel for few tokens is not taken.
#[test]
fn runs_of_slots() {
    let mut rng = Rng::new(31);
    for (block_size, dim) in [(8, 48), (16, 128), (64, 80)] {
        let run = |block: usize, offset: usize, count: usize| {
            (0..count).map(move |i| (block * block_size + offset + i) as i64).collect::<Vec<_>>()
        };
        let mut groups = [
            run(0, 0, 8),
            run(2, 0, 8),
            [run(1, 3, 5), run(3, 0, 3)].concat(),
            [run(4, 0, 4), run(5, 4, 4)].concat(),
            run(6, 0, 8),
            run(7, 0, 8),
            run(8, 0, 8),
            run(9, if block_size > 8 { 3 } else { 0 }, 8),
            [run(3, 3, 5), run(5, 0, 3)].concat(),
            run(10, 0, 5),
        ];
        groups[4][5] = -1;
        groups[5].swap(2, 3);
        groups[6][7] = (11 * block_size) as i64;
        let slots = groups.concat();
        for format in KvFormat::ALL {
            let kinds =
                [(DType::BF16, ScaleKind::Tensor), (DType::F16, ScaleKind::Channel), (DType::F32, ScaleKind::Head)];
            for (dtype, kind) in kinds {
                let geometry = Geometry::plain(CacheLayout::VllmPacked, (2, dim), (block_size, 11), format);
                let before = strategy::any_layer(&geometry, &mut rng);
                let mut tensor = || strategy::rows((slots.len(), 2, dim), (0, 0, 0), dtype, || rng.any_activation());
                let (key, value) = (tensor(), tensor());
                let mut scale = || strategy::scales(kind, 2, dim, || rng.any_scale());
                let (k_scale, v_scale) = (scale(), scale());
                let slot_mapping = slots.clone();
                check_all(&CacheWriteCase { geometry, before, dtype, key, value, slot_mapping, k_scale, v_scale });
            }
        }
    }
}

/// Every f16 and every bf16 pattern through the cache, against torch's own table.
#[test]
fn every_16_bit_pattern() {
    for (dtype, name) in [(DType::F16, "f16"), (DType::BF16, "bf16")] {
        for (format, table) in
            [(KvFormat::Fp8E4M3, "e4m3fn"), (KvFormat::Fp8E5M2, "e5m2"), (KvFormat::Fp8E4M3Fnuz, "e4m3fnuz")]
        {
            let golden = oracle::formats::fixture(&format!("enc_sat.{name}.{table}"));
            // 2^16 values as 64 tokens of 2 heads of 512.
            let geometry = Geometry::plain(CacheLayout::Hnd, (2, 512), (64, 1), format);
            let all: Vec<f32> = (0..=u16::MAX)
                .map(|bits| match dtype {
                    DType::F16 => half::f16::from_bits(bits).to_f32(),
                    _ => half::bf16::from_bits(bits).to_f32(),
                })
                .collect();
            let input = Rows { data: all.clone(), strides: quantkv::args::RowStrides::contiguous(2, 512) };
            let case = CacheWriteCase {
                geometry,
                before: Layer::poisoned(&geometry),
                dtype,
                key: input.clone(),
                value: input,
                slot_mapping: (0..64).collect(),
                k_scale: Scales::tensor(1.0),
                v_scale: Scales::tensor(1.0),
            };
            for device in devices() {
                let (layer, faults) = on_device!(&device, |backend| run::cache_write(backend, &case)).unwrap();
                assert_eq!(faults, Faults::NONE);
                for (i, &x) in all.iter().enumerate() {
                    let (token, head, d) = (i / 1024, i / 512 % 2, i % 512);
                    let got = layer.k[geometry.element(Half::K, 0, head, token, d)][0];
                    let want = if x.is_nan() { oracle::formats::nan_code(format) } else { golden[i] };
                    assert_eq!(got, want, "{table} of {name} {i:#06x} = {x} on {}", device);
                }
                assert_eq!(layer.k, layer.v, "{}", device);
            }
        }
    }
}

/// `x / s`, not `x * (1 / s)`: scales and values for which the two give different codes.
#[test]
fn scales_divide() {
    let mut rng = Rng::new(11);
    let mut found = Vec::new();
    while found.len() < 64 {
        // x / s lies next to a tie between two codes: there a last-bit error shows.
        let (tie, s) = (1.0 + (2 * rng.below(8) + 1) as f32 / 16.0, 1.0 + rng.unit().abs());
        let x = f32::from_bits((tie * s).to_bits() - 1 + rng.below(3) as u32);
        let divided = oracle::formats::encode_fp8(KvFormat::Fp8E4M3, x / s);
        if oracle::formats::encode_fp8(KvFormat::Fp8E4M3, x * (1.0 / s)) != divided {
            found.push((x, s));
        }
    }
    for layout in CacheLayout::ALL {
        let mut geometry = Geometry::plain(layout, (1, 64), (8, 1), KvFormat::Fp8E4M3);
        geometry.tail = 3;
        let row: Vec<f32> = found.iter().map(|pair| pair.0).collect();
        let scale = Scales { values: found.iter().map(|pair| pair.1).collect(), head: 64, channel: 1 };
        let input = Rows { data: row, strides: quantkv::args::RowStrides::contiguous(1, 64) };
        check_all(&CacheWriteCase {
            geometry,
            before: Layer::poisoned(&geometry),
            dtype: DType::F32,
            key: input.clone(),
            value: input,
            slot_mapping: vec![5],
            k_scale: scale.clone(),
            v_scale: scale,
        });
    }
}

/// Dynamic scales of rows that could break them: all zero, all NaN, an infinity, subnormals, the
/// largest f32, under scales at both ends of f32. No row without NaN gets a NaN code.
#[test]
fn dynamic_scales_of_odd_rows() {
    let odd: [[f32; 4]; 8] = [
        [0.0, -0.0, 0.0, 0.0],
        [f32::NAN; 4],
        [1.0, f32::NAN, -2.0, 0.5],
        [f32::INFINITY, 1.0, -1.0, 0.0],
        [1e-45, -1e-45, 0.0, 1e-44],
        [f32::MAX, -f32::MAX, 1.0, 0.0],
        [f32::MIN_POSITIVE, 0.0, 0.0, -f32::MIN_POSITIVE],
        [3.0, -448.0, 1e-6, 447.9],
    ];
    for format in [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz] {
        for scale in [1.0, 1e-9, 1e30, f32::MIN_POSITIVE, f32::MAX, 1e-45] {
            let mut geometry = Geometry::plain(CacheLayout::Hnd, (1, 4), (8, 1), format);
            geometry.dynamic = true;
            let data: Vec<f32> = odd.iter().flatten().copied().collect();
            let input = Rows { data: data.clone(), strides: quantkv::args::RowStrides::contiguous(1, 4) };
            let case = CacheWriteCase {
                geometry,
                before: Layer::poisoned(&geometry),
                dtype: DType::F32,
                key: input.clone(),
                value: input,
                slot_mapping: (0..8).collect(),
                k_scale: Scales::tensor(scale),
                v_scale: Scales::tensor(scale),
            };
            check_all(&case);
            let (layer, _) = rows::cache_write(&case);
            for (i, x) in data.iter().enumerate() {
                let dynamic = layer.dynamic_scale(&geometry, Half::K, (0, 0, i / 4));
                assert!(dynamic.is_finite() && dynamic > 0.0, "dynamic scale {dynamic} of row {}", i / 4);
                let code = layer.load(&geometry, Half::K, (0, 0, i / 4, i % 4));
                assert_eq!(code.is_nan(), x.is_nan(), "{format} code of {x} with static scale {scale}");
            }
        }
    }
}

/// Many tokens on one slot: on the CPU the last one wins. A GPU may keep any, of each element another:
/// rows are written by many threads. Nothing else is written.
#[test]
fn of_tokens_on_one_slot_one_wins() {
    const SLOTS: [i64; 5] = [5, 17, 5, 63, 17];
    for layout in CacheLayout::ALL {
        let geometry = Geometry::plain(layout, (3, 32), (16, 4), KvFormat::Fp8E5M2);
        let slots: Vec<i64> = (0..200).map(|token| SLOTS[token % 5]).collect();
        let case = fused_qkv(geometry, DType::F16, slots.clone(), 0.5, 0.25);
        // What each token alone would leave.
        let alone: Vec<Layer> = (0..slots.len())
            .map(|token| {
                let only = |at| if at == token { slots[at] } else { -1 };
                rows::cache_write(&CacheWriteCase { slot_mapping: (0..200).map(only).collect(), ..case.clone() }).0
            })
            .collect();
        for device in devices() {
            if device.is_cpu() {
                assert_eq!(on_device!(&device, |backend| check(backend, &case)), Ok(()), "{layout:?} on {device}");
                continue;
            }
            let (mut got, _) = on_device!(&device, |backend| run::cache_write(backend, &case)).unwrap();
            for (slot, half, head) in [5i64, 17, 63].into_iter().flat_map(|slot| {
                [Half::K, Half::V].into_iter().flat_map(move |half| (0..3).map(move |head| (slot, half, head)))
            }) {
                for d in 0..32 {
                    let at = geometry.element(half, slot as usize / 16, head, slot as usize % 16, d);
                    let mut candidates = alone.iter().zip(&slots).filter(|(_, other)| **other == slot);
                    assert!(
                        candidates.any(|(layer, _)| layer.bytes(half)[at.clone()] == got.bytes(half)[at.clone()]),
                        "{layout:?} {half:?} slot {slot} head {head} channel {d}"
                    );
                    // Back to what it was: the rest must be untouched.
                    let before = case.before.bytes(half)[at.clone()].to_vec();
                    got.bytes_mut(half)[at].copy_from_slice(&before);
                }
            }
            assert_eq!(compare(&geometry, &case.before, &got), Ok(()), "{layout:?} on {device}");
        }
    }
}

/// Enough bytes that the work is shared among threads: slots in random order, some out of range,
/// some twice, in every layout, exact for any number of threads.
#[test]
fn large_writes_on_any_number_of_threads() {
    const TOKENS: usize = 1100; // more than CUDA's kernel of packed rows has loads ahead for
    for layout in CacheLayout::ALL {
        for (format, dynamic) in [(KvFormat::Fp8E4M3, true), (KvFormat::Fp8E5M2, false), (KvFormat::BF16, false)] {
            let mut geometry = Geometry::plain(layout, (5, 128), (16, 80), format);
            (geometry.dynamic, geometry.k_gap, geometry.tail) = (dynamic, 24, 64);
            let mut slots = some_slots(TOKENS, geometry.num_slots());
            (slots[3], slots[500], slots[700], slots[TOKENS - 1]) = (-1, 1 << 40, slots[2], slots[1]);
            let case = fused_qkv(geometry, DType::BF16, slots, 0.05, 0.03);
            for device in devices() {
                let case = if device.is_cpu() { case.clone() } else { case.without_repeated_slots() };
                let (expected, expected_faults) = rows::cache_write(&case);
                device.in_pools(|threads| {
                    let (got, faults) = on_device!(&device, |backend| run::cache_write(backend, &case)).unwrap();
                    let same = compare(&geometry, &expected, &got);
                    assert_eq!(same, Ok(()), "{layout:?} {format} on {} with {threads} threads", device);
                    assert_eq!(faults, expected_faults);
                });
            }
        }
    }
}
