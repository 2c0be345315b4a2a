//! Weight matrices in device memory.
//!
//! ```text
//! mapped file ──copy──> half 0 ──DMA──> device         while one half is on its way,
//!             ──copy──> half 1 ──DMA──>                the other is filled
//! ```
//! Two page-locked halves of [`HALF_BYTES`] are all the host memory it takes, whatever the model: a page
//! of the file is read when it is copied, and the system may drop it after.

use cudarc::driver::{CudaEvent, result};

use super::ops::enqueue;
use crate::Backend;
use crate::cuda::driver::error;
use crate::cuda::{CudaBackend, CudaBuffer};
use crate::decoder::bindings::*;
use crate::decoder::compute::RandomMatrix;
use crate::decoder::gpu::{DeviceBuffers, DeviceMatrix, size};
use crate::decoder::weights::HostTensor;
use crate::error::{Error, Result};
use crate::memory::PageLock;
use crate::raw::abi::activation;

/// Bytes of one half of the staging memory.
const HALF_BYTES: usize = 16 << 20;

/// A weight matrix `[rows, cols]` on the device, as stored in the checkpoint.
pub type CudaMatrix = DeviceMatrix<CudaBuffer<u8>>;

/// Page-locked memory that weights pass through.
#[derive(Debug)]
pub(super) struct Staging {
    /// Before the halves: it is dropped first.
    _locks: [PageLock; 2],
    halves: [Half; 2],
}

#[derive(Debug)]
struct Half {
    memory: Vec<u8>,
    /// When its latest copy is done.
    copied: Option<CudaEvent>,
}

impl Staging {
    fn new(backend: &CudaBackend) -> Result<Self> {
        let mut halves = [(); 2].map(|()| Half { memory: vec![0; HALF_BYTES], copied: None });
        let [a, b] = &mut halves;
        // SAFETY: the vectors never change their size, and are dropped after the locks.
        let _locks = unsafe { [backend.page_lock(&mut a.memory)?, backend.page_lock(&mut b.memory)?] };
        Ok(Staging { _locks, halves })
    }

    /// Copies `bytes` to the device in the order of the backend's stream. The last copies may be under
    /// way when it returns.
    fn upload(&mut self, backend: &CudaBackend, bytes: &[u8], to: &mut CudaBuffer<u8>) -> Result<()> {
        let address = backend.write("a weight matrix", to, &[bytes.len()])?.expose_provenance();
        backend.bind()?;
        for (index, chunk) in bytes.chunks(HALF_BYTES).enumerate() {
            let half = &mut self.halves[index % 2];
            if let Some(event) = half.copied.take() {
                event.synchronize().map_err(error("cuEventSynchronize"))?;
            }
            half.memory[..chunk.len()].copy_from_slice(chunk);
            let (source, stream) = (&half.memory[..chunk.len()], backend.stream());
            // SAFETY: `to` has room, checked above; the half is not touched before `copied` has passed, nor
            // freed: see `Drop`.
            unsafe { result::memcpy_htod_async((address + index * HALF_BYTES) as u64, source, stream.cu_stream()) }
                .map_err(error("cuMemcpyHtoDAsync"))?;
            half.copied = Some(stream.record_event(None).map_err(error("cuEventRecord"))?);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for half in &mut self.halves {
            // A device that fails here has failed every call; there is nobody to tell.
            half.copied.take().map(|event| event.synchronize());
        }
    }
}

/// Uploads a checkpoint's matrix.
pub(super) fn load(backend: &CudaBackend, tensor: &HostTensor) -> Result<CudaMatrix> {
    let &[rows, cols] = tensor.shape() else {
        let reason = format!("tensor {:?} has shape {:?}, expected two dimensions", tensor.name(), tensor.shape());
        return Err(Error::InvalidFile { path: tensor.path().to_owned(), reason });
    };
    let mut matrix = CudaMatrix::zeros(backend, rows, cols, tensor.dtype())?;
    let mut staging = backend.decoder.staging.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let staging = match &mut *staging {
        Some(staging) => staging,
        none => none.insert(Staging::new(backend)?),
    };
    staging.upload(backend, tensor.bytes(), &mut matrix.data)?;
    Ok(matrix)
}

/// Makes a random matrix on the device.
pub(super) fn random(backend: &CudaBackend, matrix: &RandomMatrix) -> Result<CudaMatrix> {
    let &RandomMatrix { rows, cols, dtype, seed, deviation } = matrix;
    let mut made = CudaMatrix::zeros(backend, rows, cols, dtype)?;
    let op = quantkv_decoder_random {
        out: backend.write("a weight matrix", &mut made.data, &[rows, cols, dtype.bytes()])?,
        len: size(rows * cols),
        seed,
        deviation,
        format: activation(dtype),
    };
    enqueue!(backend, quantkv_cuda_decoder_random, op)?;
    Ok(made)
}
