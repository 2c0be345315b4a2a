//! The calibration texts through the model, by every observer and granularity that some row asks for.

use std::ops::ControlFlow;

use quantkv::calibrate::{Calibration, LayerReport, Observer, Runner};
use quantkv::decoder::{Compute, Model};
use quantkv::scale::{Granularity, LayerScales, StaticScale};
use quantkv::{Element, Result};

use crate::rows::{ABSMAX, Row, Scales};

/// What the texts made of each layer, for each way of looking at them.
pub struct Calibrations(Vec<((Observer, Granularity), Vec<LayerReport>)>);

impl Calibrations {
    /// Runs the texts for `rows`; absmax per tensor is always among the results.
    pub fn new<B: Compute<A>, A: Element>(
        model: &mut Model<B, A>,
        texts: &[Vec<u32>],
        rows: &[&Row],
    ) -> Result<Calibrations> {
        let mut wanted: Vec<(Observer, Granularity)> = Vec::new();
        for scales in [ABSMAX].into_iter().chain(rows.iter().map(|row| row.scales)) {
            match scales {
                Scales::Calibrated(observer, granularity) if !wanted.contains(&(observer, granularity)) => {
                    wanted.push((observer, granularity));
                }
                _ => {}
            }
        }
        let report = |(observer, granularity)| {
            let mut calibration = Calibration::new(observer, granularity, model.config(), model.dtype());
            let mut runner = Runner::new(model, texts.iter().map(Vec::len).max().unwrap_or(0))?;
            for text in texts {
                runner.sample(text, &mut calibration, &mut |_| ControlFlow::Continue(()))?;
            }
            Ok(((observer, granularity), calibration.report()?))
        };
        wanted.into_iter().map(report).collect::<Result<_>>().map(Calibrations)
    }

    /// Scales of every layer.
    pub fn scales(&self, observer: Observer, granularity: Granularity) -> Vec<LayerScales> {
        self.reports(observer, granularity).iter().map(LayerReport::scales).collect()
    }

    /// Absmax scales per tensor, `by` times too small.
    pub fn too_small(&self, by: f32) -> Result<Vec<LayerScales>> {
        let shrink = |scale: &StaticScale| StaticScale::per_tensor("a scale too small", scale.values()[0] / by);
        let scales = self.scales(Observer::Absmax, Granularity::Tensor);
        scales.iter().map(|layer| Ok(LayerScales { k: shrink(&layer.k)?, v: shrink(&layer.v)? })).collect()
    }

    /// The smallest and the largest of the layers' largest keys.
    pub fn largest_keys(&self) -> (f32, f32) {
        let keys = self.reports(Observer::Absmax, Granularity::Tensor).iter().map(|layer| layer.k.absmax[0]);
        keys.fold((f32::INFINITY, 0.0), |(min, max), key| (min.min(key), max.max(key)))
    }

    fn reports(&self, observer: Observer, granularity: Granularity) -> &[LayerReport] {
        // `new` saw every row, and absmax is always there.
        self.0.iter().find(|(key, _)| *key == (observer, granularity)).map_or(&[], |(_, reports)| reports)
    }
}
