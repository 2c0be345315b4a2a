//! Scales beside the weights: a tensor for K and one for V in each layer.
//!
//! ```text
//! name                                          dtype           shape
//! model.layers.N.self_attn.{k,v}_scale          any float       [], [1]: per tensor
//!                                                               [H], [H, 1, 1]: per KV head
//! ```

use crate::decoder::{Config, Weights};
use crate::error::{Error, Result};
use crate::scale::{LayerScales, StaticScale};

/// Names of one layer's scale tensors, below `model.layers.N.`.
const NAMES: (&str, &str) = ("self_attn.k_scale", "self_attn.v_scale");

/// The KV scales of a checkpoint, a pair for each layer; `None` if it carries none.
///
/// # Errors
/// [`Error::InvalidFile`] if only some layers have scales (naming the first tensor missing), or
/// for another shape; [`Error::InvalidScale`] naming layer and tensor;
/// [`Error::UnsupportedModel`] if `config.json` says they are not FP8 E4M3 scales.
pub fn kv_scales(weights: &Weights, config: &Config) -> Result<Option<Vec<LayerScales>>> {
    let names = |layer: usize| {
        let full = |name| format!("model.layers.{layer}.{name}");
        [full(NAMES.0), full(NAMES.1)]
    };
    let present = |layer| names(layer).iter().any(|name| weights.contains(name));
    if !(0..config.num_layers).any(present) {
        return Ok(None);
    }
    if let Some(scheme) = &config.kv_cache_scheme {
        if scheme.dynamic {
            return Ok(None);
        }
        if !scheme.is_fp8_e4m3() {
            let kind = scheme.kind.as_deref().unwrap_or("float");
            return Err(Error::UnsupportedModel {
                path: weights.path().with_file_name("config.json"),
                field: "quantization_config.kv_cache_scheme".into(),
                value: format!("{kind} with {:?} bits", scheme.num_bits.unwrap_or(8)),
                supported: "float with 8 bits (FP8 E4M3)".into(),
            });
        }
    }
    let layer_scales = |layer| {
        let [k, v] = names(layer);
        Ok(LayerScales { k: read(weights, config, layer, &k)?, v: read(weights, config, layer, &v)? })
    };
    (0..config.num_layers).map(layer_scales).collect::<Result<Vec<_>>>().map(Some)
}

fn read(weights: &Weights, config: &Config, layer: usize, name: &str) -> Result<StaticScale> {
    if !weights.contains(name) {
        let reason = format!("layer {layer} has no {name:?}, but other tensors say the checkpoint has KV scales");
        return Err(Error::InvalidFile { path: weights.path().to_owned(), reason });
    }
    let heads = config.num_kv_heads;
    let (shape, values) = weights.floats(name, heads)?;
    let what = format!("layer {layer}, {name}");
    match shape[..] {
        [] | [1] | [1, 1, 1] => StaticScale::per_tensor(&what, values[0]),
        [h] | [h, 1, 1] if h == heads => StaticScale::per_head(&what, values),
        _ => {
            let reason = format!("{name:?} has shape {shape:?}; expected [], [1], [{heads}] or [{heads}, 1, 1]");
            Err(Error::InvalidFile { path: weights.path().to_owned(), reason })
        }
    }
}
