//! Requantizing: new static scales for blocks that hold tokens already.
//!
//! ```text
//! gather (old scales) ──> f32 rows of some blocks ──> cache_write (new scales), to the same slots
//! ```
//! Composed of two operations every backend has, some blocks at a time: it runs when a scale grows
//! during a warm-up, a few times in the life of a cache. A code becomes `encode(decode(code) * old /
//! new)`, the product and the quotient each rounded to f32; between powers of two both are exact.

use super::{DeviceScale, HostPool, PagedKvCache};
use crate::args::{CacheWrite, Gather, LayerMut, LayerRef, RowStrides};
use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::layout::{CacheShape, Half, checked_product};
use crate::scale::{LayerScales, ScaleRef, StaticScale};

/// Rows that are dense at a time.
const ROWS_AT_ONCE: usize = 1024;

impl<B: Backend> PagedKvCache<B> {
    /// Replaces the static scales of one layer, and requantizes `blocks`, so that what they hold keeps
    /// its meaning. Name every block that holds tokens, in any order (a block named twice is requantized
    /// once); what the others hold means something else afterwards.
    ///
    /// An element moves by no more than encoding it under its new scale does: by half a step of the
    /// format, or not at all if the new scale is a power of two times the old one and the element is
    /// normal under both (`docs/numerics.md`). Smaller scales may clip. Rows with dynamic scales get new
    /// ones. Tensors of the same granularity keep their buffers.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; [`Error::InLayer`] for scales that do not fit;
    /// [`Error::BlockOutOfRange`]; then nothing has changed. [`Error::OutOfMemory`]; the device's own.
    pub fn requantize(&mut self, layer: usize, scales: &LayerScales, blocks: &[u32]) -> Result<()> {
        let shape = self.shape;
        let (backend, target) = self.layer_and_backend(layer)?;
        let in_layer = |source: Error| source.in_layer(layer);
        let new_k = DeviceScale::new(backend, &shape.spec, Half::K, &scales.k).map_err(in_layer)?;
        let new_v = DeviceScale::new(backend, &shape.spec, Half::V, &scales.v).map_err(in_layer)?;
        let (k_dim, v_dim) = (shape.spec.k_head_dim, shape.spec.v_head_dim);
        let old = [target.k_scale.as_ref(backend, k_dim), target.v_scale.as_ref(backend, v_dim)];
        let new = [new_k.as_ref(backend, k_dim), new_v.as_ref(backend, v_dim)];
        let blocks = checked_blocks(&shape, blocks)?;
        let mut rows = DenseRows::new(backend, shape, &blocks)?;
        for blocks in blocks.chunks(rows.blocks_at_once) {
            rows.gather(backend, blocks, target.blocks.as_ref(backend), old)?;
            rows.write(backend, blocks, target.blocks.as_mut(backend), new)?;
        }
        self.set_scales(layer, scales)
    }
}

impl HostPool {
    /// Requantizes `blocks` of one layer from one pair of static scales to another: what
    /// [`PagedKvCache::requantize`] does to the blocks of the cache, for those that are swapped out
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; [`Error::InLayer`]; [`Error::BlockOutOfRange`];
    /// [`Error::OutOfMemory`].
    pub fn requantize(&mut self, layer: usize, old: &LayerScales, new: &LayerScales, blocks: &[u32]) -> Result<()> {
        let (cpu, shape) = (CpuBackend::new(), self.shape);
        for scales in [old, new] {
            scales.k.check_fits(&shape.spec, Half::K).map_err(|source| source.in_layer(layer))?;
            scales.v.check_fits(&shape.spec, Half::V).map_err(|source| source.in_layer(layer))?;
        }
        let [old, new] = [old, new].map(|scales| [&scales.k, &scales.v].map(host_scale));
        let LayerMut { k, v, mut k_dynamic, mut v_dynamic } = self.layer_mut(layer)?;
        let blocks = checked_blocks(&shape, blocks)?;
        let mut rows = DenseRows::new(&cpu, shape, &blocks)?;
        for blocks in blocks.chunks(rows.blocks_at_once) {
            let held = LayerRef { k: &*k, v: &*v, k_dynamic: k_dynamic.as_deref(), v_dynamic: v_dynamic.as_deref() };
            rows.gather(&cpu, blocks, held, old)?;
            let (k_dynamic, v_dynamic) = (k_dynamic.as_deref_mut(), v_dynamic.as_deref_mut());
            rows.write(&cpu, blocks, LayerMut { k: &mut *k, v: &mut *v, k_dynamic, v_dynamic }, new)?;
        }
        Ok(())
    }
}

