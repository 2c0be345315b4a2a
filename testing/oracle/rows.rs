//! The operations that owe exact bytes: cache_write, copy and swap, gather, convert, absmax.
//!
//! A case is plain data; the function of the same name says what must come out. Activations are
//! f32 values that the case's dtype holds exactly. Division and products by scales are single f32
//! operations because the numerics contract makes them so.

use std::collections::HashSet;

use quantkv::args::{BlockPair, RowStrides};
use quantkv::layout::Half;
use quantkv::scale::Granularity;
use quantkv::{DType, Faults, KvFormat};

use super::formats::{bytes_of, largest, load, quantized, round_to, store};
use super::geometry::{Geometry, Layer, Scales};

/// A `[tokens, heads, dim]` tensor in a buffer that may be larger than it.
#[derive(Clone, Debug)]
pub struct Rows {
    pub data: Vec<f32>,
    pub strides: RowStrides,
}

impl Rows {
    pub fn at(&self, token: usize, head: usize, d: usize) -> f32 {
        self.data[token * self.strides.token + head * self.strides.head + d]
    }

    pub fn set(&mut self, token: usize, head: usize, d: usize, x: f32) {
        self.data[token * self.strides.token + head * self.strides.head + d] = x;
    }
}

#[derive(Clone, Debug)]
pub struct CacheWriteCase {
    pub geometry: Geometry,
    pub before: Layer,
    pub dtype: DType,
    pub key: Rows,
    pub value: Rows,
    pub slot_mapping: Vec<i64>,
    pub k_scale: Scales,
    pub v_scale: Scales,
}

impl CacheWriteCase {
    /// The same without the later ones of tokens that name one slot: of those a GPU may keep any.
    pub fn without_repeated_slots(&self) -> Self {
        let mut seen = HashSet::new();
        let slot_mapping = self.slot_mapping.iter().map(|&slot| if seen.insert(slot) { slot } else { -1 }).collect();
        CacheWriteCase { slot_mapping, ..self.clone() }
    }
}

/// The cache afterwards, gaps and tail included, and the faults.
pub fn cache_write(case: &CacheWriteCase) -> (Layer, Faults) {
    let (mut layer, mut faults) = (case.before.clone(), Faults::NONE);
    let geometry = &case.geometry;
    for (token, &slot) in case.slot_mapping.iter().enumerate() {
        if slot < 0 {
            continue;
        }
        if slot as u64 >= geometry.num_slots() as u64 {
            faults = faults.union(Faults::SLOT_OUT_OF_RANGE);
            continue;
        }
        let (block, offset) = (slot as usize / geometry.block_size, slot as usize % geometry.block_size);
        for (half, rows, scales) in [(Half::K, &case.key, &case.k_scale), (Half::V, &case.value, &case.v_scale)] {
            for head in 0..geometry.heads {
                let row: Vec<f32> = (0..geometry.dim(half)).map(|d| rows.at(token, head, d)).collect();
                write_row(geometry, &mut layer, half, (block, head, offset), &row, scales);
            }
        }
    }
    (layer, faults)
}

fn write_row(
    geometry: &Geometry,
    layer: &mut Layer,
    half: Half,
    (block, head, slot): (usize, usize, usize),
    row: &[f32],
    scales: &Scales,
) {
    let format = geometry.format(half);
    let mut dynamic = 1.0f32;
    if geometry.has_dynamic(half) {
        dynamic = dynamic_scale(row.iter().enumerate().map(|(d, x)| x / scales.at(head, d)), format);
        let at = geometry.dynamic_index(block, head, slot);
        layer.dynamic_mut(half).as_mut().unwrap()[at] = dynamic;
    }
    for (d, &x) in row.iter().enumerate() {
        let scaled = match (quantized(format), geometry.has_dynamic(half)) {
            (false, _) => x,
            (true, false) => x / scales.at(head, d),
            (true, true) => x / combined_scale(scales.at(head, d), dynamic),
        };
        layer.store(geometry, half, (block, head, slot, d), scaled);
    }
}

/// absmax / largest finite value; NaN ignored, infinity as `f32::MAX`, at least the smallest
/// normal f32.
fn dynamic_scale(row: impl Iterator<Item = f32>, format: KvFormat) -> f32 {
    let absmax = row.fold(0.0f32, running_max);
    let scale = absmax / largest(format).1;
    if scale < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { scale }
}

