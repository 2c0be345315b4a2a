//! Scales that are computed on the way, in the decoder, on the CPU and on CUDA: running scales, which grow under
//! what is written, dynamic ones, the first batch's, and the granularities of all.
//!
//! The truths: torch's logits (`golden.safetensors`), the values of an unquantized cache, the bound of
//! `docs/numerics.md`, and for an engine under pressure the same engine with room.

mod decoder_support;
#[path = "../testing/devices.rs"]
mod devices;

use std::sync::Arc;

use decoder_support::{cache_for, fixture, golden_tensors, greedy, load, load_on};
use quantkv::args::{Gather, RowStrides};
use quantkv::decoder::engine::{Engine, EngineConfig, Request, Stats};
use quantkv::decoder::kv_scales::{Divisors, OnTheFly, ScaleOptions, ScaleSource, resolve};
use quantkv::decoder::sampling::SamplingParams;
use quantkv::decoder::warm_up::{Observed, RunningScales, WarmUp};
use quantkv::decoder::{Batch, Compute, Model, WantedLogits};
use quantkv::layout::{DynamicScales, Half};
use quantkv::scale::{Granularity, LayerScales};
use quantkv::{Backend, CpuBackend, Error, KvFormat, PagedKvCache};
use serde_json::Value;

const MICRO: &str = "micro/llmcompressor-tiny-f32";
/// E4M3's largest value, smallest normal and smallest subnormal.
const E4M3: (f64, f64, f64) = (448.0, 1.0 / 64.0, 1.0 / 512.0);

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(fixture(MICRO).join("golden.json")).unwrap()).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    let ids = |ids: &Value| ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    golden()["ids"].as_array().unwrap().iter().map(ids).collect()
}

fn running(tokens: usize, granularity: Granularity) -> ScaleOptions<'static> {
    let running = RunningScales { tokens, ..RunningScales::default() };
    ScaleOptions { running, granularity: Some(granularity), ..ScaleSource::Running.into() }
}

/// Runs `$check` on the CPU and, if there is one, on the CUDA device.
macro_rules! on_cpu_and_cuda {
    ($check:ident) => {
        $check(Arc::new(CpuBackend::new()));
        if let Some(cuda) = devices::cuda() {
            on_device!(&cuda, move |backend| $check(backend));
        }
    };
}

/// Dense keys and values, `[tokens, heads, dim]` each, of the first `tokens` of a table.
fn gathered<B: Backend>(cache: &PagedKvCache<B>, layer: usize, table: &[u32], tokens: usize) -> [Vec<f32>; 2] {
    let (backend, shape) = (&**cache.backend(), *cache.shape());
    let spec = shape.spec;
    let rows = RowStrides::contiguous(spec.num_kv_heads, spec.k_head_dim);
    let len = tokens * spec.num_kv_heads * spec.k_head_dim;
    let table: Vec<i32> = table.iter().map(|block| *block as i32).collect();
    let mut on_device = backend.zeros("table", table.len()).unwrap();
    backend.upload(&table, &mut on_device).unwrap();
    let mut bounds = backend.zeros("bounds", 2).unwrap();
    backend.upload(&[0, tokens as i32], &mut bounds).unwrap();
    let (mut key, mut value) = (backend.zeros("key", len).unwrap(), backend.zeros("value", len).unwrap());
    backend
        .gather::<f32>(Gather {
            shape,
            cache: cache.layer_ref(layer).unwrap(),
            k_scale: cache.scale(layer, Half::K).unwrap(),
            v_scale: cache.scale(layer, Half::V).unwrap(),
            block_tables: backend.view(&on_device),
            block_table_stride: table.len(),
            cu_seq_lens: backend.view(&bounds),
            starts: None,
            num_tokens: tokens,
            key: backend.view_mut(&mut key),
            key_strides: rows,
            value: backend.view_mut(&mut value),
            value_strides: rows,
        })
        .unwrap();
    [key, value].map(|buffer| {
        let mut values = vec![0.0; len];
        backend.download(&buffer, &mut values).unwrap();
        values
    })
}

