//! Static scales of a whole model, and the part of them that one tensor-parallel rank needs.
//!
//! A rank computes `num_heads / world` query heads and caches the KV heads they read, dealt as vLLM
//! deals them:
//!
//! ```text
//! num_kv_heads >= world    num_kv_heads / world heads a rank, in order
//! num_kv_heads <  world    one head a rank; world / num_kv_heads neighbours hold copies of it
//! ```
//! Scales per head and per channel are cut the same way; one scale for the whole tensor is every
//! rank's. A query's scale is kept per KV head, the largest of the query heads that share it: that is
//! the shape attention kernels want it in, and what vLLM makes of it before it deals it out.

use std::ops::Range;

use super::{Granularity, LayerScales, StaticScale};
use crate::error::{Error, Result};

/// Static scales of every layer of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    num_heads: usize,
    num_kv_heads: usize,
    layers: Vec<LayerScales>,
    q: Vec<Option<StaticScale>>,
}

impl Scales {
    /// Scales of a model with these head counts, one entry of `layers` a layer.
    ///
    /// # Errors
    /// [`Error::HeadsNotDivisible`] (also for no heads); [`Error::LengthMismatch`] in the layer whose
    /// scales are not one for the tensor, one a KV head, or rows of channels for each KV head.
    pub fn new(num_heads: usize, num_kv_heads: usize, layers: Vec<LayerScales>) -> Result<Scales> {
        if num_kv_heads == 0 || num_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::HeadsNotDivisible { num_heads, num_kv_heads });
        }
        for (layer, scales) in layers.iter().enumerate() {
            for (half, what) in [(&scales.k, "heads that have K scales"), (&scales.v, "heads that have V scales")] {
                half.check_heads(what, num_kv_heads).map_err(|error| error.in_layer(layer))?;
            }
        }
        let q = vec![None; layers.len()];
        Ok(Scales { num_heads, num_kv_heads, layers, q })
    }

    /// The same with scales of the queries, an entry a layer: one for the tensor, or one a KV head
    /// ([`StaticScale::max_of_groups`] makes them of one a query head).
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for another number of layers or heads.
    pub fn with_q(mut self, q: Vec<Option<StaticScale>>) -> Result<Scales> {
        if q.len() != self.layers.len() {
            let (expected, got) = (self.layers.len(), q.len());
            return Err(Error::LengthMismatch { what: "layers that have q scales", expected, got });
        }
        for (layer, scale) in q.iter().enumerate() {
            if let Some(scale) = scale {
                let fits = scale.check_heads("heads that have q scales", self.num_kv_heads);
                fits.map_err(|error| error.in_layer(layer))?;
            }
        }
        self.q = q;
        Ok(self)
    }

    /// Scales of keys and values, a pair a layer: what [`crate::PagedKvCache::new`] takes.
    pub fn layers(&self) -> &[LayerScales] {
        &self.layers
    }

    /// [`Scales::layers`], without a copy.
    pub fn into_layers(self) -> Vec<LayerScales> {
        self.layers
    }

    /// The query's scale of each layer, per tensor or per **KV** head; `None` where the checkpoint has
    /// no usable one. Attention here takes unquantized queries: these are for kernels that do not.
    pub fn q(&self) -> &[Option<StaticScale>] {
        &self.q
    }

    /// Query heads.
    pub fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// KV heads.
    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// What rank `rank` of `world` tensor-parallel ranks needs.
    ///
    /// ```
    /// use quantkv::scale::{LayerScales, Scales, StaticScale};
    ///
    /// // 64 query and 8 KV heads over 16 ranks: two ranks hold the same KV head.
    /// let k = StaticScale::per_head("layer 0 k_scale", (1..=8).map(|h| h as f32).collect())?;
    /// let layer = LayerScales { k, v: StaticScale::one() };
    /// let scales = Scales::new(64, 8, vec![layer])?;
    /// assert_eq!(scales.shard(4, 16)?.layers()[0].k.values(), [3.0]);
    /// assert_eq!(scales.shard(5, 16)?.layers()[0].k.values(), [3.0]);
    /// # Ok::<(), quantkv::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shard`] unless `rank < world`, `world` divides the query heads, and of `world` and the
    /// KV heads one divides the other.
    pub fn shard(&self, rank: usize, world: usize) -> Result<Scales> {
        let heads = kv_heads_of_rank(rank, world, self.num_heads, self.num_kv_heads)?;
        let layer = |scales: &LayerScales| LayerScales {
            k: scales.k.of_heads(heads.clone()),
            v: scales.v.of_heads(heads.clone()),
        };
        Ok(Scales {
            num_heads: self.num_heads / world,
            num_kv_heads: heads.len(),
            layers: self.layers.iter().map(layer).collect(),
            q: self.q.iter().map(|q| q.as_ref().map(|q| q.of_heads(heads.clone()))).collect(),
        })
    }

    /// The scales of a cache of FNUZ codes ([`StaticScale::doubled_for_fnuz`]), the queries' too.
    ///
    /// # Errors
    /// [`Error::InvalidScale`] if doubling overflows.
    pub fn doubled_for_fnuz(&self) -> Result<Scales> {
        let mut doubled = self.clone();
        for (layer, (pair, q)) in doubled.layers.iter_mut().zip(&mut doubled.q).enumerate() {
            pair.k = pair.k.doubled_for_fnuz(&format!("layer {layer} k_scale"))?;
            pair.v = pair.v.doubled_for_fnuz(&format!("layer {layer} v_scale"))?;
            if let Some(q) = q {
                *q = q.doubled_for_fnuz(&format!("layer {layer} q_scale"))?;
            }
        }
        Ok(doubled)
    }
}

