//! Steps while scales are still being computed.
//!
//! As long as they are, sequences run one after the other (with the samples of one prompt side by side):
//! then the tokens observed are those of the requests in their order, whatever the limits of a step and
//! the blocks there are. A token counts once: one that is computed again after its blocks were dropped
//! does not, one found in a shared block does, since its values were observed when they were computed.

use super::Engine;
use super::scheduler::{Row, Running};
use crate::decoder::compute::Compute;
use crate::decoder::kv_scales::{Divisors, KvScales, OnTheFly};
use crate::decoder::warm_up::{Observed, WarmUp};
use crate::error::Result;
use crate::format::Element;
use crate::layout::CacheSpec;

/// Where the static scales of the cache come from yet.
#[derive(Debug)]
pub(super) enum Scales {
    /// They are what they are.
    Frozen,
    /// From the next step.
    FirstBatch(Divisors),
    /// They grow.
    WarmUp(Box<WarmUp>),
}

impl Scales {
    pub fn new(scales: &KvScales, spec: CacheSpec) -> Result<Self> {
        Ok(match scales.on_the_fly {
            None => Scales::Frozen,
            Some(OnTheFly::FirstBatch(divisors)) => {
                divisors.validate()?;
                Scales::FirstBatch(divisors)
            }
            Some(OnTheFly::Running(settings)) => Scales::WarmUp(Box::new(WarmUp::new(settings, spec, &scales.layers)?)),
        })
    }

    pub fn are_frozen(&self) -> bool {
        matches!(self, Scales::Frozen)
    }
}

impl<B: Compute<A>, A: Element> Engine<'_, B, A> {
    /// Computes the step that the batch holds, and what it does to scales.
    pub(super) fn compute(&mut self, rows: &[Row]) -> Result<()> {
        match std::mem::replace(&mut self.scales, Scales::Frozen) {
            Scales::Frozen => self.model.compute(&self.batch, &mut self.cache),
            Scales::FirstBatch(divisors) => {
                self.model.scales_from_next_step_by(divisors)?;
                self.model.compute(&self.batch, &mut self.cache)?;
                self.stats.scale_tokens = self.batch.num_tokens();
                Ok(())
            }
            Scales::WarmUp(mut warm_up) => {
                self.warm_up(rows, &mut warm_up)?;
                self.stats.scale_tokens = warm_up.tokens_seen();
                if warm_up.tokens_left() > 0 {
                    self.scales = Scales::WarmUp(warm_up);
                }
                Ok(())
            }
        }
    }

    fn warm_up(&mut self, rows: &[Row], warm_up: &mut WarmUp) -> Result<()> {
        let (observed, tokens) = count(rows, &mut self.scheduler.running, warm_up.tokens_left());
        let written: Vec<u32> = self.scheduler.pool.occupied().collect();
        let observed = Observed { rows: observed, tokens, written: &written };
        self.model.compute_warming_up(&self.batch, &mut self.cache, warm_up, observed)?;
        self.stats.scale_changes += warm_up.rescaled().len();
        if let Some(host) = &mut self.host {
            let blocks = self.scheduler.host_blocks();
            for change in warm_up.rescaled() {
                host.requantize(change.layer, &change.old, &change.new, &blocks)?;
            }
        }
        Ok(())
    }
}

/// Rows of the batch to observe, and tokens of a warm-up that these are, `left` at most.
fn count(rows: &[Row], running: &mut [Running], mut left: usize) -> (usize, usize) {
    let (mut observed, mut tokens) = (0, 0);
    for row in rows {
        if left == 0 {
            break;
        }
        let (end, counted) = (row.start + row.len, &mut running[row.index].sequence.observed);
        let new = end.saturating_sub(*counted);
        let taken = new.min(left);
        observed += row.len.saturating_sub(new - taken);
        tokens += taken;
        left -= taken;
        *counted = end.max(*counted);
        if taken < new {
            break;
        }
    }
    (observed, tokens)
}
