//! Linear layers: `out = x · weightᵀ + bias`, by cuBLASLt or by our own kernel.
//!
//! cuBLASLt counts columns first, so that our row-major matrices are its transposed ones:
//!
//! ```text
//! ours    out [rows, outputs] = x [rows, inputs] · weight [outputs, inputs]ᵀ
//! its     D [outputs x rows]  = op(A) B,   A = weight [inputs x outputs] transposed,  B = x [inputs x rows]
//! ```
//! Descriptors and the kernel chosen are kept for each shape; its workspace is allocated once. So a product
//! whose shape was seen before allocates nothing and can be recorded in a graph.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::PoisonError;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::Products;
use super::ops::enqueue;
use super::weights::CudaMatrix;
use crate::Backend;
use crate::cuda::{CUDA, CudaBackend, CudaBuffer, driver};
use crate::decoder::bindings::*;
use crate::decoder::gpu::linear_op;
use crate::error::{Error, Result};
use crate::format::{DType, Element};

/// What NVIDIA's documentation recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// `CUBLAS_OP_T`, which cudarc declares with another library.
const TRANSPOSED: i32 = 1;
/// Shapes kept; prefill makes new ones. Beyond it all are forgotten.
const MAX_PLANS: usize = 4096;

/// The matrix library, from the first product on.
#[derive(Debug, Default)]
pub(super) enum Library {
    #[default]
    Unknown,
    /// Not found, or not wanted.
    Absent,
    Loaded(Box<CublasLt>),
}

/// A handle of cuBLASLt, its workspace, and what it has chosen for each shape.
#[derive(Debug)]
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: CudaBuffer<u8>,
    /// `None`: it has no kernel for this shape.
    plans: HashMap<Shape, Option<Plan>>,
}

/// Everything its choice of a kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    dtype: DType,
    out_is_f32: bool,
    bias: bool,
}

/// Descriptors and the kernel for one shape.
#[derive(Debug)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    /// A, B, D.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: Option<sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: handles of cuBLASLt may be used by any thread; descriptors by one at a time, which the mutex around
// them sees to.
unsafe impl Send for CublasLt {}

/// Whether products go to cuBLASLt under `products`.
pub(super) fn is_used(products: Products) -> Result<bool> {
    match products {
        Products::Portable => Ok(false),
        Products::Auto => Ok(is_present()),
        Products::CublasLt if is_present() => Ok(true),
        Products::CublasLt => {
            let message = format!("cannot load the matrix library: {}", names().join(", "));
            Err(Error::NoKernel { backend: CUDA, call: "cublasLtCreate", message })
        }
    }
}

/// The library's names among those that cudarc tries. cudarc panics where it finds none, so one of these is
/// loaded first.
fn names() -> Vec<String> {
    if cfg!(windows) {
        return vec!["cublasLt64_12.dll".into(), "cublasLt64_11.dll".into()];
    }
    let majors = [cudarc::driver::sys::CUDA_VERSION / 1000, 12, 11];
    std::iter::once("libcublasLt.so".into()).chain(majors.map(|major| format!("libcublasLt.so.{major}"))).collect()
}

fn is_present() -> bool {
    names().into_iter().filter_map(|name| CString::new(name).ok()).any(|name| driver::can_load(&name))
}

fn error(call: &'static str) -> impl Fn(CublasError) -> Error {
    move |CublasError(status)| Error::Device {
        backend: CUDA,
        call,
        code: status as i64,
        message: format!("{status:?}"),
    }
}

/// `out = x · weightᵀ + bias` for `rows` rows. `O` is `A` or f32.
pub(super) fn linear<A: Element, O: Element>(
    backend: &CudaBackend,
    x: &CudaBuffer<A>,
    rows: usize,
    weight: &CudaMatrix,
    bias: Option<&CudaBuffer<A>>,
    out: &mut CudaBuffer<O>,
) -> Result<()> {
    let (outputs, inputs) = (weight.rows, weight.cols);
    let op = linear_op(backend, x, rows, weight, bias, out)?;
    if rows == 0 || inputs == 0 || outputs == 0 {
        return enqueue!(backend, quantkv_cuda_decoder_linear, op);
    }
    if weight.dtype == A::DTYPE {
        // The epilogue adds a bias of D's type.
        let shape =
            Shape { rows, inputs, outputs, dtype: A::DTYPE, out_is_f32: O::DTYPE == DType::F32, bias: bias.is_some() };
        if by_library(backend, shape, &op)? {
            return Ok(());
        }
    }
    enqueue!(backend, quantkv_cuda_decoder_linear, op)
}

