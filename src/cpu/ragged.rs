//! Reading what nobody has checked: query starts, sequence lengths and block tables.
//!
//! They may come from a device, so validation never looked at them. Each function here turns one
//! untrusted number into an index that is safe to use, or into a fault.

use std::ops::Range;

use super::*;

/// The rows of each sequence of a ragged batch, `(sequence, starts[s]..starts[s + 1])`.
///
/// A sequence whose bounds decrease, leave `0..num_rows`, or reach back into rows an earlier
/// sequence has claimed is skipped with a fault: the ranges yielded are ascending and disjoint,
/// which is what lets threads write them side by side.
pub(super) fn sequence_rows<'a>(
    starts: &'a [i32],
    num_rows: usize,
    faults: &'a FaultWord,
) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
    let mut unclaimed = 0;
    starts.windows(2).enumerate().filter_map(move |(seq, bounds)| {
        let rows = usize::try_from(bounds[0]).ok().zip(usize::try_from(bounds[1]).ok());
        match rows {
            Some((start, end)) if unclaimed <= start && start <= end && end <= num_rows => {
                unclaimed = end;
                Some((seq, start..end))
            }
            _ => {
                faults.set(Faults::QUERY_START_OUT_OF_RANGE);
                None
            }
        }
    })
}

/// A sequence length, clamped to what one row of the block table can hold.
pub(super) fn sequence_len(len: i32, capacity: usize, faults: &FaultWord) -> usize {
    let clamped = usize::try_from(len).unwrap_or(0).min(capacity);
    if i64::from(len) != clamped as i64 {
        faults.set(Faults::SEQ_LEN_OUT_OF_RANGE);
    }
    clamped
}

/// The block a table entry names, if it lies in the cache.
#[inline]
pub(super) fn checked_block(entry: i32, num_blocks: usize, faults: &FaultWord) -> Option<usize> {
    let block = usize::try_from(entry).ok().filter(|&block| block < num_blocks);
    if block.is_none() {
        faults.set(Faults::BLOCK_OUT_OF_RANGE);
    }
    block
}

/// The `(block, offset)` a slot names: `None` for padding (negative), and with a fault for a slot
/// past the end.
#[inline]
pub(super) fn checked_slot(slot: i64, shape: &CacheShape, faults: &FaultWord) -> Option<(usize, usize)> {
    // Negative slots fail the conversion: they are padding, not a fault.
    let slot = u64::try_from(slot).ok()?;
    if slot >= shape.num_slots() as u64 {
        faults.set(Faults::SLOT_OUT_OF_RANGE);
        return None;
    }
    let (slot, block_size) = (slot as usize, shape.spec.block_size);
    Some((slot / block_size, slot % block_size))
}
