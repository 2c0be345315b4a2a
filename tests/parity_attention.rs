//! `paged_attention` and `merge_states` against f64, within tolerances derived from f32 (see
//! `testing/oracle/attention.rs`), on every instruction set.
//!
//! Whatever no query may see is NaN: slots past the sequence length, slots behind every window,
//! blocks no table names, gaps, padding of the query rows, the workspace.

mod attention_cases;
#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use attention_cases::{Parameters, build, fill_visible, parameters, simple};

use devices::{Device, attention_devices};
use oracle::attention::{
    self, Arithmetic, AttentionCase, AttentionExpectation, MergeCase, check_attention, check_close, expect,
};
use oracle::formats::round_to;
use oracle::geometry::{Geometry, Layer, Scales};
use oracle::rows::Rows;
use oracle::run;
use oracle::strategy::{self, Padding, Rng, ScaleKind};
use proptest::prelude::*;
use quantkv::args::RowStrides;
use quantkv::layout::Half;
use quantkv::{Backend, CacheLayout, DType, Faults, KvFormat};

fn check(device: &Device, case: &AttentionCase, expectation: &AttentionExpectation) -> Result<(), String> {
    let run = on_device!(device, |backend| run::attention(backend, case));
    let (out, lse, faults) = run.map_err(|error| error.to_string())?;
    let arithmetic = Arithmetic::of(device.has_tensor_cores(), device.flushes_subnormals());
    check_attention(case, expectation, arithmetic, &out, lse.as_deref(), faults)
}

fn check_all(case: &AttentionCase, what: impl std::fmt::Debug) {
    let expectation = expect(case);
    for device in attention_devices() {
        check(&device, case, &expectation).unwrap_or_else(|text| panic!("{what:?} on {}: {text}", device));
    }
}

proptest! {
    #![proptest_config(strategy::config(160))]

    #[test]
    fn any_batch_matches_f64(parameters in parameters()) {
        let case = build(&parameters);
        let expectation = expect(&case);
        for device in attention_devices() {
            prop_assert_eq!(check(&device, &case, &expectation), Ok(()), "on {}", device);
        }
    }
}

/// Decode at every length from 0 to two blocks and one, every layout and FP8 format, every window
/// around a block: the off-by-one table.
#[test]
fn every_length_around_a_block() {
    for layout in CacheLayout::ALL {
        for format in [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz, KvFormat::F32] {
            let geometry = Geometry::plain(layout, (2, 16), (8, 6), format);
            for window in [None, Some(1), Some(7), Some(8), Some(9)] {
                // (0, 0): a sequence of length 0 without a query; lengths 1 to 17 with one.
                let mut sequences = vec![(0, 0)];
                sequences.extend((0..17).map(|before| (before, 1)));
                let parameters = Parameters { window, ..simple(geometry, 2, sequences) };
                check_all(&build(&parameters), (layout, format, window));
            }
        }
    }
}

/// Tensor cores take tiles of 16 tokens, or of 32 if rows are 64 bytes: lengths and windows that end and begin at each place
/// of a tile, whatever the blocks.
#[test]
fn every_length_around_a_tile() {
    let layouts = [CacheLayout::Nhd, CacheLayout::VllmPacked];
    for (layout, dim) in layouts.into_iter().flat_map(|layout| [(layout, 64), (layout, 128)]) {
        for block_size in [8, 16, 64] {
            let lengths = [1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 48, 49, 65, 97, 161];
            let blocks = lengths.iter().map(|length: &usize| length.div_ceil(block_size)).sum();
            let geometry = Geometry::plain(layout, (1, dim), (block_size, blocks), KvFormat::Fp8E4M3);
            for window in [None, Some(21)] {
                let sequences = lengths.iter().map(|length| (length - 1, 1)).collect();
                let parameters = Parameters { dtype: DType::BF16, window, ..simple(geometry, 2, sequences) };
                check_all(&build(&parameters), (layout, dim, block_size, window));
            }
        }
    }
}

