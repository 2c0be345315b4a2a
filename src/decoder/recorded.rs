//! Steps that were recorded and can be replayed (CUDA graphs).
//!
//! A decode step enqueues some hundred kernels whose arguments depend on how many sequences there are
//! and on nothing else of the batch. So it is recorded once for each (sequences, table stride) and
//! replayed with new inputs:
//!
//! ```text
//! first step of a kind     run as it is: libraries load and choose their kernels
//! second                   recorded, then replayed
//! after that               inputs uploaded to where the recording reads them, replayed
//! ```
//! A recording holds the addresses of scratch and cache. It is forgotten when either moves.

use std::collections::HashMap;
use std::sync::Arc;

use super::compute::Compute;
use super::scratch::StepInputs;
use crate::error::Result;
use crate::format::Element;

/// Recordings kept; a recording of a large model takes some MiB. Beyond it all are forgotten.
const MAX_RECORDINGS: usize = 128;
/// Table strides are rounded up to a power of two from here on, so that few differ.
const MIN_STRIDE: usize = 16;

/// What of a step its recording depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepKind {
    pub sequences: usize,
    pub stride: usize,
}

/// What of the computation of logits its recording depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LogitsKind {
    pub rows: usize,
    pub greedy: bool,
}

pub(super) struct RecordedStep<B: Compute<A>, A: Element> {
    pub inputs: StepInputs<B>,
    pub recording: B::Recording,
}

/// All recordings of a model, valid for one scratch and one cache.
pub(super) struct Recordings<B: Compute<A>, A: Element> {
    steps: HashMap<StepKind, RecordedStep<B, A>>,
    logits: HashMap<LogitsKind, B::Recording>,
    generation: u64,
    cache: Option<Arc<()>>,
}

impl<B: Compute<A>, A: Element> Recordings<B, A> {
    pub fn new() -> Self {
        Recordings { steps: HashMap::new(), logits: HashMap::new(), generation: 0, cache: None }
    }

    /// Forgets everything if the scratch is of another generation.
    fn check_scratch(&mut self, generation: u64) {
        if self.generation != generation {
            self.steps.clear();
            self.logits.clear();
            self.generation = generation;
        }
    }

    /// The recording of steps of this kind over this scratch and cache, perhaps empty.
    pub fn step(
        &mut self,
        backend: &B,
        kind: StepKind,
        generation: u64,
        cache: &Arc<()>,
    ) -> Result<&mut RecordedStep<B, A>> {
        self.check_scratch(generation);
        if !self.cache.as_ref().is_some_and(|known| Arc::ptr_eq(known, cache)) {
            self.steps.clear();
            self.cache = Some(Arc::clone(cache));
        }
        if self.steps.len() >= MAX_RECORDINGS && !self.steps.contains_key(&kind) {
            self.steps.clear();
        }
        match self.steps.entry(kind) {
            std::collections::hash_map::Entry::Occupied(known) => Ok(known.into_mut()),
            std::collections::hash_map::Entry::Vacant(new) => {
                let inputs = StepInputs::new(backend)?;
                Ok(new.insert(RecordedStep { inputs, recording: B::Recording::default() }))
            }
        }
    }

    /// The recording of logits of this kind over this scratch, perhaps empty.
    pub fn logits(&mut self, kind: LogitsKind, generation: u64) -> &mut B::Recording {
        self.check_scratch(generation);
        if self.logits.len() >= MAX_RECORDINGS && !self.logits.contains_key(&kind) {
            self.logits.clear();
        }
        self.logits.entry(kind).or_default()
    }
}

/// The stride at which tables of up to `blocks` blocks are uploaded to be replayed.
pub(super) fn recorded_stride(blocks: usize) -> usize {
    blocks.max(MIN_STRIDE).next_power_of_two()
}
