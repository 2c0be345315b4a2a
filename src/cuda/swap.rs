//! [`SwapBlocks`]: blocks to and from host memory, on a stream of their own.
//!
//! ```text
//! caller's stream   ...work so far... ─┐                    ┌─ ...work from now on...
//! side stream                          └─► copies ──────────┤
//! host                                                      └─ returns
//! ```
//! The host's slices are borrowed for the call alone, so the host waits for the copies; work that
//! other threads enqueue meanwhile runs beside them. Copies are a kernel's, or the copy engines': csrc/launch/swap_blocks.h.

use super::CudaBackend;
use super::driver::{self, error};
use crate::args::SwapBlocks;
use crate::error::Result;
use crate::memory::Host;
use crate::raw::Pointers;
use crate::raw::cuda::swap_blocks;
use crate::raw::views::{IntoPointers, host_mut, host_ref, layer_pointers};

impl CudaBackend {
    pub(super) fn swap_to_host(&self, op: SwapBlocks<'_, '_, Self, Host>) -> Result<()> {
        let stream = self.stream();
        let src = op.src.iter().map(|layer| layer.into_pointers(stream, "layer")).collect::<Result<Vec<_>>>()?;
        let mut dst: Vec<_> = op.dst.iter_mut().map(host_mut).collect();
        let SwapBlocks { src_shape, dst_shape, pairs, .. } = op;
        self.swap(SwapBlocks { src_shape, src: &src, dst_shape, dst: &mut dst, pairs })
    }

    pub(super) fn swap_from_host(&self, op: SwapBlocks<'_, '_, Host, Self>) -> Result<()> {
        let src: Vec<_> = op.src.iter().map(host_ref).collect();
        let mut dst =
            op.dst.iter_mut().map(|layer| layer_pointers(layer, self.stream())).collect::<Result<Vec<_>>>()?;
        let SwapBlocks { src_shape, dst_shape, pairs, .. } = op;
        self.swap(SwapBlocks { src_shape, src: &src, dst_shape, dst: &mut dst, pairs })
    }

    /// Both ways: the buffers are borrowed by the caller until this returns.
    fn swap(&self, op: SwapBlocks<'_, '_, Pointers, Pointers>) -> Result<()> {
        op.validate()?;
        let (stream, side) = (self.stream(), &self.shared.side.0);
        driver::refuse_capture(stream, "swap_blocks")?;
        side.join(stream).map_err(error("cuStreamWaitEvent"))?;
        // SAFETY: live buffers of the device and of the host, each kind borrowed as it is used; device
        // memory is ordered by the events, host memory by the wait below, which nothing skips.
        let enqueued = unsafe { swap_blocks(op, side.cu_stream().cast()) };
        let copied = side.record_event(None);
        if enqueued.is_err() || copied.is_err() {
            // Some copies may be under way.
            side.synchronize().map_err(error("cuStreamSynchronize"))?;
        }
        enqueued?;
        let copied = copied.map_err(error("cuEventRecord"))?;
        let waits = stream.wait(&copied);
        copied.synchronize().map_err(error("cuEventSynchronize"))?;
        waits.map_err(error("cuStreamWaitEvent"))
    }
}