impl StaticScale {
    /// One scale a KV head from one a query head: the largest of each group that shares a KV head, so
    /// that it covers all of them.
    ///
    /// # Errors
    /// [`Error::InvalidScale`]; [`Error::HeadsNotDivisible`] unless `num_kv_heads` divides the number
    /// of scales.
    pub fn max_of_groups(what: &str, per_query_head: &[f32], num_kv_heads: usize) -> Result<StaticScale> {
        let num_heads = per_query_head.len();
        if num_kv_heads == 0 || num_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::HeadsNotDivisible { num_heads, num_kv_heads });
        }
        super::check_scales(what, per_query_head)?;
        let groups = per_query_head.chunks_exact(num_heads / num_kv_heads);
        StaticScale::per_head(what, groups.map(|group| group.iter().copied().fold(0.0, f32::max)).collect())
    }

    /// The scales of some KV heads; all of them if there is one for the tensor.
    fn of_heads(&self, heads: Range<usize>) -> StaticScale {
        match self.granularity {
            Granularity::Tensor => self.clone(),
            Granularity::Head | Granularity::Channel => {
                let values = self.values[heads.start * self.channels..heads.end * self.channels].to_vec();
                StaticScale { values, ..self.clone() }
            }
        }
    }

    fn check_heads(&self, what: &'static str, num_kv_heads: usize) -> Result<()> {
        let heads = self.values.len() / self.channels;
        if self.granularity == Granularity::Tensor || heads == num_kv_heads {
            return Ok(());
        }
        Err(Error::LengthMismatch { what, expected: num_kv_heads, got: heads })
    }
}

/// The KV heads that rank `rank` of `world` caches.
///
/// # Errors
/// [`Error::Shard`].
pub fn kv_heads_of_rank(rank: usize, world: usize, num_heads: usize, num_kv_heads: usize) -> Result<Range<usize>> {
    let refuse = |reason| Err(Error::Shard { rank, world, num_heads, num_kv_heads, reason });
    if world == 0 || rank >= world {
        return refuse("ranks count from 0 to one less than the number of ranks");
    }
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return refuse("the KV heads do not divide the query heads");
    }
    if !num_heads.is_multiple_of(world) {
        return refuse("the ranks do not divide the query heads");
    }
    if num_kv_heads.is_multiple_of(world) {
        let each = num_kv_heads / world;
        Ok(rank * each..(rank + 1) * each)
    } else if world.is_multiple_of(num_kv_heads) {
        let head = rank / (world / num_kv_heads);
        Ok(head..head + 1)
    } else {
        refuse("neither do the ranks divide the KV heads, nor the KV heads the ranks")
    }
}
