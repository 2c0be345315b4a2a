//! Running scales: static scales that follow the largest values of the first tokens, then stay.
//!
//! ```text
//! a step of the warm-up, layer by layer:
//!     running = max(running, |k|, |v| of the step's tokens)         per tensor, head or channel
//!     scale   = smallest power of two with  headroom * running <= scale * largest code
//!     changed?   requantize every block that holds tokens           PagedKvCache::requantize
//!     write the step's keys and values, attend over the cache
//! after N tokens: frozen.  Nothing is observed any more, steps are recorded as any others
//! ```
//! A scale depends on the tokens observed and on nothing else: not on the order they came in, not on
//! how they were cut into steps. Every value of the warm-up is covered before it is written, so none is
//! clipped; values that come after the freeze are clipped beyond `headroom` times the largest seen, or
//! later. Powers of two make requantizing exact but for values that become subnormal: what the cache
//! holds after the warm-up is what it would hold had it been written under the frozen scales, up to
//! less than one subnormal step (`docs/numerics.md`). So growing needs no margin and is rare anyway: at
//! most once for each binade that the maximum climbs.
//!
//! The first tokens that are all zero in some head leave its scale at 1.0; it may then shrink once, when
//! the first other value comes. Zeros have no scale, so nothing is lost.

use crate::backend::Backend;
use crate::cache::PagedKvCache;
use crate::error::{Error, Result};
use crate::layout::{CacheSpec, Half};
use crate::scale::{Granularity, LayerScales, StaticScale, covering_scale};

/// How long scales follow the data, and how far above it they stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunningScales {
    /// Tokens that are observed.
    pub tokens: usize,
    /// What the largest value seen is multiplied by before the scale is made to cover it.
    pub headroom: f32,
}

impl Default for RunningScales {
    /// 512 tokens, and a quarter above them.
    fn default() -> Self {
        RunningScales { tokens: 512, headroom: 1.25 }
    }
}

impl RunningScales {
    /// Checks both numbers.
    ///
    /// # Errors
    /// [`Error::Zero`] for no tokens; [`Error::InvalidNumber`] unless the headroom is finite and at least 1.
    pub fn validate(&self) -> Result<()> {
        if self.tokens == 0 {
            return Err(Error::Zero { what: "the tokens of a warm-up of KV scales" });
        }
        if !(self.headroom.is_finite() && self.headroom >= 1.0) {
            return Err(Error::InvalidNumber {
                what: "the headroom of KV scales",
                value: self.headroom.into(),
                expected: "finite and at least 1",
            });
        }
        Ok(())
    }
}

/// Scales that one layer had, and those that replaced them.
#[derive(Clone, Debug, PartialEq)]
pub struct Rescaled {
    /// The layer.
    pub layer: usize,
    /// What blocks were written under until now.
    pub old: LayerScales,
    /// What they have been requantized to.
    pub new: LayerScales,
}

/// What of one step a warm-up takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed<'a> {
    /// Rows of the batch, the first of them, whose keys and values are observed.
    pub rows: usize,
    /// How many of the warm-up's tokens they are. Fewer where a token is computed a second time, more
    /// where tokens were found in shared blocks.
    pub tokens: usize,
    /// Every block of the cache that holds tokens of any sequence, kept prefixes included; others may be
    /// among them.
    pub written: &'a [u32],
}

/// The warm-up of one cache: what was seen so far, and the scales that cover it.
#[derive(Clone, Debug)]
pub struct WarmUp {
    settings: RunningScales,
    spec: CacheSpec,
    tokens_left: usize,
    layers: Vec<LayerMaxima>,
    rescaled: Vec<Rescaled>,
}

#[derive(Clone, Debug)]
struct LayerMaxima {
    k: Vec<f32>,
    v: Vec<f32>,
    scales: LayerScales,
}

