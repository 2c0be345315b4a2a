//! [`Compute`] for [`CudaBackend`]: lengths and streams are checked, then one kernel is enqueued.

use std::ffi::c_void;

use super::graph::Recording;
use super::products;
use super::weights::{self, CudaMatrix};
use crate::cuda::{CudaBackend, CudaBuffer};
use crate::decoder::bindings::*;
use crate::decoder::compute::{Compute, RandomMatrix, RowsAtOnce};
use crate::decoder::gpu::{DeviceBuffers, compute_operations, size};
use crate::decoder::weights::HostTensor;
use crate::error::{Error, Result};
use crate::format::{Element, Pod};
use crate::raw::abi::activation;

/// Enqueues one kernel of `quantkv_decoder.h`.
macro_rules! enqueue {
    ($backend:expr, $function:ident, $op:expr) => {
        crate::decoder::gpu::enqueue_on!(crate::raw::cuda::Cuda, $backend, $function, $op)
    };
}
pub(super) use enqueue;

impl DeviceBuffers for CudaBackend {
    fn place<T: Pod>(&self, what: &'static str, buffer: &CudaBuffer<T>) -> Result<(*const c_void, usize)> {
        if buffer.stream() != self.stream() {
            return Err(Error::OtherStream { what });
        }
        Ok((std::ptr::with_exposed_provenance(buffer.device_ptr() as usize), buffer.len()))
    }
}

impl<A: Element> Compute<A> for CudaBackend {
    type Matrix = CudaMatrix;
    type Recording = Recording;

    fn load_matrix(&self, tensor: &HostTensor) -> Result<CudaMatrix> {
        weights::load(self, tensor)
    }

    fn random_matrix(&self, matrix: &RandomMatrix) -> Result<CudaMatrix> {
        weights::random(self, matrix)
    }

    fn rows_at_once(&self) -> RowsAtOnce {
        RowsAtOnce { mlp: 2048, logits: 256 }
    }

    fn records(&self) -> bool {
        self.decoder.options.graphs
    }

    unsafe fn run_recorded(&self, recording: &mut Recording, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { recording.run(self, work) }
    }

    fn linear(
        &self,
        x: &CudaBuffer<A>,
        rows: usize,
        weight: &CudaMatrix,
        bias: Option<&CudaBuffer<A>>,
        out: &mut CudaBuffer<A>,
    ) -> Result<()> {
        products::linear(self, x, rows, weight, bias, out)
    }

    fn logits(&self, x: &CudaBuffer<A>, rows: usize, weight: &CudaMatrix, out: &mut CudaBuffer<f32>) -> Result<()> {
        products::linear(self, x, rows, weight, None, out)
    }

    compute_operations! {
        embed: quantkv_cuda_decoder_embed,
        rms_norm: quantkv_cuda_decoder_rms_norm,
        rope_table: quantkv_cuda_decoder_rope_table,
        rope: quantkv_cuda_decoder_rope,
        silu_mul: quantkv_cuda_decoder_silu_mul,
        add: quantkv_cuda_decoder_add,
        gather_rows: quantkv_cuda_decoder_gather_rows,
        argmax: quantkv_cuda_decoder_argmax
    }
}
