//! The separate scales file of vLLM up to 0.6 (`--quantization-param-path`) and SGLang.
//!
//! ```text
//! { "model_type": "llama",                                     optional
//!   "kv_cache": { "dtype": "float8_e4m3fn",
//!                 "scaling_factor": { "0": { "0": 0.98, "1": 0.06 } } } }    rank, layer: K and V
//! ```
//! A file of several tensor-parallel ranks has a scale for each rank's KV heads. Read for the whole model,
//! that is a scale a KV head: that of the rank which caches the head, and the largest of them where several
//! ranks cache copies of it. Read for one rank of as many, it is that rank's one scale.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use super::origin::{Origin, Tool};
use super::safetensors::Holes;
use super::shape::ModelShape;
use super::{CheckpointScales, ReadOptions};
use crate::error::Result;
use crate::json::{Object, kind, read_object};
use crate::scale::{LayerScales, Scales, StaticScale, check_scales, kv_heads_of_rank};

/// More ranks than any machine has; bounds what a hostile file makes us do.
const MAX_RANKS: usize = 1024;

/// Reads a scales file for a model of this shape: one scale a layer and rank, for K and V alike.
///
/// # Errors
/// [`Io`](crate::Error::Io); [`InvalidFile`](crate::Error::InvalidFile) naming the field that is missing or wrong (another model type,
/// ranks that do not count from 0 or cannot divide the heads, a layer too many);
/// [`UnsupportedModel`](crate::Error::UnsupportedModel) for another dtype than `float8_e4m3fn`;
/// [`InvalidScale`](crate::Error::InvalidScale); [`MissingScales`](crate::Error::MissingScales);
/// [`Shard`](crate::Error::Shard).
pub fn read_scales_file(path: &Path, shape: &ModelShape, options: &ReadOptions) -> Result<CheckpointScales> {
    shape.check()?;
    let root = read_object(path)?;
    let root = Object { path, prefix: "", map: &root };
    if let (Some(theirs), Some(ours)) = (root.str("model_type")?, &shape.model_type)
        && theirs != ours
    {
        return Err(root.invalid("model_type", format!("is {theirs:?}, the model is {ours:?}")));
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
    let file = Ranks::parse(&kv_cache, map, shape)?;

    let mut warnings = Vec::new();
    let holes: Vec<usize> = (0..shape.num_layers).filter(|layer| file.lacks(*layer)).collect();
    Holes { k: holes.clone(), v: holes }.settle(path, options.missing, &mut warnings)?;
    let scales = match options.shard {
        Some((rank, world)) if world == file.ranks.len() => file.rank(rank, shape)?,
        Some((rank, world)) => file.joined(shape)?.shard(rank, world)?,
        None => file.joined(shape)?,
    };
    if file.ranks.len() > 1 && options.shard.is_none() {
        warnings.push(format!(
            "the scales file is for {} tensor-parallel ranks; each KV head gets the scale of its rank",
            file.ranks.len()
        ));
    }
    Ok(CheckpointScales {
        scales,
        origin: Origin { tool: Tool::ScalesFile, shared: true, ..Origin::unknown() },
        warnings,
    })
}

/// The file's numbers, `[rank][layer]`; `None` where it has none.
struct Ranks {
    ranks: Vec<Vec<Option<f32>>>,
    /// The KV heads of each rank.
    heads: Vec<Range<usize>>,
}

impl Ranks {
    fn parse(kv_cache: &Object<'_>, map: &Map<String, Value>, shape: &ModelShape) -> Result<Ranks> {
        let world = map.len();
        let objects = Object { path: kv_cache.path, prefix: "kv_cache.scaling_factor.", map };
        if world == 0 {
            return Err(objects.invalid("0", "is missing"));
        }
        if world > MAX_RANKS {
            return Err(kv_cache.invalid("scaling_factor", format!("has {world} ranks, more than {MAX_RANKS}")));
        }
        let (mut ranks, mut heads) = (Vec::with_capacity(world), Vec::with_capacity(world));
        for rank in 0..world {
            let range = kv_heads_of_rank(rank, world, shape.num_heads, shape.num_kv_heads);
            heads.push(
                range.map_err(|error| kv_cache.invalid("scaling_factor", format!("has {world} ranks: {error}")))?,
            );
            let field = rank.to_string();
            let map = objects.object(&field)?.ok_or_else(|| {
                objects.invalid(&field, format!("is missing; ranks count from 0, and there are {world}"))
            })?;
            let prefix = format!("{}{field}.", objects.prefix);
            ranks.push(parse_rank(&Object { path: objects.path, prefix: &prefix, map }, shape.num_layers)?);
        }
        Ok(Ranks { ranks, heads })
    }

    fn lacks(&self, layer: usize) -> bool {
        self.ranks.iter().any(|layers| layers[layer].is_none())
    }

    /// What one rank needs.
    fn rank(&self, rank: usize, shape: &ModelShape) -> Result<Scales> {
        let world = self.ranks.len();
        let heads = kv_heads_of_rank(rank, world, shape.num_heads, shape.num_kv_heads)?;
        let pair = |scale: &Option<f32>| {
            let scale = StaticScale::per_tensor("scales file", scale.unwrap_or(1.0))?;
            Ok(LayerScales { k: scale.clone(), v: scale })
        };
        let layers = self.ranks[rank].iter().map(pair).collect::<Result<_>>()?;
        Scales::new(shape.num_heads / world, heads.len(), layers)
    }

    /// What the whole model needs.
    fn joined(&self, shape: &ModelShape) -> Result<Scales> {
        let layer = |layer: usize| {
            let mut per_head = vec![0f32; shape.num_kv_heads];
            for (layers, heads) in self.ranks.iter().zip(&self.heads) {
                for head in &mut per_head[heads.clone()] {
                    *head = head.max(layers[layer].unwrap_or(1.0));
                }
            }
            let scale = match per_head.iter().all(|scale| *scale == per_head[0]) {
                true => StaticScale::per_tensor("scales file", per_head[0])?,
                false => StaticScale::per_head("scales file", per_head)?,
            };
            Ok(LayerScales { k: scale.clone(), v: scale })
        };
        let layers = (0..shape.num_layers).map(layer).collect::<Result<_>>()?;
        Scales::new(shape.num_heads, shape.num_kv_heads, layers)
    }
}

fn parse_rank(layers: &Object<'_>, num_layers: usize) -> Result<Vec<Option<f32>>> {
    let mut scales = vec![None; num_layers];
    for (field, value) in layers.map {
        let field = crate::json::shorten(field);
        let canonical = |n: &usize| n.to_string() == field;
        let Some(layer) = field.parse().ok().filter(canonical) else {
            return Err(layers.invalid(&field, "is no layer"));
        };
        if layer >= num_layers {
            return Err(layers.invalid(&field, format!("is a layer the model does not have: it has {num_layers}")));
        }
        let Some(scale) = value.as_f64() else {
            return Err(layers.invalid(&field, format!("is {}, expected a number", kind(value))));
        };
        let scale = scale as f32;
        let what = format!("{}: layer {layer}, {}{field}", layers.path.display(), layers.prefix);
        check_scales(&what, &[scale])?;
        scales[layer] = Some(scale);
    }
    Ok(scales)
}
