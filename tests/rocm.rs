//! What only the ROCm backend has: missing runtimes and devices, streams, page-locked memory, views by address, and
//! its fault word. Its operations are tested with everybody else's in `parity_*.rs` and `hostile_data.rs`.
#![cfg(feature = "rocm")]

#[path = "../testing/devices.rs"]
mod devices;
#[path = "../testing/oracle/mod.rs"]
mod oracle;

use std::process::Command;
use std::sync::Arc;

use devices::Device;
use oracle::geometry::Geometry;
use oracle::run::{download, upload};
use quantkv::args::{AttentionParams, BlockPair, CacheWrite, LayerMut, Quantize, RowStrides, UpdateScales};
use quantkv::cache::{AttentionBatch, AttentionHeads, AttentionIo};
use quantkv::layout::Half;
use quantkv::raw::rocm::{self as raw, Launch};
use quantkv::raw::{Pointers, PtrMut, PtrRef};
use quantkv::rocm::{RocmBackend, RocmBuffer, RocmView, RocmViewMut, devices as rocm_devices};
use quantkv::scale::{LayerScales, ScaleRef, ScaleStrides};
use quantkv::{Backend, CacheLayout, CacheSpec, Error, Faults, HostPool, KvFormat, PagedKvCache};

/// The device under test, if there is one.
fn rocm() -> Option<Arc<RocmBackend>> {
    match devices::rocm()? {
        Device::Rocm(rocm) => Some(rocm),
        _ => None,
    }
}

macro_rules! rocm_or_skip {
    () => {
        match rocm() {
            Some(rocm) => rocm,
            None => return,
        }
    };
}

#[test]
fn handles_are_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<RocmBackend>();
    check::<RocmBuffer<f32>>();
    check::<RocmView<'static, f32>>();
    check::<RocmViewMut<'static, f32>>();
}

/// Runs everywhere: with a device it works, without one the error says so. Never a panic.
#[test]
fn a_missing_device_is_a_typed_error() {
    match RocmBackend::new(0) {
        Ok(rocm) => {
            let all = rocm_devices().unwrap();
            assert_eq!(rocm.device().unwrap(), all[0]);
            assert!(all[0].total_memory_bytes > 0 && !all[0].name.is_empty(), "{:?}", all[0]);
            let error = RocmBackend::new(all.len()).unwrap_err();
            assert!(matches!(error, Error::NoDevice { backend: "rocm", .. }), "{error:?}");
        }
        Err(error) => {
            println!("{error}");
            assert!(matches!(error, Error::NoDevice { .. } | Error::NotCompiled { .. }), "{error:?}");
            assert!(error.to_string().contains("rocm") || error.to_string().contains("ROCm"), "{error}");
        }
    }
    RocmBackend::new(usize::MAX).unwrap_err();
}

/// What this process does where there is no runtime, no device, or one that this build has no code for. In a process
/// of its own: a runtime is loaded once.
#[test]
fn what_is_missing_is_named() {
    const ROLE: &str = "QUANTKV_TEST_ROLE";
    if std::env::var_os(ROLE).is_some() {
        let error = RocmBackend::new(0).unwrap_err();
        assert!(rocm_devices().is_err() || matches!(error, Error::NoKernel { .. }), "{error:?}");
        println!("said: {error}");
        return;
    }
    let said = |environment: &[(&str, &str)]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["what_is_missing_is_named", "--exact", "--nocapture"]).env(ROLE, "1");
        for (name, value) in environment {
            command.env(name, value);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    if cfg!(quantkv_stub) {
        assert!(said(&[]).contains("QUANTKV_STUB"), "{}", said(&[]));
    } else if std::env::var_os("QUANTKV_AMD_EMULATED").is_some() {
        // The loader looks nowhere that has a runtime; and the stand-in without a device.
        let text = said(&[("LD_LIBRARY_PATH", "")]);
        assert!(text.contains("no ROCm runtime: cannot load libamdhip64.so.7"), "{text}");
        let text = said(&[("QUANTKV_AMD_DEVICES", "0")]);
        assert!(text.contains("no AMD device"), "{text}");
    }
}

