//! One work item: the query rows of some KV heads against one chunk of one sequence, tile by tile.
//!
//! ```text
//! for each tile of TILE positions some row sees, for each KV head:
//!     find its rows (pages, bad blocks); many query rows: decode it to f32 once
//!     scores = Q K^T;  online softmax a row;  acc = acc*alpha + P V      (panel.rs where it is decoded)
//! ```
//! The result is a state a row: running maximum (exp2 units), sum of weights and accumulated
//! values, not yet divided. While a kernel works it prefetches the rows of the one after it: pages
//! are too short for the hardware's prefetchers to get going. Where the heads of a token lie side
//! by side (NHD), the next tile of all heads is prefetched instead, in the order it lies in memory.

use super::kernels::{Ahead, DIRECT_ROWS, Kernels, PAD, Pv, Qk, Rows, Softmax, TILE, padded_rows};
use super::panel;
use super::simd::LOG2_E;
use super::tile_rows::{Found, find, gather_dynamic, unpack};
use crate::args::{AttentionParams, LayerRef};
use crate::cpu::CpuBackend;
use crate::faults::FaultWord;
use crate::layout::{CacheShape, Half};

/// Query rows of one item at most: enough to amortize decoding a tile, few enough that queries,
/// scores and the tile stay in the L2 cache.
pub(super) const MAX_ROWS: usize = 128;

/// What all items of a call share.
pub(super) struct Context<'a> {
    pub(super) shape: CacheShape,
    pub(super) cache: LayerRef<'a, CpuBackend>,
    pub(super) params: AttentionParams,
    pub(super) group_size: usize,
    pub(super) block_tables: &'a [i32],
    pub(super) block_table_stride: usize,
    pub(super) alibi_slopes: Option<&'a [f32]>,
    /// Blocks outside the cache, found on the way.
    pub(super) faults: FaultWord,
    pub(super) kernels: Pair<Kernels>,
    /// Whether rows lie in pieces and must be gathered.
    pub(super) packed: Pair<bool>,
}

/// Something of K and of V.
#[derive(Clone, Copy)]
pub(super) struct Pair<T> {
    pub(super) k: T,
    pub(super) v: T,
}

/// Which queries, keys and positions an item covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) seq: usize,
    pub(super) kv_head: usize,
    /// Queries (not rows).
    pub(super) num_queries: usize,
    /// Position of the first query; negative if the sequence is shorter than its queries.
    pub(super) first_position: i64,
    /// Key positions of the chunk.
    pub(super) start: usize,
    pub(super) end: usize,
    /// Factor of a dot product of decoded elements, in natural units: softmax scale, static scales
    /// of K that do not vary by channel, decode scale.
    pub(super) scale: f32,
}

/// 64 bytes of f32, so that rows start on cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Buffers of one thread, reused from item to item.
pub(super) struct Scratch {
    lines: Vec<Line>,
    q_stride: usize,
    acc_stride: usize,
    rows: usize,
    /// f32 of the decoded tile and of unpacked codes; zero where no item needs them.
    tile: usize,
    codes: usize,
    /// Running maximum, sum, and last factor of each row.
    pub(super) max: Vec<f32>,
    pub(super) sum: Vec<f32>,
    alpha: Vec<f32>,
    visible: Vec<(usize, usize)>,
}

/// f32 of the parts of [`Scratch::lines`], in order.
struct Parts {
    q: usize,
    acc: usize,
    scores: usize,
    tile: usize,
    codes: usize,
    dynamic: usize,
}

impl Scratch {
    /// Buffers for items of at most `rows` query rows.
    pub(super) fn new(ctx: &Context<'_>, rows: usize) -> Self {
        let spec = &ctx.shape.spec;
        let (q_stride, acc_stride) = (spec.k_head_dim.next_multiple_of(PAD), spec.v_head_dim.next_multiple_of(PAD));
        let tile_if = |needed: bool| if needed { TILE * q_stride.max(acc_stride) } else { 0 };
        let (tile, codes) = (tile_if(rows > DIRECT_ROWS), tile_if(ctx.packed.k || ctx.packed.v));
        let rows = padded_rows(rows);
        let mut scratch = Scratch {
            lines: Vec::new(),
            q_stride,
            acc_stride,
            rows,
            tile,
            codes,
            max: vec![0.0; rows],
            sum: vec![0.0; rows],
            alpha: vec![1.0; rows],
            visible: vec![(0, 0); rows],
        };
        let parts = scratch.parts();
        let total = parts.q + parts.acc + parts.scores + parts.tile + parts.codes + parts.dynamic;
        scratch.lines = vec![Line([0.0; 16]); total / 16];
        scratch
    }

    fn parts(&self) -> Parts {
        Parts {
            q: self.rows * self.q_stride,
            acc: self.rows * self.acc_stride,
            scores: self.rows * TILE,
            tile: self.tile,
            codes: self.codes,
            dynamic: 2 * TILE,
        }
    }

