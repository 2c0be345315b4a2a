//! Model folders nobody should trust: each ends in one typed error that names the file and what is
//! wrong in it, and never in a panic.

mod decoder_support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use decoder_support::fixture;
use proptest::prelude::*;
use quantkv::checkpoint::kv_scales;
use quantkv::decoder::{Batch, Config, GenerationConfig, Model, WantedLogits};
use quantkv::scale::LayerScales;
use quantkv::{CpuBackend, DType, Error, KvFormat, PagedKvCache};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const SOURCE: &str = "arch/llama-default";

/// A folder of its own, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!("quantkv-hostile-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }

    /// With the files of a good model.
    fn of_model(name: &str) -> Folder {
        let folder = Folder::new(name);
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(fixture(SOURCE).join(file), folder.0.join(file)).unwrap();
        }
        folder
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(file), bytes).unwrap();
    }

    fn load(&self) -> Result<Model<CpuBackend>, Error> {
        Model::load(&self.0, Arc::new(CpuBackend::new()))
    }

    /// The error of loading, as one line that must contain all of `parts`.
    fn refused(&self, parts: &[&str]) -> Error {
        let error = self.load().expect_err("must be refused");
        check_message(&error, parts);
        error
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn check_message(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    assert!(!text.contains('\n'), "{text:?}");
}

fn good_config() -> Value {
    serde_json::from_slice(&std::fs::read(fixture(SOURCE).join("config.json")).unwrap()).unwrap()
}

fn config_with(field: &str, value: Value) -> Value {
    let mut config = good_config();
    config[field] = value;
    config
}

#[test]
fn broken_config_fields_are_named() {
    let folder = Folder::of_model("config");
    let cases = [
        ("hidden_size", json!(0), "hidden_size is the number 0"),
        ("hidden_size", json!(-4), "hidden_size is the number -4"),
        ("hidden_size", json!(1.5), "hidden_size is the number 1.5"),
        ("hidden_size", json!("48"), "hidden_size is the string"),
        ("hidden_size", Value::Null, "hidden_size is missing"),
        ("hidden_size", json!(u64::MAX), "hidden_size is the number"),
        ("vocab_size", json!(1u64 << 60), "vocab_size"),
        ("num_hidden_layers", json!(1_000_000_000_000u64), "num_hidden_layers"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("num_key_value_heads", json!(0), "num_key_value_heads"),
        ("num_key_value_heads", json!(3), "does not divide"),
        ("head_dim", json!(100_000), "head_dim"),
        ("head_dim", json!(13), "head_dim"),
        ("intermediate_size", json!([]), "intermediate_size is a list"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps"),
        ("rms_norm_eps", json!("small"), "rms_norm_eps"),
        ("max_position_embeddings", json!(1e300), "max_position_embeddings"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
        ("attention_bias", json!(1), "attention_bias"),
        ("eos_token_id", json!({"a": 1}), "eos_token_id"),
        ("eos_token_id", json!([1, "2"]), "eos_token_id"),
        ("architectures", json!("LlamaForCausalLM"), "architectures"),
        ("architectures", json!([7]), "architectures[0]"),
        ("rope_parameters", json!({"rope_type": "linear"}), "rope_parameters.factor is missing"),
        ("rope_parameters", json!({"rope_type": "linear", "factor": 0.0}), "rope_parameters.factor"),
        ("rope_parameters", json!({"rope_theta": -1.0}), "rope_parameters.rope_theta"),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}), "rope_theta"),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            "high_freq_factor",
        ),
        ("layer_types", json!(["full_attention"]), "layer_types has 1 entries"),
        ("layer_types", json!([1, 2]), "layer_types"),
        ("quantization_config", json!([]), "quantization_config"),
        ("quantization_config", json!({"config_groups": {}}), "quantization_config.quant_method is missing"),
    ];
    for (field, value, part) in cases {
        folder.write("config.json", config_with(field, value).to_string());
        let error = folder.refused(&["config.json", part]);
        assert!(matches!(error, Error::InvalidFile { .. } | Error::UnsupportedModel { .. }), "{error:?}");
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let folder = Folder::of_model("unsupported");
    let quantized =
        json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}});
    let cases = [
        ("model_type", json!("mamba"), "mamba"),
        ("architectures", json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        ("rope_parameters", json!({"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        ("rope_parameters", json!({"rope_type": "longrope"}), "longrope"),
        ("rope_parameters", json!({"rope_type": "proportional"}), "proportional"),
        ("rope_parameters", json!({"full_attention": {"rope_type": "default"}}), "full_attention"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("layer_types", json!(["chunked_attention", "full_attention"]), "chunked_attention"),
        ("dtype", json!("float8_e4m3fn"), "float8_e4m3fn"),
        ("quantization_config", quantized, "config_groups.group_0.weights"),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        ("quantization_config", json!({"quant_method": "modelopt", "quant_algo": "FP8"}), "FP8"),
    ];
    for (field, value, part) in cases {
        folder.write("config.json", config_with(field, value).to_string());
        let error = folder.refused(&["config.json", part, "supported:"]);
        assert!(matches!(error, Error::UnsupportedModel { .. }), "{error:?}");
    }
    // Both spellings of a real checkpoint's KV-only quantization load; W8A8 does not.
    assert!(Config::from_dir(&fixture("micro/llmcompressor-tiny-attn-tensor")).is_ok());
    assert!(Config::from_dir(&fixture("micro/modelopt-tiny-kv")).is_ok());
    let error = Config::from_dir(&fixture("micro/modelopt-tiny-fp8-kv")).unwrap_err();
    assert!(matches!(error, Error::UnsupportedModel { .. }), "{error:?}");
}

#[test]
fn both_spellings_of_the_configuration_mean_the_same() {
    let folder = Folder::of_model("spellings");
    let read = |config: &Value| {
        folder.write("config.json", config.to_string());
        Config::from_dir(&folder.0).unwrap()
    };
    let v5 = config_with("rope_parameters", json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}));
    let mut v4 = good_config();
    let map = v4.as_object_mut().unwrap();
    map.remove("rope_parameters");
    map.remove("dtype");
    map.insert("rope_theta".into(), json!(5e5));
    map.insert("torch_dtype".into(), json!("float32"));
    map.insert("rope_scaling".into(), json!({"type": "linear", "factor": 4.0}));
    assert_eq!(read(&v5), read(&v4));
    assert_eq!(read(&v4).dtype, Some(DType::F32));
    v4["rope_scaling"] = Value::Null;
    assert_eq!(read(&v4).rope.inverse_frequencies()[0], 1.0);

    for (value, ids) in [(json!(2), vec![2]), (json!([1, 2]), vec![1, 2]), (Value::Null, vec![]), (json!(-1), vec![])] {
        assert_eq!(read(&config_with("eos_token_id", value)).eos_token_ids, ids);
    }
    for value in [Value::Null, json!(12)] {
        assert_eq!(read(&config_with("head_dim", value)).head_dim, 12);
    }
    assert_eq!(read(&config_with("num_key_value_heads", Value::Null)).num_kv_heads, 4);

    // Windows: Mistral everywhere; Qwen from a layer on, only if it says so; or layer by layer.
    let windows = |model_type: &str, class: &str, extra: Value| {
        let mut config = config_with("model_type", json!(model_type));
        config["architectures"] = json!([class]);
        config["sliding_window"] = json!(16);
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        read(&config).sliding_windows
    };
    let (qwen, all) = (("qwen2", "Qwen2ForCausalLM"), vec![Some(16), Some(16)]);
    assert_eq!(windows("mistral", "MistralForCausalLM", json!({})), all);
    assert_eq!(windows("llama", "LlamaForCausalLM", json!({})), [None, None]);
    assert_eq!(windows(qwen.0, qwen.1, json!({"max_window_layers": 1})), [None, None]);
    let used = json!({"use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(windows(qwen.0, qwen.1, used), [None, Some(16)]);
    let layers = json!({"use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(windows(qwen.0, qwen.1, layers), [Some(16), None]);
    // Qwen3's own default head dim, unless null asks to derive it.
    let mut config = config_with("model_type", json!("qwen3"));
    config["architectures"] = json!(["Qwen3ForCausalLM"]);
    assert_eq!(read(&config).head_dim, 12);
    config["head_dim"] = Value::Null;
    assert_eq!(read(&config).head_dim, 12);
    config.as_object_mut().unwrap().remove("head_dim");
    assert_eq!(read(&config).head_dim, 128);
}

#[test]
fn broken_json_files_are_named() {
    let folder = Folder::of_model("json");
    let deep = "[".repeat(100_000);
    for (text, part) in [("", "not JSON"), ("{", "not JSON"), ("[]", "a list"), (deep.as_str(), "recursion")] {
        folder.write("config.json", text);
        folder.refused(&["config.json", part]);
        folder.write("generation_config.json", text);
        let error = GenerationConfig::from_dir(&folder.0).unwrap_err();
        check_message(&error, &["generation_config.json", part]);
    }
    std::fs::remove_file(folder.0.join("config.json")).unwrap();
    assert!(matches!(folder.refused(&["config.json"]), Error::Io { .. }));
    std::fs::create_dir(folder.0.join("config.json")).unwrap();
    folder.refused(&["config.json"]);

    folder
        .write("generation_config.json", r#"{"eos_token_id": [1, 2], "temperature": 0.6, "top_k": -1, "top_p": 0.9}"#);
    let generation = GenerationConfig::from_dir(&folder.0).unwrap();
    assert_eq!(generation.eos_token_ids, Some(vec![1, 2]));
    assert_eq!((generation.temperature, generation.top_k, generation.top_p), (Some(0.6), Some(0), Some(0.9)));
    for text in [r#"{"top_p": 1.5}"#, r#"{"temperature": -1}"#, r#"{"top_k": -2}"#, r#"{"do_sample": 1}"#] {
        folder.write("generation_config.json", text);
        assert!(matches!(GenerationConfig::from_dir(&folder.0), Err(Error::InvalidFile { .. })), "{text}");
    }
    std::fs::remove_file(folder.0.join("generation_config.json")).unwrap();
    assert_eq!(GenerationConfig::from_dir(&folder.0).unwrap(), GenerationConfig::default());
}

/// A safetensors file of a hand-written header and `data` zero bytes.
fn raw_safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn broken_safetensors_are_named() {
    let folder = Folder::of_model("weights");
    let good = std::fs::read(folder.0.join("model.safetensors")).unwrap();
    let entry = |name: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let huge = u64::MAX;
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("shorter than its length field", vec![1, 2, 3]),
        ("cut in the header", good[..200].to_vec()),
        ("cut in the data", good[..good.len() - 1].to_vec()),
        ("longer than it says", [&good[..], &[0]].concat()),
        ("header length 2^64-1", huge.to_le_bytes().to_vec()),
        ("header not UTF-8", [&8u64.to_le_bytes()[..], &[0xff; 8]].concat()),
        ("header no object", raw_safetensors("[1,2]", 0)),
        ("deep header", raw_safetensors(&format!("{{\"a\":{}", "[".repeat(10_000)), 0)),
        ("offset beyond the file", raw_safetensors(&format!("{{{}}}", entry("a", "[4]", 0, 16)), 8)),
        ("end before start", raw_safetensors(&format!("{{{}}}", entry("a", "[1]", 8, 4)), 8)),
        ("shape unlike its bytes", raw_safetensors(&format!("{{{}}}", entry("a", "[3]", 0, 8)), 8)),
        ("negative size", raw_safetensors(&format!("{{{}}}", entry("a", "[-1]", 0, 4)), 4)),
        ("product overflows", raw_safetensors(&format!("{{{}}}", entry("a", &format!("[{huge},{huge}]"), 0, 4)), 4)),
        ("sum overflows", raw_safetensors(&format!("{{{}}}", entry("a", "[2]", huge - 7, huge)), 8)),
        (
            "tensor named twice",
            raw_safetensors(&format!("{{{},{}}}", entry("a", "[1]", 0, 4), entry("a", "[1]", 0, 4)), 4),
        ),
        ("overlap", raw_safetensors(&format!("{{{},{}}}", entry("a", "[2]", 0, 8), entry("b", "[1]", 4, 8)), 8)),
        ("unknown dtype", raw_safetensors(r#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}"#, 4)),
    ];
    for (what, bytes) in files {
        folder.write("model.safetensors", bytes);
        let error = folder.load().expect_err(what);
        check_message(&error, &["model.safetensors"]);
        assert!(matches!(error, Error::InvalidFile { .. } | Error::Io { .. }), "{what}: {error:?}");
    }
    std::fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    folder.refused(&["neither", "model.safetensors.index.json"]);
}

/// Writes the good model's tensors, changed by `change`: (name, dtype, shape, bytes).
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);
fn write_changed(folder: &Folder, source: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let own =
        |(name, view): (String, TensorView<'_>)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec());
    let mut tensors: Vec<Tensor> = file.tensors().into_iter().map(own).collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.0.join("model.safetensors")).unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let folder = Folder::of_model("tensors");
    let source = fixture(SOURCE);
    let index = |tensors: &[Tensor], name: &str| tensors.iter().position(|tensor| tensor.0 == name).unwrap();
    for name in
        ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
    {
        write_changed(&folder, &source, |tensors| {
            tensors.remove(index(tensors, name));
        });
        folder.refused(&["model.safetensors", name, "missing"]);
        write_changed(&folder, &source, |tensors| {
            let i = index(tensors, name);
            tensors[i].2.push(1);
        });
        folder.refused(&["model.safetensors", name, "shape"]);
        write_changed(&folder, &source, |tensors| {
            let i = index(tensors, name);
            let len = tensors[i].3.len() / 4;
            tensors[i].1 = Dtype::F8_E4M3;
            tensors[i].3.truncate(len);
        });
        let error = folder.refused(&["model.safetensors", name, "F8_E4M3"]);
        assert!(matches!(error, Error::UnsupportedModel { .. }), "{error:?}");
    }
    // A bias the configuration asks for.
    std::fs::copy(source.join("model.safetensors"), folder.0.join("model.safetensors")).unwrap();
    folder.write("config.json", config_with("mlp_bias", json!(true)).to_string());
    folder.refused(&["mlp.gate_proj.bias", "missing"]);
}

#[test]
fn sharded_checkpoints_that_lie_are_named() {
    let folder = Folder::new("sharded");
    let source = fixture("arch/llama-bias");
    for file in std::fs::read_dir(&source).unwrap().map(|entry| entry.unwrap().path()) {
        std::fs::copy(&file, folder.0.join(file.file_name().unwrap())).unwrap();
    }
    folder.load().unwrap();
    let name = "model.safetensors.index.json";
    let index: Value = serde_json::from_slice(&std::fs::read(source.join(name)).unwrap()).unwrap();
    let with = |tensor: &str, file: &str| {
        let mut index = index.clone();
        index["weight_map"][tensor] = json!(file);
        index.to_string()
    };
    for path in [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "C:\\x",
        "./model-00001-of-00005.safetensors",
    ] {
        folder.write(name, with("model.norm.weight", path));
        folder.refused(&[name, "same folder"]);
    }
    folder.write(name, with("model.norm.weight", "absent.safetensors"));
    assert!(matches!(folder.refused(&["absent.safetensors"]), Error::Io { .. }));
    folder.write(name, with("no.such.tensor", "model-00001-of-00005.safetensors"));
    folder.refused(&["model-00001-of-00005.safetensors", "no.such.tensor"]);
    let twice = index.to_string().replacen("\"weight_map\":{", "\"weight_map\":{\"model.norm.weight\":\"x\",", 1);
    folder.write(name, twice);
    folder.refused(&[name, "model.norm.weight", "twice"]);
    for text in ["{}", "[]", "{\"weight_map\": 3}", "{\"weight_map\": {\"a\": 1}}"] {
        folder.write(name, text);
        folder.refused(&[name]);
    }
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let mut model = Folder::of_model("steps").load().unwrap();
    let backend = model.backend().clone();
    let scales = vec![LayerScales::one(); 2];
    let mut cache =
        PagedKvCache::new(backend.clone(), model.cache_spec(8, KvFormat::F32).unwrap(), 4, &scales).unwrap();
    let mut batch = Batch::new();
    assert!(matches!(model.forward(&batch, &mut cache), Err(Error::InvalidRequest(_))));
    for (tokens, start, blocks, block_size) in [
        (&[][..], 0, &[0][..], 8),
        (&[1], 8, &[0], 8),
        (&[1], 0, &[], 8),
        (&[1], 0, &[0], 0),
        (&[1], usize::MAX, &[0], 8),
    ] {
        assert!(batch.push_sequence(tokens, start, blocks, block_size, WantedLogits::Last).is_err());
        assert!(batch.is_empty());
    }
    for (token, block, part) in
        [(128, 0, "vocabulary"), (u32::MAX, 0, "vocabulary"), (1, 4, "block 4"), (1, u32::MAX, "block")]
    {
        batch.clear();
        batch.push_sequence(&[token], 0, &[block], 8, WantedLogits::Last).unwrap();
        check_message(&model.forward(&batch, &mut cache).unwrap_err(), &[part]);
    }
    // Built for blocks of 64 slots, run on blocks of 8.
    batch.clear();
    batch.push_sequence(&[1; 40], 0, &[0], 64, WantedLogits::Last).unwrap();
    assert!(model.forward(&batch, &mut cache).is_err());
    // A cache of another model.
    let one_layer = &scales[..1];
    let mut other = PagedKvCache::new(backend, model.cache_spec(8, KvFormat::F32).unwrap(), 4, one_layer).unwrap();
    batch.clear();
    batch.push_sequence(&[1], 0, &[0], 8, WantedLogits::Last).unwrap();
    assert!(matches!(model.forward(&batch, &mut other), Err(Error::GeometryMismatch { .. })));
    assert_eq!(model.forward(&batch, &mut cache).unwrap().len(), 128);
}

/// Loads a mutated folder; whatever comes of it, it must come as a value. A model that still
/// loads must still run.
fn load_and_step(folder: &Folder) {
    let Ok(mut model) = folder.load() else { return };
    let Ok(spec) = model.cache_spec(8, KvFormat::Fp8E4M3) else { return };
    let scales = match kv_scales(model.weights(), model.config()) {
        Ok(Some(scales)) => scales,
        _ => vec![LayerScales::one(); model.config().num_layers],
    };
    let mut cache = PagedKvCache::new(model.backend().clone(), spec, 2, &scales).unwrap();
    let mut batch = Batch::new();
    batch.push_sequence(&[0, 1, 2], 0, &[1], 8, WantedLogits::Last).unwrap();
    let _ = model.forward(&batch, &mut cache);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_configs_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..4)) {
        let folder = Folder::of_model("fuzz-config");
        let mut bytes = std::fs::read(fixture(SOURCE).join("config.json")).unwrap();
        mutate(&mut bytes, &edits);
        folder.write("config.json", bytes);
        load_and_step(&folder);
    }

    #[test]
    fn mutated_headers_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..4)) {
        let folder = Folder::of_model("fuzz-header");
        let bytes = std::fs::read(fixture(SOURCE).join("model.safetensors")).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = bytes[..8 + header_len].to_vec();
        mutate(&mut header, &edits);
        header.extend_from_slice(&bytes[8 + header_len..]);
        folder.write("model.safetensors", header);
        load_and_step(&folder);
    }
}

/// Overwrites, inserts or removes bytes; digits by digits half of the time, so that the result is
/// often still JSON.
fn mutate(bytes: &mut Vec<u8>, edits: &[(prop::sample::Index, u8, u8)]) {
    for (index, value, kind) in edits {
        let at = index.index(bytes.len());
        match kind {
            0 => bytes[at] = if bytes[at].is_ascii_digit() { b'0' + value % 10 } else { *value },
            1 => bytes.insert(at, if value % 2 == 0 { b'0' + value % 10 } else { *value }),
            _ => {
                bytes.remove(at);
            }
        }
    }
}
