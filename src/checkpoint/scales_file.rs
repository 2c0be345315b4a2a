//! The separate scales file of vLLM up to 0.6 (`--quantization-param-path`) and SGLang.
//!
//! ```text
//! { "model_type": "llama",                                     optional
//!   "kv_cache": { "dtype": "float8_e4m3fn",
//!                 "scaling_factor": { "0": { "0": 0.98, "1": 0.06 } } } }    rank, layer: K and V
//! ```

use std::path::Path;

use crate::decoder::Config;
use crate::decoder::json::{Object, kind, read_object};
use crate::error::Result;
use crate::scale::{LayerScales, StaticScale};

/// Reads a scales file for a model: one scale a layer, for K and V alike.
///
/// # Errors
/// [`crate::Error::Io`]; [`crate::Error::InvalidFile`] naming the field that is missing or wrong (another model
/// type, more than one tensor-parallel rank, a layer missing or too many);
/// [`crate::Error::UnsupportedModel`] for another dtype than `float8_e4m3fn`; [`crate::Error::InvalidScale`].
pub fn read_scales_file(path: &Path, config: &Config) -> Result<Vec<LayerScales>> {
    let root = read_object(path)?;
    let root = Object { path, prefix: "", map: &root };
    if let Some(model_type) = root.str("model_type")?
        && model_type != config.architecture.name()
    {
        let reason = format!("is {model_type:?}, the model is {:?}", config.architecture.name());
        return Err(root.invalid("model_type", reason));
    }
    let map = root.object("kv_cache")?.ok_or_else(|| root.invalid("kv_cache", "is missing"))?;
    let kv_cache = Object { path, prefix: "kv_cache.", map };
    match kv_cache.str("dtype")? {
        Some("float8_e4m3fn") => {}
        Some(other) => return Err(kv_cache.unsupported("dtype", other, "float8_e4m3fn")),
        None => return Err(kv_cache.invalid("dtype", "is missing")),
    }
    let missing = || kv_cache.invalid("scaling_factor", "is missing");
    let map = kv_cache.object("scaling_factor")?.ok_or_else(missing)?;
    let ranks = Object { path, prefix: "kv_cache.scaling_factor.", map };
    if map.len() > 1 {
        let reason = format!("has {} ranks; only files for tensor-parallel size 1 are read", map.len());
        return Err(kv_cache.invalid("scaling_factor", reason));
    }
    let map = ranks.object("0")?.ok_or_else(|| ranks.invalid("0", "is missing"))?;
    let layers = Object { path, prefix: "kv_cache.scaling_factor.0.", map };
    if map.len() > config.num_layers {
        let reason = format!("has {} layers, the model has {}", map.len(), config.num_layers);
        return Err(ranks.invalid("0", reason));
    }
    (0..config.num_layers).map(|layer| layer_scale(&layers, layer)).collect()
}

fn layer_scale(layers: &Object<'_>, layer: usize) -> Result<LayerScales> {
    let field = layer.to_string();
    let value = layers.get(&field).ok_or_else(|| layers.invalid(&field, "is missing"))?;
    let Some(scale) = value.as_f64() else {
        return Err(layers.invalid(&field, format!("is {}, expected a number", kind(value))));
    };
    let what = format!("layer {layer}, {} {}{field}", layers.path.display(), layers.prefix);
    let scale = StaticScale::per_tensor(&what, scale as f32)?;
    Ok(LayerScales { k: scale.clone(), v: scale })
}
