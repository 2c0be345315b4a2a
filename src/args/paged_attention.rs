//! `paged_attention`: softmax attention of new queries over the paged cache, dequantization fused
//! in. One call serves decode (one query a sequence), speculative decoding (2 to 16) and chunked
//! prefill (many), mixed as they come.
//!
//! Sequence `s` has queries `query_starts[s] .. query_starts[s+1]`, its newest tokens, and
//! `seq_lens[s]` cached tokens including them. For the query at position `p`, key position `j`,
//! query head `h` and its KV head `h / (heads / kv_heads)`:
//!
//! ```text
//! score(j) = softmax_scale * q · (code_k(j) * scale_k)         the exact dequantized key
//! score(j) = soft_cap * tanh(score(j) / soft_cap)              if soft_cap
//! score(j) += alibi_slope[h] * (j - p)                         if ALiBi
//! visible(j) = j <= p  and  (no window or j > p - window)
//! out = Σ_visible softmax(score)(j) * v(j);   a sink adds exp(sink[h]) to the denominator only
//! lse = ln(Σ_visible exp(score) [+ exp(sink[h])])
//! ```
//! No visible key gives zeros, and LSE -inf (or the sink). Slots past the sequence length are
//! never read into the result. Visible positions whose block id lies outside the cache are skipped
//! and set a fault. A sequence length that is negative or exceeds its row of the table is clamped, a
//! sequence whose query starts decrease, pass `num_tokens`, reach into rows claimed before or are more
//! than `max_query_len` apart is skipped; both set a fault. All sums are f32.

use super::{LayerRef, RowStrides, check_len, check_scale, group_size};
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::{CacheShape, Half, checked_product};
use crate::memory::{BufferLen, Memory};
use crate::scale::ScaleRef;

/// The numbers of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Factor of q·k, usually `1/sqrt(head_dim)`.
    pub softmax_scale: f32,
    /// `cap * tanh(score / cap)` if given.
    pub soft_cap: Option<f32>,
    /// Keys visible to a query, itself included, if given.
    pub sliding_window: Option<usize>,
}

impl AttentionParams {
    /// Plain attention with this factor.
    pub const fn new(softmax_scale: f32) -> Self {
        AttentionParams { softmax_scale, soft_cap: None, sliding_window: None }
    }

    fn validate(&self) -> Result<()> {
        if !self.softmax_scale.is_finite() {
            return Err(Error::InvalidNumber {
                what: "softmax_scale",
                value: self.softmax_scale.into(),
                expected: "finite",
            });
        }
        if let Some(cap) = self.soft_cap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::InvalidNumber {
                what: "soft_cap",
                value: cap.into(),
                expected: "finite and greater than zero",
            });
        }
        if self.sliding_window == Some(0) {
            return Err(Error::Zero { what: "sliding_window" });
        }
        Ok(())
    }
}

