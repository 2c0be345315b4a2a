//! The devices under test: every CPU instruction set of this machine and, with feature `cuda`, its first CUDA
//! device (or the emulator's).
//!
//! ```text
//! for device in devices() {
//!     on_device!(&device, |backend| check(backend, &case)).unwrap_or_else(|text| panic!("{device}: {text}"));
//! }
//! ```
//! | environment | effect |
//! |---|---|
//! | `QUANTKV_TEST_DEVICES` | a list of `cpu`, `cuda` and `rocm`: no others |
//! | `QUANTKV_REQUIRE_CUDA=1`, `QUANTKV_REQUIRE_ROCM=1` | a missing device fails the test instead of skipping that part |
//!
//! Include it with `#[path = "../testing/devices.rs"] mod devices;`.
#![allow(dead_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use quantkv::format::Pod;
use quantkv::{Backend, CpuBackend, Isa};

/// One backend, as a test loops over them.
pub enum Device {
    Cpu(Arc<CpuBackend>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<quantkv::cuda::CudaBackend>),
    #[cfg(feature = "rocm")]
    Rocm(Arc<quantkv::rocm::RocmBackend>),
}

/// `$body` with `$backend` a reference to the device's backend (with `move`, an `Arc` of it): code
/// generic over backends.
#[macro_export]
macro_rules! on_device {
    ($device:expr, |$backend:ident| $body:expr) => {
        $crate::on_device!($device, move |shared| {
            let $backend = &*shared;
            $body
        })
    };
    ($device:expr, move |$backend:ident| $body:expr) => {
        match $device {
            $crate::devices::Device::Cpu(shared) => {
                let $backend = std::sync::Arc::clone(shared);
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::devices::Device::Cuda(shared) => {
                let $backend = std::sync::Arc::clone(shared);
                $body
            }
            #[cfg(feature = "rocm")]
            $crate::devices::Device::Rocm(shared) => {
                let $backend = std::sync::Arc::clone(shared);
                $body
            }
        }
    };
}

/// Everything there is to test on. Faults of earlier tests are gone.
pub fn devices() -> Vec<Device> {
    let mut devices: Vec<_> = match wanted("cpu") {
        true => Isa::ALL.into_iter().filter_map(CpuBackend::with_isa).map(|cpu| Device::Cpu(Arc::new(cpu))).collect(),
        false => Vec::new(),
    };
    devices.extend(rocm());
    devices.extend(cuda());
    devices
}

/// [`devices`], and GPUs again with the attention kernel of every shape, which they take by themselves only
/// where they have no better one.
pub fn attention_devices() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut devices = devices();
    #[cfg(feature = "cuda")]
    if let Some(Device::Cuda(cuda)) = devices.last() {
        let portable = cuda.with_attention_kernel(quantkv::cuda::AttentionKernel::Portable);
        devices.push(Device::Cuda(Arc::new(portable)));
    }
    #[cfg(feature = "rocm")]
    if let Some(Device::Rocm(rocm)) = devices.iter().rev().find(|device| matches!(device, Device::Rocm(_))) {
        let portable = rocm.with_attention_kernel(quantkv::rocm::AttentionKernel::Portable);
        devices.push(Device::Rocm(Arc::new(portable)));
    }
    devices
}

/// Whether kernels run on an emulator: a thousand times slower than anything else here. scripts/amd.sh says so to
/// programs that are the same on a device.
pub fn emulated() -> bool {
    cfg!(quantkv_simt) || std::env::var_os("QUANTKV_AMD_EMULATED").is_some()
}

impl Device {
    pub fn is_cpu(&self) -> bool {
        matches!(self, Device::Cpu(_))
    }

    /// Whether kernels that are made for one of NVIDIA's devices alone may run.
    pub fn is_cuda(&self) -> bool {
        match self {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => true,
            _ => false,
        }
    }

    /// Whether attention over 16-bit activations may use 16-bit products.
    pub fn has_tensor_cores(&self) -> bool {
        match self {
            Device::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => cuda.attention_kernel() != quantkv::cuda::AttentionKernel::Portable,
            #[cfg(feature = "rocm")]
            Device::Rocm(rocm) => rocm.attention_kernel() != quantkv::rocm::AttentionKernel::Portable,
        }
    }

    /// Whether those products take subnormal operands for zero: MI200's do, by its architecture's name or its maker's.
    pub fn flushes_subnormals(&self) -> bool {
        match self {
            #[cfg(feature = "rocm")]
            Device::Rocm(rocm) => rocm
                .device()
                .is_ok_and(|device| ["gfx90a", "MI210", "MI250"].iter().any(|name| device.name.contains(name))),
            _ => false,
        }
    }

