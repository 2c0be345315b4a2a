//! KV scales out of the checkpoints of every tool: real ones of LLM Compressor, ModelOpt and Quark, whose
//! values were read by their own libraries, and small ones for what these do not show.

mod checkpoint_support;
mod decoder_support;

use std::path::Path;

use checkpoint_support::*;
use decoder_support::{cache_for, fixture, greedy, load};
use half::bf16;
use quantkv::checkpoint::{
    CheckpointScales, KeyRange, ModelShape, Naming, ReadOptions, Statistic, Tool, kv_scales, read_scales,
    read_scales_file,
};
use quantkv::decoder::{Config, Weights};
use quantkv::scale::Granularity;
use quantkv::{Error, KvFormat};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

fn read_fixture(name: &str) -> CheckpointScales {
    read_scales(&fixture(name), &ReadOptions::default()).unwrap().unwrap_or_else(|| panic!("{name}: no scales"))
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The values as torch printed them.
#[test]
fn checkpoints_of_real_tools() {
    let modelopt =
        [(0.05636161, 0.008405413), (0.38839287, 1.8119812e-5), (6.1035156e-4, 0.031668525), (11.928572, 10.071428)];
    let merged = [0.056152344, 0.38085938, 0.03173828, 12.0];
    let quark = merged.map(|scale| (scale, scale));

    for (name, values, tool, version, range, statistic, shared, naming) in [
        (
            "modelopt-tiny-kv",
            modelopt,
            Tool::ModelOpt,
            Some("0.47.0"),
            KeyRange::PostRope,
            Statistic::Absmax,
            false,
            Naming::Projection,
        ),
        (
            "modelopt-tiny-fp8-kv",
            modelopt,
            Tool::ModelOpt,
            Some("0.47.0"),
            KeyRange::PostRope,
            Statistic::Absmax,
            false,
            Naming::Projection,
        ),
        (
            "quark-tiny-fp8-kv",
            quark,
            Tool::Quark,
            Some("0.13"),
            KeyRange::PreRope,
            Statistic::Absmax,
            true,
            Naming::Output,
        ),
        (
            "quark-tiny-fp8-kv-fp8mode",
            quark,
            Tool::Quark,
            None,
            KeyRange::Unknown,
            Statistic::Unknown,
            true,
            Naming::Attention,
        ),
    ] {
        let found = read_fixture(&format!("micro/{name}"));
        assert_eq!(per_tensor(&found), values, "{name}");
        let origin = &found.origin;
        assert_eq!((origin.tool, origin.version.as_deref()), (tool, version), "{name}");
        assert_eq!((origin.key_range, &origin.statistic), (range, &statistic), "{name}");
        assert_eq!((origin.shared, origin.naming), (shared, Some(naming)), "{name}");
        assert_eq!(found.warnings, [""; 0], "{name}");
        assert!(found.scales.q().iter().all(Option::is_none), "{name}");
        assert_eq!((found.scales.num_heads(), found.scales.num_kv_heads()), (4, 2));
    }
}

#[test]
fn checkpoints_of_llm_compressor() {
    let minmax = Statistic::MovingAverage { constant: 0.01 };
    for name in ["llmcompressor-tiny", "llmcompressor-tiny-f32", "llmcompressor-tiny-kvhead"] {
        let golden = json_of(&fixture("micro").join(name).join("golden.json"));
        let found = read_fixture(&format!("micro/{name}"));
        let granularity = if name.ends_with("kvhead") { Granularity::Head } else { Granularity::Tensor };
        for (layer, pair) in found.scales.layers().iter().enumerate() {
            for (scale, want) in [(&pair.k, &golden["k_scale"][layer]), (&pair.v, &golden["v_scale"][layer])] {
                let want: Vec<f32> = want.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
                assert_eq!((scale.values(), scale.granularity()), (&want[..], granularity), "{name} layer {layer}");
            }
        }
        let origin = &found.origin;
        assert_eq!((origin.tool, origin.version.as_deref()), (Tool::CompressedTensors, Some("0.19.0")));
        assert_eq!((origin.key_range, &origin.statistic, origin.shared), (KeyRange::PostRope, &minmax, false));
        assert_eq!(found.warnings, [""; 0], "{name}");
    }
    // With scales of queries and zero points; both halves as without them.
    let found = read_fixture("micro/llmcompressor-tiny-attn-tensor");
    assert_eq!(found.warnings, [""; 0]);
    for (q, pair) in found.scales.q().iter().zip(found.scales.layers()) {
        let q = q.as_ref().expect("a q scale");
        assert_eq!(q.granularity(), Granularity::Tensor);
        assert!(q.values()[0] > 0.0 && q.values()[0] < 100.0 && pair.k.values()[0] > 0.0);
    }
}

/// FP8 weights are not the decoder's, and their scales are an engine's all the same.
#[test]
fn quantized_weights_do_not_hide_scales() {
    for name in ["micro/modelopt-tiny-fp8-kv", "micro/quark-tiny-fp8-kv", "micro/quark-tiny-fp8-kv-fp8mode"] {
        assert!(matches!(Config::from_dir(&fixture(name)), Err(Error::UnsupportedModel { .. })), "{name}");
        assert_eq!(read_fixture(name).scales.layers().len(), 4);
    }
}

/// ModelOpt's checkpoint has plain weights: greedy tokens must be those of an independent decoder
/// (`fixtures/micro/make_modelopt_golden.py`, in numpy). They must agree until the other's own margin is
/// one that a flipped code of the cache can bridge, a few hundredths (`golden_micro.rs`).
#[test]
fn tokens_of_modelopt_are_those_of_an_independent_decoder() {
    const FLIP: f64 = 2e-2;
    let dir = fixture("micro/modelopt-tiny-kv");
    let golden = json_of(&dir.join("golden.json"));
    let mut model = load(&dir);
    let scales = kv_scales(model.weights(), model.config()).unwrap().unwrap();
    let ints =
        |value: &Value| -> Vec<u32> { value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect() };
    let mut compared = 0;
    for (i, prompt) in golden["ids"].as_array().unwrap().iter().map(ints).enumerate() {
        let spec = model.cache_spec(16, KvFormat::Fp8E4M3).unwrap();
        let (mut cache, table) = cache_for(&model, spec, &scales, prompt.len() + 24);
        let run = greedy(&mut model, &mut cache, &table, &prompt, prompt.len(), 24);
        for (at, (got, want)) in run.tokens.iter().zip(ints(&golden["new_ids"][i])).enumerate() {
            if *got != want {
                let margin = golden["margins"][i][at].as_f64().unwrap();
                assert!(margin < FLIP, "prompt {i}, token {at}: {got} for {want}, by {margin}");
                break;
            }
            compared += 1;
        }
    }
    println!("{compared} of 120 tokens compared");
    assert!(compared >= 110, "{compared}");
}

/// Every row of vLLM's table, as the only names of a checkpoint.
#[test]
fn every_naming_is_read() {
    for (k, v, tool, naming) in [
        ("self_attn.k_scale", "self_attn.v_scale", Tool::Unknown, Naming::Attention),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale", Tool::ModelOpt, Naming::Projection),
        ("mixer.k_proj.k_scale", "mixer.v_proj.v_scale", Tool::ModelOpt, Naming::Projection),
        ("self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale", Tool::ModelOpt, Naming::FusedProjection),
        ("self_attn.qkqkv_proj.k_scale", "self_attn.qkqkv_proj.v_scale", Tool::ModelOpt, Naming::FusedProjection),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale", Tool::Quark, Naming::Output),
        ("self_attn.k_cache.scale", "self_attn.v_cache.scale", Tool::Unknown, Naming::Cache),
        ("self_attn.attn.k_scale", "self_attn.attn.v_scale", Tool::Unknown, Naming::Vllm),
    ] {
        for prefix in ["model.", "language_model.model.", "backbone."] {
            let full = |name: &str| format!("{prefix}layers.{{l}}.{name}");
            let folder = Folder::of("naming", Value::Null, &scales(&full(k), &full(v)));
            let found = folder.found();
            assert_eq!(per_tensor(&found), expected(), "{k}");
            assert_eq!((found.origin.tool, found.origin.naming), (tool, Some(naming)), "{k}");
            assert_eq!(found.warnings, [""; 0], "{k}");
        }
    }
    // One for both.
    let single: Vec<Tensor> = (0..LAYERS)
        .map(|layer| f32s(format!("model.layers.{layer}.self_attn.kv_scale"), &[], &[value(layer, 0)]))
        .collect();
    let found = Folder::of("single", json!({"quant_method": "fp8", "kv_cache_scheme": "static"}), &single).found();
    assert_eq!(per_tensor(&found), (0..LAYERS).map(|l| (value(l, 0), value(l, 0))).collect::<Vec<_>>());
    assert_eq!((found.origin.tool, found.origin.key_range), (Tool::AutoFp8, KeyRange::PreRope));
    assert!(found.origin.shared);
    // Sizes on the second level, as models of images and text have them.
    let folder = Folder::of("nested", Value::Null, &attention_scales());
    let flat = config(compressed_tensors());
    folder.write("config.json", json!({"model_type": "mllama", "text_config": flat}).to_string());
    assert_eq!(per_tensor(&folder.found()), expected());
}

#[test]
fn every_float_type_and_shape_is_read() {
    let name = "model.layers.1.self_attn.v_scale";
    // The smallest f16 subnormal, a larger one, and a value that all types have.
    let cases: [(Dtype, Vec<u8>, f32); 8] = [
        (Dtype::F16, 1u16.to_le_bytes().to_vec(), 2f32.powi(-24)),
        (Dtype::F16, 279u16.to_le_bytes().to_vec(), 279.0 * 2f32.powi(-24)),
        (Dtype::BF16, bf16::from_f32(0.5).to_le_bytes().to_vec(), 0.5),
        (Dtype::F32, 0.5f32.to_le_bytes().to_vec(), 0.5),
        (Dtype::F32, 1u32.to_le_bytes().to_vec(), f32::from_bits(1)),
        (Dtype::F64, 0.1f64.to_le_bytes().to_vec(), 0.1),
        (Dtype::F8_E4M3, vec![0x38], 1.0),
        (Dtype::F8_E5M2, vec![0x38], 0.5),
    ];
    let folder = Folder::of("types", compressed_tensors(), &[]);
    let read = |tensor: Tensor| {
        let mut tensors = attention_scales();
        let place = tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap();
        *place = tensor;
        folder.write_tensors(&tensors);
        folder.found().scales.layers()[1].v.clone()
    };
    for (dtype, bytes, want) in cases {
        for shape in [vec![], vec![1], vec![1, 1, 1]] {
            let scale = read((name.into(), dtype, shape.clone(), bytes.clone()));
            assert_eq!(
                (scale.values(), scale.granularity()),
                (&[want][..], Granularity::Tensor),
                "{dtype:?} {shape:?}"
            );
        }
        for shape in [vec![KV_HEADS], vec![KV_HEADS, 1, 1]] {
            let scale = read((name.into(), dtype, shape, bytes.repeat(KV_HEADS)));
            assert_eq!((scale.values(), scale.granularity()), (&[want; KV_HEADS][..], Granularity::Head));
        }
    }
    let values: Vec<f32> = (1..=KV_HEADS * HEAD_DIM).map(|i| i as f32).collect();
    let scale = read(f32s(name, &[KV_HEADS, 1, HEAD_DIM], &values));
    assert_eq!((scale.values(), scale.granularity()), (&values[..], Granularity::Channel));
    assert_eq!(scale.get(1, 3), (HEAD_DIM + 4) as f32);
}

/// A whole checkpoint with a scale a channel, as this crate's calibration writes it.
#[test]
fn scales_per_channel_and_their_strategy() {
    let channel = with(compressed_tensors(), "kv_cache_scheme.strategy", json!("channel"));
    let values: Vec<f32> = (1..=KV_HEADS * HEAD_DIM).map(|i| i as f32 / 64.0).collect();
    let names = (0..LAYERS).flat_map(|l| ["k", "v"].map(|half| format!("model.layers.{l}.self_attn.{half}_scale")));
    let tensors: Vec<Tensor> = names.map(|name| f32s(name, &[KV_HEADS, 1, HEAD_DIM], &values)).collect();
    let folder = Folder::of("channel", channel.clone(), &tensors);
    let found = folder.found();
    assert_eq!(found.warnings, [""; 0]);
    assert!(found.scales.layers().iter().all(|pair| pair.k.values() == values && pair.v.values() == values));
    // A declaration of another granularity than the tensors' is worth a line: the tensors count.
    folder.write("config.json", config(compressed_tensors()).to_string());
    let found = folder.found();
    assert_eq!(found.warnings.len(), 1);
    assert!(found.warnings[0].contains("Tensor") && found.warnings[0].contains("Channel"), "{:?}", found.warnings);
    let folder = Folder::of("channel-as-tensor", channel, &attention_scales());
    assert_eq!(folder.found().warnings.len(), 1);
}

#[test]
fn optional_fields_may_be_missing_and_others_are_ignored() {
    let minimal = json!({
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        "what_is_this": [1, 2],
    });
    let old = with(compressed_tensors(), "kv_cache_scheme.observer", json!("minmax"));
    for (quantization, statistic) in [
        (minimal, Statistic::MovingAverage { constant: 0.01 }),
        (old, Statistic::MovingAverage { constant: 0.01 }),
        (
            with(compressed_tensors(), "kv_cache_scheme.observer_kwargs", json!({"averaging_constant": 0.25})),
            Statistic::MovingAverage { constant: 0.25 },
        ),
        (with(compressed_tensors(), "kv_cache_scheme.observer", json!("static_minmax")), Statistic::Absmax),
        (with(compressed_tensors(), "kv_cache_scheme.observer", json!("mse")), Statistic::Observer("mse".into())),
    ] {
        let folder = Folder::of("optional", quantization, &attention_scales());
        let found = folder.found();
        assert_eq!((per_tensor(&found), found.origin.statistic), (expected(), statistic));
    }
    // An unquantized checkpoint, one that declares scales without having any, and one without declaration.
    let folder = Folder::of("none", Value::Null, &[f32s("model.norm.weight", &[2], &[1.0, 1.0])]);
    assert_eq!(folder.read(&ReadOptions::default()).unwrap(), None);
    folder.write("config.json", config(compressed_tensors()).to_string());
    assert_eq!(folder.read(&ONE).unwrap(), None);
}

/// ModelOpt's two files, either alone and both.
#[test]
fn either_file_of_modelopt_declares() {
    let tensors = scales("model.layers.{l}.self_attn.k_proj.k_scale", "model.layers.{l}.self_attn.v_proj.v_scale");
    let hf = |algorithm: Value| {
        json!({"producer": {"name": "modelopt", "version": "0.33.1"},
               "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": algorithm}})
        .to_string()
    };
    for quantization in [Value::Null, modelopt(), json!({"quant_method": "modelopt", "kv_cache_scheme": "FP8"})] {
        let folder = Folder::of("modelopt", quantization.clone(), &tensors);
        folder.write("hf_quant_config.json", hf(json!("FP8")));
        let found = folder.found();
        assert_eq!((found.origin.tool, found.origin.key_range), (Tool::ModelOpt, KeyRange::PostRope));
        let version = if quantization.is_null() { Some("0.33.1") } else { None };
        assert_eq!(found.origin.version.as_deref(), version);
        assert_eq!(per_tensor(&found), expected());
        folder.write("hf_quant_config.json", hf(Value::Null));
        assert_eq!(per_tensor(&folder.found()), expected());
    }
}

