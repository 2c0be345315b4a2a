//! Throughput of the operations that move a cache: `cargo bench --bench cache_ops`.
//!
//! Every number is bytes *read plus bytes written*, per second:
//!
//! ```text
//! cache_write   activations in, codes out (K and V)      gather    codes in, activations out
//! copy_blocks   blocks in, blocks out                    swap_*    the same
//! quantize      activations in, codes out                absmax    activations in
//! dequantize    codes in, activations out                merge     two partial outputs in, one out
//! ```
//!
//! Each group ends with `memcpy`: a plain copy by all threads that reads and writes as many bytes
//! in total, to read the others against. `large` works on 16384 tokens, more than a last-level
//! cache holds; `decode` on one step of a batch of 64 sequences.
//! Each operation is verified before it is timed: against the specification (`CpuBackend::scalar`)
//! bit for bit, or for copies against the bytes copied.
//!
//! Model: 8 KV heads of 128 channels, blocks of 16, bf16 activations.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use quantkv::args::{
    Absmax, BlockPair, CacheWrite, CopyBlocks, Dequantize, Gather, LayerMut, LayerRef, MergeStates, Quantize,
    RowStrides, SwapBlocks,
};
use quantkv::layout::Half;
use quantkv::memory::Host;
use quantkv::scale::{Granularity, ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, KvFormat};
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use std::hint::black_box;
use std::time::Duration;

const HEADS: usize = 8;
const DIM: usize = 128;
const BLOCK: usize = 16;
const ROW: usize = HEADS * DIM;
const LARGE: usize = 16384;
const DECODE: usize = 64;

/// One layer's buffers.
#[derive(Clone, PartialEq)]
struct Layer {
    k: Vec<u8>,
    v: Vec<u8>,
    k_dynamic: Option<Vec<f32>>,
    v_dynamic: Option<Vec<f32>>,
}

impl Layer {
    fn new(shape: &CacheShape) -> Layer {
        let dynamic = |half| shape.spec.has_dynamic_scales(half).then(|| vec![1.0; shape.dynamic_scale_len(half)]);
        Layer {
            k: vec![1; shape.buffer_bytes(Half::K)],
            v: vec![1; shape.buffer_bytes(Half::V)],
            k_dynamic: dynamic(Half::K),
            v_dynamic: dynamic(Half::V),
        }
    }

    fn as_ref(&self) -> LayerRef<'_, CpuBackend> {
        LayerRef { k: &self.k, v: &self.v, k_dynamic: self.k_dynamic.as_deref(), v_dynamic: self.v_dynamic.as_deref() }
    }

    fn as_mut(&mut self) -> LayerMut<'_, CpuBackend> {
        LayerMut {
            k: &mut self.k,
            v: &mut self.v,
            k_dynamic: self.k_dynamic.as_deref_mut(),
            v_dynamic: self.v_dynamic.as_deref_mut(),
        }
    }
}

/// The geometries measured, by name.
fn specs() -> Vec<(&'static str, CacheSpec)> {
    let spec = |format| CacheSpec::new(HEADS, DIM, BLOCK, format).unwrap();
    let e4m3 = spec(KvFormat::Fp8E4M3);
    vec![
        ("e4m3/hnd", e4m3),
        ("e4m3/nhd", e4m3.with_layout(CacheLayout::Nhd).unwrap()),
        ("e4m3/packed", e4m3.with_layout(CacheLayout::VllmPacked).unwrap()),
        ("e4m3/hnd+dynamic", e4m3.with_dynamic_scales().unwrap()),
        ("e5m2/hnd", spec(KvFormat::Fp8E5M2)),
        ("auto/hnd", spec(KvFormat::BF16)),
    ]
}

fn activations(rng: &mut ChaCha8Rng, len: usize) -> Vec<bf16> {
    (0..len).map(|_| bf16::from_f32(rng.random_range(-4.0..4.0))).collect()
}

fn block_ids(rng: &mut ChaCha8Rng, blocks: usize) -> Vec<i32> {
    let mut ids: Vec<i32> = (0..blocks as i32).collect();
    ids.shuffle(rng);
    ids
}

/// One scale for the tensor.
fn scale(values: &[f32]) -> ScaleRef<'_, CpuBackend> {
    ScaleRef { values, strides: ScaleStrides::default() }
}

