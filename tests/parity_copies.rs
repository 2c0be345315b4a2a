//! What moves blocks without looking inside them, and what gathers them into dense rows:
//! `copy_blocks`, `swap_out`, `swap_in`, `gather`, `gather_bytes`. All byte for byte.

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use devices::devices;
use oracle::formats::same_value;
use oracle::geometry::{Geometry, Layer};
use oracle::rows::{self, GatherCase, Rows};
use oracle::run::{self, same_layer};
use oracle::strategy::{self, Padding, Rng, ScaleKind};
use proptest::prelude::*;
use quantkv::args::BlockPair;
use quantkv::layout::Half;
use quantkv::{Backend, CacheLayout, DType, Faults, KvFormat};

/// Disjoint pairs inside one pool of `blocks`.
fn copy_pairs(blocks: usize, rng: &mut Rng) -> Vec<BlockPair> {
    let mut ids: Vec<u32> = (0..blocks as u32).collect();
    for i in (1..ids.len()).rev() {
        ids.swap(i, rng.below(i + 1));
    }
    // A source may be read often; a destination is written once and never read.
    let (sources, targets) = ids.split_at((blocks / 2).max(1));
    let wanted = rng.below(targets.len() + 1);
    targets[..wanted].iter().map(|&dst| BlockPair::new(sources[rng.below(sources.len())], dst)).collect()
}

/// Pairs between two pools: targets distinct, sources any.
fn swap_pairs(src_blocks: usize, dst_blocks: usize, rng: &mut Rng) -> Vec<BlockPair> {
    let mut targets: Vec<u32> = (0..dst_blocks as u32).collect();
    for i in (1..targets.len()).rev() {
        targets.swap(i, rng.below(i + 1));
    }
    targets.truncate(rng.below(dst_blocks + 1));
    targets.into_iter().map(|dst| BlockPair::new(rng.below(src_blocks) as u32, dst)).collect()
}

fn layers(geometry: &Geometry, count: usize, rng: &mut Rng) -> Vec<Layer> {
    (0..count).map(|_| strategy::any_layer(geometry, rng)).collect()
}

fn check_copy<B: Backend>(backend: &B, geometry: &Geometry, layers: &[Layer], pairs: &[BlockPair]) {
    let got = run::copy_blocks(backend, geometry, layers, pairs).unwrap();
    for (layer, got) in layers.iter().zip(&got) {
        let mut expected = layer.clone();
        rows::copy_blocks((geometry, layer), (geometry, &mut expected), pairs);
        assert!(same_layer(&expected, got), "copy_blocks {pairs:?} on {}", backend.name());
    }
}

fn check_swap<B: Backend>(
    backend: &B,
    (src_geometry, src): (&Geometry, &[Layer]),
    (dst_geometry, dst): (&Geometry, &[Layer]),
    pairs: &[BlockPair],
) {
    let expected: Vec<Layer> = src
        .iter()
        .zip(dst)
        .map(|(src, dst)| {
            let mut expected = dst.clone();
            rows::copy_blocks((src_geometry, src), (dst_geometry, &mut expected), pairs);
            expected
        })
        .collect();
    let out = run::swap_out(backend, (src_geometry, src), (dst_geometry, dst), pairs).unwrap();
    let back = run::swap_in(backend, (src_geometry, src), (dst_geometry, dst), pairs).unwrap();
    for (expected, (out, back)) in expected.iter().zip(out.iter().zip(&back)) {
        assert!(same_layer(expected, out), "swap_out {pairs:?} on {}", backend.name());
        assert!(same_layer(expected, back), "swap_in {pairs:?} on {}", backend.name());
    }
}

#[derive(Clone, Debug)]
struct GatherParameters {
    geometry: Geometry,
    dtype: DType,
    /// (first position, rows) of each sequence.
    sequences: Vec<(usize, usize)>,
    with_starts: bool,
    /// Rows of output after the last sequence's.
    spare_rows: usize,
    table_spare: usize,
    percent_bad_blocks: u64,
    padding: (Padding, Padding),
    scales: (ScaleKind, ScaleKind),
    seed: u64,
}

