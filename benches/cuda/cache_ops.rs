//! The operations that move bytes: `cache_write`, `copy_blocks`, `swap_blocks`.
//!
//! `cache_write` and `copy_blocks` are held against a plain copy that moves as many bytes, `swap_blocks`
//! against one large copy between page-locked and device memory. Bytes are compared before timing.

use std::ffi::{c_int, c_void};

use half::bf16;
use quantkv::codec::{Codec, E4M3, E5M2, PlainBF16};
use quantkv::layout::Half;
use quantkv::raw::bindings as c;
use quantkv::{CacheLayout, CacheSpec, KvFormat};

use crate::attention::{Random, code_of, map_of};
use crate::device::{Buffer, Device, Outcome, Pinned, Timing, checked, launches_for};
use crate::report::Row;

/// Tokens written into pages of 16, 8 KV heads of 128.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub tokens: usize,
    pub format: KvFormat,
    pub layout: CacheLayout,
    pub dynamic: bool,
}

const HEADS: usize = 8;
const DIM: usize = 128;
const BLOCK: usize = 16;
const SCALE: [f32; 2] = [0.02, 0.03];

impl Write {
    pub fn name(&self) -> String {
        let Write { tokens, format, layout, dynamic } = self;
        format!(
            "{format} {tokens} tokens {HEADS} heads d{DIM} page{BLOCK} {layout}{}",
            if *dynamic { " dynamic" } else { "" }
        )
    }

    /// bf16 rows read, codes written, slots read, scales of rows written.
    fn bytes(&self) -> usize {
        let row = DIM * (2 + self.format.bytes()) + if self.dynamic { 4 } else { 0 };
        self.tokens * (2 * HEADS * row + 8)
    }

    pub fn measure(&self, device: &Device, verify_only: bool) -> Outcome<Option<Row>> {
        let mut spec = CacheSpec::new(HEADS, DIM, BLOCK, self.format)
            .and_then(|spec| spec.with_layout(self.layout))
            .map_err(|error| error.to_string())?;
        if self.dynamic {
            spec = spec.with_dynamic_scales().map_err(|error| error.to_string())?;
        }
        let pools = if verify_only { 1 } else { (200_000_000 / self.bytes() + 1).clamp(3, 128) };
        let blocks = self.tokens.div_ceil(BLOCK);
        let row = HEADS * DIM;
        let half_bytes = blocks * BLOCK * row * self.format.bytes();
        let rows = device.random(2 * pools * self.tokens * row, c::QUANTKV_BF16, 5)?;
        let codes = device.poisoned(2 * pools * half_bytes)?;
        let scale_rows = blocks * HEADS * BLOCK;
        let dynamic = device.poisoned(if self.dynamic { 2 * pools * scale_rows * 4 } else { 16 })?;
        let scale = device.upload(&SCALE)?;
        let faults = device.zeroed(4)?;
        // Pages in no order, tokens of a page in order: a prefill.
        let mut order: Vec<i64> = (0..blocks as i64).collect();
        Random::new(9).shuffle(&mut order);
        let slots: Vec<i64> =
            (0..self.tokens).map(|token| order[token / BLOCK] * BLOCK as i64 + (token % BLOCK) as i64).collect();
        let slot_mapping = device.upload(&slots)?;
        let format = code_of(self.format)?;
        let half = |pool: usize, half: Half| {
            let which = usize::from(half == Half::V);
            c::quantkv_half {
                codes: codes.at((2 * pool + which) * half_bytes),
                dynamic: if self.dynamic {
                    dynamic.at((2 * pool + which) * scale_rows * 4)
                } else {
                    std::ptr::null_mut()
                },
                scale: c::quantkv_scale { values: scale.at::<f32>(which * 4), head_stride: 0, channel_stride: 0 },
                map: map_of(&spec, half),
                format,
                head_dim: DIM as i32,
            }
        };
        let input = |pool: usize, which: usize| c::quantkv_rows {
            data: rows.at((2 * pool + which) * self.tokens * row * 2),
            token_stride: row as i64,
            head_stride: DIM as i64,
        };
        let run = |pool: usize| {
            let op = c::quantkv_cache_write {
                cache: c::quantkv_cache {
                    k: half(pool, Half::K),
                    v: half(pool, Half::V),
                    num_blocks: blocks as i64,
                    block_size: BLOCK as i32,
                    num_kv_heads: HEADS as i32,
                    faults: faults.pointer(),
                },
                key: input(pool, 0),
                value: input(pool, 1),
                slot_mapping: slot_mapping.pointer(),
                num_tokens: self.tokens as i64,
                activation: c::QUANTKV_BF16,
            };
            // SAFETY: every pointer is device memory of the size the struct says, alive until the stream is waited for.
            checked("cache_write", unsafe { c::quantkv_cuda_cache_write(&op, device.raw_stream()) })
        };
        run(0)?;
        device.wait()?;
        self.verify(device, &spec, &slots, [&rows, &codes, &dynamic], half_bytes, scale_rows)?;
        if verify_only {
            return Ok(None);
        }
        let timing = device.time(launches_for(self.bytes(), pools), |i| run(i % pools))?;
        let ceiling = Some(device.copy_ceiling(self.bytes())?);
        let series = self.format.to_string();
        let (bytes, shape) = (self.bytes(), self.name());
        Ok(Some(Row { operation: "cache_write", shape, series, timing, bytes, ceiling, flops: None, error: 0.0 }))
    }