    fn split(&mut self) -> [&mut [f32]; 6] {
        let parts = self.parts();
        // SAFETY: a `Line` is 16 f32 without padding.
        let all = unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 16) };
        let (q, rest) = all.split_at_mut(parts.q);
        let (acc, rest) = rest.split_at_mut(parts.acc);
        let (scores, rest) = rest.split_at_mut(parts.scores);
        let (tile, rest) = rest.split_at_mut(parts.tile);
        let (codes, dynamic) = rest.split_at_mut(parts.codes);
        [q, acc, scores, tile, codes, dynamic]
    }

    /// Empty states for `rows` rows.
    fn begin(&mut self, rows: usize) {
        self.max[..rows].fill(f32::NEG_INFINITY);
        self.sum[..rows].fill(0.0);
        let len = rows * self.acc_stride;
        self.split()[1][..len].fill(0.0);
    }

    /// Query row `row`, to be filled with `k_head_dim` values.
    pub(super) fn query_row(&mut self, row: usize) -> &mut [f32] {
        let stride = self.q_stride;
        &mut self.split()[0][row * stride..][..stride]
    }

    /// The accumulated values of row `row`.
    pub(super) fn acc_row(&mut self, row: usize) -> &[f32] {
        let stride = self.acc_stride;
        &self.split()[1][row * stride..][..stride]
    }
}

impl Span {
    /// Key positions the query at `first_position + i` sees, before clipping to the chunk.
    fn visible(&self, i: usize, window: Option<usize>) -> (i64, i64) {
        let position = self.first_position + i as i64;
        let lo = window.map_or(0, |window| position.saturating_add(1).saturating_sub_unsigned(window as u64));
        (lo.max(0), position + 1)
    }
}

/// Runs one item: `spans` are those of neighbouring KV heads, equal but for head and scale, each
/// with a scratch that holds its queries and where its row states end.
///
/// The heads take turns tile by tile: a block's tiles of neighbouring heads lie side by side (HND)
/// or in the same rows (NHD), so that memory is read in longer runs and pages are looked up once.
pub(super) fn attend(ctx: &Context<'_>, spans: &[Span], scratches: &mut [Scratch]) {
    let span = &spans[0];
    let rows = span.num_queries * ctx.group_size;
    for scratch in scratches.iter_mut() {
        scratch.begin(rows);
    }
    let window = ctx.params.sliding_window;
    let last = span.visible(span.num_queries - 1, window).1;
    let end = last.clamp(span.start as i64, span.end as i64) as usize;
    let first = span.visible(0, window).0.clamp(span.start as i64, end as i64) as usize;

    let mut start = first - first % TILE;
    let mut found = find(ctx, span, start, first, end);
    let by_token = spans.len() > 1 && [Half::K, Half::V].into_iter().all(|half| heads_are_neighbours(ctx, half));
    let prefetch = |kernels: &Kernels, rows: &Rows, half| {
        // SAFETY: a prefetch reads nothing.
        unsafe { (kernels.prefetch)(&Ahead { rows, bytes: row_bytes(ctx, half) }, TILE) };
    };
    if by_token {
        for i in 0..spans.len() {
            let slice = tile_slice(ctx, &found, i, spans.len());
            prefetch(&ctx.kernels.k, &slice.k, Half::K);
            prefetch(&ctx.kernels.v, &slice.v, Half::V);
        }
    } else {
        prefetch(&ctx.kernels.k, &found.k, Half::K);
    }
    while start < end {
        let next_tile = find(ctx, span, start + TILE, first, end);
        for (i, scratch) in scratches.iter_mut().enumerate() {
            let next = match spans.get(i + 1) {
                Some(next) => find(ctx, next, start, first, end),
                None => next_tile,
            };
            let slice;
            let ahead = match by_token {
                true => {
                    slice = tile_slice(ctx, &next_tile, i, spans.len());
                    Pair { k: &slice.k, v: &slice.v }
                }
                false => Pair { k: &next.k, v: &found.v },
            };
            attend_tile(ctx, &spans[i], &found, ahead, scratch);
            found = next;
        }
        start += TILE;
    }
}

/// Whether a token's rows of neighbouring KV heads lie side by side.
fn heads_are_neighbours(ctx: &Context<'_>, half: Half) -> bool {
    let bytes = row_bytes(ctx, half);
    ctx.shape.map(half).head_stride * ctx.shape.spec.format(half).bytes() == bytes
}

/// Slice `i` of a tile of `heads` neighbouring heads, of which `tile` is the first one's: TILE rows,
/// a token's of all heads before the next token's.
fn tile_slice(ctx: &Context<'_>, tile: &Found, i: usize, heads: usize) -> Pair<Rows> {
    let (k_bytes, v_bytes) = (row_bytes(ctx, Half::K), row_bytes(ctx, Half::V));
    let mut slice = Pair { k: tile.k, v: tile.v };
    for (at, (k, v)) in slice.k.iter_mut().zip(&mut slice.v).enumerate() {
        let (token, head) = ((i * TILE + at) / heads, (i * TILE + at) % heads);
        *k = tile.k[token].wrapping_add(head * k_bytes);
        *v = tile.v[token].wrapping_add(head * v_bytes);
    }
    slice
}