/// A query of a sequence of length 0 (a padded batch) gives zeros and -inf, or the sink.
#[test]
fn an_empty_sequence_gives_zeros() {
    for sinks in [None, Some(vec![0.5, -3.0])] {
        for format in [KvFormat::F16, KvFormat::Fp8E4M3] {
            let geometry = Geometry::plain(CacheLayout::Hnd, (1, 8), (8, 3), format);
            let mut case = build(&simple(geometry, 2, vec![(0, 1), (3, 1), (0, 2)]));
            (case.seq_lens[0], case.seq_lens[2]) = (0, 0);
            case.layer = Layer::poisoned(&geometry);
            fill_visible(&mut case, &mut Rng::new(1));
            case.sinks = sinks.clone();
            check_all(&case, &sinks);
            for device in attention_devices() {
                let (out, lse, _) = on_device!(&device, |backend| run::attention(backend, &case)).unwrap();
                assert!(out[..16].iter().chain(&out[32..]).all(|&x| x == 0.0), "{out:?}");
                let lse = lse.unwrap();
                let want = sinks.clone().unwrap_or(vec![f32::NEG_INFINITY; 2]);
                check_close(lse[0], want[0].into(), 1e-6).unwrap();
                check_close(lse[1], want[1].into(), 1e-6).unwrap();
            }
        }
    }
}

/// More queries than cached tokens: the queries before the sequence see nothing.
#[test]
fn queries_before_the_sequence_see_nothing() {
    let geometry = Geometry::plain(CacheLayout::Nhd, (2, 24), (8, 3), KvFormat::Fp8E5M2);
    let mut case = build(&simple(geometry, 3, vec![(0, 7), (0, 5)]));
    case.seq_lens = vec![3, 0];
    case.layer = Layer::poisoned(&geometry);
    fill_visible(&mut case, &mut Rng::new(2));
    check_all(&case, "7 queries over 3 tokens");
}

/// vLLM's heads, head dims and lengths around its partition of 512, with and without ALiBi,
/// scales 0.5 and 0.25, padding poisoned.
#[test]
fn vllm_decode_shapes() {
    for (heads, group, dim) in [(8, 8, 64), (40, 1, 32), (8, 4, 128), (2, 4, 80), (1, 8, 256)] {
        for (format, block_size) in [(KvFormat::Fp8E4M3, 16), (KvFormat::BF16, 32)] {
            let geometry = Geometry::plain(CacheLayout::VllmPacked, (heads, dim), (block_size, 40), format);
            let lengths = if dim == 64 { vec![0, 510, 511, 512, 100] } else { vec![0, 512, 3] };
            let parameters = Parameters {
                dtype: DType::BF16,
                alibi: dim == 64,
                ..simple(geometry, group, lengths.into_iter().map(|before| (before, 1)).collect())
            };
            let mut case = build(&parameters);
            (case.k_scale, case.v_scale) = (Scales::tensor(0.5), Scales::tensor(0.25));
            check_all(&case, (heads, group, dim, format));
        }
    }
}

/// Shapes that tensor cores take, static and dynamic scales. What follows a sequence's last token is poison, in rows that
/// GPUs read by whole tiles: it may be multiplied by nothing, not by zero either. Most blocks belong to one sequence, so
/// nobody else has filled them.
#[test]
fn poison_follows_the_last_token() {
    for (layout, dim, block_size) in [
        (CacheLayout::Hnd, 128, 16),
        (CacheLayout::Nhd, 64, 32),
        (CacheLayout::Hnd, 64, 8),
        (CacheLayout::VllmPacked, 128, 8),
    ] {
        for (format, dynamic) in [
            (KvFormat::F16, false),
            (KvFormat::BF16, false),
            (KvFormat::Fp8E4M3, false),
            (KvFormat::Fp8E4M3, true),
            (KvFormat::Fp8E5M2, true),
        ] {
            for new in [1, 20] {
                let plain = Geometry::plain(layout, (2, dim), (block_size, 300), format);
                let geometry = Geometry { dynamic, ..plain };
                let sequences = [0, 1, 6, 7, 8, 14, 15, 16, 17, 33, 100].map(|before| (before, new)).to_vec();
                let dtype = if format == KvFormat::BF16 { DType::BF16 } else { DType::F16 };
                let parameters = Parameters { dtype, ..simple(geometry, 4, sequences) };
                check_all(&build(&parameters), (layout, dim, format, dynamic, new));
            }
        }
    }
}

