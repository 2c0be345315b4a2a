//! Writing a checkpoint with KV scales, as LLM Compressor lays one out, beside the one it is made from.
//!
//! ```text
//! OUT/
//!   the model's weight files          hard links; copies where the file system has none. One file named
//!                                     model.safetensors becomes model-00001-of-00001.safetensors
//!   model-kv-scales.safetensors       model.layers.N.self_attn.{k,v}_scale, f32, [1], [H, 1, 1] or [H, 1, D]
//!   model.safetensors.index.json      names the file of every tensor
//!   config.json                       the model's text, with quantization_config put in
//!   tokenizer.json                    the model's text, without truncation and padding
//!   what else lies beside them        copied; not other formats of the weights, nor hidden files
//! ```
//! An index, since scales in a file of their own leave gigabytes of weights alone, and since readers
//! (transformers, vLLM, this crate) take exactly the files it names; a `model.safetensors` beside it would
//! be taken in its place, hence the new name. `[H, 1, D]` is this crate's own: other readers refuse it.
//!
//! All of it is made in a folder of its own beside OUT, forced to disk, and renamed: OUT is whole or not
//! there. Whatever ends the writing early, an error or its caller, removes that folder; a killed process
//! leaves it, under a name that begins with a dot and ends in `.partial`.

mod config;
mod files;
mod folder;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::decoder::Weights;
use crate::error::{Error, Result};
use crate::scale::{Granularity, LayerScales, StaticScale};

use files::{Files, SCALES};
use folder::NewFolder;

pub use files::Copied;

/// What to write.
#[derive(Clone, Debug)]
pub struct NewCheckpoint<'a> {
    /// The folder of the model the scales are of.
    pub model: &'a Path,
    /// The folder to make. It may exist if it is empty.
    pub out: &'a Path,
    /// A pair for each layer, all of one granularity.
    pub scales: &'a [LayerScales],
    /// `observer` and `observer_kwargs` of the `kv_cache_scheme`: how the scales were made, in LLM
    /// Compressor's words. `None` is its default, the moving average.
    pub observer: Option<(&'a str, Value)>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenCheckpoint {
    /// The files of OUT, by name.
    pub files: BTreeMap<String, Copied>,
    /// Files and folders of the model that were left out.
    pub skipped: Vec<String>,
}

/// Whether `out` can be made of `model`, without doing anything: what [`write_checkpoint`] refuses at its
/// start, for callers who are to compute for hours first.
///
/// # Errors
/// [`Error::InvalidRequest`] if `out` is not an empty folder or lies in the model's; [`Error::Io`] if there
/// is no folder to put it in; [`Error::UnsupportedModel`] for a model that is quantized or has KV scales.
pub fn check_checkpoint(model: &Path, out: &Path) -> Result<()> {
    NewFolder::check(model, out)?;
    config::check(&model.join("config.json"))?;
    refuse_scales(&Weights::open(model)?)
}

