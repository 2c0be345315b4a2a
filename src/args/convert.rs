//! `convert`: dense quantize and dequantize, by the same codec and scales as the cache.

use super::{RowStrides, check_len, check_scale};
use crate::error::{Error, Result};
use crate::format::{Element, KvFormat};
use crate::layout::checked_product;
use crate::memory::{BufferLen, Memory};
use crate::scale::ScaleRef;

/// Arguments of [`crate::Backend::quantize`]: `codes = encode(input / scale)`.
#[derive(Debug)]
pub struct Quantize<'a, M: Memory, T: Element> {
    /// Tokens (rows).
    pub num_tokens: usize,
    /// Heads in a row.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// What to store.
    pub format: KvFormat,
    /// The data, `[tokens, heads, dim]`.
    pub input: M::Ref<'a, T>,
    /// Strides of `input`.
    pub strides: RowStrides,
    /// Static scales; not read if `format` is unquantized.
    pub scale: ScaleRef<'a, M>,
    /// Gapless `[tokens, heads, dim]` of `format`, in bytes.
    pub codes: M::Mut<'a, u8>,
}

/// Arguments of [`crate::Backend::dequantize`]: `output = decode(codes) * scale`.
#[derive(Debug)]
pub struct Dequantize<'a, M: Memory, T: Element> {
    /// Tokens (rows).
    pub num_tokens: usize,
    /// Heads in a row.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// What is stored.
    pub format: KvFormat,
    /// Gapless `[tokens, heads, dim]` of `format`, in bytes.
    pub codes: M::Ref<'a, u8>,
    /// Static scales; not read if `format` is unquantized.
    pub scale: ScaleRef<'a, M>,
    /// The data, `[tokens, heads, dim]`.
    pub output: M::Mut<'a, T>,
    /// Strides of `output`.
    pub strides: RowStrides,
}

impl<M: Memory, T: Element> Quantize<'_, M, T> {
    /// Checks every shape, stride and length.
    ///
    /// # Errors
    /// Buffer variants of [`Error`].
    pub fn validate(&self) -> Result<()> {
        let (tokens, heads, dim) = (self.num_tokens, self.num_heads, self.head_dim);
        check_dense(self.format, (tokens, heads, dim), &self.scale, self.codes.buffer_len())?;
        self.strides.check_read("quantize input", &self.input, tokens, heads, dim)
    }
}

impl<M: Memory, T: Element> Dequantize<'_, M, T> {
    /// Checks every shape, stride and length.
    ///
    /// # Errors
    /// Buffer variants of [`Error`].
    pub fn validate(&self) -> Result<()> {
        let (tokens, heads, dim) = (self.num_tokens, self.num_heads, self.head_dim);
        check_dense(self.format, (tokens, heads, dim), &self.scale, self.codes.buffer_len())?;
        self.strides.check_write("dequantized output", &self.output, tokens, heads, dim)
    }
}

fn check_dense<M: Memory>(
    format: KvFormat,
    (tokens, heads, dim): (usize, usize, usize),
    scale: &ScaleRef<'_, M>,
    code_bytes: usize,
) -> Result<()> {
    if heads == 0 || dim == 0 {
        return Err(Error::Zero { what: "heads and head dim of convert" });
    }
    // Tokens last: no other product may overflow where they are zero.
    check_len("codes", checked_product("codes", &[heads, dim, format.bytes(), tokens])?, code_bytes)?;
    if format.is_quantized() { check_scale("scales", scale, heads, dim) } else { Ok(()) }
}
