//! `--device`, `--activations` and `--products`: which backend runs, with activations of which type.

use quantkv::decoder::Compute;
use quantkv::{CpuBackend, DType, Element};

use super::program::Failure;

// Flags of every program that runs a model. (A doc comment here would become the program's own.)
#[derive(Clone, Debug, clap::Args)]
pub struct DeviceArgs {
    /// Where to run: cpu, cuda or rocm (the first device), cuda:N or rocm:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    pub device: Device,

    /// What activations are computed in; auto is the model's own dtype on a GPU, f32 on the CPU
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub activations: Activations,

    /// Who multiplies matrices on a GPU; auto is the vendor's library, cublaslt on CUDA and rocblas on ROCm, where it is
    /// installed, else portable, our own kernel
    #[arg(long, value_name = "WHO", default_value = "auto")]
    pub products: Products,
}

/// `--products`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Products {
    Auto,
    #[value(name = "cublaslt")]
    CublasLt,
    #[value(name = "rocblas")]
    RocBlas,
    Portable,
}

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    /// The device of this number.
    Cuda(usize),
    Rocm(usize),
}

fn device(text: &str) -> Result<Device, String> {
    let number = |text: &str| text.parse().ok();
    match text.split_once(':') {
        None if text == "cpu" => Some(Device::Cpu),
        None if text == "cuda" => Some(Device::Cuda(0)),
        None if text == "rocm" => Some(Device::Rocm(0)),
        Some(("cuda", ordinal)) => number(ordinal).map(Device::Cuda),
        Some(("rocm", ordinal)) => number(ordinal).map(Device::Rocm),
        _ => None,
    }
    .ok_or_else(|| "expected cpu, cuda, cuda:N, rocm or rocm:N".into())
}

/// `--activations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Activations {
    Auto,
    F32,
    F16,
    Bf16,
}

impl Activations {
    /// `None` for auto.
    fn dtype(self) -> Option<DType> {
        match self {
            Activations::Auto => None,
            Activations::F32 => Some(DType::F32),
            Activations::F16 => Some(DType::F16),
            Activations::Bf16 => Some(DType::BF16),
        }
    }
}

/// What programs ask of a backend beside computing.
#[allow(dead_code)] // each asks for its part
pub trait Machine {
    /// `cpu`, `cuda:0`, `rocm:0`.
    fn label(&self) -> String;
    /// One line about it for tables.
    fn describe(&self) -> String;
    /// Bytes that may still be allocated where the model and the cache live, if it is known.
    fn free_memory(&self) -> Option<usize>;
}

impl Machine for CpuBackend {
    fn label(&self) -> String {
        "cpu".into()
    }

    fn describe(&self) -> String {
        "the CPU".into()
    }

    fn free_memory(&self) -> Option<usize> {
        let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
        meminfo.lines().find_map(|line| {
            let kib = line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim();
            kib.parse::<usize>().ok()?.checked_mul(1024)
        })
    }
}

/// What runs on a backend: the program gives one, this module the backend.
pub trait Job {
    /// The model's own dtype, which `--activations auto` means on a GPU.
    #[cfg_attr(not(any(feature = "cuda", feature = "rocm")), allow(dead_code))]
    fn model_dtype(&self) -> Result<DType, Failure>;

    /// Runs on it.
    fn run<B: Compute<A> + Machine, A: Element>(self, backend: B) -> Result<(), Failure>;
}

