//! The rows of a tile: where the block table says they are, which have none; gathered where a layout
//! packs them, with their dynamic scales.

use super::kernels::{PAD, Rows, TILE};
use super::panel::Slots;
use super::tile::{Context, Span};
use crate::cpu::ragged::checked_block;
use crate::cpu::rows::transpose_8x8;
use crate::faults::FaultWord;
use crate::layout::{Half, MAX_HEAD_DIM};

/// What a position without a row points at: code 0 is zero in every format.
#[repr(align(64))]
struct Zeros([u8; 4 * MAX_HEAD_DIM]);
static ZEROS: Zeros = Zeros([0; 4 * MAX_HEAD_DIM]);

/// A tile: where the rows of positions `start..start+len` are, and which have none.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) k: Rows,
    pub(super) v: Rows,
    pub(super) bad: u64,
    pub(super) start: usize,
    pub(super) len: usize,
}

/// Calls `f(offset in tile, table entry, slot, length)` for each run of positions in one block.
#[inline(always)]
fn for_each_run(ctx: &Context<'_>, span: &Span, start: usize, len: usize, mut f: impl FnMut(usize, i32, usize, usize)) {
    let block_size = ctx.shape.spec.block_size;
    let table = &ctx.block_tables[span.seq * ctx.block_table_stride..][..ctx.block_table_stride];
    // One division, not two a run: they would take longer than the rest of a short run.
    let (mut logical, mut slot) = (start / block_size, start % block_size);
    let mut done = 0;
    while done < len {
        let run = (block_size - slot).min(len - done);
        f(done, table[logical], slot, run);
        (logical, slot) = (logical + 1, 0);
        done += run;
    }
}

/// The block an entry that `find` has checked names.
fn valid_block(ctx: &Context<'_>, entry: i32) -> Option<usize> {
    usize::try_from(entry).ok().filter(|&block| block < ctx.shape.num_blocks)
}

/// The rows of positions `start..end`, at most a tile of them. No query sees those before `first`.
pub(super) fn find(ctx: &Context<'_>, span: &Span, start: usize, first: usize, end: usize) -> Found {
    let zeros = ZEROS.0.as_ptr();
    let len = end.saturating_sub(start).min(TILE);
    let mut found = Found { k: [zeros; TILE], v: [zeros; TILE], bad: 0, start, len };
    let side = |half: Half, cache: &[u8], is_packed: bool| {
        let (mut map, bytes) = (*ctx.shape.map(half), ctx.shape.spec.format(half).bytes());
        if is_packed {
            // Nobody reads these rows, see `unpack`. They are the memory of a block's slots in pieces of a row's size, to be
            // prefetched as rows are.
            map.slot_stride = ctx.shape.spec.head_dim(half);
        }
        (cache.as_ptr().wrapping_add(span.kv_head * map.head_stride * bytes), map, bytes)
    };
    let (k, k_map, k_bytes) = side(Half::K, ctx.cache.k, ctx.packed.k);
    let (v, v_map, v_bytes) = side(Half::V, ctx.cache.v, ctx.packed.v);
    let unseen = FaultWord::default();
    for_each_run(ctx, span, start, len, |at, entry, slot, run| {
        let faults = if start + at + run > first { &ctx.faults } else { &unseen };
        match checked_block(entry, ctx.shape.num_blocks, faults) {
            // Validation made every (block, head, slot) row lie in its buffer.
            Some(block) => {
                let k = k.wrapping_add((block * k_map.block_stride + slot * k_map.slot_stride) * k_bytes);
                let v = v.wrapping_add((block * v_map.block_stride + slot * v_map.slot_stride) * v_bytes);
                for (i, row) in found.k[at..at + run].iter_mut().enumerate() {
                    *row = k.wrapping_add(i * k_map.slot_stride * k_bytes);
                }
                for (i, row) in found.v[at..at + run].iter_mut().enumerate() {
                    *row = v.wrapping_add(i * v_map.slot_stride * v_bytes);
                }
            }
            None => {
                found.bad |= (u64::MAX >> (64 - run)) << at;
            }
        }
    });
    found
}

