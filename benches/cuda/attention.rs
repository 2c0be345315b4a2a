//! Paged attention: shapes, the data of a shape, its check against f64 and its timing.
//!
//! The arena of a shape holds several caches, each K then V:
//!
//! ```text
//! arena   [pools] { K [blocks, ...], V [blocks, ...] }     tables  [pools, seqs, blocks of the longest]
//! ```
//! so that a plain read over slices of the arena reads exactly what attention reads, no table is in
//! order, and together the caches exceed the L2 several times.

use std::ffi::c_int;

use half::bf16;
use quantkv::codec::{Codec, E4M3, E4M3Fnuz, E5M2, PlainBF16, PlainF16, PlainF32};
use quantkv::layout::Half;
use quantkv::raw::bindings as c;
use quantkv::{CacheLayout, CacheSpec, KvFormat};

use crate::device::{Buffer, Device, Outcome, Timing, checked, launches_for};
use crate::report::Row;

/// Sequences with these cached lengths, each with `queries` newest tokens.
#[derive(Clone, Debug)]
pub struct Shape {
    pub label: String,
    pub lens: Vec<usize>,
    pub queries: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub dim: usize,
    pub block: usize,
    pub format: KvFormat,
    pub layout: CacheLayout,
    pub dynamic: bool,
    /// Scores have a soft cap of 50, Gemma 2's.
    pub capped: bool,
}

impl Shape {
    /// `batch` sequences of `context` tokens, 32 query heads over 8 KV heads of 128, pages of 16.
    pub fn uniform(batch: usize, context: usize, format: KvFormat) -> Shape {
        Shape::of(format!("{batch} x {}", tokens(context)), vec![context; batch], format)
    }

    pub fn of(label: String, lens: Vec<usize>, format: KvFormat) -> Shape {
        Shape {
            label,
            lens,
            queries: 1,
            kv_heads: 8,
            group: 4,
            dim: 128,
            block: 16,
            format,
            layout: CacheLayout::Hnd,
            dynamic: false,
            capped: false,
        }
    }

    pub fn name(&self) -> String {
        let Shape { label, queries, kv_heads, group, dim, block, format, layout, dynamic, capped, .. } = self;
        let dynamic = if *dynamic { " dynamic" } else { "" };
        let capped = if *capped { " capped" } else { "" };
        let heads = group * kv_heads;
        format!("{format} {label} q{queries} {heads}/{kv_heads} d{dim} page{block} {layout}{dynamic}{capped}")
    }

    fn soft_cap(&self) -> f32 {
        if self.capped { 50.0 } else { 0.0 }
    }

    /// K and V a call must read, and the scales of their rows.
    pub fn bytes(&self) -> usize {
        let row = 2 * (self.dim * self.format.bytes() + if self.dynamic { 4 } else { 0 });
        self.lens.iter().sum::<usize>() * self.kv_heads * row
    }

    /// Multiplications and additions of q·k and p·v over visible keys.
    fn flops(&self) -> f64 {
        let q = self.queries as f64;
        let visible: f64 = self.lens.iter().map(|&len| q * len as f64 - q * (q - 1.0) / 2.0).sum();
        4.0 * visible * (self.kv_heads * self.group * self.dim) as f64
    }

    /// The same kind of work, small enough for an emulator: three sequences of lengths that end inside a page.
    pub fn shrunk(&self) -> Shape {
        let queries = self.queries.min(70);
        let lens: Vec<usize> =
            self.lens.iter().rev().take(3).zip([69, 701, 133]).map(|(_, len)| len + queries).collect();
        Shape { label: format!("{} small", lens.len()), lens, queries, kv_heads: self.kv_heads.min(2), ..self.clone() }
    }

    fn spec(&self) -> Outcome<CacheSpec> {
        CacheSpec::new(self.kv_heads, self.dim, self.block, self.format)
            .and_then(|spec| spec.with_layout(self.layout))
            .and_then(|spec| if self.dynamic { spec.with_dynamic_scales() } else { Ok(spec) })
            .map_err(|error| error.to_string())
    }
}

fn tokens(n: usize) -> String {
    if n.is_multiple_of(1024) { format!("{}k", n / 1024) } else { n.to_string() }
}

/// The C ABI's number of a format.
pub fn code_of(format: KvFormat) -> Outcome<c_int> {
    Ok(match format {
        KvFormat::F32 => c::QUANTKV_F32,
        KvFormat::F16 => c::QUANTKV_F16,
        KvFormat::BF16 => c::QUANTKV_BF16,
        KvFormat::Fp8E4M3 => c::QUANTKV_FP8_E4M3,
        KvFormat::Fp8E5M2 => c::QUANTKV_FP8_E5M2,
        KvFormat::Fp8E4M3Fnuz => c::QUANTKV_FP8_E4M3_FNUZ,
        other => return Err(format!("no number for {other}")),
    })
}

