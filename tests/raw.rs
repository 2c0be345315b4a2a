//! The raw storey: every operation through pointers, on caches whose K and V take turns in one
//! allocation, against bytes and numbers worked out here.

use half::f16;
use quantkv::args::{
    Absmax, AttentionParams, BlockPair, CacheWrite, CopyBlocks, Dequantize, Gather, GatherBytes, LayerMut, LayerRef,
    MergeStates, PagedAttention, Quantize, RowStrides, SwapBlocks, UpdateScales,
};
use quantkv::layout::Half;
use quantkv::raw::{self, Pointers, PtrMut, PtrRef};
use quantkv::scale::{Granularity, ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, Element, Error, Faults, KvFormat};

const HEADS: usize = 2;
const K_DIM: usize = 16;
const V_DIM: usize = 3;
const BLOCK: usize = 8;

fn read<T>(data: &[T]) -> PtrRef<T> {
    PtrRef::new(data.as_ptr(), data.len())
}

fn to<T>(data: &mut [T]) -> PtrMut<T> {
    PtrMut::new(data.as_mut_ptr(), data.len())
}

fn one() -> ScaleRef<'static, Pointers> {
    ScaleRef { values: read(&[1.0f32]), strides: ScaleStrides { head: 0, channel: 0 } }
}

fn spec(layout: CacheLayout, format: KvFormat) -> CacheSpec {
    let mut spec = CacheSpec::new(HEADS, K_DIM, BLOCK, format).unwrap().with_layout(layout).unwrap();
    spec.v_head_dim = V_DIM;
    spec.validate().unwrap();
    spec
}

/// One allocation `[blocks, layers, (K block, V block, 5 elements of somebody else's)]`.
struct Interleaved {
    shape: CacheShape,
    bytes: Vec<u8>,
    /// Bytes from the start of a block's group to its V.
    v_offset: usize,
    /// Bytes one layer takes in a group.
    layer_bytes: usize,
    layers: usize,
}

impl Interleaved {
    fn new(spec: CacheSpec, blocks: usize, layers: usize) -> Self {
        let (k, v) = (spec.elements_per_block(Half::K).unwrap(), spec.elements_per_block(Half::V).unwrap());
        let stride = (k + v + 5) * layers;
        let shape = spec.shape(blocks).unwrap().with_block_strides(stride, stride).unwrap();
        let size = spec.k_format.bytes();
        let bytes = vec![0xEE; blocks * stride * size];
        Interleaved { shape, bytes, v_offset: k * size, layer_bytes: (k + v + 5) * size, layers }
    }

    /// Layer `layer`: two ranges that overlap, of exactly the length the shape asks for.
    fn layer_mut(&mut self, layer: usize) -> LayerMut<'static, Pointers> {
        let base = self.bytes.as_mut_ptr().wrapping_add(layer * self.layer_bytes);
        LayerMut {
            k: PtrMut::new(base, self.shape.buffer_bytes(Half::K)),
            v: PtrMut::new(base.wrapping_add(self.v_offset), self.shape.buffer_bytes(Half::V)),
            k_dynamic: None,
            v_dynamic: None,
        }
    }

    fn layer_ref(&self, layer: usize) -> LayerRef<'static, Pointers> {
        let base = self.bytes.as_ptr().wrapping_add(layer * self.layer_bytes);
        LayerRef {
            k: PtrRef::new(base, self.shape.buffer_bytes(Half::K)),
            v: PtrRef::new(base.wrapping_add(self.v_offset), self.shape.buffer_bytes(Half::V)),
            k_dynamic: None,
            v_dynamic: None,
        }
    }

    /// Where one element must be, spelled out from the layouts' definitions.
    fn byte_index(&self, layer: usize, half: Half, block: usize, head: usize, slot: usize, d: usize) -> usize {
        let spec = &self.shape.spec;
        let size = spec.k_format.bytes();
        let (dim, offset) = match half {
            Half::K => (K_DIM, 0),
            Half::V => (V_DIM, self.v_offset),
        };
        let element = match (spec.layout, half) {
            (CacheLayout::Hnd, _) => (head * BLOCK + slot) * dim + d,
            (CacheLayout::Nhd, _) => (slot * HEADS + head) * dim + d,
            (_, Half::K) => {
                ((head * (dim / (16 / size)) + d / (16 / size)) * BLOCK + slot) * (16 / size) + d % (16 / size)
            }
            (_, Half::V) => (head * dim + d) * BLOCK + slot,
        };
        (block * self.layers + layer) * self.layer_bytes + offset + element * size
    }
}

