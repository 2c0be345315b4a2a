//! The engine must not change what is generated: batched or alone, whatever the chunk, with
//! shared blocks or without, preempted or not, every request gives the same tokens. The golden
//! tokens of transformers are the truth for greedy runs; the unpressed engine is it for seeded ones.

#[path = "../testing/fixtures.rs"]
mod fixtures;

use std::path::PathBuf;
use std::sync::Arc;

use quantkv::decoder::engine::{Engine, EngineConfig, FinishReason, Output, Request, Stats};
use quantkv::decoder::kv_scales::{KvScales, ScaleSource, resolve};
use quantkv::decoder::sampling::SamplingParams;
use quantkv::decoder::tokenizer::Tokenizer;
use quantkv::decoder::{Config, Model};
use quantkv::scale::LayerScales;
use quantkv::{CpuBackend, KvFormat};
use serde_json::Value;

fn micro() -> PathBuf {
    fixtures::fixture_path("micro/llmcompressor-tiny-f32")
}

fn model() -> Model<CpuBackend> {
    Model::load(&micro(), Arc::new(CpuBackend::new())).unwrap()
}

fn golden() -> Value {
    serde_json::from_str(&std::fs::read_to_string(micro().join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn prompts() -> Vec<Vec<u32>> {
    golden()["ids"].as_array().unwrap().iter().map(ids).collect()
}

fn scales(model: &Model<CpuBackend>, format: KvFormat, source: ScaleSource<'_>) -> KvScales {
    resolve(model.config(), model.weights(), format, source).unwrap()
}

/// A cache with room for everything.
fn roomy() -> EngineConfig {
    EngineConfig::new(KvFormat::Fp8E4M3, 256)
}

/// Runs `requests` with the checkpoint's scales.
fn run(config: EngineConfig, requests: &[Request]) -> (Vec<Vec<Output>>, Stats) {
    let mut model = model();
    let scales = scales(&model, config.format, ScaleSource::Checkpoint);
    let tokenizer = Arc::new(Tokenizer::from_model_dir(&micro()).unwrap());
    let mut engine = Engine::new(&mut model, Some(tokenizer), config, &scales).unwrap();
    let numbers: Vec<usize> = requests.iter().map(|r| engine.add_request(r.clone()).unwrap()).collect();
    let mut streamed: Vec<Vec<(Vec<u32>, String)>> = requests.iter().map(|r| vec![Default::default(); r.n]).collect();
    engine
        .run(|event| {
            let stream = &mut streamed[event.request][event.sample];
            stream.0.push(event.token);
            stream.1.push_str(event.text);
        })
        .unwrap();
    assert_eq!(engine.blocks_in_use(), 0, "all blocks are given back");
    let outputs: Vec<Vec<Output>> = numbers.iter().map(|n| engine.outputs(*n).unwrap().to_vec()).collect();
    for (outputs, streamed) in outputs.iter().zip(&streamed) {
        for (output, (tokens, text)) in outputs.iter().zip(streamed) {
            assert_eq!((&output.token_ids, &output.text), (tokens, text), "what is streamed is the output");
            assert!(output.finish_reason.is_some());
        }
    }
    (outputs, engine.stats())
}

fn tokens(outputs: &[Vec<Output>]) -> Vec<Vec<Vec<u32>>> {
    outputs.iter().map(|samples| samples.iter().map(|s| s.token_ids.clone()).collect()).collect()
}

fn greedy_requests() -> Vec<Request> {
    prompts().into_iter().map(|prompt| Request::greedy(prompt, 24)).collect()
}

fn golden_tokens(mode: &str) -> Vec<Vec<Vec<u32>>> {
    golden()["modes"][mode].as_array().unwrap().iter().map(|case| vec![ids(&case["new_ids"])]).collect()
}

fn seeded(prompt: Vec<u32>, n: usize, seed: u64) -> Request {
    let sampling = SamplingParams { temperature: 1.2, top_k: 50, seed, ..SamplingParams::default() };
    Request { n, sampling, ..Request::greedy(prompt, 40) }
}

/// Two samples each of three prompts: 40 new tokens, forks, several blocks a sequence.
fn seeded_requests() -> Vec<Request> {
    prompts().into_iter().take(3).enumerate().map(|(i, prompt)| seeded(prompt, 2, i as u64)).collect()
}

#[test]
fn batched_greedy_tokens_are_the_golden_ones() {
    let (outputs, stats) = run(roomy(), &greedy_requests());
    assert_eq!(tokens(&outputs), golden_tokens("e4m3_cal"));
    assert!(outputs.iter().flatten().all(|o| o.finish_reason == Some(FinishReason::Length)));
    let prompt_tokens: usize = prompts().iter().map(Vec::len).sum();
    assert_eq!(stats.prefill_tokens, prompt_tokens);
    // The first of 24 tokens comes from the prompt, the last one is not computed.
    assert_eq!(stats.decode_tokens, 5 * 23);
    assert_eq!((stats.blocks_copied, stats.blocks_swapped_out, stats.recomputed), (0, 0, 0));
}

#[test]
fn every_kv_mode_alone_and_batched() {
    for (mode, format) in [
        ("none", KvFormat::F32),
        ("e4m3_cal", KvFormat::Fp8E4M3),
        ("e4m3_one", KvFormat::Fp8E4M3),
        ("e5m2_one", KvFormat::Fp8E5M2),
    ] {
        let golden = golden_tokens(mode);
        let mut model = model();
        let mut scales = scales(&model, format, ScaleSource::Checkpoint);
        if mode == "e4m3_one" {
            scales.layers = vec![LayerScales::one(); 4];
        }
        let config = EngineConfig { format, ..roomy() };
        for (request, expected) in greedy_requests().into_iter().zip(&golden) {
            let mut engine = Engine::new(&mut model, None, config, &scales).unwrap();
            engine.add_request(request).unwrap();
            engine.run(|_| ()).unwrap();
            assert_eq!(engine.outputs(0).unwrap()[0].token_ids, expected[0], "{mode}");
        }
        let mut engine = Engine::new(&mut model, None, config, &scales).unwrap();
        for request in greedy_requests() {
            engine.add_request(request).unwrap();
        }
        engine.run(|_| ()).unwrap();
        for (number, expected) in golden.iter().enumerate() {
            assert_eq!(engine.outputs(number).unwrap()[0].token_ids, expected[0], "{mode}, batched");
        }
    }
}

#[test]
fn first_batch_scales_are_the_golden_ones() {
    let golden = golden();
    for (index, request) in greedy_requests().into_iter().enumerate() {
        let mut model = model();
        let scales = scales(&model, KvFormat::Fp8E4M3, ScaleSource::FirstBatch);
        let mut engine = Engine::new(&mut model, None, roomy(), &scales).unwrap();
        engine.add_request(request).unwrap();
        // Others in the queue do not take part in the first forward pass.
        engine.add_request(Request::greedy(vec![0, 300, 301, 302], 4)).unwrap();
        engine.run(|_| ()).unwrap();
        let case = &golden["modes"]["e4m3_fly"][index];
        assert_eq!(engine.outputs(0).unwrap()[0].token_ids, ids(&case["new_ids"]));
        for layer in 0..4 {
            let expected = &case["fly_scales"][layer.to_string()];
            let got = engine.cache().scales(layer).unwrap();
            for (got, expected) in [(got.k.get(0, 0), &expected[0]), (got.v.get(0, 0), &expected[1])] {
                let expected = expected.as_f64().unwrap();
                // Before the first attention sums differ in their order only. After it there is a
                // trap in the rule itself: the largest key divided by its scale is 200, the
                // largest value 100, both half-way between two codes, so the last bit of a sum
                // decides which one, 4 % apart. What follows moves by that at most.
                let tolerance = if layer == 0 { 1e-5 } else { 0.04 };
                assert!((f64::from(got) - expected).abs() <= tolerance * expected, "layer {layer}: {got} {expected}");
            }
        }
    }
}

#[test]
fn chunk_and_block_sizes_do_not_matter() {
    let golden = golden_tokens("e4m3_cal");
    for (max_prefill_tokens, block_size) in [(1, 8), (7, 16), (16, 32), (64, 256)] {
        let config = EngineConfig { max_prefill_tokens, block_size, ..roomy() };
        assert_eq!(tokens(&run(config, &greedy_requests()).0), golden, "chunks of {max_prefill_tokens}");
    }
}

#[test]
fn few_sequences_at_once_do_not_matter() {
    let config = EngineConfig { max_num_seqs: 1, ..roomy() };
    assert_eq!(tokens(&run(config, &greedy_requests()).0), golden_tokens("e4m3_cal"));
}

#[test]
fn equal_beginnings_share_blocks() {
    let long = prompts()[3].clone();
    let mut other = long.clone();
    other.truncate(100);
    other.push(300);
    let requests: Vec<Request> =
        [long.clone(), other, long].into_iter().map(|prompt| Request::greedy(prompt, 24)).collect();
    let (alone, stats) = run(EngineConfig { prefix_sharing: false, ..roomy() }, &requests);
    assert_eq!((stats.shared_tokens, stats.prefill_tokens), (0, 150 + 101 + 150));
    let (shared, stats) = run(roomy(), &requests);
    assert_eq!(tokens(&shared), tokens(&alone));
    // Whole blocks of 16: 6 of 100 tokens, 9 of 149 (the last token is computed always).
    assert_eq!(stats.shared_tokens, 96 + 144);
    assert_eq!(stats.prefill_tokens, 150 + 101 + 150 - stats.shared_tokens);
}

#[test]
fn blocks_of_ended_requests_are_found_by_later_ones() {
    let mut model = model();
    let scales = scales(&model, KvFormat::Fp8E4M3, ScaleSource::Checkpoint);
    let mut engine = Engine::new(&mut model, None, roomy(), &scales).unwrap();
    for expected_shared in [0, 144] {
        let number = engine.add_request(Request::greedy(prompts()[3].clone(), 24)).unwrap();
        engine.run(|_| ()).unwrap();
        assert_eq!(engine.outputs(number).unwrap()[0].token_ids, golden_tokens("e4m3_cal")[3][0]);
        assert_eq!(engine.stats().shared_tokens, expected_shared);
    }
}

#[test]
fn parallel_samples_share_the_prompt_and_copy_on_write() {
    let request = seeded(prompts()[0].clone(), 4, 9);
    let (outputs, stats) = run(roomy(), std::slice::from_ref(&request));
    assert_eq!(stats.prefill_tokens, 9, "the prompt is computed once");
    // Nine tokens leave the block partly filled: all samples but the last to write copy it.
    assert_eq!(stats.blocks_copied, 3);
    let samples = tokens(&outputs).remove(0);
    assert!((1..4).all(|i| samples[i] != samples[0]), "samples draw from streams of their own");
    let one = Request { n: 1, ..request.clone() };
    assert_eq!(tokens(&run(roomy(), &[one]).0)[0][0], samples[0], "sample 0 does not depend on n");
    assert_eq!(tokens(&run(roomy(), &[request]).0)[0], samples, "the same seed repeats");
}

#[test]
fn greedy_samples_of_one_prompt_are_all_golden() {
    let request = Request { n: 3, ..Request::greedy(prompts()[0].clone(), 24) };
    let golden = golden_tokens("e4m3_cal")[0][0].clone();
    assert_eq!(tokens(&run(roomy(), &[request]).0)[0], vec![golden; 3]);
}

#[test]
fn preempted_greedy_runs_are_golden() {
    // The longest request needs 11 blocks of 16; all five together 20.
    for num_blocks in [11, 12, 13, 15] {
        let config = EngineConfig { num_blocks, swap_blocks: 64, ..roomy() };
        let (outputs, stats) = run(config, &greedy_requests());
        assert_eq!(tokens(&outputs), golden_tokens("e4m3_cal"), "{num_blocks} blocks");
        assert!(stats.blocks_peak <= num_blocks);
        assert_eq!(stats.blocks_swapped_in, stats.blocks_swapped_out);
        assert_eq!(stats.recomputed, 0);
    }
}

#[test]
fn preempted_seeded_runs_are_those_with_room() {
    let requests = seeded_requests();
    let expected = tokens(&run(roomy(), &requests).0);
    for (num_blocks, swap_blocks) in [(7, 64), (9, 64), (9, 5), (7, 0)] {
        for prefix_sharing in [true, false] {
            let config = EngineConfig { num_blocks, swap_blocks, block_size: 8, prefix_sharing, ..roomy() };
            let (outputs, stats) = run(config, &requests);
            let case = format!("{num_blocks} blocks, {swap_blocks} in host memory, sharing {prefix_sharing}");
            assert_eq!(tokens(&outputs), expected, "{case}");
            assert_eq!(stats.blocks_swapped_in, stats.blocks_swapped_out, "{case}");
            assert_eq!(stats.blocks_swapped_out > 0, swap_blocks > 0, "{case}");
            assert_eq!(stats.recomputed > 0, swap_blocks < 64, "{case}");
            assert!(stats.blocks_copied > 0 && stats.blocks_peak <= num_blocks, "{case}");
        }
    }
}

#[test]
fn a_preempted_prefill_goes_on_where_it_was() {
    // Chunks of 16 of a long prompt compete with decoding sequences for 12 blocks of 16.
    let mut requests = seeded_requests();
    requests.push(Request::greedy(prompts()[3].clone(), 24));
    let expected = tokens(&run(roomy(), &requests).0);
    let config = EngineConfig { num_blocks: 12, max_prefill_tokens: 16, swap_blocks: 64, ..roomy() };
    let (outputs, stats) = run(config, &requests);
    assert_eq!(tokens(&outputs), expected);
    assert!(stats.blocks_swapped_out > 0);
}

#[test]
fn eos_and_stop_texts_end_a_sample() {
    let golden = golden_tokens("e4m3_cal")[0][0].clone();
    let prompt = prompts()[0].clone();
    let base = Request::greedy(prompt, 24);
    // The token that is first seen at place 5, as EOS: it ends the tokens, and is not in the text.
    let at = (0..24).find(|&i| i >= 5 && !golden[..i].contains(&golden[i])).unwrap();
    let eos = Request { eos_token_ids: vec![511, golden[at]], ..base.clone() };
    let eos = Request {
        eos_token_ids: eos.eos_token_ids.into_iter().filter(|id| !golden[..at].contains(id)).collect(),
        ..eos
    };
    let (outputs, _) = run(roomy(), &[base.clone(), eos]);
    let (whole, ended) = (&outputs[0][0], &outputs[1][0]);
    assert_eq!(ended.token_ids, golden[..=at]);
    assert_eq!(ended.finish_reason, Some(FinishReason::Stop));
    assert!(whole.text.starts_with(ended.text.trim_end_matches('\u{FFFD}')) && ended.text.len() < whole.text.len());

    // A stop text in the middle of what is generated.
    let middle: String = whole.text.chars().skip(6).take(3).collect();
    let before = &whole.text[..whole.text.find(&middle).unwrap()];
    let (outputs, _) = run(roomy(), &[Request { stop: vec!["never".into(), middle.clone()], ..base }]);
    assert_eq!(outputs[0][0].text, before, "stop text {middle:?}");
    assert_eq!(outputs[0][0].finish_reason, Some(FinishReason::Stop));
    assert!(outputs[0][0].token_ids.len() < 24);
}

#[test]
fn positions_end_a_sample() {
    let positions = Config::from_dir(&micro()).unwrap().max_position_embeddings;
    let prompt: Vec<u32> = prompts()[3].iter().copied().cycle().take(positions - 3).collect();
    let (outputs, _) = run(roomy(), &[Request::greedy(prompt, 100)]);
    assert_eq!(outputs[0][0].token_ids.len(), 3);
    assert_eq!(outputs[0][0].finish_reason, Some(FinishReason::Length));
}

#[test]
fn requests_that_cannot_be_served_are_refused() {
    let mut model = model();
    let scales = scales(&model, KvFormat::Fp8E4M3, ScaleSource::Checkpoint);
    let config = EngineConfig { num_blocks: 3, ..roomy() };
    let mut engine = Engine::new(&mut model, None, config, &scales).unwrap();
    let ok = Request::greedy(vec![0, 300], 47);
    let cases = [
        (Request { max_tokens: 48, ..ok.clone() }, "need 4 blocks of 16 tokens; the cache has 3"),
        (Request { prompt: vec![], ..ok.clone() }, "no tokens"),
        (Request { prompt: vec![0, 512], ..ok.clone() }, "token id 512"),
        (Request { prompt: vec![1; 512], ..ok.clone() }, "512 positions"),
        (Request { max_tokens: 0, ..ok.clone() }, "must not be zero"),
        (Request { n: 0, ..ok.clone() }, "must not be zero"),
        (Request { n: usize::MAX, ..ok.clone() }, "the most are 4096"),
        (Request { stop: vec!["x".into()], ..ok.clone() }, "tokenizer"),
        (Request { stop: vec![String::new()], ..ok.clone() }, "must not be empty"),
    ];
    for (request, expected) in cases {
        let error = engine.add_request(request).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    }
    let hot = SamplingParams { temperature: f32::NAN, ..SamplingParams::default() };
    assert!(engine.add_request(Request { sampling: hot, ..ok.clone() }).is_err());
    assert!(engine.outputs(0).is_err(), "a refused request has no number");
    // The largest that fits, in all three blocks.
    engine.add_request(ok).unwrap();
    engine.run(|_| ()).unwrap();
    assert_eq!(engine.outputs(0).unwrap()[0].token_ids.len(), 47);
    assert_eq!(engine.stats().blocks_peak, 3);
}

#[test]
fn engines_of_no_size_are_refused() {
    let mut model = model();
    let scales = scales(&model, KvFormat::Fp8E4M3, ScaleSource::Checkpoint);
    for config in [
        EngineConfig { num_blocks: 0, ..roomy() },
        EngineConfig { block_size: 0, ..roomy() },
        EngineConfig { block_size: 24, ..roomy() },
        EngineConfig { max_prefill_tokens: 0, ..roomy() },
        EngineConfig { max_num_seqs: 0, ..roomy() },
        EngineConfig { num_blocks: usize::MAX, ..roomy() },
    ] {
        assert!(Engine::new(&mut model, None, config, &scales).is_err(), "{config:?}");
    }
}

/// Random requests in random caches: any mix of chunks, forks, shared beginnings, swaps and
/// recomputation gives what a roomy cache gives, and gives all blocks back.
#[test]
fn random_pressure_changes_nothing() {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let text = prompts()[3].clone();
    let (mut swapped, mut recomputed, mut copied, mut shared) = (0, 0, 0, 0);
    for case in 0..40 {
        let requests: Vec<Request> = (0..rng.random_range(1..6))
            .map(|i| {
                let start = rng.random_range(0..3) * 8;
                let prompt = text[start..start + rng.random_range(1..60)].to_vec();
                let max_tokens = rng.random_range(1..40);
                Request { max_tokens, ..seeded(prompt, rng.random_range(1..4), i) }
            })
            .collect();
        let expected = tokens(&run(roomy(), &requests).0);
        let largest = requests.iter().map(|r| (r.prompt.len() + r.max_tokens - 1).div_ceil(8)).max().unwrap();
        let config = EngineConfig {
            block_size: 8,
            num_blocks: largest + rng.random_range(0..6),
            swap_blocks: rng.random_range(0..3) * 8,
            max_prefill_tokens: rng.random_range(1..40),
            max_num_seqs: rng.random_range(1..6),
            prefix_sharing: rng.random_range(0..2) == 1,
            ..roomy()
        };
        let (outputs, stats) = run(config, &requests);
        assert_eq!(tokens(&outputs), expected, "case {case}: {config:?}");
        assert_eq!(stats.blocks_swapped_in, stats.blocks_swapped_out, "case {case}");
        swapped += stats.blocks_swapped_out;
        recomputed += stats.recomputed;
        copied += stats.blocks_copied;
        shared += stats.shared_tokens;
    }
    assert!(swapped > 0 && recomputed > 0 && copied > 0 && shared > 0, "{swapped} {recomputed} {copied} {shared}");
}
