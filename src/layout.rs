//! Where an element of the cache lies.
//!
//! One layer of a cache is two buffers, K and V. Each is a sequence of *blocks* (pages) of
//! `block_size` token slots. Three layouts of a block are in use:
//!
//! ```text
//! Hnd         K, V [blocks, heads, block, dim]             a (block, head) tile is contiguous
//! Nhd         K, V [blocks, block, heads, dim]             a token row is contiguous
//! VllmPacked  K    [blocks, heads, dim/x, block, x]        x = 16 bytes of elements
//!             V    [blocks, heads, dim, block]
//! ```
//!
//! Kernels never see these names. They see an [`AddressMap`], five element strides that express
//! all of them:
//!
//! ```text
//! index(block, head, slot, d) =
//!     block*block_stride + head*head_stride + slot*slot_stride
//!     + (d / chunk)*chunk_stride + d % chunk
//! ```

use std::fmt;

use crate::error::{Error, Result};
use crate::format::KvFormat;

/// The largest head dimension (of K or V) supported.
pub const MAX_HEAD_DIM: usize = 512;

/// How the elements of one block are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CacheLayout {
    /// `[blocks, heads, block, dim]`: the default; one (block, head) tile is contiguous.
    #[default]
    Hnd,
    /// `[blocks, block, heads, dim]`: FlashAttention's order; one token's row is contiguous.
    Nhd,
    /// vLLM's original order: K `[blocks, heads, dim/x, block, x]` with `x` the elements in 16
    /// bytes, V `[blocks, heads, dim, block]`. The head dim of K must be a multiple of `x`.
    VllmPacked,
}

impl CacheLayout {
    /// Every layout, for tables and tests.
    pub const ALL: [CacheLayout; 3] = [CacheLayout::Hnd, CacheLayout::Nhd, CacheLayout::VllmPacked];

    /// The name shown to users: `hnd`, `nhd`, `vllm_packed`.
    pub const fn name(self) -> &'static str {
        match self {
            CacheLayout::Hnd => "hnd",
            CacheLayout::Nhd => "nhd",
            CacheLayout::VllmPacked => "vllm_packed",
        }
    }
}

impl fmt::Display for CacheLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which half of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// Keys.
    K,
    /// Values.
    V,
}

/// Whether each (slot, head) row carries its own scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DynamicScales {
    /// No: static scales alone.
    #[default]
    Off,
    /// Yes: one f32 per (slot, head) and half, written by `cache_write` from the row's absmax.
    PerSlotHead,
}

/// The geometry of one layer's cache: everything but the number of blocks.
///
/// Build it with [`CacheSpec::new`] and the `with_` methods, then [`CacheSpec::shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheSpec {
    /// Order of elements inside a block.
    pub layout: CacheLayout,
    /// Token slots in a block: a power of two from 8 to 256.
    pub block_size: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Channels of one key row: 1 to [`MAX_HEAD_DIM`].
    pub k_head_dim: usize,
    /// Channels of one value row: 1 to [`MAX_HEAD_DIM`].
    pub v_head_dim: usize,
    /// Storage format of K.
    pub k_format: KvFormat,
    /// Storage format of V.
    pub v_format: KvFormat,
    /// Whether rows carry their own scales.
    pub dynamic_scales: DynamicScales,
}

impl CacheSpec {
    /// A cache in the default layout ([`CacheLayout::Hnd`]) with equal head dims and formats.
    ///
    /// # Errors
    /// What [`CacheSpec::validate`] refuses.
    pub fn new(num_kv_heads: usize, head_dim: usize, block_size: usize, format: KvFormat) -> Result<Self> {
        let spec = CacheSpec {
            layout: CacheLayout::Hnd,
            block_size,
            num_kv_heads,
            k_head_dim: head_dim,
            v_head_dim: head_dim,
            k_format: format,
            v_format: format,
            dynamic_scales: DynamicScales::Off,
        };
        spec.validate()?;
        Ok(spec)
    }

    /// The same cache in another layout.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a K head dim that the packed layout cannot divide.
    pub fn with_layout(mut self, layout: CacheLayout) -> Result<Self> {
        self.layout = layout;
        self.validate()?;
        Ok(self)
    }