fn group<'c>(c: &'c mut Criterion, name: &str, bytes: usize) -> BenchmarkGroup<'c, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group.throughput(Throughput::Bytes(bytes as u64));
    group
}

/// The yardstick: reads `bytes / 2` and writes as many, on all threads from 1 MiB on.
fn memcpy(group: &mut BenchmarkGroup<'_, WallTime>, bytes: usize) {
    let src = vec![1u8; bytes / 2];
    let mut dst = vec![0u8; bytes / 2];
    let part = (bytes / 2).div_ceil(rayon::current_num_threads());
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("memcpy", |b| {
        b.iter(|| {
            if bytes < 1 << 20 {
                dst.copy_from_slice(&src);
            } else {
                rayon::scope(|scope| {
                    for (src, dst) in src.chunks(part).zip(dst.chunks_mut(part)) {
                        scope.spawn(move |_| dst.copy_from_slice(src));
                    }
                });
            }
            black_box(&mut dst);
        })
    });
}

/// Bytes of one token's codes, K and V.
fn code_bytes(spec: &CacheSpec) -> usize {
    ROW * (spec.k_format.bytes() + spec.v_format.bytes())
}

fn cache_write(c: &mut Criterion) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (size, tokens) in [("decode", DECODE), ("large", LARGE)] {
        let (key, value) = (activations(&mut rng, tokens * ROW), activations(&mut rng, tokens * ROW));
        // A decode step writes one slot in each sequence's last block, a prefill whole blocks.
        let per_block = if tokens == DECODE { 1 } else { BLOCK };
        let blocks = block_ids(&mut rng, tokens / per_block);
        let slots: Vec<i64> =
            (0..tokens).map(|t| i64::from(blocks[t / per_block]) * BLOCK as i64 + (t % per_block) as i64).collect();
        let mut group = group(c, &format!("cache_write/{size}"), 0);
        for (name, spec) in specs() {
            let shape = spec.shape(blocks.len()).unwrap();
            let write = |backend: &CpuBackend, layer: &mut Layer| {
                let strides = RowStrides::contiguous(HEADS, DIM);
                let op = CacheWrite {
                    shape,
                    cache: layer.as_mut(),
                    key: &key,
                    key_strides: strides,
                    value: &value,
                    value_strides: strides,
                    slot_mapping: &slots,
                    k_scale: scale(&[0.01]),
                    v_scale: scale(&[0.01]),
                };
                backend.cache_write(op).unwrap();
            };
            let (mut layer, mut expected) = (Layer::new(&shape), Layer::new(&shape));
            let backend = CpuBackend::new();
            write(&backend, &mut layer);
            write(&CpuBackend::scalar(), &mut expected);
            assert!(layer == expected, "cache_write {name} differs from the specification");

            group.throughput(Throughput::Bytes((tokens * (2 * ROW * size_of::<bf16>() + code_bytes(&spec))) as u64));
            group.bench_function(name, |b| b.iter(|| write(&backend, &mut layer)));
        }
        memcpy(&mut group, tokens * 2 * ROW * 3);
        group.finish();
    }
}

fn gather(c: &mut Criterion) {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let blocks = block_ids(&mut rng, LARGE / BLOCK);
    let mut group = group(c, "gather/large", 0);
    for (name, spec) in specs() {
        let shape = spec.shape(blocks.len()).unwrap();
        let mut layer = Layer::new(&shape);
        rng.fill(&mut layer.k[..]);
        rng.fill(&mut layer.v[..]);
        let gather = |backend: &CpuBackend, key: &mut [bf16], value: &mut [bf16]| {
            let op = Gather {
                shape,
                cache: layer.as_ref(),
                k_scale: scale(&[0.01]),
                v_scale: scale(&[0.01]),
                block_tables: &blocks,
                block_table_stride: blocks.len(),
                cu_seq_lens: &[0, LARGE as i32],
                starts: None,
                num_tokens: LARGE,
                key,
                key_strides: RowStrides::contiguous(HEADS, DIM),
                value,
                value_strides: RowStrides::contiguous(HEADS, DIM),
            };
            backend.gather(op).unwrap();
        };
        let dense = || vec![bf16::ZERO; LARGE * ROW];
        let (mut key, mut value, mut spec_key, mut spec_value) = (dense(), dense(), dense(), dense());
        let backend = CpuBackend::new();
        gather(&backend, &mut key, &mut value);
        gather(&CpuBackend::scalar(), &mut spec_key, &mut spec_value);
        let same = |a: &[bf16], b: &[bf16]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same(&key, &spec_key) && same(&value, &spec_value), "gather {name} differs from the specification");

        group.throughput(Throughput::Bytes((LARGE * (2 * ROW * size_of::<bf16>() + code_bytes(&spec))) as u64));
        group.bench_function(name, |b| b.iter(|| gather(&backend, &mut key, &mut value)));
    }
    memcpy(&mut group, LARGE * 2 * ROW * 3);
    group.finish();
}