#[test]
fn growing_scales_keep_what_is_written() {
    on_cpu_and_cuda!(grow_under_two_sequences);
}

/// Two sequences side by side, a few tokens a step: what each layer held before a step it holds after it, to the
/// bound of requantizing, whichever sequence made its scales grow.
fn grow_under_two_sequences<B: Compute>(backend: Arc<B>) {
    let mut model: Model<B> = load_on(&fixture(MICRO), &backend);
    let text = prompts()[3].clone();
    let (steps, chunk) = if devices::emulated() && backend.name() != "cpu" { (4, 3) } else { (12, 5) };
    let sequences = [&text[30..30 + steps * chunk], &text[60..60 + steps * chunk]];
    let tables: [Vec<u32>; 2] = [(0..8).map(|block| 2 * block).collect(), (0..8).map(|block| 15 - 2 * block).collect()];
    let spec = model.cache_spec(8, KvFormat::Fp8E4M3).unwrap();
    let options =
        ScaleOptions { running: RunningScales { tokens: 1000, headroom: 1.0 }, ..running(1, Granularity::Head) };
    let scales = resolve(model.config(), model.weights(), KvFormat::Fp8E4M3, options).unwrap();
    assert_eq!(scales.on_the_fly, Some(OnTheFly::Running(options.running)));
    let mut cache = PagedKvCache::new(backend, spec, 16, &scales.layers).unwrap();
    let mut warm_up = WarmUp::new(options.running, spec, &scales.layers).unwrap();
    let layers = model.config().num_layers;
    let (mut grown, mut flushed, mut batch) = (0, 0, Batch::new());
    for step in 0..steps {
        let len = step * chunk;
        let all = |cache: &PagedKvCache<B>| -> Vec<[Vec<f32>; 2]> {
            let layer = |layer| tables.iter().map(move |table| (layer, table));
            (0..layers).flat_map(layer).map(|(layer, table)| gathered(cache, layer, table, len)).collect()
        };
        let before = if step > 0 { all(&cache) } else { Vec::new() };
        batch.clear();
        for (tokens, table) in sequences.iter().zip(&tables) {
            batch.push_sequence(&tokens[len..len + chunk], len, table, 8, WantedLogits::Last).unwrap();
        }
        // All blocks: those that hold nothing yet come to no harm.
        let written: Vec<u32> = (0..16).collect();
        let observed = Observed { rows: 2 * chunk, tokens: 2 * chunk, written: &written };
        model.compute_warming_up(&batch, &mut cache, &mut warm_up, observed).unwrap();
        let after = if step > 0 { all(&cache) } else { Vec::new() };
        for change in warm_up.rescaled() {
            assert_eq!(cache.scales(change.layer).unwrap(), change.new);
            grown += usize::from(step > 0);
        }
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            let change = warm_up.rescaled().iter().find(|change| change.layer == index / 2);
            for (half, (before, after)) in before.iter().zip(after).enumerate() {
                for (at, (&was, &is)) in before.iter().zip(after).enumerate() {
                    let head = at / spec.k_head_dim % spec.num_kv_heads;
                    let scale = |scales: &LayerScales| [&scales.k, &scales.v][half].get(head, 0);
                    let new = change.map_or(0.0, |change| f64::from(scale(&change.new)));
                    let (_, normal, subnormal) = E4M3;
                    let bound = if f64::from(was).abs() >= normal * new { 0.0 } else { subnormal * new / 2.0 };
                    let error = (f64::from(is) - f64::from(was)).abs();
                    assert!(error <= bound, "step {step}, {was} became {is} when its scale grew to {new}");
                    flushed += usize::from(error > 0.0);
                }
            }
        }
    }
    assert_eq!(warm_up.tokens_seen(), 2 * steps * chunk);
    assert!(grown > 0, "no scale grew");
    println!("{grown} layers requantized, {flushed} values rounded on the way");
    assert!(model.backend().faults().unwrap().is_empty());
}

