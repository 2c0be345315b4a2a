//! Observers against what LLM Compressor logged and wrote, and whole runs against plain arithmetic over
//! all keys and values.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantkv::calibrate::{Calibration, LayerReport, MovingRange, Observer, Runner};
use quantkv::checkpoint::kv_scales;
use quantkv::codec::{Codec, E4M3};
use quantkv::decoder::{Batch, Config, Model, ObservedLayer, WantedLogits, Weights};
use quantkv::scale::{Granularity, LayerScales};
use quantkv::{CpuBackend, DType, Error, KvFormat, PagedKvCache};
use serde_json::Value;

fn micro(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/micro").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn calibration_ids() -> Vec<Vec<u32>> {
    serde_json::from_value(json(&micro("calibration_inputs.json"))["input_ids"].clone()).unwrap()
}

/// One observer of a log: half, and for each call the extremes of the sample and the running ones.
struct Series {
    half: String,
    calls: Vec<[Vec<f32>; 4]>,
}

/// The observers of a log, in order of layers, K before V.
fn series(log: &Value) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for call in log.as_array().unwrap() {
        let observer = call["observer"].as_u64().unwrap() as usize;
        if observer == all.len() {
            all.push(Series { half: call["base"].as_str().unwrap().to_owned(), calls: Vec::new() });
        }
        all[observer].calls.push(["batch_min", "batch_max", "run_min", "run_max"].map(|name| floats(&call[name])));
    }
    all
}

/// Feeds a series to moving ranges, checks each step to the bit, and gives the scales.
fn replay(series: &Series, dtype: DType) -> Vec<f32> {
    let mut groups = vec![MovingRange::default(); series.calls[0][0].len()];
    for [min, max, run_min, run_max] in &series.calls {
        for (index, range) in groups.iter_mut().enumerate() {
            range.update(dtype, min[index], max[index]);
            assert_eq!(range.range(), Some((run_min[index], run_max[index])), "{dtype}");
        }
    }
    groups.iter().map(|range| range.scale(dtype)).collect()
}

fn scales_of(folder: &str) -> Vec<LayerScales> {
    let dir = micro(folder);
    kv_scales(&Weights::open(&dir).unwrap(), &Config::from_dir(&dir).unwrap()).unwrap().unwrap()
}

#[test]
fn the_moving_average_is_llm_compressors_to_the_bit() {
    for (folder, dtype) in [
        ("llmcompressor-tiny", DType::BF16),
        ("llmcompressor-tiny-f32", DType::F32),
        ("llmcompressor-tiny-kvhead", DType::BF16),
    ] {
        let scales = scales_of(folder);
        let all = series(&json(&micro(folder).join("observer_log.json")));
        assert_eq!(all.len(), 8);
        for (number, series) in all.iter().enumerate() {
            assert_eq!(series.calls.len(), 16);
            let layer = &scales[number / 2];
            let expected = if series.half == "k" { &layer.k } else { &layer.v };
            assert_eq!(replay(series, dtype), expected.values(), "{folder} {number}");
        }
    }
}

#[test]
fn the_moving_average_in_f16_is_torchs_to_the_bit() {
    let golden = json(&micro("observer_f16.json"));
    for (number, series) in series(&golden["calls"]).iter().enumerate() {
        assert_eq!(replay(series, DType::F16), floats(&golden["scales"][number]));
    }
    // One of them is a subnormal of f16.
    assert!(golden["scales"].as_array().unwrap().iter().any(|scale| floats(scale)[0] < 6.1e-5));
}

fn load(folder: &str) -> Model<CpuBackend> {
    Model::load(&micro(folder), Arc::new(CpuBackend::new())).unwrap()
}

fn calibrate(folder: &str, observer: Observer, granularity: Granularity) -> Vec<LayerReport> {
    let mut model = load(folder);
    let mut calibration = Calibration::new(observer, granularity, model.config(), model.dtype());
    let mut runner = Runner::new(&mut model, 128).unwrap();
    for ids in calibration_ids() {
        assert!(runner.sample(&ids, &mut calibration, &mut |_| ControlFlow::Continue(())).unwrap());
    }
    assert_eq!((calibration.samples(), calibration.tokens()), (16, 16 * 128));
    calibration.report().unwrap()
}

/// The largest relative difference.
fn distance(ours: &[LayerReport], theirs: &[LayerScales]) -> f32 {
    let values = |layer: &LayerScales| [layer.k.values(), layer.v.values()].concat();
    let mut worst = 0.0f32;
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        let (ours, theirs) = (values(&ours.scales()), values(theirs));
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(&theirs) {
            worst = worst.max((a - b).abs() / b);
        }
    }
    worst
}

/// Sums of 64 products in another order differ by at most 64 roundings of f32 (2^-24) of their size.
const SUMS_OF_64: f32 = 64.0 / 16_777_216.0;

#[test]
fn a_run_in_f32_gives_llm_compressors_scales() {
    let ours = calibrate("tiny-llama-base-f32", Observer::LlmCompressor, Granularity::Tensor);
    let worst = distance(&ours, &scales_of("llmcompressor-tiny-f32"));
    assert!(worst <= SUMS_OF_64, "{worst}");
}

