//! KV scales as calibration tools leave them on disk.
//!
//! ```text
//! declaration   config.json, hf_quant_config.json: who made the scales, and that they are FP8 scales
//! names         what tensors of K, V and Q scales are called, by tool
//! safetensors   those tensors, checked against the model's shape
//! scales_file   kv_cache_scales.json
//! ```
//!
//! Convention of every tool: stored = x / scale, value = stored * scale, for FP8 E4M3 codes. A scale
//! that is not finite and greater than zero is refused, with its file, layer and tensor: such scales exist
//! in published checkpoints (uninitialised memory, silent zeros).
//!
//! [`read_scales`] takes a folder and nothing else from it than its scales: the weights beside them may be
//! quantized, and of an architecture that no decoder here knows.
//!
//! ```no_run
//! use quantkv::checkpoint::{MissingScales, ReadOptions, read_scales};
//!
//! let options = ReadOptions { missing: MissingScales::One, ..ReadOptions::default() };
//! if let Some(found) = read_scales("model-FP8-KV".as_ref(), &options)? {
//!     println!("{} scales, keys {}", found.origin.tool, found.origin.key_range.name());
//!     for warning in &found.warnings {
//!         println!("{warning}");
//!     }
//!     let rank_3_of_8 = found.scales.shard(3, 8)?; // `layers()` of it go to PagedKvCache::new
//! #   let _ = rank_3_of_8;
//! }
//! # Ok::<(), quantkv::Error>(())
//! ```
//!
//! # What is decided here
//!
//! * Scales for a part of the layers are an error, or 1.0 for the rest with a warning:
//!   [`MissingScales`]. One scale for both halves is taken for both only under the name that says so,
//!   `kv_scale`.
//! * Two tensors for the same half of the same layer must agree; if they do not, which of them counts
//!   cannot be known, and that is an error.
//! * Names that the tool in `config.json` does not use are a warning, and the origin is then unknown: the
//!   convention is every tool's, so the values stand.
//! * Scales of queries never fail a read: published checkpoints have uninitialised memory there. What is
//!   unusable is left out, with a warning.
//! * Offsets of affine codes (`k_bias`) are refused: a scale alone does not decode such codes.

mod declaration;
mod names;
mod origin;
mod safetensors;
mod scales_file;
mod shape;
pub mod weights;
#[cfg(feature = "decoder")]
mod write;

use crate::scale::Scales;

pub use names::Naming;
#[cfg(feature = "decoder")]
pub(crate) use names::names_a_kv_scale;
pub use origin::{KeyRange, Origin, Statistic, Tool};
#[cfg(feature = "decoder")]
pub use safetensors::kv_scales;
#[cfg(feature = "decoder")]
pub(crate) use safetensors::why_none;
pub use safetensors::{read_scales, scales_in};
pub use scales_file::read_scales_file;
pub use shape::ModelShape;
#[cfg(feature = "decoder")]
pub(crate) use shape::{MAX_HEADS, MAX_LAYERS, MAX_WIDTH};
#[cfg(feature = "decoder")]
pub use write::{Copied, NewCheckpoint, WrittenCheckpoint, check_checkpoint, write_checkpoint};

/// Scales of a checkpoint or file, with what is known of them.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointScales {
    /// The scales: of the whole model, or of the rank asked for.
    pub scales: Scales,
    /// Where they come from.
    pub origin: Origin,
    /// What a user should know, a line each.
    pub warnings: Vec<String>,
}

/// How to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ReadOptions {
    /// What to do where scales are missing.
    pub missing: MissingScales,
    /// The tensor-parallel rank that needs them, and of how many; `None` for the whole model.
    pub shard: Option<(usize, usize)>,
}

/// What to do where some layers have scales and others have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum MissingScales {
    /// [`crate::Error::MissingScales`].
    #[default]
    Error,
    /// 1.0, and a warning that names the layers.
    One,
}