    /// The same cache with these channels in a key row and in a value row.
    ///
    /// # Errors
    /// What [`CacheSpec::validate`] refuses.
    pub fn with_head_dims(mut self, k: usize, v: usize) -> Result<Self> {
        (self.k_head_dim, self.v_head_dim) = (k, v);
        self.validate()?;
        Ok(self)
    }

    /// The same cache with K stored in one format and V in another.
    ///
    /// # Errors
    /// What [`CacheSpec::validate`] refuses.
    pub fn with_formats(mut self, k: KvFormat, v: KvFormat) -> Result<Self> {
        (self.k_format, self.v_format) = (k, v);
        self.validate()?;
        Ok(self)
    }

    /// The same cache with a scale per (slot, head).
    ///
    /// # Errors
    /// If neither half is quantized: an unquantized format has nothing to scale.
    pub fn with_dynamic_scales(mut self) -> Result<Self> {
        self.dynamic_scales = DynamicScales::PerSlotHead;
        self.validate()?;
        Ok(self)
    }

    /// Checks every field against what the kernels support.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Zero`], [`Error::Overflow`] or [`Error::DynamicScales`].
    pub fn validate(&self) -> Result<()> {
        if !self.block_size.is_power_of_two() || !(8..=256).contains(&self.block_size) {
            return Err(Error::Unsupported {
                what: "block size",
                value: self.block_size,
                supported: "powers of two from 8 to 256",
            });
        }
        if self.num_kv_heads == 0 {
            return Err(Error::Zero { what: "the number of KV heads" });
        }
        for (what, dim) in [("K head dim", self.k_head_dim), ("V head dim", self.v_head_dim)] {
            if dim == 0 || dim > MAX_HEAD_DIM {
                return Err(Error::Unsupported { what, value: dim, supported: "1 to 512" });
            }
        }
        if self.layout == CacheLayout::VllmPacked && !self.k_head_dim.is_multiple_of(self.packed_chunk()) {
            return Err(Error::Unsupported {
                what: "K head dim",
                value: self.k_head_dim,
                supported: "in the vLLM-packed layout, multiples of 16 bytes of elements",
            });
        }
        if self.dynamic_scales == DynamicScales::PerSlotHead
            && !(self.k_format.is_quantized() || self.v_format.is_quantized())
        {
            return Err(Error::DynamicScales {
                what: "cache spec",
                reason: "dynamic scales need a quantized K or V format",
            });
        }
        self.bytes_per_block().map(|_| ())
    }

    /// `x` of the packed K layout: elements in 16 bytes.
    pub const fn packed_chunk(&self) -> usize {
        16 / self.k_format.bytes()
    }

    /// Channels of one row of `half`.
    pub const fn head_dim(&self, half: Half) -> usize {
        match half {
            Half::K => self.k_head_dim,
            Half::V => self.v_head_dim,
        }
    }

    /// Storage format of `half`.
    pub const fn format(&self, half: Half) -> KvFormat {
        match half {
            Half::K => self.k_format,
            Half::V => self.v_format,
        }
    }

    /// Whether rows of `half` carry a scale each. Only a quantized half does.
    pub const fn has_dynamic_scales(&self, half: Half) -> bool {
        matches!(self.dynamic_scales, DynamicScales::PerSlotHead) && self.format(half).is_quantized()
    }

