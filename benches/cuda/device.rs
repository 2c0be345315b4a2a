//! The device under the benches: memory, timing by replayed graphs, and the ceilings.
//!
//! A timing captures a number of launches into one graph, replays it, and divides what two events
//! say by the launches: what is left of a launch is what a serving engine pays for it. Launches take
//! turns over copies of the data larger together than the L2 cache, as the layers of a model do.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result, sys};
use libloading::Library;
use quantkv::raw::bindings as c;

/// What went wrong, in words: a bench prints it beside the shape and goes on.
pub type Outcome<T> = Result<T, String>;

/// Turns a status of the C ABI into an [`Outcome`].
pub fn checked(what: &str, status: c_int) -> Outcome<()> {
    if status == c::QUANTKV_OK {
        return Ok(());
    }
    // SAFETY: the function takes any status and returns a string with static lifetime.
    let words = unsafe { CStr::from_ptr(c::quantkv_cuda_status_string(status)) };
    Err(format!("{what}: {}", words.to_string_lossy()))
}

fn driver<T>(what: &str, result: Result<T, cudarc::driver::DriverError>) -> Outcome<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

/// Microseconds of one launch: the median of the replays, and their ends.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub median: f64,
    pub fastest: f64,
    pub slowest: f64,
}

impl Timing {
    fn of(mut samples: Vec<f64>) -> Timing {
        samples.sort_by(f64::total_cmp);
        Timing { median: samples[samples.len() / 2], fastest: samples[0], slowest: samples[samples.len() - 1] }
    }
}

/// Device memory, freed when dropped.
pub struct Buffer {
    address: u64,
    bytes: usize,
}

impl Buffer {
    pub fn pointer<T>(&self) -> *mut T {
        self.address as *mut T
    }
    /// The address `offset` bytes in.
    pub fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset <= self.bytes);
        (self.address + offset as u64) as *mut T
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the address came from an allocation this value owns; work that used it was waited for.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked host memory, freed when dropped.
pub struct Pinned {
    pub pointer: *mut c_void,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: as for Buffer.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

type FillKernel = unsafe extern "C" fn(*mut c_void, i64, i32, u32, *mut c_void) -> c_int;
type ReadKernel = unsafe extern "C" fn(*const c_void, i64, *mut c_void, c_int, *mut c_void) -> c_int;
type CopyKernel = unsafe extern "C" fn(*mut c_void, *const c_void, i64, c_int, *mut c_void) -> c_int;
type EmptyKernel = unsafe extern "C" fn(c_int, *mut c_void) -> c_int;

/// csrc/bench/ceilings.cu, in a shared library of its own.
struct Kernels {
    fill: FillKernel,
    read: ReadKernel,
    copy: CopyKernel,
    empty: EmptyKernel,
    _library: Library,
}

pub struct Device {
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    kernels: Kernels,
    sink: Buffer,
    replays: usize,
    reads: RefCell<HashMap<usize, f64>>,
    copies: RefCell<HashMap<usize, f64>>,
}

impl Device {
    /// The first device, or why there is none.
    pub fn new(replays: usize) -> Outcome<Device> {
        // SAFETY: asks the loader for the library's presence, nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err("no CUDA driver (libcuda.so.1)".into());
        }
        let context = driver("no CUDA device", CudaContext::new(0))?;
        let stream = driver("a stream", context.new_stream())?;
        let kernels = Kernels::load()?;
        let sink = allocate(256)?;
        Ok(Device { context, stream, kernels, sink, replays, reads: RefCell::default(), copies: RefCell::default() })
    }

    /// Name, multiprocessors, memory, driver: what a result is worth nothing without.
    pub fn describe(&self) -> Outcome<String> {
        let name = driver("its name", self.context.name())?;
        let (major, minor) = driver("its capability", self.context.compute_capability())?;
        let attribute = |which| driver("an attribute", self.context.attribute(which));
        let sms = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let l2 = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let memory = driver("its memory", self.context.total_mem())?;
        Ok(format!("{name}, sm_{major}{minor}, {sms} SMs, L2 {} MB, {} GB", l2 >> 20, memory >> 30))
    }

    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    pub fn free_bytes(&self) -> Outcome<usize> {
        driver("free memory", self.context.mem_get_info()).map(|(free, _)| free)
    }

    pub fn wait(&self) -> Outcome<()> {
        driver("a kernel", self.stream.synchronize())
    }

    /// Memory filled with 0xFF: NaN in every format, an id outside every cache.
    pub fn poisoned(&self, bytes: usize) -> Outcome<Buffer> {
        let buffer = allocate(bytes.max(16))?;
        // SAFETY: the buffer is that large; the stream is waited for.
        driver("memset", unsafe {
            result::memset_d8_async(buffer.address, 0xff, buffer.bytes, self.stream.cu_stream())
        })?;
        self.wait()?;
        Ok(buffer)
    }

