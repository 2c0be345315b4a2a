//! Rows of stored elements between the cache's layouts and dense tiles.
//!
//! The SIMD codecs work on contiguous rows. Where the layout keeps a row contiguous (Hnd, Nhd)
//! they run on the cache in place; otherwise a few rows pass through a dense *tile*
//! `[slots, dim]` on the stack, which [`scatter`] and [`collect`] move as the layout asks:
//!
//! ```text
//! chunked (packed K)   16-byte pieces, block_size * 16 bytes apart
//! strided (packed V)   single elements, block_size elements apart: a tile transposes
//! ```

use crate::codec::ScaleRow;
use crate::cpu::CpuBackend;
use crate::format::KvFormat;
use crate::layout::{AddressMap, MAX_HEAD_DIM};
use crate::scale::ScaleRef;

/// Most slots in a tile.
pub(super) const TILE_SLOTS: usize = 16;

/// Stack space for one tile of the widest rows there are.
pub(super) struct Tile([u8; TILE_SLOTS * MAX_HEAD_DIM * 4]);

impl Tile {
    pub(super) fn new() -> Self {
        Tile([0; TILE_SLOTS * MAX_HEAD_DIM * 4])
    }

    /// The first `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[..len]
    }
}

/// Static scales whose rows the SIMD codecs can read in place.
#[derive(Clone, Copy)]
pub(super) struct ScaleRows<'a> {
    values: &'a [f32],
    head_stride: usize,
    per_channel: bool,
}

impl<'a> ScaleRows<'a> {
    /// `None` if the channels' scales lie apart (channel stride 2 or more), which the
    /// specification handles.
    pub(super) fn new(format: KvFormat, scale: &ScaleRef<'a, CpuBackend>) -> Option<Self> {
        if !format.is_quantized() {
            return Some(ScaleRows { values: &[1.0], head_stride: 0, per_channel: false });
        }
        let per_channel = match scale.strides.channel {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(ScaleRows { values: scale.values, head_stride: scale.strides.head, per_channel })
    }

    /// The scales of the `dim` channels of `head`.
    #[inline(always)]
    pub(super) fn row(&self, head: usize, dim: usize) -> ScaleRow<'a> {
        let first = head * self.head_stride;
        if self.per_channel {
            ScaleRow::Each(&self.values[first..first + dim])
        } else {
            ScaleRow::One(self.values[first])
        }
    }

    /// Whether all heads of `dim` channels together read as one row of `heads * dim`.
    pub(super) fn heads_merge(&self, dim: usize) -> bool {
        if self.per_channel { self.head_stride == dim } else { self.head_stride == 0 }
    }
}

/// Writes the tile's rows to slots `slot..` of one (block, head); `head` starts at that head.
pub(super) fn scatter(map: &AddressMap, size: usize, dim: usize, tile: &[u8], slot: usize, head: &mut [u8]) {
    if map.chunk > 1 {
        let (chunk, slot_bytes) = (map.chunk * size, map.slot_stride * size);
        for (i, row) in tile.chunks_exact(dim * size).enumerate() {
            for (c, piece) in row.chunks_exact(chunk).enumerate() {
                let at = c * map.chunk_stride * size + (slot + i) * slot_bytes;
                head[at..at + chunk].copy_from_slice(piece);
            }
        }
        return;
    }
    match size {
        1 => transpose_bytes(tile, dim, &mut head[slot..], map.chunk_stride),
        2 => transpose::<2>(tile, dim, &mut head[slot * 2..], map.chunk_stride),
        _ => transpose::<4>(tile, dim, &mut head[slot * 4..], map.chunk_stride),
    }
}

/// Reads slots `slot..` of one (block, head) into the tile's rows; `head` starts at that head.
pub(super) fn collect(map: &AddressMap, size: usize, dim: usize, head: &[u8], slot: usize, tile: &mut [u8]) {
    if map.chunk > 1 {
        let (chunk, slot_bytes) = (map.chunk * size, map.slot_stride * size);
        for (i, row) in tile.chunks_exact_mut(dim * size).enumerate() {
            for (c, piece) in row.chunks_exact_mut(chunk).enumerate() {
                let at = c * map.chunk_stride * size + (slot + i) * slot_bytes;
                piece.copy_from_slice(&head[at..at + chunk]);
            }
        }
        return;
    }
    let slots = tile.len() / (dim * size);
    let stride = map.chunk_stride;
    match size {
        1 => collect_bytes(&head[slot..], stride, slots, tile, dim),
        2 => collect_columns::<2>(&head[slot * 2..], stride, slots, tile, dim),
        _ => collect_columns::<4>(&head[slot * 4..], stride, slots, tile, dim),
    }
}

