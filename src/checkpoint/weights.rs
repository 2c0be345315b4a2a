//! safetensors files, memory-mapped: the tensors of a model as they lie on disk.
//!
//! A folder holds `model.safetensors`, or `model.safetensors.index.json` that names for each tensor
//! the shard it lies in; only the shards named there are opened. A [`HostTensor`] is a range of a
//! mapping: 16-bit weights stay 16-bit and nothing is copied.
//!
//! Headers are not trusted: sizes, offsets, names and shapes are checked when a file is opened,
//! before anything is read through them. What cannot be defended against is another process that
//! truncates a file while it is mapped.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::codec::{e4m3, e5m2};
use crate::error::{Error, Result};
#[cfg(feature = "decoder")]
use crate::format::Pod;
use crate::format::{DType, Element};
use crate::json::{one_line, read_limited, shorten};

#[cfg(target_endian = "big")]
compile_error!("safetensors are little-endian and are used where they lie");

/// The single-file name.
const SINGLE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";

/// A mapped file.
#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

/// One tensor of a checkpoint, where it lies. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HostTensor {
    file: Arc<MappedFile>,
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    /// First byte in the mapping; the tensor's bytes are known to lie in it.
    offset: usize,
}

impl HostTensor {
    /// The tensor's name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file it lies in.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Stored element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The stored bytes, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.file.map[self.offset..self.offset + self.num_elements() * self.dtype.bytes()]
    }

    /// The elements where they lie, if `T` is the stored type and the file aligns it (every writer
    /// in use does).
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        if T::DTYPE != self.dtype {
            return None;
        }
        // SAFETY: `T` is `Pod`, so every bit pattern is a value; `align_to` gives aligned slices.
        let (head, body, _) = unsafe { self.bytes().align_to::<T>() };
        (head.is_empty() && body.len() == self.num_elements()).then_some(body)
    }

    /// The elements, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes();
        let pairs = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            DType::F16 => pairs.map(|bits| f16::from_bits(bits).to_f32()).collect(),
            DType::BF16 => pairs.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        }
    }

    /// The elements copied to aligned memory.
    #[cfg(feature = "decoder")]
    pub(crate) fn copy_aligned<T: Element + Pod>(&self) -> Vec<T> {
        self.to_f32().into_iter().map(T::from_f32).collect()
    }
}

/// What a header says of one tensor.
#[derive(Debug)]
struct Entry {
    file: Arc<MappedFile>,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: usize,
}

/// The tensors of a checkpoint by name.
#[derive(Debug)]
pub struct Weights {
    /// Where a missing tensor is reported: the index, or the single file.
    root: PathBuf,
    entries: HashMap<String, Entry>,
    mapped_bytes: usize,
}

impl Weights {
    /// The tensors of a model that has no checkpoint.
    #[cfg(feature = "decoder")]
    pub(crate) fn none() -> Weights {
        Weights { root: PathBuf::from("(no checkpoint)"), entries: HashMap::new(), mapped_bytes: 0 }
    }

    /// Maps the checkpoint in `dir`.
    ///
    /// The files stay mapped as long as this or a tensor of it lives. Nobody may write to or truncate
    /// them meanwhile: values read would change, and a page past the new end stops the process
    /// (SIGBUS). Replace a checkpoint by renaming, not by writing over it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidFile`] naming the file and what is wrong in it.
    pub fn open(dir: &Path) -> Result<Weights> {
        Weights::open_reading(dir, ReadAhead::Yes)
    }

    /// [`Weights::open`] for a few small tensors: nothing is read ahead.
    pub(crate) fn open_for_a_few(dir: &Path) -> Result<Weights> {
        Weights::open_reading(dir, ReadAhead::No)
    }

