//! The quantized paged KV cache as a kernel library.
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

pub mod args;
pub mod backend;
pub mod blocks;
pub mod cache;
#[cfg(feature = "decoder")]
pub mod checkpoint;
pub mod codec;
pub mod cpu;
#[cfg(feature = "decoder")]
pub mod decoder;
pub mod error;
pub mod faults;
pub mod format;
pub mod isa;
pub mod layout;
pub mod memory;
pub mod raw;
pub mod scale;

pub use backend::Backend;
pub use cache::{HostPool, PagedKvCache};
pub use cpu::CpuBackend;
pub use error::{Error, Result};
pub use faults::Faults;
pub use format::{DType, Element, KvCacheDtype, KvFormat};
pub use isa::Isa;
pub use layout::{CacheLayout, CacheShape, CacheSpec};
