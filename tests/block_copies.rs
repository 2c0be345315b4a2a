//! `copy_blocks` and `swap_blocks` against the plainest model there is: after the call every byte
//! of a destination block is the byte its source block had before, and no other byte has changed,
//! padding between blocks included. And `zeros`, which the pools are made with.

#[path = "../testing/devices.rs"]
mod devices;

use devices::devices;
use quantkv::args::{BlockPair, CopyBlocks, LayerMut, LayerRef, SwapBlocks};
use quantkv::format::Pod;
use quantkv::layout::Half;
use quantkv::memory::Host;
use quantkv::{Backend, CacheLayout, CacheShape, CacheSpec, Error, KvFormat};
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

    fn host_ref(&self) -> LayerRef<'_, Host> {
        LayerRef { k: &self.k, v: &self.v, k_dynamic: self.k_dynamic.as_deref(), v_dynamic: self.v_dynamic.as_deref() }
    }

    fn host_mut(&mut self) -> LayerMut<'_, Host> {
        LayerMut {
            k: &mut self.k,
            v: &mut self.v,
            k_dynamic: self.k_dynamic.as_deref_mut(),
            v_dynamic: self.v_dynamic.as_deref_mut(),
        }
    }
}

/// The same in a backend's memory.
struct OnDevice<B: Backend> {
    k: B::Buffer<u8>,
    v: B::Buffer<u8>,
    k_dynamic: Option<B::Buffer<f32>>,
    v_dynamic: Option<B::Buffer<f32>>,
}

impl<B: Backend> OnDevice<B> {
    fn new(backend: &B, layer: &Layer) -> Self {
        fn upload<B: Backend, T: Pod>(backend: &B, data: &[T]) -> B::Buffer<T> {
            let mut buffer = backend.zeros("layer", data.len()).unwrap();
            backend.upload(data, &mut buffer).unwrap();
            buffer
        }
        OnDevice {
            k: upload(backend, &layer.k),
            v: upload(backend, &layer.v),
            k_dynamic: layer.k_dynamic.as_ref().map(|scales| upload(backend, scales)),
            v_dynamic: layer.v_dynamic.as_ref().map(|scales| upload(backend, scales)),
        }
    }

    fn as_ref(&self, backend: &B) -> LayerRef<'_, B> {
        LayerRef {
            k: backend.view(&self.k),
            v: backend.view(&self.v),
            k_dynamic: self.k_dynamic.as_ref().map(|scales| backend.view(scales)),
            v_dynamic: self.v_dynamic.as_ref().map(|scales| backend.view(scales)),
        }
    }

    fn as_mut(&mut self, backend: &B) -> LayerMut<'_, B> {
        LayerMut {
            k: backend.view_mut(&mut self.k),
            v: backend.view_mut(&mut self.v),
            k_dynamic: self.k_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
            v_dynamic: self.v_dynamic.as_mut().map(|scales| backend.view_mut(scales)),
        }
    }

    /// Reads everything back.
    fn download(&self, backend: &B, layer: &mut Layer) {
        backend.download(&self.k, &mut layer.k).unwrap();
        backend.download(&self.v, &mut layer.v).unwrap();
        for (from, to) in [(&self.k_dynamic, &mut layer.k_dynamic), (&self.v_dynamic, &mut layer.v_dynamic)] {
            if let (Some(from), Some(to)) = (from, to) {
                backend.download(from, to).unwrap();
            }
        }
    }
}

/// Runs `call` over the pool in the backend's memory and reads the pool back.
fn over<B: Backend>(backend: &B, pool: &mut [Layer], call: impl FnOnce(&mut [OnDevice<B>]) -> quantkv::Result<()>) {
    let mut device: Vec<_> = pool.iter().map(|layer| OnDevice::new(backend, layer)).collect();
    call(&mut device).unwrap();
    device.iter().zip(pool).for_each(|(device, layer)| device.download(backend, layer));
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
    for device in devices() {
        on_device!(&device, |backend| copy_blocks_inside_a_pool_of(backend));
    }
}

fn copy_blocks_inside_a_pool_of<B: Backend>(backend: &B) {
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
        over(backend, &mut pool, |pool| {
            let mut views: Vec<_> = pool.iter_mut().map(|layer| layer.as_mut(backend)).collect();
            backend.copy_blocks(CopyBlocks { shape, layers: &mut views, pairs: &pairs })
        });
        assert_same(case, &expected, &pool);
    }
}

#[test]
fn swap_blocks_between_pools_and_back() {
    for device in devices() {
        on_device!(&device, |backend| swap_blocks_between_pools_and_back_on(backend));
    }
}

fn swap_blocks_between_pools_and_back_on<B: Backend>(backend: &B) {
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
        over(backend, &mut device, |device| {
            let src: Vec<_> = device.iter().map(|layer| layer.as_ref(backend)).collect();
            let mut dst: Vec<_> = host.iter_mut().map(Layer::host_mut).collect();
            let (src_shape, dst_shape) = (device_shape, host_shape);
            backend.swap_out(SwapBlocks { src_shape, src: &src, dst_shape, dst: &mut dst, pairs: &out })
        });
        assert_same(case, &expected, &host);

        device_ids.shuffle(&mut rng);
        let back = pairs(&host_ids, &device_ids);
        let mut expected = device.clone();
        for (from, to) in host.iter().zip(&mut expected) {
            expect((&host_shape, from), (&device_shape, to), &back);
        }
        over(backend, &mut device, |device| {
            let src: Vec<_> = host.iter().map(Layer::host_ref).collect();
            let mut dst: Vec<_> = device.iter_mut().map(|layer| layer.as_mut(backend)).collect();
            let (src_shape, dst_shape) = (host_shape, device_shape);
            backend.swap_in(SwapBlocks { src_shape, src: &src, dst_shape, dst: &mut dst, pairs: &back })
        });
        assert_same(case, &expected, &device);
    }
}

#[test]
fn zeros_are_zero_and_impossible_sizes_are_refused() {
    for device in devices() {
        on_device!(&device, |backend| zeros_are_zero_on(backend));
    }
}

fn zeros_are_zero_on<B: Backend>(backend: &B) {
    backend.download(&backend.zeros::<f32>("nothing", 0).unwrap(), &mut []).unwrap();
    let mut some = vec![-1i64; 100_003];
    backend.download(&backend.zeros("some", some.len()).unwrap(), &mut some).unwrap();
    assert!(some.iter().all(|&x| x == 0));
    let overflow = backend.zeros::<i64>("the cache", usize::MAX / 4);
    assert!(matches!(overflow, Err(Error::Overflow { what: "the cache" })), "{overflow:?}");
    // No machine has 2^62 bytes; an allocation that fails must not end the process.
    let too_much = backend.zeros::<u8>("the cache", 1 << 62);
    assert!(matches!(too_much, Err(Error::OutOfMemory { what: "the cache", bytes }) if bytes == 1 << 62));
    // And it must not be the last one.
    backend.zeros::<u8>("the next", 1).unwrap();
}