    /// A sample of rows, bit for bit against the crate's own codec.
    fn verify(
        &self,
        device: &Device,
        spec: &CacheSpec,
        slots: &[i64],
        [rows, codes, dynamic]: [&Buffer; 3],
        half_bytes: usize,
        scale_rows: usize,
    ) -> Outcome<()> {
        let mut random = Random::new(11);
        let bytes = self.format.bytes();
        for sample in 0..16 {
            let token = if sample == 0 { self.tokens - 1 } else { random.below(self.tokens) };
            let (head, which) = (random.below(HEADS), random.below(2));
            let (half, static_scale) = ([Half::K, Half::V][which], SCALE[which]);
            let mut x = vec![0u16; DIM];
            device.download(rows, ((which * self.tokens + token) * HEADS + head) * DIM * 2, &mut x)?;
            let x: Vec<f32> = x.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect();
            let (block, slot) = (slots[token] / BLOCK as i64, slots[token] % BLOCK as i64);
            let map = map_of(spec, half);
            let mut scale = static_scale;
            if self.dynamic {
                let absmax = x.iter().map(|x| (x / static_scale).abs()).fold(0.0, f32::max);
                let largest: f32 = if self.format == KvFormat::Fp8E5M2 { 57344.0 } else { 448.0 };
                let want = (absmax / largest).max(f32::MIN_POSITIVE);
                let mut got = [0f32];
                let at = (block as usize * HEADS + head) * BLOCK + slot as usize;
                device.download(dynamic, (which * scale_rows + at) * 4, &mut got)?;
                if got[0].to_bits() != want.to_bits() {
                    return Err(format!("dynamic scale of token {token}, head {head}: {}, not {want}", got[0]));
                }
                scale = static_scale * want;
            }
            for (d, &x) in x.iter().enumerate() {
                let at = block * map.block_stride
                    + head as i64 * map.head_stride
                    + slot * map.slot_stride
                    + (d as i64 / map.chunk) * map.chunk_stride
                    + d as i64 % map.chunk;
                let (mut got, mut want) = ([0u8; 4], [0u8; 4]);
                device.download(codes, which * half_bytes + at as usize * bytes, &mut got[..bytes])?;
                match self.format {
                    KvFormat::Fp8E4M3 => E4M3::store(x / scale, &mut want[..1]),
                    KvFormat::Fp8E5M2 => E5M2::store(x / scale, &mut want[..1]),
                    _ => PlainBF16::store(x, &mut want[..2]),
                }
                if got != want {
                    return Err(format!("token {token}, head {head}, channel {d}: {got:x?}, not {want:x?}"));
                }
            }
        }
        Ok(())
    }
}

