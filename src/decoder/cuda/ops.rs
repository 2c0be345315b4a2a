//! [`Compute`] for [`CudaBackend`]: lengths and streams are checked, then one kernel is enqueued.

use std::ffi::c_void;

use super::bindings::*;
use super::graph::Recording;
use super::products;
use super::weights::{self, CudaMatrix};
use crate::cuda::{CudaBackend, CudaBuffer};
use crate::decoder::compute::{Compute, RandomMatrix, RowsAtOnce};
use crate::decoder::weights::HostTensor;
use crate::error::{Error, Result};
use crate::format::{Element, Pod};
use crate::layout::checked_product;
use crate::raw::abi::activation;
use crate::raw::cuda::check;

/// Enqueues one kernel of `quantkv_decoder.h`; in a build without kernels, says so.
macro_rules! enqueue {
    ($backend:expr, $function:ident, $op:expr) => {{
        let op = $op;
        $backend.enqueue(|launch| {
            const CALL: &str = stringify!($function);
            #[cfg(not(quantkv_stub))]
            {
                // SAFETY: the pointers are device buffers of this stream, as long as the sizes beside them
                // say: checked above by `Buffers`. The call keeps no reference to the struct.
                check(CALL, unsafe { $function(&op, launch.stream) })
            }
            #[cfg(quantkv_stub)]
            {
                let _ = (&op, launch);
                let _: fn(&'static str, std::ffi::c_int) -> Result<()> = check;
                Err::<(), _>(Error::NotCompiled { backend: crate::cuda::CUDA, call: CALL })
            }
        })
    }};
}
pub(super) use enqueue;

/// Device buffers as pointers, once they are long enough and of the backend's stream.
pub(super) trait Buffers {
    fn read<T: Pod>(&self, what: &'static str, buffer: &CudaBuffer<T>, len: &[usize]) -> Result<*const c_void>;
    fn write<T: Pod>(&self, what: &'static str, buffer: &mut CudaBuffer<T>, len: &[usize]) -> Result<*mut c_void>;
}

impl Buffers for CudaBackend {
    fn read<T: Pod>(&self, what: &'static str, buffer: &CudaBuffer<T>, len: &[usize]) -> Result<*const c_void> {
        let (needed, got) = (checked_product(what, len)?, buffer.len());
        if got < needed {
            return Err(Error::BufferTooSmall { what, needed, got });
        }
        if buffer.stream() != self.stream() {
            return Err(Error::OtherStream { what });
        }
        Ok(std::ptr::with_exposed_provenance(buffer.device_ptr() as usize))
    }

    fn write<T: Pod>(&self, what: &'static str, buffer: &mut CudaBuffer<T>, len: &[usize]) -> Result<*mut c_void> {
        self.read(what, buffer, len).map(<*const c_void>::cast_mut)
    }
}

/// Sizes were multiplied to a buffer's length, so each fits; one that was multiplied by zero is not looked at.
pub(super) fn size(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl CudaBackend {
    fn rms_norm_at(
        &self,
        x: *const c_void,
        rows: usize,
        weight: (*const c_void, usize),
        eps: f32,
        out: *mut c_void,
        activation: i32,
    ) -> Result<()> {
        let (weight, width) = (weight.0, size(weight.1));
        let op = quantkv_decoder_rms_norm { x, weight, out, rows: size(rows), width, eps, activation };
        enqueue!(self, quantkv_cuda_decoder_rms_norm, op)
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

    fn embed(&self, table: &CudaMatrix, ids: &CudaBuffer<i32>, rows: usize, out: &mut CudaBuffer<A>) -> Result<()> {
        let width = table.cols;
        let op = quantkv_decoder_embed {
            table: self.read("embedding table", &table.data, &[table.rows, width, table.dtype.bytes()])?,
            ids: self.read("token ids", ids, &[rows])?.cast(),
            out: self.write("embeddings", out, &[rows, width])?,
            rows: size(rows),
            vocab: size(table.rows),
            width: size(width),
            weight: activation(table.dtype),
            activation: activation(A::DTYPE),
        };
        enqueue!(self, quantkv_cuda_decoder_embed, op)
    }

    fn rms_norm(
        &self,
        x: &CudaBuffer<A>,
        first: usize,
        rows: usize,
        weight: &CudaBuffer<A>,
        eps: f32,
        out: &mut CudaBuffer<A>,
    ) -> Result<()> {
        let width = weight.len();
        let end = first.checked_add(rows).ok_or(Error::Overflow { what: "rms_norm rows" })?;
        // In range: `first` rows are a part of what the next line checks.
        let x = self.read("rms_norm input", x, &[end, width])?.wrapping_byte_add(first * width * size_of::<A>());
        let weight = (self.read("rms_norm weight", weight, &[width])?, width);
        let out = self.write("rms_norm output", out, &[rows, width])?;
        self.rms_norm_at(x, rows, weight, eps, out, activation(A::DTYPE))
    }

    fn rms_norm_in_place(&self, x: &mut CudaBuffer<A>, rows: usize, weight: &CudaBuffer<A>, eps: f32) -> Result<()> {
        let width = weight.len();
        let x = self.write("rms_norm input", x, &[rows, width])?;
        let weight = (self.read("rms_norm weight", weight, &[width])?, width);
        self.rms_norm_at(x, rows, weight, eps, x, activation(A::DTYPE))
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

    fn rope_table(
        &self,
        positions: &CudaBuffer<i32>,
        rows: usize,
        inv_freq: &CudaBuffer<f32>,
        scaling: f32,
        cos: &mut CudaBuffer<f32>,
        sin: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let half = inv_freq.len();
        let op = quantkv_decoder_rope_table {
            positions: self.read("positions", positions, &[rows])?.cast(),
            inv_freq: self.read("inverse frequencies", inv_freq, &[half])?.cast(),
            cos: self.write("cos table", cos, &[rows, half])?.cast(),
            sin: self.write("sin table", sin, &[rows, half])?.cast(),
            rows: size(rows),
            half: size(half),
            scaling,
        };
        enqueue!(self, quantkv_cuda_decoder_rope_table, op)
    }

    fn rope(
        &self,
        x: &mut CudaBuffer<A>,
        rows: usize,
        heads: usize,
        head_dim: usize,
        cos: &CudaBuffer<f32>,
        sin: &CudaBuffer<f32>,
    ) -> Result<()> {
        let op = quantkv_decoder_rope {
            x: self.write("rope input", x, &[rows, heads, head_dim])?,
            cos: self.read("cos table", cos, &[rows, head_dim / 2])?.cast(),
            sin: self.read("sin table", sin, &[rows, head_dim / 2])?.cast(),
            rows: size(rows),
            heads: size(heads),
            head_dim: size(head_dim),
            activation: activation(A::DTYPE),
        };
        enqueue!(self, quantkv_cuda_decoder_rope, op)
    }

    fn silu_mul(&self, gate: &mut CudaBuffer<A>, up: &CudaBuffer<A>, len: usize) -> Result<()> {
        let (x, y) = (self.write("gate", gate, &[len])?, self.read("up", up, &[len])?);
        let op = quantkv_decoder_binary { x, y, len: size(len), activation: activation(A::DTYPE) };
        enqueue!(self, quantkv_cuda_decoder_silu_mul, op)
    }

    fn add(&self, x: &mut CudaBuffer<A>, first: usize, y: &CudaBuffer<A>, len: usize) -> Result<()> {
        let end = first.checked_add(len).ok_or(Error::Overflow { what: "residual" })?;
        let x = self.write("residual", x, &[end])?.wrapping_byte_add(first * size_of::<A>());
        let y = self.read("update", y, &[len])?;
        let op = quantkv_decoder_binary { x, y, len: size(len), activation: activation(A::DTYPE) };
        enqueue!(self, quantkv_cuda_decoder_add, op)
    }

    fn gather_rows(
        &self,
        x: &CudaBuffer<A>,
        rows: &CudaBuffer<i32>,
        num: usize,
        width: usize,
        out: &mut CudaBuffer<A>,
    ) -> Result<()> {
        let num_rows = x.len().checked_div(width).unwrap_or(0);
        let op = quantkv_decoder_gather_rows {
            x: self.read("rows gathered from", x, &[num_rows, width])?,
            rows: self.read("row numbers", rows, &[num])?.cast(),
            out: self.write("gathered rows", out, &[num, width])?,
            count: size(num),
            num_rows: size(num_rows),
            width: size(width),
            activation: activation(A::DTYPE),
        };
        enqueue!(self, quantkv_cuda_decoder_gather_rows, op)
    }

    fn greedy(
        &self,
        logits: &CudaBuffer<f32>,
        rows: usize,
        vocab_size: usize,
        tokens: &mut CudaBuffer<i32>,
    ) -> Result<()> {
        let op = quantkv_decoder_argmax {
            logits: self.read("logits", logits, &[rows, vocab_size])?.cast(),
            ids: self.write("greedy tokens", tokens, &[rows])?.cast(),
            rows: size(rows),
            vocab: size(vocab_size),
        };
        enqueue!(self, quantkv_cuda_decoder_argmax, op)
    }
}