#[test]
fn quark_says_which_keys_it_measured() {
    let output = json!({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": false, "symmetric": true,
                        "observer_cls": "PerTensorPercentileObserver"});
    let quark = json!({"quant_method": "quark", "kv_cache_post_rope": true, "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
                       "layer_quant_config": {"*k_proj": {"output_tensors": output}, "*o_proj": {"output_tensors": null}}});
    let tensors =
        scales("model.layers.{l}.self_attn.k_proj.output_scale", "model.layers.{l}.self_attn.v_proj.output_scale");
    let found = Folder::of("quark", quark.clone(), &tensors).found();
    assert_eq!(found.origin.key_range, KeyRange::PostRope);
    assert_eq!(found.origin.statistic, Statistic::Observer("PerTensorPercentileObserver".into()));
    assert!(!found.origin.shared);
    let mut nameless = quark;
    nameless.as_object_mut().unwrap().remove("quant_method");
    nameless["kv_cache_post_rope"] = json!(false);
    let found = Folder::of("quark-nameless", nameless, &tensors).found();
    assert_eq!((found.origin.tool, found.origin.key_range), (Tool::Quark, KeyRange::PreRope));
}

/// vLLM fills one half from the other if one is there; only `kv_scale` is meant so.
#[test]
fn a_part_of_the_scales_follows_the_policy() {
    let mut tensors = attention_scales();
    tensors.retain(|tensor| !tensor.0.contains("layers.1.") && tensor.0 != "model.layers.2.self_attn.k_scale");
    let folder = Folder::of("part", compressed_tensors(), &tensors);
    match folder.refused() {
        Error::MissingScales { path, layer, what, missing } => {
            assert_eq!((path.as_path(), layer, what, missing), (&*folder.path().join("model.safetensors"), 1, "K", 3));
        }
        other => panic!("{other:?}"),
    }
    let found = folder.read(&ONE).unwrap().unwrap();
    let mut want = expected();
    (want[1], want[2].0) = ((1.0, 1.0), 1.0);
    assert_eq!(per_tensor(&found), want);
    assert_eq!(found.warnings.len(), 2);
    assert!(found.warnings[0].contains("K of layers 1, 2 "), "{:?}", found.warnings);
    assert!(found.warnings[1].contains("V of layer 1 "), "{:?}", found.warnings);
}

