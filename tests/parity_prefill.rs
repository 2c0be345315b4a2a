//! `paged_attention` of many query rows a KV head against f64: on sm_90 a kernel of its own, elsewhere the tensor cores'
//! of every device. What no query may see is NaN, as in parity_attention.

mod attention_cases;
#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use attention_cases::{Parameters, build, simple, swing_values};
use devices::attention_devices;
use oracle::attention::{Arithmetic, AttentionCase, check_attention, expect};
use oracle::geometry::Geometry;
use oracle::run;
use oracle::strategy::ScaleKind;
use quantkv::{CacheLayout, DType, KvFormat};

fn check_all(case: &AttentionCase, what: impl std::fmt::Debug) {
    let expectation = expect(case);
    for device in attention_devices() {
        let run = on_device!(&device, |backend| run::attention(backend, case));
        let (out, lse, faults) = run.unwrap();
        let arithmetic = Arithmetic::of(device.has_tensor_cores(), device.flushes_subnormals());
        check_attention(case, &expectation, arithmetic, &out, lse.as_deref(), faults)
            .unwrap_or_else(|text| panic!("{what:?} on {device}: {text}"));
    }
}

/// Head dims that fill the kernels' 64, 128 and 256 channels and that do not, of K and of V, over caches of codes and of 16
/// bits; several tiles, pieces, and rows that are not there.
#[test]
fn every_head_dim() {
    use KvFormat::{BF16, F16, Fp8E4M3, Fp8E5M2};
    let caches = [
        (DType::BF16, Fp8E4M3, ScaleKind::Tensor),
        (DType::F16, Fp8E5M2, ScaleKind::Head),
        (DType::BF16, Fp8E4M3, ScaleKind::Channel),
        (DType::F16, F16, ScaleKind::Tensor),
        (DType::BF16, BF16, ScaleKind::Tensor),
    ];
    for (dtype, format, scale) in caches {
        for (k_dim, v_dim) in [(64, 48), (80, 128), (192, 96), (256, 256)] {
            let sequences = vec![(300, 37), (0, 70), (190, 1), (0, 0)];
            let plain = Geometry::plain(CacheLayout::Nhd, (2, k_dim), (16, 40), format);
            let geometry = Geometry { v_dim, ..plain };
            let parameters = Parameters { dtype, scales: (scale, scale), ..simple(geometry, 3, sequences) };
            check_all(&build(&parameters), (dtype, format, scale, k_dim, v_dim));
        }
    }
}

/// What changes scores between the products and the softmax, alone and together, over tiles that are masked and that are not,
/// with blocks that the table does not name.
#[test]
fn every_feature() {
    for (dim, format) in [(128, KvFormat::Fp8E4M3), (256, KvFormat::Fp8E5M2), (64, KvFormat::BF16)] {
        for (soft_cap, alibi, window, sinks) in [
            (Some(20.0), false, None, false),
            (None, true, None, false),
            (None, false, Some(150), true),
            (Some(5.0), true, Some(70), true),
        ] {
            let sequences = vec![(390, 50), (0, 33), (129, 2)];
            let geometry = Geometry::plain(CacheLayout::Hnd, (2, dim), (16, 48), format);
            let plain = simple(geometry, 4, sequences);
            let parameters = Parameters { dtype: DType::BF16, soft_cap, alibi, window, sinks, ..plain };
            let mut case = build(&parameters);
            check_all(&case, (dim, format, soft_cap, alibi, window));
            case.tables[9..14].fill(-1);
            check_all(&case, (dim, format, soft_cap, alibi, window, "bad blocks"));
        }
    }
}