fn gather_parameters() -> impl Strategy<Value = GatherParameters> {
    let sequence =
        (prop_oneof![Just(0usize), 0usize..40], prop_oneof![1 => Just(0usize), 4 => 0usize..30, 2 => 60usize..70]);
    let tables = (0usize..3, prop_oneof![2 => Just(0u64), 1 => Just(20)]);
    let padding = (strategy::padding(), strategy::padding());
    let scales = (strategy::scale_kind(), strategy::scale_kind());
    let sequences = prop::collection::vec(sequence, 0..4);
    (
        strategy::geometry(),
        strategy::dtype(),
        sequences,
        any::<bool>(),
        0usize..3,
        tables,
        padding,
        scales,
        any::<u64>(),
    )
        .prop_map(
            |(
                geometry,
                dtype,
                sequences,
                with_starts,
                spare_rows,
                (table_spare, percent_bad_blocks),
                padding,
                scales,
                seed,
            )| {
                GatherParameters {
                    geometry,
                    dtype,
                    sequences,
                    with_starts,
                    spare_rows,
                    table_spare,
                    percent_bad_blocks,
                    padding,
                    scales,
                    seed,
                }
            },
        )
}

fn build_gather(parameters: &GatherParameters) -> GatherCase {
    let GatherParameters { geometry, dtype, padding, scales, with_starts, .. } = *parameters;
    let mut rng = Rng::new(parameters.seed);
    let start = |sequence: &(usize, usize)| if with_starts { sequence.0 } else { 0 };
    let longest = parameters.sequences.iter().map(|sequence| start(sequence) + sequence.1).max().unwrap_or(0);
    let table_stride = longest.div_ceil(geometry.block_size) + parameters.table_spare;
    let tables = (0..parameters.sequences.len() * table_stride)
        .map(|_| match rng.chance(parameters.percent_bad_blocks) {
            true => [-1, i32::MIN, geometry.num_blocks as i32, i32::MAX][rng.below(4)],
            // Repeats are likely: blocks are few.
            false => rng.below(geometry.num_blocks) as i32,
        })
        .collect();
    let mut cu_seq_lens = vec![0i32];
    for sequence in &parameters.sequences {
        cu_seq_lens.push(cu_seq_lens.last().unwrap() + sequence.1 as i32);
    }
    let num_tokens = *cu_seq_lens.last().unwrap() as usize + parameters.spare_rows;
    let layer = strategy::any_layer(&geometry, &mut rng);
    let mut scale = |kind, half| strategy::scales(kind, geometry.heads, geometry.dim(half), || rng.any_scale());
    let (k_scale, v_scale) = (scale(scales.0, Half::K), scale(scales.1, Half::V));
    let tensor =
        |half, padding| strategy::rows((num_tokens, geometry.heads, geometry.dim(half)), padding, dtype, || 1234.0);
    GatherCase {
        geometry,
        layer,
        dtype,
        k_scale,
        v_scale,
        tables,
        table_stride,
        cu_seq_lens,
        starts: with_starts.then(|| parameters.sequences.iter().map(|sequence| sequence.0 as i32).collect()),
        num_tokens,
        key: tensor(Half::K, padding.0),
        value: tensor(Half::V, padding.1),
    }
}

