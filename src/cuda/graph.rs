//! Recording what one thread enqueues, to replay it later: a CUDA graph of operations.
//!
//! While a thread records, its operations are enqueued on a stream made for that, which nobody else knows.
//! So other threads may go on using the backend: what they do is neither recorded nor refused. The replay is
//! enqueued on the backend's own stream, in order with everything else there.

use std::sync::{Arc, PoisonError};
use std::thread::{self, ThreadId};

use cudarc::driver::{CudaGraph, CudaStream, result, sys};

use super::driver::{SideStream, error};
use super::{CUDA, CudaBackend, Shared};
use crate::error::{Error, Result};

/// The thread that records, and the stream its operations go to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recorder {
    thread: ThreadId,
    /// A `CUstream` by its address.
    stream: usize,
}

/// Operations that were recorded by [`CudaBackend::record`].
pub struct Graph {
    graph: CudaGraph,
    /// Where it is replayed.
    stream: Arc<CudaStream>,
    /// The stream it was recorded on; cudarc's handle of it is in `graph`.
    _recorded_on: SideStream,
}

// SAFETY: a graph may be used by any thread, by one at a time: all use is by `&mut self`.
unsafe impl Send for Graph {}
// SAFETY: as above; nothing can be done with a `&Graph`.
unsafe impl Sync for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // A replay may be under way, and the graph's own memory goes with it.
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        context.record_err(self.stream.synchronize());
    }
}

impl Shared {
    /// Where this thread's operations go: the backend's stream, unless the thread records.
    pub(super) fn launch_stream(&self) -> sys::CUstream {
        match *self.recorder.read().unwrap_or_else(PoisonError::into_inner) {
            Some(recorder) if recorder.thread == thread::current().id() => {
                std::ptr::with_exposed_provenance_mut(recorder.stream)
            }
            _ => self.stream.cu_stream(),
        }
    }

    fn set_recorder(&self, recorder: Option<Recorder>) {
        *self.recorder.write().unwrap_or_else(PoisonError::into_inner) = recorder;
    }
}

/// Ends the recording, also when `work` panics.
struct EndRecording<'a>(&'a Shared);

impl Drop for EndRecording<'_> {
    fn drop(&mut self) {
        self.0.set_recorder(None);
    }
}

impl CudaBackend {
    /// Records the operations that `work` enqueues on this thread, and runs none of them; what other threads
    /// enqueue meanwhile runs and is not recorded. `work` is to call
    /// operations alone: buffers it makes, fills or drops are made, filled and dropped at once.
    ///
    /// # Errors
    /// Those of `work`; [`Error::InCapture`] inside of another recording; [`Error::Device`].
    pub fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let shared = &*self.shared;
        if shared.launch_stream() != shared.stream.cu_stream() {
            return Err(Error::InCapture { call: "recording inside of a recording" });
        }
        // One thread at a time.
        let _turn = shared.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let side = SideStream::new(self.context())?;
        // Relaxed: a kernel used for the first time may have to be loaded, which is harmless.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        side.0.begin_capture(mode).map_err(error("cuStreamBeginCapture"))?;
        let end = EndRecording(shared);
        let stream = side.0.cu_stream().expose_provenance();
        shared.set_recorder(Some(Recorder { thread: thread::current().id(), stream }));
        let worked = work();
        drop(end);
        let graph = side.0.end_capture(sys::CUgraphInstantiate_flags(0));
        worked?;
        let graph = graph.map_err(error("cuStreamEndCapture"))?.ok_or_else(|| Error::Device {
            backend: CUDA,
            call: "cuStreamEndCapture",
            code: 0,
            message: "nothing was recorded".to_owned(),
        })?;
        Ok(Graph { graph, stream: shared.stream.clone(), _recorded_on: side })
    }

    /// Enqueues what was recorded.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// `graph` is of this backend, and every buffer its operations use is alive and where it was.
    pub unsafe fn replay(&self, graph: &mut Graph) -> Result<()> {
        self.enqueue(|launch| {
            // SAFETY: a graph that was instantiated and not destroyed, on a stream of its context. The
            // buffers are the caller's promise.
            unsafe { result::graph::launch(graph.graph.cu_graph_exec(), launch.stream.cast()) }
                .map_err(error("cuGraphLaunch"))
        })
    }
}
