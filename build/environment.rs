//! What the environment asks for. Each variable read is one cargo watches.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

// Without CUDA nobody asks what a twin of it is to be made with.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub enum Mode {
    Kernels,
    Stub,
    Simt { sanitize: bool },
}

/// The value of a variable that is set and not empty; cargo runs the build again when it changes.
pub fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// A switch: `1`, or `0` and unset.
pub fn switch(name: &str) -> Result<bool, String> {
    match variable(name).as_deref() {
        None | Some("0") => Ok(false),
        Some("1") => Ok(true),
        Some(other) => Err(format!("{name} is 1 or 0, not '{other}'")),
    }
}

/// A variable that cargo always sets for build scripts.
pub fn from_cargo(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}

/// Where the objects of one compiler with one set of flags go, `key` telling both; made if it is not there.
///
/// Usually a folder of this build. Cargo has one build a profile and feature set, each with its own objects;
/// `QUANTKV_OBJECT_DIR` names a folder that all share, which spares whoever builds many (CI) the same compilation.
pub fn object_folder(key: &str) -> Result<PathBuf, String> {
    let base = variable("QUANTKV_OBJECT_DIR").unwrap_or_else(|| from_cargo("OUT_DIR"));
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    let folder = PathBuf::from(base).join(format!("{:016x}", hasher.finish()));
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

pub fn mode() -> Result<Mode, String> {
    let stub = switch("QUANTKV_STUB")?;
    let simt = switch("QUANTKV_SIMT")?;
    let sanitize = switch("QUANTKV_SIMT_SANITIZE")?;
    if stub || variable("DOCS_RS").is_some() {
        return Ok(Mode::Stub);
    }
    if simt {
        return Ok(Mode::Simt { sanitize });
    }
    Ok(Mode::Kernels)
}

/// How many compilers may run at once.
pub fn jobs() -> usize {
    env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1).max(1)
}
