//! [`Absmax`] and [`UpdateScales`], specified.

use super::*;

pub(in crate::cpu) fn absmax<T: Element>(op: Absmax<'_, CpuBackend, T>) {
    let strides = op.granularity.strides(op.head_dim);
    for token in 0..op.num_tokens {
        for head in 0..op.num_heads {
            let row = &op.input[op.strides.index(token, head)..][..op.head_dim];
            for (channel, x) in row.iter().enumerate() {
                let running = &mut op.running[strides.index(head, channel)];
                let x = x.to_f32().abs();
                *running = running.max(if x.is_nan() { 0.0 } else { x.min(f32::MAX) });
            }
        }
    }
}

pub(in crate::cpu) fn update_scales(op: UpdateScales<'_, CpuBackend>) {
    for (scale, &absmax) in op.scales.iter_mut().zip(op.absmax) {
        // Zero, negative and NaN maxima fail the comparison: nothing was seen.
        *scale = if absmax > 0.0 { (absmax.min(f32::MAX) / op.divisor).max(f32::MIN_POSITIVE) } else { 1.0 };
    }
}
