//! Checkpoints that hold nothing but scales: what the reader of scales needs, and no weight.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use quantkv::Error;
use quantkv::checkpoint::{CheckpointScales, MissingScales, ModelShape, ReadOptions, read_scales};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Layers, query heads, KV heads and channels of every model made here.
pub const LAYERS: usize = 3;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 16;

pub fn shape() -> ModelShape {
    ModelShape {
        model_type: Some("llama".into()),
        num_layers: LAYERS,
        num_heads: HEADS,
        num_kv_heads: KV_HEADS,
        head_dim: Some(HEAD_DIM),
    }
}

pub fn config(quantization: Value) -> Value {
    json!({
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": HEADS * HEAD_DIM,
        "quantization_config": quantization,
    })
}

/// compressed-tensors' declaration, as LLM Compressor writes it.
pub fn compressed_tensors() -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "version": "0.19.0",
        "config_groups": {},
        "kv_cache_scheme": {
            "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true, "dynamic": false,
            "actorder": null, "observer": null, "observer_kwargs": {}, "group_size": null,
        },
    })
}

pub fn modelopt() -> Value {
    json!({"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"}})
}

/// Sets `a.b.c` of an object.
pub fn with(mut value: Value, path: &str, new: Value) -> Value {
    let pointer = format!("/{}", path.replace('.', "/"));
    match value.pointer_mut(&pointer) {
        Some(place) => *place = new,
        None => {
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            let parent = if parent.is_empty() { &mut value } else { value.pointer_mut(parent).unwrap() };
            parent.as_object_mut().unwrap().insert(field.into(), new);
        }
    }
    value
}

/// (name, dtype, shape, bytes)
pub type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

pub fn f32s(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Tensor {
    (name.into(), Dtype::F32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

/// The value of layer `layer`'s K (0) or V (1) scale, all different and none 1.
pub fn value(layer: usize, half: usize) -> f32 {
    0.25 + layer as f32 + half as f32 / 8.0
}

/// Per-tensor scales in every layer; `{l}` is the layer in the two patterns.
pub fn scales(k: &str, v: &str) -> Vec<Tensor> {
    let one = |pattern: &str, layer: usize, half| {
        f32s(pattern.replace("{l}", &layer.to_string()), &[1], &[value(layer, half)])
    };
    (0..LAYERS).flat_map(|layer| [one(k, layer, 0), one(v, layer, 1)]).collect()
}

/// LLM Compressor's names.
pub fn attention_scales() -> Vec<Tensor> {
    scales("model.layers.{l}.self_attn.k_scale", "model.layers.{l}.self_attn.v_scale")
}

/// A folder of its own, removed when dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!("quantkv-scales-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }

    /// With this configuration and these tensors.
    pub fn of(name: &str, quantization: Value, tensors: &[Tensor]) -> Folder {
        let folder = Folder::new(name);
        folder.write("config.json", config(quantization).to_string());
        folder.write_tensors(tensors);
        folder
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(file), bytes).unwrap();
    }

    pub fn write_tensors(&self, tensors: &[Tensor]) {
        self.write("model.safetensors", bytes_of(tensors));
    }

    pub fn read(&self, options: &ReadOptions) -> Result<Option<CheckpointScales>, Error> {
        read_scales(&self.0, options)
    }

    /// The scales, where some must be found and nothing is wrong.
    pub fn found(&self) -> CheckpointScales {
        self.read(&ReadOptions::default()).unwrap().expect("scales")
    }

    pub fn refused(&self) -> Error {
        self.read(&ReadOptions::default()).expect_err("must be refused")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A safetensors file.
pub fn bytes_of(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

pub const ONE: ReadOptions = ReadOptions { missing: MissingScales::One, shard: None };

/// K and V of each layer that has one scale for the tensor.
pub fn per_tensor(found: &CheckpointScales) -> Vec<(f32, f32)> {
    let one = |scale: &quantkv::scale::StaticScale| match scale.values() {
        [only] => *only,
        more => panic!("{} scales", more.len()),
    };
    found.scales.layers().iter().map(|pair| (one(&pair.k), one(&pair.v))).collect()
}

/// What [`scales`] wrote.
pub fn expected() -> Vec<(f32, f32)> {
    (0..LAYERS).map(|layer| (value(layer, 0), value(layer, 1))).collect()
}

pub fn check_message(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    assert!(!text.contains('\n'), "{text:?}");
}
