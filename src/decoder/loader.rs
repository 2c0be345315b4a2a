//! Weights by their names in Hugging Face checkpoints: out of a checkpoint, or made up.
//!
//! Made-up weights give a model of full size without its download, to measure steps with: matrices
//! are random with deviation `1 / sqrt(inputs)`, so that activations keep their magnitude, norms are
//! ones and biases zeros. A tensor's numbers come from its name and the seed alone.

use super::compute::{Compute, RandomMatrix};
use super::config::Config;
use super::network::{Layer, Projection};
use super::weights::{HostTensor, Weights};
use crate::error::Result;
use crate::format::{DType, Element};

/// Where tensors come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Checkpoint(&'a Weights),
    Random { dtype: DType, seed: u64 },
}

pub(super) struct Loader<'a, B> {
    pub backend: &'a B,
    pub source: Source<'a>,
    pub config: &'a Config,
}

impl<B> Loader<'_, B> {
    /// A matrix `[out, input]`.
    pub fn matrix<A: Element>(&self, name: &str, out: usize, input: usize) -> Result<B::Matrix>
    where
        B: Compute<A>,
    {
        match self.source {
            Source::Checkpoint(weights) => self.backend.load_matrix(&weights.tensor_of_shape(name, &[out, input])?),
            Source::Random { dtype, seed } => self.backend.random_matrix(&RandomMatrix {
                rows: out,
                cols: input,
                dtype,
                seed: seed ^ hash(name),
                deviation: (input as f64).powf(-0.5) as f32,
            }),
        }
    }

    /// A vector in the activation type; `made_up` are its elements where there is no checkpoint.
    pub fn vector<A: Element>(&self, name: &str, len: usize, made_up: f32) -> Result<B::Buffer<A>>
    where
        B: Compute<A>,
    {
        let values: Vec<A> = match self.source {
            Source::Checkpoint(weights) => {
                let tensor: HostTensor = weights.tensor_of_shape(name, &[len])?;
                tensor.to_f32().into_iter().map(A::from_f32).collect()
            }
            Source::Random { .. } => vec![A::from_f32(made_up); len],
        };
        let mut buffer = self.backend.zeros("a weight vector", len)?;
        self.backend.upload(&values, &mut buffer)?;
        Ok(buffer)
    }

    fn projection<A: Element>(&self, name: &str, out: usize, input: usize, bias: bool) -> Result<Projection<B, A>>
    where
        B: Compute<A>,
    {
        Ok(Projection {
            weight: self.matrix(&format!("{name}.weight"), out, input)?,
            bias: if bias { Some(self.vector(&format!("{name}.bias"), out, 0.0)?) } else { None },
        })
    }

    /// All of one layer.
    pub fn layer<A: Element>(&self, index: usize) -> Result<Layer<B, A>>
    where
        B: Compute<A>,
    {
        let c = self.config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let attention =
            |part: &str, out, input, bias| self.projection(&name(&format!("self_attn.{part}")), out, input, bias);
        let mlp = |part: &str, out, input| self.projection(&name(&format!("mlp.{part}")), out, input, c.mlp_bias);
        let qk_norms = if c.qk_norm {
            let norm = |part| self.vector(&name(part), c.head_dim, 1.0);
            Some((norm("self_attn.q_norm.weight")?, norm("self_attn.k_norm.weight")?))
        } else {
            None
        };
        Ok(Layer {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden, 1.0)?,
            q: attention("q_proj", q_width, hidden, c.qkv_bias)?,
            k: attention("k_proj", kv_width, hidden, c.qkv_bias)?,
            v: attention("v_proj", kv_width, hidden, c.qkv_bias)?,
            qk_norms,
            o: attention("o_proj", hidden, q_width, c.o_bias)?,
            post_norm: self.vector(&name("post_attention_layernorm.weight"), hidden, 1.0)?,
            gate: mlp("gate_proj", inner, hidden)?,
            up: mlp("up_proj", inner, hidden)?,
            down: mlp("down_proj", hidden, inner)?,
        })
    }
}

/// FNV-1a: tells tensors apart, nothing more.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