/// ±2^e with e in -4..=4 by position: exact in every format.
fn sample(token: usize, head: usize, d: usize) -> f32 {
    let n = token * 31 + head * 7 + d * 3;
    let magnitude = 2f32.powi((n % 9) as i32 - 4);
    if n.is_multiple_of(5) { -magnitude } else { magnitude }
}

/// The bytes that store such a power of two: sign, biased exponent, no mantissa.
fn code(x: f32, format: KvFormat) -> Vec<u8> {
    let (sign, exponent) = (u8::from(x < 0.0), x.abs().log2() as i32);
    match format {
        KvFormat::Fp8E4M3 => vec![sign << 7 | ((exponent + 7) as u8) << 3],
        KvFormat::F16 => (u16::from(sign) << 15 | ((exponent + 15) as u16) << 10).to_ne_bytes().to_vec(),
        other => panic!("{other}"),
    }
}

fn dense<T: Element>(tokens: usize, dim: usize) -> Vec<T> {
    let row = move |token| (0..HEADS).flat_map(move |head| (0..dim).map(move |d| T::from_f32(sample(token, head, d))));
    (0..tokens).flat_map(row).collect()
}

fn write<T: Element>(
    backend: &CpuBackend,
    cache: &mut Interleaved,
    layer: usize,
    slots: &[i64],
) -> quantkv::Result<()> {
    let (key, value) = (dense::<T>(slots.len(), K_DIM), dense::<T>(slots.len(), V_DIM));
    let op = CacheWrite::<Pointers, T> {
        shape: cache.shape,
        cache: cache.layer_mut(layer),
        key: read(&key),
        key_strides: RowStrides::contiguous(HEADS, K_DIM),
        value: read(&value),
        value_strides: RowStrides::contiguous(HEADS, V_DIM),
        slot_mapping: read(slots),
        k_scale: one(),
        v_scale: one(),
    };
    // SAFETY: all buffers live past the call; K and V blocks take turns and nobody else uses them.
    unsafe { raw::cache_write(backend, op) }
}

/// Tokens hop between blocks, fill runs, skip, repeat a slot, and leave the cache.
const SLOTS: [i64; 14] = [3, 4, 5, 23, -1, 0, 1, 9, 24, i64::MAX, 10, 3, -5, 16];

#[test]
fn interleaved_writes_touch_their_own_bytes_only() {
    for backend in [CpuBackend::scalar(), CpuBackend::new()] {
        for layout in CacheLayout::ALL {
            for format in [KvFormat::Fp8E4M3, KvFormat::F16] {
                let mut cache = Interleaved::new(spec(layout, format), 3, 2);
                let mut expected = cache.bytes.clone();
                for (token, slot) in SLOTS.into_iter().enumerate().filter(|(_, slot)| (0..24).contains(slot)) {
                    let (block, slot) = (slot as usize / BLOCK, slot as usize % BLOCK);
                    for (half, dim) in [(Half::K, K_DIM), (Half::V, V_DIM)] {
                        for (head, d) in (0..HEADS).flat_map(|head| (0..dim).map(move |d| (head, d))) {
                            let at = cache.byte_index(1, half, block, head, slot, d);
                            let bytes = code(sample(token, head, d), format);
                            expected[at..at + bytes.len()].copy_from_slice(&bytes);
                        }
                    }
                }
                match format {
                    KvFormat::F16 => write::<f16>(&backend, &mut cache, 1, &SLOTS).unwrap(),
                    _ => write::<f32>(&backend, &mut cache, 1, &SLOTS).unwrap(),
                }
                assert!(cache.bytes == expected, "{layout:?} {format}");
                assert_eq!(backend.faults().unwrap(), Faults::SLOT_OUT_OF_RANGE);
            }
        }
    }
}

