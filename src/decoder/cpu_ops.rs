//! [`Compute`] on the CPU, in f32. Every row is computed by one thread in one order, so results do
//! not depend on threads or batch.

use half::{bf16, f16};
use rayon::prelude::*;

use super::compute::{Compute, RandomMatrix};
use super::cpu_linear::{self, Stored};
use super::random;
use super::sampling::largest;
use super::weights::HostTensor;
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::format::{DType, Element};

/// Elements below which a loop stays on one thread.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// A weight matrix `[rows, cols]`, as stored.
#[derive(Debug)]
pub struct CpuMatrix {
    rows: usize,
    cols: usize,
    data: Data,
}

/// Where the elements lie: in the mapped file, unless the file does not align them.
#[derive(Debug)]
enum Data {
    Mapped(HostTensor),
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl CpuMatrix {
    fn stored(&self) -> Stored<'_> {
        match &self.data {
            // `load_matrix` maps only what `as_slice` can give.
            Data::Mapped(tensor) => match tensor.dtype() {
                DType::F32 => Stored::F32(tensor.as_slice().unwrap_or_default()),
                DType::F16 => Stored::F16(tensor.as_slice().unwrap_or_default()),
                DType::BF16 => Stored::BF16(tensor.as_slice().unwrap_or_default()),
            },
            Data::F32(values) => Stored::F32(values),
            Data::F16(values) => Stored::F16(values),
            Data::BF16(values) => Stored::BF16(values),
        }
    }
}

fn mapped_or_copied<T: Element>(tensor: &HostTensor, own: fn(Vec<T>) -> Data) -> Data {
    match tensor.as_slice::<T>() {
        Some(_) => Data::Mapped(tensor.clone()),
        None => own(tensor.copy_aligned()),
    }
}

fn check(what: &'static str, needed: usize, got: usize) -> Result<()> {
    if got < needed { Err(Error::BufferTooSmall { what, needed, got }) } else { Ok(()) }
}

/// Runs `row(index, chunk)` over chunks of `width`, on the pool if there is enough to do.
fn for_rows(data: &mut [f32], width: usize, row: impl Fn(usize, &mut [f32]) + Send + Sync) {
    if data.len() < PARALLEL_ELEMENTS {
        data.chunks_mut(width).enumerate().for_each(|(i, chunk)| row(i, chunk));
    } else {
        data.par_chunks_mut(width).enumerate().for_each(|(i, chunk)| row(i, chunk));
    }
}

/// `1 / sqrt(mean(x²) + eps)`: 16 partial sums, folded in halves.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    for chunk in x.chunks(16) {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    1.0 / (sums[0] / x.len() as f32 + eps).sqrt()
}

impl Compute for CpuBackend {
    type Matrix = CpuMatrix;
    type Recording = ();

    fn load_matrix(&self, tensor: &HostTensor) -> Result<CpuMatrix> {
        let &[rows, cols] = tensor.shape() else {
            let reason = format!("tensor {:?} has shape {:?}, expected two dimensions", tensor.name(), tensor.shape());
            return Err(Error::InvalidFile { path: tensor.path().to_owned(), reason });
        };
        let data = match tensor.dtype() {
            DType::F32 => mapped_or_copied(tensor, Data::F32),
            DType::F16 => mapped_or_copied(tensor, Data::F16),
            DType::BF16 => mapped_or_copied(tensor, Data::BF16),
        };
        Ok(CpuMatrix { rows, cols, data })
    }

    fn random_matrix(&self, matrix: &RandomMatrix) -> Result<CpuMatrix> {
        let &RandomMatrix { rows, cols, dtype, .. } = matrix;
        let data = match dtype {
            DType::F32 => Data::F32(random::matrix(matrix)?),
            DType::F16 => Data::F16(random::matrix(matrix)?),
            DType::BF16 => Data::BF16(random::matrix(matrix)?),
        };
        Ok(CpuMatrix { rows, cols, data })
    }

    fn embed(&self, table: &CpuMatrix, ids: &Vec<i32>, rows: usize, out: &mut Vec<f32>) -> Result<()> {
        let width = table.cols;
        check("token ids", rows, ids.len())?;
        check("embeddings", rows * width, out.len())?;
        for (id, out) in ids[..rows].iter().zip(out.chunks_exact_mut(width)) {
            let row = usize::try_from(*id).ok().filter(|row| *row < table.rows);
            let row = row.ok_or(Error::InvalidRequest(format!("token id {id} is outside the vocabulary")))?;
            let range = row * width..(row + 1) * width;
            match table.stored() {
                Stored::F32(values) => out.copy_from_slice(&values[range]),
                Stored::F16(values) => out.iter_mut().zip(&values[range]).for_each(|(o, x)| *o = x.to_f32()),
                Stored::BF16(values) => out.iter_mut().zip(&values[range]).for_each(|(o, x)| *o = x.to_f32()),
            }
        }
        Ok(())
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        first: usize,
        rows: usize,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let width = weight.len();
        check("rms_norm input", (first + rows) * width, x.len())?;
        check("rms_norm output", rows * width, out.len())?;
        let x = &x[first * width..];
        for_rows(&mut out[..rows * width], width, |row, out| {
            let x = &x[row * width..(row + 1) * width];
            let scale = inverse_rms(x, eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = weight * (x * scale);
            }
        });
        Ok(())
    }