impl DeviceArgs {
    /// Runs `job` on the device named. `graphs`: whether decode steps may be recorded.
    pub fn run(&self, graphs: bool, job: impl Job) -> Result<(), Failure> {
        match (self.device, self.activations.dtype()) {
            (Device::Cpu, None | Some(DType::F32)) => job.run::<CpuBackend, f32>(CpuBackend::new()),
            (Device::Cpu, Some(given)) => Err(Failure::User(format!(
                "--activations {given}: the CPU computes with f32; use --device cuda or rocm"
            ))),
            (Device::Cuda(_), _) if self.products == Products::RocBlas => {
                Err(Failure::User("--products rocblas: the library on CUDA is cublaslt".into()))
            }
            (Device::Rocm(_), _) if self.products == Products::CublasLt => {
                Err(Failure::User("--products cublaslt: the library on ROCm is rocblas".into()))
            }
            (Device::Cuda(ordinal), activations) => self.run_on_cuda(ordinal, activations, graphs, job),
            (Device::Rocm(ordinal), activations) => self.run_on_rocm(ordinal, activations, job),
        }
    }

    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        ordinal: usize,
        activations: Option<DType>,
        graphs: bool,
        job: impl Job,
    ) -> Result<(), Failure> {
        use quantkv::cuda::CudaBackend;
        use quantkv::decoder::cuda::{DecoderOptions, Products as Cuda};

        let products = match self.products {
            Products::CublasLt => Cuda::CublasLt,
            Products::Portable => Cuda::Portable,
            Products::Auto | Products::RocBlas => Cuda::Auto,
        };
        let backend = CudaBackend::new(ordinal)?.with_decoder_options(DecoderOptions { products, graphs });
        // Now rather than after minutes of loading.
        backend.uses_cublaslt()?;
        run_in(activations, backend, job)
    }

    #[cfg(not(feature = "cuda"))]
    fn run_on_cuda(&self, _: usize, _: Option<DType>, _: bool, _: impl Job) -> Result<(), Failure> {
        Err(Failure::User("--device cuda: this program was built without CUDA (build it with --features cuda)".into()))
    }

    #[cfg(feature = "rocm")]
    fn run_on_rocm(&self, ordinal: usize, activations: Option<DType>, job: impl Job) -> Result<(), Failure> {
        use quantkv::decoder::rocm::{DecoderOptions, Products as Rocm};
        use quantkv::rocm::RocmBackend;

        let products = match self.products {
            Products::RocBlas => Rocm::RocBlas,
            Products::Portable => Rocm::Portable,
            Products::Auto | Products::CublasLt => Rocm::Auto,
        };
        let backend = RocmBackend::new(ordinal)?.with_decoder_options(DecoderOptions { products });
        // Now rather than after minutes of loading.
        backend.uses_rocblas()?;
        run_in(activations, backend, job)
    }

    #[cfg(not(feature = "rocm"))]
    fn run_on_rocm(&self, _: usize, _: Option<DType>, _: impl Job) -> Result<(), Failure> {
        Err(Failure::User("--device rocm: this program was built without ROCm (build it with --features rocm)".into()))
    }
}

/// With the activations asked for, or the model's own.
#[cfg(any(feature = "cuda", feature = "rocm"))]
fn run_in<B>(activations: Option<DType>, backend: B, job: impl Job) -> Result<(), Failure>
where
    B: Machine + Compute<f32> + Compute<half::f16> + Compute<half::bf16>,
{
    match activations.map_or_else(|| job.model_dtype(), Ok)? {
        DType::F32 => job.run::<_, f32>(backend),
        DType::F16 => job.run::<_, half::f16>(backend),
        DType::BF16 => job.run::<_, half::bf16>(backend),
    }
}

#[cfg(feature = "rocm")]
impl Machine for quantkv::rocm::RocmBackend {
    fn label(&self) -> String {
        format!("rocm:{}", self.stream().device())
    }

    fn describe(&self) -> String {
        let products = if self.uses_rocblas().unwrap_or(false) { "rocBLAS" } else { "our own products" };
        let device = self.device().map_or_else(|_| "an AMD device".into(), |device| device.name);
        format!("{device} ({}), {products}", self.label())
    }

    // The runtime's call for it is not among those that are loaded: what is allocated says when there is no more.
    fn free_memory(&self) -> Option<usize> {
        None
    }
}

#[cfg(feature = "cuda")]
impl Machine for quantkv::cuda::CudaBackend {
    fn label(&self) -> String {
        format!("cuda:{}", self.context().ordinal())
    }

    fn describe(&self) -> String {
        let products = if self.uses_cublaslt().unwrap_or(false) { "cuBLASLt" } else { "our own products" };
        let device = self.device().map_or_else(|_| "a CUDA device".into(), |device| device.name);
        format!("{device} ({}), {products}", self.label())
    }

    fn free_memory(&self) -> Option<usize> {
        self.context().mem_get_info().ok().map(|(free, _)| free)
    }
}
