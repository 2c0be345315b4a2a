//! rocBLAS, loaded when it is first asked for: a program with this decoder in it starts on any machine.
//!
//! Signatures and numbers are those of `rocblas-auxiliary.h`, `rocblas-functions.h` and `rocblas-types.h`, the same in
//! rocBLAS 3, 4 and 5; no struct crosses the boundary.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result};
use crate::format::DType;
use crate::rocm::{ROCM, runtime};

/// The rocBLAS that was made for each runtime. One made for another would bring that into this process too, which knows
/// none of this one's streams.
const NAMES: [(&str, &str); 4] = [
    ("libamdhip64.so.7", "librocblas.so.5"),
    ("libamdhip64.so.6", "librocblas.so.4"),
    ("libamdhip64.so.5", "librocblas.so.3"),
    ("libamdhip64.so", "librocblas.so"),
];

/// `rocblas_status` by number.
const SUCCESS: c_int = 0;
const NOT_IMPLEMENTED: c_int = 2;
/// Done, by a slower kernel, for want of device memory.
const PERF_DEGRADED: c_int = 7;
/// A library built without most of its kernels.
const EXCLUDED_FROM_BUILD: c_int = 14;

/// `rocblas_operation`.
const OPERATION_NONE: c_int = 111;
const OPERATION_TRANSPOSE: c_int = 112;
/// `rocblas_atomics_mode`.
const ATOMICS_NOT_ALLOWED: c_int = 0;
/// `rocblas_gemm_algo`.
const GEMM_ALGO_STANDARD: c_int = 0;
/// `rocblas_gemm_flags`. Not `fp16_alt_impl`: on gfx90a it multiplies f16 as bf16.
const GEMM_FLAGS_NONE: u32 = 0;

/// `rocblas_datatype`.
const fn data_type(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => 150,
        DType::F32 => 151,
        DType::BF16 => 168,
    }
}

/// Handle; operations; m, n, k; alpha; a, its type and leading dimension; b, likewise; beta; c, likewise; d, likewise;
/// compute type, algorithm, solution, flags.
type GemmEx = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    i32,
    i32,
    i32,
    *const c_void,
    *const c_void,
    c_int,
    i32,
    *const c_void,
    c_int,
    i32,
    *const c_void,
    *const c_void,
    c_int,
    i32,
    *mut c_void,
    c_int,
    i32,
    c_int,
    c_int,
    i32,
    u32,
) -> c_int;

