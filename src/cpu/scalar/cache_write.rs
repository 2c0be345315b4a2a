//! [`CacheWrite`], specified.

use super::super::ragged::checked_slot;
use super::*;
use crate::args::RowStrides;
use crate::scale::dynamic_scale;

pub(in crate::cpu) fn cache_write<T: Element>(op: CacheWrite<'_, CpuBackend, T>, faults: &FaultWord) {
    let (shape, slots) = (op.shape, op.slot_mapping);
    let key = Rows { data: op.key, strides: op.key_strides, scale: op.k_scale };
    write_half(&shape, Half::K, op.cache.k, op.cache.k_dynamic, &key, slots, faults);
    let value = Rows { data: op.value, strides: op.value_strides, scale: op.v_scale };
    write_half(&shape, Half::V, op.cache.v, op.cache.v_dynamic, &value, slots, faults);
}

/// New keys or values, `[tokens, heads, dim]`, and their static scales.
struct Rows<'a, T> {
    data: &'a [T],
    strides: RowStrides,
    scale: ScaleRef<'a, CpuBackend>,
}

fn write_half<T: Element>(
    shape: &CacheShape,
    half: Half,
    bytes: &mut [u8],
    mut dynamic: Option<&mut [f32]>,
    rows: &Rows<'_, T>,
    slot_mapping: &[i64],
    faults: &FaultWord,
) {
    let (format, dim) = (shape.spec.format(half), shape.spec.head_dim(half));
    for (token, &slot) in slot_mapping.iter().enumerate() {
        let Some((block, offset)) = checked_slot(slot, shape, faults) else { continue };
        for head in 0..shape.spec.num_kv_heads {
            let x = |channel: usize| rows.data[rows.strides.index(token, head) + channel];

            // The row's own scale comes from its largest magnitude; `f32::max` ignores NaN.
            let own = dynamic.as_deref_mut().map(|scales| {
                let scaled = |channel: usize| x(channel).to_f32() / rows.scale.at(head, channel);
                let absmax = (0..dim).map(|channel| scaled(channel).abs()).fold(0.0, f32::max);
                let own = dynamic_scale(absmax, format);
                scales[shape.dynamic_scale_index(block, head, offset)] = own;
                own
            });
            for channel in 0..dim {
                let scale = static_and_dynamic(format, &rows.scale, head, channel, own);
                let at = shape.map(half).index(block, head, offset, channel) * format.bytes();
                store(format, x(channel), scale, &mut bytes[at..at + format.bytes()]);
            }
        }
    }
}
