//! `paged_attention` of 9 to 64 query rows a KV head over an FP8 cache of 128 channels against f64: on sm_90 a kernel of
//! its own, if there are 8 (sequence, KV head) pairs or more, for more than 32 rows 32, for 16 and fewer 64. What no query
//! may see is NaN, as in parity_attention. Dynamic scales are other instantiations of the same kernel. Where that kernel cannot
//! be, one of these tests runs: calls like the others' are parity_attention's too.

mod attention_cases;
#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use attention_cases::{Parameters, build, fill_visible, simple, swing_values};
use devices::{Device, attention_devices, devices};
use oracle::attention::{Arithmetic, AttentionCase, check_attention, expect};
use oracle::geometry::{Geometry, Layer, Scales};
use oracle::run;
use oracle::strategy::{Rng, ScaleKind};
use quantkv::{CacheLayout, DType, KvFormat};

fn check_all(case: &AttentionCase, what: impl std::fmt::Debug) {
    let devices: Vec<_> = devices().into_iter().filter(|device| device.is_cuda()).collect();
    if !devices.is_empty() {
        check_on(devices, case, what);
    }
}

fn check_on(devices: Vec<Device>, case: &AttentionCase, what: impl std::fmt::Debug) {
    let expectation = expect(case);
    for device in devices {
        let run = on_device!(&device, |backend| run::attention(backend, case));
        let (out, lse, faults) = run.unwrap();
        let arithmetic = Arithmetic::of(device.has_tensor_cores(), device.flushes_subnormals());
        check_attention(case, &expectation, arithmetic, &out, lse.as_deref(), faults)
            .unwrap_or_else(|text| panic!("{what:?} on {device}: {text}"));
    }
}

fn geometry(layout: CacheLayout, heads: usize, block_size: usize, sequences: &[(usize, usize)]) -> Geometry {
    let blocks: usize = sequences.iter().map(|&(before, new)| (before + new).div_ceil(block_size)).sum();
    Geometry::plain(layout, (heads, 128), (block_size, blocks + 1), KvFormat::Fp8E4M3)
}

/// A call that says how many queries its longest sequence has.
fn wide(geometry: Geometry, group: usize, sequences: Vec<(usize, usize)>) -> Parameters {
    Parameters { dtype: DType::BF16, says_longest: true, ..simple(geometry, group, sequences) }
}

/// Every number of rows around those of the products (16, 32, 64), whole and not, both sides of what the kernel takes.
#[test]
fn every_number_of_rows() {
    for (group, new) in [(8, 2), (17, 1), (8, 3), (8, 4), (5, 7), (11, 3), (8, 8), (21, 3), (64, 1), (13, 5), (71, 1)] {
        for (layout, dynamic) in [(CacheLayout::Hnd, false), (CacheLayout::Nhd, false), (CacheLayout::Hnd, true)] {
            let sequences = vec![(300, new), (64, new), (63, new), (1, new), (0, new)];
            let geometry = Geometry { dynamic, ..geometry(layout, 2, 16, &sequences) };
            check_on(attention_devices(), &build(&wide(geometry, group, sequences)), (group, new, layout, dynamic));
        }
    }
}

/// 9 to 16 rows of 64 (sequence, KV head) pairs: whole and cut, long and short, at windows and under ALiBi.
#[test]
fn sixteen_rows_and_fewer() {
    let lengths = [0, 1, 15, 16, 17, 62, 63, 64, 65, 127, 128, 190, 300, 517, 33, 90];
    for (i, (group, new)) in [(8, 2), (16, 1), (3, 4), (9, 1), (5, 3)].into_iter().enumerate() {
        let sequences: Vec<_> = lengths.map(|before| (before, new)).to_vec();
        let layout = if i == 1 { CacheLayout::Nhd } else { CacheLayout::Hnd };
        let geometry = geometry(layout, 4, 8 << (i % 3), &sequences);
        let (window, alibi) = (if i == 2 { Some(70) } else { None }, i == 3);
        let soft_cap = if i == 4 { Some(20.0) } else { None };
        let parameters = Parameters { window, alibi, soft_cap, lse: true, ..wide(geometry, group, sequences) };
        check_all(&build(&parameters), (group, new, layout, window));
        // Rows of queries, or of outputs, that are no vectors of 16 bytes: another kernel's.
        for padding in [((0, 3, 0), (0, 0, 0)), ((0, 0, 0), (5, 0, 0))] {
            check_all(&build(&Parameters { padding, ..parameters.clone() }), (group, new, padding));
        }
    }
}

/// Lengths around a part of 16 tokens and a tile of 64, at every block size; windows that begin anywhere in a tile.
#[test]
fn every_length_around_a_tile() {
    for block_size in [8, 16, 32, 128] {
        for (window, dynamic) in
            [(None, false), (Some(1), false), (Some(21), false), (Some(100), false), (None, true), (Some(100), true)]
        {
            let lengths = [1, 7, 8, 9, 15, 16, 17, 47, 48, 49, 63, 64, 65, 127, 128, 129, 189, 191, 200];
            let sequences: Vec<_> = lengths.map(|before| (before, 5)).to_vec();
            let geometry = Geometry { dynamic, ..geometry(CacheLayout::Hnd, 1, block_size, &sequences) };
            let parameters = Parameters { window, lse: true, ..wide(geometry, 4, sequences) };
            check_all(&build(&parameters), (block_size, window, dynamic));
        }
    }
}

