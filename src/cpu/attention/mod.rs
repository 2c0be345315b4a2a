//! Fast paged attention.
//!
//! ```text
//! plan      groups (queries of one sequence, up to MAX_ROWS rows a KV head)
//!           x chunks of the sequence's positions x runs of KV heads = items
//! attend    each item on its own (tile.rs): a state (max, sum, values) a query row
//! finish    one chunk: straight to the output; several: states to the workspace, then merged in
//!           chunk order
//! ```
//! Chunk boundaries depend on shapes and lengths alone, and each state is computed by one thread,
//! so neither the number of threads nor their timing shows in the result.

mod kernels;
mod panel;
mod plan;
mod portable;
mod simd;
mod tile;
mod tile_rows;

#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_e4m3;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub(super) use plan::workspace_len;

use self::kernels::Kernels;
use self::plan::{Group, Item, Plan};
use self::simd::LOG2_E;
use self::tile::{Context, Pair, Scratch, Span, attend, rescale};
use super::CpuBackend;
use crate::args::{PagedAttention, RowStrides};
use crate::faults::FaultWord;
use crate::format::Element;
use crate::isa::Isa;
use crate::scale::ScaleRef;

/// Runs a validated operation.
pub(super) fn run<T: Element>(op: PagedAttention<'_, CpuBackend, T>, isa: Isa, faults: &FaultWord) {
    let plan = Plan::new(&op, faults);
    let spec = op.shape.spec;
    let group_size = op.group_size();
    let ctx = Context {
        shape: op.shape,
        cache: op.cache,
        params: op.params,
        group_size,
        block_tables: op.block_tables,
        block_table_stride: op.block_table_stride,
        alibi_slopes: op.alibi_slopes,
        faults: FaultWord::default(),
        kernels: Pair { k: Kernels::of(isa, spec.k_format), v: Kernels::of(isa, spec.v_format) },
        packed: Pair {
            k: !op.shape.k_map.rows_are_contiguous(spec.k_head_dim),
            v: !op.shape.v_map.rows_are_contiguous(spec.v_head_dim),
        },
    };
    let call = Call {
        num_heads: op.num_heads,
        max_chunks: plan.max_chunks,
        k_scale: op.k_scale,
        v_scale: op.v_scale,
        query: op.query,
        query_strides: op.query_strides,
        sinks: op.sinks,
        output_strides: op.output_strides,
        output: op.output.as_mut_ptr(),
        lse: op.lse.map(|lse| lse.as_mut_ptr()),
        workspace: op.workspace.as_mut_ptr(),
        ctx,
    };
    let rows = plan.max_rows;
    plan.for_each_item(
        &plan.items,
        || (0..plan.heads_at_once).map(|_| Scratch::new(&call.ctx, rows)).collect::<Vec<_>>(),
        |scratch, item| call.run_item(&plan, item, scratch),
    );
    plan.for_each_item(&plan.merges, Vec::new, |values, item| call.merge(&plan, item, values));
    faults.set(call.ctx.faults.take());
}

/// What all items of a call share, with its activation type. The three pointers are written by
/// many threads, each (token, head) row by one.
struct Call<'a, T> {
    ctx: Context<'a>,
    num_heads: usize,
    max_chunks: usize,
    k_scale: ScaleRef<'a, CpuBackend>,
    v_scale: ScaleRef<'a, CpuBackend>,
    query: &'a [T],
    query_strides: RowStrides,
    sinks: Option<&'a [f32]>,
    output_strides: RowStrides,
    output: *mut T,
    lse: Option<*mut f32>,
    workspace: *mut f32,
}

// SAFETY: shared references of `Sync` data, and three pointers of which every item writes only the
// rows of its own (token, query head, chunk); see `Plan`: groups do not overlap in tokens.
unsafe impl<T: Element> Sync for Call<'_, T> {}

/// The state of one query row over some of its keys.
#[derive(Clone, Copy)]
struct State<'a> {
    max: f32,
    sum: f32,
    values: &'a [f32],
}