    pub fn zeroed(&self, bytes: usize) -> Outcome<Buffer> {
        let buffer = allocate(bytes.max(16))?;
        // SAFETY: the buffer is that large; the stream is waited for.
        driver("memset", unsafe { result::memset_d8_async(buffer.address, 0, buffer.bytes, self.stream.cu_stream()) })?;
        self.wait()?;
        Ok(buffer)
    }

    /// Random numbers in (-1, 1), stored in `format` (a `quantkv_format`).
    pub fn random(&self, elements: usize, format: c_int, seed: u32) -> Outcome<Buffer> {
        let bytes = elements * [4, 2, 2, 1, 1, 1][format as usize];
        let buffer = allocate(bytes.max(16))?;
        // SAFETY: the buffer holds that many elements.
        let status = unsafe { (self.kernels.fill)(buffer.pointer(), elements as i64, format, seed, self.raw_stream()) };
        checked("fill", status)?;
        self.wait()?;
        Ok(buffer)
    }

    /// A copy of `data`, of a type without padding.
    pub fn upload<T: Copied>(&self, data: &[T]) -> Outcome<Buffer> {
        let buffer = allocate(size_of_val(data).max(16))?;
        // SAFETY: the buffer is that large; the stream is waited for before `data` can go.
        driver("upload", unsafe { result::memcpy_htod_async(buffer.address, data, self.stream.cu_stream()) })?;
        self.wait()?;
        Ok(buffer)
    }

    /// Fills `data` from `offset` bytes into a buffer.
    pub fn download<T: Copied>(&self, buffer: &Buffer, offset: usize, data: &mut [T]) -> Outcome<()> {
        assert!(offset + size_of_val(data) <= buffer.bytes);
        let from = buffer.address + offset as u64;
        // SAFETY: inside the buffer by the line above; any bits are a T; the stream is waited for.
        driver("download", unsafe { result::memcpy_dtoh_async(data, from, self.stream.cu_stream()) })?;
        self.wait()
    }

    pub fn pinned(&self, bytes: usize) -> Outcome<Pinned> {
        driver("pinned memory", self.context.bind_to_thread())?;
        // SAFETY: only the device reads or writes it.
        driver("pinned memory", unsafe { result::malloc_host(bytes, 0) }).map(|pointer| Pinned { pointer })
    }

    /// Times `launches` calls of `launch(i)` in one graph.
    pub fn time(&self, launches: usize, mut launch: impl FnMut(usize) -> Outcome<()>) -> Outcome<Timing> {
        launch(0)?; // outside the capture: errors are plainer, modules are loaded
        self.wait()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver("begin of capture", self.stream.begin_capture(mode))?;
        let launched = (0..launches).try_for_each(&mut launch);
        let flags = sys::CUgraphInstantiate_flags(0);
        let graph = driver("end of capture", self.stream.end_capture(flags));
        launched?;
        let graph = graph?.ok_or("the capture is empty")?;
        let samples = self.samples(|| driver("replay", graph.launch()))?;
        Ok(Timing::of(samples.into_iter().map(|us| us / launches as f64).collect()))
    }

    /// Times `work` enqueued directly: for what cannot be captured.
    pub fn time_directly(&self, mut work: impl FnMut() -> Outcome<()>) -> Outcome<Timing> {
        self.samples(&mut work).map(Timing::of)
    }

