#!/usr/bin/env bash
# Gates on AMD's device code that need clang but no GPU: what users are told when the toolchain is wrong, and what the
# compiler made of the kernels (scripts/code_objects.py: registers, stack, instructions) for every architecture.
#
#   scripts/check_rocm_build.sh [messages | kernels]...     both by default
#
# The compiler is QUANTKV_HIP_CLANG (and QUANTKV_HIP_CLANG_GFX950 for that one), else the one that scripts/get-rocm-clang.sh
# --zig installs: it knows all five.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=never
all_archs="gfx90a gfx942 gfx950 gfx1100 gfx1201"
clang=${QUANTKV_HIP_CLANG:-$PWD/.rocm/ziglang/zig clang}
# By its path: `messages` hides what PATH has.
read -r program words <<<"$clang"
clang=$(type -P "$program" || echo "$program")${words:+ $words}

fail() { echo "check_rocm_build: $*" >&2; exit 1; }

# What the published crate, with one small kernel, says of toolchains that will not do.
messages() {
    local crate path
    crate=$(mktemp -d)
    trap 'rm -rf "$crate"' RETURN
    cargo package --quiet --locked --allow-dirty --no-verify
    tar -xf target/package/quantkv-*.crate -C "$crate" --strip-components=1
    rm "$crate"/csrc/hip/*.hip
    cat >"$crate/csrc/hip/small.hip" <<'HIP'
#define QKV_CODE_OBJECT quantkv_hip_code_small
#include "core/launch.h"
namespace quantkv {
QKV_KERNEL void zero(float *p) { p[thread_index()] = 0; }
}
extern "C" int zero_32(float *p, void *stream) {
  using namespace quantkv;
  return QKV_LAUNCH((zero), (Grid{1, 1, 1}), 32, 0, stream, p);
}
HIP
    # An environment without ROCm and clang, into which each case puts its own.
    path=$(tr : '\n' <<<"$PATH" | while read -r folder; do
        compgen -G "$folder/clang*" >/dev/null || echo "$folder"
    done | paste -sd:)
    mkdir "$crate/bin"
    local tool
    # What stood beside a clang and is needed.
    for tool in cc sh env ld ar as git sed; do
        PATH=$path command -v $tool >/dev/null || ln -s "$(command -v $tool)" "$crate/bin/$tool"
    done
    path=$crate/bin:$path
    says() { # fail|pass words variables...
        local want=$1 words=$2 output got=pass
        shift 2
        output=$(cd "$crate" && env -u ROCM_PATH -u QUANTKV_HIP_CLANG -u QUANTKV_HIP_CLANG_GFX950 -u QUANTKV_HIP_ARCHS \
            -u QUANTKV_OBJECT_DIR -u QUANTKV_STUB PATH="$path" CARGO_TARGET_DIR="$OLDPWD/target/messages" "$@" \
            cargo check --locked --lib --no-default-features --features rocm 2>&1) || got=fail
        [ $got = "$want" ] || fail "with $*: expected to $want, and:"$'\n'"$output"
        grep -q -- "$words" <<<"$output" || fail "with $*: '$words' is not said in:"$'\n'"$output"
        ! grep -q 'panicked at' <<<"$output" || fail "with $*: a panic:"$'\n'"$output"
        echo "$*: $(grep -m1 -o -- ".*$words.*" <<<"$output")"
    }
    fake() { # name, what --version says, what --print-targets says
        printf '#!/bin/sh\ncase "$1" in --print-targets) echo "%s";; *) echo "%s";; esac\n' "$3" "$2" >"$crate/$1"
        chmod +x "$crate/$1"
    }
    fake old 'Debian clang version 16.0.6 (15~deb12u1)' amdgcn
    fake plain 'clang version 19.1.7' x86-64
    if [ -e /opt/rocm/llvm/bin/clang++ ]; then
        echo "(a clang in /opt/rocm: its absence cannot be tested)"
    else
        says fail 'scripts/get-rocm-clang.sh' NOTHING=set
    fi
    says fail 'QUANTKV_HIP_CLANG=/nowhere/clang is not a file' QUANTKV_HIP_CLANG=/nowhere/clang
    says fail 'ROCM_PATH=/nowhere, but /nowhere/llvm/bin/clang++ is not there' ROCM_PATH=/nowhere
    says fail 'old is clang 16, and 19 or newer is needed' QUANTKV_HIP_CLANG="$crate/old"
    says fail 'plain was built without the amdgcn target' QUANTKV_HIP_CLANG="$crate/plain"
    says fail 'answered what no clang does' QUANTKV_HIP_CLANG="$(type -P true)"
    says fail 'does not compile for gfx9999' QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=gfx942,gfx9999
    says fail "each once, not '90a'" QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=90a
    says fail "each once, not 'gfx942'" QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=gfx942,gfx942
    says fail 'QUANTKV_HIP_CLANG_GFX942=/nowhere/clang is not a file' QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=gfx942 \
        QUANTKV_HIP_CLANG_GFX942=/nowhere/clang
    says fail 'plain was built without the amdgcn target' QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_CLANG_GFX90A="$crate/plain"
    says pass 'Finished' QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=gfx942 QUANTKV_HIP_CLANG_GFX90A=/nowhere/clang
    says fail "names no architecture" QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=,
    says fail "QUANTKV_STUB is 1 or 0, not 'yes'" QUANTKV_STUB=yes
    says pass 'Finished' QUANTKV_STUB=1
    says pass 'Finished' DOCS_RS=1
    says pass 'Finished' QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS="gfx1100 gfx942"
    if command -v clang-19 >/dev/null; then
        # Of the default list, what the compiler does not know is left out, and that is said.
        says pass 'does not compile for gfx950: the library will have no kernels for it' QUANTKV_HIP_CLANG="$(command -v clang-19)"
        says fail 'does not compile for gfx950' QUANTKV_HIP_CLANG="$(command -v clang-19)" QUANTKV_HIP_ARCHS=gfx950
        # With a compiler of its own it is there.
        if [ -x .rocm/ziglang/zig ]; then
            says pass 'Finished' QUANTKV_HIP_CLANG="$(command -v clang-19)" QUANTKV_HIP_CLANG_GFX950="$PWD/.rocm/ziglang/zig clang" \
                QUANTKV_HIP_ARCHS="gfx942 gfx950"
        fi
    fi
    echo 'wrong' >"$crate/csrc/hip/small.hip"
    says fail 'csrc/hip/small.hip:1:1: error' QUANTKV_HIP_CLANG="$clang" QUANTKV_HIP_ARCHS=gfx942
}

# What became of the kernels.
kernels() {
    local out
    # The library that the tests are linked with, so that it is built once for both.
    out=$(QUANTKV_HIP_CLANG=${QUANTKV_HIP_CLANG:-$clang} QUANTKV_HIP_ARCHS=${QUANTKV_HIP_ARCHS:-$all_archs} \
        cargo check --locked --test rocm --features "${QUANTKV_TEST_FEATURES:-rocm}" --message-format=json-render-diagnostics | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message["reason"] == "build-script-executed" and "quantkv" in message["package_id"]:
        print(message["out_dir"])')
    echo "library: $(stat -c %s "$out/libquantkv_hip.a") bytes"
    scripts/code_objects.py --check "$out/libquantkv_hip.a"
}

[ $# -gt 0 ] || set -- messages kernels
for part in "$@"; do
    case $part in
        messages | kernels) $part ;;
        *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