#[test]
fn frozen_scales_cover_the_first_tokens() {
    on_cpu_and_cuda!(cover_the_first_tokens);
}

/// The scales of the first layer, whose keys and values no cache has touched, against the values themselves as an
/// unquantized cache has them; the warm-up ends in the middle of a chunk.
fn cover_the_first_tokens<B: Compute>(backend: Arc<B>) {
    let emulated = devices::emulated() && backend.name() != "cpu";
    let (prompt, tokens, chunk) = if emulated { (24, 15, 10) } else { (150, 100, 64) };
    let prompt = &prompts()[3][..prompt];
    let mut model: Model<B> = load_on(&fixture(MICRO), &backend);
    let values = {
        let mut model = load(&fixture(MICRO));
        let spec = model.cache_spec(16, KvFormat::F32).unwrap();
        let (mut cache, table) = cache_for(&model, spec, &vec![LayerScales::one(); 4], prompt.len());
        greedy(&mut model, &mut cache, &table, prompt, prompt.len(), 0);
        gathered(&cache, 0, &table, tokens)
    };
    for granularity in [Granularity::Tensor, Granularity::Head, Granularity::Channel] {
        let config = EngineConfig { max_prefill_tokens: chunk, ..EngineConfig::new(KvFormat::Fp8E4M3, 64) };
        let request = Request::greedy(prompt.to_vec(), 3);
        let (_, stats, scales) = run(&mut model, config, running(tokens, granularity), &[request]);
        assert_eq!((stats.scale_tokens, stats.scales_frozen), (tokens, true));
        let (heads, dim) = (model.config().num_kv_heads, model.config().head_dim);
        for (values, scale) in values.iter().zip([&scales[0].k, &scales[0].v]) {
            assert_eq!(scale.granularity(), granularity);
            let mut maxima = vec![0f64; granularity.len(heads, dim)];
            for (at, value) in values.iter().enumerate() {
                let max = &mut maxima[granularity.strides(dim).index(at / dim % heads, at % dim)];
                *max = max.max(f64::from(*value).abs());
            }
            for (max, scale) in maxima.into_iter().zip(scale.values()) {
                let mut wanted = 2f64.powi(-126);
                while wanted * E4M3.0 < 1.25 * max {
                    wanted *= 2.0;
                }
                assert_eq!(f64::from(*scale), wanted, "{granularity:?}, largest {max}");
            }
        }
    }
}

type Texts = Vec<Vec<Vec<u32>>>;

/// All tokens of `requests`, what it took, and the scales at the end.
fn run<B: Compute>(
    model: &mut Model<B>,
    config: EngineConfig,
    options: ScaleOptions<'_>,
    requests: &[Request],
) -> (Texts, Stats, Vec<LayerScales>) {
    let scales = resolve(model.config(), model.weights(), config.format, options).unwrap();
    let mut engine = Engine::new(model, None, config, &scales).unwrap();
    let numbers: Vec<usize> = requests.iter().map(|request| engine.add_request(request.clone()).unwrap()).collect();
    engine.run(|_| ()).unwrap();
    assert_eq!(engine.blocks_in_use(), 0);
    let texts = numbers
        .iter()
        .map(|number| engine.outputs(*number).unwrap().iter().map(|output| output.token_ids.clone()).collect());
    let layers = (0..engine.cache().num_layers()).map(|layer| engine.cache().scales(layer).unwrap());
    (texts.collect(), engine.stats(), layers.collect())
}

fn seeded(prompt: &[u32], n: usize, seed: u64, max_tokens: usize) -> Request {
    let sampling = SamplingParams { temperature: 1.2, top_k: 50, seed, ..SamplingParams::default() };
    Request { n, sampling, ..Request::greedy(prompt.to_vec(), max_tokens) }
}

