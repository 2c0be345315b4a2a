//! Scales beside the weights: a tensor for K and one for V in each layer, perhaps one for Q.
//!
//! ```text
//! shape                 scale                  dtype
//! [], [1], [1, 1, 1]    per tensor             f64, f32, f16, bf16, FP8 E4M3, FP8 E5M2
//! [H], [H, 1, 1]        per KV head (Q: per query head)
//! [H, 1, D]             per KV head and channel: this crate's own extension
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use super::declaration::Declaration;
use super::names::{Naming, Role, ScaleName, looks_like_kv_scale};
use super::origin::{KeyRange, Origin, Statistic, Tool};
use super::shape::ModelShape;
use super::weights::Weights;
use super::{CheckpointScales, MissingScales, ReadOptions};
use crate::error::{Error, Result};
use crate::json::{Object, read_object, shorten};
use crate::layout::MAX_HEAD_DIM;
use crate::scale::{Granularity, LayerScales, Scales, StaticScale};

/// The KV scales of the checkpoint in `dir`, whatever its weights are; `None` if it carries none.
///
/// # Errors
/// [`Error::Io`]; [`Error::InvalidFile`] for a file that is broken, a tensor of another shape, or two that
/// disagree; [`Error::UnsupportedModel`] if the configuration says they are not static FP8 E4M3 scales, or a
/// tensor is of another type; [`Error::InvalidScale`]; [`Error::MissingScales`]; [`Error::Shard`].
pub fn read_scales(dir: &Path, options: &ReadOptions) -> Result<Option<CheckpointScales>> {
    let path = dir.join("config.json");
    let map = read_object(&path)?;
    let root = Object { path: &path, prefix: "", map: &map };
    let shape = ModelShape::parse(&root)?;
    let declaration = Declaration::parse(&root)?.with_hf_quant_config(dir)?;
    Reader { weights: &Weights::open_for_a_few(dir)?, shape: &shape, declaration }.read(options)
}

/// [`read_scales`] of weights that are open already, for a model of known shape. What the configuration
/// beside them says of scales is read, if there is one.
///
/// # Errors
/// As [`read_scales`]; [`Error::Unsupported`] and [`Error::HeadsNotDivisible`] for a shape of no model.
pub fn scales_in(weights: &Weights, shape: &ModelShape, options: &ReadOptions) -> Result<Option<CheckpointScales>> {
    shape.check()?;
    let declaration = declaration_beside(weights)?;
    Reader { weights, shape, declaration }.read(options)
}

/// The scales of keys and values alone, a pair for each layer of the decoder's model, which must have
/// all of them or none.
///
/// # Errors
/// As [`read_scales`].
#[cfg(feature = "decoder")]
pub fn kv_scales(weights: &Weights, config: &crate::decoder::Config) -> Result<Option<Vec<LayerScales>>> {
    let found = scales_in(weights, &config.into(), &ReadOptions::default())?;
    Ok(found.map(|found| found.scales.into_layers()))
}

/// Why [`scales_in`] found none, in words.
#[cfg(feature = "decoder")]
pub(crate) fn why_none(weights: &Weights) -> Result<String> {
    if let Some(name) = weights.names().filter(|name| looks_like_kv_scale(name)).min() {
        return Ok(format!("the checkpoint's KV scales ({}) are not among those this version reads", shorten(name)));
    }
    Ok(match declaration_beside(weights)?.declared {
        true => "the checkpoint's configuration declares an FP8 KV cache, but it carries no KV scales".into(),
        false => "the checkpoint carries no KV scales".into(),
    })
}

fn declaration_beside(weights: &Weights) -> Result<Declaration> {
    if weights.names().next().is_none() {
        return Ok(Declaration::none());
    }
    weights.path().parent().map_or_else(|| Ok(Declaration::none()), Declaration::from_dir)
}

/// The tensors of one layer that have a word on its scales.
#[derive(Default)]
struct LayerTensors<'a> {
    k: Vec<&'a str>,
    v: Vec<&'a str>,
    q: Vec<&'a str>,
}