macro_rules! functions {
    ($($name:ident: $function:ident as $type:ty;)*) => {
        /// The library's functions.
        pub(super) struct RocBlas {
            $($name: $type,)*
            /// Holds the functions; never dropped.
            _library: Library,
        }

        impl RocBlas {
            fn of(library: Library, file: &str) -> Result<Self, String> {
                Ok(RocBlas {
                    $($name: {
                        let symbol = concat!(stringify!($function), "\0");
                        // SAFETY: the signature is the one rocBLAS's header has.
                        let function = unsafe { library.get(symbol.as_bytes()) };
                        *function.map_err(|_| format!("{file} has no {}", stringify!($function)))?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    create: rocblas_create_handle as unsafe extern "C" fn(*mut *mut c_void) -> c_int;
    destroy: rocblas_destroy_handle as unsafe extern "C" fn(*mut c_void) -> c_int;
    set_stream: rocblas_set_stream as unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
    set_atomics_mode: rocblas_set_atomics_mode as unsafe extern "C" fn(*mut c_void, c_int) -> c_int;
    gemm: rocblas_gemm_ex as GemmEx;
    status_text: rocblas_status_to_string as unsafe extern "C" fn(c_int) -> *const c_char;
}

/// The matrix library of this process.
///
/// # Errors
/// [`Error::NoKernel`] where there is none that goes with the HIP runtime.
pub(super) fn rocblas() -> Result<&'static RocBlas> {
    static ROCBLAS: OnceLock<Result<RocBlas, String>> = OnceLock::new();
    let loaded = ROCBLAS.get_or_init(load).as_ref();
    loaded.map_err(|reason| Error::NoKernel {
        backend: ROCM,
        call: "rocblas_create_handle",
        message: format!("cannot load the matrix library: {reason}"),
    })
}

fn load() -> Result<RocBlas, String> {
    let runtime = runtime().map_err(|error| error.to_string())?;
    let file = NAMES.iter().find(|(hip, _)| *hip == runtime.name()).map_or("librocblas.so", |(_, rocblas)| rocblas);
    // SAFETY: rocBLAS, whose constructors any program that links it runs.
    let library = unsafe { Library::new(file) }.map_err(|_| format!("no {file} beside {}", runtime.name()))?;
    if !runtime.is_linked_by(&library) {
        return Err(format!("{file} was linked with another runtime than {}", runtime.name()));
    }
    RocBlas::of(library, file)
}

/// `rocblas_handle`: of the device that was current when it was made.
#[derive(Debug)]
pub(super) struct Handle {
    pointer: *mut c_void,
    library: &'static RocBlas,
}

// SAFETY: a handle may be used by any thread, by one at a time: the methods that use it take it exclusively.
unsafe impl Send for Handle {}

/// `D = op(A) B + beta D` in columns: A is transposed, all are without gaps.
pub(super) struct Gemm {
    pub m: i32,
    pub n: i32,
    pub k: i32,
    /// `[k x m]`
    pub a: *const c_void,
    /// `[k x n]`
    pub b: *const c_void,
    /// `[m x n]`
    pub d: *mut c_void,
    /// Of A and B.
    pub dtype: DType,
    pub out: DType,
    pub beta: f32,
}

impl Handle {
    /// A handle on the current device that works on `stream`.
    ///
    /// # Safety
    /// `stream` is of the current device, and alive until the handle is dropped; the device is current then too.
    pub(super) unsafe fn new(library: &'static RocBlas, stream: *mut c_void) -> Result<Self> {
        let mut pointer = std::ptr::null_mut();
        // SAFETY: the handle is written to.
        library.check("rocblas_create_handle", unsafe { (library.create)(&mut pointer) })?;
        let handle = Handle { pointer, library };
        // SAFETY: created just now; the stream is the caller's.
        library.check("rocblas_set_stream", unsafe { (library.set_stream)(pointer, stream) })?;
        // The same product gives the same bits each time.
        // SAFETY: as above.
        let status = unsafe { (library.set_atomics_mode)(pointer, ATOMICS_NOT_ALLOWED) };
        library.check("rocblas_set_atomics_mode", status)?;
        Ok(handle)
    }

    /// Enqueues a product; false where the library has no kernel for it.
    ///
    /// # Safety
    /// The matrices lie in memory of the handle's device and are used in its stream's order; the device is current.
    pub(super) unsafe fn multiply(&mut self, gemm: &Gemm) -> Result<bool> {
        let alpha = 1.0f32;
        let (inputs, out) = (data_type(gemm.dtype), data_type(gemm.out));
        // SAFETY: the caller's. alpha and beta are read on the host before it returns: the pointer mode is a new
        // handle's. D is C, with the same type and leading dimension.
        let status = unsafe {
            (self.library.gemm)(
                self.pointer,
                OPERATION_TRANSPOSE,
                OPERATION_NONE,
                gemm.m,
                gemm.n,
                gemm.k,
                (&raw const alpha).cast(),
                gemm.a,
                inputs,
                gemm.k,
                gemm.b,
                inputs,
                gemm.k,
                (&raw const gemm.beta).cast(),
                gemm.d.cast_const(),
                out,
                gemm.m,
                gemm.d,
                out,
                gemm.m,
                data_type(DType::F32),
                GEMM_ALGO_STANDARD,
                0,
                GEMM_FLAGS_NONE,
            )
        };
        match status {
            NOT_IMPLEMENTED | EXCLUDED_FROM_BUILD => Ok(false),
            PERF_DEGRADED => Ok(true),
            status => self.library.check("rocblas_gemm_ex", status).map(|()| true),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once. A failure leaves nothing to do.
        let _ = unsafe { (self.library.destroy)(self.pointer) };
    }
}

impl RocBlas {
    fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: any number gets a static string, or null.
        let text = unsafe { (self.status_text)(status) };
        let message = match text.is_null() {
            true => format!("status {status}"),
            // SAFETY: not null, and ends with a zero byte.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        };
        Err(Error::Device { backend: ROCM, call, code: status.into(), message })
    }
}

impl std::fmt::Debug for RocBlas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RocBlas")
    }
}
