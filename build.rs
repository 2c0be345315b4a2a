//! Compiles csrc/cuda/*.cu into the static library `quantkv_cuda`, if the feature `cuda` asks for it.
//!
//! | mode | when | builds |
//! |---|---|---|
//! | none | feature `cuda` off | nothing; no toolchain is looked for |
//! | kernels | feature `cuda` | each .cu with nvcc, one object holding code for every architecture |
//! | stub | and `QUANTKV_STUB=1` or `DOCS_RS` | nothing; `cfg(quantkv_stub)`: the API is there, constructors fail |
//! | simt | and `QUANTKV_SIMT=1` | each .cu with the host's C++ compiler over testing/simt; `cfg(quantkv_simt)` |
//!
//! The parts are in `build/`, a module a concept. What goes wrong is said in full sentences by `cargo::error`.

#[cfg(feature = "cuda")]
#[path = "build/archs.rs"]
mod archs;
#[cfg(feature = "cuda")]
#[path = "build/compile.rs"]
mod compile;
#[cfg(feature = "cuda")]
#[path = "build/environment.rs"]
mod environment;
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
    #[cfg(feature = "cuda")]
    if let Err(message) = cuda() {
        // A directive is a line: so is an error.
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build");
    match environment::mode()? {
        environment::Mode::Stub => {
            println!("cargo::rustc-cfg=quantkv_stub");
            Ok(())
        }
        environment::Mode::Simt { sanitize } => {
            println!("cargo::rustc-cfg=quantkv_simt");
            simt::build(sanitize)
        }
        environment::Mode::Kernels => kernels::build(),
    }
}
