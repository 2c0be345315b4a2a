//! What only the CUDA backend has: missing devices, streams, page-locked memory, lent buffers. Its
//! operations are tested with everybody else's in `parity_*.rs` and `hostile_data.rs`, graphs in `cuda_steps.rs`.
#![cfg(feature = "cuda")]

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use std::sync::Arc;

use devices::Device;
use oracle::geometry::Geometry;
use oracle::run::{download, upload};
use oracle::strategy::{self, Rng};
use quantkv::args::{BlockPair, CacheWrite, LayerMut, Quantize, RowStrides, UpdateScales};
use quantkv::cuda::{CudaBackend, CudaBuffer, CudaView, CudaViewMut, devices as cuda_devices};
use quantkv::layout::Half;
use quantkv::raw::cuda::{self as raw, Launch};
use quantkv::raw::{Pointers, PtrMut, PtrRef};
use quantkv::scale::{LayerScales, ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheSpec, Error, Faults, HostPool, KvFormat, PagedKvCache};

/// The device under test, if there is one.
fn cuda() -> Option<Arc<CudaBackend>> {
    match devices::cuda()? {
        Device::Cuda(cuda) => Some(cuda),
        _ => None,
    }
}

macro_rules! cuda_or_skip {
    () => {
        match cuda() {
            Some(cuda) => cuda,
            None => return,
        }
    };
}

#[test]
fn handles_are_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<CudaBackend>();
    check::<CudaBuffer<f32>>();
    check::<CudaView<'static, f32>>();
    check::<CudaViewMut<'static, f32>>();
}

/// Runs everywhere: with a device it works, without one the error says so. Never a panic.
#[test]
fn a_missing_device_is_a_typed_error() {
    match CudaBackend::new(0) {
        Ok(cuda) => {
            let all = cuda_devices().unwrap();
            assert_eq!(cuda.device().unwrap(), all[0]);
            assert!(all[0].total_memory_bytes > 0 && all[0].compute_capability >= (7, 5), "{:?}", all[0]);
            let error = CudaBackend::new(all.len()).unwrap_err();
            assert!(matches!(error, Error::NoDevice { backend: "cuda", .. }), "{error:?}");
        }
        Err(error) => {
            println!("{error}");
            assert!(matches!(error, Error::NoDevice { .. } | Error::NotCompiled { .. }), "{error:?}");
            assert!(error.to_string().contains("cuda") || error.to_string().contains("CUDA"), "{error}");
        }
    }
    CudaBackend::new(usize::MAX).unwrap_err();
}

#[test]
fn buffers_of_another_stream_are_refused() {
    let cuda = cuda_or_skip!();
    let other = CudaBackend::new(0).unwrap();
    let mut theirs = other.zeros::<f32>("theirs", 4).unwrap();
    let refused = |result: quantkv::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::OtherStream { .. }), "{error:?}");
    };
    refused(cuda.upload(&[1.0], &mut theirs));
    refused(cuda.download(&theirs, &mut [0.0]));
    let mut ours = cuda.zeros::<f32>("ours", 4).unwrap();
    fn update<'a>(absmax: &'a CudaBuffer<f32>, scales: &'a mut CudaBuffer<f32>) -> UpdateScales<'a, CudaBackend> {
        UpdateScales { absmax: absmax.view(), divisor: 2.0, scales: scales.view_mut() }
    }
    refused(cuda.update_scales(update(&theirs, &mut ours)));
    refused(cuda.update_scales(update(&ours, &mut theirs)));
    // A clone is the same stream; so is a second handle to it.
    cuda.as_ref().clone().update_scales(update(&upload(&*cuda, &[3.0f32; 4]), &mut ours)).unwrap();
    let wrapped = CudaBackend::wrap(cuda.stream().clone()).unwrap();
    assert_eq!(download(&wrapped, &ours, 4), [1.5; 4]);
    let lent = other.stream().alloc_zeros::<f32>(4).unwrap();
    assert!(matches!(cuda.lend(lent.as_view()).err(), Some(Error::OtherStream { .. })));
}

