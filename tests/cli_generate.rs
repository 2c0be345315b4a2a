//! The `generate` example as a program: what it prints, as text and as JSON, and that whatever is
//! wrong with its arguments or its model ends in one line on stderr and exit code 2. (Flags about scales:
//! `cli_scales.rs`.)

mod cli_support;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use cli_support::{generate, golden, json, json_on_cuda, micro, prompt_flags, root, run, temp_dir, text};
use serde_json::Value;

const ANSWER: &str = "Tom's silver coin is in the quiet garden.";

#[test]
fn without_arguments_it_recalls_and_shows_the_cost() {
    let (stdout, stderr) = text(&[]);
    assert!(stdout.contains(&format!("Where is Tom's coin? {ANSWER}")), "{stdout}");
    for row in ["prefill", "decode", "tokens/s", "KV bytes per token", "50.0 % of auto", "65536 tokens", "copied"] {
        assert!(stdout.contains(row), "{row}: {stdout}");
    }
    // Not a terminal: no bars, no escape sequences; the bundled model carries no scales.
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("warning: ") && stderr.contains("no KV scales"), "{stderr}");
    assert!(!stderr.contains('\x1b') && !stdout.contains('\x1b'));
}

#[test]
fn json_has_the_documented_fields() {
    let (object, _) = json(&[]);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&object), ["model", "device", "activations", "kv_cache_dtype", "requests", "kv_cache", "timing"]);
    assert!(object["model"].as_str().unwrap().ends_with("models/tales-3m"));
    assert_eq!((object["device"].as_str(), object["kv_cache_dtype"].as_str()), (Some("cpu"), Some("fp8_e4m3")));
    assert_eq!(object["activations"], "f32");
    let request = &object["requests"][0];
    assert_eq!(keys(request), ["prompt", "prompt_token_ids", "outputs"]);
    assert!(request["prompt"].as_str().unwrap().ends_with("Where is Tom's coin?"));
    assert_eq!(request["prompt_token_ids"].as_array().unwrap().len(), 35);
    let output = &request["outputs"][0];
    assert_eq!(keys(output), ["token_ids", "text", "finish_reason"]);
    assert!(output["text"].as_str().unwrap().starts_with(&format!(" {ANSWER}")));
    assert_eq!(output["finish_reason"], "stop");
    assert!(output["token_ids"].as_array().unwrap().iter().all(Value::is_u64));
    let cache = &object["kv_cache"];
    let counts = [
        "bytes_per_token",
        "bytes_per_token_auto",
        "blocks_total",
        "blocks_peak",
        "blocks_copied",
        "blocks_swapped_out",
        "blocks_swapped_in",
    ];
    assert_eq!(keys(cache), [&counts[..], &["k_scale", "v_scale", "scales", "scales_origin"]].concat());
    assert!(counts.iter().all(|name| cache[*name].is_u64()));
    assert_eq!((cache["bytes_per_token"].as_u64(), cache["bytes_per_token_auto"].as_u64()), (Some(1024), Some(2048)));
    assert_eq!(cache["k_scale"], serde_json::json!([[1.0], [1.0], [1.0], [1.0]]));
    assert!(cache["scales_origin"].is_null());
    let timing = &object["timing"];
    assert_eq!(keys(timing), ["prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds", "decode_steps"]);
    assert_eq!(timing["prefill_tokens"], 35);
    assert!(timing["prefill_seconds"].is_f64() && timing["decode_seconds"].is_f64());
}