/// Scales and tokens do not depend on how a prompt is cut, on shared blocks, on what runs beside it.
#[test]
fn chunks_and_sharing_do_not_matter() {
    let mut model = load(&fixture(MICRO));
    let prompts = prompts();
    let mut requests: Vec<Request> =
        prompts.iter().map(|prompt| Request { n: 2, ..Request::greedy(prompt.clone(), 20) }).collect();
    // It begins as another does.
    requests.push(Request::greedy(prompts[3][..100].to_vec(), 20));
    for (tokens, granularity) in [(40, Granularity::Head), (190, Granularity::Tensor), (100_000, Granularity::Channel)]
    {
        let mut expected = None;
        for (chunk, prefix_sharing, max_num_seqs) in
            [(512, true, 32), (1, true, 32), (7, false, 3), (16, true, 1), (64, false, 32)]
        {
            let config = EngineConfig {
                max_prefill_tokens: chunk,
                prefix_sharing,
                max_num_seqs,
                ..EngineConfig::new(KvFormat::Fp8E4M3, 256)
            };
            let (texts, stats, scales) = run(&mut model, config, running(tokens, granularity), &requests);
            let case = format!("{tokens} tokens, chunks of {chunk}, sharing {prefix_sharing}");
            assert_eq!(stats.scales_frozen, tokens < 1000, "{case}");
            assert!(stats.scale_tokens <= tokens && (stats.scale_tokens == tokens) == stats.scales_frozen, "{case}");
            let found = (stats.scale_tokens, texts, scales);
            let expected = expected.get_or_insert_with(|| found.clone());
            assert!(*expected == found, "{case}");
        }
    }
}

#[test]
fn pressure_does_not_matter() {
    on_cpu_and_cuda!(run_under_pressure);
}

/// Forks that copy, blocks that run out, sequences in host memory while scales grow and after: the tokens of an
/// engine with room.
fn run_under_pressure<B: Compute>(backend: Arc<B>) {
    let emulated = devices::emulated() && backend.name() != "cpu";
    // On a GPU how products and attention are summed depends on what else is in the batch, and greedy tokens of a
    // model of random weights turn on the last bit.
    let same_sums = emulated || backend.name() == "cpu";
    let mut model: Model<B> = load_on(&fixture(MICRO), &backend);
    let text = prompts()[3].clone();
    let (length, count) = if emulated { (14, 12) } else { (30, 40) };
    let requests = [
        seeded(&text[40..40 + length], 4, 3, count),
        seeded(&text[1..1 + length], 2, 4, count),
        Request { n: 2, ..Request::greedy(text[1..1 + length].to_vec(), count) },
    ];
    let roomy = EngineConfig { block_size: 8, ..EngineConfig::new(KvFormat::Fp8E4M3, 256) };
    let largest = (length + count - 1).div_ceil(8);
    let all = [
        running(100_000, Granularity::Head),
        running(length, Granularity::Tensor),
        running(length + 9, Granularity::Channel),
        ScaleSource::Dynamic.into(),
        ScaleOptions { granularity: Some(Granularity::Head), ..ScaleSource::FirstBatch.into() },
    ];
    let all = if emulated { [&all[..1], &all[3..4]].concat() } else { all.to_vec() };
    for options in all {
        let (expected, stats, scales) = run(&mut model, roomy, options, &requests);
        assert_eq!(stats.blocks_swapped_out, 0);
        if options.running.tokens > 1000 {
            assert!(stats.scale_changes > model.config().num_layers, "scales never grew: {stats:?}");
        }
        for (spare, swap_blocks) in if emulated { vec![(2, 64)] } else { vec![(0, 64), (2, 64), (3, 9), (1, 0)] } {
            // The first batch is one step's: it is to be the same. Running scales may be cut anywhere.
            let max_prefill_tokens = if options.source == ScaleSource::FirstBatch { 512 } else { 16 };
            let tight = EngineConfig { num_blocks: largest + spare, swap_blocks, max_prefill_tokens, ..roomy };
            let (got, stats, got_scales) = run(&mut model, tight, options, &requests);
            let case = format!("{options:?}, {} blocks, {swap_blocks} in host memory", tight.num_blocks);
            if same_sums {
                assert_eq!(got, expected, "{case}");
                assert_eq!(got_scales, scales, "{case}");
            }
            let lengths = |tokens: &[Vec<Vec<u32>>]| -> Vec<Vec<usize>> {
                tokens.iter().map(|samples| samples.iter().map(Vec::len).collect()).collect()
            };
            assert_eq!(lengths(&got), lengths(&expected), "{case}");
            assert!(stats.blocks_copied > 0, "{case}: {stats:?}");
            assert_eq!(stats.blocks_swapped_out > 0, swap_blocks > 0, "{case}: {stats:?}");
            assert_eq!(stats.recomputed > 0, swap_blocks < 64, "{case}: {stats:?}");
        }
    }
    assert!(backend.faults().unwrap().is_empty());
}