/// The f32 product, at least the smallest normal and at most the largest f32.
fn combined_scale(fixed: f32, dynamic: f32) -> f32 {
    (fixed * dynamic).clamp(f32::MIN_POSITIVE, f32::MAX)
}

fn running_max(running: f32, x: f32) -> f32 {
    let magnitude = if x.is_infinite() { f32::MAX } else { x.abs() };
    if magnitude > running { magnitude } else { running }
}

/// Duplicates blocks: bytes of every (head, slot, channel) and the dynamic scales.
pub fn copy_blocks(
    (src_geometry, src): (&Geometry, &Layer),
    (dst_geometry, dst): (&Geometry, &mut Layer),
    pairs: &[BlockPair],
) {
    let source = src.clone();
    for pair in pairs {
        let (from, to) = (pair.src as usize, pair.dst as usize);
        for half in [Half::K, Half::V] {
            for head in 0..src_geometry.heads {
                for slot in 0..src_geometry.block_size {
                    for d in 0..src_geometry.dim(half) {
                        let read = src_geometry.element(half, from, head, slot, d);
                        let write = dst_geometry.element(half, to, head, slot, d);
                        dst.bytes_mut(half)[write].copy_from_slice(&source.bytes(half)[read]);
                    }
                    if let (Some(read), Some(write)) = (source.dynamic(half), dst.dynamic_mut(half)) {
                        write[dst_geometry.dynamic_index(to, head, slot)] =
                            read[src_geometry.dynamic_index(from, head, slot)];
                    }
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
pub struct GatherCase {
    pub geometry: Geometry,
    pub layer: Layer,
    pub dtype: DType,
    pub k_scale: Scales,
    pub v_scale: Scales,
    pub tables: Vec<i32>,
    pub table_stride: usize,
    pub cu_seq_lens: Vec<i32>,
    pub starts: Option<Vec<i32>>,
    pub num_tokens: usize,
    /// The outputs' layout, and what they hold before.
    pub key: Rows,
    pub value: Rows,
}

/// An output row and the (block, slot) it comes from.
type Source = (usize, Option<(usize, usize)>);

/// Where each claimed row comes from, `None` for a position before its
/// sequence, past its row of the table or in a block outside the cache; and whether a sequence was
/// skipped for its bounds.
pub fn gather_sources(case: &GatherCase) -> (Vec<Source>, bool) {
    let (mut sources, mut skipped, mut claimed) = (Vec::new(), false, 0);
    for s in 0..case.cu_seq_lens.len() - 1 {
        let (first, last) = (i64::from(case.cu_seq_lens[s]), i64::from(case.cu_seq_lens[s + 1]));
        if first < claimed || last < first || last > case.num_tokens as i64 {
            skipped = true;
            continue;
        }
        claimed = last;
        let start = case.starts.as_ref().map_or(0, |starts| i64::from(starts[s]));
        for row in first..last {
            sources.push((row as usize, slot_at(case, s, start + row - first)));
        }
    }
    (sources, skipped)
}

fn slot_at(case: &GatherCase, s: usize, position: i64) -> Option<(usize, usize)> {
    let position = usize::try_from(position).ok()?;
    let logical = position / case.geometry.block_size;
    if logical >= case.table_stride {
        return None;
    }
    let block = usize::try_from(case.tables[s * case.table_stride + logical]).ok()?;
    (block < case.geometry.num_blocks).then_some((block, position % case.geometry.block_size))
}

/// Checks the faults of a gather: a row without a source and a skipped sequence each owe one.
pub fn check_gather_faults(case: &GatherCase, got: Faults) -> Result<(), String> {
    let (sources, skipped) = gather_sources(case);
    let bad_row = sources.iter().any(|(_, source)| source.is_none());
    if got.is_empty() == (bad_row || skipped) {
        return Err(format!("faults are {got}; rows without a source: {bad_row}, sequences skipped: {skipped}"));
    }
    if skipped && !got.contains(Faults::QUERY_START_OUT_OF_RANGE) {
        return Err(format!("faults are {got}; a sequence with bad bounds was skipped"));
    }
    Ok(())
}

/// Dense keys and values.
pub fn gather(case: &GatherCase) -> (Rows, Rows) {
    let (mut key, mut value) = (case.key.clone(), case.value.clone());
    let geometry = &case.geometry;
    for (row, source) in gather_sources(case).0 {
        for (half, rows, scales) in [(Half::K, &mut key, &case.k_scale), (Half::V, &mut value, &case.v_scale)] {
            for head in 0..geometry.heads {
                for d in 0..geometry.dim(half) {
                    let x = source.map_or(0.0, |(block, slot)| {
                        let code = case.layer.load(geometry, half, (block, head, slot, d));
                        match (quantized(geometry.format(half)), geometry.has_dynamic(half)) {
                            (false, _) => code,
                            (true, false) => code * scales.at(head, d),
                            (true, true) => {
                                let dynamic = case.layer.dynamic_scale(geometry, half, (block, head, slot));
                                code * combined_scale(scales.at(head, d), dynamic)
                            }
                        }
                    });
                    rows.set(row, head, d, round_to(case.dtype, x.into()));
                }
            }
        }
    }
    (key, value)
}

/// Dense codes of K and V over `fill`, with `tail` bytes behind that stay.
pub fn gather_bytes(case: &GatherCase, fill: u8, tail: usize) -> [Vec<u8>; 2] {
    let geometry = &case.geometry;
    [Half::K, Half::V].map(|half| {
        let bytes = bytes_of(geometry.format(half));
        let (heads, dim) = (geometry.heads, geometry.dim(half));
        let mut out = vec![fill; case.num_tokens * heads * dim * bytes + tail];
        for (row, source) in gather_sources(case).0 {
            for head in 0..heads {
                for d in 0..dim {
                    let to = ((row * heads + head) * dim + d) * bytes;
                    match source {
                        Some((block, slot)) => {
                            let from = geometry.element(half, block, head, slot, d);
                            out[to..to + bytes].copy_from_slice(&case.layer.bytes(half)[from]);
                        }
                        None => out[to..to + bytes].fill(0),
                    }
                }
            }
        }
        out
    })
}

#[derive(Clone, Debug)]
pub struct ConvertCase {
    pub tokens: usize,
    pub heads: usize,
    pub dim: usize,
    pub format: KvFormat,
    pub dtype: DType,
    pub scale: Scales,
    /// Input of quantize, prior content of dequantize's output.
    pub rows: Rows,
    /// Input of dequantize, prior content of quantize's output; may be longer than needed.
    pub codes: Vec<u8>,
}

/// The codes afterwards.
pub fn quantize(case: &ConvertCase) -> Vec<u8> {
    let (mut codes, bytes) = (case.codes.clone(), bytes_of(case.format));
    for_rows(case, |token, head, d, at| {
        let x = case.rows.at(token, head, d);
        let scaled = if quantized(case.format) { x / case.scale.at(head, d) } else { x };
        store(case.format, scaled, &mut codes[at * bytes..(at + 1) * bytes]);
    });
    codes
}

/// The rows afterwards.
pub fn dequantize(case: &ConvertCase) -> Rows {
    let (mut rows, bytes) = (case.rows.clone(), bytes_of(case.format));
    for_rows(case, |token, head, d, at| {
        let code = load(case.format, &case.codes[at * bytes..(at + 1) * bytes]);
        let x = if quantized(case.format) { code * case.scale.at(head, d) } else { code };
        rows.set(token, head, d, round_to(case.dtype, x.into()));
    });
    rows
}

fn for_rows(case: &ConvertCase, mut each: impl FnMut(usize, usize, usize, usize)) {
    for token in 0..case.tokens {
        for head in 0..case.heads {
            for d in 0..case.dim {
                each(token, head, d, (token * case.heads + head) * case.dim + d);
            }
        }
    }
}

/// Running maxima after `rows` (`[tokens, heads, dim]`) went by.
pub fn absmax(
    rows: &Rows,
    (tokens, heads, dim): (usize, usize, usize),
    granularity: Granularity,
    running: &[f32],
) -> Vec<f32> {
    let mut running = running.to_vec();
    for token in 0..tokens {
        for head in 0..heads {
            for d in 0..dim {
                let at = match granularity {
                    Granularity::Tensor => 0,
                    Granularity::Head => head,
                    Granularity::Channel => head * dim + d,
                };
                running[at] = running_max(running[at], rows.at(token, head, d));
            }
        }
    }
    running
}

/// `absmax / divisor`, at least the smallest normal f32; 1.0 where nothing but zeros was seen.
pub fn update_scale(absmax: f32, divisor: f32) -> f32 {
    if absmax == 0.0 { 1.0 } else { (absmax / divisor).max(f32::MIN_POSITIVE) }
}