/// Our activations are f32, torch's were bf16: each sample's extremes differ before they are rounded to
/// bf16. Measured: half of the scales equal, the others one step of bf16 away (2^-8 to 2^-7 of a number),
/// one of them two. Twice that is allowed.
#[test]
fn a_run_of_a_bf16_model_gives_its_scales_to_a_few_steps_of_bf16() {
    for (folder, granularity) in
        [("llmcompressor-tiny", Granularity::Tensor), ("llmcompressor-tiny-kvhead", Granularity::Head)]
    {
        let ours = calibrate("tiny-llama-base", Observer::LlmCompressor, granularity);
        let worst = distance(&ours, &scales_of(folder));
        assert!(worst <= 4.0 / 128.0, "{folder} {worst}");
        // Whatever they are, they are numbers of bf16.
        let values = ours.iter().flat_map(|layer| [layer.k.scale.values(), layer.v.scale.values()].concat());
        assert!(values.into_iter().all(|x| half::bf16::from_f32(x).to_f32() == x));
    }
}

#[test]
fn absmax_is_the_largest_of_what_llm_compressor_saw() {
    let ours = calibrate("tiny-llama-base-f32", Observer::Absmax, Granularity::Tensor);
    let log = series(&json(&micro("llmcompressor-tiny-f32").join("observer_log.json")));
    for (number, series) in log.iter().enumerate() {
        let layer = &ours[number / 2];
        let half = if series.half == "k" { &layer.k } else { &layer.v };
        let largest = series.calls.iter().flat_map(|call| [call[0][0].abs(), call[1][0].abs()]).fold(0.0, f32::max);
        assert!((half.absmax[0] - largest).abs() <= SUMS_OF_64 * largest, "{number}");
        assert_eq!(half.scale.values(), [half.absmax[0] / 448.0]);
        assert_eq!(half.clipped, 0.0);
        assert!((half.headroom - 1.0).abs() < 1e-6);
    }
}

/// Keys and values `[layer][K, V]` of all samples, `[tokens, heads, dim]`.
fn everything(folder: &str) -> Vec<[Vec<f32>; 2]> {
    let mut model = load(folder);
    let layers = model.config().num_layers;
    let spec = model.cache_spec(16, KvFormat::F32).unwrap();
    let scales = vec![LayerScales::one(); layers];
    let mut cache = PagedKvCache::new(Arc::clone(model.backend()), spec, 8, &scales).unwrap();
    let mut all = vec![[Vec::new(), Vec::new()]; layers];
    for ids in calibration_ids() {
        let mut batch = Batch::new();
        batch.push_sequence(&ids, 0, &[0, 1, 2, 3, 4, 5, 6, 7], 16, WantedLogits::None).unwrap();
        let keep = |seen: ObservedLayer<'_, f32>| {
            assert_eq!((seen.num_tokens, seen.num_kv_heads, seen.head_dim), (128, 2, 16));
            all[seen.layer][0].extend_from_slice(seen.k);
            all[seen.layer][1].extend_from_slice(seen.v);
            Ok(())
        };
        model.compute_observed(&batch, &mut cache, keep).unwrap();
    }
    all
}

/// What is observed is what is written: the cache of an observed step is that of the same step unobserved.
#[test]
fn observed_rows_are_those_of_the_cache() {
    let mut model = load("tiny-llama-base-f32");
    let spec = model.cache_spec(16, KvFormat::F32).unwrap();
    let ids = &calibration_ids()[0][..16];
    let mut batch = Batch::new();
    batch.push_sequence(ids, 0, &[0], 16, WantedLogits::None).unwrap();
    let cache = || PagedKvCache::new(Arc::new(CpuBackend::new()), spec, 1, &[(); 4].map(|()| LayerScales::one()));
    let (mut observed, mut plain) = (cache().unwrap(), cache().unwrap());
    let mut rows = Vec::new();
    let keep = |seen: ObservedLayer<'_, f32>| {
        rows.push((seen.k.to_vec(), seen.v.to_vec()));
        Ok(())
    };
    model.compute_observed(&batch, &mut observed, keep).unwrap();
    model.compute(&batch, &mut plain).unwrap();
    for (layer, (k, v)) in rows.iter().enumerate() {
        let (a, b) = (observed.layer_ref(layer).unwrap(), plain.layer_ref(layer).unwrap());
        assert_eq!((a.k, a.v), (b.k, b.v));
        // HND: [head, token, channel] of the one block; rows are [token, head, channel].
        for (stored, rows) in [(a.k, k), (a.v, v)] {
            for (index, bytes) in stored.chunks_exact(4).enumerate() {
                let (head, token, channel) = (index / 256, index / 16 % 16, index % 16);
                let x = f32::from_le_bytes(bytes.try_into().unwrap());
                assert_eq!(x.to_bits(), rows[(token * 2 + head) * 16 + channel].to_bits());
            }
        }
    }
    assert_eq!(rows.len(), 4);
}

