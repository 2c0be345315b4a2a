//! Compiles csrc/ into static libraries: `quantkv_cuda` if the feature `cuda` asks for it, `quantkv_hip` for `rocm`.
//!
//! | mode | when | builds |
//! |---|---|---|
//! | none | neither feature | nothing; no toolchain is looked for |
//! | kernels | feature `cuda` | each csrc/cuda/*.cu with nvcc, one object holding code for every architecture |
//! | | feature `rocm` | each csrc/hip/*.hip with clang, code objects and launches (build/hip.rs) |
//! | stub | and `QUANTKV_STUB=1` or `DOCS_RS` | nothing; `cfg(quantkv_stub)`: the API is there, constructors fail |
//! | simt | and `QUANTKV_SIMT=1` | each .cu with the host's C++ compiler over testing/simt; `cfg(quantkv_simt)`. `rocm` as ever |
//!
//! The parts are in `build/`, a module a concept. What goes wrong is said in full sentences by `cargo::error`.

#[cfg(feature = "cuda")]
#[path = "build/archs.rs"]
mod archs;
#[cfg(any(feature = "cuda", feature = "rocm"))]
#[path = "build/compile.rs"]
mod compile;
#[cfg(any(feature = "cuda", feature = "rocm"))]
#[path = "build/environment.rs"]
mod environment;
#[cfg(feature = "rocm")]
#[path = "build/hip.rs"]
mod hip;
#[cfg(feature = "rocm")]
#[path = "build/hip_bundle.rs"]
mod hip_bundle;
#[cfg(feature = "rocm")]
#[path = "build/hip_clang.rs"]
mod hip_clang;
#[cfg(feature = "cuda")]
#[path = "build/kernels.rs"]
mod kernels;
#[cfg(feature = "cuda")]
#[path = "build/simt.rs"]
mod simt;
#[cfg(feature = "cuda")]
#[path = "build/toolkit.rs"]
mod toolkit;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(quantkv_stub, quantkv_simt)");
    #[cfg(any(feature = "cuda", feature = "rocm"))]
    if let Err(message) = kernels_of_features() {
        // A directive is a line: so is an error.
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

#[cfg(any(feature = "cuda", feature = "rocm"))]
fn kernels_of_features() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build");
    let mode = environment::mode()?;
    if matches!(mode, environment::Mode::Stub) {
        println!("cargo::rustc-cfg=quantkv_stub");
        return Ok(());
    }
    #[cfg(feature = "rocm")]
    hip::build()?;
    #[cfg(feature = "cuda")]
    match mode {
        environment::Mode::Simt { sanitize } => {
            println!("cargo::rustc-cfg=quantkv_simt");
            simt::build(sanitize)?;
        }
        _ => kernels::build()?,
    }
    Ok(())
}