/// Runs everywhere: `raw` before a runtime was loaded.
#[test]
fn raw_calls_without_a_runtime_are_refused() {
    if RocmBackend::new(0).is_ok() {
        return;
    }
    let empty = || PtrRef::<f32>::new(std::ptr::null(), 0);
    let launch = Launch { stream: std::ptr::null_mut(), faults: std::ptr::null_mut() };
    let op = UpdateScales::<Pointers> { absmax: empty(), divisor: 2.0, scales: PtrMut::new(std::ptr::null_mut(), 0) };
    // SAFETY: empty buffers.
    let done = unsafe { raw::update_scales(op, launch) };
    assert!(matches!(done, Ok(()) | Err(Error::NoDevice { .. } | Error::NotCompiled { .. })), "{done:?}");
    let error = raw::prepare().unwrap_err();
    assert!(matches!(error, Error::NoDevice { .. } | Error::NotCompiled { .. }), "{error:?}");
}

#[test]
fn buffers_of_another_stream_are_refused() {
    let rocm = rocm_or_skip!();
    let other = RocmBackend::new(0).unwrap();
    let mut theirs = other.zeros::<f32>("theirs", 4).unwrap();
    let refused = |result: quantkv::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::OtherStream { .. }), "{error:?}");
    };
    refused(rocm.upload(&[1.0], &mut theirs));
    refused(rocm.download(&theirs, &mut [0.0]));
    let mut ours = rocm.zeros::<f32>("ours", 4).unwrap();
    fn update<'a>(absmax: &'a RocmBuffer<f32>, scales: &'a mut RocmBuffer<f32>) -> UpdateScales<'a, RocmBackend> {
        UpdateScales { absmax: absmax.view(), divisor: 2.0, scales: scales.view_mut() }
    }
    refused(rocm.update_scales(update(&theirs, &mut ours)));
    refused(rocm.update_scales(update(&ours, &mut theirs)));
    // A clone is the same stream; so is a second handle to it.
    rocm.as_ref().clone().update_scales(update(&upload(&*rocm, &[3.0f32; 4]), &mut ours)).unwrap();
    // SAFETY: the stream of `rocm`, which outlives this handle.
    let wrapped = unsafe { RocmBackend::wrap(0, rocm.stream().handle()) }.unwrap();
    assert_eq!(download(&wrapped, &ours, 4), [1.5; 4]);
    // The device's default stream, the null handle.
    // SAFETY: it lives as long as the process.
    let default = unsafe { RocmBackend::wrap(0, std::ptr::null_mut()) }.unwrap();
    assert_eq!(download(&default, &upload(&default, &[7i32, 8]), 2), [7, 8]);
    refused(default.upload(&[1.0], &mut ours));
}

