//! The `calibrate` example as a program: what it writes and prints, that `generate` takes what it wrote,
//! and that whatever is wrong ends in one line on stderr and exit code 2, without a folder.

mod cli_support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};

use cli_support::{command, root, temp_dir};

fn micro(name: &str) -> String {
    root().join("tests/fixtures/micro").join(name).display().to_string()
}

fn base() -> String {
    micro("tiny-llama-base-f32")
}

fn inputs() -> Value {
    serde_json::from_str(&fs::read_to_string(micro("calibration_inputs.json")).unwrap()).unwrap()
}

/// A folder of its own with the calibration ids in `ids.json`.
struct Data(PathBuf);

impl Data {
    fn new(name: &str) -> Data {
        let data = Data(temp_dir(&format!("calibrate-{name}")));
        data.file("ids.json", &inputs()["input_ids"].to_string());
        data
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn file(&self, name: &str, text: &str) -> String {
        fs::write(self.0.join(name), text).unwrap();
        self.path(name)
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(args: &[&str]) -> Output {
    command("calibrate").args(args).output().unwrap()
}

fn text(args: &[&str]) -> (String, String) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    (String::from_utf8(output.stdout).unwrap(), stderr)
}

fn json_of(args: &[&str]) -> Value {
    let (stdout, _) = text(&[args, &["--json"]].concat());
    assert_eq!(stdout.trim_end().lines().count(), 1, "one object on one line");
    serde_json::from_str(&stdout).unwrap()
}

fn scales(object: &Value, half: &str) -> Vec<Value> {
    object["layers"].as_array().unwrap().iter().map(|layer| layer[half]["scale"].clone()).collect()
}

#[test]
fn generate_takes_what_was_written() {
    let data = Data::new("round-trip");
    for strategy in ["tensor", "head"] {
        let (ids, out) = (data.path("ids.json"), data.path(strategy));
        let object = json_of(&["--model", &base(), "--ids-file", &ids, "--out", &out, "--strategy", strategy]);
        assert_eq!(object["files"]["model-kv-scales.safetensors"], "written");
        assert_eq!(object["files"]["model-00001-of-00001.safetensors"], "linked");
        assert_eq!((&object["out"], &object["samples"], &object["tokens"]), (&json!(out), &json!(16), &json!(2048)));
        let generate = ["--model", &out, "--prompt-ids", "0,40,41", "--max-tokens", "4", "--json"];
        let output = command("generate").args(generate).output().unwrap();
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "no warning: the scales are taken");
        let generated: Value = serde_json::from_slice(&output.stdout).unwrap();
        for half in ["k", "v"] {
            let loaded = generated["kv_cache"][format!("{half}_scale")].as_array().unwrap();
            assert_eq!(loaded, &scales(&object, half), "{strategy}");
        }
    }
}

#[test]
fn text_and_lines_become_the_samples_of_their_tokens() {
    let data = Data::new("data");
    let (inputs, model) = (inputs(), base());
    let texts: Vec<&str> =
        inputs["calibration_texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let common = ["--model", &model, "--dry-run", "--observer", "llmcompressor", "--sequence-length", "128"];
    let with = |args: &[&str]| json_of(&[&common[..], args].concat());
    let by_ids = with(&["--ids-file", &data.path("ids.json")]);

    // transformers tokenized these texts, with BOS, and cut them to 128.
    let lines: Vec<String> = texts.iter().map(|text| json!({"text": text, "other": 1}).to_string()).collect();
    let jsonl = data.file("texts.jsonl", &format!("{}\n\n", lines.join("\n")));
    assert_eq!(with(&["--jsonl", &jsonl])["layers"], by_ids["layers"]);

    // As files of text: the first piece of each is the same sample.
    let files: Vec<String> =
        texts.iter().enumerate().map(|(i, text)| data.file(&format!("{i}.txt"), &format!("\u{feff}{text}"))).collect();
    let flags: Vec<&str> = files.iter().flat_map(|file| ["--text", file]).collect();
    let object = with(&[&flags[..], &["--samples", "16"]].concat());
    assert_eq!(object["layers"], by_ids["layers"]);
    let all = with(&flags);
    assert!(all["samples"].as_u64().unwrap() > 16, "the rest of each text, too");

    // A chat, as the golden rendering of transformers has it.
    let golden = root().join("tests/fixtures/tokenizer/tokenizer_golden.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(golden).unwrap()).unwrap();
    let chat = golden["chat"].as_array().unwrap().iter().find(|chat| chat["add_generation_prompt"] == false).unwrap();
    let jsonl = data.file("chat.jsonl", &json!({"messages": chat["messages"]}).to_string());
    let ids = data.file("chat.json", &json!([chat["ids"]]).to_string());
    assert_eq!(with(&["--jsonl", &jsonl, "--chat"])["layers"], with(&["--ids-file", &ids])["layers"]);
}

#[test]
fn a_dry_run_shows_clipping_and_writes_nothing() {
    let data = Data::new("dry");
    let (model, ids, out) = (base(), data.path("ids.json"), data.path("out"));
    let common = ["--model", &model, "--ids-file", &ids, "--dry-run", "--out", &out];
    let (stdout, stderr) = text(&common);
    assert_eq!(stderr, "", "absmax cuts off nothing");
    for part in ["headroom", "0.0000 %", "1.000x", "16 samples, 2048 tokens", "nothing (--dry-run)"] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    assert_eq!(stdout.lines().filter(|line| line.contains(" K ") || line.contains(" V ")).count(), 8);
    let (_, stderr) = text(&[&common[..], &["--observer", "percentile=90"]].concat());
    assert_eq!(stderr.lines().count(), 1);
    assert!(stderr.starts_with("warning: 8 of 8 scales cut off"), "{stderr}");
    let (_, stderr) = text(&[&common[..], &["--strategy", "channel"]].concat());
    assert!(stderr.contains("quantkv's own"), "{stderr}");
    let object = json_of(&[&common[..], &["--observer", "percentile=90", "--samples", "2"]].concat());
    assert_eq!((&object["out"], &object["files"], &object["samples"]), (&Value::Null, &Value::Null, &json!(2)));
    assert_eq!(object["observer"], "percentile=90");
    let half = &object["layers"][0]["k"];
    let clipped = half["clipped"].as_f64().unwrap();
    // 10 % are beyond 448 scales; those beyond 464 are cut off.
    assert!(clipped > 0.0 && clipped < 0.1, "{clipped}");
    assert!(half["headroom"].as_f64().unwrap() < 1.0);
    assert!(!Path::new(&out).exists());
}

fn fails(args: &[&str], expected: &str) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
}

#[test]
fn whatever_is_wrong_is_one_line() {
    let data = Data::new("wrong");
    let (model, ids, out) = (base(), data.path("ids.json"), data.path("out"));
    let good = ["--model", &model, "--ids-file", &ids, "--out", &out];
    fails(&good[..4], "--out");
    fails(&["--model", &model, "--out", &out], "--text");
    fails(&[&good[..], &["--text", &ids]].concat(), "cannot be used with");
    fails(&[&good[..], &["--chat"]].concat(), "cannot be used with");
    fails(&["--model", &model, "--out", &out, "--chat"], "--jsonl");
    fails(&[&good[..], &["--observer", "max"]].concat(), "absmax, llmcompressor, mse, percentile");
    fails(&[&good[..], &["--observer", "percentile=0"]].concat(), "above 0 and up to 100");
    fails(&[&good[..], &["--strategy", "block"]].concat(), "tensor, head, channel");
    fails(&[&good[..], &["--samples", "0"]].concat(), "at least 1");
    fails(&[&good[..], &["--sequence-length", "513"]].concat(), "512 positions");
    fails(&[&good[..], &["--device", "tpu"]].concat(), "cpu, cuda, cuda:N, rocm or rocm:N");
    fails(&[&good[..], &["--activations", "bf16"]].concat(), "the CPU computes with f32");

    let with =
        |flag: &str, file: &str, expected: &str| fails(&["--model", &model, flag, file, "--out", &out], expected);
    let file = |text: &str| data.file("file", text);
    with("--ids-file", &data.path("none"), "none");
    with("--ids-file", &model, "is a folder");
    with("--ids-file", &file(""), "is not a JSON list");
    with("--ids-file", &file("[]"), "holds no sample");
    with("--ids-file", &file("[[1], []]"), "sample 2 has no tokens");
    with("--ids-file", &file("[[1], [2, 512]]"), "token id 512 of sample 2 is outside the vocabulary of 512");
    with("--ids-file", &file("[[-1]]"), "is not a JSON list");
    with("--ids-file", &file("[1]"), "is not a JSON list");
    with("--text", &file(""), "holds no sample");
    with("--jsonl", &file(""), "holds no sample");
    with("--jsonl", &file("\n{\"text\": 1}"), "line 2: has no \"text\"");
    with("--jsonl", &file("{\"text\""), "line 1: is not JSON");
    fails(
        &["--model", &model, "--out", &out, "--chat", "--jsonl", &file("{\"messages\": [{}]}")],
        "line 1: has a message",
    );
    fs::write(data.0.join("latin"), [b'a', 0xe9, b'b', b'c', b'd']).unwrap();
    with("--text", &data.path("latin"), "is not UTF-8");
    with("--jsonl", &data.path("latin"), "line 1");

    let into = |out: &str, expected: &str| fails(&["--model", &model, "--ids-file", &ids, "--out", out], expected);
    into(&data.path("ids.json"), "ids.json");
    into(&data.path("."), "not empty");
    into(&model, "not empty");
    into(&format!("{model}/out"), "inside the model's");
    into(&data.path("missing/out"), "missing");
    #[cfg(target_os = "linux")]
    into("/proc/out", "/proc/");
    let calibrated = micro("llmcompressor-tiny-f32");
    fails(&["--model", &calibrated, "--ids-file", &ids, "--out", &out], "not quantized and has no KV scheme");
    let quantized = micro("modelopt-tiny-fp8-kv");
    fails(&["--model", &quantized, "--ids-file", &ids, "--out", &out], "FP8");
    assert!(!Path::new(&out).exists());
}

#[test]
fn keys_that_are_no_numbers_are_named() {
    let data = Data::new("nan");
    let model = data.0.join("model");
    fs::create_dir(&model).unwrap();
    fs::copy(Path::new(&base()).join("config.json"), model.join("config.json")).unwrap();
    let mut bytes = fs::read(Path::new(&base()).join("model.safetensors")).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let start = header["model.layers.2.self_attn.k_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header_len + start..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(model.join("model.safetensors"), bytes).unwrap();
    let (model, ids, out) = (model.display().to_string(), data.path("ids.json"), data.path("out"));
    let expected = "sample 1: layer 2: a key is NaN; it must be finite";
    fails(&["--model", &model, "--ids-file", &ids, "--out", &out], expected);
    assert!(!Path::new(&out).exists());
}

/// Ctrl-C in the middle of a long run: exit code 130, one line, no folder of any name.
#[cfg(target_os = "linux")]
#[test]
fn an_interruption_leaves_nothing() {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    // The mask of signals that the process has handlers for.
    let listens = |pid: u32, number: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0");
        u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << (number - 1)) != 0
    };

    let data = Data::new("interrupt");
    let ids: Vec<Value> = (0..4096).map(|_| inputs()["input_ids"][0].clone()).collect();
    let ids = data.file("many.json", &Value::from(ids).to_string());
    for (signal, code) in [("INT", 130u32), ("TERM", 143)] {
        let (model, out) = (base(), data.path("out"));
        let args = ["--model", &model, "--ids-file", &ids, "--samples", "4096", "--out", &out];
        let child = command("calibrate").args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        while !listens(child.id(), code - 128) {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Into the first samples.
        std::thread::sleep(Duration::from_millis(500));
        let kill = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
        assert!(kill.success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.as_str()), (Some(code as i32), "error: interrupted\n"));
        let mut left: Vec<_> = fs::read_dir(&data.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["ids.json", "many.json"]);
    }
}
