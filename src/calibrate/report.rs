//! The scales, and what they would have done to the data they were made from.

use rayon::prelude::*;

use super::group::Group;
use super::{Calibration, LARGEST_CODE};
use crate::error::{Error, Result};
use crate::scale::{Granularity, LayerScales, StaticScale};

/// What rounds to the largest code without being cut off: values up to half a step above it.
const LARGEST_ROUNDED: f32 = 464.0;

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerReport {
    /// Its keys.
    pub k: HalfReport,
    /// Its values.
    pub v: HalfReport,
}

impl LayerReport {
    /// The scales alone.
    pub fn scales(&self) -> LayerScales {
        LayerScales { k: self.k.scale.clone(), v: self.v.scale.clone() }
    }
}

/// The keys or the values of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct HalfReport {
    /// The scales.
    pub scale: StaticScale,
    /// The largest magnitude of each group.
    pub absmax: Vec<f32>,
    /// The share of values that are cut off: beyond 464 scales, which 448 is no longer the nearest code
    /// of. Values in the histogram's bucket of that limit count as not cut off.
    pub clipped: f64,
    /// How much larger values may become before they are cut off: 448 * scale / absmax of the group
    /// that has least of it; below 1 values are cut off. Infinite if all are zero.
    pub headroom: f32,
}

impl Calibration {
    /// The scales of every layer.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if no sample was observed; [`Error::InLayer`] with
    /// [`Error::InvalidScale`] for a range that f16 does not hold.
    pub fn report(&self) -> Result<Vec<LayerReport>> {
        if self.samples == 0 {
            return Err(Error::InvalidRequest("no sample was observed: there is nothing to make scales of".into()));
        }
        let layer = |(layer, [k, v]): (usize, &[Vec<Group>; 2])| {
            let half = |name, groups| self.half(name, groups).map_err(|error| error.in_layer(layer));
            Ok(LayerReport { k: half("k_scale", k)?, v: half("v_scale", v)? })
        };
        self.layers.par_iter().enumerate().map(layer).collect()
    }

    fn half(&self, name: &str, groups: &[Group]) -> Result<HalfReport> {
        let values: Vec<f32> = groups.par_iter().map(|group| self.observer.scale(group, self.dtype)).collect();
        let (mut clipped, mut total, mut headroom) = (0, 0, f32::INFINITY);
        for (group, scale) in groups.iter().zip(&values) {
            total += group.histogram.total();
            clipped += group.histogram.above(LARGEST_ROUNDED * scale);
            if group.absmax > 0.0 {
                headroom = headroom.min(LARGEST_CODE * scale / group.absmax);
            }
        }
        let scale = match self.granularity {
            Granularity::Tensor => StaticScale::per_tensor(name, values[0])?,
            Granularity::Head => StaticScale::per_head(name, values)?,
            Granularity::Channel => StaticScale::per_channel(name, self.head_dim, values)?,
        };
        let absmax = groups.iter().map(|group| group.absmax).collect();
        Ok(HalfReport { scale, absmax, clipped: clipped as f64 / total.max(1) as f64, headroom })
    }
}