/// 16 layers, 128 blocks each to a random other place: 128 MiB read and written.
fn copies(c: &mut Criterion) {
    const LAYERS: usize = 16;
    const BLOCKS: usize = 256;
    const PAIRS: usize = BLOCKS / 2;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shape = CacheSpec::new(HEADS, DIM, BLOCK, KvFormat::Fp8E4M3).unwrap().shape(BLOCKS).unwrap();
    let mut pool = vec![Layer::new(&shape); LAYERS];
    for layer in &mut pool {
        rng.fill(&mut layer.k[..]);
        rng.fill(&mut layer.v[..]);
    }
    let ids = block_ids(&mut rng, BLOCKS);
    let (sources, targets) = ids.split_at(PAIRS);
    let pair = |(&src, &dst): (&i32, &i32)| BlockPair::new(src as u32, dst as u32);
    let pairs: Vec<BlockPair> = sources.iter().zip(targets).map(pair).collect();
    let block = shape.spec.bytes_per_block().unwrap() / 2;
    let backend = CpuBackend::new();
    let bytes = 2 * LAYERS * PAIRS * shape.spec.bytes_per_block().unwrap();
    let verify = |from: &[Layer], to: &[Layer]| {
        for (from, to) in from.iter().zip(to) {
            for pair in &pairs {
                let (src, dst) = (pair.src as usize * block, pair.dst as usize * block);
                assert_eq!(from.k[src..src + block], to.k[dst..dst + block]);
                assert_eq!(from.v[src..src + block], to.v[dst..dst + block]);
            }
        }
    };

    let mut group = group(c, "copies/large", bytes);
    let copy = |pool: &mut [Layer]| {
        let mut layers: Vec<LayerMut<'_, CpuBackend>> = pool.iter_mut().map(Layer::as_mut).collect();
        backend.copy_blocks(CopyBlocks { shape, layers: &mut layers, pairs: &pairs }).unwrap();
    };
    copy(&mut pool);
    verify(&pool, &pool);
    group.bench_function("copy_blocks", |b| b.iter(|| copy(&mut pool)));

    let mut host = vec![Layer::new(&shape); LAYERS];
    let swap = |pool: &[Layer], host: &mut [Layer]| {
        let src: Vec<LayerRef<'_, CpuBackend>> = pool.iter().map(Layer::as_ref).collect();
        let mut dst: Vec<LayerMut<'_, Host>> = host
            .iter_mut()
            .map(|layer| LayerMut { k: &mut layer.k[..], v: &mut layer.v[..], k_dynamic: None, v_dynamic: None })
            .collect();
        let op = SwapBlocks { src_shape: shape, src: &src, dst_shape: shape, dst: &mut dst, pairs: &pairs };
        backend.swap_out(op).unwrap();
    };
    swap(&pool, &mut host);
    verify(&pool, &host);
    group.bench_function("swap_out", |b| b.iter(|| swap(&pool, &mut host)));
    memcpy(&mut group, bytes);
    group.finish();
}

