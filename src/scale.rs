//! What a scale is.
//!
//! A cached value is `code * static[head, channel] * dynamic[slot, head]`.
//!
//! * *static* scales are f32, chosen before tokens arrive (calibration, a checkpoint, a first
//!   batch), addressed by a head and a channel stride; stride 0 broadcasts:
//!
//!   ```text
//!   Granularity::Tensor   [1]      strides (0, 0)
//!   Granularity::Head     [H]      strides (1, 0)
//!   Granularity::Channel  [H, D]   strides (D, 1)
//!   ```
//! * *dynamic* scales are f32, one per (slot, head) and half, written by `cache_write` from the
//!   row's own absmax; they live beside the blocks ([`crate::layout::CacheShape`]).
//!
//! A scale must be finite and greater than zero. [`StaticScale`] is checked when made, so every
//! holder of one may rely on that. [`Scales`] are those of a whole model.

mod model;

use crate::error::{Error, Result};
use crate::format::KvFormat;
use crate::layout::{CacheSpec, Half};
use crate::memory::Memory;

pub use model::{Scales, kv_heads_of_rank};

/// How many values share one static scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// One scale for the whole tensor.
    Tensor,
    /// One scale per KV head.
    Head,
    /// One scale per KV head and channel.
    Channel,
}

impl Granularity {
    /// Scales needed for `heads` heads of `channels` channels; saturates.
    pub const fn len(self, heads: usize, channels: usize) -> usize {
        match self {
            Granularity::Tensor => 1,
            Granularity::Head => heads,
            Granularity::Channel => heads.saturating_mul(channels),
        }
    }

    /// `tensor`, `head` or `channel`.
    pub const fn name(self) -> &'static str {
        match self {
            Granularity::Tensor => "tensor",
            Granularity::Head => "head",
            Granularity::Channel => "channel",
        }
    }

    /// The strides that address such a tensor.
    pub const fn strides(self, channels: usize) -> ScaleStrides {
        match self {
            Granularity::Tensor => ScaleStrides { head: 0, channel: 0 },
            Granularity::Head => ScaleStrides { head: 1, channel: 0 },
            Granularity::Channel => ScaleStrides { head: channels, channel: 1 },
        }
    }
}

/// Element strides of a static scale tensor; 0 broadcasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ScaleStrides {
    /// From one KV head to the next.
    pub head: usize,
    /// From one channel to the next.
    pub channel: usize,
}

impl ScaleStrides {
    /// The index of the scale of `(head, channel)`.
    #[inline(always)]
    pub const fn index(&self, head: usize, channel: usize) -> usize {
        head * self.head + channel * self.channel
    }

    /// Elements a tensor with these strides must have for `heads` × `channels`; saturates.
    pub const fn len(&self, heads: usize, channels: usize) -> usize {
        let head = heads.saturating_sub(1).saturating_mul(self.head);
        let channel = channels.saturating_sub(1).saturating_mul(self.channel);
        head.saturating_add(channel).saturating_add(1)
    }
}

/// A static scale tensor in a backend's memory, borrowed for one operation.
#[derive(Debug)]
pub struct ScaleRef<'a, M: Memory> {
    /// The scales, addressed by `strides`. Read at run time, so that a captured graph sees updates.
    pub values: M::Ref<'a, f32>,
    /// How `(head, channel)` finds its scale.
    pub strides: ScaleStrides,
}

// Not derived: a derive would ask for `M: Copy`.
impl<M: Memory> Clone for ScaleRef<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Memory> Copy for ScaleRef<'_, M> {}

impl<'a, M: Memory> ScaleRef<'a, M> {
    /// The same scales, borrowed for a shorter time.
    ///
    /// Argument structs have one lifetime for all their buffers, and a struct over [`Memory`] does
    /// not shorten its own as a slice does: passed as it is to a call that borrows something
    /// mutably, a `ScaleRef` would keep that borrow alive as long as itself. Pass `scale.shorten()`
    /// where one is used for several calls.
    pub fn shorten<'short>(self) -> ScaleRef<'short, M>
    where
        'a: 'short,
    {
        ScaleRef { values: M::shorten(self.values), strides: self.strides }
    }
}

