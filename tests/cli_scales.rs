//! The flags of `generate` that say where scales come from: what they do to the cache, what `--json` and the
//! closing table tell, and what is refused.

mod cli_support;

use cli_support::{golden, json, json_on_cuda, micro, prompt_flags, root, run, text};
use serde_json::{Value, json};

/// Two golden prompts, the longer of 150 tokens first.
fn flags(more: &[&str]) -> Vec<String> {
    let prompts = prompt_flags(&golden());
    let base = ["--model", &micro(), "--max-tokens", "16", "--ignore-eos"].map(str::to_owned);
    let mut flags: Vec<String> = base.into_iter().chain(more.iter().map(|flag| (*flag).to_owned())).collect();
    flags.extend(prompts[3].iter().chain(&prompts[0]).cloned());
    flags
}

fn json_of(more: &[&str]) -> (Value, String) {
    let flags = flags(more);
    json(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Scales of each layer, and how many there are in one.
fn scales(object: &Value) -> (Vec<Vec<f64>>, usize) {
    let lists: Vec<Vec<f64>> = ["k_scale", "v_scale"]
        .iter()
        .flat_map(|name| object["kv_cache"][*name].as_array().unwrap())
        .map(|layer| layer.as_array().unwrap().iter().map(|scale| scale.as_f64().unwrap()).collect())
        .collect();
    assert_eq!(lists.len(), 8, "four layers, K and V");
    let len = lists[0].len();
    assert!(lists.iter().all(|layer| layer.len() == len));
    (lists, len)
}

#[test]
fn running_scales_freeze_after_their_tokens() {
    let (object, stderr) = json_of(&["--kv-scales", "running:100,head", "--kv-scale-headroom", "2"]);
    assert!(stderr.is_empty(), "{stderr}");
    let about = &object["kv_cache"]["scales"];
    let changes = about["scale_changes"].as_u64().unwrap();
    assert!(changes >= 4, "at least the first step's, once a layer");
    let expected = json!({
        "source": "running",
        "k_granularity": "head",
        "v_granularity": "head",
        "frozen_after_tokens": 100,
        "warm_up_tokens": 100,
        "headroom": 2.0,
        "scale_changes": changes,
    });
    assert_eq!(*about, expected);
    let (lists, len) = scales(&object);
    assert_eq!(len, 2);
    assert!(lists.iter().flatten().all(|scale| *scale > 0.0 && scale.log2().fract() == 0.0), "{lists:?}");

    // However the prompts are cut; with other headroom, at most twice as small.
    let (cut, _) =
        json_of(&["--kv-scales", "head,running:100", "--kv-scale-headroom", "2", "--max-prefill-tokens", "9"]);
    assert_eq!((&cut["requests"], scales(&cut)), (&object["requests"], scales(&object)));
    let (less, _) = json_of(&["--kv-scales", "running:100,head", "--kv-scale-headroom", "1"]);
    for (less, more) in scales(&less).0.iter().flatten().zip(scales(&object).0.iter().flatten()) {
        assert_eq!(*more, 2.0 * less);
    }

    // More tokens than there are: not frozen yet, and said so.
    let (object, _) = json_of(&["--kv-scales", "running:1000"]);
    assert_eq!(object["kv_cache"]["scales"]["frozen_after_tokens"], Value::Null);
    assert_eq!(scales(&object).1, 1, "per tensor, unless asked for");
    let flags = flags(&["--kv-scales", "running:20,channel"]);
    let (table, _) = text(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    let line = table.lines().find(|line| line.starts_with("KV scales")).unwrap();
    assert!(line.contains("per channel") && line.contains("frozen after 20 tokens"), "{line}");
}

#[test]
fn dynamic_scales_cost_their_bytes() {
    let (plain, _) = json_of(&[]);
    let (object, stderr) = json_of(&["--kv-scales", "dynamic"]);
    assert!(stderr.is_empty(), "{stderr}");
    let bytes = |object: &Value| object["kv_cache"]["bytes_per_token"].as_u64().unwrap();
    // Four layers of two heads, a float each for K and V.
    assert_eq!(bytes(&object), bytes(&plain) + 4 * 2 * 2 * 4);
    assert_eq!(object["kv_cache"]["k_scale"], json!([[1.0], [1.0], [1.0], [1.0]]));
    let expected = json!({
        "source": "dynamic",
        "k_granularity": "token_head",
        "v_granularity": "token_head",
        "frozen_after_tokens": null,
    });
    assert_eq!(object["kv_cache"]["scales"], expected);
    let (table, _) = text(&["--kv-scales", "dynamic", "--max-tokens", "8"]);
    assert!(table.contains("Tom's silver coin is in") && table.contains("one for each token and KV head"), "{table}");

    // Few blocks: scales travel with them.
    let flags = ["--kv-scales", "dynamic", "--block-size", "8", "--n", "3", "--temperature", "1.1"];
    let (roomy, _) = json_of(&flags);
    let (tight, _) = json_of(&[&flags[..], &["--num-blocks", "23"]].concat());
    assert!(tight["kv_cache"]["blocks_swapped_in"].as_u64().unwrap() > 0);
    assert_eq!(tight["requests"], roomy["requests"]);
}

#[test]
fn first_batch_scales_take_divisors_and_granularities() {
    let (default, _) = json_of(&["--calculate-kv-scales"]);
    let about = json!({
        "source": "first_batch",
        "k_granularity": "tensor",
        "v_granularity": "tensor",
        "frozen_after_tokens": 150,
        "divisors": [200.0, 100.0],
    });
    assert_eq!(default["kv_cache"]["scales"], about);
    let (named, _) = json_of(&["--kv-scales", "first-batch"]);
    assert_eq!((&named["requests"], &named["kv_cache"]), (&default["requests"], &default["kv_cache"]));
    let (other, _) = json_of(&["--calculate-kv-scales", "--kv-scale-divisors", "400,25"]);
    assert_eq!(other["kv_cache"]["scales"]["divisors"], json!([400.0, 25.0]));
    let first = |object: &Value, name: &str| object["kv_cache"][name][0][0].as_f64().unwrap();
    // The first layer's values do not depend on any scale.
    assert_eq!(first(&other, "k_scale") * 2.0, first(&default, "k_scale"));
    assert_eq!(first(&other, "v_scale"), 4.0 * first(&default, "v_scale"));
    let (channels, _) = json_of(&["--calculate-kv-scales", "--kv-scales", "channel"]);
    let (lists, len) = scales(&channels);
    assert!(len > 2);
    let largest = lists[0].iter().copied().fold(0.0, f64::max);
    assert_eq!(largest, first(&default, "k_scale"));
}

#[test]
fn checkpoint_scales_take_granularities() {
    let (plain, _) = json_of(&[]);
    assert_eq!(plain["kv_cache"]["scales"]["source"], "checkpoint");
    assert_eq!(plain["kv_cache"]["scales"]["frozen_after_tokens"], 0);
    let (heads, stderr) = json_of(&["--kv-scales", "checkpoint,head"]);
    assert!(stderr.is_empty(), "{stderr}");
    assert_eq!(heads["requests"], plain["requests"], "repeated scales give the same codes");
    assert_eq!(scales(&heads).1, 2);

    let kvhead = root().join("tests/fixtures/micro/llmcompressor-tiny-kvhead").display().to_string();
    let args = ["--model", &kvhead, "--prompt-ids", "0,300,301", "--max-tokens", "2", "--kv-scales"];
    let (own, _) = json(&args[..args.len() - 1]);
    let (tensor, stderr) = json(&[&args[..], &["tensor"]].concat());
    assert!(stderr.starts_with("warning: ") && stderr.contains("per head"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1);
    for (own, tensor) in scales(&own).0.iter().zip(scales(&tensor).0) {
        assert_eq!(tensor, [own[0].max(own[1])]);
    }

    // An unquantized cache has none.
    let (auto, stderr) = json_of(&["--kv-cache-dtype", "auto", "--kv-scales", "running,head"]);
    assert_eq!(auto["kv_cache"]["scales"]["source"], "none");
    assert!(stderr.starts_with("warning: ") && stderr.contains("not quantized"), "{stderr}");
}

#[test]
fn what_is_wrong_is_one_line() {
    for (args, expected) in [
        (&["--kv-scales", "sometimes"][..], "running:TOKENS"),
        (&["--kv-scales", ""], "running:TOKENS"),
        (&["--kv-scales", "running:0"], "at least 1"),
        (&["--kv-scales", "running:many"], "whole number"),
        (&["--kv-scales", "dynamic:3"], "takes no number"),
        (&["--kv-scales", "running,dynamic"], "two sources"),
        (&["--kv-scales", "head,tensor"], "two granularities"),
        (&["--kv-scales", "running", "--calculate-kv-scales"], "cannot be used together"),
        (&["--kv-scales", "dynamic", "--scales-file", "x"], "cannot be used together"),
        (&["--calculate-kv-scales", "--kv-scale-divisors", "200"], "two numbers"),
        (&["--calculate-kv-scales", "--kv-scale-divisors", "200,0.5"], "at least 1"),
        (&["--calculate-kv-scales", "--kv-scale-divisors", "nan,100"], "at least 1"),
        (&["--calculate-kv-scales", "--kv-scale-divisors", "-200,100"], "at least 1"),
        (&["--calculate-kv-scales", "--kv-scale-divisors", "inf,100"], "at least 1"),
        (&["--kv-scale-divisors", "200,100"], "--calculate-kv-scales"),
        (&["--kv-scales", "running", "--kv-scale-headroom", "0.9"], "at least 1"),
        (&["--kv-scales", "running", "--kv-scale-headroom", "-1"], "at least 1"),
        (&["--kv-scales", "running", "--kv-scale-headroom", "big"], "1.25"),
        (&["--kv-scale-headroom", "2"], "--kv-scales running"),
    ] {
        let output = run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn cuda_does_the_same() {
    for how in ["running:20,head", "dynamic"] {
        let flags = ["--max-tokens", "10", "--activations", "f32", "--kv-scales", how];
        let Some(object) = json_on_cuda(&flags) else { return };
        let (cpu, _) = json(&flags);
        assert_eq!(object["requests"], cpu["requests"], "{how}");
        for name in ["bytes_per_token", "k_scale", "v_scale", "scales"] {
            assert_eq!(object["kv_cache"][name], cpu["kv_cache"][name], "{how}: {name}");
        }
    }
}
