//! The unsafe storey: the operations of [`crate::args`] over pointers, for engines that own their
//! memory and know it only by address.
//!
//! The argument structs are those of the safe storey with [`Pointers`] as their memory: a
//! [`PtrRef`] or [`PtrMut`] in each place where the CPU backend has a slice. Shapes, strides and
//! lengths are validated as everywhere; what the caller vouches for is that the pointers are what
//! they say (see *Contract*).
//!
//! This is the middle of the three storeys. On a GPU the lower one is the C ABI (`quantkv.h`: POD
//! parameter structs, an opaque stream, an `int` status); `raw::bindings` (features `cuda`, `rocm`) has its
//! generated declarations, and `raw::cuda` and `raw::rocm` one `unsafe fn` for each entry point,
//! taking the same argument structs and a stream. On the CPU there is no stream and no C below:
//! work is done when the call returns, by a [`CpuBackend`].
//!
//! # Contract
//!
//! For each call, until it returns:
//! * a [`PtrRef`] points to `len` initialized elements, aligned for their type, that nobody writes;
//! * a [`PtrMut`] likewise, and nobody else reads or writes what the operation writes;
//! * an empty buffer may have any pointer, null included.
//!
//! Buffers of a layer being written may *interleave*: K and V blocks taking turns in one
//! allocation (`[blocks, 2, heads, block, dim]`), or the blocks of all layers. Describe it with
//! [`CacheShape::with_block_strides`]; the buffers then overlap as ranges, the blocks do not.
//! The copies never form references to such ranges as a whole, nor does [`cache_write`] where K and V
//! of the layer interleave. Every other call does, gaps between blocks included: until it returns,
//! nobody may write in the range of a buffer it reads, nor touch the range of one it writes, a
//! neighbouring layer's blocks among them.

#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) mod abi;
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub mod bindings;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "rocm"))]
mod entry_points;
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) mod gpu;
#[cfg(feature = "rocm")]
pub mod rocm;
#[cfg(any(feature = "cuda", feature = "rocm"))]
pub(crate) mod views;

use crate::args::{
    Absmax, CacheWrite, CopyBlocks, Dequantize, Gather, GatherBytes, LayerMut, LayerRef, MergeStates, PagedAttention,
    Quantize, SwapBlocks, UpdateScales,
};
use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::format::{Element, Pod};
use crate::layout::{CacheShape, Half};
use crate::memory::{BufferLen, Memory};
use crate::scale::ScaleRef;

/// Memory by pointer and length.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pointers;

/// `len` elements to read.
#[derive(Clone, Copy, Debug)]
pub struct PtrRef<T> {
    ptr: *const T,
    len: usize,
}

/// `len` elements to write.
#[derive(Clone, Copy, Debug)]
pub struct PtrMut<T> {
    ptr: *mut T,
    len: usize,
}

impl<T> PtrRef<T> {
    /// `len` elements at `ptr`. Nothing is read before an operation is called.
    pub const fn new(ptr: *const T, len: usize) -> Self {
        PtrRef { ptr, len }
    }

    /// The address, as CUDA's driver has it.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(self) -> u64 {
        self.ptr.addr() as u64
    }
}

impl<T> PtrMut<T> {
    /// `len` elements at `ptr`. Nothing is written before an operation is called.
    pub const fn new(ptr: *mut T, len: usize) -> Self {
        PtrMut { ptr, len }
    }

    /// The same elements, to read.
    #[cfg(any(feature = "cuda", feature = "rocm"))]
    fn reading(self) -> PtrRef<T> {
        PtrRef { ptr: self.ptr, len: self.len }
    }

    /// The address, as CUDA's driver has it.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(self) -> u64 {
        self.ptr.addr() as u64
    }
}

impl<T> BufferLen for PtrRef<T> {
    fn buffer_len(&self) -> usize {
        self.len
    }
}

impl<T> BufferLen for PtrMut<T> {
    fn buffer_len(&self) -> usize {
        self.len
    }
}

impl Memory for Pointers {
    type Ref<'a, T: Pod> = PtrRef<T>;
    type Mut<'a, T: Pod> = PtrMut<T>;

    fn shorten<'short, 'long: 'short, T: Pod>(buffer: PtrRef<T>) -> PtrRef<T> {
        buffer
    }

    fn shorten_mut<'short, 'long: 'short, T: Pod>(buffer: PtrMut<T>) -> PtrMut<T> {
        buffer
    }
}

/// Buffers by pointer that can be had by slice.
trait IntoSlices<'a> {
    type Slices;

    /// # Safety
    /// The module's contract, for `'a`; buffers to write do not overlap any other.
    unsafe fn into_slices(self) -> Self::Slices;
}

