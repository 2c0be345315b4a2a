//! A piece of a step on its way to a CUDA graph.

use crate::cuda::{CudaBackend, Graph};
use crate::error::Result;

/// What is known of a piece of work that is to be replayed.
#[derive(Debug, Default)]
pub struct Recording(State);

#[derive(Debug, Default)]
enum State {
    /// It has never run.
    #[default]
    New,
    /// It has run once: kernels are loaded, the matrix library has chosen its own.
    Warm,
    Recorded(Graph),
}

impl Recording {
    /// [`crate::decoder::Compute::run_recorded`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn run(&mut self, backend: &CudaBackend, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if let State::New = self.0 {
            work()?;
            self.0 = State::Warm;
            return Ok(());
        }
        if let State::Warm = self.0 {
            self.0 = State::Recorded(backend.record(work)?);
        }
        match &mut self.0 {
            // SAFETY: recorded on this backend; that its buffers are alive and in place is the caller's
            // promise.
            State::Recorded(graph) => unsafe { backend.replay(graph) },
            State::New | State::Warm => Ok(()),
        }
    }
}
