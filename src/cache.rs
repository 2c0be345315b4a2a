//! [`PagedKvCache`]: the blocks and scales of all layers on one backend, and [`HostPool`]: blocks
//! in host memory that preempted sequences are swapped to.
//!
//! ```text
//! layer 0   K [num_blocks x block]  V [num_blocks x block]  [K, V dynamic scales]  K, V static scales
//! layer 1   the same
//! ...       one block id names the same block in every layer
//! ```
//!
//! The cache is memory with names, nothing more: which block belongs to whom is the business of
//! [`crate::blocks`], and every method here only fills an argument struct of [`crate::args`] and
//! hands it to the [`Backend`]. An operation that has no method (gather, for one) is called on the
//! backend with [`PagedKvCache::layer_ref`] and [`PagedKvCache::scale`]. An engine that owns its
//! memory does not need this type: it fills the structs itself.

mod host_pool;
mod requantize;

use std::sync::Arc;

use crate::args::{
    AttentionParams, BlockPair, CacheWrite, CopyBlocks, LayerMut, LayerRef, PagedAttention, RowStrides, SwapBlocks,
    UpdateScales,
};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::format::Element;
use crate::layout::{CacheShape, CacheSpec, Half, checked_product};
use crate::memory::Memory;
use crate::scale::{Granularity, LayerScales, ScaleRef, StaticScale};

pub use host_pool::HostPool;

/// The buffers of one layer's blocks, lengths as [`CacheShape`] gives them.
#[derive(Debug)]
struct LayerBlocks<B: Backend> {
    k: B::Buffer<u8>,
    v: B::Buffer<u8>,
    k_dynamic: Option<B::Buffer<f32>>,
    v_dynamic: Option<B::Buffer<f32>>,
}

impl<B: Backend> LayerBlocks<B> {
    fn zeros(backend: &B, shape: &CacheShape) -> Result<Self> {
        let dynamic = |what, half| match shape.dynamic_scale_len(half) {
            0 => Ok(None),
            len => backend.zeros(what, len).map(Some),
        };
        Ok(LayerBlocks {
            k: backend.zeros("K cache", shape.buffer_bytes(Half::K))?,
            v: backend.zeros("V cache", shape.buffer_bytes(Half::V))?,
            k_dynamic: dynamic("K dynamic scales", Half::K)?,
            v_dynamic: dynamic("V dynamic scales", Half::V)?,
        })
    }

    fn as_ref<'a>(&'a self, backend: &B) -> LayerRef<'a, B> {
        LayerRef {
            k: backend.view(&self.k),
            v: backend.view(&self.v),
            k_dynamic: self.k_dynamic.as_ref().map(|scales| backend.view(scales)),
            v_dynamic: self.v_dynamic.as_ref().map(|scales| backend.view(scales)),
        }
    }

    fn as_mut<'a>(&'a mut self, backend: &B) -> LayerMut<'a, B> {
        LayerMut {
            k: backend.view_mut(&mut self.k),
            v: backend.view_mut(&mut self.v),
            k_dynamic: self.k_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
            v_dynamic: self.v_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
        }
    }
}

/// The static scales of one half of one layer, in the backend's memory. The only copy: what
/// `update_scales` computes there is what [`PagedKvCache::scales`] reads back.
#[derive(Debug)]
struct DeviceScale<B: Backend> {
    values: B::Buffer<f32>,
    len: usize,
    granularity: Granularity,
}

impl<B: Backend> DeviceScale<B> {
    fn new(backend: &B, spec: &CacheSpec, half: Half, scale: &StaticScale) -> Result<Self> {
        scale.check_fits(spec, half)?;
        let len = scale.values().len();
        let mut values = backend.zeros("static scales", len)?;
        backend.upload(scale.values(), &mut values)?;
        Ok(DeviceScale { values, len, granularity: scale.granularity() })
    }