/// The value of one stored element.
pub fn decode(format: KvFormat, bytes: &[u8]) -> f64 {
    f64::from(match format {
        KvFormat::Fp8E4M3 => E4M3::load(bytes),
        KvFormat::Fp8E5M2 => E5M2::load(bytes),
        KvFormat::Fp8E4M3Fnuz => E4M3Fnuz::load(bytes),
        KvFormat::F16 => PlainF16::load(bytes),
        KvFormat::BF16 => PlainBF16::load(bytes),
        _ => PlainF32::load(bytes),
    })
}

/// The five strides of one half of a cache.
pub fn map_of(spec: &CacheSpec, half: Half) -> c::quantkv_address_map {
    let map = spec.address_map(half);
    c::quantkv_address_map {
        block_stride: map.block_stride as i64,
        head_stride: map.head_stride as i64,
        slot_stride: map.slot_stride as i64,
        chunk: map.chunk as i64,
        chunk_stride: map.chunk_stride as i64,
    }
}

/// A small generator: seeds of shuffles and samples, the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Everything the calls of one shape need.
pub struct Case<'d> {
    device: &'d Device,
    shape: Shape,
    spec: CacheSpec,
    pools: usize,
    blocks: usize,
    half_bytes: usize,
    arena: Buffer,
    dynamic: Option<Buffer>,
    scale: Buffer,
    tables: Buffer,
    host_tables: Vec<i32>,
    table_stride: usize,
    query: Buffer,
    output: Buffer,
    query_starts: Buffer,
    seq_lens: Buffer,
    workspace: Buffer,
    workspace_bytes: usize,
    faults: Buffer,
    kernel: c_int,
}

/// Static scales, so that folding them is part of what is timed.
const SCALE: [f32; 2] = [0.75, 1.25];