#[test]
fn views_are_cut_inside_their_buffer() {
    let rocm = rocm_or_skip!();
    let mut buffer = upload(&*rocm, &[1i32, 2, 3, 4, 5]);
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
    let rocm = rocm_or_skip!();
    let mut codes = rocm.zeros::<u8>("codes", 33).unwrap();
    let (input, one) = (upload(&*rocm, &[1.0f32; 16]), upload(&*rocm, &[1.0f32]));
    let mut quantize = |start: usize| {
        rocm.quantize(Quantize {
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

/// The instructions neither saturate nor take FNUZ for OCP: limits, ties, infinities and NaN in both formats of three
/// mantissa bits.
#[test]
fn limits_of_both_kinds_of_e4m3() {
    let rocm = rocm_or_skip!();
    let input = [
        448.0f32,
        449.0,
        1e9,
        f32::INFINITY,
        -448.0,
        -f32::INFINITY,
        240.0,
        241.0,
        -240.0,
        248.0,
        f32::NAN,
        -f32::NAN,
        0.0,
        -0.0,
        -1e-9,
        1.0,
    ];
    let ocp = [0x7e, 0x7e, 0x7e, 0x7e, 0xfe, 0xfe, 0x77, 0x77, 0xf7, 0x78, 0x7f, 0x7f, 0, 0x80, 0x80, 0x38];
    let fnuz = [0x7f, 0x7f, 0x7f, 0x7f, 0xff, 0xff, 0x7f, 0x7f, 0xff, 0x7f, 0x80, 0x80, 0, 0, 0, 0x40];
    let (rows, one) = (upload(&*rocm, &input), upload(&*rocm, &[1.0f32]));
    for (format, expected) in [(KvFormat::Fp8E4M3, ocp), (KvFormat::Fp8E4M3Fnuz, fnuz)] {
        let mut codes = rocm.zeros::<u8>("codes", 16).unwrap();
        rocm.quantize(Quantize {
            num_tokens: 1,
            num_heads: 1,
            head_dim: 16,
            format,
            input: rows.view(),
            strides: RowStrides::contiguous(1, 16),
            scale: ScaleRef { values: one.view(), strides: ScaleStrides::default() },
            codes: codes.view_mut(),
        })
        .unwrap();
        assert_eq!(download(&*rocm, &codes, 16), expected, "{format}");
    }
}

/// The source of an upload may change as soon as the call returns: also page-locked memory, which the runtime reads when
/// the stream gets there.
#[test]
fn uploads_are_done_with_their_source() {
    let rocm = rocm_or_skip!();
    let spec = CacheSpec::new(1, 64, 16, KvFormat::Fp8E4M3).unwrap();
    let mut pool = HostPool::page_locked(&*rocm, spec, 1, 4).unwrap();
    assert!(pool.is_page_locked());
    let mut pageable = HostPool::new(spec, 1, 4).unwrap();
    assert!(!pageable.is_page_locked());
    for pool in [&mut pool, &mut pageable] {
        let source = pool.layer_mut(0).unwrap().k;
        source.fill(7);
        let mut buffer = rocm.zeros::<u8>("copy", source.len()).unwrap();
        rocm.upload(source, &mut buffer).unwrap();
        source.fill(9);
        assert!(download(&*rocm, &buffer, buffer.len()).iter().all(|&byte| byte == 7));
        // And a download is done when it returns.
        rocm.download(&buffer, source).unwrap();
        assert!(source.iter().all(|&byte| byte == 7));
    }
    // Locked twice is an error, and the first lock holds.
    let mut bytes = vec![0u8; 1 << 20];
    // SAFETY: the locks are dropped before the memory.
    let first = unsafe { rocm.page_lock(&mut bytes) }.unwrap();
    // SAFETY: as above.
    let error = unsafe { rocm.page_lock(&mut bytes) }.unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error:?}");
    drop(first);
    // SAFETY: as above.
    drop(unsafe { rocm.page_lock(&mut bytes) }.unwrap());
}

/// A swap sees all work enqueued before it, and work enqueued after it sees the swap.
#[test]
fn swaps_are_in_order_with_the_stream() {
    let rocm = rocm_or_skip!();
    let spec = CacheSpec::new(1, 64, 16, KvFormat::F32).unwrap();
    let mut cache = PagedKvCache::new(rocm.clone(), spec, 4, &[LayerScales::one()]).unwrap();
    let mut host = cache.host_pool(4).unwrap();
    let strides = RowStrides::contiguous(1, 64);
    let write = |cache: &mut PagedKvCache<RocmBackend>, block: i64, value: f32| {
        let rows = upload(&*rocm, &vec![value; 16 * 64]);
        let slots: Vec<i64> = (0..16).map(|slot| block * 16 + slot).collect();
        let slots = upload(&*rocm, &slots);
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

/// The engine's own addresses, K and V of a block side by side in one allocation, no fault word.
#[test]
fn raw_addresses_and_interleaved_halves() {
    let rocm = rocm_or_skip!();
    for layout in CacheLayout::ALL {
        let spec = CacheSpec::new(2, 16, 8, KvFormat::Fp8E4M3).unwrap().with_layout(layout).unwrap();
        let block = spec.elements_per_block(Half::K).unwrap();
        let shape = spec.shape(3).unwrap().with_block_strides(2 * block, 2 * block).unwrap();
        let pool = upload(&*rocm, &vec![0xeeu8; 3 * 2 * block]);
        let base = pool.device_ptr() as *mut u8;
        let bytes = shape.buffer_bytes(Half::K);
        let cache = || LayerMut::<Pointers> {
            k: PtrMut::new(base, bytes),
            v: PtrMut::new(base.wrapping_add(block), bytes),
            k_dynamic: None,
            v_dynamic: None,
        };
        let rows = upload(&*rocm, &[[1.0f32; 32], [2.0; 32]].concat());
        let slots = upload(&*rocm, &[8 + 3i64, 3 * 8]);
        let one = upload(&*rocm, &[1.0f32]);
        let (rows, slots, one) = (
            PtrRef::new(rows.device_ptr() as *const f32, 64),
            PtrRef::new(slots.device_ptr() as *const i64, 2),
            PtrRef::new(one.device_ptr() as *const f32, 1),
        );
        let scale = ScaleRef { values: one, strides: ScaleStrides::default() };
        let strides = RowStrides::contiguous(2, 16);
        let launch = Launch { stream: rocm.stream().handle(), faults: std::ptr::null_mut() };
        rocm.synchronize().unwrap(); // makes the device current
        // SAFETY: live device memory of the current device, used by nobody else; the second slot is out of range.
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
        let got = download(&*rocm, &pool, pool.len());
        let geometry = Geometry::plain(layout, (2, 16), (8, 1), KvFormat::Fp8E4M3);
        let mut expected = vec![0xee; got.len()];
        for (half, offset) in [(Half::K, 0), (Half::V, block)] {
            for (head, d) in (0..2).flat_map(|head| (0..16).map(move |d| (head, d))) {
                expected[2 * block + offset + geometry.element(half, 0, head, 3, d).start] = 0x38;
            }
        }
        assert!(got == expected, "{layout:?}");
        assert_eq!(rocm.faults().unwrap(), Faults::NONE, "no fault word was given");
    }
}

/// Slots and block ids from outside are skipped, told by the fault word once, and the rest is done.
#[test]
fn hostile_numbers_set_faults_and_no_more() {
    let rocm = rocm_or_skip!();
    let spec = CacheSpec::new(1, 64, 16, KvFormat::Fp8E4M3).unwrap();
    let mut cache = PagedKvCache::new(rocm.clone(), spec, 2, &[LayerScales::one()]).unwrap();
    let rows = upload(&*rocm, &[1.0f32; 8 * 64]);
    let slots = upload(&*rocm, &[0i64, -1, 32, 33, i64::MAX, i64::MIN, 1 << 32, 31]);
    let strides = RowStrides::contiguous(1, 64);
    cache.write(0, rows.view(), strides, rows.view(), strides, slots.view()).unwrap();
    assert_eq!(rocm.faults().unwrap(), Faults::SLOT_OUT_OF_RANGE);
    assert_eq!(rocm.faults().unwrap(), Faults::NONE, "faults() clears");
    let mut host = cache.host_pool(2).unwrap();
    cache.swap_out(&mut host, &[BlockPair::new(0, 0), BlockPair::new(1, 1)]).unwrap();
    let k = host.layer_ref(0).unwrap().k;
    let written: Vec<usize> = (0..32).filter(|slot| k[slot * 64..][..64].iter().all(|&code| code == 0x38)).collect();
    assert_eq!(written, [0, 31]);
    assert!((1..31).all(|slot| k[slot * 64..][..64].iter().all(|&code| code == 0)));

    // Tables that name no block: nothing is read, and the other sequence is computed.
    let (query, strides) = (upload(&*rocm, &[1.0f32; 2 * 64]), RowStrides::contiguous(1, 64));
    let (starts, lengths) = (upload(&*rocm, &[0i32, 1, 2]), upload(&*rocm, &[1i32, 1]));
    for (wrong, fault) in
        [(0i32, Faults::NONE), (2, Faults::BLOCK_OUT_OF_RANGE), (i32::MIN, Faults::BLOCK_OUT_OF_RANGE)]
    {
        let tables = upload(&*rocm, &[0i32, wrong]);
        let mut output = upload(&*rocm, &[9.0f32; 2 * 64]);
        let mut workspace = rocm.zeros::<f32>("workspace", cache.workspace_len(1, 2)).unwrap();
        let batch = AttentionBatch {
            num_tokens: 2,
            max_query_len: None,
            query_starts: starts.view(),
            seq_lens: lengths.view(),
            block_tables: tables.view(),
            block_table_stride: 1,
        };
        let heads = AttentionHeads::new(1, AttentionParams::new(0.125));
        let io = AttentionIo {
            query: query.view(),
            query_strides: strides,
            output: output.view_mut(),
            output_strides: strides,
            lse: None,
            workspace: workspace.view_mut(),
            plan_is_ready: false,
        };
        cache.attend(0, &batch, &heads, io).unwrap();
        assert_eq!(rocm.faults().unwrap(), fault, "block {wrong}");
        let output = download(&*rocm, &output, 2 * 64);
        assert!(output[..64].iter().all(|x| (x - 1.0).abs() < 1e-6), "{output:?}");
    }
}
