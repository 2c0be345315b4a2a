//! The reference decoder: Hugging Face folders in, text out.
//!
//! It exists so that every operation of this crate is on a real path, and so that the effect of a
//! quantized cache on a model can be seen.
//!
//! ```text
//! tokenizer, chat   text -> token ids and back
//! sampling          logits -> next token
//! ```

pub mod chat;
pub mod sampling;
mod strftime;
pub mod tokenizer;