/// Host-side static scales of one half (K or V) of one layer: checked values with a granularity.
#[derive(Clone, Debug, PartialEq)]
pub struct StaticScale {
    granularity: Granularity,
    channels: usize,
    values: Vec<f32>,
}

impl StaticScale {
    /// One scale for the whole tensor.
    ///
    /// # Errors
    /// [`Error::InvalidScale`] unless `value` is finite and greater than zero.
    pub fn per_tensor(what: &str, value: f32) -> Result<Self> {
        check_scales(what, &[value])?;
        Ok(StaticScale { granularity: Granularity::Tensor, channels: 1, values: vec![value] })
    }

    /// One scale per KV head.
    ///
    /// # Errors
    /// [`Error::InvalidScale`] (`what` names layer and tensor); [`Error::Zero`] if empty.
    pub fn per_head(what: &str, values: Vec<f32>) -> Result<Self> {
        check_scales(what, &values)?;
        Ok(StaticScale { granularity: Granularity::Head, channels: 1, values })
    }

    /// One scale per KV head and channel, `[heads, channels]`.
    ///
    /// # Errors
    /// [`Error::InvalidScale`]; [`Error::LengthMismatch`] unless `values` are whole rows.
    pub fn per_channel(what: &str, channels: usize, values: Vec<f32>) -> Result<Self> {
        check_scales(what, &values)?;
        if channels == 0 || !values.len().is_multiple_of(channels) {
            return Err(Error::LengthMismatch {
                what: "per-channel scales (a multiple of the head dim)",
                expected: channels,
                got: values.len(),
            });
        }
        Ok(StaticScale { granularity: Granularity::Channel, channels, values })
    }

    /// The scale 1.0 for the whole tensor.
    pub fn one() -> Self {
        StaticScale { granularity: Granularity::Tensor, channels: 1, values: vec![1.0] }
    }

    /// How many values share one scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// The scales, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Strides that address [`StaticScale::values`].
    pub fn strides(&self) -> ScaleStrides {
        self.granularity.strides(self.channels)
    }

    /// The scale of `(head, channel)`. Both must be in range.
    pub fn get(&self, head: usize, channel: usize) -> f32 {
        self.values[self.strides().index(head, channel)]
    }

    /// Checks that there is a scale for every (head, channel) of `half` of `spec`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`].
    pub fn check_fits(&self, spec: &CacheSpec, half: Half) -> Result<()> {
        let expected = self.granularity.len(spec.num_kv_heads, spec.head_dim(half));
        let channels_fit = self.granularity != Granularity::Channel || self.channels == spec.head_dim(half);
        if self.values.len() != expected || !channels_fit {
            return Err(Error::LengthMismatch {
                what: match half {
                    Half::K => "the number of K scales",
                    Half::V => "the number of V scales",
                },
                expected,
                got: self.values.len(),
            });
        }
        Ok(())
    }

    /// Other values of the same granularity.
    ///
    /// # Errors
    /// [`Error::InvalidScale`]; [`Error::LengthMismatch`] for another number of them.
    pub fn with_values(&self, what: &str, values: Vec<f32>) -> Result<Self> {
        check_scales(what, &values)?;
        let (expected, got) = (self.values.len(), values.len());
        if got != expected {
            return Err(Error::LengthMismatch { what: "the number of scales", expected, got });
        }
        Ok(StaticScale { values, ..*self })
    }

