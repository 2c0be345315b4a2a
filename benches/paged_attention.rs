//! Paged attention on the CPU: bytes of K and V read per second.
//!
//! `cargo bench --bench paged_attention` checks the kernels against the specification on a small
//! case, times a grid of decode shapes and two prefill chunks with criterion, and ends with a table
//! of the shapes that do not fit in any cache beside a plain read of memory by as many threads,
//! measured alternately with them. `cargo bench --bench paged_attention -- table [words]` prints
//! the table alone, of the shapes with these words in their names.

use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use quantkv::args::{AttentionParams, LayerRef, PagedAttention, RowStrides};
use quantkv::layout::Half;
use quantkv::scale::{ScaleRef, StaticScale};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, Isa, KvFormat};
use rayon::prelude::*;

/// A shape: `batch` sequences of `context` cached tokens, `queries` of them new.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    context: usize,
    queries: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    format: KvFormat,
    layout: CacheLayout,
}

const BLOCK: usize = 16;

impl Shape {
    const fn decode(batch: usize, context: usize, format: KvFormat) -> Self {
        let layout = CacheLayout::Hnd;
        Shape { batch, context, queries: 1, kv_heads: 8, group: 4, dim: 128, format, layout }
    }

    fn kv_bytes(&self) -> u64 {
        (2 * self.batch * self.context * self.kv_heads * self.dim * self.format.bytes()) as u64
    }

    fn name(&self) -> String {
        let Shape { batch, context, queries, kv_heads, group, dim, format, layout } = self;
        format!("{format} {layout:?} B{batch} {context} q{queries} {}/{kv_heads} d{dim}", group * kv_heads)
    }
}

