//! [`Absmax`] and [`UpdateScales`], specified.

use super::*;

pub(in crate::cpu) fn absmax<T: Element>(op: Absmax<'_, CpuBackend, T>) {
    let strides = op.granularity.strides(op.head_dim);
    for token in 0..op.num_tokens {
        for head in 0..op.num_heads {
            let row = &op.input[op.strides.index(token, head)..][..op.head_dim];
            for (channel, x) in row.iter().enumerate() {
                let running = &mut op.running[strides.index(head, channel)];
                raise(running, x.to_f32());
            }
        }
    }
}

/// `running = max(running, |x|)` with infinities as `f32::MAX`. NaN compares false: it never raises.
#[inline(always)]
pub(in crate::cpu) fn raise(running: &mut f32, x: f32) {
    let x = if x.abs() > f32::MAX { f32::MAX } else { x.abs() };
    *running = if x > *running { x } else { *running };
}

pub(in crate::cpu) fn update_scales(op: UpdateScales<'_, CpuBackend>) {
    for (scale, &absmax) in op.scales.iter_mut().zip(op.absmax) {
        // Zero, negative and NaN maxima fail the comparison: nothing was seen.
        *scale = if absmax > 0.0 { (absmax.min(f32::MAX) / op.divisor).max(f32::MIN_POSITIVE) } else { 1.0 };
    }
}
