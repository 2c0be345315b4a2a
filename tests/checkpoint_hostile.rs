//! Checkpoints whose scales nobody should trust: each corruption ends in one typed error that names file,
//! layer, tensor and value, and never in a panic. `fuzz/` does the same to bytes nobody thought of.

mod checkpoint_support;
mod decoder_support;

use std::path::Path;

use checkpoint_support::*;
use decoder_support::fixture;
use proptest::prelude::*;
use quantkv::Error;
use quantkv::checkpoint::{ModelShape, ReadOptions, read_scales, read_scales_file, scales_in};
use quantkv::decoder::Weights;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

const NAME: &str = "model.layers.2.self_attn.v_scale";

/// A good checkpoint in which one tensor is another.
fn with_tensor(folder: &Folder, tensor: Tensor) -> Error {
    let mut tensors = attention_scales();
    *tensors.iter_mut().find(|tensor| tensor.0 == NAME).unwrap() = tensor;
    folder.write_tensors(&tensors);
    folder.refused()
}

#[test]
fn values_that_are_no_scales() {
    let folder = Folder::of("values", compressed_tensors(), &[]);
    for (bad, shown) in
        [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf"), (0.0, "0"), (-0.0, "-0"), (-1.0, "-1")]
    {
        let error = with_tensor(&folder, f32s(NAME, &[1], &[bad]));
        check_message(&error, &["model.safetensors", "layer 2", NAME, &format!("scale {shown} at index 0")]);
        match error {
            Error::InvalidScale { index: 0, value, .. } => assert_eq!(value.to_bits(), bad.to_bits()),
            other => panic!("{other:?}"),
        }
        let error = with_tensor(&folder, f32s(NAME, &[KV_HEADS, 1, 1], &[1.0, bad]));
        assert!(matches!(error, Error::InvalidScale { index: 1, .. }), "{error:?}");
        let mut channels = [1.0; KV_HEADS * HEAD_DIM];
        channels[20] = bad;
        let error = with_tensor(&folder, f32s(NAME, &[KV_HEADS, 1, HEAD_DIM], &channels));
        assert!(matches!(error, Error::InvalidScale { index: 20, .. }), "{error:?}");
    }
    // Beyond f32, and FP8's own NaN and infinity.
    for (dtype, bytes) in [
        (Dtype::F64, 1e300f64.to_le_bytes().to_vec()),
        (Dtype::F64, 1e-300f64.to_le_bytes().to_vec()),
        (Dtype::F16, 0x7e00u16.to_le_bytes().to_vec()),
        (Dtype::BF16, 0xff80u16.to_le_bytes().to_vec()),
        (Dtype::F8_E4M3, vec![0x7f]),
        (Dtype::F8_E5M2, vec![0x7c]),
    ] {
        let error = with_tensor(&folder, (NAME.into(), dtype, vec![], bytes));
        assert!(matches!(error, Error::InvalidScale { index: 0, .. }), "{dtype:?}: {error:?}");
    }
}

#[test]
fn shapes_and_types_that_are_no_scales() {
    let folder = Folder::of("shapes", compressed_tensors(), &[]);
    for shape in [
        vec![3],
        vec![HEADS, 1, 1],
        vec![1, 2],
        vec![2, 2],
        vec![0],
        vec![1, 1, 2],
        vec![KV_HEADS, 1, HEAD_DIM / 2],
        vec![1, 1, HEAD_DIM],
        vec![KV_HEADS, HEAD_DIM],
        vec![1, KV_HEADS, 1, 1],
        vec![1 << 20],
    ] {
        let count: usize = shape.iter().product();
        let error = with_tensor(&folder, f32s(NAME, &shape, &vec![1.0; count]));
        assert!(matches!(error, Error::InvalidFile { .. }), "{error:?}");
        check_message(&error, &["model.safetensors", NAME, &format!("{shape:?}")]);
    }
    for dtype in [Dtype::U8, Dtype::I8, Dtype::BOOL] {
        let error = with_tensor(&folder, (NAME.into(), dtype, vec![1], vec![1]));
        assert!(matches!(error, Error::UnsupportedModel { .. }), "{error:?}");
        check_message(&error, &["model.safetensors", NAME, &format!("{dtype:?}")]);
    }
    let mut tensors = attention_scales();
    tensors.push(f32s("model.layers.0.self_attn.k_proj.k_bias", &[1], &[0.5]));
    folder.write_tensors(&tensors);
    let error = folder.refused();
    assert!(matches!(error, Error::UnsupportedModel { .. }), "{error:?}");
    check_message(&error, &["model.safetensors", "k_bias", "symmetric"]);
}

/// (what it is, the configuration, the field the error names, the value it shows)
#[test]
fn schemes_that_are_not_static_fp8() {
    let ct = |field: &str, value: Value| with(compressed_tensors(), &format!("kv_cache_scheme.{field}"), value);
    let quark = |field: &str, value: Value| {
        let output = json!({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": false, "symmetric": true});
        let base = json!({"quant_method": "quark", "kv_cache_quant_config": {"*v_proj": {"output_tensors": output}}});
        with(base, &format!("kv_cache_quant_config.*v_proj.output_tensors.{field}"), value)
    };
    let folder = Folder::of("schemes", Value::Null, &attention_scales());
    let unsupported: Vec<(Value, &str, &str)> = vec![
        (ct("type", json!("int")), "kv_cache_scheme.type", "int"),
        (ct("num_bits", json!(4)), "kv_cache_scheme.num_bits", "4"),
        (ct("num_bits", json!(16)), "kv_cache_scheme.num_bits", "16"),
        (ct("symmetric", json!(false)), "kv_cache_scheme.symmetric", "false"),
        (ct("dynamic", json!(true)), "kv_cache_scheme.dynamic", "true"),
        (ct("dynamic", json!("local")), "kv_cache_scheme.dynamic", "local"),
        (ct("strategy", json!("token")), "kv_cache_scheme.strategy", "token"),
        (ct("strategy", json!("group")), "kv_cache_scheme.strategy", "group"),
        (with(modelopt(), "kv_cache_scheme", json!("NVFP4")), "kv_cache_scheme", "NVFP4"),
        (with(modelopt(), "kv_cache_scheme.type", json!("int")), "kv_cache_scheme.type", "int"),
        (json!({"quant_method": "fp8", "kv_cache_scheme": "dynamic"}), "kv_cache_scheme", "dynamic"),
        (quark("dtype", json!("int8")), "output_tensors.dtype", "int8"),
        (quark("qscheme", json!("per_channel")), "output_tensors.qscheme", "per_channel"),
        (quark("is_dynamic", json!(true)), "output_tensors.is_dynamic", "true"),
        (quark("symmetric", json!(false)), "output_tensors.symmetric", "false"),
    ];
    for (quantization, field, value) in unsupported {
        folder.write("config.json", config(quantization).to_string());
        let error = folder.refused();
        assert!(matches!(error, Error::UnsupportedModel { .. }), "{field}: {error:?}");
        check_message(&error, &["config.json", field, value, "supported:"]);
    }
    let invalid: Vec<(Value, &str)> = vec![
        (ct("type", Value::Null), "kv_cache_scheme.type is missing"),
        (ct("type", json!(8)), "kv_cache_scheme.type is the number 8"),
        (ct("num_bits", Value::Null), "kv_cache_scheme.num_bits is missing"),
        (ct("num_bits", json!(-8)), "kv_cache_scheme.num_bits is the number -8"),
        (ct("num_bits", json!("8")), "kv_cache_scheme.num_bits is the string"),
        (ct("symmetric", json!(1)), "kv_cache_scheme.symmetric is the number 1"),
        (ct("strategy", json!(["tensor"])), "kv_cache_scheme.strategy is a list"),
        (ct("observer_kwargs", json!({"averaging_constant": 2})), "observer_kwargs.averaging_constant"),
        (ct("observer_kwargs", json!([])), "observer_kwargs is a list"),
        (with(compressed_tensors(), "kv_cache_scheme", json!("FP8")), "kv_cache_scheme is the string"),
        (with(modelopt(), "kv_cache_scheme", json!(8)), "kv_cache_scheme is the number 8"),
        (json!({"quant_method": "fp8", "kv_cache_scheme": 8}), "kv_cache_scheme is the number 8"),
        (json!({"quant_method": 8}), "quant_method is the number 8"),
        (json!([]), "quantization_config is a list"),
        (quark("dtype", Value::Null), "output_tensors.dtype is missing"),
        (json!({"quant_method": "quark", "kv_cache_post_rope": "no"}), "kv_cache_post_rope is the string"),
    ];
    for (quantization, part) in invalid {
        folder.write("config.json", config(quantization).to_string());
        let error = folder.refused();
        assert!(matches!(error, Error::InvalidFile { .. }), "{part}: {error:?}");
        check_message(&error, &["config.json", part]);
    }
}

#[test]
fn configurations_that_contradict_or_break() {
    let folder = Folder::of("configurations", modelopt(), &attention_scales());
    for (text, unsupported, part) in [
        (r#"{"quantization": {"kv_cache_quant_algo": "NVFP4"}}"#, true, "NVFP4"),
        (r#"{"quantization": {"kv_cache_quant_algo": "INT8"}}"#, true, "INT8"),
        (r#"{"quantization": {"kv_cache_quant_algo": 8}}"#, false, "kv_cache_quant_algo is the number 8"),
        (r#"{"quantization": []}"#, false, "quantization is a list"),
        (r#"{"producer": "modelopt"}"#, false, "producer is the string"),
        ("[]", false, "a list"),
        ("{", false, "not JSON"),
    ] {
        folder.write("hf_quant_config.json", text);
        let error = folder.refused();
        assert_eq!(matches!(error, Error::UnsupportedModel { .. }), unsupported, "{error:?}");
        assert_eq!(matches!(error, Error::InvalidFile { .. }), !unsupported, "{error:?}");
        check_message(&error, &["hf_quant_config.json", part]);
    }
    std::fs::remove_file(folder.path().join("hf_quant_config.json")).unwrap();
    for (field, value, part) in [
        ("num_hidden_layers", json!(0), "num_hidden_layers"),
        ("num_hidden_layers", Value::Null, "num_hidden_layers is missing"),
        ("num_hidden_layers", json!(1u64 << 40), "num_hidden_layers"),
        ("num_attention_heads", json!("4"), "num_attention_heads"),
        ("num_key_value_heads", json!(3), "does not divide"),
        ("head_dim", json!(0), "head_dim"),
        ("head_dim", json!(1 << 20), "head_dim"),
        ("model_type", json!(1), "model_type"),
        ("text_config", json!(1), "text_config"),
    ] {
        folder.write("config.json", with(config(modelopt()), field, value).to_string());
        let error = folder.refused();
        assert!(matches!(error, Error::InvalidFile { .. }), "{error:?}");
        check_message(&error, &["config.json", part]);
    }
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(matches!(folder.refused(), Error::Io { .. }));
}

/// A shape that a program makes up.
#[test]
fn shapes_of_no_model() {
    let folder = Folder::of("made-up", Value::Null, &attention_scales());
    let weights = Weights::open(folder.path()).unwrap();
    let path = folder.path().join("kv_cache_scales.json");
    for made_up in [
        ModelShape { num_layers: usize::MAX, ..shape() },
        ModelShape { num_layers: 0, ..shape() },
        ModelShape { num_heads: 0, ..shape() },
        ModelShape { num_kv_heads: 0, ..shape() },
        ModelShape { num_heads: usize::MAX, num_kv_heads: 1, ..shape() },
        ModelShape { head_dim: Some(0), ..shape() },
        ModelShape { head_dim: Some(usize::MAX), ..shape() },
    ] {
        for result in
            [scales_in(&weights, &made_up, &ONE).map(|_| ()), read_scales_file(&path, &made_up, &ONE).map(|_| ())]
        {
            assert!(matches!(result, Err(Error::Unsupported { .. })), "{made_up:?}: {result:?}");
        }
    }
    let three = ModelShape { num_kv_heads: 3, ..shape() };
    assert!(matches!(scales_in(&weights, &three, &ONE), Err(Error::HeadsNotDivisible { .. })));
    // A rank that no machine has.
    let options = ReadOptions { shard: Some((4, 4)), ..ReadOptions::default() };
    assert!(matches!(folder.read(&options), Err(Error::Shard { rank: 4, world: 4, .. })));
}

#[test]
fn scales_files_are_checked() {
    let folder = Folder::new("file");
    let path = folder.path().join("kv_cache_scales.json");
    let shape = ModelShape { num_layers: 2, ..shape() };
    let of = |ranks: &str| {
        format!(r#"{{"model_type":"llama","kv_cache":{{"dtype":"float8_e4m3fn","scaling_factor":{ranks}}}}}"#)
    };
    let good = of(r#"{"0":{"0": 0.5, "1": 2}}"#);
    let read = |text: &str, shard| {
        folder.write("kv_cache_scales.json", text);
        read_scales_file(&path, &shape, &ReadOptions { shard, ..ReadOptions::default() })
    };
    read(&good, None).unwrap();
    for (text, part) in [
        (good.replace("llama", "qwen2"), "model_type"),
        (good.replace("kv_cache", "cache"), "kv_cache is missing"),
        (good.replace("scaling_factor", "scales"), "scaling_factor is missing"),
        (good.replace("\"dtype\"", "\"type\""), "dtype is missing"),
        (of("{}"), "scaling_factor.0 is missing"),
        (of(r#"{"1":{"0": 0.5, "1": 2}}"#), "scaling_factor.0 is missing"),
        (of(r#"{"0":{"0": 0.5, "1": 2}, "2":{"0": 0.5, "1": 2}}"#), "scaling_factor.1 is missing"),
        (of(r#"{"0":{}, "1":{}, "2":{}}"#), "has 3 ranks"),
        (of(r#"{"0":[0.5, 2]}"#), "scaling_factor.0 is a list"),
        (of(r#"{"0":{"0": 0.5, "1": 1, "2": 1}}"#), "scaling_factor.0.2 is a layer the model does not have"),
        (of(r#"{"0":{"0": 0.5, "1": 1, "01": 1}}"#), "scaling_factor.0.01 is no layer"),
        (of(r#"{"0":{"0": 0.5, "1": 1, "-1": 1}}"#), "is no layer"),
        (of(r#"{"0":{"0": 0.5, "1": "x"}}"#), "scaling_factor.0.1 is the string"),
        (of(r#"{"0":{"0": 0.5, "1": [1]}}"#), "scaling_factor.0.1 is a list"),
        ("nonsense".to_owned(), "not JSON"),
        ("[]".to_owned(), "a list"),
    ] {
        let error = read(&text, None).unwrap_err();
        assert!(matches!(error, Error::InvalidFile { .. }), "{part}: {error:?}");
        check_message(&error, &["kv_cache_scales.json", part]);
    }
    for value in ["0", "-2.0", "1e300", "1e-300", "-0.0"] {
        let error = read(&of(&format!(r#"{{"0":{{"0": 0.5, "1": {value}}}}}"#)), None).unwrap_err();
        assert!(matches!(error, Error::InvalidScale { index: 0, .. }), "{error:?}");
        check_message(&error, &["kv_cache_scales.json", "layer 1", "scaling_factor.0.1"]);
    }
    let error = read(&good.replace("float8_e4m3fn", "int8"), None).unwrap_err();
    assert!(matches!(error, Error::UnsupportedModel { .. }), "{error:?}");
    let error = read(&of(r#"{"0":{"0": 0.5}}"#), None).unwrap_err();
    assert!(matches!(error, Error::MissingScales { layer: 1, .. }), "{error:?}");
    for (rank, world) in [(1, 1), (0, 0), (0, 3)] {
        assert!(matches!(read(&good, Some((rank, world))), Err(Error::Shard { .. })));
    }
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(read_scales_file(&path, &shape, &ONE), Err(Error::Io { .. })));
}

/// Names that would write over several lines of a log.
#[test]
fn messages_are_one_line() {
    let mut tensors = attention_scales();
    tensors.push(f32s("model.\n\u{1b}[2J.self_attn.k_scale", &[1], &[1.0]));
    let folder = Folder::of("names", Value::Null, &tensors);
    let found = folder.found();
    assert!(found.warnings.len() == 1 && !found.warnings[0].contains(char::is_control), "{:?}", found.warnings);
    let quark =
        json!({"quant_method": "quark", "layer_quant_config": {"\n*k_proj": {"output_tensors": {"dtype": "a\nb"}}}});
    folder.write("config.json", config(quark).to_string());
    check_message(&folder.refused(), &["config.json"]);
    folder.write("config.json", config(Value::Null).to_string());
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("a.safe\ntensors")).unwrap();
    let map = json!({"model.layers.0.self_attn.k_scale": "a.safe\ntensors"});
    folder.write("model.safetensors.index.json", json!({"weight_map": map}).to_string());
    check_message(&folder.refused(), &["model.safetensors.index.json", "weight_map"]);
}

/// Every file of the real checkpoints, and a scales file.
const SOURCES: [(&str, &str); 7] = [
    ("micro/llmcompressor-tiny-attn-tensor", "config.json"),
    ("micro/quark-tiny-fp8-kv", "config.json"),
    ("micro/quark-tiny-fp8-kv-fp8mode", "config.json"),
    ("micro/modelopt-tiny-kv", "config.json"),
    ("micro/modelopt-tiny-kv", "hf_quant_config.json"),
    ("micro/llmcompressor-tiny-attn-tensor", "model.safetensors"),
    ("micro/modelopt-tiny-kv", "model.safetensors"),
];

/// The bytes of a file that a mutation may reach: of weights, the header and the scales.
fn mutable_len(file: &str, bytes: &[u8]) -> usize {
    match file {
        "model.safetensors" => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
        _ => bytes.len(),
    }
}

/// Whatever comes of it comes as a value, and scales that come are scales.
fn read_mutated(dir: &Path) {
    for options in [ReadOptions::default(), ONE] {
        match read_scales(dir, &options) {
            Ok(Some(found)) => {
                for pair in found.scales.layers() {
                    let mut values = pair.k.values().iter().chain(pair.v.values());
                    assert!(values.all(|scale| scale.is_finite() && *scale > 0.0));
                }
                assert!(!found.warnings.iter().any(|line| line.contains(char::is_control)));
            }
            Ok(None) => {}
            Err(error) => assert!(!error.to_string().contains(char::is_control), "{error}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_never_panic(
        source in 0..SOURCES.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..4),
    ) {
        let (model, file) = SOURCES[source];
        let folder = Folder::new("mutated");
        for other in ["config.json", "hf_quant_config.json", "model.safetensors"] {
            let from = fixture(model).join(other);
            let _ = std::fs::remove_file(folder.path().join(other));
            if from.exists() {
                std::fs::copy(&from, folder.path().join(other)).unwrap();
            }
        }
        let mut bytes = std::fs::read(fixture(model).join(file)).unwrap();
        for (index, value, kind) in &edits {
            let at = index.index(mutable_len(file, &bytes).clamp(1, bytes.len()));
            match kind {
                0 => bytes[at] = if bytes[at].is_ascii_digit() { b'0' + value % 10 } else { *value },
                1 => bytes.insert(at, if value % 2 == 0 { b'0' + value % 10 } else { *value }),
                2 => { bytes.remove(at); }
                // A word of JSON for another.
                _ => {
                    let word: &[u8] = [&b"null"[..], b"-1", b"1e999", b"\"\"", b"[]", b"{}", b"true"][usize::from(*value) % 7];
                    bytes.splice(at..at, word.iter().copied());
                }
            }
        }
        folder.write(file, bytes);
        read_mutated(folder.path());
    }
}