/// Everything one call needs.
struct Case {
    shape: Shape,
    cache_shape: CacheShape,
    k: Vec<u8>,
    v: Vec<u8>,
    scale: StaticScale,
    query: Vec<f32>,
    query_starts: Vec<i32>,
    seq_lens: Vec<i32>,
    block_tables: Vec<i32>,
    output: Vec<f32>,
    workspace: Vec<f32>,
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [-1, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Random elements of `format`, each finite.
fn random_elements(bytes: usize, format: KvFormat, seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    let sample: Vec<f32> = (0..1 << 14).map(|_| rng.unit()).collect();
    let mut codes = vec![0u8; sample.len() * format.bytes()];
    let one = StaticScale::one();
    let quantized = quantkv::args::Quantize::<CpuBackend, f32> {
        num_tokens: 1,
        num_heads: 1,
        head_dim: sample.len(),
        format,
        input: &sample,
        strides: RowStrides::contiguous(1, sample.len()),
        scale: ScaleRef { values: one.values(), strides: one.strides() },
        codes: &mut codes,
    };
    CpuBackend::new().quantize(quantized).expect("valid arguments");
    // The backend's own memory, as a cache would have it.
    let mut out: Vec<u8> = CpuBackend::new().zeros("bench", bytes).expect("enough memory");
    for piece in out.chunks_mut(codes.len() / 2) {
        // Start anywhere, on an element, so that rows differ.
        let at = rng.next() as usize % sample.len() / 2 * format.bytes();
        piece.copy_from_slice(&codes[at..][..piece.len()]);
    }
    out
}

impl Case {
    fn new(shape: Shape) -> Self {
        let blocks_per_seq = shape.context.div_ceil(BLOCK);
        let num_blocks = shape.batch * blocks_per_seq;
        let cache_shape = CacheSpec::new(shape.kv_heads, shape.dim, BLOCK, shape.format)
            .and_then(|spec| spec.with_layout(shape.layout))
            .and_then(|spec| spec.shape(num_blocks))
            .expect("a supported shape");
        let (heads, tokens) = (shape.kv_heads * shape.group, shape.batch * shape.queries);
        // Blocks in random order, as after a while of serving.
        let mut rng = Rng(7);
        let mut block_tables: Vec<i32> = (0..num_blocks as i32).collect();
        for i in (1..num_blocks).rev() {
            block_tables.swap(i, rng.next() as usize % (i + 1));
        }
        // Of one sequence or of all.
        let workspace =
            [shape.queries, tokens].map(|n| CpuBackend::new().attention_workspace_len(&cache_shape, heads, n));
        Case {
            shape,
            cache_shape,
            k: random_elements(cache_shape.buffer_bytes(Half::K), shape.format, 1),
            v: random_elements(cache_shape.buffer_bytes(Half::V), shape.format, 2),
            scale: StaticScale::per_tensor("bench", 0.5).expect("a valid scale"),
            query: (0..tokens * heads * shape.dim).map(|_| rng.unit()).collect(),
            query_starts: (0..=shape.batch).map(|s| (s * shape.queries) as i32).collect(),
            seq_lens: vec![shape.context as i32; shape.batch],
            block_tables,
            output: vec![0.0; tokens * heads * shape.dim],
            workspace: vec![0.0; workspace[0].max(workspace[1])],
        }
    }

    fn run(&mut self, backend: &CpuBackend) {
        self.run_some(backend, 0..self.shape.batch);
    }

    /// Only some of the sequences.
    fn run_some(&mut self, backend: &CpuBackend, seqs: Range<usize>) {
        let (heads, dim, queries) = (self.shape.kv_heads * self.shape.group, self.shape.dim, self.shape.queries);
        let stride = self.shape.context.div_ceil(BLOCK);
        let scale = ScaleRef { values: self.scale.values(), strides: self.scale.strides() };
        let op = PagedAttention::<CpuBackend, f32> {
            shape: self.cache_shape,
            cache: LayerRef { k: &self.k, v: &self.v, k_dynamic: None, v_dynamic: None },
            k_scale: scale,
            v_scale: scale,
            params: AttentionParams::new(1.0 / (dim as f32).sqrt()),
            num_heads: heads,
            num_tokens: seqs.len() * queries,
            max_query_len: Some(queries),
            query: &self.query,
            query_strides: RowStrides::contiguous(heads, dim),
            query_starts: &self.query_starts[..seqs.len() + 1],
            seq_lens: &self.seq_lens[seqs.clone()],
            block_tables: &self.block_tables[seqs.start * stride..seqs.end * stride],
            block_table_stride: stride,
            alibi_slopes: None,
            sinks: None,
            output: &mut self.output,
            output_strides: RowStrides::contiguous(heads, dim),
            lse: None,
            workspace: &mut self.workspace,
            plan_is_ready: false,
        };
        backend.paged_attention(op).expect("valid arguments");
    }
}

/// Fast against specification. Both sum at most 300 terms in f32; weights are at most 1 and values
/// at most 0.5, so that 1e-5 is above what rounding gives and far below any wrong key's share.
fn verify() {
    for format in KvFormat::ALL {
        for (layout, queries) in [(CacheLayout::Hnd, 1), (CacheLayout::Nhd, 1), (CacheLayout::VllmPacked, 5)] {
            let mut case = Case::new(Shape { layout, queries, ..Shape::decode(2, 300, format) });
            case.run(&CpuBackend::scalar());
            let expected = case.output.clone();
            for backend in Isa::ALL.into_iter().filter_map(CpuBackend::with_isa) {
                case.output.fill(f32::NAN);
                case.run(&backend);
                for (got, want) in case.output.iter().zip(&expected) {
                    assert!(
                        (got - want).abs() <= 1e-5,
                        "{} on {}: {got}, not {want}",
                        case.shape.name(),
                        backend.isa()
                    );
                }
            }
        }
    }
}

/// Criterion over one group of shapes. Caches are made only for what the filter lets through.
fn bench_shapes(criterion: &mut Criterion, name: &str, shapes: &[Shape]) {
    let backend = CpuBackend::new();
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(std::time::Duration::from_millis(200));
    group.measurement_time(std::time::Duration::from_secs(1));
    for shape in shapes {
        group.throughput(Throughput::Bytes(shape.kv_bytes()));
        let mut case = None;
        group.bench_function(shape.name(), |bencher| {
            let case = case.get_or_insert_with(|| Case::new(*shape));
            bencher.iter(|| case.run(&backend));
        });
    }
    group.finish();
}

/// Reads `buffer` once with all threads of the pool.
fn read_once(buffer: &[u64]) -> u64 {
    let piece = buffer.len().div_ceil(rayon::current_num_threads());
    let read = |piece: &[u64]| {
        let mut sums = [0u64; 32];
        for words in piece.chunks_exact(32) {
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum ^= word;
            }
        }
        sums.into_iter().fold(0, |a, b| a ^ b)
    };
    buffer.par_chunks(piece).map(read).reduce(|| 0, |a, b| a ^ b)
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// GB/s where K and V are in the L2 cache: what the instructions allow. Calls are shorter than a
/// time slice, so that the best of them was alone on its core.
fn cached_rate(backend: &CpuBackend, shape: Shape) -> f64 {
    let shape = Shape { batch: 1, context: 1024 / shape.format.bytes(), kv_heads: 1, ..shape };
    let mut case = Case::new(shape);
    let best = (0..500).map(|_| seconds(|| case.run(backend))).fold(f64::MAX, f64::min);
    shape.kv_bytes() as f64 / best / 1e9
}

/// The time one call in 50 beats: on a shared machine all threads rarely run at once.
fn undisturbed(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 50]
}

/// The table: GB/s, and their share of a plain read measured alternately.
fn table(words: &[String]) {
    const CALLS: usize = 600;
    const PIECE: usize = 8 << 20;
    let buffer: Vec<u64> = (0..(256 << 20) / 8).collect();
    let e4m3 = |batch, context| Shape::decode(batch, context, KvFormat::Fp8E4M3);
    let layout = |layout| Shape { layout, ..e4m3(8, 4096) };
    let shapes = [
        (e4m3(8, 4096), Isa::Avx512),
        (e4m3(32, 2048), Isa::Avx512),
        (Shape { group: 8, kv_heads: 8, ..e4m3(8, 4096) }, Isa::Avx512),
        (Shape { group: 1, kv_heads: 32, ..e4m3(8, 1024) }, Isa::Avx512),
        (Shape { dim: 64, ..e4m3(16, 4096) }, Isa::Avx512),
        (Shape { queries: 4, ..e4m3(8, 4096) }, Isa::Avx512),
        (layout(CacheLayout::Nhd), Isa::Avx512),
        (layout(CacheLayout::VllmPacked), Isa::Avx512),
        (Shape::decode(8, 4096, KvFormat::Fp8E5M2), Isa::Avx512),
        (Shape::decode(8, 4096, KvFormat::Fp8E4M3Fnuz), Isa::Avx512),
        (Shape::decode(4, 4096, KvFormat::BF16), Isa::Avx512),
        (Shape::decode(4, 4096, KvFormat::F16), Isa::Avx512),
        (e4m3(8, 4096), Isa::Avx2),
        (Shape::decode(8, 4096, KvFormat::Fp8E5M2), Isa::Avx2),
        (Shape::decode(4, 4096, KvFormat::BF16), Isa::Avx2),
    ];
    println!("\n{} threads; GB/s of K and V, the best fiftieth of {CALLS} calls", rayon::current_num_threads());
    println!("{:<50} {:>7} {:>7} {:>7} {:>7} {:>10}", "shape", "isa", "GB/s", "read", "share", "cached, 1T");
    let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    for (shape, isa) in shapes {
        let Some(backend) = CpuBackend::with_isa(isa) else { continue };
        if !words.iter().all(|word| format!("{} {isa}", shape.name()).contains(word.as_str())) {
            continue;
        }
        let mut case = Case::new(shape);
        case.run(&backend);
        // One sequence and one piece of the buffer a call, in turn: calls short against a time
        // slice, data that left the caches long ago.
        let (mut attention, mut read) = (vec![], vec![]);
        for piece in buffer.chunks_exact(PIECE / 8).cycle().take(CALLS) {
            let seq = attention.len() % shape.batch;
            attention.push(seconds(|| case.run_some(&backend, seq..seq + 1)));
            read.push(seconds(|| {
                black_box(read_once(black_box(piece)));
            }));
        }
        let rate = (shape.kv_bytes() / shape.batch as u64) as f64 / undisturbed(&mut attention) / 1e9;
        let read = PIECE as f64 / undisturbed(&mut read) / 1e9;
        let share = 100.0 * rate / read;
        let cached = single.install(|| cached_rate(&backend, shape));
        println!("{:<50} {:>7} {rate:>7.2} {read:>7.2} {share:>6.0}% {cached:>10.2}", shape.name(), isa.name());
    }
}

fn main() {
    verify();
    // `cargo test --benches` wants to know that it runs, no more.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let words: Vec<_> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if words.first().is_none_or(|word| word != "table") {
        let mut criterion = Criterion::default().configure_from_args();
        let mut decode = vec![];
        for format in [KvFormat::BF16, KvFormat::Fp8E4M3, KvFormat::Fp8E5M2] {
            for (batch, context) in [(1, 1024), (1, 16384), (16, 1024)] {
                decode.push(Shape::decode(batch, context, format));
            }
        }
        for (group, kv_heads) in [(1, 32), (8, 4)] {
            for dim in [64, 128] {
                decode.push(Shape { group, kv_heads, dim, ..Shape::decode(4, 2048, KvFormat::Fp8E4M3) });
            }
        }
        bench_shapes(&mut criterion, "decode", &decode);
        let prefill = |context, queries| Shape { queries, ..Shape::decode(1, context, KvFormat::Fp8E4M3) };
        bench_shapes(&mut criterion, "speculative", &[prefill(4096, 4), prefill(4096, 16)]);
        bench_shapes(&mut criterion, "prefill", &[prefill(512, 512), prefill(4096, 256)]);
        criterion.final_summary();
    }
    table(words.get(1..).unwrap_or_default());
}