#[test]
fn views_are_cut_inside_their_buffer() {
    let cuda = cuda_or_skip!();
    let mut buffer = upload(&*cuda, &[1i32, 2, 3, 4, 5]);
    let all = buffer.view();
    for range in [0..0, 5..5, 0..5, 2..4] {
        let part = all.slice(range.clone()).unwrap();
        assert_eq!((part.len(), part.device_ptr()), (range.len(), all.device_ptr() + 4 * range.start as u64));
    }
    #[expect(clippy::reversed_empty_ranges, reason = "that they are refused is the test")]
    for range in [0..6, 6..6, 4..3, usize::MAX..usize::MAX, 0..usize::MAX] {
        assert!(matches!(all.slice(range).unwrap_err(), Error::BufferTooSmall { .. }));
    }
    assert!(all.slice(..=4).is_ok() && all.slice(..=5).is_err() && all.slice(6..).is_err());
    assert!(buffer.view_mut().split_at_mut(6).is_err());
    let (head, tail) = buffer.view_mut().split_at_mut(2).unwrap();
    assert_eq!((head.len(), tail.len(), tail.device_ptr() - head.device_ptr()), (2, 3, 8));
}

/// Blocks of 16-bit elements that start at an odd byte.
#[test]
fn misaligned_bytes_are_refused() {
    let cuda = cuda_or_skip!();
    let mut codes = cuda.zeros::<u8>("codes", 33).unwrap();
    let (input, one) = (upload(&*cuda, &[1.0f32; 16]), upload(&*cuda, &[1.0f32]));
    let mut quantize = |start: usize| {
        cuda.quantize(Quantize {
            num_tokens: 1,
            num_heads: 1,
            head_dim: 16,
            format: KvFormat::F16,
            input: input.view(),
            strides: RowStrides::contiguous(1, 16),
            scale: ScaleRef { values: one.view(), strides: ScaleStrides::default() },
            codes: codes.view_mut().slice_mut(start..start + 32)?,
        })
    };
    quantize(0).unwrap();
    let error = quantize(1).unwrap_err();
    assert!(matches!(error, Error::Misaligned { align: 2, .. }), "{error:?}");
}

/// The source of an upload may change as soon as the call returns: also page-locked memory, which the
/// driver reads when the stream gets there.
#[test]
fn uploads_are_done_with_their_source() {
    let cuda = cuda_or_skip!();
    let spec = CacheSpec::new(1, 64, 16, KvFormat::Fp8E4M3).unwrap();
    let mut pool = HostPool::page_locked(&*cuda, spec, 1, 4).unwrap();
    assert!(pool.is_page_locked());
    let mut pageable = HostPool::new(spec, 1, 4).unwrap();
    assert!(!pageable.is_page_locked());
    for pool in [&mut pool, &mut pageable] {
        let source = pool.layer_mut(0).unwrap().k;
        source.fill(7);
        let mut buffer = cuda.zeros::<u8>("copy", source.len()).unwrap();
        cuda.upload(source, &mut buffer).unwrap();
        source.fill(9);
        assert!(download(&*cuda, &buffer, buffer.len()).iter().all(|&byte| byte == 7));
        // And a download is done when it returns.
        cuda.download(&buffer, source).unwrap();
        assert!(source.iter().all(|&byte| byte == 7));
    }
    // Locked twice is an error, and the first lock holds.
    let mut bytes = vec![0u8; 1 << 20];
    // SAFETY: the locks are dropped before the memory.
    let first = unsafe { cuda.page_lock(&mut bytes) }.unwrap();
    // SAFETY: as above.
    let error = unsafe { cuda.page_lock(&mut bytes) }.unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error:?}");
    drop(first);
    // SAFETY: as above.
    drop(unsafe { cuda.page_lock(&mut bytes) }.unwrap());
    // A pool of odd sizes locks nothing of its neighbours.
    let odd = CacheSpec::new(1, 1, 8, KvFormat::Fp8E4M3).unwrap();
    let pools: Vec<_> = (1..9).map(|blocks| HostPool::page_locked(&*cuda, odd, 1, blocks).unwrap()).collect();
    assert!(pools.iter().all(HostPool::is_page_locked));
}