#[test]
fn dynamic_scales_follow_their_blocks() {
    let backend = CpuBackend::new();
    let spec = spec(CacheLayout::Hnd, KvFormat::Fp8E4M3).with_dynamic_scales().unwrap();
    let mut cache = Interleaved::new(spec, 3, 1);
    let (mut k_scales, mut v_scales) = (vec![-1f32; 3 * HEADS * BLOCK], vec![-1f32; 3 * HEADS * BLOCK]);
    let (key, value) = (dense::<f32>(2, K_DIM), dense::<f32>(2, V_DIM));
    let layer =
        LayerMut { k_dynamic: Some(to(&mut k_scales)), v_dynamic: Some(to(&mut v_scales)), ..cache.layer_mut(0) };
    let op = CacheWrite::<Pointers, f32> {
        shape: cache.shape,
        cache: layer,
        key: read(&key),
        key_strides: RowStrides::contiguous(HEADS, K_DIM),
        value: read(&value),
        value_strides: RowStrides::contiguous(HEADS, V_DIM),
        slot_mapping: read(&[2 * 8 + 5, 6]),
        k_scale: one(),
        v_scale: one(),
    };
    // SAFETY: as in `write`.
    unsafe { raw::cache_write(&backend, op) }.unwrap();
    for (scales, dim) in [(&k_scales, K_DIM), (&v_scales, V_DIM)] {
        for (index, &scale) in scales.iter().enumerate() {
            let (block, head, slot) = (index / (HEADS * BLOCK), index / BLOCK % HEADS, index % BLOCK);
            let token = [(2, 5), (0, 6)].iter().position(|&at| at == (block, slot));
            let absmax = |token| (0..dim).map(|d| sample(token, head, d).abs()).fold(0.0, f32::max);
            assert_eq!(
                scale,
                token.map_or(-1.0, |token| absmax(token) / 448.0),
                "block {block} head {head} slot {slot}"
            );
        }
    }
    // They travel with the block: 2 onto 1.
    let layer =
        LayerMut { k_dynamic: Some(to(&mut k_scales)), v_dynamic: Some(to(&mut v_scales)), ..cache.layer_mut(0) };
    let op = CopyBlocks::<Pointers> { shape: cache.shape, layers: &mut [layer], pairs: &[BlockPair::new(2, 1)] };
    // SAFETY: as in `write`.
    unsafe { raw::copy_blocks(&backend, op) }.unwrap();
    let tile = HEADS * BLOCK;
    for scales in [&k_scales, &v_scales] {
        assert_eq!(scales[tile..2 * tile], scales[2 * tile..]);
        assert!(scales[..tile].contains(&-1.0) && scales[2 * tile..].iter().any(|&s| s > 0.0));
    }
}

