//! KV scales as calibration tools leave them on disk.
//!
//! Convention of every tool: stored = x / scale, value = stored * scale, for FP8 E4M3 codes. A scale
//! that is not finite and greater than zero is refused, with its layer and tensor: such scales exist
//! in published checkpoints (uninitialised memory, silent zeros).

mod safetensors;
mod scales_file;
mod write;

pub use safetensors::kv_scales;
pub use scales_file::read_scales_file;
pub use write::{Copied, NewCheckpoint, WrittenCheckpoint, check_checkpoint, write_checkpoint};