    /// Microseconds between events around `work`, after three runs that do not count.
    fn samples(&self, mut work: impl FnMut() -> Outcome<()>) -> Outcome<Vec<f64>> {
        let event = || driver("an event", self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)));
        let (start, end) = (event()?, event()?);
        let mut samples = vec![];
        for i in 0..self.replays + 3 {
            driver("an event", start.record(&self.stream))?;
            work()?;
            driver("an event", end.record(&self.stream))?;
            driver("a replay", end.synchronize())?;
            let ms = driver("events", start.elapsed_ms(&end))?;
            if i >= 3 {
                samples.push(f64::from(ms) * 1e3);
            }
        }
        Ok(samples)
    }

    /// R: the time of a plain read of `bytes`, over slices of `data` in turn.
    pub fn read_ceiling(&self, data: &Buffer, bytes: usize) -> Outcome<f64> {
        let bytes = (bytes / 16 * 16).min(data.bytes / 16 * 16);
        let slices = (data.bytes / bytes).max(1);
        self.ceiling(&self.reads, bytes, slices, |i, blocks| {
            // SAFETY: slice i lies inside `data`.
            let status = unsafe {
                (self.kernels.read)(data.at(i * bytes), bytes as i64, self.sink.pointer(), blocks, self.raw_stream())
            };
            checked("read", status)
        })
    }

    /// The time of a plain copy that moves `bytes` in all, half read and half written.
    pub fn copy_ceiling(&self, bytes: usize) -> Outcome<f64> {
        let half = bytes.div_ceil(32) * 16;
        if let Some(&known) = self.copies.borrow().get(&(2 * half)) {
            return Ok(known);
        }
        let slices = (200_000_000 / (2 * half) + 1).clamp(2, 256);
        let (src, dst) = (self.random(half * slices / 4, c::QUANTKV_F32, 3)?, self.zeroed(half * slices)?);
        self.ceiling(&self.copies, 2 * half, slices, |i, blocks| {
            let at = i * half;
            // SAFETY: slice i lies inside both buffers.
            let status = unsafe { (self.kernels.copy)(dst.at(at), src.at(at), half as i64, blocks, self.raw_stream()) };
            checked("copy", status)
        })
    }

    /// The best of a few grids; remembered by size.
    fn ceiling(
        &self,
        known: &RefCell<HashMap<usize, f64>>,
        bytes: usize,
        slices: usize,
        launch: impl Fn(usize, c_int) -> Outcome<()>,
    ) -> Outcome<f64> {
        if let Some(&known) = known.borrow().get(&bytes) {
            return Ok(known);
        }
        let mut best = f64::INFINITY;
        for blocks in [2, 4, 8] {
            let launches = launches_for(bytes, slices);
            best = best.min(self.time(launches, |i| launch(i % slices, blocks))?.median);
        }
        known.borrow_mut().insert(bytes, best);
        Ok(best)
    }

    /// Empty kernels: plainly launched, and with programmatic dependent launch.
    pub fn empty_kernels(&self) -> Outcome<(Timing, Timing)> {
        let time = |overlapped| {
            self.time(100, |_| {
                // SAFETY: the kernel touches no memory.
                checked("empty", unsafe { (self.kernels.empty)(overlapped, self.raw_stream()) })
            })
        };
        Ok((time(0)?, time(1)?))
    }
}

/// Launches in a graph: 20 or more, every slice as often as the others, at most about 20 ms unless
/// one launch is longer.
pub fn launches_for(bytes: usize, slices: usize) -> usize {
    let rounds = 20usize.div_ceil(slices);
    let affordable = (80_000_000_000 / bytes.max(1)).max(1).div_ceil(slices).max(1);
    rounds.min(affordable) * slices
}

/// Types whose every bit pattern is a value and that have no padding.
pub trait Copied: Copy {}
impl Copied for u8 {}
impl Copied for u16 {}
impl Copied for u32 {}
impl Copied for i32 {}
impl Copied for i64 {}
impl Copied for f32 {}
impl Copied for c::quantkv_block_table_memory {}

fn allocate(bytes: usize) -> Outcome<Buffer> {
    // SAFETY: the context is bound to this thread: Device made it here.
    let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| format!("{bytes} bytes: {error}"))?;
    Ok(Buffer { address, bytes })
}

impl Kernels {
    /// `QUANTKV_BENCH_LIBRARY`, or the file beside this program, or compiled now.
    fn load() -> Outcome<Kernels> {
        let path = match std::env::var_os("QUANTKV_BENCH_LIBRARY") {
            Some(path) => PathBuf::from(path),
            None => {
                let program = std::env::current_exe().map_err(|error| error.to_string())?;
                let beside = program.with_file_name("libquantkv_bench.so");
                if !beside.exists() {
                    compile(&beside)?;
                }
                beside
            }
        };
        // SAFETY: the library is csrc/bench/ceilings.cu, whose functions have these types.
        unsafe {
            let library = Library::new(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let missing = |error: libloading::Error| error.to_string();
            Ok(Kernels {
                fill: *library.get::<FillKernel>(b"quantkv_bench_fill").map_err(missing)?,
                read: *library.get::<ReadKernel>(b"quantkv_bench_read").map_err(missing)?,
                copy: *library.get::<CopyKernel>(b"quantkv_bench_copy").map_err(missing)?,
                empty: *library.get::<EmptyKernel>(b"quantkv_bench_empty").map_err(missing)?,
                _library: library,
            })
        }
    }
}

/// nvcc, found as build.rs finds it first, for the device at hand.
fn compile(to: &Path) -> Outcome<()> {
    let home = |name| std::env::var_os(name).map(|home| Path::new(&home).join("bin/nvcc").into_os_string());
    let nvcc = std::env::var_os("NVCC")
        .or_else(|| home("CUDA_HOME"))
        .or_else(|| home("CUDA_PATH"))
        .unwrap_or_else(|| "nvcc".into());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("csrc");
    let run = Command::new(&nvcc)
        .args(["-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"])
        .arg("-I")
        .arg(&source)
        .arg(source.join("bench/ceilings.cu"))
        .arg("-o")
        .arg(to)
        .output()
        .map_err(|error| format!("{}: {error}; set QUANTKV_BENCH_LIBRARY or CUDA_HOME", nvcc.to_string_lossy()))?;
    if run.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&run.stderr).into_owned()) }
}