    fn as_ref<'a>(&'a self, backend: &B, head_dim: usize) -> ScaleRef<'a, B> {
        ScaleRef { values: backend.view(&self.values), strides: self.granularity.strides(head_dim) }
    }

    fn download(&self, backend: &B, what: &str, head_dim: usize) -> Result<StaticScale> {
        let mut values = vec![0.0; self.len];
        backend.download(&self.values, &mut values)?;
        match self.granularity {
            Granularity::Tensor => StaticScale::per_tensor(what, values[0]),
            Granularity::Head => StaticScale::per_head(what, values),
            Granularity::Channel => StaticScale::per_channel(what, head_dim, values),
        }
    }
}

#[derive(Debug)]
struct Layer<B: Backend> {
    blocks: LayerBlocks<B>,
    k_scale: DeviceScale<B>,
    v_scale: DeviceScale<B>,
}

/// The paged KV cache of a model: all layers, one geometry, on one backend.
///
/// ```
/// use std::sync::Arc;
/// use quantkv::args::RowStrides;
/// use quantkv::scale::LayerScales;
/// use quantkv::{CacheSpec, CpuBackend, KvFormat, PagedKvCache};
///
/// // 2 KV heads of 64 channels, 16 tokens a block, 100 blocks in each of 2 layers.
/// let spec = CacheSpec::new(2, 64, 16, KvFormat::Fp8E4M3)?;
/// let mut cache = PagedKvCache::new(Arc::new(CpuBackend::new()), spec, 100, &vec![LayerScales::one(); 2])?;
/// assert_eq!(cache.bytes_per_token(), 2 * 2 * 64 * 2);
///
/// // One token's keys and values of layer 0, to slot 5 of block 3.
/// let (key, value) = ([0.5f32; 128], [2.0f32; 128]);
/// let rows = RowStrides::contiguous(2, 64);
/// cache.write(0, &key, rows, &value, rows, &[3 * 16 + 5])?;
/// assert_eq!(cache.layer_ref(0)?.k[(3 * 2 * 16 + 5) * 64], 0x30, "0.5 in E4M3");
/// # Ok::<(), quantkv::Error>(())
/// ```
#[derive(Debug)]
pub struct PagedKvCache<B: Backend> {
    backend: Arc<B>,
    shape: CacheShape,
    layers: Vec<Layer<B>>,
    /// Another one whenever a buffer is another one.
    identity: Arc<()>,
}

/// The sequences of one step, the same for every layer. Fields as in [`PagedAttention`].
#[derive(Debug)]
pub struct AttentionBatch<'a, M: Memory> {
    /// Query rows in the batch.
    pub num_tokens: usize,
    /// The most queries of any sequence, if known.
    pub max_query_len: Option<usize>,
    /// First query row of each sequence, `[sequences + 1]`.
    pub query_starts: M::Ref<'a, i32>,
    /// Cached tokens of each sequence, the new ones included, `[sequences]`.
    pub seq_lens: M::Ref<'a, i32>,
    /// Block of each (sequence, logical block), `[sequences, block_table_stride]`.
    pub block_tables: M::Ref<'a, i32>,
    /// Entries from one sequence's row of `block_tables` to the next.
    pub block_table_stride: usize,
}

/// What a layer's attention computes, the same in every step. Fields as in [`PagedAttention`].
#[derive(Debug)]
pub struct AttentionHeads<'a, M: Memory> {
    /// Query heads.
    pub num_heads: usize,
    /// Softmax scale, soft cap, sliding window.
    pub params: AttentionParams,
    /// ALiBi slope of each query head.
    pub alibi_slopes: Option<M::Ref<'a, f32>>,
    /// Attention-sink logit of each query head.
    pub sinks: Option<M::Ref<'a, f32>>,
}

impl<M: Memory> AttentionHeads<'_, M> {
    /// Attention without ALiBi and sinks.
    pub fn new(num_heads: usize, params: AttentionParams) -> Self {
        AttentionHeads { num_heads, params, alibi_slopes: None, sinks: None }
    }
}

// Derived, `Copy` would ask for `M: Copy`; the fields are whatever `M` is.
impl<M: Memory> Clone for AttentionBatch<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for AttentionBatch<'_, M> {}
impl<M: Memory> Clone for AttentionHeads<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for AttentionHeads<'_, M> {}