/// Whether the library was there and has enqueued the product.
fn by_library(backend: &CudaBackend, shape: Shape, op: &quantkv_decoder_linear) -> Result<bool> {
    let mut library = backend.decoder.library.lock().unwrap_or_else(PoisonError::into_inner);
    if let Library::Unknown = *library {
        *library = match is_used(backend.decoder.options.products)? {
            true => Library::Loaded(Box::new(CublasLt::new(backend)?)),
            false => Library::Absent,
        };
    }
    match &mut *library {
        Library::Loaded(library) => library.multiply(backend, shape, op),
        Library::Unknown | Library::Absent => Ok(false),
    }
}

impl CublasLt {
    fn new(backend: &CudaBackend) -> Result<Self> {
        let workspace = backend.zeros("workspace of products", WORKSPACE_BYTES)?;
        backend.bind()?;
        let handle = result::create_handle().map_err(error("cublasLtCreate"))?;
        Ok(CublasLt { handle, workspace, plans: HashMap::new() })
    }

    fn multiply(&mut self, backend: &CudaBackend, shape: Shape, op: &quantkv_decoder_linear) -> Result<bool> {
        backend.bind()?;
        if !self.plans.contains_key(&shape) {
            if self.plans.len() >= MAX_PLANS {
                self.plans.clear();
            }
            let plan = Plan::new(self.handle, shape)?;
            self.plans.insert(shape, plan);
        }
        let Some(Some(plan)) = self.plans.get(&shape) else { return Ok(false) };
        if shape.bias {
            plan.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &op.bias)?;
        }
        let (alpha, beta) = (1.0f32, 0.0f32);
        let [a, b, d] = plan.layouts;
        let algorithm = plan.algorithm.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let workspace = std::ptr::with_exposed_provenance_mut(self.workspace.device_ptr() as usize);
        backend.enqueue(|launch| {
            // SAFETY: the descriptors are of this shape, whose buffers `linear` has checked; the workspace is
            // as large as the heuristic was told. alpha and beta are read on the host before it returns.
            unsafe {
                result::matmul(
                    self.handle,
                    plan.product,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    op.weight,
                    a,
                    op.x,
                    b,
                    op.out.cast_const(),
                    d,
                    op.out,
                    d,
                    algorithm,
                    workspace,
                    WORKSPACE_BYTES,
                    launch.stream.cast(),
                )
            }
            .map_err(error("cublasLtMatmul"))
        })?;
        Ok(true)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: created in `new`, destroyed once. A failure leaves nothing to do.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plan {
    /// `None` where the library has no kernel for the shape.
    fn new(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Option<Plan>> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let stored = data_type(shape.dtype);
        let out = if shape.out_is_f32 { sys::cudaDataType_t::CUDA_R_32F } else { stored };
        let (m, n, k) = (shape.outputs as u64, shape.rows as u64, shape.inputs as u64);
        let null = std::ptr::null_mut();
        // Filled one by one: what is there is freed if a later step fails.
        let mut plan = Plan { product: std::ptr::null_mut(), layouts: [null; 3], algorithm: None };
        // f32 sums and, of f32 elements, f32 products: the types that use TF32 are others.
        let (sums, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        plan.product = result::create_matmul_desc(sums, scale).map_err(error("cublasLtMatmulDescCreate"))?;
        for (layout, (dtype, height, width)) in
            plan.layouts.iter_mut().zip([(stored, k, m), (stored, k, n), (out, m, n)])
        {
            *layout = result::create_matrix_layout(dtype, height, width, height as i64)
                .map_err(error("cublasLtMatrixLayoutCreate"))?;
        }
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if shape.bias {
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
        }
        match plan.choose(handle) {
            Ok(algorithm) => {
                plan.algorithm = Some(algorithm);
                Ok(Some(plan))
            }
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(other) => Err(error("cublasLtMatmulAlgoGetHeuristic")(other)),
        }
    }

    /// Sets an attribute of the product.
    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        let value = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the descriptor is alive; the attribute is of type `T` (an enum of 32 bits, or a pointer), and
        // copied.
        unsafe { result::set_matmul_desc_attribute(self.product, attribute, value, size_of::<T>()) }
            .map_err(error("cublasLtMatmulDescSetAttribute"))
    }

    fn choose(&self, handle: sys::cublasLtHandle_t) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let preference = result::create_matmul_pref()?;
        let bytes = WORKSPACE_BYTES;
        let [a, b, d] = self.layouts;
        // SAFETY: all descriptors are alive; the attribute is a size_t, and copied. The preference is
        // destroyed once, here.
        unsafe {
            let value = (&raw const bytes).cast();
            let chosen = result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                value,
                size_of::<usize>(),
            )
            .and_then(|()| result::get_matmul_algo_heuristic(handle, self.product, a, b, d, d, preference));
            let _ = result::destroy_matmul_pref(preference);
            chosen.map(|chosen| chosen.algo)
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        if !self.product.is_null() {
            // SAFETY: as above.
            let _ = unsafe { result::destroy_matmul_desc(self.product) };
        }
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}
