#!/usr/bin/env bash
# Builds small engines that depend on quantkv by path: with default features, with none (checking that neither
# pulls in what only the reference decoder needs), and on CUDA with cudarc features of their own choice.
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
# With quantkv's own profiles, what other builds have made of the dependencies serves here.
profiles=$(sed -n '/^\[profile/,$p' "$root/Cargo.toml")
echo "$profiles" >>"$dir/Cargo.toml"
cp "$root/Cargo.lock" "$dir/Cargo.lock"
cd "$dir"
export CARGO_TARGET_DIR="$root/target"
# It computes next to nothing: the library need not be optimized, which takes most of a minute each time.
quickly=(--config 'profile.dev.package.quantkv.opt-level=0')
cargo run "${quickly[@]}"
cargo run "${quickly[@]}" --no-default-features
count=$(cargo tree -e normal --prefix none --no-dedupe | awk '{print $1}' | sort -u | wc -l)
echo "crates in the tree: $count"
if cargo tree -e normal | grep -E 'tokenizers|minijinja|gemm|clap|criterion|proptest'; then
    echo "a plain engine pulls in what only the decoder needs"; exit 1
fi
[ "$count" -le 25 ]

# Engines on GPUs choose a CUDA version and a way to link the driver, through features of cudarc, which cargo
# unites over the whole build. Whatever they choose, quantkv compiles: one that pins an older CUDA, and one with
# the features of candle-core 0.11.1 (which links libcuda, so only checked, here where there is none).
for choice in '"std", "driver", "cuda-12080"' \
    '"std", "cublas", "cublaslt", "curand", "driver", "nvrtc", "f16", "f8", "cuda-version-from-build-system", "dynamic-linking"'; do
    echo "an engine whose cudarc has $choice"
    cat >"$dir/Cargo.toml" <<TOML
[package]
name = "gpu-engine"
version = "0.0.0"
edition = "2021"

[dependencies]
quantkv = { path = "$root", default-features = false, features = ["cuda", "decoder"] }
cudarc = { version = "0.19.10", default-features = false, features = [$choice] }
$profiles
TOML
    cp "$root/scripts/gpu_engine.rs" "$dir/src/main.rs"
    cp "$root/Cargo.lock" "$dir/Cargo.lock"
    QUANTKV_STUB=1 cargo check
    # The choice of the engine stands: nothing of quantkv's asks for a version of its own.
    versions=$(cargo tree -e features -i cudarc --prefix none | sed -n 's/.*feature "\(cuda-[0-9]*\)".*/\1/p' | sort -u)
    case $choice in
        *cuda-12080*) [ "$versions" = cuda-12080 ] ;;
        *) [ -z "$versions" ] ;;
    esac
done