/// The values of one group.
fn group(rows: &[f32], granularity: Granularity, group: usize) -> Vec<f32> {
    let of = |index: usize| match granularity {
        Granularity::Tensor => 0,
        Granularity::Head => index / 16 % 2,
        Granularity::Channel => index % 32,
    };
    rows.iter().enumerate().filter(|(index, _)| of(*index) == group).map(|(_, x)| *x).collect()
}

#[test]
fn every_strategy_and_percentile_against_sorted_values() {
    let all = everything("tiny-llama-base-f32");
    for (granularity, width) in
        [(Granularity::Tensor, 1.0 / 256.0), (Granularity::Head, 1.0 / 256.0), (Granularity::Channel, 1.0 / 32.0)]
    {
        let absmax = calibrate("tiny-llama-base-f32", Observer::Absmax, granularity);
        let percentile = calibrate("tiny-llama-base-f32", Observer::Percentile(99.0), granularity);
        for (layer, halves) in all.iter().enumerate() {
            let reports = [(&absmax[layer].k, &percentile[layer].k), (&absmax[layer].v, &percentile[layer].v)];
            for (rows, (absmax, percentile)) in halves.iter().zip(reports) {
                assert_eq!(absmax.scale.values().len(), granularity.len(2, 16));
                let mut beyond = 0;
                for index in 0..granularity.len(2, 16) {
                    let mut sizes: Vec<f32> = group(rows, granularity, index).iter().map(|x| x.abs()).collect();
                    sizes.sort_by(f32::total_cmp);
                    assert_eq!(absmax.scale.values()[index], sizes[sizes.len() - 1] / 448.0);
                    let rank = (0.99 * sizes.len() as f64).ceil() as usize;
                    let (exact, scale) = (sizes[rank - 1], percentile.scale.values()[index]);
                    let covered = scale * 448.0;
                    assert!(covered >= exact * 0.999_999 && covered <= exact * (1.0 + width) * 1.000_001);
                    beyond += sizes.iter().filter(|x| **x > scale * 464.0).count();
                }
                let share = beyond as f64 / rows.len() as f64;
                assert!(percentile.clipped <= share && percentile.clipped > 0.0 && share < 0.01, "{share}");
                assert!(percentile.headroom < 1.0);
            }
        }
    }
}

#[test]
fn mse_is_as_good_as_an_exhaustive_search_of_its_grid() {
    let all = everything("tiny-llama-base-f32");
    let reports = calibrate("tiny-llama-base-f32", Observer::Mse, Granularity::Tensor);
    for (halves, report) in all.iter().zip(&reports) {
        for (rows, half) in halves.iter().zip([&report.k, &report.v]) {
            let error = |scale: f32| -> f64 {
                rows.iter().map(|x| f64::from(x - E4M3::decode(E4M3::encode(x / scale)) * scale).powi(2)).sum()
            };
            let candidate = |i: u32| half.absmax[0] * (1.0 - f64::from(i) / 100.0) as f32 / 448.0;
            let best = (0..=50).map(|i| error(candidate(i))).fold(f64::INFINITY, f64::min);
            let ours = error(half.scale.values()[0]);
            // Middles of buckets are up to 2^-9 off, where codes are 2^-3 to 2^-4 apart.
            assert!(ours <= best * (1.0 + 1.0 / 16.0), "{ours} {best}");
            assert!(ours <= error(candidate(0)));
        }
    }
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let mut model = load("tiny-llama-base-f32");
    let mut calibration = Calibration::new(Observer::Absmax, Granularity::Head, model.config(), DType::F32);
    assert!(matches!(calibration.report(), Err(Error::InvalidRequest(message)) if message.contains("no sample")));
    let mut runner = Runner::new(&mut model, 8).unwrap();
    let mut sample = |ids: &[u32]| runner.sample(ids, &mut calibration, &mut |_| ControlFlow::Continue(()));
    for ids in [&[][..], &[0; 9], &[0, 512], &[u32::MAX]] {
        assert!(matches!(sample(ids), Err(Error::InvalidRequest(_))), "{ids:?}");
    }
    let (row, wrong) = ([0.0f32; 32], [0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    for (index, bad) in wrong.into_iter().enumerate() {
        let mut v = row;
        v[31] = bad;
        let seen = ObservedLayer { layer: 2, num_tokens: 1, num_kv_heads: 2, head_dim: 16, k: &row[..], v: &v[..] };
        let result = calibration.observe(&seen);
        assert_eq!(result.is_err(), index > 0);
        if let Err(error) = result {
            assert!(error.to_string().starts_with("layer 2: a value is "), "{error}");
        }
        assert!(calibration.observe(&ObservedLayer { layer: 4, ..seen }).is_err());
        assert!(calibration.observe(&ObservedLayer { num_tokens: 2, ..seen }).is_err());
        assert!(calibration.observe(&ObservedLayer { num_kv_heads: 1, head_dim: 32, ..seen }).is_err());
    }
}