impl<'a, T: Pod> IntoSlices<'a> for PtrRef<T> {
    type Slices = &'a [T];

    unsafe fn into_slices(self) -> &'a [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: not empty, so by contract `len` readable elements.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl<'a, T: Pod> IntoSlices<'a> for PtrMut<T> {
    type Slices = &'a mut [T];

    unsafe fn into_slices(self) -> &'a mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: not empty, so by contract `len` elements nobody else uses.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<'a, B: IntoSlices<'a>> IntoSlices<'a> for Option<B> {
    type Slices = Option<B::Slices>;

    unsafe fn into_slices(self) -> Self::Slices {
        // SAFETY: the caller's.
        self.map(|buffer| unsafe { buffer.into_slices() })
    }
}

/// Rebuilds a struct over slices: first the fields that are plain, then those that hold buffers.
/// The caller gives the `unsafe` block.
macro_rules! slices {
    ($from:ident as $to:ident { $($plain:ident),*; $($buffer:ident),* }) => {
        $to { $($plain: $from.$plain,)* $($buffer: $from.$buffer.into_slices(),)* }
    };
}

impl<'a> IntoSlices<'a> for ScaleRef<'_, Pointers> {
    type Slices = ScaleRef<'a, CpuBackend>;

    unsafe fn into_slices(self) -> Self::Slices {
        // SAFETY: the caller's.
        unsafe { slices!(self as ScaleRef { strides; values }) }
    }
}

impl<'a> IntoSlices<'a> for LayerRef<'_, Pointers> {
    type Slices = LayerRef<'a, CpuBackend>;

    unsafe fn into_slices(self) -> Self::Slices {
        // SAFETY: the caller's.
        unsafe { slices!(self as LayerRef { ; k, v, k_dynamic, v_dynamic }) }
    }
}

impl<'a> IntoSlices<'a> for LayerMut<'_, Pointers> {
    type Slices = LayerMut<'a, CpuBackend>;

    unsafe fn into_slices(self) -> Self::Slices {
        // SAFETY: the caller's; K and V do not overlap.
        unsafe { slices!(self as LayerMut { ; k, v, k_dynamic, v_dynamic }) }
    }
}

/// Declares an operation that becomes the backend's own once its buffers are slices.
macro_rules! operations {
    ($($name:ident $(<$t:ident>)? : $op:ident { $($plain:ident),*; $($buffer:ident),* })*) => {$(
        #[doc = concat!("[`Backend::", stringify!($name), "`] over pointers.")]
        ///
        /// # Errors
        #[doc = concat!("Those of [`Backend::", stringify!($name), "`].")]
        ///
        /// # Safety
        /// The contract of [this module](self).
        pub unsafe fn $name $(<$t: Element>)? (backend: &CpuBackend, op: $op<'_, Pointers $(, $t)?>) -> Result<()> {
            op.validate()?;
            // SAFETY: the caller's contract, for as long as this call.
            backend.$name(unsafe { slices!(op as $op { $($plain),*; $($buffer),* }) })
        }
    )*};
}

operations! {
    paged_attention<T>: PagedAttention {
        shape, params, num_heads, num_tokens, max_query_len, query_strides, block_table_stride, output_strides,
        plan_is_ready;
        cache, k_scale, v_scale, query, query_starts, seq_lens, block_tables, alibi_slopes, sinks, output, lse,
        workspace
    }
    merge_states<T>: MergeStates { num_tokens, num_heads, head_dim, strides; a, a_lse, b, b_lse, output, lse }
    gather<T>: Gather {
        shape, block_table_stride, num_tokens, key_strides, value_strides;
        cache, k_scale, v_scale, block_tables, cu_seq_lens, starts, key, value
    }
    gather_bytes: GatherBytes {
        shape, block_table_stride, num_tokens;
        cache, block_tables, cu_seq_lens, starts, key, value
    }
    absmax<T>: Absmax { strides, num_tokens, num_heads, head_dim, granularity; input, running }
    update_scales: UpdateScales { divisor; absmax, scales }
    quantize<T>: Quantize { num_tokens, num_heads, head_dim, format, strides; input, scale, codes }
    dequantize<T>: Dequantize { num_tokens, num_heads, head_dim, format, strides; codes, scale, output }
}