/// Bytes of a row.
fn row_bytes(ctx: &Context<'_>, half: Half) -> usize {
    let spec = &ctx.shape.spec;
    spec.head_dim(half) * spec.format(half).bytes()
}

/// Adds one tile to the states of one KV head's rows, and prefetches the rows of `ahead`: V while K is
/// read, K while V is.
fn attend_tile(ctx: &Context<'_>, span: &Span, found: &Found, ahead: Pair<&Rows>, scratch: &mut Scratch) {
    let spec = &ctx.shape.spec;
    let rows = span.num_queries * ctx.group_size;
    let (mut max, mut sum) = (std::mem::take(&mut scratch.max), std::mem::take(&mut scratch.sum));
    let (mut alpha, mut visible) = (std::mem::take(&mut scratch.alpha), std::mem::take(&mut scratch.visible));
    let (q_stride, acc_stride) = (scratch.q_stride, scratch.acc_stride);
    let [q, acc, scores, tile, codes, dynamic] = scratch.split();
    let (k_dynamic, v_dynamic) = dynamic.split_at_mut(TILE);

    let window = ctx.params.sliding_window;
    let decode_tiles = rows > DIRECT_ROWS;
    let packed = ctx.packed;
    let scale = if ctx.params.soft_cap.is_some() { span.scale } else { span.scale * LOG2_E };
    let (start, len) = (found.start, found.len);

    let mut keys = found.k;
    if packed.k {
        unpack(ctx, span, Half::K, found, codes, &mut keys);
    }
    let kernels = &ctx.kernels;
    let (q, p) = (q.as_ptr(), scores.as_mut_ptr());
    let values_ahead = Ahead { rows: ahead.v, bytes: row_bytes(ctx, Half::V) };
    let qk = Qk { q, q_stride, rows, keys: &keys, tokens: len, dim: spec.k_head_dim, ahead: values_ahead, scores: p };
    // SAFETY: `q` and `scores` have padded rows; every pointer of `keys` is a row of the cache, of scratch or of ZEROS,
    // each at least `dim` elements long, see `find`; `tile` has room for `dim` rows of TILE, rounded up to PAD.
    unsafe {
        match decode_tiles {
            true => panel::qk(&kernels.k, &qk, tile.as_mut_ptr()),
            false => (kernels.k.qk)(&qk),
        }
    };

    let k_dynamic = gather_dynamic(ctx, span, Half::K, found, k_dynamic);
    let v_dynamic = gather_dynamic(ctx, span, Half::V, found, v_dynamic);
    for row in 0..rows {
        let (query, head) = (row / ctx.group_size, span.kv_head * ctx.group_size + row % ctx.group_size);
        let (lo, hi) = span.visible(query, window);
        let clip = |at: i64| (at.max(span.start as i64) - start as i64).clamp(0, len as i64) as usize;
        visible[row] = (clip(lo), clip(hi).max(clip(lo)));
        let position = span.first_position + query as i64;
        let softmax = Softmax {
            // SAFETY: `rows` rows of TILE scores.
            scores: unsafe { p.add(row * TILE) },
            scale,
            k_dynamic,
            v_dynamic,
            soft_cap: ctx.params.soft_cap,
            alibi: ctx.alibi_slopes.map(|slopes| (slopes[head] * LOG2_E, (start as i64 - position) as f32)),
            visible: visible[row],
            bad: found.bad,
            max: max[row],
        };
        // SAFETY: the three pointers are null or TILE floats.
        let (new_max, weights) = unsafe { (ctx.kernels.k.softmax)(&softmax) };
        alpha[row] = rescale(max[row], new_max);
        max[row] = new_max;
        sum[row] = sum[row] * alpha[row] + weights;
    }

    let mut values = found.v;
    if packed.v {
        unpack(ctx, span, Half::V, found, codes, &mut values);
    }
    let pv = Pv {
        p,
        rows,
        values: &values,
        visible: &visible,
        dim: spec.v_head_dim,
        ahead: Ahead { rows: ahead.k, bytes: row_bytes(ctx, Half::K) },
        alpha: &alpha,
        acc: acc.as_mut_ptr(),
        acc_stride,
    };
    // SAFETY: as for `qk`; `visible` ranges end at `len`; `tile` has room for `len` rows of `acc_stride`.
    unsafe {
        match decode_tiles {
            true => panel::pv(&kernels.v, &pv, len, tile.as_mut_ptr()),
            false => (kernels.v.pv)(&pv),
        }
    };
    (scratch.max, scratch.sum, scratch.alpha, scratch.visible) = (max, sum, alpha, visible);
}

/// `2^(old - new)`: the factor of what was accumulated under the maximum `old`.
pub(super) fn rescale(old: f32, new: f32) -> f32 {
    if old == new { 1.0 } else { (old - new).exp2() }
}