    /// Elements of one block of `half`.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn elements_per_block(&self, half: Half) -> Result<usize> {
        checked_product("elements per block", &[self.block_size, self.num_kv_heads, self.head_dim(half)])
    }

    /// Bytes one token needs in one layer: K, V and dynamic scales.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn bytes_per_token(&self) -> Result<usize> {
        let mut total: usize = 0;
        for half in [Half::K, Half::V] {
            let scale_bytes = if self.has_dynamic_scales(half) { size_of::<f32>() } else { 0 };
            let codes = checked_product("bytes per token", &[self.head_dim(half), self.format(half).bytes()])?;
            total = checked_product("bytes per token", &[self.num_kv_heads, codes + scale_bytes])?
                .checked_add(total)
                .ok_or(Error::Overflow { what: "bytes per token" })?;
        }
        Ok(total)
    }

    /// Bytes one block needs in one layer: K, V and dynamic scales.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn bytes_per_block(&self) -> Result<usize> {
        checked_product("bytes per block", &[self.bytes_per_token()?, self.block_size])
    }

    /// How many blocks of a model with `num_layers` layers fit in `budget_bytes`.
    ///
    /// # Errors
    /// [`Error::BudgetTooSmall`] if not even one does; [`Error::Zero`]; [`Error::Overflow`].
    pub fn blocks_for_budget(&self, num_layers: usize, budget_bytes: usize) -> Result<usize> {
        if num_layers == 0 {
            return Err(Error::Zero { what: "the number of layers" });
        }
        let block_bytes = checked_product("bytes per block", &[self.bytes_per_block()?, num_layers])?;
        match budget_bytes / block_bytes {
            0 => Err(Error::BudgetTooSmall { budget_bytes, block_bytes }),
            blocks => Ok(blocks),
        }
    }

    /// Blocks that `tokens` tokens of one sequence need.
    ///
    /// # Panics
    /// If the block size is zero, which [`CacheSpec::validate`] refuses.
    pub const fn blocks_for_tokens(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// The strides of one half when its blocks are packed without gaps. They saturate for a spec
    /// that [`CacheSpec::validate`] refuses.
    pub fn address_map(&self, half: Half) -> AddressMap {
        let (heads, block, dim) = (self.num_kv_heads, self.block_size, self.head_dim(half));
        let (tile, token) = (block.saturating_mul(dim), heads.saturating_mul(dim));
        let block_stride = heads.saturating_mul(tile);
        match (self.layout, half) {
            (CacheLayout::Hnd, _) => {
                AddressMap { block_stride, head_stride: tile, slot_stride: dim, chunk: dim, chunk_stride: dim }
            }
            (CacheLayout::Nhd, _) => {
                AddressMap { block_stride, head_stride: dim, slot_stride: token, chunk: dim, chunk_stride: dim }
            }
            (CacheLayout::VllmPacked, Half::K) => {
                let x = self.packed_chunk();
                let chunk_stride = block.saturating_mul(x);
                AddressMap { block_stride, head_stride: tile, slot_stride: x, chunk: x, chunk_stride }
            }
            (CacheLayout::VllmPacked, Half::V) => {
                AddressMap { block_stride, head_stride: tile, slot_stride: 1, chunk: 1, chunk_stride: block }
            }
        }
    }

    /// A cache of `num_blocks` gapless blocks.
    ///
    /// # Errors
    /// What [`CacheSpec::validate`] refuses; [`Error::Zero`]; [`Error::Unsupported`] for more
    /// blocks than an `i32` block table can name; [`Error::Overflow`].
    pub fn shape(&self, num_blocks: usize) -> Result<CacheShape> {
        // Before the address maps: their products must not overflow.
        self.validate()?;
        let shape =
            CacheShape { spec: *self, num_blocks, k_map: self.address_map(Half::K), v_map: self.address_map(Half::V) };
        shape.validate()?;
        Ok(shape)
    }
}

/// Element strides that place `(block, head, slot, channel)` in one half of a cache; see the
/// module's formula. Inside a block they follow the layout; `block_stride` may exceed the block
/// (padding, or K and V interleaved by an engine).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressMap {
    /// Elements from one block to the next.
    pub block_stride: usize,
    /// Elements from one head to the next inside a block.
    pub head_stride: usize,
    /// Elements from one token slot to the next inside a block.
    pub slot_stride: usize,
    /// Channels that lie side by side.
    pub chunk: usize,
    /// Elements from one such run of channels to the next.
    pub chunk_stride: usize,
}

impl AddressMap {
    /// The element index of `(block, head, slot, channel)`.
    #[inline(always)]
    pub const fn index(&self, block: usize, head: usize, slot: usize, channel: usize) -> usize {
        block * self.block_stride
            + head * self.head_stride
            + slot * self.slot_stride
            + (channel / self.chunk) * self.chunk_stride
            + channel % self.chunk
    }

    /// Whether a row of `head_dim` channels lies in one contiguous run.
    pub const fn rows_are_contiguous(&self, head_dim: usize) -> bool {
        self.chunk >= head_dim
    }
}

