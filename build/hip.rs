//! ROCm's kernels: csrc/hip/*.hip by clang, once for each architecture and once for the host, without ROCm.
//!
//! ```text
//! absmax.hip ─┬─ gfx90a ──► code object ─┐
//!             ├─ gfx942 ──► code object ─┼─► bundle ─► .incbin ─┐
//!             ├─ ..                      ┘                      ├─► libquantkv_hip.a
//!             └─ host   ──► launches ───────────────────────────┤
//! runtime.cpp ──────────► the HIP runtime's functions by table ─┘
//! ```
//! No library of ROCm is linked: the runtime is loaded by the program, or not there (src/rocm).

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::compile::{self, Compiler};
use crate::environment::{from_cargo, jobs, object_folder, variable};
use crate::hip_bundle::bundle;
use crate::hip_clang::{self, Clang};

/// MI200, MI300, MI350, RDNA 3 and RDNA 4.
const DEFAULT_ARCHS: &str = "gfx90a gfx942 gfx950 gfx1100 gfx1201";

pub fn build() -> Result<(), String> {
    let (target, host) = (from_cargo("TARGET"), from_cargo("HOST"));
    if from_cargo("CARGO_CFG_TARGET_OS") != "linux" || target != host {
        return Err(format!(
            "the feature `rocm` builds on Linux for the machine it runs on, not on {host} for {target}.\n\
             QUANTKV_STUB=1 builds the API without kernels."
        ));
    }
    println!("cargo::rerun-if-changed=csrc");
    let clang = hip_clang::find()?;
    let archs = choose(variable("QUANTKV_HIP_ARCHS").as_deref(), &clang)?;

    let sources = compile::sources(&PathBuf::from("csrc/hip"), "hip")?;
    let mut objects = compile::compile(&host_compiler(&clang, &target, Half::Launches)?, &sources, jobs())?;
    let runtime = compile::sources(&PathBuf::from("csrc/hip"), "cpp")?;
    objects.extend(compile::compile(&host_compiler(&clang, &target, Half::Plain)?, &runtime, jobs())?);

    let mut kernels = Vec::new();
    for source in &sources {
        if let Some(symbol) = code_object_of(source)? {
            kernels.push((source.clone(), symbol));
        }
    }
    let with_kernels: Vec<PathBuf> = kernels.iter().map(|(source, _)| source.clone()).collect();
    let compilers = archs.iter().map(|arch| device_compiler(arch.own.as_ref().unwrap_or(&clang), &arch.name));
    let compilers = compilers.collect::<Result<Vec<_>, _>>()?;
    let code_objects = compile::compile_by_each(&compilers, &with_kernels, jobs())?;
    let assembler = host_compiler(&clang, &target, Half::Assembly)?;
    let mut embedded = Vec::new();
    for (index, (_, symbol)) in kernels.iter().enumerate() {
        let parts: Vec<(&str, &Path)> =
            archs.iter().zip(&code_objects).map(|(arch, of)| (arch.name.as_str(), of[index].as_path())).collect();
        embedded.push(embed(symbol, &bundle(&target, &parts)?, &assembler.folder)?);
    }
    objects.extend(compile::compile(&assembler, &embedded, jobs())?);
    compile::archive("quantkv_hip", &objects)
}

/// An architecture, and the compiler for it alone if it has one.
struct Arch {
    name: String,
    own: Option<Clang>,
}

/// The architectures asked for; of the default ones, those that their compiler knows.
fn choose(list: Option<&str>, clang: &Clang) -> Result<Vec<Arch>, String> {
    let names = |list: &str| -> Vec<String> {
        list.split([' ', ',', ';']).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    };
    let Some(list) = list else {
        let (mut known, mut why) = (Vec::new(), String::new());
        for name in names(DEFAULT_ARCHS) {
            let own = hip_clang::find_for(&name).transpose()?;
            let of_arch = own.as_ref().unwrap_or(clang);
            match of_arch.probe(&name) {
                Ok(()) => known.push(Arch { name, own }),
                Err(error) => {
                    println!(
                        "cargo::warning={} does not compile for {name}: the library will have no kernels for it. A \
                         newer clang does ({}, or QUANTKV_HIP_CLANG for all); QUANTKV_HIP_ARCHS without {name} \
                         silences this.",
                        of_arch.name(),
                        hip_clang::variable_for(&name)
                    );
                    why = error;
                }
            }
        }
        return if known.is_empty() { Err(why) } else { Ok(known) };
    };
    let names = names(list);
    if names.is_empty() {
        return Err(format!("QUANTKV_HIP_ARCHS='{list}' names no architecture"));
    }
    let mut archs = Vec::new();
    for (index, name) in names.iter().enumerate() {
        if !name.starts_with("gfx") || names[..index].contains(name) {
            return Err(format!(
                "QUANTKV_HIP_ARCHS='{list}': architectures are gfx90a, gfx942 and so on, each once, not '{name}'"
            ));
        }
        let own = hip_clang::find_for(name).transpose()?;
        own.as_ref().unwrap_or(clang).probe(name)?;
        archs.push(Arch { name: name.clone(), own });
    }
    Ok(archs)
}