/// [`Backend::cache_write`] over pointers. If K and V interleave, each run of tokens that fall in
/// one block is a call of its own on that block.
///
/// # Errors
/// Those of [`Backend::cache_write`]; [`Error::GeometryMismatch`] if K and V overlap but do not
/// take turns block by block.
///
/// # Safety
/// The contract of [this module](self).
pub unsafe fn cache_write<T: Element>(backend: &CpuBackend, op: CacheWrite<'_, Pointers, T>) -> Result<()> {
    op.validate()?;
    if interleaved(&op.shape, &op.cache)? {
        // SAFETY: the caller's contract, and K and V blocks are disjoint.
        return unsafe { write_by_block(backend, op) };
    }
    // SAFETY: the caller's contract, and K and V are disjoint.
    backend.cache_write(unsafe {
        slices!(op as CacheWrite {
            shape, key_strides, value_strides;
            cache, key, value, slot_mapping, k_scale, v_scale
        })
    })
}

/// Copies blocks inside one pool, as [`Backend::copy_blocks`] does; see [`CopyBlocks`].
///
/// # Errors
/// [`CopyBlocks::validate`].
///
/// # Safety
/// The contract of [this module](self).
pub unsafe fn copy_blocks(_backend: &CpuBackend, op: CopyBlocks<'_, '_, Pointers>) -> Result<()> {
    op.validate()?;
    for layer in op.layers.iter() {
        let src = BlockPointers::of_mut(layer);
        for pair in op.pairs {
            // SAFETY: validated: both blocks lie in the layer and no block is both read and written.
            unsafe { src.copy_block(&op.shape, pair.src, &src, &op.shape, pair.dst) };
        }
    }
    Ok(())
}

/// Moves blocks between two pools, either way, as [`Backend::swap_out`] and [`Backend::swap_in`]
/// do; see [`SwapBlocks`].
///
/// # Errors
/// [`SwapBlocks::validate`].
///
/// # Safety
/// The contract of [this module](self); the pools share no block.
pub unsafe fn swap_blocks(_backend: &CpuBackend, op: SwapBlocks<'_, '_, Pointers, Pointers>) -> Result<()> {
    op.validate()?;
    for (src, dst) in op.src.iter().zip(op.dst.iter()) {
        let (src, dst) = (BlockPointers::of_ref(src), BlockPointers::of_mut(dst));
        for pair in op.pairs {
            // SAFETY: validated: both blocks lie in their layers, of one geometry.
            unsafe { src.copy_block(&op.src_shape, pair.src, &dst, &op.dst_shape, pair.dst) };
        }
    }
    Ok(())
}

/// One layer's buffers by address, K then V. Pointers to read from are only read from.
struct BlockPointers {
    codes: [*mut u8; 2],
    dynamic: [Option<*mut f32>; 2],
}

impl BlockPointers {
    fn of_ref(layer: &LayerRef<'_, Pointers>) -> Self {
        let dynamic = |scales: Option<PtrRef<f32>>| scales.map(|scales| scales.ptr.cast_mut());
        BlockPointers {
            codes: [layer.k.ptr.cast_mut(), layer.v.ptr.cast_mut()],
            dynamic: [dynamic(layer.k_dynamic), dynamic(layer.v_dynamic)],
        }
    }

    fn of_mut(layer: &LayerMut<'_, Pointers>) -> Self {
        let dynamic = |scales: Option<PtrMut<f32>>| scales.map(|scales| scales.ptr);
        BlockPointers {
            codes: [layer.k.ptr, layer.v.ptr],
            dynamic: [dynamic(layer.k_dynamic), dynamic(layer.v_dynamic)],
        }
    }

    /// Copies one block, dynamic scales included.
    ///
    /// # Safety
    /// The blocks lie in the layers, which have these shapes and the same spec, and do not overlap.
    unsafe fn copy_block(&self, shape: &CacheShape, src: u32, to: &Self, to_shape: &CacheShape, dst: u32) {
        for (index, half) in [Half::K, Half::V].into_iter().enumerate() {
            let from = block_range(shape, half, src as usize);
            let into = block_range(to_shape, half, dst as usize);
            // SAFETY: in bounds and disjoint, by this function's contract.
            unsafe {
                self.codes[index].add(from.start).copy_to_nonoverlapping(to.codes[index].add(into.start), from.len());
            }
            if let (Some(scales), Some(to_scales)) = (self.dynamic[index], to.dynamic[index]) {
                let from = shape.dynamic_scale_index(src as usize, 0, 0);
                let into = to_shape.dynamic_scale_index(dst as usize, 0, 0);
                let len = shape.dynamic_scale_index(1, 0, 0);
                // SAFETY: as above; the scales of a block lie side by side.
                unsafe { scales.add(from).copy_to_nonoverlapping(to_scales.add(into), len) };
            }
        }
    }
}

