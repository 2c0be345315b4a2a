#!/usr/bin/env bash
# Builds a small engine that depends on quantkv by path, with default features and with none, and
# checks that neither pulls in what only the reference decoder needs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/src"
cat >"$dir/Cargo.toml" <<TOML
[package]
name = "engine"
version = "0.0.0"
edition = "2021"

[dependencies]
quantkv = { path = "$root", default-features = false }

[features]
default = ["threads"]
threads = ["quantkv/parallel"]
TOML
cat >"$dir/src/main.rs" <<'RUST'
use quantkv::{CacheSpec, KvFormat};

fn main() -> quantkv::Result<()> {
    let bf16 = CacheSpec::new(8, 128, 16, KvFormat::BF16)?;
    let fp8 = CacheSpec::new(8, 128, 16, KvFormat::Fp8E4M3)?;
    let (before, after) = (bf16.blocks_for_budget(32, 1 << 30)?, fp8.blocks_for_budget(32, 1 << 30)?);
    assert_eq!(after, 2 * before);
    println!("blocks in 1 GiB: bf16 {before}, fp8 {after}");
    Ok(())
}
RUST
cp "$root/Cargo.lock" "$dir/Cargo.lock"
cd "$dir"
export CARGO_TARGET_DIR="$root/target/downstream"
cargo run
cargo run --no-default-features
count=$(cargo tree -e normal --prefix none --no-dedupe | awk '{print $1}' | sort -u | wc -l)
echo "crates in the tree: $count"
if cargo tree -e normal | grep -E 'tokenizers|minijinja|gemm|clap|criterion|proptest'; then
    echo "a plain engine pulls in what only the decoder needs"; exit 1
fi
[ "$count" -le 25 ]
