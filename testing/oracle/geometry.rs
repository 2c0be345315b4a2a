//! One layer's cache as plain host data, addressed by the index formulas of the layouts.

use quantkv::layout::{DynamicScales, Half};
use quantkv::{CacheLayout, CacheShape, CacheSpec, KvFormat};

use super::formats::{bytes_of, load, quantized, store, store_nan};

/// The geometry of a cache, as a test case describes it.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub layout: CacheLayout,
    pub block_size: usize,
    pub heads: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub k_format: KvFormat,
    pub v_format: KvFormat,
    pub dynamic: bool,
    pub num_blocks: usize,
    /// Elements between one K block's end and the next one's start.
    pub k_gap: usize,
    /// The same for V.
    pub v_gap: usize,
    /// Bytes after the last block, which nobody may touch.
    pub tail: usize,
}

impl Geometry {
    /// A gapless cache with equal halves and no dynamic scales.
    pub fn plain(
        layout: CacheLayout,
        (heads, dim): (usize, usize),
        (block_size, num_blocks): (usize, usize),
        format: KvFormat,
    ) -> Self {
        Geometry {
            layout,
            block_size,
            heads,
            k_dim: dim,
            v_dim: dim,
            k_format: format,
            v_format: format,
            dynamic: false,
            num_blocks,
            k_gap: 0,
            v_gap: 0,
            tail: 0,
        }
    }

    /// The library's description of this cache.
    pub fn shape(&self) -> CacheShape {
        let spec = CacheSpec {
            layout: self.layout,
            block_size: self.block_size,
            num_kv_heads: self.heads,
            k_head_dim: self.k_dim,
            v_head_dim: self.v_dim,
            k_format: self.k_format,
            v_format: self.v_format,
            dynamic_scales: if self.dynamic { DynamicScales::PerSlotHead } else { DynamicScales::Off },
        };
        let strides = (self.block_stride(Half::K), self.block_stride(Half::V));
        spec.shape(self.num_blocks).unwrap().with_block_strides(strides.0, strides.1).unwrap()
    }

    pub fn dim(&self, half: Half) -> usize {
        if half == Half::K { self.k_dim } else { self.v_dim }
    }

    pub fn format(&self, half: Half) -> KvFormat {
        if half == Half::K { self.k_format } else { self.v_format }
    }

    pub fn has_dynamic(&self, half: Half) -> bool {
        self.dynamic && quantized(self.format(half))
    }

    pub fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    fn block_elements(&self, half: Half) -> usize {
        self.block_size * self.heads * self.dim(half)
    }

    fn block_stride(&self, half: Half) -> usize {
        self.block_elements(half) + if half == Half::K { self.k_gap } else { self.v_gap }
    }

    fn buffer_bytes(&self, half: Half) -> usize {
        ((self.num_blocks - 1) * self.block_stride(half) + self.block_elements(half)) * bytes_of(self.format(half))
            + self.tail
    }

    /// The bytes of element `(block, head, slot, d)`, by the layout's own index formula.
    pub fn element(&self, half: Half, block: usize, head: usize, slot: usize, d: usize) -> std::ops::Range<usize> {
        let (heads, size, dim) = (self.heads, self.block_size, self.dim(half));
        assert!(block < self.num_blocks && head < heads && slot < size && d < dim);
        let inside = match (self.layout, half) {
            // [blocks, heads, block, dim]
            (CacheLayout::Hnd, _) => (head * size + slot) * dim + d,
            // [blocks, block, heads, dim]
            (CacheLayout::Nhd, _) => (slot * heads + head) * dim + d,
            // [blocks, heads, dim/x, block, x]
            (CacheLayout::VllmPacked, Half::K) => {
                let x = 16 / bytes_of(self.k_format);
                ((head * (dim / x) + d / x) * size + slot) * x + d % x
            }
            // [blocks, heads, dim, block]
            (CacheLayout::VllmPacked, Half::V) => (head * dim + d) * size + slot,
            (other, _) => panic!("the oracle does not know the layout {other:?}"),
        };
        let bytes = bytes_of(self.format(half));
        let start = (block * self.block_stride(half) + inside) * bytes;
        start..start + bytes
    }