/// A swap sees all work enqueued before it, and work enqueued after it sees the swap, on whatever streams
/// they run.
#[test]
fn swaps_are_in_order_with_the_stream() {
    let cuda = cuda_or_skip!();
    let spec = CacheSpec::new(1, 64, 16, KvFormat::F32).unwrap();
    let mut cache = PagedKvCache::new(cuda.clone(), spec, 4, &[LayerScales::one()]).unwrap();
    let mut host = cache.host_pool(4).unwrap();
    let strides = RowStrides::contiguous(1, 64);
    let write = |cache: &mut PagedKvCache<CudaBackend>, block: i64, value: f32| {
        let rows = upload(&*cuda, &vec![value; 16 * 64]);
        let slots: Vec<i64> = (0..16).map(|slot| block * 16 + slot).collect();
        let slots = upload(&*cuda, &slots);
        cache.write(0, rows.view(), strides, rows.view(), strides, slots.view()).unwrap();
    };
    for round in 0..10 {
        let value = round as f32 + 1.0;
        write(&mut cache, 0, value);
        cache.swap_out(&mut host, &[BlockPair::new(0, round % 4)]).unwrap();
        let layer = host.layer_ref(0).unwrap();
        let block = &layer.v[round as usize % 4 * 16 * 64 * 4..][..16 * 64 * 4];
        assert!(block.chunks_exact(4).all(|x| x == value.to_ne_bytes()), "round {round}");
        // The block is written again before it is overwritten by the swap.
        write(&mut cache, 1, -1.0);
        cache.swap_in(&host, &[BlockPair::new(round % 4, 1)]).unwrap();
        cache.copy_blocks(&[BlockPair::new(1, 2)]).unwrap();
        cache.swap_out(&mut host, &[BlockPair::new(2, 3)]).unwrap();
        let layer = host.layer_ref(0).unwrap();
        assert!(layer.k[3 * 16 * 64 * 4..].chunks_exact(4).all(|x| x == value.to_ne_bytes()), "round {round}");
    }
}

/// Buffers of an engine that uses cudarc, on its own context and stream.
#[test]
fn buffers_of_cudarc_are_lent() {
    let _ = cuda_or_skip!();
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let cuda = CudaBackend::wrap(stream.clone()).unwrap();
    let input = stream.clone_htod(&[0.5f32, 1.0, 2.0, 448.0, -448.0, 1000.0, 0.0, -0.0]).unwrap();
    let one = stream.clone_htod(&[1.0f32]).unwrap();
    let mut codes = stream.alloc_zeros::<u8>(10).unwrap();
    let (lent, scale, mut lent_codes) = (
        cuda.lend(input.as_view()).unwrap(),
        cuda.lend(one.as_view()).unwrap(),
        cuda.lend_mut(codes.slice_mut(1..9)).unwrap(),
    );
    cuda.quantize(Quantize {
        num_tokens: 1,
        num_heads: 1,
        head_dim: 8,
        format: KvFormat::Fp8E4M3,
        input: lent.view(),
        strides: RowStrides::contiguous(1, 8),
        scale: ScaleRef { values: scale.view(), strides: ScaleStrides::default() },
        codes: lent_codes.view_mut(),
    })
    .unwrap();
    drop((lent, scale, lent_codes));
    // Another stream of the engine's: cudarc makes it wait for us.
    let other = context.new_stream().unwrap();
    let codes = other.clone_dtoh(&codes).unwrap();
    other.synchronize().unwrap();
    assert_eq!(codes, [0, 0x30, 0x38, 0x40, 0x7e, 0xfe, 0x7e, 0, 0x80, 0]);
}