    /// Runs `body` in CPU thread pools of 1, 3 and 8 threads: results may not depend on it. Elsewhere, twice.
    pub fn in_pools(&self, body: impl Fn(usize) + Send + Sync) {
        if !self.is_cpu() {
            (1..=2).for_each(body);
            return;
        }
        for threads in [1, 3, 8] {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| body(threads));
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(cpu) => write!(f, "cpu {}", cpu.isa()),
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => write!(f, "cuda, {:?} attention", cuda.attention_kernel()),
            #[cfg(feature = "rocm")]
            Device::Rocm(rocm) => {
                let name = rocm.device().map_or_else(|_| "?".into(), |device| device.name);
                write!(f, "rocm, {name}, {:?} attention", rocm.attention_kernel())
            }
        }
    }
}

/// A backend whose views can be cut: guarded buffers need it.
pub trait Parts: Backend {
    fn part<'a, T: Pod>(view: Self::Ref<'a, T>, range: Range<usize>) -> Self::Ref<'a, T>;
    fn part_mut<'a, T: Pod>(view: Self::Mut<'a, T>, range: Range<usize>) -> Self::Mut<'a, T>;
}

impl Parts for CpuBackend {
    fn part<'a, T: Pod>(view: Self::Ref<'a, T>, range: Range<usize>) -> Self::Ref<'a, T> {
        &view[range]
    }

    fn part_mut<'a, T: Pod>(view: Self::Mut<'a, T>, range: Range<usize>) -> Self::Mut<'a, T> {
        &mut view[range]
    }
}

#[cfg(feature = "cuda")]
impl Parts for quantkv::cuda::CudaBackend {
    fn part<'a, T: Pod>(view: Self::Ref<'a, T>, range: Range<usize>) -> Self::Ref<'a, T> {
        view.slice(range).unwrap()
    }

    fn part_mut<'a, T: Pod>(view: Self::Mut<'a, T>, range: Range<usize>) -> Self::Mut<'a, T> {
        view.slice_mut(range).unwrap()
    }
}

#[cfg(feature = "rocm")]
impl Parts for quantkv::rocm::RocmBackend {
    fn part<'a, T: Pod>(view: Self::Ref<'a, T>, range: Range<usize>) -> Self::Ref<'a, T> {
        view.slice(range).unwrap()
    }

    fn part_mut<'a, T: Pod>(view: Self::Mut<'a, T>, range: Range<usize>) -> Self::Mut<'a, T> {
        view.slice_mut(range).unwrap()
    }
}

fn wanted(kind: &str) -> bool {
    std::env::var("QUANTKV_TEST_DEVICES").map_or(true, |list| list.split(',').any(|name| name.trim() == kind))
}

/// The CUDA device if it is wanted and there is one, else `None` and a line that says why. A handle for each
/// thread: tests that run side by side must not see each other's faults.
pub fn cuda() -> Option<Device> {
    #[cfg(feature = "cuda")]
    if wanted("cuda") {
        return cuda_of_thread();
    }
    None
}

#[cfg(feature = "cuda")]
fn cuda_of_thread() -> Option<Device> {
    use quantkv::cuda::CudaBackend;
    thread_local! {
        static CUDA: quantkv::Result<CudaBackend> = CudaBackend::new(0);
    }
    CUDA.with(|cuda| match cuda {
        Ok(cuda) => {
            cuda.faults().expect("the device to answer");
            Some(Device::Cuda(Arc::new(cuda.clone())))
        }
        Err(reason) if std::env::var_os("QUANTKV_REQUIRE_CUDA").is_some_and(|value| value == "1") => {
            panic!("QUANTKV_REQUIRE_CUDA is set, but: {reason}")
        }
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    })
}

/// The ROCm device, by the same rules.
pub fn rocm() -> Option<Device> {
    #[cfg(feature = "rocm")]
    if wanted("rocm") {
        return rocm_of_thread();
    }
    None
}

#[cfg(feature = "rocm")]
fn rocm_of_thread() -> Option<Device> {
    use quantkv::rocm::RocmBackend;
    thread_local! {
        static ROCM: quantkv::Result<RocmBackend> = RocmBackend::new(0);
    }
    ROCM.with(|rocm| match rocm {
        Ok(rocm) => {
            quantkv::Backend::faults(rocm).expect("the device to answer");
            Some(Device::Rocm(Arc::new(rocm.clone())))
        }
        Err(reason) if std::env::var_os("QUANTKV_REQUIRE_ROCM").is_some_and(|value| value == "1") => {
            panic!("QUANTKV_REQUIRE_ROCM is set, but: {reason}")
        }
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    })
}
