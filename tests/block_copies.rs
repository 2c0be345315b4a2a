//! `copy_blocks` and `swap_blocks` against the plainest model there is: after the call every byte
//! of a destination block is the byte its source block had before, and no other byte has changed,
//! padding between blocks included. And `zeros`, which the pools are made with.

use quantkv::args::{BlockPair, CopyBlocks, LayerMut, LayerRef, SwapBlocks};
use quantkv::layout::Half;
use quantkv::memory::{Host, Memory};
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, CpuBackend, Error, KvFormat};
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};

/// One layer's buffers.
#[derive(Clone, PartialEq)]
struct Layer {
    k: Vec<u8>,
    v: Vec<u8>,
    k_dynamic: Option<Vec<f32>>,
    v_dynamic: Option<Vec<f32>>,
}

impl Layer {
    fn random(rng: &mut impl Rng, shape: &CacheShape) -> Layer {
        let mut bytes = |half| {
            let mut bytes = vec![0; shape.buffer_bytes(half)];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        let (k, v) = (bytes(Half::K), bytes(Half::V));
        let mut dynamic = |half| {
            let scales = (0..shape.dynamic_scale_len(half)).map(|_| rng.random()).collect();
            shape.spec.has_dynamic_scales(half).then_some(scales)
        };
        Layer { k, v, k_dynamic: dynamic(Half::K), v_dynamic: dynamic(Half::V) }
    }

    fn as_ref<'a, M>(&'a self) -> LayerRef<'a, M>
    where
        M: Memory<Ref<'a, u8> = &'a [u8]> + Memory<Ref<'a, f32> = &'a [f32]>,
    {
        LayerRef { k: &self.k, v: &self.v, k_dynamic: self.k_dynamic.as_deref(), v_dynamic: self.v_dynamic.as_deref() }
    }

    fn as_mut<'a, M>(&'a mut self) -> LayerMut<'a, M>
    where
        M: Memory<Mut<'a, u8> = &'a mut [u8]> + Memory<Mut<'a, f32> = &'a mut [f32]>,
    {
        LayerMut {
            k: &mut self.k,
            v: &mut self.v,
            k_dynamic: self.k_dynamic.as_deref_mut(),
            v_dynamic: self.v_dynamic.as_deref_mut(),
        }
    }
}

/// A pool's layers and shape. Half of the pools have gaps between blocks.
fn pool(rng: &mut impl Rng, spec: CacheSpec, num_blocks: usize, layers: usize) -> (CacheShape, Vec<Layer>) {
    let block = |half| spec.elements_per_block(half).unwrap();
    let mut shape = spec.shape(num_blocks).unwrap();
    if rng.random_bool(0.5) {
        shape = shape.with_block_strides(block(Half::K) + 13, block(Half::V) + 64).unwrap();
    }
    let layers = (0..layers).map(|_| Layer::random(rng, &shape)).collect();
    (shape, layers)
}

fn spec(rng: &mut impl Rng, case: usize) -> CacheSpec {
    let format = KvFormat::ALL[case % KvFormat::ALL.len()];
    let mut spec = CacheSpec::new(rng.random_range(1..5), 32, 16, format).unwrap();
    spec.layout = CacheLayout::ALL[rng.random_range(0..3)];
    spec.v_head_dim = rng.random_range(1..70);
    spec.v_format = KvFormat::ALL[rng.random_range(0..KvFormat::ALL.len())];
    spec.with_dynamic_scales().unwrap_or(spec)
}

/// The model: copies `src`'s blocks of a snapshot into `dst`, byte by byte.
fn expect(src: (&CacheShape, &Layer), dst: (&CacheShape, &mut Layer), pairs: &[BlockPair]) {
    for pair in pairs {
        let (from, to) = (pair.src as usize, pair.dst as usize);
        for half in [Half::K, Half::V] {
            let spec = &src.0.spec;
            let size = spec.format(half).bytes();
            let (old, new) = match half {
                Half::K => (&src.1.k, &mut dst.1.k),
                Half::V => (&src.1.v, &mut dst.1.v),
            };
            for i in 0..spec.elements_per_block(half).unwrap() * size {
                new[to * dst.0.map(half).block_stride * size + i] = old[from * src.0.map(half).block_stride * size + i];
            }
            let (old, new) = match half {
                Half::K => (&src.1.k_dynamic, &mut dst.1.k_dynamic),
                Half::V => (&src.1.v_dynamic, &mut dst.1.v_dynamic),
            };
            if let (Some(old), Some(new)) = (old, new) {
                for head in 0..spec.num_kv_heads {
                    for slot in 0..spec.block_size {
                        new[dst.0.dynamic_scale_index(to, head, slot)] =
                            old[src.0.dynamic_scale_index(from, head, slot)];
                    }
                }
            }
        }
    }
}