    /// The same scales shared by more or by fewer values. A finer tensor repeats each scale; a coarser
    /// one has the **largest** of those it replaces: a scale too large costs next to nothing, one too
    /// small clips.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] unless these are the scales of `heads` heads of `channels` channels.
    pub fn with_granularity(&self, granularity: Granularity, heads: usize, channels: usize) -> Result<Self> {
        let expected = self.granularity.len(heads, channels);
        if self.values.len() != expected || (self.granularity == Granularity::Channel && self.channels != channels) {
            return Err(Error::LengthMismatch { what: "the number of scales", expected, got: self.values.len() });
        }
        let strides = granularity.strides(channels);
        // Smaller than any scale; every place is raised below.
        let mut values = vec![0f32; granularity.len(heads, channels)];
        for head in 0..heads {
            for channel in 0..channels {
                let value = &mut values[strides.index(head, channel)];
                *value = value.max(self.get(head, channel));
            }
        }
        let channels = if granularity == Granularity::Channel { channels } else { 1 };
        Ok(StaticScale { granularity, channels, values })
    }

    /// The scales a gfx94x device must use so that FNUZ codes mean what OCP codes of the same
    /// bytes mean: twice the value.
    ///
    /// # Errors
    /// [`Error::InvalidScale`] if doubling overflows.
    pub fn doubled_for_fnuz(&self, what: &str) -> Result<Self> {
        let values: Vec<f32> = self.values.iter().map(|s| s * 2.0).collect();
        check_scales(what, &values)?;
        Ok(StaticScale { values, ..self.clone() })
    }
}

/// Static scales of both halves of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerScales {
    /// Scales of K.
    pub k: StaticScale,
    /// Scales of V.
    pub v: StaticScale,
}

impl LayerScales {
    /// 1.0 for both.
    pub fn one() -> Self {
        LayerScales { k: StaticScale::one(), v: StaticScale::one() }
    }
}

/// Refuses an empty list and any scale that is not finite and greater than zero.
///
/// # Errors
/// [`Error::Zero`], or [`Error::InvalidScale`] naming `what`, the index and the value.
pub fn check_scales(what: &str, values: &[f32]) -> Result<()> {
    if values.is_empty() {
        return Err(Error::Zero { what: "the number of scales" });
    }
    match values.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
        Some(index) => Err(Error::InvalidScale { what: what.to_owned(), index, value: values[index] }),
        None => Ok(()),
    }
}

/// The smallest power of two under which `format` reaches `headroom * absmax`: the running scale of
/// values up to `absmax`. 1.0 where nothing but zeros was seen; at least the smallest normal f32, at
/// most 2^127.
///
/// A power of two loses nothing, since a float's relative precision is the same in every binade, and it
/// makes growing exact: from `s` to `2^k s` every code becomes the one that `2^k s` would have given
/// from the start, but for values that are subnormal then (`docs/numerics.md`).
pub fn covering_scale(absmax: f32, format: KvFormat, headroom: f32) -> f32 {
    if absmax == 0.0 {
        return 1.0;
    }
    // Exact, or one rounding of a number with room to spare: no product of f32s leaves f64's normals.
    let wanted = f64::from(absmax) * f64::from(headroom) / f64::from(format.max_finite());
    let bits = wanted.to_bits();
    let exponent = (bits >> 52) as i32 - 1023 + i32::from(bits << 12 != 0);
    2f32.powi(exponent.clamp(-126, 127))
}

/// The dynamic scale of a row whose largest magnitude (already divided by its static scales) is
/// `absmax`: the row's largest value becomes the format's largest code. Never zero or infinite,
/// so that dividing by it is always defined: an all-zero row gets the smallest normal f32, and an
/// infinite absmax counts as `f32::MAX`.
#[inline(always)]
pub fn dynamic_scale(absmax: f32, format: KvFormat) -> f32 {
    (absmax.min(f32::MAX) / format.max_finite()).max(f32::MIN_POSITIVE)
}

/// The one scale a code is divided and multiplied by where a static and a dynamic scale meet:
/// their f32 product, kept finite and normal so that neither 0/0 nor 0*inf can make a NaN of a
/// row that holds none.
#[inline(always)]
pub fn combined_scale(fixed: f32, dynamic: f32) -> f32 {
    (fixed * dynamic).clamp(f32::MIN_POSITIVE, f32::MAX)
}