/// Sequences of a tile or less, so that a block goes from piece to piece, each of another head with other scales: a lane that is
/// ahead must not take away what others still read.
#[test]
fn scales_of_short_sequences() {
    for (layout, format) in [(CacheLayout::Hnd, KvFormat::Fp8E4M3), (CacheLayout::VllmPacked, KvFormat::Fp8E5M2)] {
        for (dim, group, scale) in [(64, 4, ScaleKind::Head), (128, 1, ScaleKind::Head), (128, 8, ScaleKind::Channel)] {
            let geometry = Geometry::plain(layout, (3, dim), (16, 40), format);
            let sequences = (0..100).map(|s| (s % 13, 1)).collect();
            let parameters = simple(geometry, group, sequences);
            check_all(
                &build(&Parameters { dtype: DType::F16, scales: (scale, scale), ..parameters }),
                (layout, dim, group),
            );
        }
    }
}

/// Few queries a sequence, whether the call says how many or not: tiles of 8 and of 16 rows, and more rows than those.
#[test]
fn speculative_decode() {
    for (group, new) in [(1, 2), (1, 8), (4, 2), (3, 4), (4, 5), (8, 2), (8, 4), (17, 2)] {
        let geometry = Geometry::plain(CacheLayout::Hnd, (2, 64), (16, 150), KvFormat::Fp8E4M3);
        let sequences = vec![(700, new), (64, new), (15, 1), (0, new)];
        let parameters = Parameters { dtype: DType::BF16, ..simple(geometry, group, sequences) };
        for says_longest in [false, true] {
            let parameters = Parameters { says_longest, ..parameters.clone() };
            check_all(&build(&parameters), (group, new, says_longest));
        }
    }
}

/// A sequence with more queries than the call says is skipped, its rows are left as they are, and there is a fault.
#[test]
fn a_sequence_longer_than_said_is_skipped() {
    for (dtype, max_query_len) in [(DType::F32, 2), (DType::F16, 2), (DType::F16, 5), (DType::F16, 0)] {
        let geometry = Geometry::plain(CacheLayout::Hnd, (2, 64), (16, 150), KvFormat::Fp8E4M3);
        let sequences = vec![(70, 1), (30, 3), (64, 2), (100, 20), (15, 1)];
        let mut case = build(&Parameters { dtype, ..simple(geometry, 3, sequences) });
        case.max_query_len = Some(max_query_len);
        assert!(attention::sequences(&case).1.contains(Faults::QUERY_START_OUT_OF_RANGE));
        check_all(&case, (dtype, max_query_len));
    }
}

/// Every cache that 16-bit products are for, head dims up to each size of the kernels and rows that they cannot read by
/// whole quads, scales by head and by channel, tokens around a tile of 64 and in several pieces.
#[test]
fn every_cache_of_tensor_cores() {
    use KvFormat::{BF16, F16, Fp8E4M3, Fp8E4M3Fnuz, Fp8E5M2};
    let caches = [
        (DType::F16, Fp8E4M3, ScaleKind::Tensor),
        (DType::F16, Fp8E4M3Fnuz, ScaleKind::Head),
        (DType::BF16, Fp8E5M2, ScaleKind::Channel),
        (DType::BF16, Fp8E4M3, ScaleKind::Head),
        (DType::F16, F16, ScaleKind::Tensor),
        (DType::BF16, BF16, ScaleKind::Tensor),
    ];
    for (dtype, format, scale) in caches {
        for (k_dim, v_dim, sequences) in [
            (37, 21, vec![(62, 3), (0, 5)]),
            (64, 64, vec![(700, 1), (0, 20), (64, 1)]),
            (128, 96, vec![(129, 2), (63, 1)]),
            (192, 192, vec![(700, 1), (37, 2), (0, 1)]),
            (256, 256, vec![(700, 1), (37, 2), (0, 1)]),
            (256, 256, vec![(70, 6)]),
        ] {
            let geometry = Geometry { v_dim, ..Geometry::plain(CacheLayout::Nhd, (2, k_dim), (16, 50), format) };
            let parameters = Parameters { dtype, scales: (scale, scale), ..simple(geometry, 3, sequences) };
            check_all(&build(&parameters), (dtype, format, scale, k_dim));
        }
    }
}