impl WarmUp {
    /// A warm-up of a cache of `spec` that nothing was written to yet and whose scales are `scales`.
    ///
    /// # Errors
    /// [`RunningScales::validate`]; [`Error::InLayer`] for scales that do not fit.
    pub fn new(settings: RunningScales, spec: CacheSpec, scales: &[LayerScales]) -> Result<Self> {
        settings.validate()?;
        let maxima = |half, scale: &StaticScale| {
            scale.check_fits(&spec, half)?;
            Ok(vec![0.0; scale.values().len()])
        };
        let layer = |(layer, scales): (usize, &LayerScales)| {
            let in_layer = |source: Error| source.in_layer(layer);
            let k = maxima(Half::K, &scales.k).map_err(in_layer)?;
            let v = maxima(Half::V, &scales.v).map_err(in_layer)?;
            Ok(LayerMaxima { k, v, scales: scales.clone() })
        };
        let layers = scales.iter().enumerate().map(layer).collect::<Result<_>>()?;
        Ok(WarmUp { settings, spec, tokens_left: settings.tokens, layers, rescaled: Vec::new() })
    }

    /// Tokens still to be observed; at zero the scales are frozen.
    pub fn tokens_left(&self) -> usize {
        self.tokens_left
    }

    /// Tokens observed.
    pub fn tokens_seen(&self) -> usize {
        self.settings.tokens - self.tokens_left
    }

    /// The layers whose scales the last step changed: blocks outside the cache, in host memory, are to be
    /// requantized too ([`crate::HostPool::requantize`]).
    pub fn rescaled(&self) -> &[Rescaled] {
        &self.rescaled
    }

    /// Refuses a cache of another geometry.
    pub(super) fn check<B: Backend>(&self, cache: &PagedKvCache<B>) -> Result<()> {
        let (own, given) = ((self.spec, self.layers.len()), (cache.shape().spec, cache.num_layers()));
        if own != given {
            let reason = format!("(spec, layers) are {own:?} and {given:?}");
            return Err(Error::GeometryMismatch { what: "the warm-up of scales and the cache", reason });
        }
        Ok(())
    }

    /// Begins a step of which `tokens` new tokens count.
    pub(super) fn begin_step(&mut self, tokens: usize) {
        self.tokens_left = self.tokens_left.saturating_sub(tokens);
        self.rescaled.clear();
    }

    /// How many values share a scale of `half` of a layer.
    pub(super) fn granularity(&self, layer: usize, half: Half) -> Granularity {
        self.layers[layer].scale(half).granularity()
    }

    /// Takes the maxima of the step's tokens in one layer, each a list of its half's granularity, and
    /// returns the layer's new scales if they are others.
    pub(super) fn observe(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<Option<LayerScales>> {
        let (settings, spec) = (self.settings, self.spec);
        let maxima = &mut self.layers[layer];
        for (running, seen) in [(&mut maxima.k, k), (&mut maxima.v, v)] {
            running.iter_mut().zip(seen).for_each(|(running, seen)| *running = running.max(*seen));
        }
        let cover = |half: Half, maxima: &[f32], scale: &StaticScale| {
            let what = format!("layer {layer} running scales");
            let values = maxima.iter().map(|max| covering_scale(*max, spec.format(half), settings.headroom)).collect();
            scale.with_values(&what, values)
        };
        let new = LayerScales {
            k: cover(Half::K, &maxima.k, &maxima.scales.k)?,
            v: cover(Half::V, &maxima.v, &maxima.scales.v)?,
        };
        if new == maxima.scales {
            return Ok(None);
        }
        let old = std::mem::replace(&mut maxima.scales, new.clone());
        self.rescaled.push(Rescaled { layer, old, new: new.clone() });
        Ok(Some(new))
    }
}

impl LayerMaxima {
    fn scale(&self, half: Half) -> &StaticScale {
        match half {
            Half::K => &self.scales.k,
            Half::V => &self.scales.v,
        }
    }
}