/// What one attention call reads and writes. Fields as in [`PagedAttention`].
#[derive(Debug)]
pub struct AttentionIo<'a, M: Memory, T: Element> {
    /// Queries, `[tokens, heads, k_head_dim]`.
    pub query: M::Ref<'a, T>,
    /// Strides of `query`.
    pub query_strides: RowStrides,
    /// Outputs, `[tokens, heads, v_head_dim]`.
    pub output: M::Mut<'a, T>,
    /// Strides of `output`.
    pub output_strides: RowStrides,
    /// Natural-log LSE, `[tokens, heads]`, if wanted.
    pub lse: Option<M::Mut<'a, f32>>,
    /// Scratch of at least [`PagedKvCache::workspace_len`] floats.
    pub workspace: M::Mut<'a, f32>,
    /// The workspace holds the plan of an earlier call of this step: see
    /// [`PagedAttention::plan_is_ready`].
    pub plan_is_ready: bool,
}

impl<B: Backend> PagedKvCache<B> {
    /// Allocates `num_blocks` zeroed blocks in each of `scales.len()` layers, and uploads each
    /// layer's static scales ([`LayerScales::one`] where there are none).
    ///
    /// # Errors
    /// What [`CacheSpec::shape`] refuses; [`Error::Zero`] without layers; [`Error::InLayer`] for
    /// scales that do not fit; [`Error::OutOfMemory`].
    pub fn new(backend: Arc<B>, spec: CacheSpec, num_blocks: usize, scales: &[LayerScales]) -> Result<Self> {
        let shape = spec.shape(num_blocks)?;
        checked_cache_bytes(&shape, scales.len())?;
        let layers = scales
            .iter()
            .enumerate()
            .map(|(layer, scales)| {
                let in_layer = |source: Error| source.in_layer(layer);
                Ok(Layer {
                    k_scale: DeviceScale::new(&*backend, &spec, Half::K, &scales.k).map_err(in_layer)?,
                    v_scale: DeviceScale::new(&*backend, &spec, Half::V, &scales.v).map_err(in_layer)?,
                    blocks: LayerBlocks::zeros(&*backend, &shape)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(PagedKvCache { backend, shape, layers, identity: Arc::default() })
    }

    /// The backend the cache lives on.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Stays the same (`Arc::ptr_eq`) as long as every buffer of the cache stays where it is: what a
    /// captured graph over this cache may be replayed for.
    pub fn identity(&self) -> &Arc<()> {
        &self.identity
    }

    /// The geometry of every layer.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Bytes of all blocks of all layers, dynamic scales included, static scales not.
    pub fn bytes(&self) -> usize {
        self.bytes_per_token() * self.shape.num_slots()
    }

    /// Bytes one token takes in all layers, dynamic scales included.
    pub fn bytes_per_token(&self) -> usize {
        // Cannot overflow: `new` has checked the product with the number of slots as well.
        self.shape.spec.bytes_per_token().unwrap_or(usize::MAX) * self.layers.len()
    }

    /// One layer's blocks, for operations called on the backend directly.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer_ref(&self, layer: usize) -> Result<LayerRef<'_, B>> {
        Ok(self.layer(layer)?.blocks.as_ref(&self.backend))
    }

    /// One layer's blocks, for writing.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer_mut(&mut self, layer: usize) -> Result<LayerMut<'_, B>> {
        let (backend, layer) = self.layer_and_backend(layer)?;
        Ok(layer.blocks.as_mut(backend))
    }

    /// The static scales of one half of one layer, in the backend's memory.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn scale(&self, layer: usize, half: Half) -> Result<ScaleRef<'_, B>> {
        let layer = self.layer(layer)?;
        let scale = match half {
            Half::K => &layer.k_scale,
            Half::V => &layer.v_scale,
        };
        Ok(scale.as_ref(&self.backend, self.shape.spec.head_dim(half)))
    }

    /// The static scales of one layer, read back from the backend's memory.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; [`Error::InvalidScale`], naming layer and tensor, should the
    /// memory hold anything but scales; the device's own.
    pub fn scales(&self, layer: usize) -> Result<LayerScales> {
        let spec = &self.shape.spec;
        let Layer { k_scale, v_scale, .. } = self.layer(layer)?;
        Ok(LayerScales {
            k: k_scale.download(&self.backend, &format!("layer {layer} k_scale"), spec.k_head_dim)?,
            v: v_scale.download(&self.backend, &format!("layer {layer} v_scale"), spec.v_head_dim)?,
        })
    }

    /// Replaces the static scales of one layer.
    ///
    /// Blocks already written keep their bytes, so their *meaning* changes with the scales: set
    /// scales before the first write, or forget what was written (prefix caches included, see
    /// [`crate::blocks::BlockPool::flush_prefixes`]). A tensor of the same granularity keeps its buffer,
    /// so that a captured graph sees the new values.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; [`Error::InLayer`] if they do not fit, and then both halves
    /// stay as they were.
    pub fn set_scales(&mut self, layer: usize, scales: &LayerScales) -> Result<()> {
        let spec = self.shape.spec;
        let mut moved = false;
        let (backend, target) = self.layer_and_backend(layer)?;
        let in_layer = |source: Error| source.in_layer(layer);
        scales.k.check_fits(&spec, Half::K).map_err(in_layer)?;
        scales.v.check_fits(&spec, Half::V).map_err(in_layer)?;
        for (half, device, host) in
            [(Half::K, &mut target.k_scale, &scales.k), (Half::V, &mut target.v_scale, &scales.v)]
        {
            if device.granularity == host.granularity() {
                backend.upload(host.values(), &mut device.values)?;
            } else {
                *device = DeviceScale::new(backend, &spec, half, host)?;
                moved = true;
            }
        }
        if moved {
            self.identity = Arc::default();
        }
        Ok(())
    }

    /// Computes the static scales of one half of one layer on the device from running maxima
    /// ([`crate::args::Absmax`], of the granularity the scales have): `scale = absmax / divisor`,
    /// 1.0 where nothing but zeros was seen. With divisors 200 (K) and 100 (V) this is vLLM's
    /// first-batch rule. As [`PagedKvCache::set_scales`], it is for a cache that nothing has been
    /// written to.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; [`UpdateScales::validate`].
    pub fn update_scales(&mut self, layer: usize, half: Half, absmax: B::Ref<'_, f32>, divisor: f32) -> Result<()> {
        let (backend, layer) = self.layer_and_backend(layer)?;
        let scale = match half {
            Half::K => &mut layer.k_scale,
            Half::V => &mut layer.v_scale,
        };
        let scales = backend.view_mut(&mut scale.values);
        backend.update_scales(UpdateScales { absmax: B::shorten(absmax), divisor, scales })
    }

    /// Quantizes new keys and values of one layer and scatters them to their slots; see
    /// [`CacheWrite`].
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; [`CacheWrite::validate`].
    pub fn write<T: Element>(
        &mut self,
        layer: usize,
        key: B::Ref<'_, T>,
        key_strides: RowStrides,
        value: B::Ref<'_, T>,
        value_strides: RowStrides,
        slot_mapping: B::Ref<'_, i64>,
    ) -> Result<()> {
        let shape = self.shape;
        let (backend, Layer { blocks, k_scale, v_scale }) = self.layer_and_backend(layer)?;
        backend.cache_write(CacheWrite {
            shape,
            cache: blocks.as_mut(backend),
            key: B::shorten(key),
            key_strides,
            value: B::shorten(value),
            value_strides,
            slot_mapping: B::shorten(slot_mapping),
            k_scale: k_scale.as_ref(backend, shape.spec.k_head_dim),
            v_scale: v_scale.as_ref(backend, shape.spec.v_head_dim),
        })
    }

    /// Floats of workspace [`PagedKvCache::attend`] needs for at most `num_tokens` query rows of
    /// `num_heads` heads.
    pub fn workspace_len(&self, num_heads: usize, num_tokens: usize) -> usize {
        self.backend.attention_workspace_len(&self.shape, num_heads, num_tokens)
    }

    /// Attends over one layer; see [`PagedAttention`].
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`]; those of [`Backend::paged_attention`].
    pub fn attend<T: Element>(
        &self,
        layer: usize,
        batch: &AttentionBatch<'_, B>,
        heads: &AttentionHeads<'_, B>,
        io: AttentionIo<'_, B, T>,
    ) -> Result<()> {
        self.backend.paged_attention(PagedAttention {
            shape: self.shape,
            cache: self.layer_ref(layer)?,
            k_scale: self.scale(layer, Half::K)?,
            v_scale: self.scale(layer, Half::V)?,
            params: heads.params,
            num_heads: heads.num_heads,
            num_tokens: batch.num_tokens,
            max_query_len: batch.max_query_len,
            query: B::shorten(io.query),
            query_strides: io.query_strides,
            query_starts: B::shorten(batch.query_starts),
            seq_lens: B::shorten(batch.seq_lens),
            block_tables: B::shorten(batch.block_tables),
            block_table_stride: batch.block_table_stride,
            alibi_slopes: heads.alibi_slopes.map(B::shorten),
            sinks: heads.sinks.map(B::shorten),
            output: B::shorten_mut(io.output),
            output_strides: io.output_strides,
            lse: io.lse.map(B::shorten_mut),
            workspace: B::shorten_mut(io.workspace),
            plan_is_ready: io.plan_is_ready,
        })
    }

    /// Copies blocks onto others in all layers; see [`CopyBlocks`].
    ///
    /// # Errors
    /// [`CopyBlocks::validate`].
    pub fn copy_blocks(&mut self, pairs: &[BlockPair]) -> Result<()> {
        let (shape, backend) = (self.shape, &self.backend);
        let mut layers: Vec<_> = self.layers.iter_mut().map(|layer| layer.blocks.as_mut(backend)).collect();
        backend.copy_blocks(CopyBlocks { shape, layers: &mut layers, pairs })
    }

    /// A pool of `num_blocks` blocks to swap this cache's to, page-locked for its backend.
    ///
    /// # Errors
    /// As [`HostPool::page_locked`].
    pub fn host_pool(&self, num_blocks: usize) -> Result<HostPool> {
        HostPool::page_locked(&*self.backend, self.shape.spec, self.num_layers(), num_blocks)
    }

    /// Moves blocks of all layers to host memory (`src` a block of this cache, `dst` one of
    /// `host`); see [`SwapBlocks`].
    ///
    /// # Errors
    /// [`SwapBlocks::validate`].
    pub fn swap_out(&self, host: &mut HostPool, pairs: &[BlockPair]) -> Result<()> {
        let src: Vec<_> = self.layers.iter().map(|layer| layer.blocks.as_ref(&self.backend)).collect();
        let dst_shape = host.shape;
        let mut dst: Vec<_> = host.layers_mut().collect();
        self.backend.swap_out(SwapBlocks { src_shape: self.shape, src: &src, dst_shape, dst: &mut dst, pairs })
    }

    /// Moves blocks of all layers back from host memory (`src` a block of `host`, `dst` one of
    /// this cache); see [`SwapBlocks`].
    ///
    /// # Errors
    /// [`SwapBlocks::validate`].
    pub fn swap_in(&mut self, host: &HostPool, pairs: &[BlockPair]) -> Result<()> {
        let (dst_shape, backend) = (self.shape, &self.backend);
        let src: Vec<_> = host.layers().collect();
        let mut dst: Vec<_> = self.layers.iter_mut().map(|layer| layer.blocks.as_mut(backend)).collect();
        backend.swap_in(SwapBlocks { src_shape: host.shape, src: &src, dst_shape, dst: &mut dst, pairs })
    }

    fn layer(&self, layer: usize) -> Result<&Layer<B>> {
        self.layers.get(layer).ok_or(Error::LayerOutOfRange { layer, num_layers: self.layers.len() })
    }

    fn layer_and_backend(&mut self, layer: usize) -> Result<(&B, &mut Layer<B>)> {
        let num_layers = self.layers.len();
        let target = self.layers.get_mut(layer).ok_or(Error::LayerOutOfRange { layer, num_layers })?;
        Ok((&self.backend, target))
    }
}

/// Bytes of all layers, refusing none of them and more than the address space.
fn checked_cache_bytes(shape: &CacheShape, num_layers: usize) -> Result<usize> {
    if num_layers == 0 {
        return Err(Error::Zero { what: "the number of layers" });
    }
    checked_product("cache bytes", &[shape.spec.bytes_per_block()?, shape.num_blocks, num_layers])
}
