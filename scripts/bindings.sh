#!/usr/bin/env bash
# Writes src/raw/bindings.rs again from csrc/quantkv.h, and the decoder's from csrc/quantkv_decoder.h.
# With --check: fails if they differ from what is committed.
#
# libclang comes from a pinned wheel in .cuda/, so that everyone's output is the same; or set LIBCLANG_PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${LIBCLANG_PATH:-}" ]; then
    wheel=$PWD/.cuda/libclang
    [ -e "$wheel/clang/native/libclang.so" ] ||
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --require-hashes \
            --no-deps --only-binary=:all: --target "$wheel" -r scripts/bindings-requirements.txt >&2
    export LIBCLANG_PATH=$wheel/clang/native
fi

generate() { # header output cfg first-lines
    local out
    out=$(mktemp)
    # The library has no headers of its own: stddef.h is the compiler's.
    {
        echo "$4"
        cargo run --quiet --locked --manifest-path scripts/bindings/Cargo.toml --target-dir target/bindings -- \
            "$PWD/$1" "$3" "-I$(cc -print-file-name=include)"
    } >"$out"
    rustfmt --quiet --edition 2024 --config-path rustfmt.toml "$out"
    # bindgen's only blocks are those of Default.
    sed -i 's|^\( *\)unsafe {$|\1// SAFETY: zeros are a value of every field: numbers, pointers, structs of these.\n&|' "$out"
    if [ "${check:-}" ]; then
        diff -u "$2" "$out" || { echo "$2 is not what scripts/bindings.sh makes of $1: run it" >&2; exit 1; }
        echo "$2: as generated"
    else
        cp "$out" "$2"
        chmod 644 "$2"
    fi
    rm -f "$out"
}

[ "${1:-}" = --check ] && check=yes
lints='#![allow(missing_docs, non_camel_case_types, clippy::all)]
#![allow(rustdoc::all)]'
generate csrc/quantkv.h src/raw/bindings.rs 'not(quantkv_stub)' \
    "//! The C ABI, \`csrc/quantkv.h\`, in Rust. Made by scripts/bindings.sh from that file: read it there.
$lints"
[ ! -e csrc/quantkv_decoder.h ] || generate csrc/quantkv_decoder.h src/decoder/bindings.rs 'not(quantkv_stub)' \
    "//! \`csrc/quantkv_decoder.h\` in Rust. Made by scripts/bindings.sh from that file: read it there.
$lints
#![allow(unused_imports)] // in a stub build
use crate::raw::bindings::*;"