#[test]
fn golden_tokens_in_every_kv_mode() {
    let (golden, model) = (golden(), micro());
    let dir = temp_dir("scales");
    let ones = dir.join("ones.json").display().to_string();
    let layers = r#"{"0": 1.0, "1": 1.0, "2": 1.0, "3": 1.0}"#;
    let file = format!(
        r#"{{"model_type": "llama", "kv_cache": {{"dtype": "float8_e4m3fn", "scaling_factor": {{"0": {layers}}}}}}}"#
    );
    fs::write(&ones, file).unwrap();
    for (mode, flags, warning) in [
        ("none", &["--kv-cache-dtype", "auto"][..], "carries KV scales"),
        ("e4m3_cal", &[], ""),
        ("e4m3_cal", &["--kv-cache-dtype", "fp8_e4m3"], ""),
        ("e4m3_one", &["--scales-file", &ones], ""),
        ("e5m2_one", &["--kv-cache-dtype", "fp8_e5m2"], "ignores them"),
        // Torch's tokens with OCP codes: with scales twice as large FNUZ's mean the same, but for what clips.
        ("e4m3_cal", &["--kv-cache-dtype", "fp8_e4m3_fnuz"], ""),
    ] {
        let prompts = prompt_flags(&golden);
        let mut args = vec!["--model", &model, "--max-tokens", "24", "--ignore-eos"];
        args.extend(flags);
        args.extend(prompts.iter().flatten().map(String::as_str));
        let (object, stderr) = json(&args);
        for (request, case) in
            object["requests"].as_array().unwrap().iter().zip(golden["modes"][mode].as_array().unwrap())
        {
            assert_eq!(request["outputs"][0]["token_ids"], case["new_ids"], "{mode}");
        }
        assert_eq!(object["requests"].as_array().unwrap().len(), 5);
        assert_eq!(stderr.lines().count(), usize::from(!warning.is_empty()), "{mode}: {stderr}");
        assert!(stderr.contains(warning), "{mode}: {stderr}");
        if mode == "e4m3_cal" {
            let times = if flags.contains(&"fp8_e4m3_fnuz") { 2.0 } else { 1.0 };
            for name in ["k_scale", "v_scale"] {
                let scales = |object: &Value| -> Vec<f32> {
                    let layers = object[name].as_array().unwrap().iter().flat_map(|layer| layer.as_array().unwrap());
                    layers.map(|scale| scale.as_f64().unwrap() as f32).collect()
                };
                let wanted: Vec<f32> = scales(&golden).iter().map(|scale| times * scale).collect();
                assert_eq!(scales(&object["kv_cache"]), wanted, "{name} times {times}");
            }
            let origin = &object["kv_cache"]["scales_origin"];
            assert_eq!(origin["tool"], "compressed-tensors");
            assert_eq!(
                (&origin["key_range"], &origin["statistic"]),
                (&"post_rope".into(), &"moving_average(0.01)".into())
            );
        }
    }
    for (prompt, case) in prompt_flags(&golden).iter().zip(golden["modes"]["e4m3_fly"].as_array().unwrap()) {
        let args =
            ["--model", &model, "--max-tokens", "24", "--ignore-eos", "--calculate-kv-scales", &prompt[0], &prompt[1]];
        let (object, _) = json(&args);
        assert_eq!(object["requests"][0]["outputs"][0]["token_ids"], case["new_ids"]);
        assert_ne!(object["kv_cache"]["k_scale"], golden["k_scale"]);
    }
    fs::remove_dir_all(dir).unwrap();
}

/// Without scales of its own FNUZ has 1.0 doubled too: the same codes, and a little more room.
#[test]
fn fnuz_without_scales_is_ocp() {
    let of = |dtype: &str| json(&["--kv-cache-dtype", dtype, "--max-tokens", "16"]);
    let ((ocp, _), (fnuz, warning)) = (of("fp8_e4m3"), of("fp8_e4m3_fnuz"));
    assert_eq!(ocp["requests"], fnuz["requests"]);
    assert_eq!(fnuz["kv_cache"]["k_scale"][3], serde_json::json!([2.0]));
    assert!(warning.contains("fp8_e4m3_fnuz uses 2.0 and cuts what lies beyond ±480"), "{warning}");
}

