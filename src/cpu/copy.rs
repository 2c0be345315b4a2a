//! [`CopyBlocks`] and [`SwapBlocks`]: whole blocks by memcpy, which no kernel beats.
//!
//! Blocks of every layout are contiguous, so layouts and formats do not matter here: one half of a
//! layer is bytes, with its dynamic scales (`heads * block_size` floats a block) beside it.
//! Threads own halves of layers, two a layer, not pairs: a pool has dozens of layers, and a few
//! cores saturate the memory.

use super::threads::{self, Job};
use super::*;
use crate::args::BlockPair;
use crate::layout::Half;

pub(super) fn copy_blocks(op: CopyBlocks<'_, '_, CpuBackend>) {
    let mut tasks = Vec::with_capacity(2 * op.layers.len());
    for layer in op.layers.iter_mut() {
        for (half, bytes, scales) in [
            (Half::K, &mut *layer.k, layer.k_dynamic.as_deref_mut()),
            (Half::V, &mut *layer.v, layer.v_dynamic.as_deref_mut()),
        ] {
            let stride = stride_bytes(&op.shape, half);
            tasks.push(Task {
                bytes: Copies { src: None, src_stride: stride, dst: bytes, dst_stride: stride },
                scales: scales.map(|dst| Copies::scales(&op.shape, None, dst)),
                block_bytes: block_bytes(&op.shape, half),
            });
        }
    }
    run(&op.shape, op.pairs, &mut tasks);
}

pub(super) fn swap_blocks<S, D>(op: SwapBlocks<'_, '_, S, D>)
where
    // Two bounds each: Rust 1.89 takes one value of an associated type per bound.
    S: for<'a> Memory<Ref<'a, u8> = &'a [u8]> + for<'a> Memory<Ref<'a, f32> = &'a [f32]>,
    D: for<'a> Memory<Mut<'a, u8> = &'a mut [u8]> + for<'a> Memory<Mut<'a, f32> = &'a mut [f32]>,
{
    let mut tasks = Vec::with_capacity(2 * op.src.len());
    for (from, to) in op.src.iter().zip(op.dst.iter_mut()) {
        for (half, src, src_scales, dst, dst_scales) in [
            (Half::K, from.k, from.k_dynamic, &mut *to.k, to.k_dynamic.as_deref_mut()),
            (Half::V, from.v, from.v_dynamic, &mut *to.v, to.v_dynamic.as_deref_mut()),
        ] {
            let (src_stride, dst_stride) = (stride_bytes(&op.src_shape, half), stride_bytes(&op.dst_shape, half));
            tasks.push(Task {
                bytes: Copies { src: Some(src), src_stride, dst, dst_stride },
                scales: dst_scales.map(|dst| Copies::scales(&op.dst_shape, src_scales, dst)),
                block_bytes: block_bytes(&op.dst_shape, half),
            });
        }
    }
    run(&op.dst_shape, op.pairs, &mut tasks);
}

/// Bytes from one block of `half` to the next.
fn stride_bytes(shape: &CacheShape, half: Half) -> usize {
    shape.map(half).block_stride * shape.spec.format(half).bytes()
}

/// Bytes of one block of `half`, padding excluded.
fn block_bytes(shape: &CacheShape, half: Half) -> usize {
    let spec = &shape.spec;
    spec.block_size * spec.num_kv_heads * spec.head_dim(half) * spec.format(half).bytes()
}

/// Blocks copied from one buffer to another, or inside one; strides in elements.
struct Copies<'a, T> {
    /// `None`: the destination itself.
    src: Option<&'a [T]>,
    src_stride: usize,
    dst: &'a mut [T],
    dst_stride: usize,
}

impl<'a> Copies<'a, f32> {
    /// The dynamic scales of one half.
    fn scales(shape: &CacheShape, src: Option<&'a [f32]>, dst: &'a mut [f32]) -> Self {
        let stride = shape.spec.num_kv_heads * shape.spec.block_size;
        Copies { src, src_stride: stride, dst, dst_stride: stride }
    }
}

impl<T: Pod> Copies<'_, T> {
    fn run(&mut self, pairs: &[BlockPair], block: usize) {
        for pair in pairs {
            let from = pair.src as usize * self.src_stride;
            let to = pair.dst as usize * self.dst_stride;
            match self.src {
                Some(src) => self.dst[to..to + block].copy_from_slice(&src[from..from + block]),
                None => self.dst.copy_within(from..from + block, to),
            }
        }
    }
}

/// All copies of one half of one layer.
struct Task<'a> {
    bytes: Copies<'a, u8>,
    scales: Option<Copies<'a, f32>>,
    block_bytes: usize,
}

fn run(shape: &CacheShape, pairs: &[BlockPair], tasks: &mut [Task<'_>]) {
    // Read and written.
    let bytes = tasks.iter().map(|task| 2 * task.block_bytes * pairs.len()).sum();
    let scales_per_block = shape.spec.num_kv_heads * shape.spec.block_size;
    threads::run(Tasks { tasks, pairs, scales_per_block }, bytes);
}

/// Halves of layers, owned by one thread.
struct Tasks<'t, 'a> {
    tasks: &'t mut [Task<'a>],
    pairs: &'t [BlockPair],
    scales_per_block: usize,
}

impl Job for Tasks<'_, '_> {
    fn split(self, left: usize, parts: usize) -> (Self, Self) {
        let Tasks { tasks, pairs, scales_per_block } = self;
        let (tasks, rest) = tasks.split_at_mut(tasks.len() * left / parts);
        (Tasks { tasks, pairs, scales_per_block }, Tasks { tasks: rest, pairs, scales_per_block })
    }

    fn run(self) {
        for task in self.tasks {
            task.bytes.run(self.pairs, task.block_bytes);
            if let Some(scales) = &mut task.scales {
                scales.run(self.pairs, self.scales_per_block);
            }
        }
    }
}
