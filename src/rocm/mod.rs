//! The ROCm backend (feature `rocm`): the same operations on an AMD GPU, with the same bytes in the cache.
//!
//! A [`RocmBackend`] is a handle to a stream, the caller's own or one made for it. Operations validate
//! their arguments and enqueue kernels there; they wait for nothing. Those that touch host memory wait for
//! what they must: [`upload`](crate::Backend::upload), [`download`](crate::Backend::download),
//! [`copy_blocks`](crate::Backend::copy_blocks), [`faults`](crate::Backend::faults),
//! [`swap_out`](crate::Backend::swap_out) and [`swap_in`](crate::Backend::swap_in).
//!
//! ```no_run
//! use std::sync::Arc;
//! use quantkv::rocm::RocmBackend;
//! use quantkv::scale::LayerScales;
//! use quantkv::args::RowStrides;
//! use quantkv::{Backend, CacheSpec, KvFormat, PagedKvCache};
//!
//! let rocm = Arc::new(RocmBackend::new(0)?);
//! let spec = CacheSpec::new(2, 64, 16, KvFormat::Fp8E4M3)?;
//! let mut cache = PagedKvCache::new(rocm.clone(), spec, 100, &vec![LayerScales::one(); 2])?;
//!
//! // One token's keys and values of layer 0, to slot 5 of block 3.
//! let mut rows = rocm.zeros::<f32>("keys and values", 2 * 128)?;
//! rocm.upload(&[0.5; 256], &mut rows)?;
//! let mut slots = rocm.zeros::<i64>("slots", 1)?;
//! rocm.upload(&[3 * 16 + 5], &mut slots)?;
//! let (key, value) = (rows.view().slice(..128)?, rows.view().slice(128..)?);
//! let strides = RowStrides::contiguous(2, 64);
//! cache.write(0, key, strides, value, strides, slots.view())?;
//! assert!(rocm.faults()?.is_empty());
//! # Ok::<(), quantkv::Error>(())
//! ```
//!
//! The HIP runtime (`libamdhip64.so.7`, `.so.6` or `.so.5`) is loaded when a backend is made. Without one, or without
//! an AMD GPU, that is an [`Error::NoDevice`].
//!
//! # An engine's own stream and memory
//!
//! [`RocmBackend::wrap`] takes a `hipStream_t`; [`RocmView::from_raw_parts`] and [`RocmViewMut::from_raw_parts`] make
//! views of memory known by address. [`crate::raw::rocm`] has the same operations over pointers.

mod buffer;
mod copy;
mod ops;
mod runtime;
mod stream;

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

pub use buffer::{RocmBuffer, RocmView, RocmViewMut};
pub(crate) use runtime::runtime;
pub use stream::RocmStream;

use crate::args::UpdateScales;
use crate::error::{Error, Result};
use crate::raw::rocm as raw;
pub use crate::raw::rocm::AttentionKernel;
use crate::raw::rocm::Launch;
use buffer::Allocation;

/// The name of this backend.
pub(crate) const ROCM: &str = "rocm";

/// An AMD GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RocmDevice {
    /// What [`RocmBackend::new`] calls it.
    pub ordinal: usize,
    /// The maker's name of it.
    pub name: String,
    /// Bytes of its memory.
    pub total_memory_bytes: usize,
}

/// The AMD GPUs of this machine.
///
/// # Errors
/// [`Error::NoDevice`] without a runtime or a device.
pub fn devices() -> Result<Vec<RocmDevice>> {
    let count = runtime()?.count_devices()?;
    (0..count).map(device).collect()
}

/// The file that the HIP runtime was loaded from: `libamdhip64.so.7`.
///
/// # Errors
/// [`Error::NoDevice`] without a runtime.
pub fn runtime_name() -> Result<&'static str> {
    Ok(runtime()?.name())
}

fn device(ordinal: usize) -> Result<RocmDevice> {
    let (runtime, number) = (runtime()?, ordinal as c_int);
    let (name, total_memory_bytes) = (runtime.device_name(number)?, runtime.total_memory_bytes(number)?);
    Ok(RocmDevice { ordinal, name, total_memory_bytes })
}

/// A handle to a HIP stream: what operations run on. Clones share the stream and the fault word.
///
/// Threads may use one handle at the same time; their work is enqueued in the order of their calls.
#[derive(Clone, Debug)]
pub struct RocmBackend {
    shared: Arc<Shared>,
    attention_kernel: AttentionKernel,
    /// What the reference decoder keeps: its options, the matrix library.
    #[cfg(feature = "decoder")]
    pub(crate) decoder: Arc<crate::decoder::rocm::State>,
}