    fn open_reading(dir: &Path, ahead: ReadAhead) -> Result<Weights> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let mut weights = Weights { root: single.clone(), entries: HashMap::new(), mapped_bytes: 0 };
            weights.add_file(&single, ahead, |_| true)?;
            return Ok(weights);
        }
        let index = dir.join(INDEX);
        if !index.exists() {
            let reason = format!("holds neither {SINGLE} nor {INDEX}");
            return Err(Error::InvalidFile { path: dir.to_owned(), reason });
        }
        Weights::open_sharded(dir, index, ahead)
    }

    fn open_sharded(dir: &Path, index: PathBuf, ahead: ReadAhead) -> Result<Weights> {
        let weight_map = read_index(&index)?;
        let mut shards: Vec<&str> = weight_map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        let mut weights = Weights { root: index.clone(), entries: HashMap::new(), mapped_bytes: 0 };
        for shard in shards {
            if !is_plain_name(shard) {
                let reason =
                    format!("weight_map names {:?}; a shard must be a file of the same folder", shorten(shard));
                return Err(Error::InvalidFile { path: index, reason });
            }
            // A tensor counts only in the shard the index names for it.
            weights
                .add_file(&dir.join(shard), ahead, |tensor| weight_map.get(tensor).is_some_and(|file| file == shard))?;
        }
        match weight_map.iter().find(|(tensor, _)| !weights.entries.contains_key(*tensor)) {
            Some((tensor, shard)) => {
                let reason = format!("tensor {:?} is not in the file, but the index says so", shorten(tensor));
                Err(Error::InvalidFile { path: dir.join(shard), reason })
            }
            None => Ok(weights),
        }
    }

    fn add_file(&mut self, path: &Path, ahead: ReadAhead, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let file = Arc::new(map_file(path, ahead)?);
        let (data_start, metadata) = read_header(&file)?;
        self.mapped_bytes = self.mapped_bytes.saturating_add(file.map.len());
        for (name, info) in metadata.tensors() {
            if wanted(&name) {
                let offset = data_start + info.data_offsets.0;
                let entry = Entry { file: file.clone(), dtype: info.dtype, shape: info.shape.clone(), offset };
                self.entries.insert(name, entry);
            }
        }
        Ok(())
    }

    /// The tensor of this name with a floating-point type.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if it is missing; [`Error::UnsupportedModel`] if it is stored in
    /// another type, as quantized weights are.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let Some(entry) = self.entries.get(name) else {
            let reason = format!("tensor {name:?} is missing");
            return Err(Error::InvalidFile { path: self.root.clone(), reason });
        };
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(Error::UnsupportedModel {
                    path: entry.file.path.clone(),
                    field: format!("the dtype of tensor {name}"),
                    value: format!("{other:?}"),
                    supported: "F32, F16, BF16".into(),
                });
            }
        };
        let (file, shape) = (entry.file.clone(), entry.shape.clone());
        Ok(HostTensor { file, name: name.to_owned(), dtype, shape, offset: entry.offset })
    }

    /// [`Weights::tensor`], with this shape.
    ///
    /// # Errors
    /// As there, and [`Error::InvalidFile`] for another shape.
    pub fn tensor_of_shape(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            let reason = format!("tensor {name:?} has shape {:?}, config.json asks for {shape:?}", tensor.shape);
            return Err(Error::InvalidFile { path: tensor.file.path.clone(), reason });
        }
        Ok(tensor)
    }

    /// Shape and values of a small tensor of any float type; at most `limit` values.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] if it is missing, empty or has more values; [`Error::UnsupportedModel`] for a
    /// type that is no float's.
    pub(crate) fn floats(&self, name: &str, limit: usize) -> Result<(Vec<usize>, Vec<f32>)> {
        let Some(entry) = self.entries.get(name) else { return self.tensor(name).map(|_| Default::default()) };
        let shape = entry.shape.clone();
        let count = shape.iter().product::<usize>();
        if !(1..=limit).contains(&count) {
            let reason = format!("tensor {name:?} has shape {shape:?}, expected 1 to {limit} values");
            return Err(Error::InvalidFile { path: entry.file.path.clone(), reason });
        }
        let bytes = |size: usize| &entry.file.map[entry.offset..entry.offset + count * size];
        let values = match entry.dtype {
            Dtype::F8_E4M3 => bytes(1).iter().map(|code| e4m3::decode(*code)).collect(),
            Dtype::F8_E5M2 => bytes(1).iter().map(|code| e5m2::decode(*code)).collect(),
            Dtype::F64 => {
                let doubles = bytes(8).chunks_exact(8);
                doubles.map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32).collect()
            }
            _ => self.tensor(name)?.to_f32(),
        };
        Ok((shape, values))
    }

    /// The file a tensor lies in; [`Weights::path`] if there is none of this name.
    pub(crate) fn path_of(&self, name: &str) -> &Path {
        self.entries.get(name).map_or(&self.root, |entry| &entry.file.path)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Every tensor's name, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Bytes of all tensors: what an index calls `total_size`.
    #[cfg(feature = "decoder")]
    pub(crate) fn tensor_bytes(&self) -> usize {
        let bits = |entry: &Entry| entry.shape.iter().product::<usize>().saturating_mul(entry.dtype.bitsize());
        self.entries.values().map(|entry| bits(entry) / 8).fold(0, usize::saturating_add)
    }

    /// Bytes of all mapped files.
    pub fn mapped_bytes(&self) -> usize {
        self.mapped_bytes
    }

    /// The single file, or the index.
    pub fn path(&self) -> &Path {
        &self.root
    }
}

