//! Finds nvcc and asks it what it is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::environment::variable;

/// The oldest release that is supported: (major, minor).
pub const OLDEST: (u32, u32) = (12, 4);

pub struct Toolkit {
    pub nvcc: PathBuf,
    /// Its release: (major, minor).
    pub version: (u32, u32),
    /// What it says of its release and build.
    pub release: String,
    /// Holds libcudart_static.a.
    pub libraries: PathBuf,
    /// Architectures by base number: 75, 80, ...
    pub archs: Vec<u32>,
}

/// The first nvcc of `$NVCC`, `$CUDA_HOME`, `$CUDA_PATH`, `$PATH`, /usr/local/cuda, and .cuda in the repository,
/// where scripts/get-cuda.sh puts it. One that is named by a
/// variable but is not there is an error, so that no other is taken in silence.
pub fn find() -> Result<Toolkit, String> {
    let mut looked = Vec::new();
    let nvcc = locate(&mut looked)?.ok_or_else(|| {
        format!(
            "the feature `cuda` compiles kernels and needs nvcc, which was not found.\n\
             Looked at: {}.\n\
             In the quantkv repository, scripts/get-cuda.sh installs it in seconds (no root, no GPU). Elsewhere \
             install NVIDIA's CUDA toolkit, {}.{} or newer, and set CUDA_HOME.\n\
             To build or document the API without kernels, set QUANTKV_STUB=1.",
            looked.join(", "),
            OLDEST.0,
            OLDEST.1
        )
    })?;
    println!("cargo::rerun-if-changed={}", nvcc.display());
    let text = ask(&nvcc, "--version")?;
    let version = parse_version(&text)
        .ok_or_else(|| format!("{} --version answered what no nvcc does:\n{text}", nvcc.display()))?;
    if version < OLDEST {
        return Err(format!(
            "{} is nvcc {}.{}, and {}.{} or newer is needed.\n\
             Set NVCC or CUDA_HOME to a newer one (scripts/get-cuda.sh in the repository installs one).",
            nvcc.display(),
            version.0,
            version.1,
            OLDEST.0,
            OLDEST.1
        ));
    }
    let archs = parse_archs(&ask(&nvcc, "--list-gpu-arch")?);
    let libraries = libraries(&nvcc)?;
    Ok(Toolkit { nvcc, version, release: text, libraries, archs })
}

fn locate(looked: &mut Vec<String>) -> Result<Option<PathBuf>, String> {
    if let Some(nvcc) = variable("NVCC") {
        let path = if nvcc.contains('/') { Some(PathBuf::from(&nvcc)) } else { in_path(&nvcc) };
        return match path.filter(|path| path.is_file()) {
            Some(path) => Ok(Some(path)),
            None => Err(format!("NVCC={nvcc} is not a file")),
        };
    }
    looked.push("$NVCC (not set)".to_owned());
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = variable(name) {
            let nvcc = Path::new(&home).join("bin/nvcc");
            if nvcc.is_file() {
                return Ok(Some(nvcc));
            }
            return Err(format!("{name}={home}, but {} is not there", nvcc.display()));
        }
        looked.push(format!("${name} (not set)"));
    }
    println!("cargo::rerun-if-env-changed=PATH");
    if let Some(nvcc) = in_path("nvcc") {
        return Ok(Some(nvcc));
    }
    looked.push("$PATH".to_owned());
    for place in ["/usr/local/cuda/bin/nvcc", ".cuda/nvidia/cu13/bin/nvcc"] {
        let nvcc = Path::new(place);
        if nvcc.is_file() {
            // Absolute, because cargo shows it to users.
            return Ok(Some(nvcc.canonicalize().unwrap_or_else(|_| nvcc.to_owned())));
        }
        looked.push(place.to_owned());
    }
    Ok(None)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn ask(nvcc: &Path, question: &str) -> Result<String, String> {
    let output = Command::new(nvcc)
        .arg(question)
        .output()
        .map_err(|error| format!("{} cannot be run: {error}", nvcc.display()))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} {question} failed ({}):\n{stderr}", nvcc.display(), output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// "... release 13.0, V13.0.88 ..." to (13, 0).
pub fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("release ")?;
    let (version, _) = rest.split_once(',')?;
    let (major, minor) = version.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Lines of "compute_80" to 80.
pub fn parse_archs(text: &str) -> Vec<u32> {
    let mut archs: Vec<u32> =
        text.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok()).collect();
    archs.sort_unstable();
    archs.dedup();
    archs
}

/// The folder of the static runtime that belongs to `nvcc`. Distributions lay it out differently.
fn libraries(nvcc: &Path) -> Result<PathBuf, String> {
    let real = nvcc.canonicalize().unwrap_or_else(|_| nvcc.to_owned());
    let homes = [nvcc, &real].map(|nvcc| nvcc.parent().and_then(Path::parent).unwrap_or(Path::new("/")).to_owned());
    let folders = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib/x86_64-linux-gnu"];
    homes
        .iter()
        .flat_map(|home| folders.map(|folder| home.join(folder)))
        .find(|folder| folder.join("libcudart_static.a").is_file())
        .ok_or_else(|| {
            format!(
                "libcudart_static.a, the static CUDA runtime, is not beside {} (looked in {} of {})",
                nvcc.display(),
                folders.join(", "),
                homes[1].display()
            )
        })
}