/// `dst[d, i] = src[i, d]` for rows of `dim` elements of `N` bytes; rows of `dst` are `stride`
/// elements apart.
fn transpose<const N: usize>(src: &[u8], dim: usize, dst: &mut [u8], stride: usize) {
    for (i, row) in src.chunks_exact(dim * N).enumerate() {
        for (d, element) in row.chunks_exact(N).enumerate() {
            let at = (d * stride + i) * N;
            dst[at..at + N].copy_from_slice(element);
        }
    }
}

/// `dst[i, d] = src[d, i]` for `slots` columns; rows of `src` are `stride` elements apart.
fn collect_columns<const N: usize>(src: &[u8], stride: usize, slots: usize, dst: &mut [u8], dim: usize) {
    for d in 0..dim {
        let column = &src[d * stride * N..][..slots * N];
        for (i, element) in column.chunks_exact(N).enumerate() {
            let at = (i * dim + d) * N;
            dst[at..at + N].copy_from_slice(element);
        }
    }
}

/// [`transpose`] of single bytes, 8 x 8 at a time in registers.
fn transpose_bytes(src: &[u8], dim: usize, dst: &mut [u8], stride: usize) {
    let slots = src.len() / dim;
    let (whole_slots, whole_dim) = (slots - slots % 8, dim - dim % 8);
    for i in (0..whole_slots).step_by(8) {
        for d in (0..whole_dim).step_by(8) {
            let rows = transpose_8x8(std::array::from_fn(|r| read_u64(src, (i + r) * dim + d)));
            for (r, row) in rows.iter().enumerate() {
                let at = (d + r) * stride + i;
                dst[at..at + 8].copy_from_slice(&row.to_le_bytes());
            }
        }
    }
    for i in 0..slots {
        let rest = if i < whole_slots { whole_dim } else { 0 };
        for d in rest..dim {
            dst[d * stride + i] = src[i * dim + d];
        }
    }
}

/// [`collect_columns`] of single bytes, 8 x 8 at a time in registers.
fn collect_bytes(src: &[u8], stride: usize, slots: usize, dst: &mut [u8], dim: usize) {
    let (whole_slots, whole_dim) = (slots - slots % 8, dim - dim % 8);
    for i in (0..whole_slots).step_by(8) {
        for d in (0..whole_dim).step_by(8) {
            let rows = transpose_8x8(std::array::from_fn(|r| read_u64(src, (d + r) * stride + i)));
            for (r, row) in rows.iter().enumerate() {
                let at = (i + r) * dim + d;
                dst[at..at + 8].copy_from_slice(&row.to_le_bytes());
            }
        }
    }
    for i in 0..slots {
        let rest = if i < whole_slots { whole_dim } else { 0 };
        for d in rest..dim {
            dst[i * dim + d] = src[d * stride + i];
        }
    }
}

#[inline(always)]
fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Transposes an 8 x 8 matrix of bytes, one row a word: swap the off-diagonal quarters of every
/// 2 x 2, 4 x 4 and 8 x 8 square in turn.
#[inline(always)]
pub(super) fn transpose_8x8(mut rows: [u64; 8]) -> [u64; 8] {
    for (step, mask) in [(1, 0x00ff_00ff_00ff_00ff_u64), (2, 0x0000_ffff_0000_ffff), (4, 0x0000_0000_ffff_ffff)] {
        let shift = 8 * step as u32;
        for i in (0..8).filter(|i| i & step == 0) {
            let (upper, lower) = (rows[i], rows[i + step]);
            rows[i] = (upper & mask) | ((lower & mask) << shift);
            rows[i + step] = ((upper >> shift) & mask) | (lower & !mask);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_bytes() {
        let rows: [u64; 8] = std::array::from_fn(|r| u64::from_le_bytes(std::array::from_fn(|c| (16 * r + c) as u8)));
        for (r, row) in transpose_8x8(rows).into_iter().enumerate() {
            assert_eq!(row.to_le_bytes(), std::array::from_fn(|c| (16 * c + r) as u8));
        }
    }
}
