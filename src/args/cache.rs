//! One layer's cache as the operations see it: K and V bytes and, where the cache has them, the
//! dynamic scales of each half.

use super::check_len;
use crate::error::{Error, Result};
use crate::layout::{CacheShape, Half};
use crate::memory::{BufferLen, Memory};

/// One layer's cache, borrowed for reading.
#[derive(Debug)]
pub struct LayerRef<'a, M: Memory> {
    /// K blocks, [`CacheShape::buffer_bytes`] bytes.
    pub k: M::Ref<'a, u8>,
    /// V blocks, [`CacheShape::buffer_bytes`] bytes.
    pub v: M::Ref<'a, u8>,
    /// Dynamic scales of K, `[blocks, heads, block]`; `None` where K has none.
    pub k_dynamic: Option<M::Ref<'a, f32>>,
    /// Dynamic scales of V, `[blocks, heads, block]`; `None` where V has none.
    pub v_dynamic: Option<M::Ref<'a, f32>>,
}

/// One layer's cache, borrowed for writing. Fields as in [`LayerRef`].
#[derive(Debug)]
pub struct LayerMut<'a, M: Memory> {
    /// K blocks, [`CacheShape::buffer_bytes`] bytes.
    pub k: M::Mut<'a, u8>,
    /// V blocks, [`CacheShape::buffer_bytes`] bytes.
    pub v: M::Mut<'a, u8>,
    /// Dynamic scales of K, `[blocks, heads, block]`; `None` where K has none.
    pub k_dynamic: Option<M::Mut<'a, f32>>,
    /// Dynamic scales of V, `[blocks, heads, block]`; `None` where V has none.
    pub v_dynamic: Option<M::Mut<'a, f32>>,
}

// Not derived: a derive would ask for `M: Copy`.
impl<M: Memory> Clone for LayerRef<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Memory> Copy for LayerRef<'_, M> {}

impl<'a, M: Memory> LayerRef<'a, M> {
    /// The same layer, borrowed for a shorter time; see [`crate::scale::ScaleRef::shorten`].
    pub fn shorten<'short>(self) -> LayerRef<'short, M>
    where
        'a: 'short,
    {
        LayerRef {
            k: M::shorten(self.k),
            v: M::shorten(self.v),
            k_dynamic: self.k_dynamic.map(M::shorten),
            v_dynamic: self.v_dynamic.map(M::shorten),
        }
    }

    /// Checks buffer lengths against `shape`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::DynamicScales`].
    pub fn validate(&self, shape: &CacheShape) -> Result<()> {
        let dynamic = |scales: &Option<M::Ref<'_, f32>>| scales.as_ref().map(BufferLen::buffer_len);
        check_halves(
            shape,
            (self.k.buffer_len(), self.v.buffer_len()),
            (dynamic(&self.k_dynamic), dynamic(&self.v_dynamic)),
        )
    }
}

impl<M: Memory> LayerMut<'_, M> {
    /// Checks buffer lengths against `shape`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::DynamicScales`].
    pub fn validate(&self, shape: &CacheShape) -> Result<()> {
        let dynamic = |scales: &Option<M::Mut<'_, f32>>| scales.as_ref().map(BufferLen::buffer_len);
        check_halves(
            shape,
            (self.k.buffer_len(), self.v.buffer_len()),
            (dynamic(&self.k_dynamic), dynamic(&self.v_dynamic)),
        )
    }
}

fn check_halves(
    shape: &CacheShape,
    (k_bytes, v_bytes): (usize, usize),
    (k_dynamic, v_dynamic): (Option<usize>, Option<usize>),
) -> Result<()> {
    check_len("K cache", shape.buffer_bytes(Half::K), k_bytes)?;
    check_len("V cache", shape.buffer_bytes(Half::V), v_bytes)?;
    check_dynamic("K dynamic scales", shape.dynamic_scale_len(Half::K), k_dynamic)?;
    check_dynamic("V dynamic scales", shape.dynamic_scale_len(Half::V), v_dynamic)
}

fn check_dynamic(what: &'static str, needed: usize, given: Option<usize>) -> Result<()> {
    match (needed, given) {
        (0, None) => Ok(()),
        (0, Some(_)) => {
            Err(Error::DynamicScales { what, reason: "given, but this half of the cache has no dynamic scales" })
        }
        (_, None) => Err(Error::DynamicScales { what, reason: "missing, but this half of the cache stores them" }),
        (needed, Some(got)) => check_len(what, needed, got),
    }
}