/// `pairs` blocks of `block_bytes` copied in each of `tables` memories.
#[derive(Clone, Copy, Debug)]
pub struct CopyBlocks {
    pub pairs: usize,
    pub tables: usize,
    pub block_bytes: usize,
}

impl CopyBlocks {
    pub fn name(&self) -> String {
        format!("{} pairs in {} tables, blocks of {} KB", self.pairs, self.tables, self.block_bytes >> 10)
    }

    pub fn measure(&self, device: &Device, verify_only: bool) -> Outcome<Option<Row>> {
        let CopyBlocks { pairs, tables, block_bytes } = *self;
        let bytes = 2 * pairs * tables * block_bytes;
        // Each call has pairs of its own, until what was moved exceeds the caches.
        let sets = if verify_only { 1 } else { (200_000_000 / bytes + 1).clamp(2, 64) };
        let blocks = 2 * pairs * sets;
        let memory = device.random(blocks * tables * block_bytes, c::QUANTKV_FP8_E4M3, 4)?;
        let descriptors: Vec<c::quantkv_block_table_memory> = (0..tables)
            .map(|table| c::quantkv_block_table_memory {
                base: memory.at(table * blocks * block_bytes),
                block_stride_bytes: block_bytes as i64,
                block_bytes: block_bytes as i64,
            })
            .collect();
        let mut ids: Vec<i64> = (0..blocks as i64).collect();
        Random::new(13).shuffle(&mut ids);
        let (device_tables, device_pairs) = (device.upload(&descriptors)?, device.upload(&ids)?);
        let faults = device.zeroed(4)?;
        let run = |set: usize| {
            let op = c::quantkv_copy_blocks {
                tables: device_tables.pointer(),
                num_tables: tables as i64,
                pairs: device_pairs.at::<i64>(set * pairs * 16),
                num_pairs: pairs as i64,
                num_blocks: blocks as i64,
                max_block_bytes: block_bytes as i64,
                faults: faults.pointer(),
            };
            // SAFETY: every pointer is device memory of the size the struct says, alive until the stream is waited for.
            checked("copy_blocks", unsafe { c::quantkv_cuda_copy_blocks(&op, device.raw_stream()) })
        };
        run(0)?;
        device.wait()?;
        let mut random = Random::new(14);
        for _ in 0..16 {
            let (table, pair) = (random.below(tables), random.below(pairs));
            let block = |which: usize| {
                let mut data = vec![0u8; block_bytes];
                let at = (table * blocks + ids[2 * pair + which] as usize) * block_bytes;
                device.download(&memory, at, &mut data).map(|()| data)
            };
            if block(0)? != block(1)? {
                return Err(format!("pair {pair} of table {table} differs"));
            }
        }
        if verify_only {
            return Ok(None);
        }
        let timing = device.time(launches_for(bytes, sets), |i| run(i % sets))?;
        let ceiling = Some(device.copy_ceiling(bytes)?);
        let (shape, series) = (self.name(), "copy_blocks".into());
        Ok(Some(Row { operation: "copy_blocks", shape, series, timing, bytes, ceiling, flops: None, error: 0.0 }))
    }
}

/// Which way blocks go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    Out,
    In,
    Both,
}

/// `blocks` blocks of `block_bytes` between device and page-locked memory, in no order.
#[derive(Clone, Copy, Debug)]
pub struct Swap {
    pub blocks: usize,
    pub block_bytes: usize,
    pub way: Way,
}

impl Swap {
    pub fn name(&self) -> String {
        format!("{:?} {} blocks of {} KB, pinned", self.way, self.blocks, self.block_bytes >> 10)
    }