/// Both formats, both activations, every kind of scale, dynamic ones with them, sinks, ALiBi (under which maxima grow) and a
/// soft cap.
#[test]
fn every_feature() {
    use ScaleKind::{Channel, Head, Tensor};
    let scales = [(Tensor, Head), (Channel, Tensor), (Head, Channel)];
    for (i, format) in [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2].into_iter().enumerate() {
        for (j, scales) in scales.into_iter().enumerate() {
            for (alibi, soft_cap, dynamic) in [
                (false, None, false),
                (true, None, false),
                (false, Some(30.0), false),
                (true, Some(0.5), false),
                (true, Some(30.0), true),
            ] {
                let sequences = vec![(400, 6), (70, 6), (130, 5)];
                let plain = geometry(CacheLayout::Hnd, 3, 16, &sequences);
                let geometry = Geometry { k_format: format, v_format: format, dynamic, ..plain };
                let dtype = [DType::F16, DType::BF16][(i + j) % 2];
                let sinks = j == 1;
                let parameters =
                    Parameters { dtype, scales, sinks, alibi, soft_cap, lse: true, ..wide(geometry, 5, sequences) };
                check_all(&build(&parameters), (format, scales, alibi, soft_cap, dynamic));
            }
        }
    }
}

/// Scores that grow from tile to tile, so that what weights are relative to must follow; that shrink; of both signs; and so
/// large that f16 would not hold them. Scales of V that grow and shrink.
#[test]
fn maxima_that_move() {
    let sequences = vec![(500, 4)];
    for factor in [1.0, 40.0, -40.0] {
        for (alibi, dynamic) in [(false, false), (true, false), (false, true), (true, true)] {
            let geometry = Geometry { dynamic, ..geometry(CacheLayout::Hnd, 8, 16, &sequences) };
            let mut case = build(&Parameters { alibi, ..wide(geometry, 8, sequences.clone()) });
            case.params.softmax_scale *= factor;
            swing_values(&mut case, 64, 262144.0); // from tile to tile more than f16 holds
            check_all(&case, (factor, alibi, dynamic));
        }
    }
}

/// Holes: blocks that the table does not name, a piece of nothing else, sequences without keys, and queries that come before
/// their sequence.
#[test]
fn holes_and_nothing() {
    let sequences = vec![(900, 4), (200, 4), (3, 4), (64, 4)];
    for (block_size, dynamic) in [(8, false), (16, false), (64, false), (8, true), (16, true)] {
        let geometry = Geometry { dynamic, ..geometry(CacheLayout::Nhd, 2, block_size, &sequences) };
        let mut case = build(&wide(geometry, 8, sequences.clone()));
        case.tables[2..][..600 / block_size].fill(-1);
        case.tables[case.table_stride..][..204usize.div_ceil(block_size)].fill(geometry.num_blocks as i32);
        check_all(&case, (block_size, dynamic, "bad blocks"));
        let mut case = build(&wide(geometry, 8, sequences.clone()));
        (case.seq_lens[1], case.seq_lens[2]) = (0, 2);
        case.layer = Layer::poisoned(&geometry);
        fill_visible(&mut case, &mut Rng::new(5));
        check_all(&case, (block_size, dynamic, "no keys"));
    }
}

/// Sequences of one length, in equal pieces or several whole ones a worker; many short ones, so that the next pieces are
/// loaded while one is attended to; few in very many pieces.
#[test]
fn pieces_of_all_kinds() {
    let batches = [(1, 8, 3000, 4), (2, 4, 600, 8), (4, 2, 300, 3), (24, 2, 90, 8), (64, 2, 20, 4), (40, 2, 70, 3)];
    for ((count, heads, length, new), dynamic) in batches.into_iter().flat_map(|batch| [(batch, false), (batch, true)])
    {
        let sequences = vec![(length - new, new); count];
        let geometry = Geometry { dynamic, ..geometry(CacheLayout::Hnd, heads, 16, &sequences) };
        let mut case = build(&wide(geometry, 8, sequences));
        (case.k_scale, case.v_scale) = (Scales::tensor(0.5), Scales::tensor(0.25));
        check_all(&case, (count, length, new, dynamic));
    }
}

/// More tiles in a piece than a warp looks up blocks for at a time: 32, or 16 of blocks of 8 slots.
#[test]
fn batches_of_blocks() {
    for (block_size, length) in [(16, 2300), (8, 1300)] {
        let sequences = vec![(length, 3)];
        let geometry = geometry(CacheLayout::Hnd, 16, block_size, &sequences);
        check_all(&build(&wide(geometry, 6, sequences)), (block_size, length));
    }
}

/// All lengths in one call, and pairs enough for devices of more than a hundred multiprocessors.
#[test]
fn lengths_of_all_kinds() {
    for (longest, group) in [(7, 4), (8, 8)] {
        let sequences: Vec<_> = (0..40).map(|i| (i * 37 % 400, 1 + i % longest)).collect();
        let geometry = geometry(CacheLayout::Hnd, 4, 16, &sequences);
        check_all(&build(&wide(geometry, group, sequences)), (longest, group));
    }
}

/// One sequence of many queries among those of one: two kernels share the call.
#[test]
fn few_among_many() {
    let mut sequences = vec![(100, 1), (300, 1), (64, 4), (7, 1), (500, 1), (90, 1), (33, 1), (12, 1), (80, 1)];
    sequences.push((20, 4));
    let geometry = geometry(CacheLayout::Hnd, 2, 16, &sequences);
    check_all(&build(&wide(geometry, 8, sequences)), ());
}
