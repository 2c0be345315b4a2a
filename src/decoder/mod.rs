//! The reference decoder: Hugging Face folders in, text out.
//!
//! It exists so that every operation of this crate is on a real path, and so that the effect of a
//! quantized cache on a model can be seen.
//!
//! ```text
//! config            config.json, generation_config.json: every field checked, refused by name
//! weights           mmap'ed safetensors, one file or sharded, kept as stored
//! compute           the few operations that are not the cache's: a backend implements them
//! batch, model      one step: token ids, slots, block tables in, logits or greedy tokens out
//! random, known     weights made up for well-known shapes, to measure models without their download
//! tokenizer, chat   text -> token ids and back
//! sampling          logits -> next token
//! kv_scales         which scales the cache gets
//! warm_up           scales that follow the first tokens
//! engine            continuous batching: chunked prefill, forks, preemption
//! ```
//!
//! A step writes the keys and values of all its tokens to the cache first and then attends over
//! the cache, prefill included, so quantization is seen by every token and a prompt gives the same
//! logits in one chunk or in many.
//!
//! Activations are f32 on the CPU, also where the checkpoint is bf16: results then differ from an
//! implementation that rounds every activation to bf16 by that rounding, and by nothing else. On CUDA and
//! ROCm they are f32, f16 or bf16, as the caller of [`Model`] chooses.

pub mod batch;
#[cfg(any(feature = "cuda", feature = "rocm"))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // ROCm uses the structs, not CUDA's functions
mod bindings;
pub mod chat;
pub mod compute;
pub mod config;
mod cpu_linear;
mod cpu_ops;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod engine;
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) mod gpu;
pub mod known;
pub mod kv_scales;
mod loader;
pub mod model;
mod network;
pub mod random;
mod recorded;
#[cfg(feature = "rocm")]
pub mod rocm;
pub mod rope;
pub mod sampling;
mod scratch;
mod strftime;
mod text;
pub mod tokenizer;
pub mod warm_up;

pub use crate::checkpoint::weights;
pub(crate) use crate::json;

pub use batch::{Batch, WantedLogits};
pub use compute::Compute;
pub use config::{Architecture, Config, GenerationConfig};
pub use engine::{Engine, EngineConfig};
pub use model::{Model, ObservedLayer};
pub use weights::{HostTensor, Weights};
