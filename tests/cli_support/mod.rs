//! An example of this package as a program.
//!
//! `cargo test` builds the examples beside the tests (`target/PROFILE/examples`); run alone, a test uses
//! the one built last, or builds it if there is none.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The path of the example, built if it is not there.
fn program(example: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let profile = exe.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(format!("{example}{}", std::env::consts::EXE_SUFFIX));
    if !program.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root()).args(["build", "--example", example, "--target-dir"]);
        cargo.arg(profile.parent().unwrap());
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        if cfg!(feature = "cuda") {
            cargo.args(["--features", "cuda"]);
        }
        assert!(cargo.status().unwrap().success(), "the example could not be built");
    }
    program
}

/// A command of the example, in the root of the package and without an input.
pub fn command(example: &str) -> Command {
    let mut command = Command::new(program(example));
    command.current_dir(root()).stdin(Stdio::null());
    command
}

pub fn temp_dir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("quantkv-cli-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}