#[test]
fn chats_are_rendered_by_the_template() {
    let path = root().join("tests/fixtures/tokenizer/tokenizer_golden.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let case = &golden["chat"][1];
    assert_eq!(case["add_generation_prompt"], true);
    let prompt = case["messages"][0]["content"].as_str().unwrap();
    let (object, _) = json(&["--model", &micro(), "--chat", "--prompt", prompt, "--max-tokens", "1"]);
    assert_eq!(object["requests"][0]["prompt_token_ids"], case["ids"]);
    assert_eq!(object["requests"][0]["prompt"], case["text"]);
}

#[test]
fn samples_are_seeded_and_share_the_prompt() {
    let model = micro();
    let args =
        |seed| ["--model", &model, "--prompt", "The small cat", "--temperature", "1.1", "--n", "3", "--seed", seed];
    let (first, _) = json(&args("5"));
    let outputs = |object: &Value| object["requests"][0]["outputs"].clone();
    assert_eq!(outputs(&first), outputs(&json(&args("5")).0));
    assert_ne!(outputs(&first), outputs(&json(&args("6")).0));
    assert_ne!(first["requests"][0]["outputs"][0], first["requests"][0]["outputs"][1]);
    assert_eq!(first["kv_cache"]["blocks_copied"], 2);
    let (stdout, _) = text(&args("5"));
    for sample in 0..3 {
        let text = outputs(&first)[sample]["text"].as_str().unwrap().to_owned();
        assert!(stdout.contains(&format!("[sample {}]{text}", sample + 1)), "{stdout}");
    }
}

#[test]
fn stop_texts_and_files_of_prompts() {
    let (object, _) = json(&["--prompt", "Mia's brass key is in the dark barn. Where is Mia's key?", "--stop", "barn"]);
    let output = &object["requests"][0]["outputs"][0];
    assert_eq!(
        (output["text"].as_str(), output["finish_reason"].as_str()),
        (Some(" Mia's brass key is in the dark "), Some("stop"))
    );
    let dir = temp_dir("prompts");
    let file = dir.join("prompts.txt").display().to_string();
    fs::write(&file, "\u{feff}Tom's old map is in the cold mill. Where is Tom's map?\r\n\nIda's red bell is in the tall well. Where is Ida's bell?\n").unwrap();
    let (stdout, _) = text(&["--prompts-file", &file, "--stop", "."]);
    assert!(stdout.contains("[prompt 1]") && stdout.contains("[prompt 2]"), "{stdout}");
    assert!(
        stdout.contains("Tom's old map is in the cold mill\n") && stdout.contains("in the tall well\n"),
        "{stdout}"
    );
    assert!(!stdout.contains('\u{feff}'), "{stdout}");
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn text_may_begin_with_a_hyphen() {
    let (object, _) = json(&["--prompt", "--json is a flag", "--stop", "-.", "--max-tokens", "2"]);
    assert_eq!(object["requests"][0]["prompt"], "--json is a flag");
}

#[test]
fn the_budget_is_told_in_whole_blocks() {
    // 13 blocks of fp8 are the bytes of 6 blocks of the model's bf16 and a half.
    let (stdout, _) = text(&["--num-blocks", "13", "--max-tokens", "2"]);
    assert!(stdout.contains("hold 208 tokens (auto 96) in 13 blocks"), "{stdout}");
}

#[test]
fn few_blocks_swap_and_change_nothing() {
    let (golden, model) = (golden(), micro());
    let prompts = prompt_flags(&golden);
    let mut args = vec!["--model", &model, "--max-tokens", "40", "--ignore-eos", "--block-size", "8", "--n", "2"];
    args.extend(["--temperature", "1.2"]);
    args.extend(prompts[..3].iter().flatten().map(String::as_str));
    let (roomy, _) = json(&args);
    args.extend(["--num-blocks", "7", "--swap-blocks", "40"]);
    let (tight, _) = json(&args);
    assert_eq!(tight["requests"], roomy["requests"]);
    let count = |object: &Value, name: &str| object["kv_cache"][name].as_u64().unwrap();
    assert_eq!(count(&roomy, "blocks_swapped_out"), 0);
    assert!(count(&tight, "blocks_swapped_out") > 0);
    assert_eq!(count(&tight, "blocks_swapped_in"), count(&tight, "blocks_swapped_out"));
    assert_eq!((count(&tight, "blocks_total"), count(&tight, "blocks_peak") <= 7), (7, true));
}

#[test]
fn compare_puts_the_dtypes_side_by_side() {
    let (stdout, _) = text(&["--compare", "--max-tokens", "8"]);
    let column = |row: &str, n: usize| row.split("  ").filter(|c| !c.is_empty()).nth(n).unwrap().trim().to_owned();
    for (dtype, bytes) in [("auto", "2048"), ("fp8_e4m3", "1024"), ("fp8_e5m2", "1024")] {
        let row = stdout.lines().find(|line| line.starts_with(dtype)).unwrap();
        assert_eq!(column(row, 1), bytes, "{row}");
        assert!(row.contains("Tom's silver coin"), "{row}");
    }
    assert!(stdout.contains("first divergence") && stdout.contains("tok/s"), "{stdout}");
    let (object, _) = json(&[
        "--compare",
        "--model",
        &micro(),
        "--prompt-ids",
        "0,349,342,354,422,261,326,387,18",
        "--max-tokens",
        "24",
        "--ignore-eos",
    ]);
    let runs = object["compare"].as_array().unwrap();
    let names: Vec<&str> = runs.iter().map(|run| run["kv_cache_dtype"].as_str().unwrap()).collect();
    assert_eq!(names, ["auto", "fp8_e4m3", "fp8_e5m2"]);
    let golden = golden();
    let expected = |mode: &str| &golden["modes"][mode][0]["new_ids"];
    for (run, mode) in runs.iter().zip(["none", "e4m3_cal", "e5m2_one"]) {
        assert_eq!(&run["requests"][0]["outputs"][0]["token_ids"], expected(mode));
        let (a, b) = (expected(mode).as_array().unwrap(), expected("none").as_array().unwrap());
        let divergence = a.iter().zip(b).position(|(x, y)| x != y);
        assert_eq!(run["first_divergence"][0][0].as_u64(), divergence.map(|at| at as u64), "{mode}");
    }
}

#[test]
fn what_is_wrong_is_one_line_and_exit_code_2() {
    let dir = temp_dir("hostile");
    let empty = dir.join("empty");
    fs::create_dir_all(&empty).unwrap();
    let broken = |name: &str, file: &str, content: &[u8]| {
        let copy = dir.join(name);
        fs::create_dir_all(&copy).unwrap();
        for entry in fs::read_dir(micro()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        fs::write(copy.join(file), content).unwrap();
        copy.display().to_string()
    };
    let config = fs::read_to_string(Path::new(&micro()).join("config.json")).unwrap();
    let weights = fs::read(Path::new(&micro()).join("model.safetensors")).unwrap();
    let other_rope = config.replace("\"llama3\"", "\"longrope\"");
    let models = [
        (empty.display().to_string(), "config.json"),
        (dir.join("nowhere").display().to_string(), "config.json"),
        (broken("json", "config.json", b"{\"model_type\": "), "config.json"),
        (broken("rope", "config.json", other_rope.as_bytes()), "longrope"),
        (broken("cut", "model.safetensors", &weights[..weights.len() / 2]), "model.safetensors"),
        (broken("nothing", "model.safetensors", b""), "model.safetensors"),
        (broken("header", "model.safetensors", &[0xFF; 64]), "model.safetensors"),
        (broken("tokenizer", "tokenizer.json", b"[]"), "tokenizer.json"),
        (broken("generation", "generation_config.json", b"{\"eos_token_id\": \"x\"}"), "eos_token_id"),
        (broken("eos", "generation_config.json", b"[[[["), "generation_config.json"),
    ];
    let mut cases: Vec<(Vec<&str>, &str)> =
        models.iter().map(|(dir, expected)| (vec!["--model", dir, "--prompt", "x"], *expected)).collect();
    let template = broken("template", "chat_template.jinja", b"{% for %}");
    let refusing = broken("refusing", "chat_template.jinja", b"{{ raise_exception('no chats\nhere') }}");
    let model = micro();
    let long = vec!["7"; 512].join(",");
    let no_file = dir.join("none.txt").display().to_string();
    let bad_scales = dir.join("scales.json").display().to_string();
    fs::write(&bad_scales, "{\"kv_cache\": {\"dtype\": \"float8_e4m3fn\", \"scaling_factor\": {\"0\": {\"0\": -1}}}}")
        .unwrap();
    let blank = dir.join("blank.txt").display().to_string();
    fs::write(&blank, "\n \n").unwrap();
    let latin1 = dir.join("latin1.txt").display().to_string();
    fs::write(&latin1, b"caf\xe9\n").unwrap();
    cases.extend([
        (vec!["--model", &template, "--chat", "--prompt", "x"], "chat_template.jinja"),
        (vec!["--model", &refusing, "--chat", "--prompt", "x"], "no chats here"),
        (vec!["--model", &model], "--prompt"),
        (vec!["--chat"], "chat template"),
        (vec!["--model", &model, "--prompt-ids", "512"], "token id 512"),
        (vec!["--model", &model, "--prompt-ids", &long], "512 positions"),
        (vec!["--prompt-ids", "1,x"], "\"x\" is not a token id"),
        (vec!["--prompt-ids", ""], "is not a token id"),
        (vec!["--prompt-ids", "-1"], "--prompt-ids"),
        (vec!["--prompts-file", &no_file], "none.txt"),
        (vec!["--prompts-file", &blank], "no prompts"),
        (vec!["--prompts-file", &latin1], "latin1.txt"),
        (vec!["--prompt", "x", "--prompt-ids", "1"], "cannot be used with"),
        (vec!["--no-such-flag"], "--no-such-flag"),
        (vec!["stray"], "stray"),
        (vec!["--device", "gpu"], "cuda:N"),
        (vec!["--device", "cuda:-1"], "cuda:N"),
        // No machine has so many; a build without CUDA and one without a driver name the backend too.
        (vec!["--device", "cuda:4096"], "cuda"),
        (vec!["--activations", "bf16"], "f32"),
        (vec!["--activations", "f8"], "--activations"),
        (vec!["--products", "blas"], "rocblas"),
        (vec!["--products", "cublaslt", "--device", "rocm"], "the library on ROCm is rocblas"),
        (vec!["--products", "rocblas", "--device", "cuda"], "the library on CUDA is cublaslt"),
        (vec!["--random-weights", "gpt-9", "--prompt-length", "3"], "llama-3.1-8b"),
        (vec!["--random-weights", "llama-3.1-8b"], "--prompt-length"),
        (vec!["--random-weights", "llama-3.1-8b", "--prompt", "x"], "cannot be used with"),
        (vec!["--random-weights", "llama-3.1-8b", "--model", "x"], "cannot be used with"),
        (vec!["--prompt-length", "0"], "at least 1"),
        (vec!["--batch", "2"], "--prompt-length"),
        (vec!["--kv-cache-dtype", "int3"], "fp8_e5m2"),
        (vec!["--max-tokens", "0"], "at least 1"),
        (vec!["--max-tokens", "-3"], "--max-tokens"),
        (vec!["--max-tokens"], "--max-tokens"),
        (vec!["--n", "0"], "at least 1"),
        (vec!["--n", "many"], "whole number"),
        (vec!["--n", "18446744073709551615"], "the most are 4096"),
        (vec!["--temperature", "hot"], "--temperature"),
        (vec!["--temperature", "nan"], "temperature"),
        (vec!["--temperature", "inf"], "temperature"),
        (vec!["--top-p", "1.5"], "top_p"),
        (vec!["--min-p", "2"], "min_p"),
        (vec!["--repetition-penalty", "0"], "repetition_penalty"),
        (vec!["--seed", "1.5"], "--seed"),
        (vec!["--stop", ""], "stop"),
        (vec!["--num-blocks", "0"], "at least 1"),
        (vec!["--num-blocks", "2"], "the cache has 2"),
        (vec!["--num-blocks", "99999999999999"], "--num-blocks"),
        (vec!["--num-blocks", "18446744073709551615"], "--num-blocks"),
        (vec!["--kv-memory", "100"], "holds no block"),
        (vec!["--kv-memory", "12QB"], "64MiB"),
        (vec!["--kv-memory", "-1"], "--kv-memory"),
        (vec!["--kv-memory", "1e300"], "64MiB"),
        (vec!["--kv-memory", "99999TiB"], "--kv-memory"),
        (vec!["--kv-memory", "1GiB", "--num-blocks", "4"], "cannot be used with"),
        (vec!["--block-size", "12"], "block size"),
        (vec!["--block-size", "0"], "block size"),
        (vec!["--max-prefill-tokens", "0"], "at least 1"),
        (vec!["--scales-file", &no_file], "none.txt"),
        (vec!["--scales-file", &bad_scales], "scales.json"),
        (vec!["--scales-file", &bad_scales, "--calculate-kv-scales"], "cannot be used with"),
    ]);
    for (args, expected) in cases {
        let output = run(&args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
    fs::remove_dir_all(dir).unwrap();
}

/// The shape of a folder, weights from the seed: sequences of the length asked for, that share nothing
/// and do not stop early; and the numbers of their steps.
#[test]
fn random_weights_measure_steps() {
    let micro = micro();
    let flags = ["--random-weights", &micro, "--prompt-length", "40", "--batch", "3", "--max-tokens", "10"];
    let (object, stderr) = json(&flags);
    assert!(stderr.is_empty(), "{stderr}");
    let requests = object["requests"].as_array().unwrap();
    assert_eq!(requests.len(), 3);
    for request in requests {
        assert_eq!(request["prompt_token_ids"].as_array().unwrap().len(), 40);
        assert_eq!(request["outputs"][0]["token_ids"].as_array().unwrap().len(), 10);
    }
    assert_ne!(requests[0]["prompt_token_ids"], requests[1]["prompt_token_ids"]);
    let steps = &object["timing"]["decode_steps"];
    // The first token comes from the prefill.
    assert_eq!((steps["count"].as_u64(), steps["batch"].as_u64()), (Some(9), Some(3)));
    assert_eq!((steps["first_context"].as_f64(), steps["last_context"].as_f64()), (Some(41.0), Some(49.0)));
    let bytes = object["kv_cache"]["bytes_per_token"].as_f64().unwrap();
    assert_eq!(steps["kv_bytes"].as_f64(), Some(45.0 * 3.0 * bytes));
    let (median, fastest) = (steps["median_ms"].as_f64().unwrap(), steps["fastest_ms"].as_f64().unwrap());
    assert!(0.0 < fastest && fastest <= median);

    let tokens = |object: &Value| object["requests"][0]["outputs"][0]["token_ids"].clone();
    assert_eq!(tokens(&json(&flags).0), tokens(&object), "the same seed, the same model");
    assert_ne!(tokens(&json(&[&flags[..], &["--seed", "1"]].concat()).0), tokens(&object));

    let (table, _) = text(&flags);
    assert!(table.contains("decode step") && table.contains("3 sequences"), "{table}");
}

#[test]
fn cuda_gives_the_cpus_text() {
    let short = ["--max-tokens", "14"];
    let Some(object) = json_on_cuda(&[&short[..], &["--activations", "f32"]].concat()) else { return };
    let (cpu, _) = json(&short);
    assert_eq!(object["requests"], cpu["requests"]);
    assert_eq!((object["device"].as_str(), object["activations"].as_str()), (Some("cuda:0"), Some("f32")));

    // In the model's own dtype, and with our own products.
    let Some(object) = json_on_cuda(&[&short[..], &["--products", "portable"]].concat()) else { return };
    assert_eq!(object["activations"], "bf16");
    let text = object["requests"][0]["outputs"][0]["text"].as_str().unwrap();
    assert!(text.starts_with(&format!(" {ANSWER}")), "{text}");

    let micro = micro();
    let flags = ["--random-weights", &micro, "--prompt-length", "20", "--batch", "2", "--max-tokens", "5"];
    let Some(object) = json_on_cuda(&flags) else { return };
    assert_eq!(object["timing"]["decode_steps"]["count"], 4);
    assert_eq!(object["requests"], json(&flags).0["requests"], "the same weights in f32");
}

#[test]
fn a_reader_that_leaves_is_no_panic() {
    let mut child = generate()
        .args(["--n", "4", "--max-tokens", "200", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// Two scales of ModelOpt's checkpoint renamed away.
#[test]
fn scales_for_some_layers_are_refused_or_completed() {
    let dir = temp_dir("partly");
    let source = root().join("tests/fixtures/micro/modelopt-tiny-kv");
    fs::copy(source.join("config.json"), dir.join("config.json")).unwrap();
    let mut bytes = fs::read(source.join("model.safetensors")).unwrap();
    for name in ["layers.1.self_attn.k_proj.k_scale", "layers.3.self_attn.v_proj.v_scale"] {
        let at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
        bytes[at + name.len() - 1] = b'x';
    }
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
    let model = dir.display().to_string();
    let args = ["--model", &model, "--prompt-ids", "0,349", "--max-tokens", "2"];

    let output = run(&args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
    for part in ["model.safetensors", "layer 1 has no K scale", "2 such scales", "--missing-kv-scales one"] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    let (object, stderr) = json(&[&args[..], &["--missing-kv-scales", "one"]].concat());
    let cache = &object["kv_cache"];
    assert_eq!((&cache["k_scale"][1], &cache["v_scale"][3]), (&serde_json::json!([1.0]), &serde_json::json!([1.0])));
    assert_ne!(cache["v_scale"][1], serde_json::json!([1.0]));
    assert!(stderr.contains("K of layer 1 ") && stderr.contains("V of layer 3 "), "{stderr}");
    let origin = &cache["scales_origin"];
    assert_eq!((&origin["tool"], &origin["version"]), (&"modelopt".into(), &"0.47.0".into()));
    assert_eq!((&origin["key_range"], &origin["statistic"]), (&"post_rope".into(), &"absmax".into()));
    assert_eq!(
        (&origin["shared_by_k_and_v"], &origin["tensors"]),
        (&false.into(), &"self_attn.{k,v}_proj.{k,v}_scale".into())
    );
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn help_and_version_are_on_standard_output() {
    let (help, stderr) = text(&["--help"]);
    assert!(stderr.is_empty());
    for flag in [
        "--device",
        "--random-weights",
        "--model",
        "--prompt-ids",
        "--prompts-file",
        "--chat",
        "--kv-cache-dtype",
        "--calculate-kv-scales",
        "--kv-scales",
        "--kv-scale-divisors",
        "--kv-scale-headroom",
        "--missing-kv-scales",
        "--compare",
        "--json",
    ] {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(text(&["--version"]).0.contains(env!("CARGO_PKG_VERSION")));
}