#[test]
fn copies_and_swaps_by_pointer_move_whole_blocks() {
    let backend = CpuBackend::new();
    for layout in CacheLayout::ALL {
        let spec = spec(layout, KvFormat::F16);
        let mut device = Interleaved::new(spec, 4, 2);
        for (index, byte) in device.bytes.iter_mut().enumerate() {
            *byte = (index * 7 % 251) as u8;
        }
        let before = device.bytes.clone();
        let own = |cache: &Interleaved| cache.layer_bytes - 5 * 2;
        // (block, layer) groups lie side by side; the last ten bytes of each are somebody else's.
        let group = |cache: &Interleaved, block: usize, layer: usize| {
            let start = (block * cache.layers + layer) * cache.layer_bytes;
            start..start + own(cache)
        };
        let mut layers = [device.layer_mut(0), device.layer_mut(1)];
        let pairs = [BlockPair::new(0, 3), BlockPair::new(2, 1)];
        let op = CopyBlocks::<Pointers> { shape: device.shape, layers: &mut layers, pairs: &pairs };
        // SAFETY: the layers' blocks are disjoint and only used here.
        unsafe { raw::copy_blocks(&backend, op) }.unwrap();
        let mut expected = before.clone();
        for (src, dst, layer) in [(0, 3, 0), (0, 3, 1), (2, 1, 0), (2, 1, 1)] {
            expected.copy_within(group(&device, src, layer), group(&device, dst, layer).start);
        }
        assert!(device.bytes == expected, "copy, {layout:?}");

        // Out to a pool of other strides, and back to another block.
        let mut host = Interleaved::new(spec, 2, 2);
        let moves = [(1, 0), (3, 1)].map(|(src, dst)| BlockPair::new(src, dst));
        let (src, mut dst) = ([device.layer_ref(0), device.layer_ref(1)], [host.layer_mut(0), host.layer_mut(1)]);
        let op = SwapBlocks::<Pointers, Pointers> {
            src_shape: device.shape,
            src: &src,
            dst_shape: host.shape,
            dst: &mut dst,
            pairs: &moves,
        };
        // SAFETY: as above; the pools are two allocations.
        unsafe { raw::swap_blocks(&backend, op) }.unwrap();
        let mut host_expected = vec![0xEE; host.bytes.len()];
        for (src, dst, layer) in [(1, 0, 0), (1, 0, 1), (3, 1, 0), (3, 1, 1)] {
            host_expected[group(&host, dst, layer)].copy_from_slice(&device.bytes[group(&device, src, layer)]);
        }
        assert!(host.bytes == host_expected, "swap out, {layout:?}");
        let (src, mut dst) = ([host.layer_ref(0), host.layer_ref(1)], [device.layer_mut(0), device.layer_mut(1)]);
        let op = SwapBlocks::<Pointers, Pointers> {
            src_shape: host.shape,
            src: &src,
            dst_shape: device.shape,
            dst: &mut dst,
            pairs: &[BlockPair::new(1, 2)],
        };
        // SAFETY: as above.
        unsafe { raw::swap_blocks(&backend, op) }.unwrap();
        for layer in [0, 1] {
            expected.copy_within(group(&device, 3, layer), group(&device, 2, layer).start);
        }
        assert!(device.bytes == expected, "swap in, {layout:?}");
    }
}