fn host_scale(scale: &StaticScale) -> ScaleRef<'_, CpuBackend> {
    ScaleRef { values: scale.values(), strides: scale.strides() }
}

/// `blocks` in order and each once: one that was requantized in an earlier chunk is not to be again.
fn checked_blocks(shape: &CacheShape, blocks: &[u32]) -> Result<Vec<u32>> {
    let mut blocks = blocks.to_vec();
    blocks.sort_unstable();
    blocks.dedup();
    match blocks.last() {
        Some(&block) if block as usize >= shape.num_blocks => {
            Err(Error::BlockOutOfRange { what: "requantize", block: block.into(), num_blocks: shape.num_blocks })
        }
        _ => Ok(blocks),
    }
}

/// The rows of some blocks in f32, which holds every stored value times its scale.
struct DenseRows<B: Backend> {
    shape: CacheShape,
    blocks_at_once: usize,
    key: B::Buffer<f32>,
    value: B::Buffer<f32>,
}

impl<B: Backend> DenseRows<B> {
    /// Room for some of `blocks`.
    fn new(backend: &B, shape: CacheShape, blocks: &[u32]) -> Result<Self> {
        let spec = &shape.spec;
        let blocks_at_once = (ROWS_AT_ONCE / spec.block_size).clamp(1, blocks.len().max(1));
        let rows = blocks_at_once.min(blocks.len()) * spec.block_size;
        let dense = |dim| backend.zeros("dense rows", checked_product("dense rows", &[rows, spec.num_kv_heads, dim])?);
        Ok(DenseRows { shape, blocks_at_once, key: dense(spec.k_head_dim)?, value: dense(spec.v_head_dim)? })
    }

    fn strides(&self) -> [RowStrides; 2] {
        let spec = &self.shape.spec;
        [spec.k_head_dim, spec.v_head_dim].map(|dim| RowStrides::contiguous(spec.num_kv_heads, dim))
    }

    fn gather(
        &mut self,
        backend: &B,
        blocks: &[u32],
        cache: LayerRef<'_, B>,
        [k_scale, v_scale]: [ScaleRef<'_, B>; 2],
    ) -> Result<()> {
        let [key_strides, value_strides] = self.strides();
        let num_tokens = blocks.len() * self.shape.spec.block_size;
        let table: Vec<i32> = blocks.iter().map(|block| *block as i32).collect();
        let table = uploaded(backend, &table)?;
        let bounds = uploaded(backend, &[0, num_tokens as i32])?;
        backend.gather(Gather {
            shape: self.shape,
            cache: cache.shorten(),
            k_scale: k_scale.shorten(),
            v_scale: v_scale.shorten(),
            block_tables: backend.view(&table),
            block_table_stride: blocks.len(),
            cu_seq_lens: backend.view(&bounds),
            starts: None,
            num_tokens,
            key: backend.view_mut(&mut self.key),
            key_strides,
            value: backend.view_mut(&mut self.value),
            value_strides,
        })
    }

    fn write(
        &mut self,
        backend: &B,
        blocks: &[u32],
        cache: LayerMut<'_, B>,
        [k_scale, v_scale]: [ScaleRef<'_, B>; 2],
    ) -> Result<()> {
        let [key_strides, value_strides] = self.strides();
        let block_size = self.shape.spec.block_size as i64;
        let slots =
            blocks.iter().flat_map(|block| (0..block_size).map(move |slot| i64::from(*block) * block_size + slot));
        let slots = uploaded(backend, &slots.collect::<Vec<_>>())?;
        backend.cache_write(CacheWrite {
            shape: self.shape,
            cache: LayerMut {
                k: B::shorten_mut(cache.k),
                v: B::shorten_mut(cache.v),
                k_dynamic: cache.k_dynamic.map(B::shorten_mut),
                v_dynamic: cache.v_dynamic.map(B::shorten_mut),
            },
            key: backend.view(&self.key),
            key_strides,
            value: backend.view(&self.value),
            value_strides,
            slot_mapping: backend.view(&slots),
            k_scale: k_scale.shorten(),
            v_scale: v_scale.shorten(),
        })
    }
}

fn uploaded<B: Backend, T: crate::format::Pod>(backend: &B, values: &[T]) -> Result<B::Buffer<T>> {
    let mut buffer = backend.zeros("requantized blocks", values.len())?;
    backend.upload(values, &mut buffer)?;
    Ok(buffer)
}