/// A [`CacheSpec`] with a number of blocks and the strides between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// The geometry of a block.
    pub spec: CacheSpec,
    /// Blocks in each half.
    pub num_blocks: usize,
    /// Strides of K.
    pub k_map: AddressMap,
    /// Strides of V.
    pub v_map: AddressMap,
}

impl CacheShape {
    /// The strides of `half`.
    pub const fn map(&self, half: Half) -> &AddressMap {
        match half {
            Half::K => &self.k_map,
            Half::V => &self.v_map,
        }
    }

    /// The same cache with blocks further apart (in elements) than they are long.
    ///
    /// # Errors
    /// [`Error::StrideTooSmall`] if blocks would overlap; [`Error::Overflow`].
    pub fn with_block_strides(mut self, k: usize, v: usize) -> Result<Self> {
        self.k_map.block_stride = k;
        self.v_map.block_stride = v;
        self.validate()?;
        Ok(self)
    }

    /// Token slots in the cache. Like the other sizes here it saturates on a shape that
    /// [`CacheShape::validate`] refuses: no buffer is that long.
    pub const fn num_slots(&self) -> usize {
        self.num_blocks.saturating_mul(self.spec.block_size)
    }

    /// Bytes the buffer of `half` must have.
    pub const fn buffer_bytes(&self, half: Half) -> usize {
        let spec = &self.spec;
        let block = spec.block_size.saturating_mul(spec.num_kv_heads).saturating_mul(spec.head_dim(half));
        let before = self.num_blocks.saturating_sub(1).saturating_mul(self.map(half).block_stride);
        before.saturating_add(block).saturating_mul(spec.format(half).bytes())
    }

    /// Elements the dynamic-scale buffer of `half` must have: `[blocks, heads, block]`, the
    /// scales of one (block, head) tile side by side. Zero where the half has none.
    pub const fn dynamic_scale_len(&self, half: Half) -> usize {
        if self.spec.has_dynamic_scales(half) { self.num_slots().saturating_mul(self.spec.num_kv_heads) } else { 0 }
    }

    /// The index of the dynamic scale of `(block, head, slot)`.
    #[inline(always)]
    pub const fn dynamic_scale_index(&self, block: usize, head: usize, slot: usize) -> usize {
        (block * self.spec.num_kv_heads + head) * self.spec.block_size + slot
    }

    /// Checks spec, block count and strides. Inside a block only the layout's own strides are
    /// accepted, so that blocks can be copied whole and never alias.
    ///
    /// # Errors
    /// See [`CacheSpec::shape`] and [`CacheShape::with_block_strides`].
    pub fn validate(&self) -> Result<()> {
        self.spec.validate()?;
        if self.num_blocks == 0 {
            return Err(Error::Zero { what: "the number of blocks" });
        }
        if self.num_blocks > i32::MAX as usize {
            return Err(Error::Unsupported {
                what: "the number of blocks",
                value: self.num_blocks,
                supported: "at most 2147483647, what an i32 block table can name",
            });
        }
        for half in [Half::K, Half::V] {
            let (what, stride_name) = match half {
                Half::K => ("K cache bytes", "K block stride"),
                Half::V => ("V cache bytes", "V block stride"),
            };
            let map = self.map(half);
            let block = self.spec.elements_per_block(half)?;
            if map.block_stride < block {
                return Err(Error::StrideTooSmall { what: stride_name, stride: map.block_stride, min: block });
            }
            let own = AddressMap { block_stride: map.block_stride, ..self.spec.address_map(half) };
            if *map != own {
                return Err(Error::GeometryMismatch {
                    what: "strides inside a block",
                    reason: format!("{map:?} is not the layout's {own:?}"),
                });
            }
            checked_product(what, &[self.num_blocks, map.block_stride, self.spec.format(half).bytes()])?;
        }
        checked_product("dynamic scales", &[self.num_blocks, self.spec.block_size, self.spec.num_kv_heads, 4])?;
        Ok(())
    }
}

/// The product of `factors`, or [`Error::Overflow`] if it does not fit in `isize` (the limit of
/// one allocation).
pub(crate) fn checked_product(what: &'static str, factors: &[usize]) -> Result<usize> {
    factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor))
        .filter(|&product| product <= isize::MAX as usize)
        .ok_or(Error::Overflow { what })
}