/// `QKV_CODE_OBJECT` of a source, if it has kernels.
fn code_object_of(source: &Path) -> Result<Option<String>, String> {
    let text = fs::read_to_string(source).map_err(|error| format!("{}: {error}", source.display()))?;
    let symbol = text.lines().find_map(|line| line.strip_prefix("#define QKV_CODE_OBJECT "));
    Ok(symbol.map(|symbol| symbol.trim().to_owned()))
}

/// A source of assembly that holds the bundle under its symbol.
fn embed(symbol: &str, bundle: &[u8], folder: &Path) -> Result<PathBuf, String> {
    let file = folder.join(format!("{symbol}.hipfb"));
    // An object that holds what the file held before is not made again.
    if fs::read(&file).ok().as_deref() != Some(bundle) {
        fs::write(&file, bundle).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    let text = format!(
        ".section .rodata,\"a\"\n.globl {symbol}\n.hidden {symbol}\n.type {symbol}, @object\n.p2align 12\n{symbol}:\n\
         .incbin \"{}\"\n.size {symbol}, . - {symbol}\n.section .note.GNU-stack,\"\"\n# {:016x}\n",
        file.display(),
        fingerprint(bundle)
    );
    let source = folder.join(format!("{symbol}.s"));
    if fs::read_to_string(&source).ok().as_deref() != Some(&text) {
        fs::write(&source, text).map_err(|error| format!("{}: {error}", source.display()))?;
    }
    Ok(source)
}

/// Changes with the bundle, and with it the assembly that includes it: the compiler lists no `.incbin` among what an
/// object was made from.
fn fingerprint(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// What is common: no headers and no device library of ROCm.
const FREESTANDING: [&str; 6] = ["-x", "hip", "-std=c++17", "-nogpuinc", "-nogpulib", "-Icsrc"];

fn device_compiler(clang: &Clang, arch: &str) -> Result<Compiler, String> {
    let mut flags = clang.first_flags();
    flags.extend(FREESTANDING.map(OsString::from));
    flags.extend(
        [
            "-O3",
            // As nvcc: a product and a sum are one only where an expression says both.
            "-ffp-contract=on",
            // What every runtime from HIP 5.5 on loads; newer compilers would make version 6.
            "-mcode-object-version=5",
            "--offload-device-only",
            "--no-gpu-bundle-output",
        ]
        .map(OsString::from),
    );
    flags.push(format!("--offload-arch={arch}").into());
    compiler(clang, flags)
}

enum Half {
    Launches,
    Plain,
    Assembly,
}

fn host_compiler(clang: &Clang, target: &str, half: Half) -> Result<Compiler, String> {
    let mut flags = clang.first_flags();
    match &half {
        Half::Launches => {
            flags.extend(FREESTANDING.map(OsString::from));
            flags.push("--offload-host-only".into());
        }
        Half::Plain => flags.extend(["-x", "c++", "-std=c++17", "-Icsrc"].map(OsString::from)),
        Half::Assembly => flags.extend(["-x", "assembler-with-cpp"].map(OsString::from)),
    }
    // Nothing that would need the C++ library, nothing exported but QUANTKV_API.
    let host = ["-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fvisibility=hidden"];
    flags.extend(host.map(OsString::from));
    flags.push(format!("--target={target}").into());
    flags.push("-Wno-unused-command-line-argument".into());
    let mut compiler = compiler(clang, flags)?;
    if matches!(half, Half::Launches) {
        // clang makes a global symbol of it, the same in every source unless it is told otherwise.
        compiler.flags_of = |source| {
            let name = source.file_stem().unwrap_or_default().display();
            vec!["-Xclang".into(), format!("-cuid=quantkv_{name}").into()]
        };
    }
    Ok(compiler)
}

fn compiler(clang: &Clang, flags: Vec<OsString>) -> Result<Compiler, String> {
    let key = format!("{flags:?} {} {}", clang.program.display(), clang.version);
    let (program, folder) = (clang.program.clone(), object_folder(&key)?);
    Ok(Compiler { program, flags, flags_of: |_| Vec::new(), is_clang: true, folder, refuse: |_| false })
}