/// Whether all of a file will be wanted soon.
#[derive(Clone, Copy, PartialEq)]
enum ReadAhead {
    Yes,
    No,
}

fn map_file(path: &Path, ahead: ReadAhead) -> Result<MappedFile> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(Error::InvalidFile { path: path.to_owned(), reason: "is not a regular file".into() });
    }
    // SAFETY: the mapping is read-only and private to us; that no other process changes the file
    // under it is the usual contract of memory-mapped weights (see the module's text).
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    // Reading ahead is only a hint; a system that refuses it reads on demand.
    #[cfg(unix)]
    if ahead == ReadAhead::Yes {
        let _ = map.advise(memmap2::Advice::WillNeed);
    }
    #[cfg(not(unix))]
    let _ = ahead;
    Ok(MappedFile { path: path.to_owned(), map })
}

/// The byte where tensor data starts, and the checked header.
///
/// safetensors validates names, sizes and gaps. Its sums are not overflow-checked and duplicate
/// names pass, so the header is first read with our own eyes: no name twice, and every range
/// inside the file.
fn read_header(file: &MappedFile) -> Result<(usize, Metadata)> {
    let invalid = |reason: String| Error::InvalidFile { path: file.path.clone(), reason };
    let bytes: &[u8] = &file.map;
    let header_len = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    let Some(header_len) = header_len else { return Err(invalid("is shorter than a safetensors header".into())) };
    let header_end = usize::try_from(header_len).ok().and_then(|n| n.checked_add(8)).filter(|end| *end <= bytes.len());
    let Some(header_end) = header_end else {
        return Err(invalid(format!("is truncated: its header says {header_len} bytes, the file has {}", bytes.len())));
    };
    let header: UniqueMap<HeaderValue> = serde_json::from_slice(&bytes[8..header_end])
        .map_err(|error| invalid(format!("has an invalid safetensors header: {error}")))?;
    let data_len = bytes.len() - header_end;
    for (name, value) in &header.0 {
        if let HeaderValue::Tensor(TensorInfo { data_offsets: (start, end), .. }) = value
            && (start > end || *end > data_len)
        {
            let reason = format!(
                "is truncated or corrupt: tensor {:?} lies at bytes {start}..{end} of {data_len} bytes of data",
                shorten(name)
            );
            return Err(invalid(reason));
        }
    }
    // The library's words name tensors as the file does, control characters and all.
    let (_, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| invalid(format!("is not valid: {}", one_line(&error.to_string()))))?;
    Ok((header_end, metadata))
}

/// `weight_map` of an index, tensor to file.
fn read_index(path: &Path) -> Result<HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let bytes = read_limited(path)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| Error::InvalidFile {
        path: path.to_owned(),
        reason: format!("is not a valid index: {error}"),
    })?;
    Ok(index.weight_map.0)
}

/// A file name without any folder in it.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(only)) if only == name)
        && components.next().is_none()
        && !name.contains(char::is_control) // an error that names it is one line
        && !name.contains(['/', '\\', ':'])
}

/// An entry of a safetensors header: a tensor, or the free-form metadata.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum HeaderValue {
    Tensor(TensorInfo),
    Metadata(#[allow(dead_code)] HashMap<String, String>),
}

/// A JSON object whose keys must differ; serde's maps let the last one win.
struct UniqueMap<V>(HashMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Unique<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Unique<V> {
            type Value = HashMap<String, V>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = HashMap::new();
                while let Some((key, value)) = access.next_entry::<String, V>()? {
                    if map.contains_key(&key) {
                        let text = format!("{:?} appears twice", shorten(&key));
                        return Err(serde::de::Error::custom(text));
                    }
                    map.insert(key, value);
                }
                Ok(map)
            }
        }
        deserializer.deserialize_map(Unique(std::marker::PhantomData)).map(UniqueMap)
    }
}