/// Large scores: the maximum is subtracted, nothing overflows, and a sink of -inf is no sink.
#[test]
fn large_scores_do_not_overflow() {
    let geometry = Geometry::plain(CacheLayout::Hnd, (1, 64), (16, 6), KvFormat::Fp8E4M3);
    for factor in [30.0, -30.0] {
        let mut case = build(&simple(geometry, 2, vec![(60, 1), (0, 1)]));
        case.params.softmax_scale *= factor;
        case.k_scale = Scales::tensor(16.0);
        check_all(&case, factor);
        case.sinks = Some(vec![f32::NEG_INFINITY, 80.0]);
        check_all(&case, (factor, "sinks"));
    }
}

/// One token of weight 1 and 2000 of e^-10 = 2^-14.4, which f16 can only hold as a subnormal: together they are 8 % of the
/// sum, and all of the output.
#[test]
fn many_small_weights_count() {
    let geometry = Geometry::plain(CacheLayout::Hnd, (1, 16), (16, 128), KvFormat::Fp8E4M3);
    for dtype in [DType::F16, DType::BF16] {
        let mut case = build(&Parameters { dtype, ..simple(geometry, 2, vec![(2000, 1)]) });
        case.params.softmax_scale = 1.0;
        (case.k_scale, case.v_scale) = (Scales::tensor(1.0), Scales::tensor(1.0));
        for (logical, block) in case.tables.iter_mut().enumerate() {
            *block = logical as i32;
        }
        for d in 0..16 {
            (0..2).for_each(|head| case.query.set(0, head, d, if d == 0 { 1.0 } else { 0.0 }));
            for position in 0..2001 {
                let (at, is_first) = ((position / 16, 0, position % 16, d), position == 0);
                case.layer.store(&geometry, Half::K, at, if d > 0 || is_first { 0.0 } else { -10.0 });
                case.layer.store(&geometry, Half::V, at, if is_first { 0.0 } else { 1.0 });
            }
        }
        check_all(&case, dtype);
    }
}

/// Sequences long enough to be split: around 512 and its multiples, under windows that start in
/// any piece, and with pieces whose every block is bad.
#[test]
fn long_sequences_are_split() {
    for (layout, format) in [(CacheLayout::Hnd, KvFormat::Fp8E4M3), (CacheLayout::VllmPacked, KvFormat::F16)] {
        let geometry = Geometry { v_dim: 5, ..Geometry::plain(layout, (2, 16), (16, 260), format) };
        for window in [None, Some(1), Some(100), Some(513), Some(1500)] {
            let sequences = vec![(510, 1), (511, 1), (512, 1), (1023, 2), (3100, 1), (0, 1), (1500, 9)];
            let parameters = Parameters { window, sinks: window == Some(513), ..simple(geometry, 3, sequences) };
            let mut case = build(&parameters);
            check_all(&case, (layout, window));
            // Blocks 32 to 95 (positions 512 to 1535) of the longest sequence, and all of the third.
            case.tables[4 * case.table_stride + 32..][..64].fill(-1);
            case.tables[2 * case.table_stride..][..33].fill(260);
            check_all(&case, (layout, window, "bad blocks"));
        }
    }
}

/// So many pieces that CUDA's decode kernel merges them in two steps: on a GPU, or on an emulated one of 40
/// multiprocessors (QUANTKV_SIMT_MULTIPROCESSORS). Rows of a part of a warp and of several, with and without threads that
/// share a row.
#[test]
fn many_pieces_of_a_sequence() {
    for (dim, group, sequences) in [
        (64, 1, vec![(4900, 1)]),
        (64, 16, vec![(4900, 1)]),
        (128, 4, vec![(4900, 1), (40, 1)]),
        (128, 14, vec![(4900, 1), (40, 1)]),
        (256, 2, vec![(5200, 1), (0, 1)]),
    ] {
        let blocks: usize = sequences.iter().map(|&(before, new): &(usize, usize)| (before + new).div_ceil(16)).sum();
        let geometry = Geometry::plain(CacheLayout::Hnd, (1, dim), (16, blocks + 1), KvFormat::Fp8E4M3);
        let window = (dim == 256).then_some(5000);
        // Under ALiBi the maximum grows from piece to piece.
        let alibi = dim == 128;
        let parameters = Parameters { dtype: DType::BF16, window, alibi, ..simple(geometry, group, sequences) };
        check_all(&build(&parameters), (dim, group));
    }
}

