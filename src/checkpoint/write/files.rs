//! The files of a new checkpoint: links, copies and texts, each on disk before the next.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::folder::io_error;
use super::{WrittenCheckpoint, config, scale_name};
use crate::decoder::Weights;
use crate::decoder::tokenizer::read_bounded;
use crate::error::{Error, Result};

/// The file of the scales.
pub(super) const SCALES: &str = "model-kv-scales.safetensors";
const SINGLE: &str = "model.safetensors";
/// What a single file is called beside an index.
const ONLY_SHARD: &str = "model-00001-of-00001.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 128 << 20;
const COPY_BYTES: usize = 4 << 20;

/// Endings of weights in other formats, which the scales do not belong to.
const OTHER_WEIGHTS: [&str; 9] =
    [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json"];
/// What other tools say of their own quantization.
const OTHER_TOOLS: [&str; 3] = ["hf_quant_config.json", "quantize_config.json", "recipe.yaml"];
/// The only folder of a model that belongs to every form of it.
const TEMPLATES: &str = "additional_chat_templates";

/// How a file came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// Another name of the model's own file.
    Linked,
    /// A copy of the model's.
    Copied,
    /// Written anew.
    Written,
}

/// Which file each tensor lies in.
pub(super) struct Index {
    metadata: Map<String, Value>,
    weight_map: BTreeMap<String, String>,
}

impl Index {
    pub fn add_scales(&mut self, layers: usize, bytes: usize) {
        for half in ["k", "v"] {
            self.weight_map.extend((0..layers).map(|layer| (scale_name(layer, half), SCALES.to_owned())));
        }
        if let Some(size) = self.metadata.get("total_size").and_then(Value::as_u64) {
            self.metadata.insert("total_size".into(), json!(size + bytes as u64));
        }
    }

    pub fn to_json(&self) -> String {
        format!("{:#}\n", json!({ "metadata": self.metadata, "weight_map": self.weight_map }))
    }
}

/// Files made so far, in a folder of their own.
pub(super) struct Files<'a> {
    model: &'a Path,
    out: &'a Path,
    progress: &'a mut dyn FnMut() -> ControlFlow<()>,
    ended: bool,
    made: BTreeMap<String, Copied>,
    skipped: Vec<String>,
}

impl<'a> Files<'a> {
    pub fn new(model: &'a Path, out: &'a Path, progress: &'a mut dyn FnMut() -> ControlFlow<()>) -> Self {
        Files { model, out, progress, ended: false, made: BTreeMap::new(), skipped: Vec::new() }
    }

    /// What was made; `None` if it was ended before it was all.
    pub fn finish(mut self) -> Option<WrittenCheckpoint> {
        self.skipped.sort_unstable();
        (!self.ended && !self.ends()).then_some(WrittenCheckpoint { files: self.made, skipped: self.skipped })
    }

    /// Whether the caller has had enough, now or before.
    fn ends(&mut self) -> bool {
        self.ended = self.ended || (self.progress)().is_break();
        self.ended
    }

    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.out.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(io_error(&path))?;
        self.made.insert(name.to_owned(), Copied::Written);
        Ok(())
    }

    /// The files of the weights, and the index of their tensors.
    pub fn link_weights(&mut self, weights: &Weights) -> Result<Index> {
        if weights.path() == self.model.join(SINGLE) {
            self.link(SINGLE, ONLY_SHARD)?;
            let weight_map = weights.names().map(|name| (name.to_owned(), ONLY_SHARD.to_owned())).collect();
            let total_size = weights.tensor_bytes();
            let metadata = [("total_size".to_owned(), json!(total_size))].into_iter().collect();
            return Ok(Index { metadata, weight_map });
        }
        let index = read_index(weights.path())?;
        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            if shard == SCALES || shard == SINGLE {
                let reason = format!("names the file {shard}, which a checkpoint with KV scales has no place for");
                return Err(Error::InvalidFile { path: weights.path().to_owned(), reason });
            }
            self.link(shard, shard)?;
        }
        Ok(index)
    }

    fn link(&mut self, from: &str, to: &str) -> Result<()> {
        if self.ends() {
            return Ok(());
        }
        let source = self.model.join(from);
        // A link to a symbolic link would be one, relative to another folder.
        let source = source.canonicalize().map_err(io_error(&source))?;
        match fs::hard_link(&source, self.out.join(to)) {
            Ok(()) => {
                self.made.insert(to.to_owned(), Copied::Linked);
                Ok(())
            }
            // Another file system, one without links, or a file that may not be linked.
            Err(_) => self.copy(&source, to),
        }
    }

    fn copy(&mut self, source: &Path, to: &str) -> Result<()> {
        let target = self.out.join(to);
        let mut reader = File::open(source).map_err(io_error(source))?;
        let mut writer = File::create_new(&target).map_err(io_error(&target))?;
        let mut buffer = vec![0; COPY_BYTES];
        while !self.ends() {
            let read = reader.read(&mut buffer).map_err(io_error(source))?;
            if read == 0 {
                break;
            }
            writer.write_all(&buffer[..read]).map_err(io_error(&target))?;
        }
        writer.sync_all().map_err(io_error(&target))?;
        self.made.insert(to.to_owned(), Copied::Copied);
        Ok(())
    }

    /// `tokenizer.json`, if the model has one.
    pub fn copy_tokenizer(&mut self) -> Result<()> {
        const NAME: &str = "tokenizer.json";
        let path = self.model.join(NAME);
        if !path.exists() {
            return Ok(());
        }
        match config::without_truncation(&path)? {
            Some(text) => self.write(NAME, &text),
            None => self.copy(&path, NAME),
        }
    }

    /// Everything else that belongs to the model.
    pub fn copy_rest(&mut self) -> Result<()> {
        for name in names(self.model)? {
            let path = self.model.join(&name);
            if self.made.contains_key(&name) || name == SINGLE || name == INDEX || self.ends() {
                continue;
            }
            let other = OTHER_WEIGHTS.iter().any(|end| name.ends_with(end)) || OTHER_TOOLS.contains(&name.as_str());
            if path.is_file() && !other && !name.starts_with('.') {
                self.copy(&path, &name)?;
            } else if path.is_dir() && name == TEMPLATES {
                let folder = self.out.join(&name);
                fs::create_dir(&folder).map_err(io_error(&folder))?;
                for template in names(&path)? {
                    self.copy(&path.join(&template), &format!("{name}/{template}"))?;
                }
            } else {
                self.skipped.push(name);
            }
        }
        Ok(())
    }
}

/// Names in a folder, sorted. One that is no UTF-8 belongs to no model.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error(folder))? {
        if let Ok(name) = entry.map_err(io_error(folder))?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// An index that [`Weights`] has checked.
fn read_index(path: &Path) -> Result<Index> {
    let invalid = || Error::InvalidFile { path: path.to_owned(), reason: "is not a valid index".into() };
    let bytes = read_bounded(path, MAX_INDEX_BYTES)?;
    let mut index: Value = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
    let metadata = index.get_mut("metadata").map(Value::take);
    let metadata = metadata.and_then(|value| value.as_object().cloned()).unwrap_or_default();
    let weight_map = index.get_mut("weight_map").map(Value::take).ok_or_else(invalid)?;
    Ok(Index { metadata, weight_map: serde_json::from_value(weight_map).map_err(|_| invalid())? })
}
