//! Sampling against a numpy re-implementation of vLLM's documented order: which tokens stay, with
//! which probabilities; then that draws follow those probabilities and repeat with their seed.

#[path = "../testing/fixtures.rs"]
mod fixtures;

use quantkv::decoder::sampling::{Sampler, SamplingParams, distribution};
use serde_json::Value;

struct Golden {
    logits: Vec<f32>,
    history: Vec<u32>,
    prompt_len: usize,
    greedy: u32,
    cases: Vec<Value>,
}

fn golden() -> Golden {
    let path = fixtures::fixture_path("sampling/sampling_golden.json");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let floats = |v: &Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    Golden {
        logits: floats(&json["logits"]),
        history: json["history"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect(),
        prompt_len: json["n_prompt"].as_u64().unwrap() as usize,
        greedy: json["greedy"].as_u64().unwrap() as u32,
        cases: json["cases"].as_array().unwrap().clone(),
    }
}

fn params(case: &Value) -> SamplingParams {
    let p = &case["params"];
    let number = |name: &str, default: f64| p.get(name).map_or(default, |v| v.as_f64().unwrap()) as f32;
    SamplingParams {
        temperature: number("temperature", 1.0),
        top_k: number("top_k", 0.0) as usize,
        top_p: number("top_p", 1.0),
        min_p: number("min_p", 0.0),
        repetition_penalty: number("repetition_penalty", 1.0),
        frequency_penalty: number("frequency_penalty", 0.0),
        presence_penalty: number("presence_penalty", 0.0),
        seed: 0,
    }
}

#[test]
fn keeps_the_golden_sets_with_the_golden_probabilities() {
    let golden = golden();
    assert_eq!(golden.cases.len(), 20);
    for case in &golden.cases {
        let params = params(case);
        let got = distribution(&params, &golden.logits, &golden.history, golden.prompt_len).unwrap();
        let kept: Vec<u64> = got.iter().map(|c| u64::from(c.id)).collect();
        let expected: Vec<u64> = case["vllm"]["kept"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect();
        assert_eq!(kept, expected, "{}", case["params"]);
        for candidate in &got {
            let want = case["vllm"]["probs"][candidate.id.to_string()].as_f64().unwrap();
            // Logits pass at most five f32 roundings, each of at most 2^-24 of |x| < 16, and an
            // error of a logit is the relative error of its probability (doubled: numerator, sum).
            let tolerance = want * 2.0 * 5.0 * 16.0 * 2f64.powi(-24);
            assert!((candidate.probability - want).abs() <= tolerance, "{} {candidate:?} {want}", case["params"]);
        }
    }
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_of_equals() {
    let golden = golden();
    let mut sampler = Sampler::new(SamplingParams::default(), 0).unwrap();
    let mut logits = golden.logits.clone();
    assert_eq!(sampler.sample(&mut logits, &[], 0).unwrap(), golden.greedy);
    assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0, f32::NAN], &[], 0).unwrap(), 1);
    // Penalties apply to greedy choices too: 4.087 / 1.1 < 4.0.
    let params = SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() };
    let mut sampler = Sampler::new(params, 0).unwrap();
    assert_eq!(sampler.sample(&mut logits, &[golden.greedy], 1).unwrap(), 13);
}

/// Pearson's statistic of `draws` against the golden probabilities of `case`, and its degrees of
/// freedom. Cells expecting fewer than five draws are merged.
fn chi_square(golden: &Golden, case: &Value, draws: usize) -> (f64, f64) {
    let params = SamplingParams { seed: 1234, ..params(case) };
    let mut sampler = Sampler::new(params, 0).unwrap();
    let mut counts = vec![0usize; golden.logits.len()];
    for _ in 0..draws {
        let id = sampler.sample(&mut golden.logits.clone(), &golden.history, golden.prompt_len).unwrap();
        counts[id as usize] += 1;
    }
    let (mut statistic, mut cells) = (0.0, 0.0);
    let (mut rest_seen, mut rest_expected) = (0.0, 0.0);
    for (id, &count) in counts.iter().enumerate() {
        let p = case["vllm"]["probs"].get(id.to_string()).map_or(0.0, |p| p.as_f64().unwrap());
        assert!(p > 0.0 || count == 0, "token {id} was drawn, it must not be");
        let expected = p * draws as f64;
        if expected < 5.0 {
            rest_seen += count as f64;
            rest_expected += expected;
            continue;
        }
        statistic += (count as f64 - expected).powi(2) / expected;
        cells += 1.0;
    }
    if rest_expected >= 5.0 {
        statistic += (rest_seen - rest_expected).powi(2) / rest_expected;
        cells += 1.0;
    }
    (statistic, cells - 1.0)
}

#[test]
fn draws_follow_the_distribution() {
    let golden = golden();
    for case in &golden.cases {
        let (statistic, freedom) = chi_square(&golden, case, 20_000);
        // Mean `freedom`, variance 2*freedom. Six standard deviations: the seed is fixed, so the
        // test is not flaky; a wrong distribution is off by hundreds.
        let limit = freedom + 6.0 * (2.0 * freedom).sqrt() + 1e-9;
        assert!(statistic <= limit, "{}: chi-square {statistic} with {freedom} degrees", case["params"]);
    }
}

#[test]
fn the_same_seed_repeats_and_samples_of_one_seed_differ() {
    let golden = golden();
    let draw = |seed, sample| -> Vec<u32> {
        let params = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, sample).unwrap();
        (0..64).map(|_| sampler.sample(&mut golden.logits.clone(), &[], 0).unwrap()).collect()
    };
    assert_eq!(draw(7, 0), draw(7, 0));
    assert_eq!(draw(7, 3), draw(7, 3));
    assert_ne!(draw(7, 0), draw(8, 0));
    assert_ne!(draw(7, 0), draw(7, 1));
}

#[test]
fn broken_logits_and_parameters_are_errors() {
    let mut greedy = Sampler::new(SamplingParams::default(), 0).unwrap();
    let warm = SamplingParams { temperature: 0.7, top_k: 3, top_p: 0.5, min_p: 0.1, ..SamplingParams::default() };
    let mut warm_sampler = Sampler::new(warm, 0).unwrap();
    for mut logits in [vec![], vec![f32::NAN; 4], vec![f32::NEG_INFINITY; 4]] {
        assert!(greedy.sample(&mut logits.clone(), &[], 0).is_err());
        assert!(warm_sampler.sample(&mut logits, &[9], 0).is_err());
    }
    assert_eq!(warm_sampler.sample(&mut [0.0, f32::INFINITY, 1.0], &[], 0).unwrap(), 1);
    assert_eq!(warm_sampler.sample(&mut [0.0, f32::NAN, 100.0], &[77], 0).unwrap(), 2);
    let base = SamplingParams::default();
    for bad in [
        SamplingParams { temperature: -1.0, ..base },
        SamplingParams { temperature: f32::NAN, ..base },
        SamplingParams { top_p: 0.0, ..base },
        SamplingParams { top_p: 1.5, ..base },
        SamplingParams { min_p: -0.1, ..base },
        SamplingParams { repetition_penalty: 0.0, ..base },
        SamplingParams { presence_penalty: f32::INFINITY, ..base },
    ] {
        assert!(Sampler::new(bad, 0).is_err(), "{bad:?}");
    }
}