#[test]
fn reads_interleaved_caches() {
    let backend = CpuBackend::new();
    let mut cache = Interleaved::new(spec(CacheLayout::Nhd, KvFormat::Fp8E4M3), 3, 1);
    // Positions 0..10 of a sequence in blocks 2 and 0.
    let slots: Vec<i64> = (16..24).chain(0..2).collect();
    write::<f32>(&backend, &mut cache, 0, &slots).unwrap();
    let (tables, lens) = ([2, 0], [0, 10]);

    let (mut key, mut value) = (vec![0f32; 10 * HEADS * K_DIM], vec![0f32; 10 * HEADS * V_DIM]);
    let op = Gather::<Pointers, f32> {
        shape: cache.shape,
        cache: cache.layer_ref(0),
        k_scale: one(),
        v_scale: one(),
        block_tables: read(&tables),
        block_table_stride: 2,
        cu_seq_lens: read(&lens),
        starts: None,
        num_tokens: 10,
        key: to(&mut key),
        key_strides: RowStrides::contiguous(HEADS, K_DIM),
        value: to(&mut value),
        value_strides: RowStrides::contiguous(HEADS, V_DIM),
    };
    // SAFETY: the cache is only read; the outputs are ours.
    unsafe { raw::gather(&backend, op) }.unwrap();
    assert_eq!((key, value), (dense::<f32>(10, K_DIM), dense::<f32>(10, V_DIM)));

    let (mut key, mut value) = (vec![0u8; 10 * HEADS * K_DIM], vec![0u8; 10 * HEADS * V_DIM]);
    let op = GatherBytes::<Pointers> {
        shape: cache.shape,
        cache: cache.layer_ref(0),
        block_tables: read(&tables),
        block_table_stride: 2,
        cu_seq_lens: read(&lens),
        starts: Some(read(&[0])),
        num_tokens: 10,
        key: to(&mut key),
        value: to(&mut value),
    };
    // SAFETY: as above.
    unsafe { raw::gather_bytes(&backend, op) }.unwrap();
    let codes = |dim| dense::<f32>(10, dim).into_iter().flat_map(|x| code(x, KvFormat::Fp8E4M3)).collect::<Vec<u8>>();
    assert_eq!((key, value), (codes(K_DIM), codes(V_DIM)));

    // A zero query weighs all positions alike, so the output is the mean of V.
    let (mut output, mut lse) = (vec![0f32; HEADS * V_DIM], vec![0f32; HEADS]);
    let mut workspace = vec![0f32; backend.attention_workspace_len(&cache.shape, HEADS, 1)];
    let op = PagedAttention::<Pointers, f32> {
        shape: cache.shape,
        cache: cache.layer_ref(0),
        k_scale: one(),
        v_scale: one(),
        params: AttentionParams::new(1.0),
        num_heads: HEADS,
        num_tokens: 1,
        max_query_len: None,
        query: read(&[0f32; HEADS * K_DIM]),
        query_strides: RowStrides::contiguous(HEADS, K_DIM),
        query_starts: read(&[0, 1]),
        seq_lens: read(&[10]),
        block_tables: read(&tables),
        block_table_stride: 2,
        alibi_slopes: None,
        sinks: None,
        output: to(&mut output),
        output_strides: RowStrides::contiguous(HEADS, V_DIM),
        lse: Some(to(&mut lse)),
        workspace: to(&mut workspace),
        plan_is_ready: false,
    };
    // SAFETY: as above.
    unsafe { raw::paged_attention(&backend, op) }.unwrap();
    for (index, &x) in output.iter().enumerate() {
        let terms = || (0..10).map(|token| f64::from(sample(token, index / V_DIM, index % V_DIM)));
        let (mean, size) = (terms().sum::<f64>() / 10.0, terms().map(f64::abs).sum::<f64>() / 10.0);
        // Ten terms and a division: at most a dozen roundings of the terms' size.
        assert!((f64::from(x) - mean).abs() <= 12.0 * f64::from(f32::EPSILON) * size, "{x} {mean}");
    }
    assert!(lse.iter().all(|x| (x - 10f32.ln()).abs() <= 4.0 * f32::EPSILON * 10f32.ln()), "{lse:?}");
}

#[test]
fn dense_operations_by_pointer() {
    let backend = CpuBackend::new();
    let strides = RowStrides::contiguous(1, 4);
    let input = [1.0f32, -2.0, 0.5, 448.0];
    let (mut codes, mut output) = ([0u8; 4], [0f32; 4]);
    let op = Quantize::<Pointers, f32> {
        num_tokens: 1,
        num_heads: 1,
        head_dim: 4,
        format: KvFormat::Fp8E4M3,
        input: read(&input),
        strides,
        scale: one(),
        codes: to(&mut codes),
    };
    // SAFETY: separate arrays, alive past the call; so for all calls below.
    unsafe { raw::quantize(&backend, op) }.unwrap();
    assert_eq!(codes, [0x38, 0xC0, 0x30, 0x7E]);
    let op = Dequantize::<Pointers, f32> {
        num_tokens: 1,
        num_heads: 1,
        head_dim: 4,
        format: KvFormat::Fp8E4M3,
        codes: read(&codes),
        scale: one(),
        output: to(&mut output),
        strides,
    };
    // SAFETY: as above.
    unsafe { raw::dequantize(&backend, op) }.unwrap();
    assert_eq!(output, input);

    let (mut running, mut scales) = ([0f32], [0f32]);
    let op = Absmax::<Pointers, f32> {
        input: read(&input),
        strides,
        num_tokens: 1,
        num_heads: 1,
        head_dim: 4,
        granularity: Granularity::Tensor,
        running: to(&mut running),
    };
    // SAFETY: as above.
    unsafe { raw::absmax(&backend, op) }.unwrap();
    assert_eq!(running, [448.0]);
    let op = UpdateScales::<Pointers> { absmax: read(&running), divisor: 448.0, scales: to(&mut scales) };
    // SAFETY: as above.
    unsafe { raw::update_scales(&backend, op) }.unwrap();
    assert_eq!(scales, [1.0]);

    let mut merged = [0f32; 4];
    let op = MergeStates::<Pointers, f32> {
        num_tokens: 1,
        num_heads: 1,
        head_dim: 4,
        a: read(&[1.0f32, 2.0, 3.0, 4.0]),
        a_lse: read(&[2.0f32]),
        b: read(&[3.0f32, 2.0, 1.0, 0.0]),
        b_lse: read(&[2.0f32]),
        strides,
        output: to(&mut merged),
        lse: None,
    };
    // SAFETY: as above.
    unsafe { raw::merge_states(&backend, op) }.unwrap();
    assert_eq!(merged, [2.0; 4]);
}

