//! The mode for tests without a GPU: csrc/cuda/*.cu as C++20 by the host's compiler, over testing/simt, where a
//! CUDA thread is a fiber. With the sanitizers, run the tests with
//! `LD_PRELOAD=$(gcc -print-file-name=libasan.so)`: rustc does not link the executable with -fsanitize. scripts/simt.sh
//! does all of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compile::{self, Compiler};
use crate::environment::{jobs, object_folder, variable};

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

    let mut flags = vec!["-std=c++20", "-O2", "-g", "-fPIC", "-fno-strict-aliasing", "-fno-omit-frame-pointer"];
    flags.extend(["-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-DQUANTKV_SIMT", "-Itesting", "-Icsrc"]);
    if sanitize {
        flags.extend(["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]);
    }
    let mut flags: Vec<OsString> = flags.into_iter().chain(["-x", "c++"]).map(OsString::from).collect();
    if let Some(arch) = variable("QUANTKV_SIMT_ARCH") {
        flags.push(format!("-DQUANTKV_SIMT_ARCH={arch}").into());
    }
    let mut sources = compile::sources(&PathBuf::from("csrc/cuda"), "cu")?;
    sources.extend(compile::sources(twin, "cpp")?);
    let program = compiler.path().to_owned();
    let folder = object_folder(&format!("{} {flags:?}", program.display()))?;
    let objects = compile::compile(&Compiler { program, flags, folder, refuse: |_| false }, &sources, jobs())?;
    if objects.is_empty() {
        return Ok(());
    }
    compile::archive("quantkv_cuda", &objects)?;

    println!("cargo::rustc-link-lib=stdc++");
    if sanitize {
        for library in ["asan", "ubsan"] {
            let question = format!("-print-file-name=lib{library}.so");
            let answer = Command::new(compiler.path())
                .arg(&question)
                .output()
                .map_err(|error| format!("{} cannot be run: {error}", compiler.path().display()))?;
            let file = PathBuf::from(String::from_utf8_lossy(&answer.stdout).trim());
            let Some(folder) = file.parent().filter(|_| file.is_absolute()) else {
                return Err(format!("{} has no lib{library}.so", compiler.path().display()));
            };
            println!("cargo::rustc-link-search=native={}", folder.display());
            println!("cargo::rustc-link-lib={library}");
        }
    }
    Ok(())
}
