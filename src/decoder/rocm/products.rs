//! Linear layers: `out = x · weightᵀ + bias`, by rocBLAS or by our own kernel.
//!
//! rocBLAS counts columns first, so that our row-major matrices are its transposed ones:
//!
//! ```text
//! ours    out [rows, outputs] = x [rows, inputs] · weight [outputs, inputs]ᵀ
//! its     D [outputs x rows]  = op(A) B + beta C,   A = weight [inputs x outputs] transposed,  B = x [inputs x rows]
//! ```
//! C is D. It has no bias to add, but sums in f32 and rounds once: so each row of D is the bias before, and beta is 1.

use std::mem::ManuallyDrop;
use std::sync::PoisonError;

use super::rocblas::{Gemm, Handle, RocBlas, rocblas};
use super::{Products, RocmMatrix, enqueue};
#[cfg(not(quantkv_stub))]
use super::{quantkv_hip_decoder_gather_rows, quantkv_hip_decoder_linear};
use crate::Backend;
use crate::decoder::bindings::*;
use crate::decoder::gpu::{DeviceBuffers, linear_op};
use crate::error::Result;
use crate::format::{DType, Element};
use crate::rocm::{RocmBackend, RocmBuffer};

/// The matrix library, from the first product on.
#[derive(Debug, Default)]
pub(super) enum Library {
    #[default]
    Unknown,
    /// Not found, or not wanted.
    Absent,
    Loaded(Box<Loaded>),
}

/// A handle of rocBLAS, and what a bias takes to become every row of the output.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Dropped once nothing that it has enqueued is still to run.
    handle: ManuallyDrop<Handle>,
    /// Zeros: the bias's row in a table of one.
    first_row: RocmBuffer<i32>,
}

/// Whether products go to rocBLAS under `products`.
pub(super) fn is_used(products: Products) -> Result<bool> {
    match products {
        Products::Portable => Ok(false),
        Products::Auto => Ok(rocblas().is_ok()),
        Products::RocBlas => rocblas().map(|_| true),
    }
}

/// `out = x · weightᵀ + bias` for `rows` rows. `O` is `A` or f32.
pub(super) fn linear<A: Element, O: Element>(
    backend: &RocmBackend,
    x: &RocmBuffer<A>,
    rows: usize,
    weight: &RocmMatrix,
    bias: Option<&RocmBuffer<A>>,
    out: &mut RocmBuffer<O>,
) -> Result<()> {
    let (outputs, inputs) = (weight.rows, weight.cols);
    let op = linear_op(backend, x, rows, weight, bias, out)?;
    // A bias is copied to the output's rows: of its own type.
    let as_stored = weight.dtype == A::DTYPE && (bias.is_none() || O::DTYPE == A::DTYPE);
    if as_stored && rows > 0 && inputs > 0 && outputs > 0 && by_library(backend, A::DTYPE, O::DTYPE, &op)? {
        return Ok(());
    }
    enqueue!(backend, quantkv_hip_decoder_linear, op)
}

/// Whether the library was there and has enqueued the product.
fn by_library(backend: &RocmBackend, dtype: DType, out: DType, op: &quantkv_decoder_linear) -> Result<bool> {
    // Its sizes are 32-bit.
    let (Ok(m), Ok(n), Ok(k)) = (op.outputs.try_into(), op.rows.try_into(), op.inputs.try_into()) else {
        return Ok(false);
    };
    let mut library = backend.decoder.library.lock().unwrap_or_else(PoisonError::into_inner);
    if let Library::Unknown = *library {
        *library = match is_used(backend.decoder.options.products)? {
            true => Library::Loaded(Box::new(Loaded::new(backend, rocblas()?)?)),
            false => Library::Absent,
        };
    }
    let Library::Loaded(library) = &mut *library else { return Ok(false) };
    let beta = if op.bias.is_null() { 0.0 } else { 1.0 };
    if !op.bias.is_null() {
        library.fill_with_bias(backend, op)?;
    }
    let gemm = Gemm { m, n, k, a: op.weight, b: op.x, d: op.out, dtype, out, beta };
    // SAFETY: `linear` has checked the buffers and that they are of this stream, which is the handle's; its device is
    // current while the call runs.
    backend.enqueue(|_| unsafe { library.handle.multiply(&gemm) })
}

impl Loaded {
    fn new(backend: &RocmBackend, library: &'static RocBlas) -> Result<Self> {
        backend.stream().bind()?;
        // It allocates.
        backend.stream().refuse_capture("rocblas_create_handle")?;
        let first_row = backend.zeros("row numbers of a bias", 256)?;
        // SAFETY: the stream is of the device just made current, and kept by `first_row`; for `drop`, see there.
        let handle = unsafe { Handle::new(library, backend.stream().handle()) }?;
        Ok(Loaded { handle: ManuallyDrop::new(handle), first_row })
    }

    /// Makes each row of the output the bias.
    fn fill_with_bias(&mut self, backend: &RocmBackend, op: &quantkv_decoder_linear) -> Result<()> {
        let rows = usize::try_from(op.rows).unwrap_or(usize::MAX);
        if self.first_row.len() < rows {
            let longer = rows.checked_next_power_of_two().unwrap_or(rows);
            self.first_row = backend.zeros("row numbers of a bias", longer)?;
        }
        let fill = quantkv_decoder_gather_rows {
            x: op.bias,
            rows: backend.read("row numbers of a bias", &self.first_row, &[rows])?.cast(),
            out: op.out,
            count: op.rows,
            num_rows: 1,
            width: op.outputs,
            activation: op.activation,
        };
        enqueue!(backend, quantkv_hip_decoder_gather_rows, fill)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // The handle frees device memory that its products use. On a device that fails here it stays.
        let stream = self.first_row.stream();
        if stream.synchronize().and_then(|()| stream.bind()).is_ok() {
            // SAFETY: dropped once, here. Its device is current, its stream alive.
            unsafe { ManuallyDrop::drop(&mut self.handle) };
        }
    }
}
