//! One struct an operation: its buffers, shapes and strides, and `validate()`, once for every
//! backend.
//!
//! A struct is generic over [`Memory`], which says how its buffers are addressed; validation needs
//! only their lengths. Every backend calls `validate()` first, so that no kernel starts with a
//! buffer too short for its shape. What lies *inside* device buffers (slots, block ids, sequence
//! lengths, query starts) is not looked at here: kernels check it, see [`crate::faults`].
//!
//! Fill a struct in the call itself (`backend.gather(Gather { .. })`), where its memory is known:
//! then `&vec` and `&[0, 1]` become slices by themselves, which they do not in a `let` whose memory
//! is still to be inferred. Scales used by several calls are passed as
//! [`ScaleRef::shorten`].

mod absmax;
mod cache;
mod cache_write;
mod convert;
mod copy_blocks;
mod gather;
mod merge_states;
mod paged_attention;
mod swap_blocks;

pub use absmax::{Absmax, UpdateScales};
pub use cache::{LayerMut, LayerRef};
pub use cache_write::CacheWrite;
pub use convert::{Dequantize, Quantize};
pub use copy_blocks::{BlockPair, CopyBlocks};
pub use gather::{Gather, GatherBytes};
pub use merge_states::MergeStates;
pub use paged_attention::{AttentionParams, PagedAttention};
pub use swap_blocks::SwapBlocks;

use crate::error::{Error, Result};
use crate::memory::{BufferLen, Memory};
use crate::scale::ScaleRef;

/// Element strides of a `[tokens, heads, dim]` tensor whose channels are contiguous.
///
/// A fused QKV projection gives a token stride larger than `heads * dim`; nothing is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowStrides {
    /// From one token to the next.
    pub token: usize,
    /// From one head to the next.
    pub head: usize,
}

impl RowStrides {
    /// Strides of a gapless `[tokens, heads, dim]` tensor. They saturate; validation refuses what no
    /// buffer can hold.
    pub const fn contiguous(heads: usize, dim: usize) -> Self {
        RowStrides { token: heads.saturating_mul(dim), head: dim }
    }

    /// The index of the first channel of `(token, head)`.
    #[inline(always)]
    pub const fn index(&self, token: usize, head: usize) -> usize {
        token * self.token + head * self.head
    }

    /// Elements a buffer needs for `tokens` × `heads` rows of `dim`.
    fn needed(&self, what: &'static str, tokens: usize, heads: usize, dim: usize) -> Result<usize> {
        if tokens == 0 || heads == 0 {
            return Ok(0);
        }
        let overflow = Error::Overflow { what };
        let token = (tokens - 1).checked_mul(self.token);
        let head = (heads - 1).checked_mul(self.head);
        match (token, head) {
            (Some(token), Some(head)) => token.checked_add(head).and_then(|n| n.checked_add(dim)).ok_or(overflow),
            _ => Err(overflow),
        }
    }

    /// Checks that `buffer` holds `tokens` × `heads` rows of `dim`.
    fn check_read<B: BufferLen>(
        &self,
        what: &'static str,
        buffer: &B,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> Result<()> {
        check_len(what, self.needed(what, tokens, heads, dim)?, buffer.buffer_len())
    }

    /// [`RowStrides::check_read`], and that no two rows overlap: threads write them side by side.
    fn check_write<B: BufferLen>(
        &self,
        what: &'static str,
        buffer: &B,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> Result<()> {
        if heads > 1 && self.head < dim {
            return Err(Error::StrideTooSmall { what, stride: self.head, min: dim });
        }
        let row = self.needed(what, 1, heads, dim)?;
        if tokens > 1 && self.token < row {
            return Err(Error::StrideTooSmall { what, stride: self.token, min: row });
        }
        self.check_read(what, buffer, tokens, heads, dim)
    }
}

/// Refuses a buffer shorter than `needed` elements.
fn check_len(what: &'static str, needed: usize, got: usize) -> Result<()> {
    if got < needed {
        return Err(Error::BufferTooSmall { what, needed, got });
    }
    Ok(())
}

/// Refuses a length other than `expected`.
fn check_equal(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if got != expected {
        return Err(Error::LengthMismatch { what, expected, got });
    }
    Ok(())
}

/// Checks that a scale tensor covers `heads` × `channels`.
fn check_scale<M: Memory>(what: &'static str, scale: &ScaleRef<'_, M>, heads: usize, channels: usize) -> Result<()> {
    let overflow = Error::Overflow { what };
    let last = heads
        .saturating_sub(1)
        .checked_mul(scale.strides.head)
        .zip(channels.saturating_sub(1).checked_mul(scale.strides.channel))
        .and_then(|(head, channel)| head.checked_add(channel));
    match last.and_then(|last| last.checked_add(1)) {
        Some(needed) => check_len(what, needed, scale.values.buffer_len()),
        None => Err(overflow),
    }
}

/// The query heads that share one KV head.
fn group_size(num_heads: usize, num_kv_heads: usize) -> Result<usize> {
    if num_heads == 0 {
        return Err(Error::Zero { what: "the number of query heads" });
    }
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(Error::HeadsNotDivisible { num_heads, num_kv_heads });
    }
    Ok(num_heads / num_kv_heads)
}
