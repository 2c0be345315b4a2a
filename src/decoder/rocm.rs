//! The decoder on ROCm: [`Compute`] for [`RocmBackend`], with activations in f32, f16 or bf16. All kernels are this
//! crate's own, products included: a row gives the same bits in every batch.

use std::ffi::c_void;

use super::bindings::*;
use super::compute::{Compute, RandomMatrix, RowsAtOnce};
use super::gpu::{DeviceBuffers, DeviceMatrix, compute_operations, size};
use super::weights::HostTensor;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::format::{Element, Pod};
use crate::raw::abi::activation;
use crate::rocm::{RocmBackend, RocmBuffer};

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

impl DeviceBuffers for RocmBackend {
    fn place<T: Pod>(&self, what: &'static str, buffer: &RocmBuffer<T>) -> Result<(*const c_void, usize)> {
        if !buffer.stream().is_same(self.stream()) {
            return Err(Error::OtherStream { what });
        }
        Ok((std::ptr::with_exposed_provenance(buffer.device_ptr() as usize), buffer.len()))
    }
}

impl RocmBackend {
    /// `out = x · weightᵀ + bias` for `rows` rows. `O` is `A` or f32.
    fn product<A: Element, O: Element>(
        &self,
        x: &RocmBuffer<A>,
        rows: usize,
        weight: &RocmMatrix,
        bias: Option<&RocmBuffer<A>>,
        out: &mut RocmBuffer<O>,
    ) -> Result<()> {
        let (inputs, outputs) = (weight.cols, weight.rows);
        let op = quantkv_decoder_linear {
            x: self.read("linear input", x, &[rows, inputs])?,
            weight: self.read("a weight matrix", &weight.data, &[outputs, inputs, weight.dtype.bytes()])?,
            bias: bias.map_or(Ok(std::ptr::null()), |bias| self.read("linear bias", bias, &[outputs]))?,
            out: self.write("linear output", out, &[rows, outputs])?,
            rows: size(rows),
            inputs: size(inputs),
            outputs: size(outputs),
            activation: activation(A::DTYPE),
            weight_format: activation(weight.dtype),
            output: activation(O::DTYPE),
        };
        enqueue!(self, quantkv_hip_decoder_linear, op)
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
        self.product(x, rows, weight, bias, out)
    }

    fn logits(&self, x: &RocmBuffer<A>, rows: usize, weight: &RocmMatrix, out: &mut RocmBuffer<f32>) -> Result<()> {
        self.product(x, rows, weight, None, out)
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
