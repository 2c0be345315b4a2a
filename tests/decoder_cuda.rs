//! The decoder as a whole on CUDA, held against the CPU's: recorded steps, the engine under pressure, and
//! random weights. Skipped without a device.
#![cfg(feature = "cuda")]

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/fixtures.rs"]
mod fixtures;

use std::sync::Arc;

use half::bf16;
use quantkv::cuda::CudaBackend;
use quantkv::decoder::compute::RandomMatrix;
use quantkv::decoder::cuda::{DecoderOptions, Products};
use quantkv::decoder::engine::{Engine, EngineConfig, Request, Stats};
use quantkv::decoder::kv_scales::{ScaleSource, resolve};
use quantkv::decoder::sampling::SamplingParams;
use quantkv::decoder::{Batch, Compute, Config, Model, WantedLogits, random};
use quantkv::scale::{LayerScales, StaticScale};
use quantkv::{Backend, CpuBackend, DType, Element, Error, KvFormat, PagedKvCache};

const MICRO: &str = "micro/llmcompressor-tiny-f32";

fn cuda() -> Option<CudaBackend> {
    match devices::cuda() {
        Some(devices::Device::Cuda(cuda)) => Some((*cuda).clone()),
        _ => None,
    }
}

fn with_graphs(cuda: &CudaBackend, graphs: bool) -> Arc<CudaBackend> {
    // Our own products: cuBLASLt may choose another kernel in another process, never in this one.
    Arc::new(cuda.with_decoder_options(DecoderOptions { products: Products::Portable, graphs }))
}

fn tokens(seed: u64, count: usize, vocab: usize) -> Vec<u32> {
    let mut numbers = vec![0.0f32; count];
    random::fill(seed, 1000.0, &mut numbers);
    numbers.into_iter().map(|x| x.abs() as u32 % vocab as u32).collect()
}

/// Three sequences that decode side by side: all of them, then two, then all again, over tables that grow past
/// the strides that are recorded; through one cache and then another; with scales replaced on the way. Logits and
/// greedy tokens of every step.
fn decode(backend: &Arc<CudaBackend>, steps: usize) -> Vec<(Vec<f32>, Vec<u32>)> {
    let mut model: Model<CudaBackend> = Model::load(&fixtures::fixture_path(MICRO), Arc::clone(backend)).unwrap();
    let (vocab, layers) = (model.config().vocab_size, model.config().num_layers);
    let spec = model.cache_spec(8, KvFormat::Fp8E4M3).unwrap();
    let tables: Vec<Vec<u32>> = (0..3).map(|seq| (0..24).map(|block| block * 3 + seq).collect()).collect();
    let mut out = Vec::new();
    for round in 0..2 {
        let scales = vec![LayerScales::one(); layers];
        let mut cache = PagedKvCache::new(backend.clone(), spec, 72, &scales).unwrap();
        let mut lens = [0usize; 3];
        let mut batch = Batch::new();
        for (seq, len) in lens.iter_mut().enumerate() {
            // The longest is about to fill its 16 blocks.
            let prompt = tokens(seq as u64, [126, 5, 40][seq], vocab);
            batch.push_sequence(&prompt, 0, &tables[seq], 8, WantedLogits::Last).unwrap();
            *len = prompt.len();
        }
        model.compute(&batch, &mut cache).unwrap();
        let mut next = model.greedy(0..3).unwrap().to_vec();
        for step in 0..steps {
            if step == steps / 2 {
                // In place, then in a buffer of another size.
                let tensor = |value| StaticScale::per_tensor("k", value).unwrap();
                let heads = StaticScale::per_head("k", vec![0.75; spec.num_kv_heads]).unwrap();
                let k = if round == 0 { tensor(0.5) } else { heads };
                cache.set_scales(1, &LayerScales { k, v: tensor(2.0) }).unwrap();
            }
            let active: &[usize] = if step % 5 == 4 { &[0, 2] } else { &[0, 1, 2] };
            batch.clear();
            for &seq in active {
                let blocks = &tables[seq][..(lens[seq] + 1).div_ceil(8)];
                batch.push_sequence(&[next[seq]], lens[seq], blocks, 8, WantedLogits::Last).unwrap();
                lens[seq] += 1;
            }
            model.compute(&batch, &mut cache).unwrap();
            let greedy = model.greedy(0..active.len()).unwrap().to_vec();
            let logits = model.logits(0..active.len()).unwrap().to_vec();
            active.iter().zip(&greedy).for_each(|(seq, token)| next[*seq] = *token);
            out.push((logits, greedy));
        }
    }
    assert!(backend.faults().unwrap().is_empty());
    out
}