/// The bytes of one block of a half. Every layout's block is one run of bytes.
fn block_range(shape: &CacheShape, half: Half, block: usize) -> std::ops::Range<usize> {
    let spec = &shape.spec;
    let bytes = spec.format(half).bytes();
    let start = block * shape.map(half).block_stride * bytes;
    start..start + spec.block_size * spec.num_kv_heads * spec.head_dim(half) * bytes
}

/// Whether the ranges of K and V overlap. If they do, their blocks must take turns at one stride.
fn interleaved(shape: &CacheShape, cache: &LayerMut<'_, Pointers>) -> Result<bool> {
    let (k, v) = (cache.k.ptr.addr(), cache.v.ptr.addr());
    let (k_bytes, v_bytes) = (shape.buffer_bytes(Half::K), shape.buffer_bytes(Half::V));
    // The buffers as described by their lengths may overlap further than the cache needs.
    if k.saturating_add(cache.k.len) <= v || v.saturating_add(cache.v.len) <= k {
        return Ok(false);
    }
    let stride = |half| shape.map(half).block_stride * shape.spec.format(half).bytes();
    let (k_block, v_block) = (block_range(shape, Half::K, 0).len(), block_range(shape, Half::V, 0).len());
    let apart = k.saturating_add(k_bytes) <= v || v.saturating_add(v_bytes) <= k;
    let ahead = v.wrapping_sub(k).cast_signed().rem_euclid(stride(Half::K).cast_signed()).cast_unsigned();
    let take_turns = stride(Half::K) == stride(Half::V) && ahead >= k_block && stride(Half::K) - ahead >= v_block;
    if apart || take_turns {
        return Ok(true);
    }
    Err(Error::GeometryMismatch {
        what: "K and V blocks in one allocation",
        reason: format!("K blocks of {k_block} bytes and V blocks of {v_block} bytes, {ahead} bytes ahead, overlap"),
    })
}

/// [`cache_write`] one block at a time: a block of K and a block of V never overlap.
///
/// # Safety
/// The contract of [this module](self); `op` is validated; K and V blocks are disjoint.
unsafe fn write_by_block<T: Element>(backend: &CpuBackend, op: CacheWrite<'_, Pointers, T>) -> Result<()> {
    let CacheWrite { shape, cache, key_strides, value_strides, .. } = op;
    let one_block = shape.spec.shape(1)?;
    let block_size = shape.spec.block_size as i64;
    // SAFETY: the caller's contract; these are only read.
    let (key, value, slots) = unsafe { (op.key.into_slices(), op.value.into_slices(), op.slot_mapping.into_slices()) };
    let mut local = Vec::with_capacity(shape.spec.block_size);
    let mut next = 0;
    while let Some(slot) = slots.get(next) {
        let (token, block) = (next, slot.div_euclid(block_size));
        let run = slots[token..].iter().take_while(|slot| slot.div_euclid(block_size) == block);
        local.clear();
        local.extend(run.map(|slot| slot - block * block_size));
        next += local.len();
        if block < 0 {
            continue;
        }
        let in_cache = usize::try_from(block).ok().filter(|&block| block < shape.num_blocks);
        if in_cache.is_none() {
            // Past the cache becomes past the block, where the kernel skips it and sets the fault.
            local.fill(block_size);
        }
        let window = window_of(&cache, &shape, in_cache.unwrap_or(0));
        // SAFETY: the caller's contract; the buffers of the window are one block each of K, V and
        // their dynamic scales: disjoint, and in bounds.
        backend.cache_write(unsafe {
            CacheWrite {
                shape: one_block,
                cache: window.into_slices(),
                key: &key[key_strides.token * token..],
                key_strides,
                value: &value[value_strides.token * token..],
                value_strides,
                slot_mapping: &local,
                k_scale: op.k_scale.into_slices(),
                v_scale: op.v_scale.into_slices(),
            }
        })?;
    }
    Ok(())
}

/// One block of a layer, as a layer of its own.
fn window_of(cache: &LayerMut<'_, Pointers>, shape: &CacheShape, block: usize) -> LayerMut<'static, Pointers> {
    let codes = |buffer: PtrMut<u8>, half| {
        let range = block_range(shape, half, block);
        PtrMut::new(buffer.ptr.wrapping_add(range.start), range.len())
    };
    let dynamic = |scales: Option<PtrMut<f32>>| {
        let (start, len) = (shape.dynamic_scale_index(block, 0, 0), shape.dynamic_scale_index(1, 0, 0));
        scales.map(|scales| PtrMut::new(scales.ptr.wrapping_add(start), len))
    };
    LayerMut {
        k: codes(cache.k, Half::K),
        v: codes(cache.v, Half::V),
        k_dynamic: dynamic(cache.k_dynamic),
        v_dynamic: dynamic(cache.v_dynamic),
    }
}