/// Root mean square difference to torch's logits of the unquantized cache, over all prompts.
fn rms_to_unquantized(logits: impl Fn(usize) -> Vec<f32>, prompts: usize) -> f64 {
    let tensors = golden_tensors(&fixture(MICRO).join("golden.safetensors"));
    let (mut squares, mut count) = (0.0, 0);
    for index in 0..prompts {
        let want = &tensors[&format!("none.{index}.prefill_logits")];
        let got = logits(index);
        // Of the long prompt the golden file keeps the last rows only.
        let got = &got[got.len() - want.len()..];
        squares += got.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        count += want.len();
    }
    (squares / count as f64).sqrt()
}

#[test]
fn dynamic_and_running_scales_are_as_good_as_calibrated_ones() {
    on_cpu_and_cuda!(compare_with_torchs_caches);
}

/// Any scale that covers its values rounds them by at most 2^-4 of themselves, so dynamic and running scales are
/// as far from the unquantized logits as torch's calibrated ones are, up to chance (a factor of 1.5 over some
/// 10^5 logits); scale 1.0, which cuts the keys of this model at a tenth of them, is not.
fn compare_with_torchs_caches<B: Compute>(backend: Arc<B>) {
    let count = if devices::emulated() && backend.name() != "cpu" { 2 } else { 5 };
    let tensors = golden_tensors(&fixture(MICRO).join("golden.safetensors"));
    let torch = |mode: &str| rms_to_unquantized(|i| tensors[&format!("{mode}.{i}.prefill_logits")].clone(), count);
    let (calibrated, ones) = (torch("e4m3_cal"), torch("e4m3_one"));
    let mut model: Model<B> = load_on(&fixture(MICRO), &backend);
    let prompts = prompts();
    let mut logits = |options: ScaleOptions<'_>| -> Vec<Vec<f32>> {
        let scales = resolve(model.config(), model.weights(), KvFormat::Fp8E4M3, options).unwrap();
        let spec = scales.cache_spec(model.cache_spec(16, KvFormat::Fp8E4M3).unwrap()).unwrap();
        let prompts = prompts.iter().take(count);
        let one = |prompt: &Vec<u32>| {
            let (mut cache, table) = cache_for(&model, spec, &scales.layers, prompt.len());
            let mut batch = Batch::new();
            batch.push_sequence(prompt, 0, &table, 16, WantedLogits::All).unwrap();
            if let Some(OnTheFly::Running(running)) = scales.on_the_fly {
                let mut warm_up = WarmUp::new(running, spec, &scales.layers).unwrap();
                let observed = Observed { rows: prompt.len(), tokens: prompt.len(), written: &[] };
                model.compute_warming_up(&batch, &mut cache, &mut warm_up, observed).unwrap();
            } else {
                model.compute(&batch, &mut cache).unwrap();
            }
            model.logits(0..prompt.len()).unwrap().to_vec()
        };
        prompts.map(one).collect()
    };
    println!("torch: calibrated {calibrated}, scale 1.0 {ones}");
    for (name, options) in [
        ("dynamic", ScaleSource::Dynamic.into()),
        ("running per tensor", running(512, Granularity::Tensor)),
        ("running per head", running(512, Granularity::Head)),
        ("running per channel", running(512, Granularity::Channel)),
    ] {
        let logits = logits(options);
        let rms = rms_to_unquantized(|index| logits[index].clone(), count);
        println!("{name}: {rms}");
        assert!(rms < 1.5 * calibrated, "{name}: {rms}, torch's calibrated cache {calibrated}");
        assert!(rms < ones / 4.0, "{name}: {rms}, torch's cache with scale 1.0 {ones}");
    }
}