/// The engine's own addresses, K and V of a block side by side in one allocation, no fault word.
#[test]
fn raw_addresses_and_interleaved_halves() {
    let cuda = cuda_or_skip!();
    for layout in CacheLayout::ALL {
        let spec = CacheSpec::new(2, 16, 8, KvFormat::Fp8E4M3).unwrap().with_layout(layout).unwrap();
        let block = spec.elements_per_block(Half::K).unwrap();
        let shape = spec.shape(3).unwrap().with_block_strides(2 * block, 2 * block).unwrap();
        let pool = upload(&*cuda, &vec![0xeeu8; 3 * 2 * block]);
        let base = pool.device_ptr() as *mut u8;
        let bytes = shape.buffer_bytes(Half::K);
        let cache = || LayerMut::<Pointers> {
            k: PtrMut::new(base, bytes),
            v: PtrMut::new(base.wrapping_add(block), bytes),
            k_dynamic: None,
            v_dynamic: None,
        };
        let rows = upload(&*cuda, &[[1.0f32; 32], [2.0; 32]].concat());
        let slots = upload(&*cuda, &[8 + 3i64, 3 * 8]);
        let one = upload(&*cuda, &[1.0f32]);
        let (rows, slots, one) = (
            PtrRef::new(rows.device_ptr() as *const f32, 64),
            PtrRef::new(slots.device_ptr() as *const i64, 2),
            PtrRef::new(one.device_ptr() as *const f32, 1),
        );
        let scale = ScaleRef { values: one, strides: ScaleStrides::default() };
        let strides = RowStrides::contiguous(2, 16);
        let launch = Launch { stream: cuda.stream().cu_stream().cast(), faults: std::ptr::null_mut() };
        cuda.context().bind_to_thread().unwrap();
        // SAFETY: live device memory of the current context, used by nobody else; the second slot is out of range.
        unsafe {
            raw::cache_write(
                CacheWrite {
                    shape,
                    cache: cache(),
                    key: rows,
                    key_strides: strides,
                    value: rows,
                    value_strides: strides,
                    slot_mapping: slots,
                    k_scale: scale,
                    v_scale: scale,
                },
                launch,
            )
        }
        .unwrap();
        let got = download(&*cuda, &pool, pool.len());
        let geometry = Geometry::plain(layout, (2, 16), (8, 1), KvFormat::Fp8E4M3);
        let mut expected = vec![0xee; got.len()];
        for (half, offset) in [(Half::K, 0), (Half::V, block)] {
            for (head, d) in (0..2).flat_map(|head| (0..16).map(move |d| (head, d))) {
                expected[2 * block + offset + geometry.element(half, 0, head, 3, d).start] = 0x38;
            }
        }
        assert!(got == expected, "{layout:?}");
        assert_eq!(cuda.faults().unwrap(), Faults::NONE, "no fault word was given");
    }
}

/// A cache of random contents goes to the host and back through memory locked and not: blocks of 1920 and of 32 Ki bytes, more than
/// a kernel's list has; of 104, which are no vectors; of 256 Ki, which copy engines take.
#[test]
fn pools_of_every_kind_hold_blocks() {
    // 40 layers are more allocations than swap_blocks remembers.
    for ((heads, dim), (block_size, blocks), layers) in [
        ((3, 40), (16, 9), 1),
        ((8, 128), (32, 95), 1),
        ((1, 13), (8, 63), 40),
        ((1, 16), (16, 5), 40),
        ((16, 128), (128, 5), 2),
    ] {
        let plain = Geometry::plain(CacheLayout::Nhd, (heads, dim), (block_size, blocks), KvFormat::Fp8E5M2);
        pools_hold_blocks(&Geometry { dynamic: true, ..plain }, layers);
    }
}

fn pools_hold_blocks(geometry: &Geometry, num_layers: usize) {
    let cuda = cuda_or_skip!();
    let layers: Vec<_> =
        (0..num_layers).map(|layer| strategy::any_layer(geometry, &mut Rng::new(6 + layer as u64))).collect();
    let spec = geometry.shape().spec;
    let count = geometry.num_blocks as u32;
    let scales: Vec<_> = (0..num_layers).map(|_| LayerScales::one()).collect();
    let mut cache = PagedKvCache::new(cuda.clone(), spec, count as usize, &scales).unwrap();
    let there: Vec<_> = (0..count).map(|block| BlockPair::new((block * 4) % count, block)).collect();
    let back: Vec<_> = there.iter().map(|pair| BlockPair::new(pair.dst, pair.src)).collect();
    for page_locked in [true, false] {
        let pool = || match page_locked {
            true => cache.host_pool(count as usize),
            false => HostPool::new(spec, num_layers, count as usize),
        };
        let (mut first, mut second) = (pool().unwrap(), pool().unwrap());
        for (i, layer) in layers.iter().enumerate() {
            let target = first.layer_mut(i).unwrap();
            target.k.copy_from_slice(&layer.k);
            target.v.copy_from_slice(&layer.v);
            target.k_dynamic.unwrap().copy_from_slice(layer.k_dynamic.as_ref().unwrap());
            target.v_dynamic.unwrap().copy_from_slice(layer.v_dynamic.as_ref().unwrap());
        }
        cache.swap_in(&first, &there).unwrap();
        cache.swap_out(&mut second, &back).unwrap();
        for i in 0..num_layers {
            let (a, b) = (first.layer_ref(i).unwrap(), second.layer_ref(i).unwrap());
            assert!(a.k == b.k && a.v == b.v && a.k_dynamic == b.k_dynamic && a.v_dynamic == b.v_dynamic, "layer {i}");
        }
    }
}
