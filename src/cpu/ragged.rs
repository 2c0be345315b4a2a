//! Reading what nobody has checked: query starts, sequence lengths and block tables.
//!
//! They may come from a device, so validation never looked at them. Each function here turns one
//! untrusted number into an index that is safe to use, or into a fault.

use std::ops::Range;

use super::*;

/// The rows of each sequence of a ragged batch, `(sequence, starts[s]..starts[s + 1])`.
///
/// A sequence whose bounds decrease, leave `0..num_rows`, are more than `longest` apart, or reach back
/// into rows an earlier sequence has claimed is skipped with a fault: the ranges yielded are ascending
/// and disjoint, which is what lets threads write them side by side.
pub(super) fn sequence_rows<'a>(
    starts: &'a [i32],
    num_rows: usize,
    longest: usize,
    faults: &'a FaultWord,
) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
    let mut unclaimed = 0;
    starts.windows(2).enumerate().filter_map(move |(seq, bounds)| {
        let rows = usize::try_from(bounds[0]).ok().zip(usize::try_from(bounds[1]).ok());
        match rows {
            Some((start, end)) if unclaimed <= start && start <= end && end <= num_rows && end - start <= longest => {
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

/// The block tables of a gather, and where each sequence begins.
pub(super) struct Table<'a> {
    pub(super) blocks: &'a [i32],
    pub(super) stride: usize,
    pub(super) starts: Option<&'a [i32]>,
    pub(super) shape: &'a CacheShape,
    pub(super) faults: &'a FaultWord,
}

impl<'a> Table<'a> {
    /// Output rows `window` in runs `(first row, count, place)` that lie side by side in one block, or
    /// have no place.
    pub(super) fn runs(
        &'a self,
        cu_seq_lens: &'a [i32],
        num_tokens: usize,
        window: Range<usize>,
    ) -> impl Iterator<Item = (usize, usize, Option<(usize, usize)>)> + 'a {
        sequence_rows(cu_seq_lens, num_tokens, num_tokens, self.faults).flat_map(move |(seq, rows)| {
            let end = rows.end.min(window.end);
            let mut row = rows.start.max(window.start);
            std::iter::from_fn(move || {
                let left = end.checked_sub(row).filter(|&left| left > 0)?;
                let place = self.place(seq, row - rows.start);
                let room = place.map_or(1, |(_, slot)| self.shape.spec.block_size - slot);
                let run = (row, room.min(left), place);
                row += run.1;
                Some(run)
            })
        })
    }

    /// Every output row some sequence claims, ascending, with the `(block, slot)` it comes from;
    /// `None` where that place is outside the table or the cache.
    pub(super) fn rows(
        &'a self,
        cu_seq_lens: &'a [i32],
        num_tokens: usize,
    ) -> impl Iterator<Item = (usize, Option<(usize, usize)>)> + 'a {
        sequence_rows(cu_seq_lens, num_tokens, num_tokens, self.faults).flat_map(move |(seq, rows)| {
            let first = rows.start;
            rows.map(move |row| (row, self.place(seq, row - first)))
        })
    }

    /// The `(block, slot)` of the `t`-th token gathered of a sequence.
    fn place(&self, seq: usize, t: usize) -> Option<(usize, usize)> {
        let start = self.starts.map_or(0, |starts| i64::from(starts[seq]));
        // `start` is an i32 and `t` counts elements of a buffer: their sum fits.
        let position = usize::try_from(start + t as i64).ok();
        let block_size = self.shape.spec.block_size;
        match position.filter(|position| position / block_size < self.stride) {
            Some(position) => {
                let entry = self.blocks[seq * self.stride + position / block_size];
                checked_block(entry, self.shape.num_blocks, self.faults).map(|block| (block, position % block_size))
            }
            None => {
                self.faults.set(Faults::SEQ_LEN_OUT_OF_RANGE);
                None
            }
        }
    }
}
