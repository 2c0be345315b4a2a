//! The quantized paged KV cache as a kernel library.
//!
//! An LLM engine keeps the keys and values of past tokens in blocks (pages) of memory. Stored as FP8
//! they take half the space of bf16. This crate has the operations such a cache needs, each with one
//! stated meaning (`docs/numerics.md`), on three backends: the CPU ([`CpuBackend`]), with the feature `cuda`
//! NVIDIA GPUs (`cuda::CudaBackend`), and with the feature `rocm` AMD GPUs (`rocm::RocmBackend`):
//!
//! | operation | does |
//! |---|---|
//! | [`cache_write`](Backend::cache_write) | quantizes new keys and values and scatters them to their slots |
//! | [`paged_attention`](Backend::paged_attention) | attends over the cache, dequantizing on the way |
//! | [`copy_blocks`](Backend::copy_blocks) | copies blocks inside a pool: copy-on-write |
//! | [`swap_out`](Backend::swap_out), [`swap_in`](Backend::swap_in) | moves blocks to host memory and back: preemption |
//! | [`gather`](Backend::gather), [`gather_bytes`](Backend::gather_bytes) | reads paged rows back as dense ones |
//! | [`merge_states`](Backend::merge_states) | joins two partial attention results by their LSE |
//! | [`absmax`](Backend::absmax), [`update_scales`](Backend::update_scales) | makes scales from data |
//! | [`quantize`](Backend::quantize), [`dequantize`](Backend::dequantize) | converts dense tensors |
//!
//! # Where to start
//!
//! * [`CacheSpec`] is the geometry of a cache and answers what it costs. [`KvFormat`] and
//!   [`CacheLayout`] say how elements are stored and ordered, [`scale`] what a scale is.
//! * [`args`] has one struct an operation: buffers, shapes, strides, and what the operation computes.
//!   An engine that owns its memory fills one and hands it to a [`Backend`].
//! * [`PagedKvCache`] owns the memory of all layers for engines that would rather not.
//! * [`blocks`] keeps the books: which block belongs to which sequence, what is shared, what to copy.
//! * [`raw`] is the same over pointers, unsafe.
//! * `checkpoint` (feature `checkpoint`) reads scales from the checkpoints of calibration tools; `calibrate`
//!   (feature `decoder`) makes them from data, and `checkpoint` writes them.
//! * `decoder` (feature `decoder`) is a reference decoder that uses all of it.
//!
//! The folder `examples` has short programs, numbered, for all of this.
//!
//! ```
//! use quantkv::{CacheSpec, KvFormat};
//!
//! // 8 KV heads of 128 channels, 16 tokens a block: how many blocks of 32 layers fit in 1 GiB?
//! let bf16 = CacheSpec::new(8, 128, 16, KvFormat::BF16)?.blocks_for_budget(32, 1 << 30)?;
//! let fp8 = CacheSpec::new(8, 128, 16, KvFormat::Fp8E4M3)?.blocks_for_budget(32, 1 << 30)?;
//! assert_eq!((bf16, fp8), (512, 1024));
//! # Ok::<(), quantkv::Error>(())
//! ```
//!
//! # Errors and faults
//!
//! Arguments are checked before anything runs: a wrong one is an [`Error`], never a panic. Slots,
//! block ids and lengths inside buffers may lie on a device, where only the kernel sees them: what is
//! out of range is skipped and sets a sticky bit of [`Faults`], read by [`Backend::faults`].
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

pub mod args;
pub mod backend;
pub mod blocks;
pub mod cache;
#[cfg(feature = "decoder")]
pub mod calibrate;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod codec;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "decoder")]
pub mod decoder;
pub mod error;
pub mod faults;
pub mod format;
pub mod isa;
#[cfg(feature = "checkpoint")]
mod json;
pub mod layout;
pub mod memory;
pub mod raw;
#[cfg(feature = "rocm")]
pub mod rocm;
pub mod scale;

pub use backend::Backend;
pub use cache::{HostPool, PagedKvCache};
pub use cpu::CpuBackend;
pub use error::{Error, Result};
pub use faults::Faults;
pub use format::{DType, Element, KvCacheDtype, KvFormat};
pub use isa::Isa;
pub use layout::{CacheLayout, CacheShape, CacheSpec};

/// The examples of the README, compiled and run with the other documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