/// After the warm-up steps of decoding are recorded: the same tokens as without.
#[cfg(feature = "cuda")]
#[test]
fn frozen_scales_are_read_by_recorded_steps() {
    use quantkv::decoder::cuda::{DecoderOptions, Products};
    let Some(devices::Device::Cuda(cuda)) = devices::cuda() else { return };
    let text = prompts()[3].clone();
    let requests = [Request { n: 2, ..Request::greedy(text[1..12].to_vec(), 14) }];
    let config = EngineConfig { block_size: 8, ..EngineConfig::new(KvFormat::Fp8E4M3, 32) };
    for options in [running(17, Granularity::Head), ScaleSource::Dynamic.into()] {
        let [recorded, run] = [true, false].map(|graphs| {
            let options_of = DecoderOptions { products: Products::Portable, graphs };
            let mut model: Model<_> = load_on(&fixture(MICRO), &Arc::new(cuda.with_decoder_options(options_of)));
            run(&mut model, config, options, &requests)
        });
        assert_eq!((recorded.0, recorded.2), (run.0, run.2), "{options:?}");
        assert!(recorded.1.scales_frozen);
    }
}

#[test]
fn dynamic_scales_are_counted() {
    let mut model = load(&fixture(MICRO));
    let (layers, heads, dim) = (model.config().num_layers, model.config().num_kv_heads, model.config().head_dim);
    let scales = resolve(model.config(), model.weights(), KvFormat::Fp8E4M3, ScaleSource::Dynamic).unwrap();
    assert_eq!(scales.dynamic, DynamicScales::PerSlotHead);
    let engine = Engine::new(&mut model, None, EngineConfig::new(KvFormat::Fp8E4M3, 4), &scales).unwrap();
    assert_eq!(engine.cache().bytes_per_token(), layers * heads * 2 * (dim + 4));
}

/// Layer 0's scales are its values' alone: divisors of 400 and 50 halve and double them exactly.
#[test]
fn divisors_divide() {
    let mut model = load(&fixture(MICRO));
    let config = EngineConfig::new(KvFormat::Fp8E4M3, 64);
    let request = [Request::greedy(prompts()[0].clone(), 2)];
    let first_batch = ScaleOptions { granularity: Some(Granularity::Head), ..ScaleSource::FirstBatch.into() };
    let (_, stats, default) = run(&mut model, config, first_batch, &request);
    assert_eq!((stats.scale_tokens, stats.scales_frozen), (prompts()[0].len(), true));
    let other = ScaleOptions { divisors: Divisors { k: 400.0, v: 50.0 }, ..first_batch };
    let (_, _, other) = run(&mut model, config, other, &request);
    for head in 0..2 {
        assert_eq!(other[0].k.get(head, 0), default[0].k.get(head, 0) / 2.0);
        assert_eq!(other[0].v.get(head, 0), default[0].v.get(head, 0) * 2.0);
    }
}

