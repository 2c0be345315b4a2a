//! The same code on two backends: what is written over `B: Backend` runs on the CPU and on an NVIDIA
//! GPU, and leaves the same bytes in the cache.
//!
//!     cargo run --features cuda --example 06_cuda [DEVICE]
//!
//! Where there is no GPU it says so; nothing else needs one.

use std::sync::Arc;

use quantkv::args::{AttentionParams, RowStrides};
use quantkv::cache::{AttentionBatch, AttentionHeads, AttentionIo};
use quantkv::cuda::CudaBackend;
use quantkv::layout::Half;
use quantkv::scale::{LayerScales, StaticScale};
use quantkv::{Backend, CacheSpec, CpuBackend, Error, KvFormat, PagedKvCache, Result};

/// Copies a slice to the backend's memory.
fn upload<B: Backend, T: quantkv::format::Pod>(backend: &B, values: &[T]) -> Result<B::Buffer<T>> {
    let mut buffer = backend.zeros("example", values.len())?;
    backend.upload(values, &mut buffer)?;
    Ok(buffer)
}

/// Writes three tokens to block 1 of an FP8 cache and attends with the newest. The output, `[4, 64]`.
fn write_and_attend<B: Backend>(backend: Arc<B>) -> Result<Vec<f32>> {
    // 2 KV heads of 64 channels, blocks of 16 tokens; 4 query heads.
    let spec = CacheSpec::new(2, 64, 16, KvFormat::Fp8E4M3)?;
    let scale = StaticScale::per_tensor("example", 0.01)?;
    let scales = LayerScales { k: scale.clone(), v: scale };
    let mut cache = PagedKvCache::new(backend.clone(), spec, 2, &[scales])?;
    assert_eq!(cache.bytes(), 2 * cache.shape().buffer_bytes(Half::K));

    let wave = |len: usize, step: f32| -> Vec<f32> { (0..len).map(|i| (i as f32 * step).sin()).collect() };
    let (key, value) = (upload(&*backend, &wave(3 * 128, 0.1))?, upload(&*backend, &wave(3 * 128, 0.3))?);
    let slots = upload(&*backend, &[16i64, 17, 18])?;
    let rows = RowStrides::contiguous(2, 64);
    cache.write(0, backend.view(&key), rows, backend.view(&value), rows, backend.view(&slots))?;

    let query = upload(&*backend, &wave(256, 0.2))?;
    let mut output = backend.zeros::<f32>("output", 256)?;
    let mut workspace = backend.zeros::<f32>("workspace", cache.workspace_len(4, 1))?;
    let (starts, lens, table) = (upload(&*backend, &[0, 1])?, upload(&*backend, &[3])?, upload(&*backend, &[1])?);
    let batch = AttentionBatch {
        num_tokens: 1,
        max_query_len: Some(1),
        query_starts: backend.view(&starts),
        seq_lens: backend.view(&lens),
        block_tables: backend.view(&table),
        block_table_stride: 1,
    };
    let io = AttentionIo {
        query: backend.view(&query),
        query_strides: RowStrides::contiguous(4, 64),
        output: backend.view_mut(&mut output),
        output_strides: RowStrides::contiguous(4, 64),
        lse: None,
        workspace: backend.view_mut(&mut workspace),
        plan_is_ready: false,
    };
    cache.attend(0, &batch, &AttentionHeads::new(4, AttentionParams::new(0.125)), io)?;

    let mut host = vec![0.0; 256];
    backend.download(&output, &mut host)?;
    assert!(backend.faults()?.is_empty());
    Ok(host)
}

fn main() -> Result<()> {
    let on_cpu = write_and_attend(Arc::new(CpuBackend::new()))?;
    let ordinal = std::env::args().nth(1).and_then(|ordinal| ordinal.parse().ok()).unwrap_or(0);
    let cuda = match CudaBackend::new(ordinal) {
        Ok(cuda) => Arc::new(cuda),
        Err(reason @ (Error::NoDevice { .. } | Error::NotCompiled { .. })) => {
            println!("skipped: {reason}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    println!("device: {}", cuda.device()?.name);
    let on_cuda = write_and_attend(cuda)?;
    let difference = on_cpu.iter().zip(&on_cuda).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("largest difference between CPU and CUDA: {difference:e}");
    assert!(difference < 1e-5);
    Ok(())
}
