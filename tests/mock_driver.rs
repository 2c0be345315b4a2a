//! The mock driver keeps the promises of the API that tests rely on, seen through unmodified cudarc
//! (`scripts/simt.sh` runs this; elsewhere there is nothing to test).
#![cfg(all(feature = "cuda", quantkv_simt))]

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

/// One test at a time: a capture, or a limit of memory, is seen by all threads.
fn device() -> (MutexGuard<'static, ()>, Arc<CudaContext>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let context = CudaContext::new(0).unwrap();
    // SAFETY: every use of two streams here is ordered by hand; in captures tracking must be off.
    unsafe { context.disable_event_tracking() };
    (alone, context)
}

/// A function that only the mock driver has.
fn mock_function(name: &CStr) -> *mut c_void {
    unsafe extern "C" {
        fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    const RTLD_NOW: c_int = 2;
    // SAFETY: strings with their ends, a handle that was just opened.
    let symbol = unsafe { dlsym(dlopen(c"libcuda.so.1".as_ptr(), RTLD_NOW), name.as_ptr()) };
    assert!(!symbol.is_null(), "libcuda.so.1 is not the mock driver; run by scripts/simt.sh");
    symbol
}

fn set_memory_bytes(bytes: usize) {
    // SAFETY: the signature in testing/mock_cuda/memory.cpp.
    let set: extern "C" fn(usize) -> c_int =
        unsafe { std::mem::transmute(mock_function(c"quantkv_mock_set_memory_bytes")) };
    assert_eq!(set(bytes), 0);
}

fn streams_are_late() -> bool {
    std::env::var("QUANTKV_MOCK_STREAMS").as_deref() != Ok("eager")
}

fn code<T>(answer: Result<T, DriverError>) -> CUresult {
    answer.map_or_else(|DriverError(code)| code, |_| CUresult::CUDA_SUCCESS)
}

/// Page-locked host memory.
fn pinned(context: &Arc<CudaContext>, values: &[u32]) -> cudarc::driver::PinnedHostSlice<u32> {
    // SAFETY: written before it is read.
    let mut slice = unsafe { context.alloc_pinned(values.len()) }.unwrap();
    slice.as_mut_slice().unwrap().copy_from_slice(values);
    slice
}

#[test]
fn memory_begins_as_ones_and_copies_reach_their_ends() {
    let (_alone, context) = device();
    let stream = context.new_stream().unwrap();
    // SAFETY: the poison is what is looked at.
    let fresh = unsafe { stream.alloc::<u32>(5) }.unwrap();
    assert_eq!(stream.clone_dtoh(&fresh).unwrap(), [u32::MAX; 5]);
    let a = stream.clone_htod(&[1u32, 2, 3, 4, 5]).unwrap();
    let mut b = stream.alloc_zeros::<u32>(5).unwrap();
    stream.memcpy_dtod(&a.slice(1..4), &mut b.slice_mut(2..5)).unwrap();
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [0, 0, 2, 3, 4]);
}

