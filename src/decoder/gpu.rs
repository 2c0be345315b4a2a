//! What the decoder on CUDA and on ROCm have in common: lengths and streams are checked, arguments become the structs of
//! `quantkv_decoder.h`, and one kernel is enqueued.

use std::ffi::c_void;

use super::bindings::quantkv_decoder_linear;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::format::{DType, Element, Pod};
use crate::layout::checked_product;
use crate::raw::abi::activation;

/// A weight matrix `[rows, cols]` on the device, as stored in the checkpoint.
#[derive(Debug)]
pub struct DeviceMatrix<B> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: DType,
    pub(super) data: B,
}

impl<B> DeviceMatrix<B> {
    pub(super) fn zeros<G>(backend: &G, rows: usize, cols: usize, dtype: DType) -> Result<Self>
    where
        G: Backend<Buffer<u8> = B>,
    {
        let bytes = checked_product("a weight matrix", &[rows, cols, dtype.bytes()])?;
        Ok(DeviceMatrix { rows, cols, dtype, data: backend.zeros::<u8>("a weight matrix", bytes)? })
    }
}

/// A backend whose buffers have an address.
pub(super) trait DeviceBuffers: Backend {
    /// The address and the length of a buffer, which is of this backend's stream.
    fn place<T: Pod>(&self, what: &'static str, buffer: &Self::Buffer<T>) -> Result<(*const c_void, usize)>;

    /// A buffer's address, once it is long enough.
    fn read<T: Pod>(&self, what: &'static str, buffer: &Self::Buffer<T>, len: &[usize]) -> Result<*const c_void> {
        let needed = checked_product(what, len)?;
        let (address, got) = self.place(what, buffer)?;
        if got < needed { Err(Error::BufferTooSmall { what, needed, got }) } else { Ok(address) }
    }

    /// The same of one that is written to.
    fn write<T: Pod>(&self, what: &'static str, buffer: &mut Self::Buffer<T>, len: &[usize]) -> Result<*mut c_void> {
        self.read(what, buffer, len).map(<*const c_void>::cast_mut)
    }
}

/// Sizes were multiplied to a buffer's length, so each fits; one that was multiplied by zero is not looked at.
pub(super) fn size(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// `out = x · weightᵀ + bias` for `rows` rows, checked. `O` is `A` or f32.
pub(super) fn linear_op<G: DeviceBuffers, A: Element, O: Element>(
    backend: &G,
    x: &G::Buffer<A>,
    rows: usize,
    weight: &DeviceMatrix<G::Buffer<u8>>,
    bias: Option<&G::Buffer<A>>,
    out: &mut G::Buffer<O>,
) -> Result<quantkv_decoder_linear> {
    let (outputs, inputs) = (weight.rows, weight.cols);
    Ok(quantkv_decoder_linear {
        x: backend.read("linear input", x, &[rows, inputs])?,
        weight: backend.read("weights", &weight.data, &[outputs, inputs, weight.dtype.bytes()])?,
        bias: match bias {
            Some(bias) => backend.read("linear bias", bias, &[outputs])?,
            None => std::ptr::null(),
        },
        out: backend.write("linear output", out, &[rows, outputs])?,
        rows: size(rows),
        inputs: size(inputs),
        outputs: size(outputs),
        activation: activation(A::DTYPE),
        weight_format: activation(weight.dtype),
        output: activation(O::DTYPE),
    })
}

/// Enqueues one kernel of `quantkv_decoder.h`, a function of `$library`; in a build without kernels, says so.
macro_rules! enqueue_on {
    ($library:ty, $backend:expr, $function:ident, $op:expr) => {{
        let op = $op;
        $backend.enqueue(|launch| {
            const CALL: &str = stringify!($function);
            let check = crate::raw::gpu::check::<$library>;
            #[cfg(not(quantkv_stub))]
            {
                // SAFETY: the pointers are device buffers of this stream, as long as the sizes beside them
                // say: checked above by `DeviceBuffers`. The call keeps no reference to the struct.
                check(CALL, unsafe { $function(&op, launch.stream) })
            }
            #[cfg(quantkv_stub)]
            {
                let _ = (&op, launch, check);
                let backend = <$library as crate::raw::gpu::Library>::BACKEND;
                Err::<(), _>(crate::Error::NotCompiled { backend, call: CALL })
            }
        })
    }};
}
pub(super) use enqueue_on;

/// Declares the operations of [`Compute`](super::compute::Compute) but for products, by the C functions named. In scope
/// are `enqueue!` and what the bodies name.
macro_rules! compute_operations {
    (embed: $embed:ident, rms_norm: $rms_norm:ident, rope_table: $rope_table:ident, rope: $rope:ident, silu_mul: $silu_mul:ident, add: $add:ident, gather_rows: $gather_rows:ident, argmax: $argmax:ident) => {
        fn embed(
            &self,
            table: &Self::Matrix,
            ids: &Self::Buffer<i32>,
            rows: usize,
            out: &mut Self::Buffer<A>,
        ) -> Result<()> {
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
            enqueue!(self, $embed, op)
        }

        fn rms_norm(
            &self,
            x: &Self::Buffer<A>,
            first: usize,
            rows: usize,
            weight: &Self::Buffer<A>,
            eps: f32,
            out: &mut Self::Buffer<A>,
        ) -> Result<()> {
            let width = weight.len();
            let end = first.checked_add(rows).ok_or(Error::Overflow { what: "rms_norm rows" })?;
            // In range: `first` rows are a part of what the next line checks.
            let x = self.read("rms_norm input", x, &[end, width])?.wrapping_byte_add(first * width * size_of::<A>());
            let weight = self.read("rms_norm weight", weight, &[width])?;
            let out = self.write("rms_norm output", out, &[rows, width])?;
            let op = quantkv_decoder_rms_norm {
                x,
                weight,
                out,
                rows: size(rows),
                width: size(width),
                eps,
                activation: activation(A::DTYPE),
            };
            enqueue!(self, $rms_norm, op)
        }

        fn rms_norm_in_place(
            &self,
            x: &mut Self::Buffer<A>,
            rows: usize,
            weight: &Self::Buffer<A>,
            eps: f32,
        ) -> Result<()> {
            let width = weight.len();
            let x = self.write("rms_norm input", x, &[rows, width])?;
            let weight = self.read("rms_norm weight", weight, &[width])?;
            let op = quantkv_decoder_rms_norm {
                x,
                weight,
                out: x,
                rows: size(rows),
                width: size(width),
                eps,
                activation: activation(A::DTYPE),
            };
            enqueue!(self, $rms_norm, op)
        }

        fn rope_table(
            &self,
            positions: &Self::Buffer<i32>,
            rows: usize,
            inv_freq: &Self::Buffer<f32>,
            scaling: f32,
            cos: &mut Self::Buffer<f32>,
            sin: &mut Self::Buffer<f32>,
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
            enqueue!(self, $rope_table, op)
        }

        fn rope(
            &self,
            x: &mut Self::Buffer<A>,
            rows: usize,
            heads: usize,
            head_dim: usize,
            cos: &Self::Buffer<f32>,
            sin: &Self::Buffer<f32>,
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
            enqueue!(self, $rope, op)
        }

        fn silu_mul(&self, gate: &mut Self::Buffer<A>, up: &Self::Buffer<A>, len: usize) -> Result<()> {
            let (x, y) = (self.write("gate", gate, &[len])?, self.read("up", up, &[len])?);
            let op = quantkv_decoder_binary { x, y, len: size(len), activation: activation(A::DTYPE) };
            enqueue!(self, $silu_mul, op)
        }

        fn add(&self, x: &mut Self::Buffer<A>, first: usize, y: &Self::Buffer<A>, len: usize) -> Result<()> {
            let end = first.checked_add(len).ok_or(Error::Overflow { what: "residual" })?;
            let x = self.write("residual", x, &[end])?.wrapping_byte_add(first * size_of::<A>());
            let y = self.read("update", y, &[len])?;
            let op = quantkv_decoder_binary { x, y, len: size(len), activation: activation(A::DTYPE) };
            enqueue!(self, $add, op)
        }

        fn gather_rows(
            &self,
            x: &Self::Buffer<A>,
            rows: &Self::Buffer<i32>,
            num: usize,
            width: usize,
            out: &mut Self::Buffer<A>,
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
            enqueue!(self, $gather_rows, op)
        }

        fn greedy(
            &self,
            logits: &Self::Buffer<f32>,
            rows: usize,
            vocab_size: usize,
            tokens: &mut Self::Buffer<i32>,
        ) -> Result<()> {
            let op = quantkv_decoder_argmax {
                logits: self.read("logits", logits, &[rows, vocab_size])?.cast(),
                ids: self.write("greedy tokens", tokens, &[rows])?.cast(),
                rows: size(rows),
                vocab: size(vocab_size),
            };
            enqueue!(self, $argmax, op)
        }
    };
}
pub(super) use compute_operations;
