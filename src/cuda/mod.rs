//! The CUDA backend (feature `cuda`): the same operations on an NVIDIA GPU, with the same bytes in the
//! cache.
//!
//! A [`CudaBackend`] is a handle to a stream, the caller's own or one made for it. Operations validate
//! their arguments and enqueue kernels there; they wait for nothing. Those that touch host memory wait for
//! what they must: [`download`](crate::Backend::download), [`faults`](crate::Backend::faults),
//! [`swap_out`](crate::Backend::swap_out) and [`swap_in`](crate::Backend::swap_in).
//!
//! ```no_run
//! use std::sync::Arc;
//! use quantkv::cuda::CudaBackend;
//! use quantkv::scale::LayerScales;
//! use quantkv::args::RowStrides;
//! use quantkv::{Backend, CacheSpec, KvFormat, PagedKvCache};
//!
//! let cuda = Arc::new(CudaBackend::new(0)?);
//! let spec = CacheSpec::new(2, 64, 16, KvFormat::Fp8E4M3)?;
//! let mut cache = PagedKvCache::new(cuda.clone(), spec, 100, &vec![LayerScales::one(); 2])?;
//!
//! // One token's keys and values of layer 0, to slot 5 of block 3.
//! let mut rows = cuda.zeros::<f32>("keys and values", 2 * 128)?;
//! cuda.upload(&[0.5; 256], &mut rows)?;
//! let mut slots = cuda.zeros::<i64>("slots", 1)?;
//! cuda.upload(&[3 * 16 + 5], &mut slots)?;
//! let (key, value) = (rows.view().slice(..128)?, rows.view().slice(128..)?);
//! let strides = RowStrides::contiguous(2, 64);
//! cache.write(0, key, strides, value, strides, slots.view())?;
//! assert!(cuda.faults()?.is_empty());
//! # Ok::<(), quantkv::Error>(())
//! ```
//!
//! # An engine's own context and stream
//!
//! [`CudaBackend::wrap`] takes a stream of [cudarc](cudarc::driver); [`CudaBackend::lend`] and
//! [`CudaBackend::lend_mut`] make views of buffers that cudarc owns, [`CudaView::from_raw_parts`] of
//! memory known by address. Engines without cudarc use [`crate::raw::cuda`].
//!
//! # Graphs
//!
//! Every operation can be captured, but for those named above, `upload` and `copy_blocks`: these read or write
//! host memory and answer [`Error::InCapture`]; for copies inside a graph there is
//! [`raw::cuda::copy_blocks`](crate::raw::cuda::copy_blocks). Capture with cudarc on
//! [`CudaBackend::stream`]: `begin_capture`, the operations, `end_capture`, then `launch` at will. A graph
//! keeps addresses and sizes: its buffers must outlive it, and none may be dropped during the capture. What
//! they *hold* is read at each replay: change slots, tables, lengths, scales by `upload` between replays.
//! Buffers of cudarc take part if its event tracking is off.

mod buffer;
mod copy;
pub(crate) mod driver;
mod graph;
mod ops;
mod swap;

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::{CudaContext, CudaStream, sys};

pub use crate::raw::cuda::AttentionKernel;
pub use buffer::{CudaBuffer, CudaView, CudaViewMut, Lent, LentMut};
pub use graph::Graph;

use crate::args::UpdateScales;
use crate::error::{Error, Result};
use crate::format::Pod;
use crate::raw::cuda as raw;
use crate::raw::cuda::Launch;
use buffer::Allocation;
use driver::{SideStream, error};

/// The name of this backend.
pub(crate) const CUDA: &str = "cuda";

/// A CUDA device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// What [`CudaBackend::new`] calls it.
    pub ordinal: usize,
    /// The maker's name of it.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Bytes of its memory.
    pub total_memory_bytes: usize,
}

/// The CUDA devices of this machine.
///
/// # Errors
/// [`Error::NoDevice`] without a driver or a device.
pub fn devices() -> Result<Vec<CudaDevice>> {
    driver::check_present()?;
    let count = CudaContext::device_count().map_err(error("cuDeviceGetCount"))?;
    if count == 0 {
        return Err(Error::NoDevice { backend: CUDA, reason: "the driver names no device".to_owned() });
    }
    (0..count).map(device).collect()
}

fn device(ordinal: i32) -> Result<CudaDevice> {
    use cudarc::driver::result::device;
    use sys::CUdevice_attribute_enum as Attribute;
    let handle = device::get(ordinal).map_err(error("cuDeviceGet"))?;
    // SAFETY: a handle the driver gave just now.
    let attribute =
        |attribute| unsafe { device::get_attribute(handle, attribute) }.map_err(error("cuDeviceGetAttribute"));
    Ok(CudaDevice {
        ordinal: ordinal as usize,
        name: device::get_name(handle).map_err(error("cuDeviceGetName"))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        total_memory_bytes: unsafe { device::total_mem(handle) }.map_err(error("cuDeviceTotalMem"))?,
    })
}

/// A handle to a CUDA stream: what operations run on. Clones share the stream and the fault word.
///
/// Threads may use one handle at the same time; their work is enqueued in the order of their calls.
#[derive(Clone, Debug)]
pub struct CudaBackend {
    shared: Arc<Shared>,
    attention_kernel: AttentionKernel,
    /// What the reference decoder keeps: its options, the matrix library.
    #[cfg(feature = "decoder")]
    pub(crate) decoder: Arc<crate::decoder::cuda::State>,
}