#[test]
fn refuses_before_it_follows_a_pointer() {
    let backend = CpuBackend::new();
    let shape = spec(CacheLayout::Hnd, KvFormat::Fp8E4M3).shape(2).unwrap();
    let nowhere = |len| PtrMut::<u8>::new(std::ptr::null_mut(), len);
    let write = |shape: CacheShape, k, v, slots: &[i64]| {
        let op = CacheWrite::<Pointers, f32> {
            shape,
            cache: LayerMut { k, v, k_dynamic: None, v_dynamic: None },
            key: PtrRef::new(std::ptr::null(), 0),
            key_strides: RowStrides::contiguous(HEADS, K_DIM),
            value: PtrRef::new(std::ptr::null(), 0),
            value_strides: RowStrides::contiguous(HEADS, V_DIM),
            slot_mapping: read(slots),
            k_scale: one(),
            v_scale: one(),
        };
        // SAFETY: every call below is refused, or has no token to write to its cache.
        unsafe { raw::cache_write(&backend, op) }
    };
    let (k_len, v_len) = (shape.buffer_bytes(Half::K), shape.buffer_bytes(Half::V));
    let short = write(shape, nowhere(k_len - 1), nowhere(v_len), &[]);
    assert!(matches!(short, Err(Error::BufferTooSmall { what: "K cache", .. })));
    let no_key = write(shape, nowhere(k_len), nowhere(v_len), &[0]);
    assert!(matches!(no_key, Err(Error::BufferTooSmall { what: "key", got: 0, .. })));

    // One allocation in which V begins inside K's first block.
    let mut bytes = vec![0u8; 8192];
    let stride = k_len / 2 + v_len / 2;
    let shape = shape.with_block_strides(stride, stride).unwrap();
    let (k_len, v_len) = (shape.buffer_bytes(Half::K), shape.buffer_bytes(Half::V));
    let mut at = |offset: usize, len| PtrMut::new(bytes.as_mut_ptr().wrapping_add(offset), len);
    let k_block = HEADS * BLOCK * K_DIM;
    let k = at(0, k_len);
    assert!(matches!(write(shape, k, at(k_block - 1, v_len), &[]), Err(Error::GeometryMismatch { .. })));
    assert!(matches!(write(shape, k, at(k_block + 1, v_len), &[]), Err(Error::GeometryMismatch { .. })));
    assert!(write(shape, k, at(k_block, v_len), &[]).is_ok(), "side by side");
    // V before K: its block ends where K's begins.
    let k = at(v_len, k_len);
    assert!(write(shape, k, at(v_len - HEADS * BLOCK * V_DIM, v_len), &[]).is_ok());
    let op = CopyBlocks::<Pointers> {
        shape,
        layers: &mut [LayerMut { k: nowhere(k_len), v: nowhere(v_len), k_dynamic: None, v_dynamic: None }],
        pairs: &[BlockPair::new(0, 2)],
    };
    // SAFETY: refused, as block 2 does not exist.
    let refused = unsafe { raw::copy_blocks(&backend, op) };
    assert!(matches!(refused, Err(Error::BlockOutOfRange { block: 2, .. })));
}
