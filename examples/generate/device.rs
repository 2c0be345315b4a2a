//! `--device`: which backend runs, with activations of which type.

use quantkv::decoder::Compute;
use quantkv::{CpuBackend, Element};

use crate::Failure;
use crate::args::{Activations, Args, Device};
use crate::setup::Source;

/// What this program asks of a backend beside computing.
pub trait Machine {
    /// `cpu`, `cuda:0`.
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

/// What runs on a backend: `main` gives one, this module the backend.
pub trait Job {
    fn run<B: Compute<A> + Machine, A: Element>(self, source: Source, backend: B) -> Result<(), Failure>;
}

/// Runs `job` on the device that `args` names.
pub fn run(args: &Args, job: impl Job) -> Result<(), Failure> {
    let source = Source::open(args)?;
    match args.device {
        Device::Cpu if !matches!(args.activations, Activations::Auto | Activations::F32) => {
            let given = args.activations.name();
            Err(Failure::User(format!("--activations {given}: the CPU computes with f32; use --device cuda")))
        }
        Device::Cpu => job.run::<CpuBackend, f32>(source, CpuBackend::new()),
        Device::Cuda(ordinal) => cuda(args, job, source, ordinal),
    }
}

#[cfg(feature = "cuda")]
fn cuda(args: &Args, job: impl Job, source: Source, ordinal: usize) -> Result<(), Failure> {
    use half::{bf16, f16};
    use quantkv::DType;
    use quantkv::cuda::CudaBackend;
    use quantkv::decoder::cuda::{DecoderOptions, Products};

    let products = match args.products.as_str() {
        "cublaslt" => Products::CublasLt,
        "portable" => Products::Portable,
        _ => Products::Auto,
    };
    let options = DecoderOptions { products, graphs: !args.no_graphs };
    let backend = CudaBackend::new(ordinal)?.with_decoder_options(options);
    // Now rather than after minutes of loading.
    backend.uses_cublaslt()?;
    match args.activations.dtype().unwrap_or(source.dtype()?) {
        DType::F32 => job.run::<_, f32>(source, backend),
        DType::F16 => job.run::<_, f16>(source, backend),
        DType::BF16 => job.run::<_, bf16>(source, backend),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: &Args, _: impl Job, _: Source, _: usize) -> Result<(), Failure> {
    Err(Failure::User("--device cuda: this program was built without CUDA (build it with --features cuda)".into()))
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
