//! The mode for tests without a GPU: csrc/cuda/*.cu as C++20 by the host's compiler, over testing/simt, where a
//! CUDA thread is a fiber. With the sanitizers, run the tests with
//! `LD_PRELOAD=$(gcc -print-file-name=libasan.so)`: rustc does not link the executable with -fsanitize. scripts/simt.sh
//! does all of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compile::{self, Compiler};
use crate::environment::{from_cargo, jobs, object_folder, variable};

pub fn build(sanitize: bool) -> Result<(), String> {
    let twin = Path::new("testing/simt");
    if !twin.is_dir() {
        return Err("QUANTKV_SIMT=1 is for the repository of quantkv: the published crate has no \
                    testing/simt. Unset it."
            .into());
    }
    println!("cargo::rerun-if-changed=csrc");
    println!("cargo::rerun-if-changed=testing/simt");
    let compiler = cc::Build::new()
        .cpp(true)
        .try_get_compiler()
        .map_err(|error| format!("QUANTKV_SIMT=1 needs a C++20 compiler: {error}"))?;

    // With the sanitizers -O2 takes twice as long as -O1, and more than it saves where the tests run.
    let optimize = if sanitize { "-O1" } else { "-O2" };
    let mut flags = vec!["-std=c++20", optimize, "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-omit-frame-pointer"];
    flags.extend([
        "-ffp-contract=off",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-unused-function",
        "-DQUANTKV_SIMT",
        "-Itesting",
        "-Icsrc",
    ]);
    let sanitizers: &[&str] =
        if sanitize { &["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] } else { &[] };
    flags.extend(sanitizers);
    flags.extend(sanitize.then_some("-DQUANTKV_SIMT_SANITIZED"));
    let mut flags: Vec<OsString> = flags.into_iter().chain(["-x", "c++"]).map(OsString::from).collect();
    if let Some(arch) = variable("QUANTKV_SIMT_ARCH") {
        flags.push(format!("-DQUANTKV_SIMT_ARCH={arch}").into());
    }
    let mut sources = compile::sources(&PathBuf::from("csrc/cuda"), "cu")?;
    sources.extend(compile::sources(twin, "cpp")?);
    let program = compiler.path().to_owned();
    let folder = object_folder(&format!("{} {flags:?}", program.display()))?;
    let objects = compile::compile(
        &Compiler { program, flags, flags_of: |_| Vec::new(), is_clang: false, folder, refuse: |_| false },
        &sources,
        jobs(),
    )?;
    if objects.is_empty() {
        return Ok(());
    }
    // A shared library, so that a kernel can be changed without building the Rust tests again
    // (scripts/check_mutations.py). Cargo adds its folder to the path of what it runs.
    let folder = PathBuf::from(from_cargo("OUT_DIR"));
    let mut linker = Command::new(compiler.path());
    linker.arg("-shared").args(sanitizers).args(&objects).arg("-ldl").arg("-o").arg(folder.join("libquantkv_cuda.so"));
    let output = linker.output().map_err(|error| format!("{} cannot be run: {error}", compiler.path().display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("libquantkv_cuda.so cannot be linked ({}):\n{said}", output.status));
    }
    println!("cargo::rustc-link-search=native={}", folder.display());
    println!("cargo::rustc-link-lib=dylib=quantkv_cuda");
    // Programs that nobody gives a path find it too. It comes after what LD_LIBRARY_PATH names.
    println!("cargo::rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{}", folder.display());
    Ok(())
}