/// Sequences of about one length, which CUDA's plan shares out evenly: in equal pieces, one a worker, or several a worker,
/// as many as come out even on an emulated device of 4 multiprocessors or not.
#[test]
fn sequences_of_one_length() {
    for (count, length) in [(2usize, 600usize), (4, 300), (8, 100), (16, 100), (31, 60), (32, 60)] {
        let geometry =
            Geometry::plain(CacheLayout::Hnd, (2, 64), (16, count * length.div_ceil(16) + 1), KvFormat::Fp8E4M3);
        let sequences = (0..count).map(|i| (length - 1 - i % 2, 1)).collect();
        check_all(&build(&Parameters { dtype: DType::BF16, ..simple(geometry, 2, sequences) }), (count, length));
    }
}

/// On an emulated device of 11 multiprocessors the 41st of 44 blocks has the last piece of the first sequence, which is a
/// run of its own, and the first of the second.
#[test]
fn a_run_of_pieces_begins_where_a_sequence_does() {
    let geometry = Geometry::plain(CacheLayout::Hnd, (1, 64), (16, 597), KvFormat::Fp8E4M3);
    let sequences = vec![(551 * 16 - 1, 1), (45 * 16 - 1, 1)];
    check_all(&build(&Parameters { dtype: DType::BF16, ..simple(geometry, 1, sequences) }), ());
}

/// A workspace made for a large batch serves every smaller one: "for at most `num_tokens`".
#[test]
fn a_workspace_for_many_tokens_serves_fewer() {
    let geometry = Geometry::plain(CacheLayout::Hnd, (2, 16), (16, 8000), KvFormat::Fp8E4M3);
    for device in attention_devices() {
        let mut largest = 0;
        for num_tokens in 0..3000 {
            let shape = geometry.shape();
            let len = on_device!(&device, |backend| backend.attention_workspace_len(&shape, 4, num_tokens));
            assert!(len >= largest, "{num_tokens} tokens need {len} floats, fewer tokens {largest}");
            largest = len;
        }
    }
}

/// One thread, three or eight: the same bits; and the same again.
#[test]
fn results_do_not_depend_on_threads() {
    let geometry = Geometry::plain(CacheLayout::Hnd, (2, 64), (16, 80), KvFormat::Fp8E4M3);
    let case = build(&simple(geometry, 4, vec![(1200, 1), (3, 1), (700, 4), (0, 40), (90, 1)]));
    let expectation = expect(&case);
    let merge = build_merge(&MergeParameters {
        shape: (200, 16, 128),
        dtype: DType::BF16,
        padding: (0, 3, 0),
        with_lse: true,
        percent_empty: 10,
        seed: 3,
    });
    for device in attention_devices() {
        check(&device, &case, &expectation).unwrap();
        on_device!(&device, |backend| check_merge(backend, &merge)).unwrap();
        let bits = || {
            let (out, lse, _) = on_device!(&device, |backend| run::attention(backend, &case)).unwrap();
            let (merged, merged_lse) = on_device!(&device, |backend| run::merge(backend, &merge)).unwrap();
            let all = [out, lse.unwrap(), merged, merged_lse.unwrap()].concat();
            all.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let here = bits();
        device.in_pools(|threads| {
            for _ in 0..2 {
                assert!(bits() == here, "{} differs with {threads} threads", device);
            }
        });
    }
}

#[derive(Clone, Debug)]
struct MergeParameters {
    shape: (usize, usize, usize),
    dtype: DType,
    padding: Padding,
    with_lse: bool,
    percent_empty: u64,
    seed: u64,
}

fn build_merge(parameters: &MergeParameters) -> MergeCase {
    let MergeParameters { shape, dtype, padding, with_lse, percent_empty, seed } = *parameters;
    let mut rng = Rng::new(seed);
    let (tokens, heads, dim) = shape;
    let mut lse = || {
        (0..tokens * heads)
            .map(|_| match rng.chance(percent_empty) {
                true => [f32::NEG_INFINITY, f32::INFINITY][rng.below(2)],
                false => rng.normal() * if rng.chance(20) { 200.0 } else { 4.0 },
            })
            .collect::<Vec<f32>>()
    };
    let (a_lse, b_lse) = (lse(), lse());
    let mut rows = |lse: &[f32]| {
        let mut rows = strategy::rows(shape, padding, dtype, || f32::NAN);
        for (token, head) in (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head))) {
            // The row of a side without keys stays NaN: it must not be read into the result.
            if lse[token * heads + head].is_finite() {
                (0..dim).for_each(|d| rows.set(token, head, d, round_to(dtype, rng.normal().into())));
            }
        }
        rows
    };
    let (a, b): (Rows, Rows) = (rows(&a_lse), rows(&b_lse));
    let output = strategy::rows(shape, padding, dtype, || 1234.0);
    let strides: RowStrides = output.strides;
    MergeCase { tokens, heads, dim, dtype, strides, a: a.data, a_lse, b: b.data, b_lse, output: output.data, with_lse }
}

