//! [`HostPool`]: where preempted sequences wait.

use super::{LayerBlocks, checked_cache_bytes};
use crate::args::{LayerMut, LayerRef};
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::layout::{CacheShape, CacheSpec};
use crate::memory::Host;

/// Blocks of all layers in host memory: the geometry of a [`PagedKvCache`](super::PagedKvCache), a
/// number of blocks of its own. Static scales stay with the cache.
#[derive(Debug)]
pub struct HostPool {
    pub(super) shape: CacheShape,
    pub(super) layers: Vec<LayerBlocks<CpuBackend>>,
}

impl HostPool {
    /// Allocates `num_blocks` zeroed blocks in each of `num_layers` layers.
    ///
    /// # Errors
    /// What [`CacheSpec::shape`] refuses; [`Error::Zero`] without layers; [`Error::OutOfMemory`].
    pub fn new(spec: CacheSpec, num_layers: usize, num_blocks: usize) -> Result<Self> {
        let shape = spec.shape(num_blocks)?;
        checked_cache_bytes(&shape, num_layers)?;
        let allocator = CpuBackend::scalar();
        let layers = (0..num_layers).map(|_| LayerBlocks::zeros(&allocator, &shape)).collect::<Result<_>>()?;
        Ok(HostPool { shape, layers })
    }

    /// The geometry of every layer.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// One layer's blocks.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer_ref(&self, layer: usize) -> Result<LayerRef<'_, Host>> {
        let num_layers = self.layers.len();
        self.layers.get(layer).map(host_ref).ok_or(Error::LayerOutOfRange { layer, num_layers })
    }

    /// One layer's blocks, for writing.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn layer_mut(&mut self, layer: usize) -> Result<LayerMut<'_, Host>> {
        let num_layers = self.layers.len();
        self.layers.get_mut(layer).map(host_mut).ok_or(Error::LayerOutOfRange { layer, num_layers })
    }
}

pub(super) fn host_ref(blocks: &LayerBlocks<CpuBackend>) -> LayerRef<'_, Host> {
    LayerRef {
        k: &blocks.k,
        v: &blocks.v,
        k_dynamic: blocks.k_dynamic.as_deref(),
        v_dynamic: blocks.v_dynamic.as_deref(),
    }
}

pub(super) fn host_mut(blocks: &mut LayerBlocks<CpuBackend>) -> LayerMut<'_, Host> {
    LayerMut {
        k: &mut blocks.k,
        v: &mut blocks.v,
        k_dynamic: blocks.k_dynamic.as_deref_mut(),
        v_dynamic: blocks.v_dynamic.as_deref_mut(),
    }
}