/// Everything that is named like a scale.
#[derive(Default)]
struct Tensors<'a> {
    layers: BTreeMap<usize, LayerTensors<'a>>,
    /// Of K and V, each once.
    namings: Vec<Naming>,
    /// Of layers the model does not have.
    beyond: Vec<&'a str>,
    unread: Vec<&'a str>,
}

struct Reader<'a> {
    weights: &'a Weights,
    shape: &'a ModelShape,
    declaration: Declaration,
}

impl Reader<'_> {
    fn read(self, options: &ReadOptions) -> Result<Option<CheckpointScales>> {
        let tensors = self.tensors()?;
        if tensors.namings.is_empty() {
            return Ok(None);
        }
        let mut warnings = Vec::new();
        let layers = self.layers(&tensors, options.missing, &mut warnings)?;
        let q = self.queries(&tensors, &mut warnings);
        let origin = self.origin(&tensors, &layers, &mut warnings);
        note_names("belong to layers the model does not have", &tensors.beyond, &mut warnings);
        note_names("look like KV scales, but by no known name", &tensors.unread, &mut warnings);

        let (num_heads, num_kv_heads) = (self.shape.num_heads, self.shape.num_kv_heads);
        let mut scales = Scales::new(num_heads, num_kv_heads, layers)?.with_q(q)?;
        if let Some((rank, world)) = options.shard {
            scales = scales.shard(rank, world)?;
        }
        Ok(Some(CheckpointScales { scales, origin, warnings }))
    }

    fn tensors(&self) -> Result<Tensors<'_>> {
        let mut names: Vec<&str> = self.weights.names().collect();
        names.sort_unstable();
        let mut tensors = Tensors::default();
        for name in names {
            let Some(parsed) = ScaleName::parse(name) else {
                if looks_like_kv_scale(name) {
                    tensors.unread.push(name);
                }
                continue;
            };
            if parsed.role == Role::Offset {
                return Err(Error::UnsupportedModel {
                    path: self.weights.path_of(name).to_owned(),
                    field: format!("tensor {name}"),
                    value: "an offset of affine codes".into(),
                    supported: "symmetric codes, which have a scale only".into(),
                });
            }
            if parsed.layer >= self.shape.num_layers {
                tensors.beyond.push(name);
                continue;
            }
            let layer = tensors.layers.entry(parsed.layer).or_default();
            match parsed.role {
                Role::K => layer.k.push(name),
                Role::V => layer.v.push(name),
                Role::Kv => {
                    layer.k.push(name);
                    layer.v.push(name);
                }
                Role::Q | Role::Offset => layer.q.push(name),
            }
            if parsed.role != Role::Q && !tensors.namings.contains(&parsed.naming) {
                tensors.namings.push(parsed.naming);
            }
        }
        Ok(tensors)
    }

    /// K and V of every layer.
    fn layers(
        &self,
        tensors: &Tensors<'_>,
        missing: MissingScales,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<LayerScales>> {
        let none = LayerTensors::default();
        let (mut layers, mut holes) = (Vec::with_capacity(self.shape.num_layers), Holes::default());
        for layer in 0..self.shape.num_layers {
            let names = tensors.layers.get(&layer).unwrap_or(&none);
            let (k, v) = (self.agreed(layer, &names.k)?, self.agreed(layer, &names.v)?);
            holes.k.extend(k.is_none().then_some(layer));
            holes.v.extend(v.is_none().then_some(layer));
            let or_one = |scale: Option<StaticScale>| scale.unwrap_or_else(StaticScale::one);
            layers.push(LayerScales { k: or_one(k), v: or_one(v) });
        }
        holes.settle(self.weights.path(), missing, warnings)?;
        Ok(layers)
    }

    /// The scale that all of `names` hold; `None` if there are none.
    fn agreed(&self, layer: usize, names: &[&str]) -> Result<Option<StaticScale>> {
        let mut agreed: Option<StaticScale> = None;
        for name in names {
            let scale = self.scale(layer, name)?;
            match &agreed {
                Some(first) if *first != scale => {
                    let reason = format!(
                        "layer {layer} has two scales for the same half: {:?} is {:?}, {name:?} is {:?}",
                        names[0],
                        Short(first.values()),
                        Short(scale.values())
                    );
                    return Err(Error::InvalidFile { path: self.weights.path_of(name).to_owned(), reason });
                }
                Some(_) => {}
                None => agreed = Some(scale),
            }
        }
        Ok(agreed)
    }

    /// A scale of K or V.
    fn scale(&self, layer: usize, name: &str) -> Result<StaticScale> {
        let (heads, head_dim) = (self.shape.num_kv_heads, self.shape.head_dim);
        let (shape, values) = self.weights.floats(name, heads * head_dim.unwrap_or(MAX_HEAD_DIM))?;
        let path = self.weights.path_of(name);
        let what = format!("{}: layer {layer}, {name}", path.display());
        match shape[..] {
            [] | [1] | [1, 1] | [1, 1, 1] => StaticScale::per_tensor(&what, values[0]),
            [h] | [h, 1, 1] if h == heads => StaticScale::per_head(&what, values),
            [h, 1, d] if h == heads && head_dim.is_none_or(|head_dim| head_dim == d) => {
                StaticScale::per_channel(&what, d, values)
            }
            _ => {
                let channels = head_dim.map_or_else(|| "D".to_owned(), |d| d.to_string());
                let reason = format!(
                    "layer {layer}: {name:?} has shape {shape:?}; \
                     expected [], [1], [{heads}], [{heads}, 1, 1] or [{heads}, 1, {channels}]"
                );
                Err(Error::InvalidFile { path: path.to_owned(), reason })
            }
        }
    }

    /// Scales of queries, per tensor or KV head, where they are usable.
    fn queries(&self, tensors: &Tensors<'_>, warnings: &mut Vec<String>) -> Vec<Option<StaticScale>> {
        let mut unusable: Vec<(usize, Error)> = Vec::new();
        let mut scale = |layer| {
            let name = tensors.layers.get(&layer)?.q.first()?;
            self.query(layer, name).map_err(|error| unusable.push((layer, error))).ok()
        };
        let scales = (0..self.shape.num_layers).map(&mut scale).collect();
        if let Some((_, error)) = unusable.first() {
            let layers = list(unusable.iter().map(|(layer, _)| *layer));
            warnings.push(format!("q scales of {layers} are unusable and left out ({error})"));
        }
        scales
    }

    fn query(&self, layer: usize, name: &str) -> Result<StaticScale> {
        let (heads, kv_heads) = (self.shape.num_heads, self.shape.num_kv_heads);
        let (shape, values) = self.weights.floats(name, heads)?;
        let path = self.weights.path_of(name);
        let what = format!("{}: layer {layer}, {name}", path.display());
        match shape[..] {
            [] | [1] | [1, 1] | [1, 1, 1] => StaticScale::per_tensor(&what, values[0]),
            [h] | [h, 1, 1] if h == heads => StaticScale::max_of_groups(&what, &values, kv_heads),
            [h] | [h, 1, 1] if h == kv_heads => StaticScale::per_head(&what, values),
            _ => {
                let reason = format!("layer {layer}: {name:?} has shape {shape:?}; expected [1] or [{heads}, 1, 1]");
                Err(Error::InvalidFile { path: path.to_owned(), reason })
            }
        }
    }

    /// What the configuration says, as far as the tensors do not contradict it.
    fn origin(&self, tensors: &Tensors<'_>, layers: &[LayerScales], warnings: &mut Vec<String>) -> Origin {
        let shared = layers.iter().all(|scales| scales.k == scales.v);
        let declared = &self.declaration.origin;
        let naming = tensors.namings[0];
        if let [first, second, ..] = tensors.namings[..] {
            warnings.push(format!("KV scales are named in more than one way: {first} and {second}"));
            return Origin { shared, version: declared.version.clone(), ..Origin::unknown() };
        }
        if let Some(granularity) = self.declaration.granularity {
            // Of one KV head, a scale a head is one for the tensor.
            let one_head = self.shape.num_kv_heads == 1 && granularity == Granularity::Head;
            let differs = |scales: &LayerScales| scales.k.granularity() != granularity && !one_head;
            if let Some(layer) = layers.iter().position(differs) {
                let found = layers[layer].k.granularity();
                warnings.push(format!(
                    "config.json declares scales per {granularity:?}, layer {layer} has them per {found:?}"
                ));
            }
        }
        let origin = Origin { shared, naming: Some(naming), ..declared.clone() };
        if declared.tool == Tool::Unknown {
            let (tool, key_range, statistic) = inferred(naming);
            return Origin { tool, key_range, statistic, ..origin };
        }
        if !declared.tool.writes(naming) {
            warnings.push(format!(
                "config.json names {} as the scales' tool, which does not name them {naming}",
                declared.tool
            ));
            return Origin {
                tool: Tool::Unknown,
                key_range: KeyRange::Unknown,
                statistic: Statistic::Unknown,
                ..origin
            };
        }
        origin
    }
}

