//! `gather`: paged to dense, either dequantized (`decode(q) * scale`, to the element type) or as
//! raw bytes.
//!
//! ```text
//! for sequence s, t in 0..cu_seq_lens[s+1]-cu_seq_lens[s]:
//!     position = starts[s] + t;  block = block_tables[s, position / block_size]
//!     dst[cu_seq_lens[s] + t, h, :] = cache[block, h, position % block_size, :]
//! ```
//! A block id outside the cache (-1 included) leaves its rows zero and sets a fault, and so does a
//! position before the sequence or past its row of the table. A sequence whose bounds decrease,
//! pass `num_tokens` or reach into rows claimed before it is skipped, and sets a fault. Rows no
//! sequence claims are left as they are.

use super::{LayerRef, RowStrides, check_len, check_scale};
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::{CacheShape, Half, checked_product};
use crate::memory::{BufferLen, Memory};
use crate::scale::ScaleRef;

/// Arguments of [`crate::Backend::gather`]: dequantized rows.
#[derive(Debug)]
pub struct Gather<'a, M: Memory, T: Element> {
    /// Geometry of the layer's cache.
    pub shape: CacheShape,
    /// The layer's cache.
    pub cache: LayerRef<'a, M>,
    /// Static scales of K; not read if K is unquantized.
    pub k_scale: ScaleRef<'a, M>,
    /// Static scales of V; not read if V is unquantized.
    pub v_scale: ScaleRef<'a, M>,
    /// Block of each (sequence, logical block), `[sequences, block_table_stride]`.
    pub block_tables: M::Ref<'a, i32>,
    /// Entries from one sequence's row of `block_tables` to the next.
    pub block_table_stride: usize,
    /// Where each sequence's rows start in the output, `[sequences + 1]`, not decreasing.
    pub cu_seq_lens: M::Ref<'a, i32>,
    /// First position gathered of each sequence, `[sequences]`; 0 for all if absent.
    pub starts: Option<M::Ref<'a, i32>>,
    /// Rows of output.
    pub num_tokens: usize,
    /// Dense keys, `[num_tokens, kv heads, k_head_dim]`.
    pub key: M::Mut<'a, T>,
    /// Strides of `key`.
    pub key_strides: RowStrides,
    /// Dense values, `[num_tokens, kv heads, v_head_dim]`.
    pub value: M::Mut<'a, T>,
    /// Strides of `value`.
    pub value_strides: RowStrides,
}

impl<M: Memory, T: Element> Gather<'_, M, T> {
    /// Sequences gathered.
    pub fn num_seqs(&self) -> usize {
        self.cu_seq_lens.buffer_len().saturating_sub(1)
    }

    /// Checks every shape, stride and length.
    ///
    /// # Errors
    /// Any of [`crate::Error`]'s geometry and buffer variants.
    pub fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        self.cache.validate(&self.shape)?;
        let spec = &self.shape.spec;
        let heads = spec.num_kv_heads;
        self.key_strides.check_write("gathered key", &self.key, self.num_tokens, heads, spec.k_head_dim)?;
        self.value_strides.check_write("gathered value", &self.value, self.num_tokens, heads, spec.v_head_dim)?;
        for (half, scale, what) in [(Half::K, &self.k_scale, "K scales"), (Half::V, &self.v_scale, "V scales")] {
            if spec.format(half).is_quantized() {
                check_scale(what, scale, heads, spec.head_dim(half))?;
            }
        }
        let starts = self.starts.as_ref().map(BufferLen::buffer_len);
        check_tables(self.cu_seq_lens.buffer_len(), self.block_tables.buffer_len(), self.block_table_stride, starts)
    }
}

/// Arguments of [`crate::Backend::gather_bytes`]: rows of stored codes, unchanged.
///
/// The output is dense in storage elements: K `[num_tokens, kv heads, k_head_dim]` of
/// `k_format`, V likewise.
#[derive(Debug)]
pub struct GatherBytes<'a, M: Memory> {
    /// Geometry of the layer's cache.
    pub shape: CacheShape,
    /// The layer's cache.
    pub cache: LayerRef<'a, M>,
    /// Block of each (sequence, logical block), `[sequences, block_table_stride]`.
    pub block_tables: M::Ref<'a, i32>,
    /// Entries from one sequence's row of `block_tables` to the next.
    pub block_table_stride: usize,
    /// Where each sequence's rows start in the output, `[sequences + 1]`, not decreasing.
    pub cu_seq_lens: M::Ref<'a, i32>,
    /// First position gathered of each sequence, `[sequences]`; 0 for all if absent.
    pub starts: Option<M::Ref<'a, i32>>,
    /// Rows of output.
    pub num_tokens: usize,
    /// Dense key codes, in bytes.
    pub key: M::Mut<'a, u8>,
    /// Dense value codes, in bytes.
    pub value: M::Mut<'a, u8>,
}

impl<M: Memory> GatherBytes<'_, M> {
    /// Sequences gathered.
    pub fn num_seqs(&self) -> usize {
        self.cu_seq_lens.buffer_len().saturating_sub(1)
    }

    /// Checks every shape and length.
    ///
    /// # Errors
    /// Any of [`crate::Error`]'s geometry and buffer variants.
    pub fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        self.cache.validate(&self.shape)?;
        let spec = &self.shape.spec;
        for (half, got, what) in [
            (Half::K, self.key.buffer_len(), "gathered key bytes"),
            (Half::V, self.value.buffer_len(), "gathered value bytes"),
        ] {
            let row = [self.num_tokens, spec.num_kv_heads, spec.head_dim(half), spec.format(half).bytes()];
            check_len(what, checked_product(what, &row)?, got)?;
        }
        let starts = self.starts.as_ref().map(BufferLen::buffer_len);
        check_tables(self.cu_seq_lens.buffer_len(), self.block_tables.buffer_len(), self.block_table_stride, starts)
    }
}

/// Checks the lengths of the per-sequence buffers.
fn check_tables(cu_len: usize, table_len: usize, table_stride: usize, starts: Option<usize>) -> Result<()> {
    if cu_len == 0 {
        return Err(Error::BufferTooSmall { what: "cu_seq_lens", needed: 1, got: 0 });
    }
    let seqs = cu_len - 1;
    check_len("block_tables", checked_product("block_tables", &[seqs, table_stride])?, table_len)?;
    match starts {
        Some(got) => check_len("starts", seqs, got),
        None => Ok(()),
    }
}
