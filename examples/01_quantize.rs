//! Dense quantization: activations to FP8 codes and back, with one scale a head taken from the
//! data itself.
//!
//!     cargo run --example 01_quantize

use quantkv::args::{Absmax, Dequantize, Quantize, RowStrides, UpdateScales};
use quantkv::scale::{Granularity, ScaleRef};
use quantkv::{Backend, CpuBackend, KvFormat, Result};

fn main() -> Result<()> {
    let cpu = CpuBackend::new();
    let format = KvFormat::Fp8E4M3;
    let (num_tokens, num_heads, head_dim) = (5, 2, 64);
    let strides = RowStrides::contiguous(num_heads, head_dim);
    let granularity = Granularity::Head;

    // [tokens, heads, dim]: the second head is a hundred times larger than the first.
    let input: Vec<f32> =
        (0..num_tokens * 128).map(|i| (i as f32).sin() * if i % 128 < 64 { 1.0 } else { 100.0 }).collect();

    // The largest |x| of each head, and from it the scale that makes it the format's largest value.
    let (mut running, mut scales) = ([0.0; 2], [0.0; 2]);
    cpu.absmax(Absmax { input: &input, strides, num_tokens, num_heads, head_dim, granularity, running: &mut running })?;
    cpu.update_scales(UpdateScales { absmax: &running, divisor: format.max_finite(), scales: &mut scales })?;

    let scale = ScaleRef { values: &scales[..], strides: granularity.strides(head_dim) };
    let mut codes = vec![0u8; input.len() * format.bytes()];
    let mut output = vec![0.0f32; input.len()];
    cpu.quantize(Quantize {
        num_tokens,
        num_heads,
        head_dim,
        format,
        input: &input,
        strides,
        scale: scale.shorten(),
        codes: &mut codes,
    })?;
    cpu.dequantize(Dequantize {
        num_tokens,
        num_heads,
        head_dim,
        format,
        codes: &codes,
        scale,
        output: &mut output,
        strides,
    })?;

    // Three mantissa bits: within 1/16 of the value, or half a subnormal step (2^-10) of the scale.
    for (i, (x, y)) in input.iter().zip(&output).enumerate() {
        let bound = (x.abs() / 16.0).max(scales[i % 128 / 64] / 1024.0) * (1.0 + 1e-5);
        assert!((x - y).abs() <= bound, "element {i}: {x} became {y}");
    }
    println!("scales {scales:?}: {} bytes of f32 became {} bytes of {format}", 4 * input.len(), codes.len());
    Ok(())
}