fn check_gather<B: Backend>(backend: &B, case: &GatherCase) -> Result<(), String> {
    let (key, value) = rows::gather(case);
    let (got_key, got_value, faults) = run::gather(backend, case).map_err(|error| error.to_string())?;
    rows::check_gather_faults(case, faults)?;
    for (what, expected, got) in [("key", &key, &got_key), ("value", &value, &got_value)] {
        if let Some(at) = (0..expected.data.len()).find(|&i| !same_value(expected.data[i], got.data[i])) {
            return Err(format!("{what}[{at}] is {:e}, not {:e}", got.data[at], expected.data[at]));
        }
    }
    let expected = rows::gather_bytes(case, 0xa5, 7);
    let (got, faults) = run::gather_bytes(backend, case, 0xa5, 7).map_err(|error| error.to_string())?;
    rows::check_gather_faults(case, faults)?;
    for (what, expected, got) in [("key", &expected[0], &got[0]), ("value", &expected[1], &got[1])] {
        if let Some(at) = (0..expected.len()).find(|&i| expected[i] != got[i]) {
            return Err(format!("{what} byte {at} is {:#04x}, not {:#04x}", got[at], expected[at]));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(strategy::config(96))]

    #[test]
    fn blocks_are_copied_whole(
        geometry in strategy::geometry(), blocks in 1usize..20, count in 0usize..4, seed in any::<u64>(),
    ) {
        let mut rng = Rng::new(seed);
        let geometry = Geometry { num_blocks: blocks.min(geometry.num_blocks * 3), ..geometry };
        let layers = layers(&geometry, count, &mut rng);
        let pairs = copy_pairs(geometry.num_blocks, &mut rng);
        for device in devices() {
            on_device!(&device, |backend| check_copy(backend, &geometry, &layers, &pairs));
        }
    }

    #[test]
    fn blocks_are_swapped_whole(
        geometry in strategy::geometry(), other_blocks in 1usize..9, gaps in (0usize..30, 0usize..30),
        count in 1usize..3, seed in any::<u64>(),
    ) {
        let mut rng = Rng::new(seed);
        let other = Geometry { num_blocks: other_blocks, k_gap: gaps.0, v_gap: gaps.1, tail: 5, ..geometry };
        let (src, dst) = (layers(&geometry, count, &mut rng), layers(&other, count, &mut rng));
        let pairs = swap_pairs(geometry.num_blocks, other.num_blocks, &mut rng);
        for device in devices() {
            on_device!(&device, |backend| check_swap(backend, (&geometry, &src), (&other, &dst), &pairs));
        }
    }

    #[test]
    fn paged_rows_become_dense(parameters in gather_parameters()) {
        let case = build_gather(&parameters);
        for device in devices() {
            prop_assert_eq!(on_device!(&device, |backend| check_gather(backend, &case)), Ok(()), "on {}", device);
        }
    }
}

/// vLLM's `test_swap_blocks`: many pairs at once, out and back, leaves the bytes as they were.
#[test]
fn vllm_swap_256_blocks_there_and_back() {
    for format in [KvFormat::BF16, KvFormat::Fp8E4M3] {
        let pool = Geometry::plain(CacheLayout::VllmPacked, (8, 64), (16, 300), format);
        let host = Geometry { num_blocks: 256, ..pool };
        let mut rng = Rng::new(3);
        let (src, dst) = (layers(&pool, 2, &mut rng), layers(&host, 2, &mut rng));
        let out: Vec<_> = (0..256).map(|i| BlockPair::new((i * 7) % 300, i)).collect();
        let back: Vec<_> = out.iter().map(|pair| BlockPair::new(pair.dst, pair.src)).collect();
        for device in devices() {
            let swapped =
                on_device!(&device, |backend| run::swap_out(backend, (&pool, &src), (&host, &dst), &out)).unwrap();
            let blank: Vec<_> = src.iter().map(|_| Layer::poisoned(&pool)).collect();
            let returned =
                on_device!(&device, |backend| run::swap_in(backend, (&host, &swapped), (&pool, &blank), &back))
                    .unwrap();
            for (before, (after, blank)) in src.iter().zip(returned.iter().zip(&blank)) {
                let mut expected = blank.clone();
                let pairs: Vec<_> = out.iter().map(|pair| BlockPair::new(pair.src, pair.src)).collect();
                rows::copy_blocks((&pool, before), (&pool, &mut expected), &pairs);
                assert!(same_layer(&expected, after));
            }
        }
    }
}

/// vLLM's gather lengths: starts [3, 17, 5], lengths [20, 10, 16], and one long sequence among
/// short ones.
#[test]
fn vllm_gather_with_starts_and_uneven_lengths() {
    for (sequences, with_starts) in
        [(vec![(3, 20), (17, 10), (5, 16)], true), (vec![(0, 17), (0, 2048), (0, 71)], false)]
    {
        for format in [KvFormat::Fp8E4M3, KvFormat::BF16] {
            let geometry = Geometry::plain(CacheLayout::Nhd, (2, 64), (16, 40), format);
            let case = build_gather(&GatherParameters {
                geometry,
                dtype: DType::F32,
                sequences: sequences.clone(),
                with_starts,
                spare_rows: 0,
                table_spare: 0,
                percent_bad_blocks: 0,
                padding: ((0, 0, 0), (0, 0, 0)),
                scales: (ScaleKind::Tensor, ScaleKind::Tensor),
                seed: 5,
            });
            for device in devices() {
                on_device!(&device, |backend| check_gather(backend, &case))
                    .unwrap_or_else(|text| panic!("{}: {text}", device));
            }
        }
    }
}

/// Every code of every format, dequantized by a scale whose products round.
#[test]
fn every_code_is_dequantized_exactly() {
    for format in [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let geometry = Geometry::plain(CacheLayout::Hnd, (1, 32), (8, 1), format);
            let mut code = 255u8;
            let layer = Layer::filled(
                &geometry,
                || {
                    code = code.wrapping_add(1);
                    code
                },
                || 1.0,
            );
            let scale = oracle::geometry::Scales::tensor(0.0131);
            let blank = Rows { data: vec![1234.0; 256], strides: quantkv::args::RowStrides::contiguous(1, 32) };
            let case = GatherCase {
                geometry,
                layer,
                dtype,
                k_scale: scale.clone(),
                v_scale: scale,
                tables: vec![0],
                table_stride: 1,
                cu_seq_lens: vec![0, 8],
                starts: None,
                num_tokens: 8,
                key: blank.clone(),
                value: blank,
            };
            for device in devices() {
                on_device!(&device, |backend| check_gather(backend, &case))
                    .unwrap_or_else(|text| panic!("{format} on {}: {text}", device));
                assert_eq!(on_device!(&device, |backend| backend.faults()).unwrap(), Faults::NONE);
            }
        }
    }
}