fn check_merge<B: Backend>(backend: &B, case: &MergeCase) -> Result<(), String> {
    let (out, lse) = run::merge(backend, case).map_err(|error| error.to_string())?;
    let mut expected = case.output.clone();
    for (token, head) in (0..case.tokens).flat_map(|token| (0..case.heads).map(move |head| (token, head))) {
        let want = attention::merge(case, token, head);
        let row = token * case.strides.token + head * case.strides.head;
        for d in 0..case.dim {
            check_close(out[row + d], want.out[d], want.out_tolerance[d])
                .map_err(|text| format!("token {token} head {head} channel {d}: {text}"))?;
            expected[row + d] = out[row + d];
        }
        if let Some(lse) = &lse {
            check_close(lse[token * case.heads + head], want.lse, want.lse_tolerance)
                .map_err(|text| format!("token {token} head {head}: LSE {text}"))?;
        }
    }
    if expected != out {
        return Err("something outside the rows was written".to_owned());
    }
    Ok(())
}

proptest! {
    #![proptest_config(strategy::config(96))]

    #[test]
    fn merged_states_match_f64(
        shape in (0usize..12, 1usize..6, strategy::head_dim()), dtype in strategy::dtype(),
        padding in strategy::padding(), with_lse in any::<bool>(),
        percent_empty in prop_oneof![Just(0u64), Just(10), Just(50), Just(100)], seed in any::<u64>(),
    ) {
        let case = build_merge(&MergeParameters { shape, dtype, padding, with_lse, percent_empty, seed });
        for device in attention_devices() {
            prop_assert_eq!(on_device!(&device, |backend| check_merge(backend, &case)), Ok(()), "on {}", device);
        }
    }
}

/// Attention over a sequence is the merge of attention over its two parts: ties `paged_attention`'s
/// LSE to `merge_states`.
#[test]
fn halves_merge_to_the_whole() {
    let geometry = Geometry::plain(CacheLayout::Hnd, (2, 32), (8, 9), KvFormat::Fp8E4M3);
    let mut case = build(&simple(geometry, 2, vec![(63, 1)]));
    // Distinct blocks, so that each half is its own sequence; the one query sees all of both.
    case.tables = (0..8).collect();
    fill_visible(&mut case, &mut Rng::new(4));
    let part = |tables: &[i32]| AttentionCase {
        tables: tables.to_vec(),
        table_stride: tables.len(),
        seq_lens: vec![tables.len() as i32 * 8],
        ..case.clone()
    };
    for device in attention_devices() {
        let run = |case: &AttentionCase| {
            check(&device, case, &expect(case)).unwrap();
            let (out, lse, _) = on_device!(&device, |backend| run::attention(backend, case)).unwrap();
            (out, lse.unwrap())
        };
        let (whole, (a, b)) = (run(&case), (run(&part(&[0, 1, 2])), run(&part(&[3, 4, 5, 6, 7]))));
        let merge = MergeCase {
            tokens: 1,
            heads: 4,
            dim: 32,
            dtype: DType::F32,
            strides: RowStrides::contiguous(4, 32),
            a: a.0,
            a_lse: a.1,
            b: b.0,
            b_lse: b.1,
            output: vec![0.0; 128],
            with_lse: true,
        };
        let (out, lse) = on_device!(&device, |backend| run::merge(backend, &merge)).unwrap();
        for (got, want) in out.iter().chain(&lse.unwrap()).zip(whole.0.iter().chain(&whole.1)) {
            // Values of order one through two softmaxes and a merge: some dozens of f32 roundings.
            check_close(*got, f64::from(*want), 256.0 * f64::from(f32::EPSILON)).unwrap();
        }
    }
}