#[test]
fn granularities_are_combined_as_documented() {
    let per_head = load(&fixture("micro/llmcompressor-tiny-kvhead"));
    let asked = |granularity, source: ScaleSource<'static>, format| {
        let options = ScaleOptions { granularity, ..source.into() };
        resolve(per_head.config(), per_head.weights(), format, options).unwrap()
    };
    let e4m3 = |granularity| asked(granularity, ScaleSource::Checkpoint, KvFormat::Fp8E4M3);
    let given = e4m3(None);
    assert_eq!(given.layers[0].k.granularity(), Granularity::Head);
    assert_eq!(e4m3(Some(Granularity::Head)), given);
    let tensor = e4m3(Some(Granularity::Tensor));
    assert!(tensor.warnings.len() == 1 && tensor.warnings[0].contains("per head"), "{:?}", tensor.warnings);
    let channel = e4m3(Some(Granularity::Channel));
    assert!(channel.warnings.is_empty());
    for ((given, tensor), channel) in given.layers.iter().zip(&tensor.layers).zip(&channel.layers) {
        for (given, tensor, channel) in [(&given.k, &tensor.k, &channel.k), (&given.v, &tensor.v, &channel.v)] {
            assert_eq!(tensor.values(), [given.get(0, 0).max(given.get(1, 0))]);
            let dim = per_head.config().head_dim;
            assert!((0..2 * dim).all(|at| channel.get(at / dim, at % dim) == given.get(at / dim, 0)));
        }
    }
    let dynamic = asked(Some(Granularity::Tensor), ScaleSource::Dynamic, KvFormat::Fp8E5M2);
    assert!(dynamic.warnings.len() == 1 && dynamic.warnings[0].contains("no effect"), "{:?}", dynamic.warnings);
    // Nothing to scale.
    for source in [ScaleSource::Running, ScaleSource::Dynamic, ScaleSource::FirstBatch] {
        let none = asked(Some(Granularity::Head), source, KvFormat::BF16);
        assert_eq!((none.on_the_fly, none.dynamic), (None, DynamicScales::Off));
        assert_eq!((none.warnings.len(), &none.layers[0]), (1, &LayerScales::one()));
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let mut model = load(&fixture(MICRO));
    let refused =
        |options: ScaleOptions<'_>| resolve(model.config(), model.weights(), KvFormat::Fp8E4M3, options).unwrap_err();
    let running = ScaleOptions::from(ScaleSource::Running);
    for bad in [f32::NAN, f32::INFINITY, 0.0, 0.5, -200.0] {
        for divisors in [Divisors { k: bad, ..Divisors::default() }, Divisors { v: bad, ..Divisors::default() }] {
            let error = refused(ScaleOptions { divisors, ..ScaleSource::FirstBatch.into() });
            assert!(matches!(error, Error::InvalidNumber { .. }), "{error}");
        }
        let with = RunningScales { headroom: bad, ..RunningScales::default() };
        assert!(matches!(refused(ScaleOptions { running: with, ..running }), Error::InvalidNumber { .. }));
    }
    let with = RunningScales { tokens: 0, ..RunningScales::default() };
    assert!(matches!(refused(ScaleOptions { running: with, ..running }), Error::Zero { .. }));
    assert!(model.scales_from_next_step_by(Divisors { k: 0.0, v: 1.0 }).is_err());

    // A warm-up of another cache.
    let (spec, other) =
        (model.cache_spec(8, KvFormat::Fp8E4M3).unwrap(), model.cache_spec(16, KvFormat::Fp8E4M3).unwrap());
    let ones = vec![LayerScales::one(); 4];
    let mut cache = PagedKvCache::new(Arc::clone(model.backend()), spec, 4, &ones).unwrap();
    let mut warm_up = WarmUp::new(RunningScales::default(), other, &ones).unwrap();
    let mut batch = Batch::new();
    batch.push_sequence(&[1, 2], 0, &[0], 8, WantedLogits::Last).unwrap();
    let observed = Observed { rows: 2, tokens: 2, written: &[] };
    let error = model.compute_warming_up(&batch, &mut cache, &mut warm_up, observed).unwrap_err();
    assert!(matches!(error, Error::GeometryMismatch { .. }), "{error}");
}
