//! `merge_states`: combine two partial attention outputs over disjoint keys by their LSE
//! (cascade inference, a shared prefix, split-KV).
//!
//! ```text
//! m = max(lse_a, lse_b)              wa = exp(lse_a - m), wb = exp(lse_b - m)
//! out = a * (wa / (wa + wb)) + b * (wb / (wa + wb))                lse = m + ln(wa + wb)
//! ```
//! An LSE of ±inf means "no keys" (as vLLM treats it); two of them give zeros and -inf, never NaN.

use super::{RowStrides, check_len};
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::checked_product;
use crate::memory::{BufferLen, Memory};

/// Arguments of [`crate::Backend::merge_states`].
#[derive(Debug)]
pub struct MergeStates<'a, M: Memory, T: Element> {
    /// Query tokens.
    pub num_tokens: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Channels of an output row.
    pub head_dim: usize,
    /// First partial output, `[tokens, heads, head_dim]`.
    pub a: M::Ref<'a, T>,
    /// Natural-log LSE of `a`, `[tokens, heads]`.
    pub a_lse: M::Ref<'a, f32>,
    /// Second partial output.
    pub b: M::Ref<'a, T>,
    /// Natural-log LSE of `b`.
    pub b_lse: M::Ref<'a, f32>,
    /// Strides of `a`, `b` and `output`.
    pub strides: RowStrides,
    /// Merged output.
    pub output: M::Mut<'a, T>,
    /// Merged LSE, `[tokens, heads]`, if wanted.
    pub lse: Option<M::Mut<'a, f32>>,
}

impl<M: Memory, T: Element> MergeStates<'_, M, T> {
    /// Checks every shape, stride and length.
    ///
    /// # Errors
    /// Buffer variants of [`Error`].
    pub fn validate(&self) -> Result<()> {
        if self.num_heads == 0 || self.head_dim == 0 {
            return Err(Error::Zero { what: "heads and head dim of merge_states" });
        }
        let (tokens, heads, dim) = (self.num_tokens, self.num_heads, self.head_dim);
        self.strides.check_read("a", &self.a, tokens, heads, dim)?;
        self.strides.check_read("b", &self.b, tokens, heads, dim)?;
        self.strides.check_write("merged output", &self.output, tokens, heads, dim)?;
        let lse = checked_product("LSE", &[tokens, heads])?;
        check_len("LSE of a", lse, self.a_lse.buffer_len())?;
        check_len("LSE of b", lse, self.b_lse.buffer_len())?;
        match &self.lse {
            Some(out) => check_len("merged LSE", lse, out.buffer_len()),
            None => Ok(()),
        }
    }
}
