//! The operations of a decoder that are not the cache's, over a backend's own buffers.
//!
//! The seam that a GPU implements with device buffers: nothing here reads device data on the host.
//! `A` is the activation type: f32 on the CPU; a GPU backend may implement several. Activations are
//! row-major and gapless, `[rows, channels]`; a buffer may be longer than the rows in use, since
//! scratch is reused between steps.
//!
//! Contract of every operation: a row of the output depends on its row of the input alone and is
//! computed in the same order whatever the number of rows and threads. So a request gives the
//! same logits alone, in a batch, in chunks of any size, and after a preemption. (A backend may offer
//! a matrix library that does not promise this; it says so.)

use std::fmt::Debug;

use super::weights::HostTensor;
use crate::backend::Backend;
use crate::error::Result;
use crate::format::{DType, Element};

/// Rows that are computed at a time where they are many and wide. Results do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowsAtOnce {
    /// Of the MLP's intermediate channels. At least 1.
    pub mlp: usize,
    /// Of logits. At least 1.
    pub logits: usize,
}

/// A matrix of random weights; see [`super::random`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomMatrix {
    /// Rows, the outputs of a linear layer.
    pub rows: usize,
    /// Columns, its inputs.
    pub cols: usize,
    /// How elements are stored.
    pub dtype: DType,
    /// Key of the generator.
    pub seed: u64,
    /// Standard deviation of an element; the mean is 0.
    pub deviation: f32,
}

/// A backend that can run a decoder with activations of type `A`.
pub trait Compute<A: Element = f32>: Backend {
    /// A weight matrix `[out, in]` in the backend's memory, stored in the checkpoint's type.
    type Matrix: Send + Sync + Debug;

    /// Work that was recorded to be replayed; `()` where nothing is. The default is an empty one.
    type Recording: Default + Send + Sync + Debug;

    /// Takes over a weight matrix. On the CPU the mapped file itself is used.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::InvalidFile`] unless it has two dimensions.
    fn load_matrix(&self, tensor: &HostTensor) -> Result<Self::Matrix>;

    /// Makes a weight matrix of random numbers, the same on every backend.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Overflow`].
    fn random_matrix(&self, matrix: &RandomMatrix) -> Result<Self::Matrix>;

    /// How many rows to compute at a time.
    fn rows_at_once(&self) -> RowsAtOnce {
        RowsAtOnce { mlp: 128, logits: 32 }
    }

    /// Whether [`Compute::run_recorded`] records.
    fn records(&self) -> bool {
        false
    }

    /// Runs `work`, or replays what it enqueued before. A backend that does not record runs it. One
    /// that does runs it the first time, records it and replays the recording the second time, and
    /// from then on only replays: `work` is not called.
    ///
    /// # Errors
    /// Those of `work`; the backend's own.
    ///
    /// # Safety
    /// Every call with the same recording has a `work` that would enqueue the same operations on the
    /// same buffers, and those buffers are alive and where they were.
    unsafe fn run_recorded(&self, recording: &mut Self::Recording, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let _ = recording;
        work()
    }

    /// `out[r] = table[ids[r]]` for `rows` ids, each known to be a row of the table.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn embed(
        &self,
        table: &Self::Matrix,
        ids: &Self::Buffer<i32>,
        rows: usize,
        out: &mut Self::Buffer<A>,
    ) -> Result<()>;

    /// `out[r] = weight * x[first + r] / sqrt(mean(x[first + r]²) + eps)`, statistics in f32. The
    /// number of channels is the length of `weight`.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn rms_norm(
        &self,
        x: &Self::Buffer<A>,
        first: usize,
        rows: usize,
        weight: &Self::Buffer<A>,
        eps: f32,
        out: &mut Self::Buffer<A>,
    ) -> Result<()>;

    /// [`Compute::rms_norm`] in place over `rows` rows: the per-head norm of Qwen3, with a row
    /// for each (token, head).
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn rms_norm_in_place(&self, x: &mut Self::Buffer<A>, rows: usize, weight: &Self::Buffer<A>, eps: f32)
    -> Result<()>;

    /// `out[r] = weight · x[r] + bias` for `rows` rows, sums in f32.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn linear(
        &self,
        x: &Self::Buffer<A>,
        rows: usize,
        weight: &Self::Matrix,
        bias: Option<&Self::Buffer<A>>,
        out: &mut Self::Buffer<A>,
    ) -> Result<()>;

    /// [`Compute::linear`] without a bias and with f32 results: the logits.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn logits(
        &self,
        x: &Self::Buffer<A>,
        rows: usize,
        weight: &Self::Matrix,
        out: &mut Self::Buffer<f32>,
    ) -> Result<()>;

    /// `cos[r, i], sin[r, i] = scaling * cos, sin(positions[r] * inv_freq[i])`, all f32.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn rope_table(
        &self,
        positions: &Self::Buffer<i32>,
        rows: usize,
        inv_freq: &Self::Buffer<f32>,
        scaling: f32,
        cos: &mut Self::Buffer<f32>,
        sin: &mut Self::Buffer<f32>,
    ) -> Result<()>;

    /// Turns `x` `[rows, heads, head_dim]` in place by a table of [`Compute::rope_table`]: channels
    /// `i` and `i + head_dim/2` together.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn rope(
        &self,
        x: &mut Self::Buffer<A>,
        rows: usize,
        heads: usize,
        head_dim: usize,
        cos: &Self::Buffer<f32>,
        sin: &Self::Buffer<f32>,
    ) -> Result<()>;

    /// `gate[i] = silu(gate[i]) * up[i]` over `len` elements.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn silu_mul(&self, gate: &mut Self::Buffer<A>, up: &Self::Buffer<A>, len: usize) -> Result<()>;

    /// `x[first + i] += y[i]` over `len` elements.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn add(&self, x: &mut Self::Buffer<A>, first: usize, y: &Self::Buffer<A>, len: usize) -> Result<()>;

    /// `out[i] = x[rows[i]]` for `num` rows of `width` channels.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn gather_rows(
        &self,
        x: &Self::Buffer<A>,
        rows: &Self::Buffer<i32>,
        num: usize,
        width: usize,
        out: &mut Self::Buffer<A>,
    ) -> Result<()>;

    /// The greedy token of each of `rows` rows of `vocab_size` logits: the index of the largest, the
    /// lowest of equals, NaN passed over; -1 where no logit is a number above -inf.
    ///
    /// # Errors
    /// [`crate::Error::BufferTooSmall`].
    fn greedy(
        &self,
        logits: &Self::Buffer<f32>,
        rows: usize,
        vocab_size: usize,
        tokens: &mut Self::Buffer<i32>,
    ) -> Result<()>;
}