/// Arguments of [`crate::Backend::paged_attention`].
#[derive(Debug)]
pub struct PagedAttention<'a, M: Memory, T: Element> {
    /// Geometry of the layer's cache.
    pub shape: CacheShape,
    /// The layer's cache.
    pub cache: LayerRef<'a, M>,
    /// Static scales of K; not read if K is unquantized.
    pub k_scale: ScaleRef<'a, M>,
    /// Static scales of V; not read if V is unquantized.
    pub v_scale: ScaleRef<'a, M>,
    /// Numbers of the layer.
    pub params: AttentionParams,
    /// Query heads, a multiple of the KV heads.
    pub num_heads: usize,
    /// Query rows in the batch.
    pub num_tokens: usize,
    /// The most queries of any sequence, if known (0 is taken for 1). Decode (1) and speculative decoding (2 to 16) then cost a GPU one
    /// kernel, where it would launch one more for the sequences with many queries that may be there; and sm_90 has a kernel for 17 to
    /// 64 query rows a KV head that is only taken where none can have more.
    pub max_query_len: Option<usize>,
    /// Queries, `[tokens, heads, k_head_dim]`.
    pub query: M::Ref<'a, T>,
    /// Strides of `query`.
    pub query_strides: RowStrides,
    /// First query row of each sequence, `[sequences + 1]`, not decreasing.
    pub query_starts: M::Ref<'a, i32>,
    /// Cached tokens of each sequence, the new ones included, `[sequences]`.
    pub seq_lens: M::Ref<'a, i32>,
    /// Block of each (sequence, logical block), `[sequences, block_table_stride]`.
    pub block_tables: M::Ref<'a, i32>,
    /// Entries from one sequence's row of `block_tables` to the next.
    pub block_table_stride: usize,
    /// ALiBi slope of each query head, `[heads]`.
    pub alibi_slopes: Option<M::Ref<'a, f32>>,
    /// Attention-sink logit of each query head, `[heads]`.
    pub sinks: Option<M::Ref<'a, f32>>,
    /// Outputs, `[tokens, heads, v_head_dim]`. Rows no sequence claims are left as they are.
    pub output: M::Mut<'a, T>,
    /// Strides of `output`.
    pub output_strides: RowStrides,
    /// Natural-log LSE, `[tokens, heads]`, if wanted.
    pub lse: Option<M::Mut<'a, f32>>,
    /// Scratch of at least [`crate::Backend::attention_workspace_len`] floats.
    pub workspace: M::Mut<'a, f32>,
    /// The workspace holds what an earlier call of the same step planned (another layer, usually): the
    /// same geometry, `num_heads`, `num_tokens`, `max_query_len`, activation type, sliding window, query
    /// starts and sequence lengths. A GPU then skips its scheduling kernel; the CPU plans at no cost and ignores
    /// this. If it is not true results may be wrong; memory outside the buffers is never touched.
    pub plan_is_ready: bool,
}

impl<M: Memory, T: Element> PagedAttention<'_, M, T> {
    /// Sequences in the batch.
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.buffer_len()
    }

    /// Query heads that share a KV head; 0 for a spec without KV heads, which is refused.
    pub fn group_size(&self) -> usize {
        self.num_heads.checked_div(self.shape.spec.num_kv_heads).unwrap_or(0)
    }

    /// No sequence may have more queries: `max_query_len`, else `num_tokens`.
    pub(crate) fn longest_query(&self) -> usize {
        self.max_query_len.map_or(self.num_tokens, |most| most.max(1)).min(self.num_tokens)
    }

    /// Checks every shape, stride and length. The workspace is the backend's to check.
    ///
    /// # Errors
    /// Any of [`crate::Error`]'s geometry, number and buffer variants.
    pub fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        self.params.validate()?;
        self.cache.validate(&self.shape)?;
        let spec = &self.shape.spec;
        group_size(self.num_heads, spec.num_kv_heads)?;
        let (tokens, heads) = (self.num_tokens, self.num_heads);
        self.query_strides.check_read("query", &self.query, tokens, heads, spec.k_head_dim)?;
        self.output_strides.check_write("output", &self.output, tokens, heads, spec.v_head_dim)?;
        for (half, scale, what) in [(Half::K, &self.k_scale, "K scales"), (Half::V, &self.v_scale, "V scales")] {
            if spec.format(half).is_quantized() {
                check_scale(what, scale, spec.num_kv_heads, spec.head_dim(half))?;
            }
        }
        let seqs = self.num_seqs();
        check_len("query_starts", seqs.saturating_add(1), self.query_starts.buffer_len())?;
        let table = checked_product("block_tables", &[seqs, self.block_table_stride])?;
        check_len("block_tables", table, self.block_tables.buffer_len())?;
        for (what, per_head) in [("alibi_slopes", &self.alibi_slopes), ("sinks", &self.sinks)] {
            if let Some(buffer) = per_head {
                check_len(what, heads, buffer.buffer_len())?;
            }
        }
        match &self.lse {
            Some(lse) => check_len("LSE", checked_product("LSE", &[tokens, heads])?, lse.buffer_len()),
            None => Ok(()),
        }
    }
}