impl<T: Element> Call<'_, T> {
    fn run_item(&self, plan: &Plan, item: &Item, scratches: &mut [Scratch]) {
        let group = &plan.groups[item.group];
        let (start, end) = group.chunk(item.chunk);
        let scratches = &mut scratches[..item.num_heads];
        let mut spans = Vec::with_capacity(item.num_heads);
        for (kv_head, scratch) in (item.kv_head..).zip(scratches.iter_mut()) {
            self.load_queries(group, kv_head, scratch);
            spans.push(Span {
                seq: group.seq,
                kv_head,
                num_queries: group.num_queries,
                first_position: group.first_position,
                start,
                end,
                scale: self.score_scale(kv_head),
            });
        }
        attend(&self.ctx, &spans, scratches);
        for (kv_head, scratch) in (item.kv_head..).zip(scratches) {
            for row in 0..group.num_queries * self.ctx.group_size {
                let (token, head) = self.row(group, kv_head, row);
                let (max, sum) = (scratch.max[row], scratch.sum[row]);
                let values = &scratch.acc_row(row)[..self.ctx.shape.spec.v_head_dim];
                let state = State { max, sum, values };
                if group.num_chunks() == 1 {
                    self.finish(token, head, state);
                } else {
                    self.store_partial(token, head, item.chunk - group.first_chunk, state);
                }
            }
        }
    }

    /// The token and query head of row `row` of a group.
    fn row(&self, group: &Group, kv_head: usize, row: usize) -> (usize, usize) {
        let size = self.ctx.group_size;
        (group.first_token + row / size, kv_head * size + row % size)
    }

    /// Queries as f32, a per-channel K scale folded in.
    fn load_queries(&self, group: &Group, kv_head: usize, scratch: &mut Scratch) {
        let spec = &self.ctx.shape.spec;
        let rows = group.num_queries * self.ctx.group_size;
        for row in 0..rows {
            let (token, head) = self.row(group, kv_head, row);
            let src = &self.query[self.query_strides.index(token, head)..][..spec.k_head_dim];
            let dst = scratch.query_row(row);
            for (dst, src) in dst.iter_mut().zip(src) {
                *dst = src.to_f32();
            }
            if spec.k_format.is_quantized() && self.k_scale.strides.channel != 0 {
                for (d, dst) in dst[..spec.k_head_dim].iter_mut().enumerate() {
                    *dst *= self.k_scale.values[self.k_scale.strides.index(kv_head, d)];
                }
            }
        }
        for row in rows..kernels::padded_rows(rows) {
            scratch.query_row(row).fill(0.0);
        }
    }

    /// The factor that turns dot products of decoded elements into natural-unit scores.
    fn score_scale(&self, kv_head: usize) -> f32 {
        let mut scale = self.ctx.params.softmax_scale * self.ctx.kernels.k.decode_scale;
        if self.ctx.shape.spec.k_format.is_quantized() && self.k_scale.strides.channel == 0 {
            scale *= self.k_scale.values[self.k_scale.strides.index(kv_head, 0)];
        }
        scale
    }

    /// Divides by the sum of weights, applies V's static scales, and writes output and LSE.
    fn finish(&self, token: usize, head: usize, state: State<'_>) {
        let spec = &self.ctx.shape.spec;
        let (mut max, mut sum, mut weight) = (state.max, state.sum, 1.0);
        if let Some(sinks) = self.sinks {
            let sink = sinks[head] * LOG2_E;
            max = state.max.max(sink);
            if max > f32::NEG_INFINITY {
                weight = rescale(state.max, max);
                sum = sum * weight + rescale(sink, max);
            }
        }
        if let Some(lse) = self.lse {
            // SAFETY: validation made `lse` hold `tokens * heads` values; this row is ours.
            unsafe { *lse.add(token * self.num_heads + head) = (max + sum.log2()) / LOG2_E };
        }
        let kv_head = head / self.ctx.group_size;
        let factor = if sum == 0.0 { 0.0 } else { weight * self.ctx.kernels.v.decode_scale / sum };
        let quantized = spec.v_format.is_quantized();
        // SAFETY: validation made `output` hold every (token, head) row without overlap; this row
        // is ours.
        let output = unsafe {
            let first = self.output.add(self.output_strides.index(token, head));
            std::slice::from_raw_parts_mut(first, spec.v_head_dim)
        };
        for (d, (out, value)) in output.iter_mut().zip(state.values).enumerate() {
            let scale = if quantized { self.v_scale.values[self.v_scale.strides.index(kv_head, d)] } else { 1.0 };
            *out = T::from_f32(value * factor * scale);
        }
    }

    /// `[values, max, sum]` of one (token, head, chunk) in the workspace.
    fn partial(&self, token: usize, head: usize, chunk: usize) -> *mut f32 {
        let stride = plan::partial_len(self.ctx.shape.spec.v_head_dim);
        self.workspace.wrapping_add(((token * self.num_heads + head) * self.max_chunks + chunk) * stride)
    }

    fn store_partial(&self, token: usize, head: usize, chunk: usize, state: State<'_>) {
        let dim = state.values.len();
        let partial = self.partial(token, head, chunk);
        // SAFETY: the workspace holds `workspace_len` floats, one partial for each (token, head,
        // chunk); this one is ours.
        unsafe {
            std::ptr::copy_nonoverlapping(state.values.as_ptr(), partial, dim);
            *partial.add(dim) = state.max;
            *partial.add(dim + 1) = state.sum;
        }
    }

    /// Merges the partial states of an item's rows, in chunk order.
    fn merge(&self, plan: &Plan, item: &Item, values: &mut Vec<f32>) {
        let (group, dim) = (&plan.groups[item.group], self.ctx.shape.spec.v_head_dim);
        let rows = group.num_queries * self.ctx.group_size;
        let heads = item.kv_head..item.kv_head + item.num_heads;
        for (kv_head, row) in heads.flat_map(|kv_head| (0..rows).map(move |row| (kv_head, row))) {
            let (token, head) = self.row(group, kv_head, row);
            let states = (0..group.num_chunks()).map(|chunk| {
                // SAFETY: written by `store_partial` of this row's items, which have all ended.
                let partial = unsafe { std::slice::from_raw_parts(self.partial(token, head, chunk), dim + 2) };
                State { values: &partial[..dim], max: partial[dim], sum: partial[dim + 1] }
            });
            let max = states.clone().map(|state| state.max).fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            values.clear();
            values.resize(dim, 0.0);
            for state in states {
                let weight = rescale(state.max, max);
                sum += state.sum * weight;
                for (value, part) in values.iter_mut().zip(state.values) {
                    *value += part * weight;
                }
            }
            self.finish(token, head, State { max, sum, values });
        }
    }
}