#[test]
fn two_names_for_one_scale_must_agree() {
    let mut tensors = attention_scales();
    tensors.push(f32s("model.layers.1.self_attn.k_proj.k_scale", &[], &[value(1, 0)]));
    let folder = Folder::of("twice", compressed_tensors(), &tensors);
    let found = folder.found();
    assert_eq!(per_tensor(&found), expected());
    // Named in two ways: whose they are is not known any more.
    assert_eq!((found.origin.tool, found.warnings.len()), (Tool::Unknown, 1));
    *tensors.last_mut().unwrap() = f32s("model.layers.1.self_attn.kv_scale", &[], &[value(1, 0)]);
    folder.write_tensors(&tensors);
    let error = folder.refused();
    assert!(matches!(error, Error::InvalidFile { .. }));
    check_message(&error, &["layer 1", "kv_scale", "v_scale", "1.25", "1.375", "model.safetensors"]);
}

#[test]
fn names_of_another_tool_make_the_origin_unknown() {
    let tensors = scales("model.layers.{l}.self_attn.k_proj.k_scale", "model.layers.{l}.self_attn.v_proj.v_scale");
    let found = Folder::of("other-tool", compressed_tensors(), &tensors).found();
    assert_eq!(per_tensor(&found), expected());
    let origin = &found.origin;
    assert_eq!((origin.tool, origin.key_range), (Tool::Unknown, KeyRange::Unknown));
    assert_eq!(origin.statistic, Statistic::Unknown);
    assert!(found.warnings[0].contains("compressed-tensors"), "{:?}", found.warnings);
}