/// Gathers the codes of a packed layout into rows in `codes`, and points `rows` at them.
pub(super) fn unpack(ctx: &Context<'_>, span: &Span, half: Half, found: &Found, codes: &mut [f32], rows: &mut Rows) {
    let spec = &ctx.shape.spec;
    let (map, bytes, dim) = (ctx.shape.map(half), spec.format(half).bytes(), spec.head_dim(half));
    let src = match half {
        Half::K => ctx.cache.k,
        Half::V => ctx.cache.v,
    };
    let stride = 4 * dim.next_multiple_of(PAD);
    // SAFETY: any bytes are valid f32 and any f32 valid bytes; the length is the same.
    let codes = unsafe { std::slice::from_raw_parts_mut(codes.as_mut_ptr().cast::<u8>(), codes.len() * 4) };
    for_each_run(ctx, span, found.start, found.len, |at, entry, slot, run| {
        let Some(block) = valid_block(ctx, entry) else { return };
        // V: 16 bytes of slots of many channels at a time, or 8 x 8 bytes. Slots past `run` are read with their neighbours, and
        // land in rows nothing points at.
        let (slots, mut done) = (16 / bytes, 0);
        let whole = slot.is_multiple_of(slots) && spec.block_size.is_multiple_of(slots);
        if map.chunk == 1 && map.slot_stride == 1 && bytes <= 2 && whole {
            for i in (0..run).step_by(slots) {
                let first = map.index(block, span.kv_head, slot + i, 0) * bytes;
                let (src_stride, wide) = (map.chunk_stride * bytes, bytes == 2);
                let src = src[first..][..(dim - 1) * src_stride + 16].as_ptr();
                let dst = codes[(at + i) * stride..][..(slots - 1) * stride + dim * bytes].as_mut_ptr();
                let op = Slots { src, src_stride, channels: dim, wide, dst, dst_stride: stride };
                // SAFETY: the slices are what it reads and writes.
                done = unsafe { (ctx.kernels.v.transpose_slots)(&op) };
            }
        }
        let narrow = if map.chunk * bytes == 1 { dim - dim % 8 } else { 0 };
        for d in (done..narrow).step_by(8) {
            for i in (0..run).step_by(8) {
                let first = map.index(block, span.kv_head, slot + i, d);
                copy_transposed(&src[first..], map.chunk_stride, &mut codes[(at + i) * stride + d..], stride);
            }
        }
        for chunk in done.max(narrow) / map.chunk..dim / map.chunk {
            let first = map.index(block, span.kv_head, slot, chunk * map.chunk) * bytes;
            let width = map.chunk * bytes;
            let src = &src[first..][..(run - 1) * map.slot_stride * bytes + width];
            let dst = &mut codes[at * stride + chunk * width..];
            match width {
                16 => copy_pieces::<16>(src, dst, run, map.slot_stride * bytes, stride),
                4 => copy_pieces::<4>(src, dst, run, map.slot_stride * bytes, stride),
                2 => copy_pieces::<2>(src, dst, run, map.slot_stride * bytes, stride),
                _ => copy_pieces::<1>(src, dst, run, map.slot_stride * bytes, stride),
            }
        }
        for (i, row) in rows[at..at + run].iter_mut().enumerate() {
            *row = codes[(at + i) * stride..].as_ptr();
        }
    });
}

/// Copies `n` pieces of `WIDTH` bytes from one stride to another.
#[inline(always)]
fn copy_pieces<const WIDTH: usize>(src: &[u8], dst: &mut [u8], n: usize, src_stride: usize, dst_stride: usize) {
    for i in 0..n {
        dst[i * dst_stride..][..WIDTH].copy_from_slice(&src[i * src_stride..][..WIDTH]);
    }
}

/// `dst[j][i] = src[i][j]` for 8 x 8 bytes.
#[inline(always)]
fn copy_transposed(src: &[u8], src_stride: usize, dst: &mut [u8], dst_stride: usize) {
    let mut rows = [[0; 8]; 8];
    for (i, row) in rows.iter_mut().enumerate() {
        row.copy_from_slice(&src[i * src_stride..][..8]);
    }
    for (j, row) in transpose_8x8(rows.map(u64::from_le_bytes)).iter().enumerate() {
        dst[j * dst_stride..][..8].copy_from_slice(&row.to_le_bytes());
    }
}

/// The dynamic scales of a tile's rows in `buffer`, 1.0 where there is no row; null if the half has
/// none.
pub(super) fn gather_dynamic(
    ctx: &Context<'_>,
    span: &Span,
    half: Half,
    found: &Found,
    buffer: &mut [f32],
) -> *const f32 {
    let scales = match half {
        Half::K => ctx.cache.k_dynamic,
        Half::V => ctx.cache.v_dynamic,
    };
    let Some(scales) = scales.filter(|_| ctx.shape.spec.has_dynamic_scales(half)) else {
        return std::ptr::null();
    };
    buffer.fill(1.0);
    for_each_run(ctx, span, found.start, found.len, |at, entry, slot, run| {
        if let Some(block) = valid_block(ctx, entry) {
            let first = ctx.shape.dynamic_scale_index(block, span.kv_head, slot);
            buffer[at..at + run].copy_from_slice(&scales[first..first + run]);
        }
    });
    buffer.as_ptr()
}
