//! `cache_write` (vLLM: `reshape_and_cache`): quantize new keys and values and scatter them to
//! their slots.
//!
//! ```text
//! for t in 0..slot_mapping.len():            slot = slot_mapping[t]
//!     if slot < 0: continue                  padding
//!     block, offset = slot / block_size, slot % block_size
//!     for h, d:  K[block, h, offset, d] = encode(key[t, h, d] / scale(h, d))
//! ```
//! With dynamic scales the row's own scale is computed first and stored beside the block:
//! `dynamic = dynamic_scale(max_d |x / static|)`, then `encode(x / combined_scale(static, dynamic))`
//! ([`crate::scale`]).
//!
//! The number of tokens is the length of the slot mapping; keys and values may be longer (a
//! padded batch under a captured graph). If two tokens name the same slot the later one wins on
//! the CPU; on a GPU either may, element by element: give each its own.

use super::{LayerMut, RowStrides, check_scale};
use crate::error::Result;
use crate::format::Element;
use crate::layout::{CacheShape, Half};
use crate::memory::{BufferLen, Memory};
use crate::scale::ScaleRef;

/// Arguments of [`crate::Backend::cache_write`].
#[derive(Debug)]
pub struct CacheWrite<'a, M: Memory, T: Element> {
    /// Geometry of the layer's cache.
    pub shape: CacheShape,
    /// The layer's cache.
    pub cache: LayerMut<'a, M>,
    /// New keys, `[tokens, kv heads, k_head_dim]`.
    pub key: M::Ref<'a, T>,
    /// Strides of `key`.
    pub key_strides: RowStrides,
    /// New values, `[tokens, kv heads, v_head_dim]`.
    pub value: M::Ref<'a, T>,
    /// Strides of `value`.
    pub value_strides: RowStrides,
    /// For each token `block * block_size + offset`, or negative to skip it.
    pub slot_mapping: M::Ref<'a, i64>,
    /// Static scales of K; not read if K is unquantized.
    pub k_scale: ScaleRef<'a, M>,
    /// Static scales of V; not read if V is unquantized.
    pub v_scale: ScaleRef<'a, M>,
}

impl<M: Memory, T: Element> CacheWrite<'_, M, T> {
    /// Tokens to write (or skip).
    pub fn num_tokens(&self) -> usize {
        self.slot_mapping.buffer_len()
    }

    /// Checks every shape, stride and length.
    ///
    /// # Errors
    /// Any of [`crate::Error`]'s geometry and buffer variants.
    pub fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        self.cache.validate(&self.shape)?;
        let spec = &self.shape.spec;
        let (tokens, heads) = (self.num_tokens(), spec.num_kv_heads);
        self.key_strides.check_read("key", &self.key, tokens, heads, spec.k_head_dim)?;
        self.value_strides.check_read("value", &self.value, tokens, heads, spec.v_head_dim)?;
        for (half, scale, what) in [(Half::K, &self.k_scale, "K scales"), (Half::V, &self.v_scale, "V scales")] {
            if spec.format(half).is_quantized() {
                check_scale(what, scale, heads, spec.head_dim(half))?;
            }
        }
        Ok(())
    }
}