/// As in published checkpoints, where nobody initialised them.
#[test]
fn query_scales_never_fail_a_read() {
    let q = |layer: usize| format!("model.layers.{layer}.self_attn.q_scale");
    let mut tensors = attention_scales();
    tensors.push(f32s(q(0), &[HEADS, 1, 1], &[0.5, 2.0, 3.0, 1.0]));
    tensors.push(f32s(q(1), &[1], &[0.75]));
    let folder = Folder::of("queries", compressed_tensors(), &tensors);
    let found = folder.found();
    // The largest of each pair that shares a KV head.
    assert_eq!(found.scales.q()[0].as_ref().unwrap().values(), [2.0, 3.0]);
    assert_eq!(found.scales.q()[1].as_ref().unwrap().values(), [0.75]);
    assert_eq!(found.scales.q()[2], None);
    assert_eq!(found.warnings, [""; 0]);
    for (shape, values) in [
        (vec![1], vec![f32::NAN]),
        (vec![1], vec![0.0]),
        (vec![1], vec![-2.4e13]),
        (vec![HEADS, 1, 1], vec![1.0, f32::INFINITY, 1.0, 1.0]),
        (vec![3], vec![1.0; 3]),
        (vec![0], vec![]),
        (vec![HEADS, 1, HEAD_DIM], vec![1.0; HEADS * HEAD_DIM]),
    ] {
        *tensors.last_mut().unwrap() = f32s(q(1), &shape, &values);
        folder.write_tensors(&tensors);
        let found = folder.found();
        assert_eq!((per_tensor(&found), found.scales.q()[1].clone()), (expected(), None), "{shape:?} {values:?}");
        assert!(found.scales.q()[0].is_some());
        assert_eq!(found.warnings.len(), 1, "{:?}", found.warnings);
        assert!(found.warnings[0].contains("layer 1") && found.warnings[0].contains("q_scale"), "{:?}", found.warnings);
    }
    *tensors.last_mut().unwrap() = (q(1), Dtype::U8, vec![1], vec![7]);
    folder.write_tensors(&tensors);
    assert_eq!(folder.found().warnings.len(), 1);
}

