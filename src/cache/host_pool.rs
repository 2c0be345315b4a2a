//! [`HostPool`]: where preempted sequences wait.
//!
//! One allocation, so that a device can lock its pages, and no page holds anything else:
//!
//! ```text
//! page boundary │ layer 0: K │ V │ K dynamic │ V dynamic │ layer 1: K │ ... │ page boundary
//! ```
//! Each part starts at a multiple of [`PART_ALIGN`] bytes.

use super::checked_cache_bytes;
use crate::args::{LayerMut, LayerRef};
use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::layout::{CacheShape, CacheSpec, Half, checked_product};
use crate::memory::{Host, PageLock};

/// A multiple of the page size of every machine supported.
const PAGE: usize = 64 << 10;

/// A cache line, and enough for any element.
const PART_ALIGN: usize = 64;

/// Blocks of all layers in host memory: the geometry of a [`PagedKvCache`](super::PagedKvCache), a
/// number of blocks of its own. Static scales stay with the cache.
#[derive(Debug)]
pub struct HostPool {
    pub(super) shape: CacheShape,
    num_layers: usize,
    /// Bytes of one layer's parts.
    layer_bytes: usize,
    /// Before the memory, so that it is dropped before.
    lock: PageLock,
    /// Longer than needed by a page: the first layer starts where the first page does.
    memory: Vec<u8>,
}

impl HostPool {
    /// Allocates `num_blocks` zeroed blocks in each of `num_layers` layers.
    ///
    /// # Errors
    /// What [`CacheSpec::shape`] refuses; [`Error::Zero`] without layers; [`Error::OutOfMemory`].
    pub fn new(spec: CacheSpec, num_layers: usize, num_blocks: usize) -> Result<Self> {
        const WHAT: &str = "host pool";
        let shape = spec.shape(num_blocks)?;
        checked_cache_bytes(&shape, num_layers)?;
        // Cannot overflow: the parts are shorter than `isize::MAX` together.
        let layer_bytes = part_bytes(&shape).iter().map(|bytes| bytes.next_multiple_of(PART_ALIGN)).sum();
        let pages = checked_product(WHAT, &[layer_bytes, num_layers])?.div_ceil(PAGE) + 1;
        let memory = CpuBackend::scalar().zeros(WHAT, checked_product(WHAT, &[pages, PAGE])?)?;
        Ok(HostPool { shape, num_layers, layer_bytes, lock: PageLock::none(), memory })
    }

    /// [`HostPool::new`] with pages that `backend` copies from and to directly: what to swap to from a
    /// GPU. The same as `new` where the backend has no use for it.
    ///
    /// # Errors
    /// As [`HostPool::new`]; those of [`Backend::page_lock`].
    pub fn page_locked<B: Backend>(backend: &B, spec: CacheSpec, num_layers: usize, num_blocks: usize) -> Result<Self> {
        let mut pool = Self::new(spec, num_layers, num_blocks)?;
        let (start, len) = (pool.first_page(), pool.memory.len() - PAGE);
        // SAFETY: the lock is dropped before the memory, and nothing else frees or reallocates that.
        pool.lock = unsafe { backend.page_lock(&mut pool.memory[start..start + len]) }?;
        Ok(pool)
    }

    /// The geometry of every layer.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// Whether a device has locked the pages.
    pub fn is_page_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// One layer's blocks.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer_ref(&self, layer: usize) -> Result<LayerRef<'_, Host>> {
        let num_layers = self.num_layers;
        self.layers().nth(layer).ok_or(Error::LayerOutOfRange { layer, num_layers })
    }

    /// One layer's blocks, for writing.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer_mut(&mut self, layer: usize) -> Result<LayerMut<'_, Host>> {
        let num_layers = self.num_layers;
        self.layers_mut().nth(layer).ok_or(Error::LayerOutOfRange { layer, num_layers })
    }

    pub(super) fn layers(&self) -> impl Iterator<Item = LayerRef<'_, Host>> {
        let parts = part_bytes(&self.shape);
        let start = self.first_page();
        let layers = &self.memory[start..start + self.num_layers * self.layer_bytes];
        layers.chunks_exact(self.layer_bytes).map(move |mut layer| {
            let [k, v, k_dynamic, v_dynamic] = parts.map(|bytes| {
                let (part, rest) = layer.split_at(bytes.next_multiple_of(PART_ALIGN));
                layer = rest;
                &part[..bytes]
            });
            LayerRef { k, v, k_dynamic: floats(k_dynamic), v_dynamic: floats(v_dynamic) }
        })
    }

    pub(super) fn layers_mut(&mut self) -> impl Iterator<Item = LayerMut<'_, Host>> {
        let parts = part_bytes(&self.shape);
        let start = self.first_page();
        let layers = &mut self.memory[start..start + self.num_layers * self.layer_bytes];
        layers.chunks_exact_mut(self.layer_bytes).map(move |mut layer| {
            let [k, v, k_dynamic, v_dynamic] = parts.map(|bytes| {
                let (part, rest) = std::mem::take(&mut layer).split_at_mut(bytes.next_multiple_of(PART_ALIGN));
                layer = rest;
                &mut part[..bytes]
            });
            LayerMut { k, v, k_dynamic: floats_mut(k_dynamic), v_dynamic: floats_mut(v_dynamic) }
        })
    }

    /// Where the first page starts.
    fn first_page(&self) -> usize {
        self.memory.as_ptr().addr().next_multiple_of(PAGE) - self.memory.as_ptr().addr()
    }
}

/// Bytes of one layer's K, V, and dynamic scales of each; 0 for what it has not.
fn part_bytes(shape: &CacheShape) -> [usize; 4] {
    let dynamic = |half| shape.dynamic_scale_len(half) * size_of::<f32>();
    [shape.buffer_bytes(Half::K), shape.buffer_bytes(Half::V), dynamic(Half::K), dynamic(Half::V)]
}

/// Dynamic scales, or `None` where there are none.
fn floats(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: any bytes are floats; the part is aligned, so none are left over.
    let (before, floats, after) = unsafe { bytes.align_to() };
    debug_assert!(before.is_empty() && after.is_empty());
    (!floats.is_empty()).then_some(floats)
}

fn floats_mut(bytes: &mut [u8]) -> Option<&mut [f32]> {
    // SAFETY: as in `floats`.
    let (before, floats, after) = unsafe { bytes.align_to_mut() };
    debug_assert!(before.is_empty() && after.is_empty());
    (!floats.is_empty()).then_some(floats)
}