    /// The dynamic scale of `(block, head, slot)` in `[blocks, heads, block]`.
    pub fn dynamic_index(&self, block: usize, head: usize, slot: usize) -> usize {
        (block * self.heads + head) * self.block_size + slot
    }
}

/// One layer's cache in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    pub k: Vec<u8>,
    pub v: Vec<u8>,
    pub k_dynamic: Option<Vec<f32>>,
    pub v_dynamic: Option<Vec<f32>>,
}

impl Layer {
    /// Every byte (gaps and tail too) from `next`; dynamic scales from `scale`.
    pub fn filled(geometry: &Geometry, mut next: impl FnMut() -> u8, mut scale: impl FnMut() -> f32) -> Self {
        let mut bytes = |half| (0..geometry.buffer_bytes(half)).map(|_| next()).collect::<Vec<_>>();
        let (k, v) = (bytes(Half::K), bytes(Half::V));
        let len = geometry.num_slots() * geometry.heads;
        let mut dynamic = |half| geometry.has_dynamic(half).then(|| (0..len).map(|_| scale()).collect());
        Layer { k, v, k_dynamic: dynamic(Half::K), v_dynamic: dynamic(Half::V) }
    }

    /// Every element NaN, every dynamic scale NaN.
    pub fn poisoned(geometry: &Geometry) -> Self {
        let mut layer = Layer::filled(geometry, || 0xff, || f32::NAN);
        for half in [Half::K, Half::V] {
            for block in 0..geometry.num_blocks {
                for (head, slot, d) in rows_of(geometry, half) {
                    let at = geometry.element(half, block, head, slot, d);
                    store_nan(geometry.format(half), &mut layer.bytes_mut(half)[at]);
                }
            }
        }
        layer
    }

    pub fn bytes(&self, half: Half) -> &[u8] {
        if half == Half::K { &self.k } else { &self.v }
    }

    pub fn bytes_mut(&mut self, half: Half) -> &mut Vec<u8> {
        if half == Half::K { &mut self.k } else { &mut self.v }
    }

    pub fn dynamic(&self, half: Half) -> &Option<Vec<f32>> {
        if half == Half::K { &self.k_dynamic } else { &self.v_dynamic }
    }

    pub fn dynamic_mut(&mut self, half: Half) -> &mut Option<Vec<f32>> {
        if half == Half::K { &mut self.k_dynamic } else { &mut self.v_dynamic }
    }

    /// The stored element, before any scale.
    pub fn load(&self, geometry: &Geometry, half: Half, at: (usize, usize, usize, usize)) -> f32 {
        let range = geometry.element(half, at.0, at.1, at.2, at.3);
        load(geometry.format(half), &self.bytes(half)[range])
    }

    /// Stores an element that has been divided by its scales.
    pub fn store(&mut self, geometry: &Geometry, half: Half, at: (usize, usize, usize, usize), x: f32) {
        let range = geometry.element(half, at.0, at.1, at.2, at.3);
        store(geometry.format(half), x, &mut self.bytes_mut(half)[range]);
    }

    /// The dynamic scale of a row, 1 where the half has none.
    pub fn dynamic_scale(&self, geometry: &Geometry, half: Half, (block, head, slot): (usize, usize, usize)) -> f32 {
        self.dynamic(half).as_ref().map_or(1.0, |scales| scales[geometry.dynamic_index(block, head, slot)])
    }
}

/// Every (head, slot, channel) of a block.
fn rows_of(geometry: &Geometry, half: Half) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let (heads, size, dim) = (geometry.heads, geometry.block_size, geometry.dim(half));
    (0..heads).flat_map(move |head| (0..size).flat_map(move |slot| (0..dim).map(move |d| (head, slot, d))))
}

/// Static scales and the two strides that address them.
#[derive(Clone, Debug)]
pub struct Scales {
    pub values: Vec<f32>,
    pub head: usize,
    pub channel: usize,
}

impl Scales {
    pub fn tensor(value: f32) -> Self {
        Scales { values: vec![value], head: 0, channel: 0 }
    }

    pub fn at(&self, head: usize, channel: usize) -> f32 {
        self.values[head * self.head + channel * self.channel]
    }
}