/// Writes the checkpoint as LLM Compressor lays one out: the model's weights (hard links where the file
/// system has them), scales in f32 as `model.layers.N.self_attn.{k,v}_scale` of shape `[1]`, `[H, 1, 1]` or this
/// crate's own `[H, 1, D]` in a file beside them, an index of both, and `config.json` with a
/// `quantization_config`. The folder is made under a temporary name, forced to disk and renamed: it is whole
/// or not there.
///
/// `None` if `progress`, asked between files and every few megabytes of a copy, ended
/// it. There is no folder then.
///
/// # Errors
/// As [`check_checkpoint`]; [`Error::LengthMismatch`] unless `scales` fit the model's layers;
/// [`Error::InvalidFile`]; [`Error::Io`].
pub fn write_checkpoint(
    new: &NewCheckpoint<'_>,
    progress: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<WrittenCheckpoint>> {
    check_checkpoint(new.model, new.out)?;
    let strategy = strategy(new)?;
    let weights = Weights::open(new.model)?;
    let folder = NewFolder::make(new.out)?;
    let mut files = Files::new(new.model, folder.path(), progress);
    let mut index = files.link_weights(&weights)?;
    let config = config::with_scheme(&new.model.join("config.json"), &scheme(strategy, new.observer.as_ref()))?;
    files.write("config.json", &config)?;
    let (bytes, scale_bytes) = scales_file(new.scales)?;
    files.write(SCALES, &bytes)?;
    index.add_scales(new.scales.len(), scale_bytes);
    files.write("model.safetensors.index.json", index.to_json().as_bytes())?;
    files.copy_tokenizer()?;
    files.copy_rest()?;
    let Some(written) = files.finish() else { return Ok(None) };
    folder.rename(new.out)?;
    Ok(Some(written))
}

/// Refuses a model with scales: two sets in one checkpoint would leave it to the reader which counts.
fn refuse_scales(weights: &Weights) -> Result<()> {
    const ENDS: [&str; 6] =
        [".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale", ".q_scale"];
    match weights.names().filter(|name| ENDS.iter().any(|end| name.ends_with(end))).min() {
        None => Ok(()),
        Some(name) => Err(Error::UnsupportedModel {
            path: weights.path().to_owned(),
            field: "tensor".into(),
            value: name.to_owned(),
            supported: "a model without KV scales; take the one that these scales were added to".into(),
        }),
    }
}

/// The scheme's name of the granularity that all scales have, after checking that they fit the model.
fn strategy(new: &NewCheckpoint<'_>) -> Result<&'static str> {
    let config = crate::decoder::Config::from_dir(new.model)?;
    if new.scales.len() != config.num_layers {
        let (expected, got) = (config.num_layers, new.scales.len());
        return Err(Error::LengthMismatch { what: "the number of layers with scales", expected, got });
    }
    let granularity = new.scales[0].k.granularity();
    for (layer, scales) in new.scales.iter().enumerate() {
        for scale in [&scales.k, &scales.v] {
            let expected = granularity.len(config.num_kv_heads, config.head_dim);
            if scale.granularity() != granularity || scale.values().len() != expected {
                let got = scale.values().len();
                return Err(Error::LengthMismatch { what: "the scales of a layer", expected, got }.in_layer(layer));
            }
        }
    }
    Ok(match granularity {
        Granularity::Tensor => "tensor",
        Granularity::Head => "attn_head",
        Granularity::Channel => "channel",
    })
}

/// The block that LLM Compressor 0.14 writes for a KV cache alone, field by field. `config_groups` is there
/// though empty: only where it is does vLLM 0.33 count a model's heads, which it needs for scales per head.
fn scheme(strategy: &str, observer: Option<&(&str, Value)>) -> Value {
    let (name, arguments) = observer.map_or((Value::Null, json!({})), |(name, args)| (json!(name), args.clone()));
    json!({
        "config_groups": {},
        "format": "dense",
        "global_compression_ratio": null,
        "ignore": [],
        "kv_cache_scheme": {
            "actorder": null,
            "block_structure": null,
            "dynamic": false,
            "group_size": null,
            "num_bits": 8,
            "observer": name,
            "observer_kwargs": arguments,
            "scale_dtype": null,
            "strategy": strategy,
            "symmetric": true,
            "type": "float",
            "zp_dtype": null
        },
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0"
    })
}

/// The tensor that holds the K or V scales of a layer.
fn scale_name(layer: usize, half: &str) -> String {
    format!("model.layers.{layer}.self_attn.{half}_scale")
}

/// The file of all scales, and how many bytes of it are scales.
fn scales_file(layers: &[LayerScales]) -> Result<(Vec<u8>, usize)> {
    let bytes = |scale: &StaticScale| scale.values().iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let shape = |scale: &StaticScale| match scale.granularity() {
        Granularity::Tensor => vec![1],
        Granularity::Head => vec![scale.values().len(), 1, 1],
        Granularity::Channel => {
            let head_dim = scale.strides().head;
            vec![scale.values().len() / head_dim, 1, head_dim]
        }
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = layers
        .iter()
        .enumerate()
        .flat_map(|(layer, scales)| [(layer, "k", &scales.k), (layer, "v", &scales.v)])
        .map(|(layer, half, scale)| (scale_name(layer, half), shape(scale), bytes(scale)))
        .collect();
    let size = tensors.iter().map(|(.., bytes)| bytes.len()).sum();
    let invalid = |error: safetensors::SafeTensorError| Error::InvalidFile {
        path: PathBuf::from(SCALES),
        reason: format!("cannot be made: {error}"),
    };
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<_, _>>()
        .map_err(invalid)?;
    // What transformers looks for in every file.
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    safetensors::serialize(views, Some(metadata)).map(|file| (file, size)).map_err(invalid)
}