#[test]
fn what_is_not_read_is_said() {
    let mut tensors = attention_scales();
    tensors.push(f32s("model.layers.3.self_attn.k_scale", &[1], &[1.0]));
    tensors.push(f32s("model.blocks.0.self_attn.k_scale", &[1], &[1.0]));
    tensors.push(f32s("vision_tower.layers.0.self_attn.k_scale", &[1], &[1.0]));
    tensors.push(f32s("model.layers.0.self_attn.prob_output_scale", &[1], &[f32::NAN]));
    tensors.push((String::from("model.layers.0.self_attn.k_zero_point"), Dtype::F8_E4M3, vec![1], vec![0x7f]));
    let found = Folder::of("unread", compressed_tensors(), &tensors).found();
    assert_eq!(per_tensor(&found), expected());
    assert_eq!(found.warnings.len(), 2, "{:?}", found.warnings);
    assert!(found.warnings[0].contains("model.layers.3.self_attn.k_scale"), "{:?}", found.warnings);
    assert!(found.warnings[1].contains("model.blocks.0.self_attn.k_scale"), "{:?}", found.warnings);
}

/// Only files the index names count, and scales may lie in any of them.
#[test]
fn sharded_checkpoints() {
    let folder = Folder::new("sharded");
    folder.write("config.json", config(compressed_tensors()).to_string());
    let tensors = attention_scales();
    let (first, second) = tensors.split_at(2);
    folder.write("a.safetensors", bytes_of(first));
    folder.write("b.safetensors", bytes_of(second));
    let file = |i| if i < 2 { "a.safetensors" } else { "b.safetensors" };
    let map: serde_json::Map<String, Value> =
        tensors.iter().enumerate().map(|(i, tensor)| (tensor.0.clone(), json!(file(i)))).collect();
    folder.write("model.safetensors.index.json", json!({"weight_map": map}).to_string());
    assert_eq!(per_tensor(&folder.found()), expected());
    // A bad value is reported in its own file.
    let mut bad = second.to_vec();
    bad[0] = f32s(bad[0].0.clone(), &[1], &[0.0]);
    folder.write("b.safetensors", bytes_of(&bad));
    check_message(&folder.refused(), &["b.safetensors", "layer 1", "k_scale", "0"]);
}

