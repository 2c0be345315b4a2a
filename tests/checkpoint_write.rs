//! Checkpoints with scales, written and read back: by the crate's own reader, and field by field against
//! what LLM Compressor wrote.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use quantkv::Error;
use quantkv::calibrate::Observer;
use quantkv::checkpoint::{
    Copied, KeyRange, NewCheckpoint, ReadOptions, Tool, WrittenCheckpoint, check_checkpoint, kv_scales, read_scales,
    write_checkpoint,
};
use quantkv::decoder::{Config, Weights};
use quantkv::scale::{LayerScales, StaticScale};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn base() -> PathBuf {
    fixture("micro/tiny-llama-base-f32")
}

struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Temp {
        let dir = std::env::temp_dir().join(format!("quantkv-write-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Temp(dir)
    }

    /// A copy of a model's folder.
    fn model(&self, from: &Path) -> PathBuf {
        let model = self.0.join("model");
        fs::create_dir(&model).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
        model
    }

    fn names(&self) -> Vec<String> {
        names(&self.0)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn tensor_scales(layers: usize) -> Vec<LayerScales> {
    let scale = |x: f32| StaticScale::per_tensor("scale", x).unwrap();
    (0..layers)
        .map(|layer| LayerScales { k: scale(0.1 + layer as f32), v: scale(1.6e-5 * (layer + 1) as f32) })
        .collect()
}

fn write(model: &Path, out: &Path, scales: &[LayerScales], observer: Observer) -> quantkv::Result<WrittenCheckpoint> {
    let new = NewCheckpoint { model, out, scales, observer: observer.scheme() };
    write_checkpoint(&new, &mut || ControlFlow::Continue(())).map(Option::unwrap)
}

fn read(dir: &Path) -> (Weights, Config) {
    (Weights::open(dir).unwrap(), Config::from_dir(dir).unwrap())
}

fn json_file(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_folder_reads_back_as_the_model_with_its_scales() {
    let temp = Temp::new("round-trip");
    let head = |values: [f32; 2]| StaticScale::per_head("scale", values.to_vec()).unwrap();
    let per_head = vec![LayerScales { k: head([0.25, 3.0]), v: head([1e-6, 70.0]) }; 4];
    for (name, scales) in [("tensor", tensor_scales(4)), ("head", per_head)] {
        let out = temp.0.join(name);
        let written = write(&base(), &out, &scales, Observer::Absmax).unwrap();
        assert_eq!(names(&out), written.files.keys().cloned().collect::<Vec<_>>());
        assert_eq!(written.files["model-00001-of-00001.safetensors"], Copied::Linked);
        assert!(!written.files.contains_key("model.safetensors"), "it would be read instead of the index");
        let ((ours, config), (theirs, base_config)) = (read(&out), read(&base()));
        assert_eq!(kv_scales(&ours, &config).unwrap().unwrap(), scales);
        assert_eq!(ours.names().count(), theirs.names().count() + 8);
        for name in theirs.names() {
            assert_eq!(ours.tensor(name).unwrap().bytes(), theirs.tensor(name).unwrap().bytes(), "{name}");
        }
        assert_eq!(config, base_config);
        let found = read_scales(&out, &ReadOptions::default()).unwrap().unwrap();
        assert_eq!((found.scales.layers(), &found.warnings[..]), (&scales[..], &[][..]));
        assert_eq!((found.origin.tool, found.origin.key_range), (Tool::CompressedTensors, KeyRange::PostRope));
        for same in ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            assert_eq!(fs::read(out.join(same)).unwrap(), fs::read(base().join(same)).unwrap(), "{same}");
        }
        let index = json_file(&out.join("model.safetensors.index.json"));
        let bytes: usize = ours.names().map(|name| ours.tensor(name).unwrap().bytes().len()).sum();
        assert_eq!(index["metadata"]["total_size"], bytes);
        assert_eq!(index["weight_map"]["model.layers.3.self_attn.v_scale"], "model-kv-scales.safetensors");
        let shape: &[usize] = if name == "head" { &[2, 1, 1] } else { &[1] };
        assert!(ours.tensor_of_shape("model.layers.0.self_attn.k_scale", shape).is_ok());
    }
    assert_eq!(temp.names(), ["head", "tensor"]);
}

/// The tool's own configuration of the same model, byte for byte but for the end of the file.
#[test]
fn the_configuration_is_llm_compressors() {
    let temp = Temp::new("config");
    let per_head = StaticScale::per_head("scale", vec![1.0, 2.0]).unwrap();
    let per_head = vec![LayerScales { k: per_head.clone(), v: per_head }; 4];
    for (theirs, scales, model) in [
        ("llmcompressor-tiny-f32", tensor_scales(4), base()),
        ("llmcompressor-tiny-kvhead", per_head, fixture("micro/tiny-llama-base")),
    ] {
        let out = temp.0.join(theirs);
        write(&model, &out, &scales, Observer::LlmCompressor).unwrap();
        let expected = fs::read_to_string(fixture(&format!("micro/{theirs}/config.json"))).unwrap();
        assert_eq!(fs::read_to_string(out.join("config.json")).unwrap().trim_end(), expected.trim_end());
    }
    for (observer, name, arguments) in [
        (Observer::Absmax, "static_minmax", json!({})),
        (Observer::Mse, "mse", json!({"norm": 2.0, "maxshrink": 0.5, "grid": 100})),
        (Observer::Percentile(99.5), "percentile", json!({"percentile": 99.5})),
    ] {
        let out = temp.0.join(observer.name());
        write(&base(), &out, &tensor_scales(4), observer).unwrap();
        let scheme = &json_file(&out.join("config.json"))["quantization_config"]["kv_cache_scheme"];
        assert_eq!((&scheme["observer"], &scheme["observer_kwargs"]), (&json!(name), &arguments));
    }
}

#[test]
fn scales_per_channel_have_a_shape_of_their_own() {
    let temp = Temp::new("channel");
    let values: Vec<f32> = (1..=32).map(|x| x as f32).collect();
    let scale = StaticScale::per_channel("scale", 16, values.clone()).unwrap();
    let out = temp.0.join("out");
    let scales = vec![LayerScales { k: scale.clone(), v: scale }; 4];
    write(&base(), &out, &scales, Observer::Absmax).unwrap();
    let weights = Weights::open(&out).unwrap();
    assert_eq!(weights.tensor_of_shape("model.layers.2.self_attn.v_scale", &[2, 1, 16]).unwrap().to_f32(), values);
    let config = json_file(&out.join("config.json"));
    assert_eq!(config["quantization_config"]["kv_cache_scheme"]["strategy"], "channel");
    let found = read_scales(&out, &ReadOptions::default()).unwrap().unwrap();
    assert_eq!(found.scales.layers(), &scales[..]);
}

#[test]
fn shards_keep_their_names_and_unknown_fields_their_text() {
    let temp = Temp::new("shards");
    let model = temp.model(&fixture("arch/llama-bias"));
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let inserted = "{\n  \"zebra\": {\"digits\": 1.50e-05, \"big\": 123456789012345678901234567890},";
    fs::write(model.join("config.json"), config.replacen('{', inserted, 1)).unwrap();
    for (name, text) in [("notes.md", "kept"), (".hidden", ""), ("pytorch_model.bin", ""), ("extra.safetensors", "")] {
        fs::write(model.join(name), text).unwrap();
    }
    fs::remove_file(model.join("golden.safetensors")).unwrap();
    fs::create_dir(model.join("original")).unwrap();
    fs::create_dir(model.join("additional_chat_templates")).unwrap();
    fs::write(model.join("additional_chat_templates/rag.jinja"), "{{ x }}").unwrap();
    let layers = Config::from_dir(&model).unwrap().num_layers;
    let out = temp.0.join("out");
    let written = write(&model, &out, &tensor_scales(layers), Observer::Absmax).unwrap();
    let (old, new) = (model.join("model.safetensors.index.json"), out.join("model.safetensors.index.json"));
    let (old, new) = (json_file(&old), json_file(&new));
    for (tensor, shard) in old["weight_map"].as_object().unwrap() {
        assert_eq!(&new["weight_map"][tensor], shard);
        assert_eq!(written.files[shard.as_str().unwrap()], Copied::Linked);
    }
    let size = |index: &Value| index["metadata"]["total_size"].as_u64().unwrap();
    assert_eq!(size(&new), size(&old) + 2 * 4 * layers as u64);
    let (weights, read) = read(&out);
    assert_eq!(kv_scales(&weights, &read).unwrap().unwrap(), tensor_scales(layers));
    // Not sorted any more: the new field comes last, every other stays as it was.
    let text = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(text.starts_with("{\n  \"zebra\": {\"digits\": 1.50e-05, \"big\": 123456789012345678901234567890},\n"));
    assert_eq!(
        json_file(&out.join("config.json")).as_object().unwrap().keys().next_back().unwrap(),
        "quantization_config"
    );
    assert_eq!(fs::read_to_string(out.join("notes.md")).unwrap(), "kept");
    assert!(out.join("additional_chat_templates/rag.jinja").exists());
    assert_eq!(written.skipped, [".hidden", "extra.safetensors", "original", "pytorch_model.bin"]);
}

#[test]
fn truncation_and_padding_leave_the_tokenizer() {
    let temp = Temp::new("tokenizer");
    let model = temp.model(&base());
    let path = model.join("tokenizer.json");
    let clean = fs::read_to_string(&path).unwrap();
    let left = r#""truncation": {"max_length": 128, "stride": 0}, "scores": 0.10000000000000000555"#;
    let dirty =
        clean.replacen("\"truncation\": null", left, 1).replacen("\"padding\": null", "\"padding\": {\"x\": 1}", 1);
    assert_ne!(clean, dirty);
    fs::write(&path, &dirty).unwrap();
    let out = temp.0.join("out");
    write(&model, &out, &tensor_scales(4), Observer::Absmax).unwrap();
    let text = fs::read_to_string(out.join("tokenizer.json")).unwrap();
    assert!(text.contains("\"scores\": 0.10000000000000000555"), "other numbers keep their digits");
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value.as_object_mut().unwrap().remove("scores");
    assert_eq!(value, serde_json::from_str::<Value>(&clean).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), dirty, "the model's own stays");
}

/// The cache of the Hugging Face hub is symbolic links.
#[cfg(unix)]
#[test]
fn symbolic_links_lead_to_links_of_their_files() {
    let temp = Temp::new("links");
    let (blobs, model) = (temp.model(&base()), temp.0.join("snapshot"));
    fs::create_dir(&model).unwrap();
    for name in names(&blobs) {
        std::os::unix::fs::symlink(Path::new("../model").join(&name), model.join(&name)).unwrap();
    }
    let out = temp.0.join("elsewhere/out");
    fs::create_dir(temp.0.join("elsewhere")).unwrap();
    write(&model, &out, &tensor_scales(4), Observer::Absmax).unwrap();
    for name in names(&out) {
        assert!(fs::symlink_metadata(out.join(&name)).unwrap().is_file(), "{name}");
    }
    fs::remove_dir_all(&blobs).unwrap();
    let (weights, config) = read(&out);
    assert_eq!(kv_scales(&weights, &config).unwrap().unwrap(), tensor_scales(4));
}

#[test]
fn what_would_be_overwritten_or_wrong_is_refused() {
    let temp = Temp::new("refused");
    let model = temp.model(&base());
    let refused = |model: &Path, out: &Path, scales: &[LayerScales], what: &str| {
        let before = temp.names();
        let error = write(model, out, scales, Observer::Absmax).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        assert_eq!(temp.names(), before, "{what}: something was left");
    };
    let scales = tensor_scales(4);
    let full = temp.0.join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("precious"), "").unwrap();
    let out = temp.0.join("out");
    refused(&model, &full, &scales, "not empty");
    refused(&model, &model, &scales, "not empty");
    refused(&model, &model.join("out"), &scales, "inside the model's");
    refused(&model, &full.join("precious"), &scales, "precious");
    refused(&model, &temp.0.join("missing/out"), &scales, "missing");
    refused(&model, Path::new("/"), &scales, "");
    refused(&temp.0.join("no-model"), &out, &scales, "no-model");
    refused(&model, &out, &scales[..3], "layers with scales must be 4, it is 3");
    let heads = LayerScales { k: StaticScale::per_head("scale", vec![1.0; 3]).unwrap(), v: StaticScale::one() };
    refused(&model, &out, &vec![heads; 4], "layer 0: the scales of a layer must be 2");
    let mixed =
        [&scales[..3], &[LayerScales { k: StaticScale::per_head("s", vec![1.0; 2]).unwrap(), v: StaticScale::one() }]];
    refused(&model, &out, &mixed.concat(), "layer 3");
    for (quantized, what) in [
        ("micro/llmcompressor-tiny-f32", "compressed-tensors"),
        ("micro/modelopt-tiny-kv", "modelopt"),
        ("micro/modelopt-tiny-fp8-kv", "modelopt"),
    ] {
        refused(&fixture(quantized), &out, &scales, what);
    }
    // Scales without a word of them in the configuration.
    fs::copy(fixture("micro/llmcompressor-tiny-f32/model.safetensors"), model.join("model.safetensors")).unwrap();
    refused(&model, &out, &scales, "model.layers.0.self_attn.k_scale");
    assert!(matches!(check_checkpoint(&model, &out), Err(Error::UnsupportedModel { .. })));
    // Both are found while the folder is being made.
    fs::copy(base().join("model.safetensors"), model.join("model.safetensors")).unwrap();
    fs::write(model.join("tokenizer.json"), "{\"a\": ").unwrap();
    refused(&model, &out, &scales, "tokenizer.json: is not JSON");
    fs::write(model.join("tokenizer.json"), "{\"a\": 1, \"a\": 2}").unwrap();
    refused(&model, &out, &scales, "\"a\" twice");
}

#[test]
fn an_empty_folder_is_taken_and_an_ended_run_leaves_nothing() {
    let temp = Temp::new("ended");
    let (model, out) = (temp.model(&base()), temp.0.join("out"));
    let scales = tensor_scales(4);
    let new = NewCheckpoint { model: &model, out: &out, scales: &scales, observer: None };
    let mut calls = 0;
    let whole = write_checkpoint(&new, &mut || {
        calls += 1;
        ControlFlow::Continue(())
    });
    assert!(whole.unwrap().is_some() && calls > 5);
    for last in 1..=calls {
        fs::remove_dir_all(&out).unwrap();
        fs::create_dir(&out).unwrap();
        let mut left = last;
        let ended = write_checkpoint(&new, &mut || {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(ended.unwrap(), None, "{last}");
        assert_eq!((temp.names(), names(&out).len()), (vec!["model".to_owned(), "out".to_owned()], 0));
    }
    assert!(write_checkpoint(&new, &mut || ControlFlow::Continue(())).unwrap().is_some());
    assert!(names(&out).len() > 5);
}