/// Enough bytes that the work is shared among threads, exact for any number of them.
#[test]
fn large_moves_on_any_number_of_threads() {
    for layout in CacheLayout::ALL {
        let mut geometry = Geometry::plain(layout, (5, 128), (16, 90), KvFormat::Fp8E4M3);
        (geometry.dynamic, geometry.v_gap, geometry.tail) = (true, 40, 64);
        let case = build_gather(&GatherParameters {
            geometry,
            dtype: DType::BF16,
            sequences: vec![(3, 300), (0, 1), (20, 0), (0, 500)],
            with_starts: true,
            spare_rows: 2,
            table_spare: 1,
            percent_bad_blocks: 10,
            padding: ((1, 7, 0), (0, 0, 5)),
            scales: (ScaleKind::Channel, ScaleKind::Head),
            seed: 17,
        });
        let mut rng = Rng::new(23);
        let pool = layers(&geometry, 3, &mut rng);
        let host = Geometry { num_blocks: 60, v_gap: 0, ..geometry };
        let swapped = layers(&host, 3, &mut rng);
        let copies: Vec<_> = (0..40).map(|i| BlockPair::new(i, 89 - i)).collect();
        let swaps: Vec<_> = (0..55).map(|i| BlockPair::new(89 - i, i)).collect();
        for device in devices() {
            device.in_pools(|threads| {
                let result = on_device!(&device, |backend| check_gather(backend, &case));
                assert_eq!(result, Ok(()), "{layout:?} on {} with {threads} threads", device);
                on_device!(&device, |backend| check_copy(backend, &geometry, &pool, &copies));
                on_device!(&device, |backend| check_swap(backend, (&geometry, &pool), (&host, &swapped), &swaps));
            });
        }
    }
}