fn convert(c: &mut Criterion) {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let input = activations(&mut rng, LARGE * ROW);
    let strides = RowStrides::contiguous(HEADS, DIM);
    let backend = CpuBackend::new();
    let bytes = LARGE * ROW * (size_of::<bf16>() + 1);
    let mut group = group(c, "convert/large", bytes);
    for format in [KvFormat::Fp8E4M3, KvFormat::Fp8E5M2, KvFormat::Fp8E4M3Fnuz] {
        let quantize = |backend: &CpuBackend, codes: &mut [u8]| {
            let op = Quantize {
                num_tokens: LARGE,
                num_heads: HEADS,
                head_dim: DIM,
                format,
                input: &input[..],
                strides,
                scale: scale(&[0.01]),
                codes,
            };
            backend.quantize(op).unwrap();
        };
        let (mut codes, mut expected) = (vec![0; LARGE * ROW], vec![0; LARGE * ROW]);
        quantize(&backend, &mut codes);
        quantize(&CpuBackend::scalar(), &mut expected);
        assert!(codes == expected, "quantize to {format} differs from the specification");
        group.bench_function(BenchmarkId::new("quantize", format), |b| b.iter(|| quantize(&backend, &mut codes)));

        let dequantize = |backend: &CpuBackend, output: &mut [bf16]| {
            let op = Dequantize {
                num_tokens: LARGE,
                num_heads: HEADS,
                head_dim: DIM,
                format,
                codes: &codes[..],
                scale: scale(&[0.01]),
                output,
                strides,
            };
            backend.dequantize(op).unwrap();
        };
        let (mut output, mut expected) = (vec![bf16::ZERO; LARGE * ROW], vec![bf16::ZERO; LARGE * ROW]);
        dequantize(&backend, &mut output);
        dequantize(&CpuBackend::scalar(), &mut expected);
        assert!(output == expected, "dequantize from {format} differs from the specification");
        group.bench_function(BenchmarkId::new("dequantize", format), |b| b.iter(|| dequantize(&backend, &mut output)));
    }
    memcpy(&mut group, bytes);
    group.finish();
}

fn absmax(c: &mut Criterion) {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let input = activations(&mut rng, 2 * LARGE * ROW);
    let backend = CpuBackend::new();
    let bytes = input.len() * size_of::<bf16>();
    let mut group = group(c, "absmax/large", bytes);
    for granularity in [Granularity::Tensor, Granularity::Head, Granularity::Channel] {
        let absmax = |backend: &CpuBackend, running: &mut [f32]| {
            let op = Absmax {
                input: &input[..],
                strides: RowStrides::contiguous(HEADS, DIM),
                num_tokens: 2 * LARGE,
                num_heads: HEADS,
                head_dim: DIM,
                granularity,
                running,
            };
            backend.absmax(op).unwrap();
        };
        let len = granularity.len(HEADS, DIM);
        let (mut running, mut expected) = (vec![0.0; len], vec![0.0; len]);
        absmax(&backend, &mut running);
        absmax(&CpuBackend::scalar(), &mut expected);
        assert!(running == expected, "absmax by {granularity:?} differs from the specification");
        group.bench_function(format!("{granularity:?}"), |b| b.iter(|| absmax(&backend, &mut running)));
    }
    memcpy(&mut group, bytes);
    group.finish();
}

fn merge_states(c: &mut Criterion) {
    const TOKENS: usize = 4096;
    const QUERY_HEADS: usize = 32;
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let len = TOKENS * QUERY_HEADS * DIM;
    let (a, b) = (activations(&mut rng, len), activations(&mut rng, len));
    let lse: Vec<f32> = (0..TOKENS * QUERY_HEADS).map(|_| rng.random_range(-8.0..8.0)).collect();
    let other_lse: Vec<f32> = (0..TOKENS * QUERY_HEADS).map(|_| rng.random_range(-8.0..8.0)).collect();
    let backend = CpuBackend::new();
    let merge = |backend: &CpuBackend, output: &mut [bf16]| {
        let op = MergeStates {
            num_tokens: TOKENS,
            num_heads: QUERY_HEADS,
            head_dim: DIM,
            a: &a[..],
            a_lse: &lse[..],
            b: &b[..],
            b_lse: &other_lse[..],
            strides: RowStrides::contiguous(QUERY_HEADS, DIM),
            output,
            lse: None,
        };
        backend.merge_states(op).unwrap();
    };
    let (mut output, mut expected) = (vec![bf16::ZERO; len], vec![bf16::ZERO; len]);
    merge(&backend, &mut output);
    merge(&CpuBackend::scalar(), &mut expected);
    assert!(output == expected, "merge_states differs from the specification");

    let bytes = 3 * len * size_of::<bf16>();
    let mut group = group(c, "merge_states/large", bytes);
    group.bench_function("bf16", |bencher| bencher.iter(|| merge(&backend, &mut output)));
    memcpy(&mut group, bytes);
    group.finish();
}

criterion_group!(benches, cache_write, gather, copies, convert, absmax, merge_states);
criterion_main!(benches);
