//! Finds a clang that compiles for AMD's GPUs, and asks it what it can.
//!
//! Any clang from 19 on with the amdgcn target will do, ROCm's own or a distribution's; neither HIP's headers nor its
//! device libraries are needed. A code object is linked by LLD: the one beside the compiler, else the Rust
//! toolchain's `rust-lld`.

use std::cell::OnceCell;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::environment::{from_cargo, object_folder, variable};

/// The oldest release that is supported.
const OLDEST: u32 = 19;

pub struct Clang {
    pub program: PathBuf,
    /// What comes before all flags: `clang`, if the program is zig.
    words: Vec<String>,
    /// First line of `--version`.
    pub version: String,
    /// A folder with an `lld` in it, where the compiler has none of its own.
    linker: OnceCell<Option<PathBuf>>,
}

/// The first clang of `$QUANTKV_HIP_CLANG` (a program, or words such as `/opt/zig clang`), `$ROCM_PATH`, /opt/rocm and
/// `$PATH`. One that is named by a variable but does not do is an error, so that no other is taken in silence.
pub fn find() -> Result<Clang, String> {
    if let Some(clang) = named_by("QUANTKV_HIP_CLANG") {
        return clang;
    }
    let mut looked = vec!["$QUANTKV_HIP_CLANG (not set)".to_owned()];
    if let Some(rocm) = variable("ROCM_PATH") {
        let program = Path::new(&rocm).join("llvm/bin/clang++");
        if !program.is_file() {
            return Err(format!("ROCM_PATH={rocm}, but {} is not there", program.display()));
        }
        return Clang::of(program, Vec::new());
    }
    looked.push("$ROCM_PATH (not set)".to_owned());
    println!("cargo::rerun-if-env-changed=PATH");
    let mut found = vec![("/opt/rocm/llvm/bin/clang++".to_owned(), Some(PathBuf::from("/opt/rocm/llvm/bin/clang++")))];
    for name in ["clang-22", "clang-21", "clang-20", "clang-19", "clang"] {
        found.push((format!("{name} in $PATH"), in_path(name)));
    }
    for (name, program) in found {
        match program.filter(|program| program.is_file()).map(|program| Clang::of(program, Vec::new())) {
            Some(Ok(clang)) => return Ok(clang),
            Some(Err(why)) => looked.push(format!("{name} ({})", why.lines().next().unwrap_or_default())),
            None => looked.push(name),
        }
    }
    Err(format!(
        "the feature `rocm` compiles kernels and needs clang {OLDEST} or newer with the amdgcn target, which was not \
         found.\n\
         Looked at: {}.\n\
         Debian and Ubuntu have it: apt-get install clang-{OLDEST} lld-{OLDEST} (scripts/get-rocm-clang.sh in the \
         quantkv repository). ROCm brings its own; set ROCM_PATH. No GPU and nothing else of ROCm is needed.\n\
         To build or document the API without kernels, set QUANTKV_STUB=1.",
        looked.join(", ")
    ))
}

/// The clang for one architecture alone, if `$QUANTKV_HIP_CLANG_GFX950` (for gfx950) names one.
pub fn find_for(arch: &str) -> Option<Result<Clang, String>> {
    named_by(&variable_for(arch))
}

/// Names that compiler. Features of an architecture (`gfx942:xnack-`) do not matter.
pub fn variable_for(arch: &str) -> String {
    let processor = arch.split(':').next().unwrap_or_default().to_uppercase();
    format!("QUANTKV_HIP_CLANG_{}", processor.replace(|c: char| !c.is_ascii_alphanumeric(), "_"))
}

