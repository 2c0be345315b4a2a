//! [`Quantize`] and [`Dequantize`], specified.

use super::*;

pub(in crate::cpu) fn quantize<T: Element>(op: Quantize<'_, CpuBackend, T>) {
    let size = op.format.bytes();
    for token in 0..op.num_tokens {
        for head in 0..op.num_heads {
            for channel in 0..op.head_dim {
                let x = op.input[op.strides.index(token, head) + channel];
                let scale = static_and_dynamic(op.format, &op.scale, head, channel, None);
                let at = ((token * op.num_heads + head) * op.head_dim + channel) * size;
                store(op.format, x, scale, &mut op.codes[at..at + size]);
            }
        }
    }
}

pub(in crate::cpu) fn dequantize<T: Element>(op: Dequantize<'_, CpuBackend, T>) {
    let size = op.format.bytes();
    for token in 0..op.num_tokens {
        for head in 0..op.num_heads {
            for channel in 0..op.head_dim {
                let scale = static_and_dynamic(op.format, &op.scale, head, channel, None);
                let at = ((token * op.num_heads + head) * op.head_dim + channel) * size;
                let value = load(op.format, &op.codes[at..at + size], scale);
                op.output[op.strides.index(token, head) + channel] = value;
            }
        }
    }
}