impl<'d> Case<'d> {
    /// Makes the data of a shape. `pool_bytes`: caches are added until they hold this much.
    pub fn new(device: &'d Device, shape: Shape, kernel: c_int, pool_bytes: usize) -> Outcome<Case<'d>> {
        let spec = shape.spec()?;
        let format = code_of(shape.format)?;
        let per_seq: Vec<usize> = shape.lens.iter().map(|len| len.div_ceil(shape.block)).collect();
        let blocks: usize = per_seq.iter().sum();
        let elements = blocks * shape.block * shape.kv_heads * shape.dim;
        let half_bytes = elements * shape.format.bytes();
        let budget = device.free_bytes()? / 2;
        if 2 * half_bytes > budget {
            return Err(format!("{} MB of cache do not fit in half of the free memory", half_bytes >> 19));
        }
        let wanted = (pool_bytes.div_ceil(2 * half_bytes) + 1).clamp(3, 128);
        let pools = wanted.min(budget / (2 * half_bytes)).max(1);

        let mut random = Random::new(blocks as u64);
        let table_stride = per_seq.iter().copied().max().unwrap_or(1);
        let mut host_tables = vec![0i32; pools * shape.lens.len() * table_stride];
        for pool in host_tables.chunks_exact_mut(shape.lens.len() * table_stride) {
            let mut ids: Vec<i32> = (0..blocks as i32).collect();
            random.shuffle(&mut ids);
            let mut ids = ids.into_iter();
            for (row, &count) in pool.chunks_exact_mut(table_stride).zip(&per_seq) {
                row[..count].iter_mut().for_each(|id| *id = ids.next().unwrap_or(0));
            }
        }
        let starts: Vec<i32> = (0..=shape.lens.len()).map(|seq| (seq * shape.queries) as i32).collect();
        let lens: Vec<i32> = shape.lens.iter().map(|&len| len as i32).collect();
        let tokens = shape.lens.len() * shape.queries;
        let row = shape.kv_heads * shape.group * shape.dim;
        // The rows of K and of V, in this order; near one, as a calibrated cache has them.
        let dynamic = if shape.dynamic {
            let rows = 2 * blocks * shape.kv_heads * shape.block;
            let scales: Vec<f32> = (0..rows).map(|_| 0.5 + random.below(1024) as f32 / 1024.0).collect();
            Some(device.upload(&scales)?)
        } else {
            None
        };
        let mut case = Case {
            pools,
            blocks,
            half_bytes,
            arena: device.random(2 * pools * elements, format, 1)?,
            dynamic,
            scale: device.upload(&SCALE)?,
            tables: device.upload(&host_tables)?,
            host_tables,
            table_stride,
            query: device.random(tokens * row, c::QUANTKV_BF16, 2)?,
            output: device.poisoned(tokens * row * 2)?,
            query_starts: device.upload(&starts)?,
            seq_lens: device.upload(&lens)?,
            workspace: device.zeroed(16)?,
            workspace_bytes: 0,
            faults: device.zeroed(4)?,
            kernel,
            device,
            shape,
            spec,
        };
        let mut bytes = 0usize;
        // SAFETY: the struct lives through the call, `bytes` is a place for the answer.
        let status = unsafe { c::quantkv_cuda_paged_attention_workspace_bytes(&case.op(0, false), &mut bytes) };
        checked("workspace", status)?;
        case.workspace = device.poisoned(bytes)?;
        case.workspace_bytes = bytes;
        Ok(case)
    }

    fn half(&self, pool: usize, half: Half) -> c::quantkv_half {
        let which = usize::from(half == Half::V);
        let rows = self.blocks * self.shape.kv_heads * self.shape.block;
        c::quantkv_half {
            codes: self.arena.at((2 * pool + which) * self.half_bytes),
            dynamic: self.dynamic.as_ref().map_or(std::ptr::null_mut(), |scales| scales.at(which * rows * 4)),
            scale: c::quantkv_scale { values: self.scale.at::<f32>(which * 4), head_stride: 0, channel_stride: 0 },
            map: map_of(&self.spec, half),
            format: code_of(self.shape.format).unwrap_or(-1),
            head_dim: self.shape.dim as i32,
        }
    }

    /// The call over one of the caches.
    fn op(&self, pool: usize, plan_is_ready: bool) -> c::quantkv_paged_attention {
        let heads = self.shape.kv_heads * self.shape.group;
        let dim = self.shape.dim as i64;
        let rows = |buffer: &Buffer| c::quantkv_rows {
            data: buffer.pointer(),
            token_stride: heads as i64 * dim,
            head_stride: dim,
        };
        c::quantkv_paged_attention {
            cache: c::quantkv_cache {
                k: self.half(pool, Half::K),
                v: self.half(pool, Half::V),
                num_blocks: self.blocks as i64,
                block_size: self.shape.block as i32,
                num_kv_heads: self.shape.kv_heads as i32,
                faults: self.faults.pointer(),
            },
            query: rows(&self.query),
            output: rows(&self.output),
            lse: std::ptr::null_mut(),
            query_starts: self.query_starts.pointer(),
            seq_lens: self.seq_lens.pointer(),
            block_tables: self.tables.at::<i32>(pool * self.shape.lens.len() * self.table_stride * 4),
            block_table_stride: self.table_stride as i64,
            num_seqs: self.shape.lens.len() as i64,
            num_tokens: (self.shape.lens.len() * self.shape.queries) as i64,
            num_heads: heads as i32,
            activation: c::QUANTKV_BF16,
            softmax_scale: self.softmax_scale(),
            soft_cap: self.shape.soft_cap(),
            sliding_window: 0,
            alibi_slopes: std::ptr::null(),
            sinks: std::ptr::null(),
            workspace: self.workspace.pointer(),
            workspace_bytes: self.workspace_bytes,
            plan_is_ready: i32::from(plan_is_ready),
            kernel: self.kernel,
            max_query_len: self.shape.queries as i64,
        }
    }

    /// Weights a few times larger than 1/n: a key read twice or left out changes the result.
    fn softmax_scale(&self) -> f32 {
        6.0 / (self.shape.dim as f32).sqrt()
    }

    pub fn run(&self, pool: usize, plan_is_ready: bool) -> Outcome<()> {
        // SAFETY: every pointer is device memory of the size the struct says, alive until the stream is waited for.
        let status =
            unsafe { c::quantkv_cuda_paged_attention(&self.op(pool, plan_is_ready), self.device.raw_stream()) };
        checked("paged_attention", status)
    }

    /// Compares some rows of the output with attention in f64 over the same bytes: ‖out - ref‖ / ‖ref‖ of the worst.
    pub fn verify(&self) -> Outcome<f64> {
        self.run(0, false)?;
        self.device.wait()?;
        let mut fault = [0u32];
        self.device.download(&self.faults, 0, &mut fault)?;
        if fault != [0] {
            return Err(format!("faults {:#x} over sound tables", fault[0]));
        }
        let mut random = Random::new(self.shape.lens.len() as u64 + 7);
        let (seqs, heads) = (self.shape.lens.len(), self.shape.kv_heads * self.shape.group);
        let mut worst = 0f64;
        for sample in 0..4 {
            let seq = if sample == 0 { 0 } else { random.below(seqs) };
            let (query, head) = (random.below(self.shape.queries), random.below(heads));
            let at = ((seq * self.shape.queries + query) * heads + head) * self.shape.dim;
            let mut got = vec![0u16; self.shape.dim];
            self.device.download(&self.output, at * 2, &mut got)?;
            let want = self.reference(seq, query, head)?;
            let (mut difference, mut size) = (0.0, 0.0);
            for (&got, want) in got.iter().zip(&want) {
                difference += (f64::from(bf16::from_bits(got)) - want).powi(2);
                size += want * want;
            }
            let error = (difference / size).sqrt();
            // bf16 keeps 2^-9 of each output; bf16 or f16 weights add a little less. A page left out is far above.
            if error.is_nan() || error > 8e-3 {
                return Err(format!("row (sequence {seq}, query {query}, head {head}) is off by {error:.2e}"));
            }
            worst = worst.max(error);
        }
        Ok(worst)
    }

    /// One output row in f64.
    fn reference(&self, seq: usize, query: usize, head: usize) -> Outcome<Vec<f64>> {
        let Shape { dim, block, kv_heads, group, queries, format, .. } = self.shape;
        let (bytes, kv_head) = (format.bytes(), head / group);
        let visible = self.shape.lens[seq] - queries + query + 1;
        let block_bytes = self.half_bytes / self.blocks;
        let mut q = vec![0u16; dim];
        let at = ((seq * queries + query) * kv_heads * group + head) * dim;
        self.device.download(&self.query, at * 2, &mut q)?;
        let q: Vec<f64> = q.into_iter().map(|bits| f64::from(bf16::from_bits(bits))).collect();

        let (mut scores, mut values) = (vec![], vec![]);
        let mut page = vec![0u8; block_bytes];
        for (half, scale) in [(Half::K, SCALE[0]), (Half::V, SCALE[1])] {
            let map = map_of(&self.spec, half);
            let scale = if format.is_quantized() { f64::from(scale) } else { 1.0 };
            for first in (0..visible).step_by(block) {
                let id = self.host_tables[seq * self.table_stride + first / block] as usize;
                let offset = usize::from(half == Half::V) * self.half_bytes + id * block_bytes;
                self.device.download(&self.arena, offset, &mut page)?;
                let dynamic = self.dynamic_rows(half, id, kv_head)?;
                for (slot, dynamic) in dynamic.iter().enumerate().take(visible - first) {
                    let value = |d: usize| {
                        let at = kv_head as i64 * map.head_stride
                            + slot as i64 * map.slot_stride
                            + (d as i64 / map.chunk) * map.chunk_stride
                            + d as i64 % map.chunk;
                        decode(format, &page[at as usize * bytes..]) * scale * dynamic
                    };
                    match half {
                        Half::K => scores.push((0..dim).map(|d| q[d] * value(d)).sum::<f64>()),
                        Half::V => values.push((0..dim).map(value).collect::<Vec<f64>>()),
                    }
                }
            }
        }
        let (softmax_scale, cap) = (f64::from(self.softmax_scale()), f64::from(self.shape.soft_cap()));
        for score in &mut scores {
            *score *= softmax_scale;
            if cap > 0.0 {
                *score = cap * (*score / cap).tanh();
            }
        }
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let column = |d: usize| weights.iter().zip(&values).map(|(weight, row)| weight * row[d]).sum::<f64>() / total;
        Ok((0..dim).map(column).collect())
    }

    /// The dynamic scales of a (block, head), or ones.
    fn dynamic_rows(&self, half: Half, block: usize, head: usize) -> Outcome<Vec<f64>> {
        let mut rows = vec![1f32; self.shape.block];
        if let Some(scales) = &self.dynamic {
            let first = usize::from(half == Half::V) * self.blocks + block;
            let at = (first * self.shape.kv_heads + head) * self.shape.block;
            self.device.download(scales, at * 4, &mut rows)?;
        }
        Ok(rows.into_iter().map(f64::from).collect())
    }

    /// Times the call: with the plan ready, as all layers of a step but the first have it, or made anew.
    pub fn time(&self, plan_is_ready: bool) -> Outcome<Timing> {
        self.run(0, false)?;
        self.device.time(launches_for(self.shape.bytes(), self.pools), |i| self.run(i % self.pools, plan_is_ready))
    }

    /// A row of the report.
    pub fn row(&self, operation: &'static str, timing: Timing, error: f64) -> Outcome<Row> {
        let bytes = self.shape.bytes();
        // Many queries make arithmetic the limit.
        let many = self.shape.queries > 16;
        let ceiling = if many { None } else { Some(self.device.read_ceiling(&self.arena, bytes)?) };
        let flops = many.then(|| self.shape.flops());
        let format = self.shape.format;
        let series = if self.shape.dynamic { format!("{format} dynamic") } else { format.to_string() };
        Ok(Row { operation, shape: self.shape.name(), series, timing, bytes, ceiling, flops, error })
    }
}
