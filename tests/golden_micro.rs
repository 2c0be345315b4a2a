//! The decoder over quantized caches, against torch: real LLM Compressor checkpoints, five prompts,
//! 24 greedy tokens each. Goldens: transformers 5.17 with an explicit f32 quantize-dequantize
//! cache in which every token, prefill included, is quantized before attention reads it.

mod decoder_support;
#[path = "../testing/devices.rs"]
mod devices;

use std::sync::Arc;

use decoder_support::{cache_for, fixture, golden_tensors, greedy, load, load_on, max_abs_diff};
use quantkv::checkpoint::kv_scales;
use quantkv::decoder::{Compute, Model};
use quantkv::scale::LayerScales;
use quantkv::{Backend, CacheLayout, CpuBackend, Element, KvFormat, PagedKvCache};
use serde_json::Value;

/// (mode, cache format, where scales come from)
const MODES: [(&str, KvFormat, Scales); 5] = [
    ("none", KvFormat::F32, Scales::One),
    ("e4m3_cal", KvFormat::Fp8E4M3, Scales::Checkpoint),
    ("e4m3_one", KvFormat::Fp8E4M3, Scales::One),
    ("e5m2_one", KvFormat::Fp8E5M2, Scales::One),
    ("e4m3_fly", KvFormat::Fp8E4M3, Scales::FirstStep),
];

#[derive(Clone, Copy, PartialEq)]
enum Scales {
    One,
    Checkpoint,
    FirstStep,
}

fn golden_json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap()
}