#[test]
fn recorded_steps_give_the_bits_of_steps_that_run() {
    let Some(cuda) = cuda() else { return };
    let steps = if devices::emulated() { 11 } else { 40 };
    let [recorded, run] = [true, false].map(|graphs| decode(&with_graphs(&cuda, graphs), steps));
    for (step, ((logits, greedy), (want, want_greedy))) in recorded.iter().zip(&run).enumerate() {
        assert_eq!(greedy, want_greedy, "step {step}");
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(logits) == bits(want), "step {step}: logits differ");
    }
    assert_eq!(recorded.len(), 2 * steps);
}

/// A thread records while another uses the same backend; neither notices.
#[test]
fn recording_is_a_threads_own() {
    let Some(cuda) = cuda() else { return };
    let add = |x: &mut quantkv::cuda::CudaBuffer<f32>, y: &quantkv::cuda::CudaBuffer<f32>| {
        Compute::<f32>::add(&cuda, x, 0, y, 64)
    };
    let ones = |value: f32| {
        let mut buffer = cuda.zeros::<f32>("test", 64).unwrap();
        cuda.upload(&[value; 64], &mut buffer).unwrap();
        buffer
    };
    let (mut recorded, mut direct, one) = (ones(0.0), ones(10.0), ones(1.0));
    let mut graph = cuda
        .record(&mut || {
            add(&mut recorded, &one)?;
            std::thread::scope(|scope| {
                scope.spawn(|| add(&mut direct, &one).unwrap());
            });
            add(&mut recorded, &one)
        })
        .unwrap();
    let first = |buffer: &quantkv::cuda::CudaBuffer<f32>| {
        let mut value = [0.0f32];
        cuda.download(buffer, &mut value).unwrap();
        value[0]
    };
    assert_eq!((first(&recorded), first(&direct)), (0.0, 11.0), "recorded work has not run, other work has");
    for replays in 1..=3 {
        // SAFETY: a graph of this backend; its buffers are alive.
        unsafe { cuda.replay(&mut graph) }.unwrap();
        assert_eq!((first(&recorded), first(&direct)), (2.0 * replays as f32, 11.0));
    }
    // An error inside ends the recording, and so does a recording inside.
    let nested = cuda.record(&mut || cuda.record(&mut || Ok(())).map(drop));
    assert!(matches!(nested, Err(Error::InCapture { .. })), "{nested:?}");
    add(&mut direct, &one).unwrap();
    assert_eq!(first(&direct), 12.0, "nothing is recorded any more");
}

type Texts = Vec<Vec<Vec<u32>>>;

/// All tokens of `requests` on `backend`, and what it took.
fn engine_run<B: Compute>(backend: Arc<B>, config: EngineConfig, requests: &[Request]) -> (Texts, Stats) {
    let mut model: Model<B> = Model::load(&fixtures::fixture_path(MICRO), backend).unwrap();
    let scales = resolve(model.config(), model.weights(), config.format, ScaleSource::Checkpoint).unwrap();
    let mut engine = Engine::new(&mut model, None, config, &scales).unwrap();
    let numbers: Vec<usize> = requests.iter().map(|request| engine.add_request(request.clone()).unwrap()).collect();
    engine.run(|_| ()).unwrap();
    assert_eq!(engine.blocks_in_use(), 0);
    let texts = numbers
        .iter()
        .map(|number| engine.outputs(*number).unwrap().iter().map(|output| output.token_ids.clone()).collect());
    (texts.collect(), engine.stats())
}