    fn rms_norm_in_place(&self, x: &mut Vec<f32>, rows: usize, weight: &Vec<f32>, eps: f32) -> Result<()> {
        let width = weight.len();
        check("rms_norm input", rows * width, x.len())?;
        for_rows(&mut x[..rows * width], width, |_, x| {
            let scale = inverse_rms(x, eps);
            for (x, weight) in x.iter_mut().zip(weight) {
                *x = weight * (*x * scale);
            }
        });
        Ok(())
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        rows: usize,
        weight: &CpuMatrix,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (outputs, inputs) = (weight.rows, weight.cols);
        check("linear input", rows * inputs, x.len())?;
        check("linear output", rows * outputs, out.len())?;
        if let Some(bias) = bias {
            check("linear bias", outputs, bias.len())?;
        }
        cpu_linear::linear(
            self.isa(),
            &x[..rows * inputs],
            inputs,
            weight.stored(),
            &mut out[..rows * outputs],
            outputs,
        );
        if let Some(bias) = bias {
            for row in out[..rows * outputs].chunks_exact_mut(outputs) {
                row.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
        Ok(())
    }

    fn logits(&self, x: &Vec<f32>, rows: usize, weight: &CpuMatrix, out: &mut Vec<f32>) -> Result<()> {
        self.linear(x, rows, weight, None, out)
    }

    fn rope_table(
        &self,
        positions: &Vec<i32>,
        rows: usize,
        inv_freq: &Vec<f32>,
        scaling: f32,
        cos: &mut Vec<f32>,
        sin: &mut Vec<f32>,
    ) -> Result<()> {
        let half = inv_freq.len();
        check("positions", rows, positions.len())?;
        check("cos table", rows * half, cos.len())?;
        check("sin table", rows * half, sin.len())?;
        for (row, position) in positions[..rows].iter().enumerate() {
            let range = row * half..(row + 1) * half;
            for ((cos, sin), freq) in cos[range.clone()].iter_mut().zip(&mut sin[range]).zip(inv_freq) {
                // The angle is rounded to f32 first, as in every f32 implementation.
                let (s, c) = (*position as f32 * freq).sin_cos();
                (*cos, *sin) = (c * scaling, s * scaling);
            }
        }
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        rows: usize,
        heads: usize,
        head_dim: usize,
        cos: &Vec<f32>,
        sin: &Vec<f32>,
    ) -> Result<()> {
        let half = head_dim / 2;
        check("rope input", rows * heads * head_dim, x.len())?;
        check("cos table", rows * half, cos.len())?;
        check("sin table", rows * half, sin.len())?;
        for_rows(&mut x[..rows * heads * head_dim], head_dim, |index, head| {
            let row = index / heads;
            let table = row * half..(row + 1) * half;
            let (low, high) = head.split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(&cos[table.clone()]).zip(&sin[table]) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        });
        Ok(())
    }

    fn silu_mul(&self, gate: &mut Vec<f32>, up: &Vec<f32>, len: usize) -> Result<()> {
        check("gate", len, gate.len())?;
        check("up", len, up.len())?;
        const CHUNK: usize = 1 << 12;
        for_rows(&mut gate[..len], CHUNK, |index, gate| {
            for (gate, up) in gate.iter_mut().zip(&up[index * CHUNK..len]) {
                *gate = *gate / (1.0 + (-*gate).exp()) * up;
            }
        });
        Ok(())
    }

    fn add(&self, x: &mut Vec<f32>, first: usize, y: &Vec<f32>, len: usize) -> Result<()> {
        check("residual", first + len, x.len())?;
        check("update", len, y.len())?;
        x[first..first + len].iter_mut().zip(&y[..len]).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn gather_rows(&self, x: &Vec<f32>, rows: &Vec<i32>, num: usize, width: usize, out: &mut Vec<f32>) -> Result<()> {
        check("row numbers", num, rows.len())?;
        check("gathered rows", num * width, out.len())?;
        for (row, out) in rows[..num].iter().zip(out.chunks_exact_mut(width)) {
            let start = usize::try_from(*row).unwrap_or(usize::MAX).saturating_mul(width);
            check("rows gathered from", start.saturating_add(width), x.len())?;
            out.copy_from_slice(&x[start..start + width]);
        }
        Ok(())
    }

    fn greedy(&self, logits: &Vec<f32>, rows: usize, vocab_size: usize, tokens: &mut Vec<i32>) -> Result<()> {
        check("logits", rows * vocab_size, logits.len())?;
        check("greedy tokens", rows, tokens.len())?;
        for (row, token) in logits.chunks_exact(vocab_size).zip(&mut tokens[..rows]) {
            // A vocabulary has fewer than 2^31 tokens: the configuration is checked.
            *token = largest(row).map_or(-1, |id| id as i32);
        }
        Ok(())
    }
}
