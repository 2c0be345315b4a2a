//! The model in the repository, for programs that run without one given.
//!
//! Not part of `mod.rs`: a program that has no use for it does not include it.

use std::path::{Path, PathBuf};

use crate::common::program::Failure;

const BUNDLED: &str = "models/tales-3m";

/// The bundled model beside the sources this program was built from, or in the current folder.
pub fn model_dir() -> Result<PathBuf, Failure> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join(BUNDLED);
    let found = [sources.clone(), PathBuf::from(BUNDLED)].into_iter().find(|dir| dir.join("config.json").exists());
    found.ok_or_else(|| {
        Failure::User(format!(
            "the bundled model is neither at {} nor at ./{BUNDLED}: it is in the source repository of quantkv, \
             not in the published package; copy it from there or give --model DIR",
            sources.display()
        ))
    })
}
