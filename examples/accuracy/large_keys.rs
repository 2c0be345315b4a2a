//! The same model with large keys.
//!
//! Attention sees keys only in products with queries. Keys times a power of two and queries divided by it
//! give the same products to the bit (RoPE commutes with a factor), so the model computes what it did,
//! but its keys reach thousands, as those of some real models do.
//!
//! ```text
//! without norms of heads:   k_proj.{weight,bias} * factor,  q_proj.{weight,bias} / factor
//! with them (Qwen3):        k_norm.weight * factor,         q_norm.weight / factor
//! ```
//! The folder holds links to the model's files, one new file with these tensors, and an index that says
//! which tensor lies where.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use quantkv::DType;
use quantkv::decoder::{Config, HostTensor, Weights};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tempfile::TempDir;

use crate::common::program::Failure;

/// The file of the tensors that change.
const SCALED: &str = "scaled.safetensors";

/// Half of the largest f16, since the scored texts may reach further than the calibration texts.
const LARGEST: f32 = 32768.0;

/// A model folder that is removed when this is dropped.
pub struct LargeKeys {
    dir: TempDir,
}

impl LargeKeys {
    /// The model of `dir` with keys `factor` times as large; a power of two.
    pub fn make(dir: &Path, config: &Config, weights: &Weights, factor: f32) -> Result<LargeKeys, Failure> {
        let temp = tempfile::Builder::new().prefix("quantkv-large-keys-").tempdir();
        let temp = temp.map_err(|error| Failure::User(format!("a temporary folder: {error}")))?;
        let scaled = scaled_tensors(config, weights, factor)?;
        write_folder(dir, temp.path(), weights, &scaled)?;
        Ok(LargeKeys { dir: temp })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// The power of two that brings the largest key of every layer to at least `wanted`, or as near as no key
/// gets beyond what f16 holds. `layers` is the range of these largest keys.
pub fn factor_for(layers: (f32, f32), wanted: f32) -> f32 {
    let (least, most) = ((wanted / layers.0).log2().ceil(), (LARGEST / layers.1).log2().floor());
    least.min(most).clamp(0.0, 100.0).exp2()
}

struct Scaled {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn scaled_tensors(config: &Config, weights: &Weights, factor: f32) -> quantkv::Result<Vec<Scaled>> {
    let (k, q) = if config.qk_norm { ("k_norm", "q_norm") } else { ("k_proj", "q_proj") };
    let mut scaled = Vec::new();
    for layer in 0..config.num_layers {
        for (module, factor) in [(k, factor), (q, factor.recip())] {
            for part in ["weight", "bias"] {
                let name = format!("model.layers.{layer}.self_attn.{module}.{part}");
                if weights.contains(&name) {
                    scaled.push(scale(&weights.tensor(&name)?, factor));
                }
            }
        }
    }
    Ok(scaled)
}

/// Exact in f32 and bf16. f16 has too few exponents: it becomes f32.
fn scale(tensor: &HostTensor, factor: f32) -> Scaled {
    let values = tensor.to_f32().into_iter().map(|value| value * factor);
    let (dtype, bytes) = match tensor.dtype() {
        DType::BF16 => (Dtype::BF16, values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()),
        DType::F32 | DType::F16 => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
    };
    Scaled { name: tensor.name().to_owned(), dtype, shape: tensor.shape().to_vec(), bytes }
}

fn write_folder(from: &Path, to: &Path, weights: &Weights, scaled: &[Scaled]) -> Result<(), Failure> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| Failure::User(format!("{path}: {error}"))
    };
    fs::copy(from.join("config.json"), to.join("config.json")).map_err(failed(to))?;

    let views = scaled.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        view.map(|view| (tensor.name.as_str(), view))
    });
    let file = to.join(SCALED);
    let invalid = |error: safetensors::SafeTensorError| Failure::User(format!("{}: {error}", to.display()));
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(invalid)?;
    safetensors::serialize_to_file(views, None, &file).map_err(invalid)?;

    let mut weight_map: BTreeMap<String, String> = BTreeMap::new();
    let mut links: BTreeMap<PathBuf, String> = BTreeMap::new();
    for name in weights.names() {
        // What is stored in another type is not the decoder's either.
        let Ok(tensor) = weights.tensor(name) else { continue };
        let number = links.len();
        let link = links.entry(tensor.path().to_owned()).or_insert_with(|| format!("original-{number}.safetensors"));
        weight_map.insert(name.to_owned(), link.clone());
    }
    weight_map.extend(scaled.iter().map(|tensor| (tensor.name.clone(), SCALED.to_owned())));
    for (file, name) in &links {
        link(file, &to.join(name)).map_err(failed(file))?;
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map }).to_string();
    let path = to.join("model.safetensors.index.json");
    fs::write(&path, index).map_err(failed(&path))
}

#[cfg(unix)]
fn link(file: &Path, name: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(file.canonicalize()?, name)
}

#[cfg(not(unix))]
fn link(file: &Path, name: &Path) -> std::io::Result<()> {
    fs::copy(file, name).map(|_| ())
}
