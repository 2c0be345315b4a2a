//! What the tests of the example programs share: running one, and the golden prompts of `generate`.
//!
//! `cargo test` builds the examples beside the tests (`target/PROFILE/examples`); run alone, a test uses
//! the one built last, or builds it if there is none.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

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

pub fn generate() -> Command {
    command("generate")
}

pub fn micro() -> String {
    root().join("tests/fixtures/micro/llmcompressor-tiny-f32").display().to_string()
}

pub fn run(args: &[&str]) -> Output {
    generate().args(args).output().unwrap()
}

/// Standard output of a run that must succeed, and its standard error.
pub fn text(args: &[&str]) -> (String, String) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    (String::from_utf8(output.stdout).unwrap(), stderr)
}

pub fn json(args: &[&str]) -> (Value, String) {
    let (stdout, stderr) = text(&[args, &["--json"]].concat());
    assert_eq!(stdout.trim_end().lines().count(), 1, "one object on one line");
    (serde_json::from_str(&stdout).unwrap(), stderr)
}

pub fn golden() -> Value {
    serde_json::from_str(&fs::read_to_string(Path::new(&micro()).join("golden.json")).unwrap()).unwrap()
}

/// The golden prompts as `--prompt-ids` flags.
pub fn prompt_flags(golden: &Value) -> Vec<[String; 2]> {
    let join = |ids: &Value| ids.as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>().join(",");
    golden["ids"].as_array().unwrap().iter().map(|ids| ["--prompt-ids".to_owned(), join(ids)]).collect()
}

pub fn temp_dir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("quantkv-cli-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// `args`, on CUDA; nothing if this build or this machine has none (unless `QUANTKV_REQUIRE_CUDA=1`).
pub fn json_on_cuda(args: &[&str]) -> Option<Value> {
    let output = run(&[args, &["--device", "cuda", "--json"]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    let required = std::env::var_os("QUANTKV_REQUIRE_CUDA").is_some_and(|value| value == "1");
    if output.status.code() == Some(2) && !(required && cfg!(feature = "cuda")) {
        assert!(stderr.contains("built without CUDA") || stderr.contains("no cuda device"), "{stderr}");
        println!("skipped: {stderr}");
        return None;
    }
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}