#[derive(Debug)]
struct Shared {
    stream: Arc<RocmStream>,
    /// Carries copies to and from host memory.
    side: RocmStream,
    /// Two words: the sticky fault word, and room for a copy of it.
    faults: Allocation,
    /// Held for reading while work is enqueued, for writing while the fault word is copied and cleared: so
    /// no fault falls between the two.
    launches: RwLock<()>,
    /// One reader of the copy at a time.
    reading_faults: Mutex<()>,
    /// The lists of the latest `copy_blocks`. Used in stream order, like everything.
    copy_lists: Mutex<Allocation>,
}

impl RocmBackend {
    /// The device of this ordinal, with a stream of its own.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a runtime or without such a device; [`Error::NoKernel`] if this build has no code
    /// for the device; [`Error::NotCompiled`]; [`Error::Device`].
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::on(RocmStream::new(runtime()?, Self::number(ordinal)?)?)
    }

    /// A stream of the caller's own. Work enqueued there before and after an operation, by anyone, is in
    /// order with it.
    ///
    /// # Errors
    /// As [`RocmBackend::new`]; [`Error::InCapture`].
    ///
    /// # Safety
    /// `stream` is a `hipStream_t` of device `ordinal`, or null for its default stream, and lives as long as the
    /// backend, its clones and the buffers it makes. No stream is destroyed and another made in its place meanwhile.
    pub unsafe fn wrap(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        Self::on(RocmStream::borrowed(runtime()?, Self::number(ordinal)?, stream))
    }

    fn number(ordinal: usize) -> Result<c_int> {
        let count = runtime()?.count_devices()?;
        if ordinal >= count {
            let reason = format!("there is no device {ordinal}; devices found: {count}");
            return Err(Error::NoDevice { backend: ROCM, reason });
        }
        Ok(ordinal as c_int)
    }

    fn on(stream: RocmStream) -> Result<Self> {
        let stream = Arc::new(stream);
        stream.bind()?;
        raw::prepare()?;
        stream.refuse_capture("making a backend")?;
        let faults = Allocation::zeros(&stream, "fault word", 2 * size_of::<u32>())?;
        let copy_lists = Mutex::new(Allocation::zeros(&stream, "lists of copy_blocks", 0)?);
        let side = RocmStream::new(stream.runtime, stream.device() as c_int)?;
        let (launches, reading_faults) = (RwLock::new(()), Mutex::new(()));
        let shared = Shared { stream, side, faults, launches, reading_faults, copy_lists };
        let backend = RocmBackend {
            shared: Arc::new(shared),
            attention_kernel: AttentionKernel::Auto,
            #[cfg(feature = "decoder")]
            decoder: Arc::default(),
        };
        backend.check_kernels()?;
        Ok(backend)
    }

    /// Launches the smallest kernel: a runtime that loads code it cannot run shows here.
    fn check_kernels(&self) -> Result<()> {
        use crate::Backend;
        let absmax = self.zeros::<f32>("check", 1)?;
        let mut scales = self.zeros::<f32>("check", 1)?;
        self.update_scales(UpdateScales { absmax: absmax.view(), divisor: 1.0, scales: scales.view_mut() })
    }

    /// The same stream, with attention by this kernel. For tests and comparisons: the default,
    /// [`AttentionKernel::Auto`], takes the fastest.
    pub fn with_attention_kernel(&self, kernel: AttentionKernel) -> Self {
        RocmBackend { attention_kernel: kernel, ..self.clone() }
    }

    /// The attention kernel in use.
    pub fn attention_kernel(&self) -> AttentionKernel {
        self.attention_kernel
    }

    /// The stream.
    pub fn stream(&self) -> &RocmStream {
        &self.shared.stream
    }

    /// What the device is.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn device(&self) -> Result<RocmDevice> {
        device(self.stream().device())
    }

    /// Waits until everything enqueued so far is done.
    ///
    /// # Errors
    /// [`Error::Device`]: the device's own, of any work enqueued before.
    pub fn synchronize(&self) -> Result<()> {
        self.stream().synchronize()
    }

    /// Runs `call`, which enqueues work on the stream.
    pub(crate) fn enqueue<T>(&self, call: impl FnOnce(Launch) -> Result<T>) -> Result<T> {
        self.stream().bind()?;
        let _launching = self.shared.launches.read().unwrap_or_else(PoisonError::into_inner);
        call(Launch { stream: self.stream().handle, faults: self.shared.faults.at(0).cast() })
    }
}
