//! The mode for users: csrc/cuda/*.cu by nvcc, the CUDA runtime linked statically, no C++ library.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::archs;
use crate::compile::{self, Compiler};
use crate::environment::{from_cargo, jobs, object_folder, switch, variable};
use crate::toolkit;

/// ptxas says this where a kernel has more values than registers: correct but slow, and never meant.
fn is_spill(line: &str) -> bool {
    line.contains("Registers are spilled")
}

pub fn build() -> Result<(), String> {
    let (target, host) = (from_cargo("TARGET"), from_cargo("HOST"));
    if from_cargo("CARGO_CFG_TARGET_OS") != "linux" || target != host {
        return Err(format!(
            "the feature `cuda` builds on Linux for the machine it runs on, not on {host} for {target}.\n\
             QUANTKV_STUB=1 builds the API without kernels."
        ));
    }
    let toolkit = toolkit::find()?;
    let list = variable("QUANTKV_CUDA_ARCHS");
    let capability = variable("CUDA_COMPUTE_CAP");
    let archs = archs::choose(list.as_deref(), capability.as_deref(), &toolkit.archs)?;
    let allow_spills = switch("QUANTKV_ALLOW_SPILLS")?;
    // nvcc reads these itself.
    let nvcc_reads = ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"].map(variable);

    println!("cargo::rerun-if-changed=csrc");
    let sources = compile::sources(&PathBuf::from("csrc/cuda"), "cu")?;
    let mut flags: Vec<OsString> = [
        "-std=c++17",
        "-O3",
        "-Xptxas=-warn-spills",
        // Nothing that would need the C++ library, nothing exported but QUANTKV_API.
        "-Xcompiler=-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-fvisibility=hidden,-fPIC",
        "-Icsrc",
    ]
    .map(OsString::from)
    .to_vec();
    flags.extend(archs::flags(&archs).into_iter().map(OsString::from));
    // Lines for profilers, as the profile wants them for Rust: three times the size.
    if from_cargo("DEBUG") != "false" {
        flags.push("-lineinfo".into());
    }
    // A sixth of the size for a tenth of the time, in what is shipped. Drivers that run what nvcc 13 makes can unpack it.
    if toolkit.version >= (13, 0) && from_cargo("PROFILE") == "release" {
        flags.push("-compress-mode=size".into());
    }
    if archs::newer_devices_run_older_code(&archs) {
        flags.push("-DQUANTKV_NO_OVERLAP".into());
    }
    if archs::devices_90_run_90a(&archs) {
        flags.push("-DQUANTKV_HOPPER".into());
    }
    let key = format!("{flags:?} {nvcc_reads:?} {} {}", toolkit.nvcc.display(), toolkit.release);
    let compiler = Compiler {
        program: toolkit.nvcc,
        flags,
        flags_of: |_| Vec::new(),
        is_clang: false,
        folder: object_folder(&key)?,
        refuse: if allow_spills { |_| false } else { is_spill },
    };
    let objects = compile::compile(&compiler, &sources, jobs()).map_err(|message| {
        if !message.lines().any(is_spill) {
            return message;
        }
        message
            + "\nA kernel spills registers with this nvcc. It would be right but slow; QUANTKV_ALLOW_SPILLS=1 builds \
               it all the same. Please report it."
    })?;
    if objects.is_empty() {
        return Ok(());
    }
    compile::archive("quantkv_cuda", &objects)?;

    println!("cargo::rustc-link-search=native={}", toolkit.libraries.display());
    println!("cargo::rustc-link-lib=static=cudart_static");
    for library in ["dl", "pthread", "rt"] {
        println!("cargo::rustc-link-lib={library}");
    }
    Ok(())
}
