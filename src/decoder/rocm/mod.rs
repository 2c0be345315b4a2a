//! The decoder on ROCm: [`Compute`] for [`RocmBackend`], with activations in f32, f16 or bf16.
//!
//! ```text
//! mod        the small kernels of csrc/quantkv_decoder.h: checked lengths, then one call; weights
//! products   linear layers by rocBLAS, or by our own kernel where it is not there
//! rocblas    its functions, loaded at run time
//! ```
//!
//! # Products
//!
//! rocBLAS is loaded at run time ([`Products`] chooses). It multiplies 16-bit weights with f32 sums, and f32 weights in
//! f32. It picks its kernel by the shape of the product, so that the last bits of a row may depend on how many rows
//! there are; [`Products::Portable`] keeps the promise of [`Compute`] that they do not. Weights stored in another type
//! than the activations are always multiplied by our own kernel, which converts on the way.
//!
//! A handle of rocBLAS allocates device memory for itself when the first product is computed, 32 or 128 MiB by default
//! (`ROCBLAS_DEVICE_MEMORY_SIZE` says otherwise), and more where a product needs it.

mod products;
mod rocblas;

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use super::bindings::*;
use super::compute::{Compute, RandomMatrix, RowsAtOnce};
use super::gpu::{DeviceBuffers, DeviceMatrix, compute_operations, size};
use super::weights::HostTensor;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::format::{Element, Pod};
use crate::raw::abi::activation;
use crate::rocm::{RocmBackend, RocmBuffer};

/// Who multiplies matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Products {
    /// rocBLAS where its library is found, else the portable kernel.
    #[default]
    Auto,
    /// rocBLAS; an error where its library is not found.
    RocBlas,
    /// This crate's own kernel: no library, no matrix cores; a row gives the same bits in every batch.
    Portable,
}

/// Switches of the decoder on ROCm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DecoderOptions {
    /// Who multiplies matrices.
    pub products: Products,
}

/// What the decoder keeps with a backend.
#[derive(Debug, Default)]
pub(crate) struct State {
    options: DecoderOptions,
    library: Mutex<products::Library>,
}

impl RocmBackend {
    /// The same stream, for decoders with these options. Models made with other handles keep theirs.
    pub fn with_decoder_options(&self, options: DecoderOptions) -> Self {
        let mut backend = self.clone();
        backend.decoder = Arc::new(State { options, ..State::default() });
        backend
    }

    /// Whether products are rocBLAS's, or will be when the first one is computed.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if [`Products::RocBlas`] is asked for and the library is not found.
    pub fn uses_rocblas(&self) -> Result<bool> {
        products::is_used(self.decoder.options.products)
    }
}

/// A weight matrix `[rows, cols]` on the device, as stored in the checkpoint.
pub type RocmMatrix = DeviceMatrix<RocmBuffer<u8>>;

#[cfg(not(quantkv_stub))]
unsafe extern "C" {
    fn quantkv_hip_decoder_embed(op: *const quantkv_decoder_embed, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_rms_norm(op: *const quantkv_decoder_rms_norm, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_rope_table(op: *const quantkv_decoder_rope_table, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_rope(op: *const quantkv_decoder_rope, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_silu_mul(op: *const quantkv_decoder_binary, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_add(op: *const quantkv_decoder_binary, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_gather_rows(op: *const quantkv_decoder_gather_rows, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_linear(op: *const quantkv_decoder_linear, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_argmax(op: *const quantkv_decoder_argmax, stream: *mut c_void) -> std::ffi::c_int;
    fn quantkv_hip_decoder_random(op: *const quantkv_decoder_random, stream: *mut c_void) -> std::ffi::c_int;
}

/// Enqueues one kernel of `quantkv_decoder.h`.
macro_rules! enqueue {
    ($backend:expr, $function:ident, $op:expr) => {
        crate::decoder::gpu::enqueue_on!(crate::raw::rocm::Rocm, $backend, $function, $op)
    };
}
use enqueue;

impl DeviceBuffers for RocmBackend {
    fn place<T: Pod>(&self, what: &'static str, buffer: &RocmBuffer<T>) -> Result<(*const c_void, usize)> {
        if !buffer.stream().is_same(self.stream()) {
            return Err(Error::OtherStream { what });
        }
        Ok((std::ptr::with_exposed_provenance(buffer.device_ptr() as usize), buffer.len()))
    }
}

impl<A: Element> Compute<A> for RocmBackend {
    type Matrix = RocmMatrix;
    type Recording = ();

    fn load_matrix(&self, tensor: &HostTensor) -> Result<RocmMatrix> {
        let &[rows, cols] = tensor.shape() else {
            let reason = format!("tensor {:?} has shape {:?}, expected two dimensions", tensor.name(), tensor.shape());
            return Err(Error::InvalidFile { path: tensor.path().to_owned(), reason });
        };
        let mut matrix = RocmMatrix::zeros(self, rows, cols, tensor.dtype())?;
        self.upload(tensor.bytes(), &mut matrix.data)?;
        Ok(matrix)
    }

    fn random_matrix(&self, matrix: &RandomMatrix) -> Result<RocmMatrix> {
        let &RandomMatrix { rows, cols, dtype, seed, deviation } = matrix;
        let mut made = RocmMatrix::zeros(self, rows, cols, dtype)?;
        let op = quantkv_decoder_random {
            out: self.write("a weight matrix", &mut made.data, &[rows, cols, dtype.bytes()])?,
            len: size(rows * cols),
            seed,
            deviation,
            format: activation(dtype),
        };
        enqueue!(self, quantkv_hip_decoder_random, op)?;
        Ok(made)
    }

    fn rows_at_once(&self) -> RowsAtOnce {
        RowsAtOnce { mlp: 2048, logits: 256 }
    }

    fn linear(
        &self,
        x: &RocmBuffer<A>,
        rows: usize,
        weight: &RocmMatrix,
        bias: Option<&RocmBuffer<A>>,
        out: &mut RocmBuffer<A>,
    ) -> Result<()> {
        products::linear(self, x, rows, weight, bias, out)
    }

    fn logits(&self, x: &RocmBuffer<A>, rows: usize, weight: &RocmMatrix, out: &mut RocmBuffer<f32>) -> Result<()> {
        products::linear(self, x, rows, weight, None, out)
    }

    compute_operations! {
        embed: quantkv_hip_decoder_embed,
        rms_norm: quantkv_hip_decoder_rms_norm,
        rope_table: quantkv_hip_decoder_rope_table,
        rope: quantkv_hip_decoder_rope,
        silu_mul: quantkv_hip_decoder_silu_mul,
        add: quantkv_hip_decoder_add,
        gather_rows: quantkv_hip_decoder_gather_rows,
        argmax: quantkv_hip_decoder_argmax
    }
}