/// Shared prompts that split by copies, blocks that run out, sequences swapped to host memory and back: the CPU's
/// tokens, greedy and sampled.
#[test]
fn the_engine_under_pressure_gives_the_cpus_tokens() {
    let Some(cuda) = cuda() else { return };
    let count = if devices::emulated() { 12 } else { 48 };
    let sampling = SamplingParams { temperature: 0.8, top_k: 20, seed: 5, ..SamplingParams::default() };
    let sampled = Request { n: 3, sampling, ..Request::greedy(tokens(50, 21, 512), count) };
    let greedy = |seed| Request { n: 2, ..Request::greedy(tokens(seed, 30, 512), count) };
    let requests = [greedy(51), sampled, greedy(52), Request::greedy(tokens(51, 30, 512), count)];
    let blocks = if devices::emulated() { 12 } else { 20 };
    let config = EngineConfig { block_size: 8, max_prefill_tokens: 16, ..EngineConfig::new(KvFormat::F32, blocks) };
    let (want, _) = engine_run(Arc::new(CpuBackend::new()), config, &requests);
    for graphs in [true, false] {
        let (got, stats) = engine_run(with_graphs(&cuda, graphs), config, &requests);
        assert_eq!(got, want, "graphs: {graphs}");
        assert!(stats.blocks_copied > 0 && stats.blocks_swapped_in > 0, "there was no pressure: {stats:?}");
    }
}

/// Every weight of a model is the CPU's, so that a shape measured here can be looked at there.
#[test]
fn random_weights_are_the_cpus_bits() {
    let Some(cuda) = cuda() else { return };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let matrix = RandomMatrix { rows: 37, cols: 129, dtype, seed: 77, deviation: 0.05 };
        let rows = |ids: &mut Vec<i32>| ids.extend(0..37);
        let mut ids = Vec::new();
        rows(&mut ids);
        let on_cpu = {
            let cpu = CpuBackend::new();
            let table = Compute::<f32>::random_matrix(&cpu, &matrix).unwrap();
            let mut out = vec![0.0f32; 37 * 129];
            cpu.embed(&table, &ids, 37, &mut out).unwrap();
            out
        };
        let table = Compute::<f32>::random_matrix(&cuda, &matrix).unwrap();
        let mut device_ids = cuda.zeros("ids", 37).unwrap();
        cuda.upload(&ids, &mut device_ids).unwrap();
        let mut out = cuda.zeros::<f32>("out", 37 * 129).unwrap();
        cuda.embed(&table, &device_ids, 37, &mut out).unwrap();
        let mut values = vec![0.0f32; 37 * 129];
        cuda.download(&out, &mut values).unwrap();
        assert!(values == on_cpu, "{dtype}");

        // Ids outside the table read as zeros.
        cuda.upload(&[-1, 37, i32::MAX, i32::MIN], &mut device_ids).unwrap();
        cuda.embed(&table, &device_ids, 4, &mut out).unwrap();
        cuda.download(&out, &mut values[..4 * 129]).unwrap();
        assert!(values[..4 * 129].iter().all(|x| *x == 0.0), "{dtype}");
    }
}

/// A random model of a micro shape runs in every activation type and says the same as on the CPU, to the types'
/// rounding.
#[test]
fn a_random_model_computes_what_the_cpu_computes() {
    let Some(cuda) = cuda() else { return };
    let config = Config::from_dir(&fixtures::fixture_path("arch/qwen3")).unwrap();
    let prompt = tokens(9, 20, config.vocab_size);
    let cpu = logits_of::<_, f32>(Arc::new(CpuBackend::new()), &config, &prompt);
    let cuda = with_graphs(&cuda, true);
    let largest = cpu.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    for (name, got, tolerance) in [
        ("f32", logits_of::<_, f32>(cuda.clone(), &config, &prompt), 1e-4),
        ("f16", logits_of::<_, half::f16>(cuda.clone(), &config, &prompt), 2e-2),
        ("bf16", logits_of::<_, bf16>(cuda, &config, &prompt), 1e-1),
    ] {
        let worst = got.iter().zip(&cpu).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        println!("{name}: logits up to {largest} differ by {worst}");
        assert!(worst <= tolerance * largest, "{name}: {worst} of {largest}");
    }
}

fn logits_of<B: Compute<A>, A: Element>(backend: Arc<B>, config: &Config, prompt: &[u32]) -> Vec<f32> {
    let mut model: Model<B, A> = Model::random(config.clone(), 3, backend.clone()).unwrap();
    let spec = model.cache_spec(16, KvFormat::F32).unwrap();
    let mut cache = PagedKvCache::new(backend, spec, 4, &vec![LayerScales::one(); config.num_layers]).unwrap();
    let mut batch = Batch::new();
    batch.push_sequence(prompt, 0, &[2, 0], 16, WantedLogits::All).unwrap();
    model.forward(&batch, &mut cache).unwrap().to_vec()
}