/// Prefill in one piece, soft cap 50 and windows, as vLLM's unified-attention tests: (4, 4), (8, 2)
/// and (5, 1) heads.
#[test]
fn vllm_prefill_shapes() {
    for (heads, group) in [(4, 1), (2, 4), (1, 5)] {
        for window in [None, Some(64)] {
            for soft_cap in [None, Some(50.0)] {
                let geometry = Geometry::plain(CacheLayout::Nhd, (heads, 128), (16, 12), KvFormat::Fp8E4M3);
                let sequences = vec![(0, 129), (100, 1), (17, 16), (40, 33)];
                let parameters =
                    Parameters { window, soft_cap, dtype: DType::F16, ..simple(geometry, group, sequences) };
                check_all(&build(&parameters), (heads, group, window, soft_cap));
            }
        }
    }
}

/// Many queries over caches with dynamic scales, of several tiles of 128 keys and several pieces, some of whose blocks the table
/// does not name. V's scales grow and shrink from tile to tile.
#[test]
fn prefill_over_dynamic_scales() {
    let formats = [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz];
    for (i, (dim, block_size, window)) in [(128, 16, None), (64, 8, None), (128, 32, Some(300))].into_iter().enumerate()
    {
        let sequences = vec![(610, 30), (0, 60), (333, 1)];
        let blocks = sequences.iter().map(|&(before, new): &(usize, usize)| (before + new).div_ceil(block_size)).sum();
        let plain = Geometry::plain(CacheLayout::Hnd, (2, dim), (block_size, blocks), formats[i]);
        let geometry = Geometry { dynamic: true, ..plain };
        // f16 outputs would overflow.
        let parameters = Parameters { dtype: DType::BF16, window, ..simple(geometry, 3, sequences) };
        let mut case = build(&parameters);
        swing_values(&mut case, 130, 64.0);
        check_all(&case, (dim, block_size, window));
        if block_size == 16 {
            case.tables[200 / block_size..][..150 / block_size].fill(-1);
            check_all(&case, (dim, block_size, "bad blocks"));
        }
    }
}

/// vLLM's packed layout, whose V has the slots of a channel side by side: codes and 16 bits, blocks of 16 bytes of slots and more, or of
/// fewer and head dims that the kernels leave to others; windows that begin and sequences that end within a block; blocks that the table
/// does not name; dynamic scales.
#[test]
fn packed_rows() {
    use KvFormat::{BF16, F16, Fp8E4M3, Fp8E5M2};
    let caches = [
        (Fp8E4M3, DType::BF16, ScaleKind::Tensor, false),
        (Fp8E4M3, DType::BF16, ScaleKind::Head, true),
        (BF16, DType::BF16, ScaleKind::Tensor, false),
        (F16, DType::F16, ScaleKind::Tensor, false),
        (Fp8E5M2, DType::F16, ScaleKind::Channel, false),
    ];
    let shapes = [(64, 64, 16, None), (128, 96, 32, Some(150)), (96, 128, 16, Some(3)), (128, 128, 64, None)];
    let left_to_others = [(64, 48, 8, None), (256, 256, 16, None)];
    for (i, (format, dtype, scale, dynamic)) in caches.into_iter().enumerate() {
        let others = &left_to_others[..if i == 4 { 2 } else { 0 }];
        for &(dim, v_dim, block_size, window) in shapes.iter().chain(others) {
            let sequences = vec![(181, 37), (0, 70), (130, 1), (0, 0)];
            let blocks: usize =
                sequences.iter().map(|&(before, new): &(usize, usize)| (before + new).div_ceil(block_size)).sum();
            let plain = Geometry::plain(CacheLayout::VllmPacked, (1, dim), (block_size, blocks + 1), format);
            let geometry = Geometry { v_dim, dynamic, ..plain };
            let parameters = Parameters { dtype, window, scales: (scale, scale), ..simple(geometry, 3, sequences) };
            let mut case = build(&parameters);
            if window.is_none() && block_size == 16 {
                case.tables[100 / block_size..][..2].fill(-1);
            }
            check_all(&case, (format, dtype, dynamic, dim, v_dim, block_size, window));
        }
    }
}