#[test]
fn copies_outside_an_allocation_are_refused() {
    let (_alone, context) = device();
    let stream = context.new_stream().unwrap();
    let buffer = stream.alloc_zeros::<u8>(16).unwrap();
    let address = cudarc::driver::DevicePtr::device_ptr(&buffer, &stream).0;
    let copy = |offset: u64, bytes: usize| {
        // SAFETY: the mock driver looks before it copies.
        code(unsafe { result::memcpy_htod_async(address + offset, &vec![0u8; bytes], stream.cu_stream()) })
    };
    assert_eq!(copy(8, 8), CUresult::CUDA_SUCCESS);
    assert_eq!(copy(8, 9), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(copy(17, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
    // SAFETY: as above; nothing was allocated there.
    assert_eq!(code(unsafe { result::free_sync(address + 8) }), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn host_memory_is_read_early_if_pageable_and_late_if_page_locked() {
    let (_alone, context) = device();
    let stream = context.new_stream().unwrap();
    let mut buffer = stream.alloc_zeros::<u32>(4).unwrap();
    let mut host = vec![7u32; 4];
    stream.memcpy_htod(&host, &mut buffer).unwrap();
    host.fill(8);
    assert_eq!(stream.clone_dtoh(&buffer).unwrap(), [7; 4]);

    let mut locked = pinned(&context, &[7; 4]);
    let host = locked.as_mut_ptr().unwrap();
    let (address, _guard) = cudarc::driver::DevicePtr::device_ptr(&buffer, &stream);
    // SAFETY: the memory lives to the end of the test; that it changes before the copy is the point.
    let seen = unsafe {
        let source = std::slice::from_raw_parts(host, 4);
        result::memcpy_htod_async(address, source, stream.cu_stream()).unwrap();
        host.write(9);
        stream.clone_dtoh(&buffer).unwrap()
    };
    assert_eq!(seen, if streams_are_late() { [9, 7, 7, 7] } else { [7; 4] });
}

/// Doubles what `second` sees: copies `from` to `to` on `first`, then `to` to `out` on `second`.
fn two_streams(context: &Arc<CudaContext>, wait: bool) -> Vec<u32> {
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let from = first.clone_htod(&[5u32; 4]).unwrap();
    let mut to = first.alloc_zeros::<u32>(4).unwrap();
    let mut out = second.alloc_zeros::<u32>(4).unwrap();
    first.synchronize().unwrap();
    first.memcpy_dtod(&from, &mut to).unwrap();
    if wait {
        second.join(&first).unwrap();
    }
    second.memcpy_dtod(&to, &mut out).unwrap();
    let seen = second.clone_dtoh(&out).unwrap();
    first.synchronize().unwrap();
    seen
}

#[test]
fn a_missing_event_between_streams_shows() {
    let (_alone, context) = device();
    assert_eq!(two_streams(&context, true), [5; 4]);
    if streams_are_late() {
        assert_eq!(two_streams(&context, false), [0; 4]);
    }
}

#[test]
fn events_are_reached_by_asking() {
    let (_alone, context) = device();
    let stream = context.new_stream().unwrap();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(flags).unwrap();
    let mut buffer = stream.alloc_zeros::<u32>(1000).unwrap();
    stream.memset_zeros(&mut buffer).unwrap();
    let end = stream.record_event(flags).unwrap();
    let mut asked = 0;
    while !end.is_complete() {
        asked += 1;
        assert!(asked < 100);
    }
    assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
}

fn capture(stream: &Arc<CudaStream>, work: impl FnOnce()) -> Result<Option<cudarc::driver::CudaGraph>, DriverError> {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    work();
    stream.end_capture(sys::CUgraphInstantiate_flags(0))
}

#[test]
fn a_graph_is_recorded_once_and_reads_what_buffers_hold_at_each_replay() {
    let (_alone, context) = device();
    let (stream, side) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut input = stream.clone_htod(&[1u32; 4]).unwrap();
    let mut middle = stream.alloc_zeros::<u32>(4).unwrap();
    let mut output = stream.alloc_zeros::<u32>(4).unwrap();
    stream.synchronize().unwrap();
    let graph = capture(&stream, || {
        // Half of the work on a stream that joins by an event, and is joined again.
        side.join(&stream).unwrap();
        side.memcpy_dtod(&input, &mut middle).unwrap();
        assert_eq!(side.capture_status().unwrap(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
        stream.join(&side).unwrap();
        stream.memcpy_dtod(&middle, &mut output).unwrap();
    });
    let graph = graph.unwrap().unwrap();
    assert_eq!(stream.clone_dtoh(&output).unwrap(), [0; 4], "a capture runs nothing");
    for value in [2u32, 3] {
        stream.memcpy_htod(&[value; 4], &mut input).unwrap();
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&output).unwrap(), [value; 4]);
    }
}

#[test]
fn what_cannot_be_captured_spoils_the_capture() {
    let (_alone, context) = device();
    let stream = context.new_stream().unwrap();
    let mut buffer = stream.alloc_zeros::<u32>(4).unwrap();
    let early = stream.record_event(None).unwrap();
    let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    let spoil: [&mut dyn FnMut() -> CUresult; 5] = [
        &mut || code(stream.synchronize()),
        &mut || code(stream.memcpy_htod(&[1u32; 4], &mut buffer)),
        // SAFETY: it fails.
        &mut || code(unsafe { result::malloc_sync(64) }),
        &mut || code(context.synchronize()),
        &mut || match code(stream.wait(&early)) {
            CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION => unsupported,
            other => other,
        },
    ];
    for (i, call) in spoil.into_iter().enumerate() {
        let graph = capture(&stream, || assert_eq!(call(), unsupported, "call {i}"));
        assert_eq!(code(graph), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "call {i}");
        stream.synchronize().unwrap();
    }
}

#[test]
fn memory_runs_out_where_the_test_says() {
    let (_alone, context) = device();
    let stream = context.new_stream().unwrap();
    let (free, total) = context.mem_get_info().unwrap();
    set_memory_bytes(total - free + 1000);
    let small = stream.alloc_zeros::<u8>(600);
    let large = stream.alloc_zeros::<u8>(600);
    set_memory_bytes(total);
    assert_eq!(code(large), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    drop(small.unwrap());
    stream.alloc_zeros::<u8>(1 << 20).unwrap();
}

/// Asks for a backend in a process with this variable. The error's words, or "a device".
fn backend_with(name: &str, value: &OsStr) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child", "--ignored", "--nocapture"]).env(name, value);
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().find_map(|line| line.strip_prefix("CHILD: ").map(str::to_owned)).expect(&said)
}

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child() {
    match quantkv::cuda::CudaBackend::new(0) {
        Ok(_) => println!("CHILD: a device"),
        Err(error) => println!("CHILD: {error:?}"),
    }
}

#[test]
fn what_is_missing_is_a_typed_error() {
    let backend_with = |name, value: &str| backend_with(name, OsStr::new(value));
    assert_eq!(backend_with("QUANTKV_SIMT_CC", "90"), "a device");
    let no_device = backend_with("QUANTKV_SIMT_CC", "none");
    assert!(no_device.starts_with("NoDevice") && no_device.contains("no CUDA-capable device"), "{no_device}");
    let too_old = backend_with("QUANTKV_SIMT_CC", "70");
    assert!(too_old.starts_with("NoKernel"), "{too_old}");
    let too_small = backend_with("QUANTKV_MOCK_MEMORY_BYTES", "4");
    assert!(too_small.starts_with("OutOfMemory"), "{too_small}");
}

#[test]
fn a_missing_driver_is_a_typed_error() {
    // The path keeps the kernels' library and loses the driver.
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap();
    let rest = std::env::split_paths(&path).filter(|folder| !folder.join("libcuda.so.1").exists());
    let said = backend_with("LD_LIBRARY_PATH", &std::env::join_paths(rest).unwrap());
    assert!(said.starts_with("NoDevice") && said.contains("no CUDA driver"), "{said}");
}