#[derive(Debug)]
struct Shared {
    stream: Arc<CudaStream>,
    /// Carries copies to and from host memory.
    side: SideStream,
    /// Two words: the sticky fault word, and room for a copy of it.
    faults: Allocation,
    /// Held for reading while work is enqueued, for writing while the fault word is copied and cleared: so
    /// no fault falls between the two.
    launches: RwLock<()>,
    /// One reader of the copy at a time.
    reading_faults: Mutex<()>,
    /// The lists of the latest `copy_blocks`. Used in stream order, like everything.
    copy_lists: Mutex<Allocation>,
    /// The thread that records a graph, if one does.
    recorder: RwLock<Option<graph::Recorder>>,
    /// Held while a graph is recorded.
    recording: Mutex<()>,
}

impl CudaBackend {
    /// The device of this ordinal, by its primary context and a stream of its own.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver, without such a device, or if the driver is older than the
    /// toolkit that compiled the kernels; [`Error::NoKernel`] if this build has no code for the device;
    /// [`Error::NotCompiled`]; [`Error::Device`].
    pub fn new(ordinal: usize) -> Result<Self> {
        let count = devices()?.len();
        if ordinal >= count {
            let reason = format!("there is no device {ordinal}; devices found: {count}");
            return Err(Error::NoDevice { backend: CUDA, reason });
        }
        let context = CudaContext::new(ordinal).map_err(error("cuDevicePrimaryCtxRetain"))?;
        Self::wrap(context.new_stream().map_err(error("cuStreamCreate"))?)
    }

    /// A stream of the caller's own. Work enqueued there before and after an operation, by anyone, is in
    /// order with it.
    ///
    /// # Errors
    /// As [`CudaBackend::new`].
    pub fn wrap(stream: Arc<CudaStream>) -> Result<Self> {
        raw::check_version()?;
        driver::refuse_capture(&stream, "making a backend")?;
        let faults = Allocation::zeros(&stream, "fault word", 2 * size_of::<u32>())?;
        let copy_lists = Mutex::new(Allocation::zeros(&stream, "lists of copy_blocks", 0)?);
        let side = SideStream::new(stream.context())?;
        let (launches, reading_faults) = (RwLock::new(()), Mutex::new(()));
        let (recorder, recording) = (RwLock::new(None), Mutex::new(()));
        let shared = Shared { stream, side, faults, launches, reading_faults, copy_lists, recorder, recording };
        let backend = CudaBackend {
            shared: Arc::new(shared),
            attention_kernel: AttentionKernel::Auto,
            #[cfg(feature = "decoder")]
            decoder: Arc::default(),
        };
        backend.check_kernels()?;
        Ok(backend)
    }

    /// Launches the smallest kernel: an old driver, or a device this build has no code for, shows here.
    fn check_kernels(&self) -> Result<()> {
        use crate::Backend;
        let absmax = self.zeros::<f32>("check", 1)?;
        let mut scales = self.zeros::<f32>("check", 1)?;
        self.update_scales(UpdateScales { absmax: absmax.view(), divisor: 1.0, scales: scales.view_mut() })
    }

    /// The same stream, with attention by this kernel. For tests and comparisons: the default,
    /// [`AttentionKernel::Auto`], takes the fastest.
    pub fn with_attention_kernel(&self, kernel: AttentionKernel) -> Self {
        CudaBackend { attention_kernel: kernel, ..self.clone() }
    }

    /// The attention kernel in use.
    pub fn attention_kernel(&self) -> AttentionKernel {
        self.attention_kernel
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.shared.stream
    }

    /// The stream's context.
    pub fn context(&self) -> &Arc<CudaContext> {
        self.shared.stream.context()
    }

    /// What the device is.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn device(&self) -> Result<CudaDevice> {
        device(self.context().ordinal() as i32)
    }

    /// Waits until everything enqueued so far is done.
    ///
    /// # Errors
    /// [`Error::Device`]: the device's own, of any work enqueued before.
    pub fn synchronize(&self) -> Result<()> {
        self.shared.stream.synchronize().map_err(error("cuStreamSynchronize"))
    }

    /// Lends a buffer of cudarc to operations that read it: `cuda.lend(slice.as_view())?.view()`.
    ///
    /// # Errors
    /// [`Error::OtherStream`] unless it was allocated on this backend's stream.
    pub fn lend<'a, T: Pod>(&'a self, slice: cudarc::driver::CudaView<'a, T>) -> Result<Lent<'a, T>> {
        Lent::new(&self.shared.stream, slice)
    }

    /// Lends a buffer of cudarc to operations that write it.
    ///
    /// # Errors
    /// [`Error::OtherStream`] unless it was allocated on this backend's stream.
    pub fn lend_mut<'a, T: Pod>(&'a self, slice: cudarc::driver::CudaViewMut<'a, T>) -> Result<LentMut<'a, T>> {
        LentMut::new(&self.shared.stream, slice)
    }

    /// Makes the context current on this thread.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context().bind_to_thread().map_err(error("cuCtxSetCurrent"))
    }

    /// Runs `call`, which enqueues work on the stream.
    pub(crate) fn enqueue(&self, call: impl FnOnce(Launch) -> Result<()>) -> Result<()> {
        self.bind()?;
        let _launching = self.shared.launches.read().unwrap_or_else(PoisonError::into_inner);
        let faults = std::ptr::with_exposed_provenance_mut(self.shared.faults.address as usize);
        call(Launch { stream: self.shared.launch_stream().cast(), faults })
    }
}
