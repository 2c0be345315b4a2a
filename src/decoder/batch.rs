//! One step of the model: which tokens of which sequences, where their keys and values go, and
//! which rows need logits.

use crate::error::{Error, Result};
use crate::layout::CacheShape;

/// Far above any cache's; keeps slot arithmetic inside `i64`.
const MAX_BLOCK_SIZE: usize = 1 << 20;

/// Which of a sequence's new tokens need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WantedLogits {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last token: what sampling needs.
    Last,
    /// Every token: what scoring a text needs. Costs a vocabulary row each.
    All,
}

/// The tokens of one step. Rows of all sequences follow each other; a step may mix decode
/// (one token a sequence) and prefill chunks (many).
///
/// Fill it with [`Batch::push_sequence`], reuse it with [`Batch::clear`].
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) token_ids: Vec<i32>,
    pub(crate) positions: Vec<i32>,
    pub(crate) slot_mapping: Vec<i64>,
    /// `[sequences + 1]` once a sequence was pushed, else empty.
    pub(crate) query_starts: Vec<i32>,
    pub(crate) seq_lens: Vec<i32>,
    /// Ragged block tables, one after the other, and where each ends.
    pub(crate) blocks: Vec<i32>,
    pub(crate) block_ends: Vec<usize>,
    pub(crate) logits_rows: Vec<i32>,
}

impl Batch {
    /// An empty step.
    pub fn new() -> Self {
        Batch::default()
    }

    /// Removes all sequences, keeps the memory.
    pub fn clear(&mut self) {
        let Batch { token_ids, positions, slot_mapping, query_starts, seq_lens, blocks, block_ends, logits_rows } =
            self;
        for list in [token_ids, positions, query_starts, seq_lens, blocks, logits_rows] {
            list.clear();
        }
        slot_mapping.clear();
        block_ends.clear();
    }

    /// Adds the next `tokens` of a sequence of which `start` tokens are cached already. `blocks`
    /// is its block table and must cover `start + tokens.len()` tokens of `block_size` slots each.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for no tokens or a block table too short; [`Error::Overflow`] for
    /// a position or id beyond `i32`.
    pub fn push_sequence(
        &mut self,
        tokens: &[u32],
        start: usize,
        blocks: &[u32],
        block_size: usize,
        wanted: WantedLogits,
    ) -> Result<()> {
        if tokens.is_empty() || !(1..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(Error::InvalidRequest("a sequence in a batch needs tokens and a block size".into()));
        }
        let end = start.checked_add(tokens.len()).filter(|end| i32::try_from(*end).is_ok());
        let end = end.ok_or(Error::Overflow { what: "the sequence length" })?;
        if blocks.len() < end.div_ceil(block_size) {
            let have = blocks.len();
            let message =
                format!("{end} tokens need {} blocks of {block_size}, the table has {have}", end.div_ceil(block_size));
            return Err(Error::InvalidRequest(message));
        }
        let first_row = self.token_ids.len();
        if i32::try_from(first_row + tokens.len()).is_err() {
            return Err(Error::Overflow { what: "the tokens of a batch" });
        }
        // Ids that no i32 holds cannot be in range of a cache or a vocabulary: -1 never is either,
        // and validation against the model refuses it by name.
        let narrow = |id: &u32| i32::try_from(*id).unwrap_or(-1);
        if self.query_starts.is_empty() {
            self.query_starts.push(0);
        }
        self.token_ids.extend(tokens.iter().map(narrow));
        self.positions.extend((start..end).map(|position| position as i32));
        self.slot_mapping.extend((start..end).map(|position| {
            (u64::from(blocks[position / block_size]) as i64) * block_size as i64 + (position % block_size) as i64
        }));
        self.query_starts.push(self.token_ids.len() as i32);
        self.seq_lens.push(end as i32);
        self.blocks.extend(blocks.iter().map(narrow));
        self.block_ends.push(self.blocks.len());
        match wanted {
            WantedLogits::None => {}
            WantedLogits::Last => self.logits_rows.push(self.token_ids.len() as i32 - 1),
            WantedLogits::All => self.logits_rows.extend(first_row as i32..self.token_ids.len() as i32),
        }
        Ok(())
    }

    /// Tokens in the step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences in the step.
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// The most tokens of a sequence.
    pub(crate) fn max_query_len(&self) -> usize {
        self.query_starts.windows(2).map(|bounds| (bounds[1] - bounds[0]) as usize).max().unwrap_or(0)
    }

    /// Rows that get logits, in order of sequences and tokens.
    pub fn num_logits_rows(&self) -> usize {
        self.logits_rows.len()
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty()
    }

    /// Checks ids against the vocabulary and the cache.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] naming the token, [`Error::BlockOutOfRange`].
    pub(crate) fn validate(&self, vocab_size: usize, shape: &CacheShape) -> Result<()> {
        if self.is_empty() {
            return Err(Error::InvalidRequest("the batch is empty".into()));
        }
        if let Some(row) = self.token_ids.iter().position(|id| usize::try_from(*id).map_or(true, |id| id >= vocab_size))
        {
            let message = format!("token id at row {row} of the batch is outside the vocabulary of {vocab_size}");
            return Err(Error::InvalidRequest(message));
        }
        let num_blocks = shape.num_blocks;
        if let Some(id) = self.blocks.iter().find(|id| usize::try_from(**id).map_or(true, |id| id >= num_blocks)) {
            return Err(Error::BlockOutOfRange { what: "block table", block: u64::from(*id as u32), num_blocks });
        }
        let slots = shape.num_slots() as i64;
        if self.slot_mapping.iter().any(|slot| !(0..slots).contains(slot)) {
            // Pushed with another block size than the cache's.
            return Err(Error::InvalidRequest("the batch was built for another block size than the cache's".into()));
        }
        Ok(())
    }

    /// Whether every sequence has one new token, which needs logits: a step of decoding alone.
    pub(crate) fn is_decode(&self) -> bool {
        let rows = self.num_tokens();
        self.num_seqs() == rows && self.num_logits_rows() == rows
    }

    /// Blocks of the longest table.
    pub(crate) fn longest_table(&self) -> usize {
        self.tables().map(<[i32]>::len).max().unwrap_or(0)
    }

    /// The block tables as one `[sequences, stride]` matrix, padded with -1, which no kernel reads.
    /// `stride` is at least [`Batch::longest_table`].
    pub(crate) fn padded_tables(&self, stride: usize, padded: &mut Vec<i32>) {
        padded.clear();
        for table in self.tables() {
            padded.extend_from_slice(table);
            padded.resize(padded.len() + stride - table.len(), -1);
        }
    }

    fn tables(&self) -> impl Iterator<Item = &[i32]> {
        let starts = std::iter::once(0).chain(self.block_ends.iter().copied());
        starts.zip(&self.block_ends).map(|(start, end)| &self.blocks[start..*end])
    }
}
