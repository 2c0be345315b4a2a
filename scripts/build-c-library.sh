#!/usr/bin/env bash
# Builds libquantkv_cuda.so, the C ABI (csrc/quantkv.h) as a shared library for C, C++ and Python:
#
#   scripts/build-c-library.sh [--dev] [DIR]     DIR: target/c; gets the library and the header
#
# --dev: the kernels of a development build, which are not compressed: six times the size, and made sooner.
# It exports the quantkv_* functions and nothing else, and has the CUDA runtime inside: what it needs at run time
# is the driver. QUANTKV_CUDA_ARCHS and the other variables of build.rs apply.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
profile=release
if [ "${1:-}" = --dev ]; then
    profile=dev
    shift
fi
dir=${1:-$root/target/c}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

unset QUANTKV_STUB QUANTKV_SIMT DOCS_RS # kernels, whatever the shell was doing

# build.rs makes the static library, for a mere check too; cargo tells where it is and where the CUDA runtime is.
messages=$(cargo check --manifest-path "$root/Cargo.toml" --locked --lib --no-default-features --features cuda --profile "$profile" \
    --message-format=json-render-diagnostics)
script=$(grep '"reason":"build-script-executed"' <<<"$messages" | grep '"package_id":"[^"]*quantkv' | tail -1)
objects=$(sed 's/.*"out_dir":"\([^"]*\)".*/\1/' <<<"$script")
runtime=$(sed 's/.*"linked_paths":\[\([^]]*\)\].*/\1/; s/"//g; s/native=//g; s/,/\n/g' <<<"$script" |
    while read -r path; do [ ! -e "$path/libcudart_static.a" ] || echo "$path"; done | head -1)
[ -e "$objects/libquantkv_cuda.a" ] && [ -n "$runtime" ] || {
    echo "build-c-library.sh: the build made no kernels" >&2
    exit 1
}

exports=$(mktemp)
trap 'rm -f "$exports"' EXIT
echo '{ global: quantkv_*; local: *; };' >"$exports"
"${CC:-cc}" -shared -o "$dir/libquantkv_cuda.so" -Wl,-soname,libquantkv_cuda.so -Wl,--no-undefined -Wl,--gc-sections \
    "-Wl,--version-script=$exports" \
    -Wl,--whole-archive "$objects/libquantkv_cuda.a" -Wl,--no-whole-archive \
    "-L$runtime" -lcudart_static -ldl -lpthread -lrt
cp "$root"/csrc/quantkv.h "$root"/csrc/quantkv_decoder.h "$dir"
echo "$dir/libquantkv_cuda.so"