fn numbers<T: TryFrom<u64>>(value: &Value) -> Vec<T>
where
    T::Error: std::fmt::Debug,
{
    value.as_array().unwrap().iter().map(|x| T::try_from(x.as_u64().unwrap()).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn layer_scales<B: Compute<A>, A: Element>(model: &Model<B, A>, source: Scales) -> Vec<LayerScales> {
    match source {
        Scales::Checkpoint => kv_scales(model.weights(), model.config()).unwrap().unwrap(),
        Scales::One | Scales::FirstStep => vec![LayerScales::one(); model.config().num_layers],
    }
}

/// Tokens must be torch's, all of them. Logits agree to [`NO_FLIP`] as long as every K and V is
/// encoded to the same code. Where one lies within the two implementations' rounding of the midpoint
/// between two codes it is not, and a code is a step of 1/16 (E5M2: 1/8). That befalls a code or
/// none in a prompt of thousands of them, and it befalls this implementation alone when an epsilon
/// changes by an ulp; a wrong scale, format or rounding would befall every prompt.
#[test]
fn f32_tokens_are_exactly_those_of_torch() {
    let layouts = [(CacheLayout::Hnd, 16), (CacheLayout::Nhd, 8), (CacheLayout::VllmPacked, 16)];
    check_f32(&Arc::new(CpuBackend::new()), &layouts, 5);
}

#[test]
fn f32_tokens_are_exactly_those_of_torch_on_cuda() {
    if let Some(cuda) = devices::cuda() {
        let layouts = [(CacheLayout::Hnd, 16), (CacheLayout::Nhd, 8), (CacheLayout::VllmPacked, 16)];
        // Two prompts in one layout where all of it would take minutes.
        let (layouts, prompts) = if devices::emulated() { (&layouts[..1], 2) } else { (&layouts[..], 5) };
        on_device!(&cuda, move |backend| check_f32(&backend, layouts, prompts));
    }
}

/// The first `prompts` of the golden five in every mode and these (layout, block size).
fn check_f32<B: Compute>(backend: &Arc<B>, layouts: &[(CacheLayout, usize)], prompts: usize) {
    let name = "micro/llmcompressor-tiny-f32";
    let (json, tensors) = (golden_json(name), golden_tensors(&fixture(name).join("golden.safetensors")));
    let mut model: Model<B> = load_on(&fixture(name), backend);
    for (mode, format, source) in MODES {
        for &(layout, block_size) in layouts {
            let mut worst = Vec::new();
            for (i, prompt) in json["ids"].as_array().unwrap().iter().enumerate().take(prompts) {
                let golden = &json["modes"][mode][i];
                let prompt: Vec<u32> = numbers(prompt);
                let spec = model.cache_spec(block_size, format).unwrap().with_layout(layout).unwrap();
                let scales = layer_scales(&model, source);
                let (mut cache, table) = cache_for(&model, spec, &scales, prompt.len() + 24);
                if source == Scales::FirstStep {
                    model.scales_from_next_step();
                }
                let run = greedy(&mut model, &mut cache, &table, &prompt, prompt.len(), 24);
                let case = format!("{mode}, prompt {i}, {layout:?}");
                let want_tokens: Vec<u32> = numbers(&golden["new_ids"]);
                if source == Scales::FirstStep && backend.name() != "cpu" {
                    // absmax / 200 puts the largest K on the midpoint between two codes: an ulp of the products,
                    // which sum in another order here, decides between them, and the later layers' maxima follow.
                    assert_eq!(run.tokens[0], want_tokens[0], "{case}");
                    continue;
                }
                assert_eq!(run.tokens, want_tokens, "{case}");
                let want = &tensors[&format!("{mode}.{i}.prefill_logits")];
                // Of the long prompt the golden file keeps the last rows only.
                let got = &run.prefill_logits[run.prefill_logits.len() - want.len()..];
                let decode = max_abs_diff(&run.decode_logits, &tensors[&format!("{mode}.{i}.decode_logits")]);
                worst.push(max_abs_diff(got, want).max(decode));
                if source == Scales::FirstStep {
                    check_first_step_scales(&cache, &golden["fly_scales"], &case);
                }
            }
            println!("{mode}, {layout:?}: logits of each prompt differ by {worst:?}");
            let unflipped = worst.iter().filter(|worst| **worst < NO_FLIP).count();
            let (need_unflipped, flipped) = match (mode, source) {
                ("none", _) => (prompts, 0.0),
                (_, Scales::FirstStep) => (0, FIRST_STEP_FLIP),
                _ => (prompts.saturating_sub(2), FLIP),
            };
            assert!(unflipped >= need_unflipped, "{mode}, {layout:?}: {worst:?}");
            assert!(worst.iter().all(|worst| *worst < NO_FLIP.max(flipped)), "{mode}, {layout:?}: {worst:?}");
        }
    }
    assert!(model.backend().faults().unwrap().is_empty());
}

/// Two f32 implementations with sums in another order.
const NO_FLIP: f32 = 1e-4;
/// A code or two of thousands that went the other way.
const FLIP: f32 = 2e-2;
/// `absmax / 200` puts the largest K, and `absmax / 100` the largest V, exactly on the midpoint
/// between two E4M3 codes (192 and 208; 96 and 104): which way it goes is the last ulp of the
/// maximum, so in every layer the most influential code may differ by a step.
const FIRST_STEP_FLIP: f32 = 1.0;

/// The scales of the first layer, which no flip can reach, to the activations' rounding; of the
/// others to a flipped code's influence.
fn check_first_step_scales<B: Backend>(cache: &PagedKvCache<B>, golden: &Value, case: &str) {
    for layer in 0..cache.num_layers() {
        let tolerance = if layer == 0 { 2e-6 } else { 2e-2 };
        let want = floats(&golden[layer.to_string()]);
        let got = cache.scales(layer).unwrap();
        for (got, want) in [(got.k.values()[0], want[0]), (got.v.values()[0], want[1])] {
            assert!((got - want).abs() <= tolerance * want, "{case}, layer {layer}: {got} {want}");
        }
    }
}

/// bf16 goldens round every activation to bf16 and we do not: logits differ by noise, more under a
/// quantized cache, where it flips codes (measured rms: 0.055 unquantized, 0.20 E4M3, 0.25 E5M2).
/// Tokens must agree until torch's own margin is within four sigma of the difference of two logits.
#[test]
fn bf16_tokens_agree_where_margins_allow() {
    check_bf16::<_, f32>(&Arc::new(CpuBackend::new()), &BF16_MODELS, 1.0, 5);
}

/// Here activations are bf16 on both sides, rounded at other places: the noises of two such implementations
/// add up.
#[cfg(feature = "cuda")]
#[test]
fn bf16_tokens_agree_where_margins_allow_on_cuda() {
    if let Some(devices::Device::Cuda(cuda)) = devices::cuda() {
        // Two prompts of one model where all of it would take minutes.
        let (models, prompts) = if devices::emulated() { (&BF16_MODELS[..1], 2) } else { (&BF16_MODELS[..], 5) };
        check_bf16::<_, half::bf16>(&cuda, models, 2f64.sqrt(), prompts);
    }
}

const BF16_MODELS: [&str; 2] = ["micro/llmcompressor-tiny", "micro/llmcompressor-tiny-kvhead"];

/// `noises`: how many times the noise above is allowed.
fn check_bf16<B: Compute<A>, A: Element>(backend: &Arc<B>, models: &[&str], noises: f64, prompts: usize) {
    for &name in models {
        let (json, tensors) = (golden_json(name), golden_tensors(&fixture(name).join("golden.safetensors")));
        let mut model: Model<B, A> = load_on(&fixture(name), backend);
        assert_eq!(model.dtype(), quantkv::DType::BF16);
        for (mode, format, source) in MODES {
            let noise = noises
                * match format {
                    KvFormat::Fp8E5M2 => 0.35,
                    KvFormat::Fp8E4M3 => 0.25,
                    _ => 0.08,
                };
            let largest_tie = 4.0 * 2f32.sqrt() * noise as f32;
            let (mut compared, mut square, mut count) = (0, 0.0f64, 0usize);
            for (i, prompt) in json["ids"].as_array().unwrap().iter().enumerate().take(prompts) {
                let golden = &json["modes"][mode][i];
                let prompt: Vec<u32> = numbers(prompt);
                let spec = model.cache_spec(16, format).unwrap();
                let (mut cache, table) = cache_for(&model, spec, &layer_scales(&model, source), prompt.len() + 24);
                if source == Scales::FirstStep {
                    model.scales_from_next_step();
                }
                let run = greedy(&mut model, &mut cache, &table, &prompt, prompt.len(), 24);
                let want = &tensors[&format!("{mode}.{i}.prefill_logits")];
                let got = &run.prefill_logits[run.prefill_logits.len() - want.len()..];
                square += got.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                count += want.len();
                let want: Vec<u32> = numbers(&golden["new_ids"]);
                for ((got, want), margin) in run.tokens.iter().zip(&want).zip(floats(&golden["margins"])) {
                    if got != want {
                        assert!(
                            margin < largest_tie,
                            "{name} {mode}, prompt {i}: {got} for {want} with margin {margin}"
                        );
                        break;
                    }
                    compared += 1;
                }
            }
            let rms = (square / count as f64).sqrt();
            let of = 24 * prompts;
            println!("{name} {mode}: rms logit difference {rms:.4}, {compared} tokens of {of} before a near tie");
            assert!(rms < noise, "{name} {mode}: rms {rms}");
            assert!(compared > 4 * prompts, "{name} {mode}: only {compared} tokens compared");
        }
    }
}

#[test]
fn checkpoint_scales_are_read_in_every_shape() {
    for name in ["micro/llmcompressor-tiny-f32", "micro/llmcompressor-tiny", "micro/llmcompressor-tiny-kvhead"] {
        let json = golden_json(name);
        let model = load(&fixture(name));
        let scales = kv_scales(model.weights(), model.config()).unwrap().unwrap();
        for (layer, scales) in scales.iter().enumerate() {
            assert_eq!(scales.k.values(), floats(&json["k_scale"][layer]), "{name} layer {layer}");
            assert_eq!(scales.v.values(), floats(&json["v_scale"][layer]), "{name} layer {layer}");
        }
        let heads = if name.ends_with("kvhead") { 2 } else { 1 };
        assert_eq!(scales[0].k.values().len(), heads);
    }
    // Zero points and query scales beside them are ignored.
    let model = load(&fixture("micro/llmcompressor-tiny-attn-tensor"));
    assert_eq!(kv_scales(model.weights(), model.config()).unwrap().unwrap().len(), 4);
    // A checkpoint without scales.
    let model = load(&fixture("arch/llama-default"));
    assert_eq!(kv_scales(model.weights(), model.config()).unwrap(), None);
}