/// What names alone tell, without a configuration.
fn inferred(naming: Naming) -> (Tool, KeyRange, Statistic) {
    match naming {
        Naming::Single => (Tool::AutoFp8, KeyRange::PreRope, Statistic::Absmax),
        Naming::Projection | Naming::FusedProjection => (Tool::ModelOpt, KeyRange::PostRope, Statistic::Absmax),
        Naming::Output => (Tool::Quark, KeyRange::Unknown, Statistic::Unknown),
        Naming::Attention | Naming::Cache | Naming::Vllm => (Tool::Unknown, KeyRange::Unknown, Statistic::Unknown),
    }
}

/// Layers without a scale, by half.
#[derive(Default)]
pub(super) struct Holes {
    pub k: Vec<usize>,
    pub v: Vec<usize>,
}

impl Holes {
    /// Applies the policy.
    pub fn settle(self, path: &Path, missing: MissingScales, warnings: &mut Vec<String>) -> Result<()> {
        let total = self.k.len() + self.v.len();
        let first = |layers: &[usize]| layers.first().copied().unwrap_or(usize::MAX);
        let (layer, what) = match (first(&self.k), first(&self.v)) {
            (k, v) if v < k => (v, "V"),
            (k, _) => (k, "K"),
        };
        match missing {
            _ if total == 0 => {}
            MissingScales::Error => {
                return Err(Error::MissingScales { path: path.to_owned(), layer, what, missing: total });
            }
            MissingScales::One => {
                for (what, layers) in [("K", self.k), ("V", self.v)] {
                    if !layers.is_empty() {
                        let layers = list(layers.into_iter());
                        warnings
                            .push(format!("{what} of {layers} has no scale in the checkpoint; 1.0 takes its place"));
                    }
                }
            }
        }
        Ok(())
    }
}

/// `layer 3`, `layers 0, 1, 5`, `layers 0, 1, 2, 3, 4, 5, 6, 7 and 24 more`.
pub(super) fn list(layers: impl ExactSizeIterator<Item = usize>) -> String {
    const SHOWN: usize = 8;
    let count = layers.len();
    let shown: Vec<String> = layers.take(SHOWN).map(|layer| layer.to_string()).collect();
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    format!("layer{} {}{more}", if count == 1 { "" } else { "s" }, shown.join(", "))
}

fn note_names(what: &str, names: &[&str], warnings: &mut Vec<String>) {
    if let Some(first) = names.first() {
        let (count, first) = (names.len(), shorten(first));
        warnings.push(format!(
            "tensors that {what} are not read: {first}{}",
            match count {
                1 => String::new(),
                _ => format!(" and {} more", count - 1),
            }
        ));
    }
}

/// The first few values, for one line of an error.
struct Short<'a>(&'a [f32]);

impl std::fmt::Debug for Short<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            [only] => write!(f, "{only}"),
            [first, .., last] => write!(f, "{first} .. {last}"),
            [] => f.write_str("nothing"),
        }
    }
}
