//! Where the files are that tests read: `tests/fixtures` of this repository, or the folder that
//! `QUANTKV_FIXTURES` names, for test binaries that were carried to another machine.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

/// The path of a fixture, by its name inside the folder.
pub fn fixture_path(name: impl AsRef<Path>) -> PathBuf {
    let folder = match std::env::var_os("QUANTKV_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    };
    folder.join(name)
}