/// The compiler in a variable, if it is set.
fn named_by(name: &str) -> Option<Result<Clang, String>> {
    let words = variable(name)?;
    let mut words = words.split_whitespace().map(str::to_owned);
    let program = words.next().unwrap_or_default();
    let path = if program.contains('/') { Some(PathBuf::from(&program)) } else { in_path(&program) };
    Some(match path.filter(|path| path.is_file()) {
        Some(path) => Clang::of(path, words.collect()),
        None => Err(format!("{name}={program} is not a file")),
    })
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

impl Clang {
    fn of(program: PathBuf, words: Vec<String>) -> Result<Self, String> {
        println!("cargo::rerun-if-changed={}", program.display());
        let ask = |question: &str| -> Result<String, String> {
            let output = Command::new(&program).args(&words).arg(question).output();
            let output = output.map_err(|error| format!("{} cannot be run: {error}", program.display()))?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let text = ask("--version")?;
        let version = text.lines().next().unwrap_or_default().to_owned();
        let release = parse_release(&version)
            .ok_or_else(|| format!("{} --version answered what no clang does: '{version}'", program.display()))?;
        if release < OLDEST {
            return Err(format!("{} is clang {release}, and {OLDEST} or newer is needed", program.display()));
        }
        if !ask("--print-targets")?.contains("amdgcn") {
            return Err(format!("{} was built without the amdgcn target", program.display()));
        }
        Ok(Clang { program, words, version, linker: OnceCell::new() })
    }

    pub fn name(&self) -> String {
        format!("{} ({})", self.program.display(), self.version)
    }

    /// Flags of every compilation.
    pub fn first_flags(&self) -> Vec<OsString> {
        let mut flags: Vec<OsString> = self.words.iter().map(OsString::from).collect();
        // zig moves clang's own headers to where clang does not look.
        let headers = self.program.with_file_name("lib").join("include");
        if self.words.first().is_some_and(|word| word == "clang" || word == "c++") && headers.is_dir() {
            flags.extend(["-isystem".into(), headers.into_os_string()]);
        }
        if let Some(Some(folder)) = self.linker.get() {
            flags.extend(["-B".into(), folder.clone().into_os_string()]);
        }
        flags
    }

    /// Compiles and links a small kernel for an architecture.
    pub fn probe(&self, arch: &str) -> Result<(), String> {
        let folder = PathBuf::from(from_cargo("OUT_DIR"));
        let source = folder.join("probe.hip");
        let text = "__attribute__((global)) void probe(float *p) { p[__builtin_amdgcn_workitem_id_x()] = 1.0f; }\n";
        fs::write(&source, text).map_err(|error| format!("{}: {error}", source.display()))?;
        let said = match self.compile_probe(arch, &source) {
            Ok(()) => {
                self.linker.get_or_init(|| None);
                return Ok(());
            }
            Err(said) => said,
        };
        // Without an lld beside it or in $PATH the compiler says this of a missing program.
        let no_linker = said.contains("lld") || said.contains("posix_spawn") || said.contains("unable to execute");
        if no_linker && self.linker.get().is_none() {
            if let Some(linker) = rust_lld()? {
                self.linker.get_or_init(|| Some(linker));
                return self.probe(arch);
            }
            return Err(format!(
                "{} finds no LLD to link code objects with, and the Rust toolchain has no rust-lld: install lld-{OLDEST}.\n{said}",
                self.name()
            ));
        }
        Err(format!("{} does not compile for {arch}:\n{said}", self.name()))
    }

    fn compile_probe(&self, arch: &str, source: &Path) -> Result<(), String> {
        let output = Command::new(&self.program)
            .args(self.first_flags())
            .args(["-x", "hip", "-nogpuinc", "-nogpulib", "-mcode-object-version=5", "--offload-device-only"])
            .args(["--no-gpu-bundle-output", &format!("--offload-arch={arch}"), "-c"])
            .arg(source)
            .arg("-o")
            .arg(source.with_extension("hsaco"))
            .output()
            .map_err(|error| format!("{} cannot be run: {error}", self.program.display()))?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }
}

/// A folder with the Rust toolchain's linker under the name that clang looks for.
fn rust_lld() -> Result<Option<PathBuf>, String> {
    let output = Command::new(from_cargo("RUSTC")).args(["--print", "sysroot"]).output();
    let Ok(output) = output else { return Ok(None) };
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let linker = sysroot.join("lib/rustlib").join(from_cargo("HOST")).join("bin/rust-lld");
    if !linker.is_file() {
        return Ok(None);
    }
    // Not OUT_DIR: the folder is among the flags, and objects that several builds share have the same.
    let folder = object_folder(&linker.to_string_lossy())?;
    let link = folder.join("lld");
    if fs::read_link(&link).ok().as_deref() != Some(&linker) {
        let _ = fs::remove_file(&link);
        // rust-lld tells its flavor by the -flavor that clang gives first.
        link_to(&linker, &link).map_err(|error| format!("{}: {error}", link.display()))?;
    }
    Ok(Some(folder))
}

#[cfg(unix)]
fn link_to(program: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(program, link)
}

#[cfg(not(unix))]
fn link_to(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::Error::other("the feature `rocm` builds on Linux"))
}

/// "Debian clang version 19.1.7 (3~deb12u1)" to 19.
fn parse_release(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("clang version ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
