//! `absmax` and `update_scales`: from data to static scales, on the device.
//!
//! `absmax` keeps a *running* maximum of |x| per tensor, head or channel: `running = max(running,
//! |x|)`. NaN is ignored; infinities count as `f32::MAX`, so that a scale stays finite.
//! `update_scales` turns it into `scale = absmax / divisor`, with a zero guard: where nothing but
//! zeros was seen the scale is 1.0, and no scale is below the smallest normal f32. With divisors
//! 200 (K) and 100 (V) this is vLLM's first-batch rule; with the format's maximum it is absmax
//! calibration.

use super::{RowStrides, check_equal};
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::checked_product;
use crate::memory::{BufferLen, Memory};
use crate::scale::Granularity;

/// Arguments of [`crate::Backend::absmax`].
#[derive(Debug)]
pub struct Absmax<'a, M: Memory, T: Element> {
    /// The data, `[tokens, heads, dim]`.
    pub input: M::Ref<'a, T>,
    /// Strides of `input`.
    pub strides: RowStrides,
    /// Tokens.
    pub num_tokens: usize,
    /// Heads.
    pub num_heads: usize,
    /// Channels.
    pub head_dim: usize,
    /// What shares one maximum.
    pub granularity: Granularity,
    /// Running maxima, [`Granularity::len`] of them; start them at zero.
    pub running: M::Mut<'a, f32>,
}

impl<M: Memory, T: Element> Absmax<'_, M, T> {
    /// Checks every shape, stride and length.
    ///
    /// # Errors
    /// Buffer variants of [`Error`].
    pub fn validate(&self) -> Result<()> {
        if self.num_heads == 0 || self.head_dim == 0 {
            return Err(Error::Zero { what: "heads and head dim of absmax" });
        }
        // The number of tokens last: no other product may overflow where it is zero.
        checked_product("absmax input", &[self.num_heads, self.head_dim, size_of::<T>(), self.num_tokens])?;
        self.strides.check_read("absmax input", &self.input, self.num_tokens, self.num_heads, self.head_dim)?;
        let expected = self.granularity.len(self.num_heads, self.head_dim);
        check_equal("the number of running maxima", expected, self.running.buffer_len())
    }
}

/// Arguments of [`crate::Backend::update_scales`].
#[derive(Debug)]
pub struct UpdateScales<'a, M: Memory> {
    /// Running maxima from [`Absmax`].
    pub absmax: M::Ref<'a, f32>,
    /// What to divide by: 200 and 100 for vLLM's rule, the format's maximum for absmax scales.
    pub divisor: f32,
    /// Scales, as many; never zero, infinite or NaN afterwards.
    pub scales: M::Mut<'a, f32>,
}

impl<M: Memory> UpdateScales<'_, M> {
    /// Checks lengths and the divisor.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`], [`Error::InvalidNumber`].
    pub fn validate(&self) -> Result<()> {
        if !(self.divisor.is_finite() && self.divisor >= 1.0) {
            return Err(Error::InvalidNumber {
                what: "the divisor of update_scales",
                value: self.divisor.into(),
                expected: "finite and at least 1",
            });
        }
        check_equal("the number of scales", self.absmax.buffer_len(), self.scales.buffer_len())
    }
}