/// The files of vLLM up to 0.6 and SGLang, of one rank and of several.
#[test]
fn scales_files_of_several_ranks() {
    let folder = Folder::new("ranks");
    let path = folder.path().join("kv_cache_scales.json");
    let write = |ranks: Value| {
        folder.write(
            "kv_cache_scales.json",
            json!({"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": ranks}}).to_string(),
        );
    };
    let shape = ModelShape { num_layers: 2, num_heads: 8, num_kv_heads: 2, ..shape() };
    let read = |shard| read_scales_file(&path, &shape, &ReadOptions { shard, ..ReadOptions::default() }).unwrap();
    let values = |found: &CheckpointScales, layer: usize| found.scales.layers()[layer].k.values().to_vec();

    write(json!({"0": {"0": 0.5, "1": 2}}));
    let found = read(None);
    assert_eq!(per_tensor(&found), [(0.5, 0.5), (2.0, 2.0)]);
    assert_eq!((found.origin.tool, found.origin.shared), (Tool::ScalesFile, true));
    assert_eq!(found.warnings, [""; 0]);
    assert_eq!(values(&read(Some((3, 4))), 1), [2.0]);

    // Two ranks, a KV head each.
    write(json!({"0": {"0": 0.5, "1": 2}, "1": {"0": 0.25, "1": 2}}));
    let found = read(None);
    assert_eq!((values(&found, 0), values(&found, 1)), (vec![0.5, 0.25], vec![2.0]));
    assert!(found.warnings[0].contains("2 tensor-parallel ranks"), "{:?}", found.warnings);
    for rank in [0, 1] {
        let found = read(Some((rank, 2)));
        assert_eq!(per_tensor(&found)[0].0, [0.5, 0.25][rank]);
        assert_eq!((found.scales.num_heads(), found.scales.num_kv_heads()), (4, 1));
    }
    assert_eq!(values(&read(Some((3, 4))), 0), [0.25], "over four ranks, the last holds the second head");

    // Four ranks, two to a KV head: the larger of the two covers what either has seen.
    write(json!({"0": {"0": 0.5, "1": 1}, "1": {"0": 0.75, "1": 1}, "2": {"0": 3, "1": 1}, "3": {"0": 2, "1": 1}}));
    assert_eq!(values(&read(None), 0), [0.75, 3.0]);
    assert_eq!(values(&read(Some((0, 4))), 0), [0.5]);

    // A part of the layers of one rank.
    write(json!({"0": {"0": 0.5, "1": 2}, "1": {"0": 0.25}}));
    let error = read_scales_file(&path, &shape, &ReadOptions::default()).unwrap_err();
    assert!(matches!(error, Error::MissingScales { layer: 1, what: "K", missing: 2, .. }), "{error:?}");
    let found = read_scales_file(&path, &shape, &ONE).unwrap();
    assert_eq!(values(&found, 1), [2.0, 1.0]);
}

#[test]
fn the_decoder_reads_the_same() {
    let dir = fixture("micro/llmcompressor-tiny-kvhead");
    let (config, weights) = (Config::from_dir(&dir).unwrap(), Weights::open(&dir).unwrap());
    let layers = kv_scales(&weights, &config).unwrap().unwrap();
    assert_eq!(layers, read_fixture("micro/llmcompressor-tiny-kvhead").scales.into_layers());
    assert_eq!(ModelShape::from(&config), ModelShape::from_dir(&dir).unwrap());
}