fn assert_same(case: usize, expected: &[Layer], got: &[Layer]) {
    for (layer, (expected, got)) in expected.iter().zip(got).enumerate() {
        assert!(expected == got, "case {case}: layer {layer} differs");
    }
}

#[test]
fn copy_blocks_inside_a_pool() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for case in 0..40 {
        let (blocks, layers) = if case % 8 == 0 { (200, 6) } else { (12, rng.random_range(0..4)) };
        let spec = spec(&mut rng, case);
        let (shape, mut pool) = pool(&mut rng, spec, blocks, layers);
        // A block may be read many times; written ones are distinct and not read.
        let mut ids: Vec<u32> = (0..blocks as u32).collect();
        ids.shuffle(&mut rng);
        let (sources, targets) = ids.split_at(blocks / 3);
        let count = rng.random_range(0..=blocks / 2);
        let pairs = targets.iter().map(|&dst| BlockPair::new(sources[rng.random_range(0..sources.len())], dst));
        let pairs: Vec<BlockPair> = pairs.take(count).collect();

        let mut expected = pool.clone();
        for (before, after) in pool.iter().zip(&mut expected) {
            expect((&shape, before), (&shape, after), &pairs);
        }
        let mut views: Vec<LayerMut<'_, CpuBackend>> = pool.iter_mut().map(Layer::as_mut).collect();
        let op = CopyBlocks { shape, layers: &mut views, pairs: &pairs };
        CpuBackend::new().copy_blocks(op).unwrap();
        assert_same(case, &expected, &pool);
    }
}

#[test]
fn swap_blocks_between_pools_and_back() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for case in 0..40 {
        let (blocks, layers) = if case % 8 == 0 { (200, 6) } else { (12, rng.random_range(0..4)) };
        let spec = spec(&mut rng, case);
        let (device_shape, mut device) = pool(&mut rng, spec, blocks, layers);
        let (host_shape, mut host) = pool(&mut rng, spec, blocks / 2, layers);
        let mut device_ids: Vec<u32> = (0..blocks as u32).collect();
        let mut host_ids: Vec<u32> = (0..blocks as u32 / 2).collect();
        device_ids.shuffle(&mut rng);
        host_ids.shuffle(&mut rng);
        let count = rng.random_range(0..=host_ids.len());
        let pairs = |from: &[u32], to: &[u32]| -> Vec<BlockPair> {
            from.iter().zip(to).take(count).map(|(&src, &dst)| BlockPair::new(src, dst)).collect()
        };

        let out = pairs(&device_ids, &host_ids);
        let mut expected = host.clone();
        for (from, to) in device.iter().zip(&mut expected) {
            expect((&device_shape, from), (&host_shape, to), &out);
        }
        let src: Vec<LayerRef<'_, CpuBackend>> = device.iter().map(Layer::as_ref).collect();
        let mut dst: Vec<LayerMut<'_, Host>> = host.iter_mut().map(Layer::as_mut).collect();
        let op = SwapBlocks { src_shape: device_shape, src: &src, dst_shape: host_shape, dst: &mut dst, pairs: &out };
        CpuBackend::new().swap_out(op).unwrap();
        assert_same(case, &expected, &host);

        device_ids.shuffle(&mut rng);
        let back = pairs(&host_ids, &device_ids);
        let mut expected = device.clone();
        for (from, to) in host.iter().zip(&mut expected) {
            expect((&host_shape, from), (&device_shape, to), &back);
        }
        let src: Vec<LayerRef<'_, Host>> = host.iter().map(Layer::as_ref).collect();
        let mut dst: Vec<LayerMut<'_, CpuBackend>> = device.iter_mut().map(Layer::as_mut).collect();
        let op = SwapBlocks { src_shape: host_shape, src: &src, dst_shape: device_shape, dst: &mut dst, pairs: &back };
        CpuBackend::new().swap_in(op).unwrap();
        assert_same(case, &expected, &device);
    }
}

#[test]
fn zeros_are_zero_and_impossible_sizes_are_refused() {
    let backend = CpuBackend::new();
    assert_eq!(backend.zeros::<f32>("nothing", 0).unwrap(), Vec::<f32>::new());
    assert!(backend.zeros::<i64>("some", 100_003).unwrap().iter().all(|&x| x == 0));
    let overflow = backend.zeros::<i64>("the cache", usize::MAX / 4);
    assert!(matches!(overflow, Err(Error::Overflow { what: "the cache" })), "{overflow:?}");
    // No machine has 2^62 bytes; an allocation that fails must not end the process.
    let too_much = backend.zeros::<u8>("the cache", 1 << 62);
    assert!(matches!(too_much, Err(Error::OutOfMemory { what: "the cache", bytes }) if bytes == 1 << 62));
}