    pub fn measure(&self, device: &Device, verify_only: bool) -> Outcome<Option<Row>> {
        let Swap { blocks, block_bytes, way } = *self;
        let half = blocks * block_bytes;
        let (pool, host) = (device.random(2 * half, c::QUANTKV_FP8_E4M3, 6)?, device.pinned(2 * half)?);
        let second = device.context.new_stream().map_err(|error| error.to_string())?;
        let mut order: Vec<usize> = (0..blocks).collect();
        Random::new(15).shuffle(&mut order);
        // Out fills the first half of the host's memory from the first half of the pool, In the second halves.
        let pieces = |out: bool| -> Vec<c::quantkv_memory_copy> {
            let base = if out { 0 } else { half };
            let copy = |(i, &block): (usize, &usize)| {
                let in_pool = pool.at::<c_void>(base + block * block_bytes);
                let in_host = at(&host, base + i * block_bytes);
                let (dst, src) = if out { (in_host, in_pool) } else { (in_pool, in_host) };
                c::quantkv_memory_copy { dst, src, bytes: block_bytes as i64 }
            };
            order.iter().enumerate().map(copy).collect()
        };
        let whole = |out: bool| {
            let base = if out { 0 } else { half };
            let (in_pool, in_host) = (pool.at::<c_void>(base), at(&host, base));
            let (dst, src) = if out { (in_host, in_pool) } else { (in_pool, in_host) };
            vec![c::quantkv_memory_copy { dst, src, bytes: half as i64 }]
        };
        let (swap_out, swap_in, plain_out, plain_in) = (pieces(true), pieces(false), whole(true), whole(false));

        // SAFETY: the host memory is that large and nothing else uses it.
        let host_bytes = unsafe { std::slice::from_raw_parts_mut(host.pointer.cast::<u8>(), 2 * half) };
        host_bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
        for (copies, stream) in [(&swap_out, device.raw_stream()), (&swap_in, second.cu_stream().cast())] {
            swap(copies, stream)?;
        }
        device.wait()?;
        second.synchronize().map_err(|error| error.to_string())?;
        for (i, &block) in order.iter().enumerate().take(64) {
            for base in [0, half] {
                let mut in_pool = vec![0u8; block_bytes];
                device.download(&pool, base + block * block_bytes, &mut in_pool)?;
                if in_pool[..] != host_bytes[base + i * block_bytes..][..block_bytes] {
                    return Err(format!("block {block} differs"));
                }
            }
        }
        if verify_only {
            return Ok(None);
        }
        let time = |out: &[c::quantkv_memory_copy], into: &[c::quantkv_memory_copy]| -> Outcome<Timing> {
            device.time_directly(|| {
                if way != Way::Out {
                    second.join(&device.stream).map_err(|error| error.to_string())?;
                    let stream = if way == Way::Both { second.cu_stream().cast() } else { device.raw_stream() };
                    swap(into, stream)?;
                }
                if way != Way::In {
                    swap(out, device.raw_stream())?;
                }
                device.stream.join(&second).map_err(|error| error.to_string())
            })
        };
        let timing = time(&swap_out, &swap_in)?;
        let ceiling = Some(time(&plain_out, &plain_in)?.median);
        let bytes = half * if way == Way::Both { 2 } else { 1 };
        let (shape, series) = (self.name(), format!("{way:?}"));
        Ok(Some(Row { operation: "swap_blocks", shape, series, timing, bytes, ceiling, flops: None, error: 0.0 }))
    }
}

fn at(host: &Pinned, offset: usize) -> *mut c_void {
    // SAFETY: offsets are computed from the sizes the memory was made with.
    unsafe { host.pointer.cast::<u8>().add(offset).cast() }
}

fn swap(copies: &[c::quantkv_memory_copy], stream: *mut c_void) -> Outcome<()> {
    // SAFETY: the pieces lie inside memory that lives until the streams are waited for.
    let status: c_int = unsafe { c::quantkv_cuda_swap_blocks(copies.as_ptr(), copies.len(), stream) };
    checked("swap_blocks", status)
}
