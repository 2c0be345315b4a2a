//! Which static scales the KV cache of a model gets, and what the user should know about it.
//!
//! ```text
//! format      source        scales
//! auto        any           1.0, unused; a hint if the checkpoint carries some
//! e4m3        checkpoint    the checkpoint's, else 1.0 and a warning
//! e4m3        file          one scale a layer (or head, if made for several ranks), for K and V
//! e5m2        the same      1.0: scales are made for e4m3; a warning if there were some
//! any fp8     first batch   K/200, V/100 of the first forward pass; 1.0 until then
//! ```
//! Unlike vLLM, `auto` never turns into FP8 because a checkpoint has scales: it is the model's own
//! dtype always.

use std::path::Path;

use super::config::Config;
use super::weights::Weights;
use crate::checkpoint::{self, CheckpointScales, MissingScales, Origin, ReadOptions};
use crate::error::Result;
use crate::format::KvFormat;
use crate::scale::LayerScales;

/// Where to take scales from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleSource<'a> {
    /// The model's own tensors, where it has some.
    Checkpoint,
    /// A `kv_cache_scales.json` as vLLM's `quantization_param_path` and SGLang read it.
    File(&'a Path),
    /// The first forward pass.
    FirstBatch,
}

/// Everything that may be asked for. A [`ScaleSource`] alone is one with the defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleOptions<'a> {
    /// Where to take scales from.
    pub source: ScaleSource<'a>,
    /// What to do where a checkpoint or file has scales for some layers only.
    pub missing: MissingScales,
}

impl<'a> From<ScaleSource<'a>> for ScaleOptions<'a> {
    fn from(source: ScaleSource<'a>) -> Self {
        ScaleOptions { source, missing: MissingScales::default() }
    }
}

/// Scales for every layer.
#[derive(Clone, Debug, PartialEq)]
pub struct KvScales {
    /// One entry a layer.
    pub layers: Vec<LayerScales>,
    /// Whether the first forward pass is to replace them.
    pub from_first_batch: bool,
    /// Where they come from, if from a checkpoint or a file.
    pub origin: Option<Origin>,
    /// One line each, for the user.
    pub warnings: Vec<String>,
}

/// Decides the scales of a cache in `format` for the model of `config` and `weights`.
///
/// # Errors
/// What [`checkpoint::scales_in`] and [`checkpoint::read_scales_file`] refuse, if they are asked.
pub fn resolve<'a>(
    config: &Config,
    weights: &Weights,
    format: KvFormat,
    options: impl Into<ScaleOptions<'a>>,
) -> Result<KvScales> {
    let ScaleOptions { source, missing } = options.into();
    let ones = vec![LayerScales::one(); config.num_layers];
    let mut scales = KvScales { layers: ones, from_first_batch: false, origin: None, warnings: Vec::new() };
    let options = ReadOptions { missing, shard: None };
    let mut warn = |text: String| scales.warnings.push(text);
    let carried = weights.names().filter(|name| checkpoint::names_a_kv_scale(name)).min();
    match (source, format, carried) {
        (ScaleSource::Checkpoint, format, Some(_)) if !format.is_quantized() => warn(format!(
            "the checkpoint carries KV scales; they are for an fp8 cache, an unquantized one ({format}) does not use them"
        )),
        (ScaleSource::Checkpoint, format, None) if !format.is_quantized() => {}
        (_, format, _) if !format.is_quantized() => {
            warn(format!("the cache is not quantized ({format}) and uses no scales"));
        }
        (ScaleSource::FirstBatch, ..) => scales.from_first_batch = true,
        (ScaleSource::Checkpoint, KvFormat::Fp8E5M2, None) => {}
        (ScaleSource::Checkpoint, KvFormat::Fp8E5M2, Some(_)) => {
            warn("the checkpoint's KV scales are made for fp8_e4m3; fp8_e5m2 ignores them and uses 1.0".into());
        }
        (ScaleSource::File(_), KvFormat::Fp8E5M2, _) => {
            warn("a scales file is made for fp8_e4m3; fp8_e5m2 ignores it and uses 1.0".into());
        }
        (ScaleSource::File(path), ..) => {
            scales.take(checkpoint::read_scales_file(path, &config.into(), &options)?);
        }
        (ScaleSource::Checkpoint, ..) => match checkpoint::scales_in(weights, &config.into(), &options)? {
            Some(found) => scales.take(found),
            None => {
                let (why, most) = (checkpoint::why_none(weights)?, format.max_finite());
                warn(format!("{why}; {format} uses 1.0 and cuts what lies beyond ±{most}"));
            }
        },
    }
    if format == KvFormat::Fp8E4M3Fnuz && !scales.from_first_batch {
        for (layer, pair) in scales.layers.iter_mut().enumerate() {
            pair.k = pair.k.doubled_for_fnuz(&format!("layer {layer} k_scale"))?;
            pair.v = pair.v.doubled_for_fnuz(&format!("layer {layer} v_scale"))?;
        }
    }
    Ok(scales)
}

impl KvScales {
    fn take(&mut self, found: CheckpointScales) {
        self.layers = found.scales.into_layers();
        self.origin = Some(found.origin);
        self.warnings.extend(found.warnings);
    }
}
