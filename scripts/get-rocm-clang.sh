#!/usr/bin/env bash
# Installs what compiles for AMD's GPUs without ROCm. Does nothing where it is already installed.
#
#   scripts/get-rocm-clang.sh                   clang-19, lld-19 and llvm-19's tools by apt, about 340 MB (root)
#   eval "$(scripts/get-rocm-clang.sh --zig)"   the compiler of the ziglang wheel in .rocm/, 440 MB, which knows gfx950
#                                               as well; sets QUANTKV_HIP_CLANG
# Everything but the `export` line goes to stderr.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
    "")
        if ! command -v clang-19 >/dev/null || ! command -v llvm-objdump-19 >/dev/null || [ ! -e /usr/lib/llvm-19/bin/lld ]; then
            apt-get update -qq >&2
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-19 lld-19 llvm-19 >&2
        fi
        clang-19 --version | head -1 >&2
        ;;
    --zig)
        zig=$PWD/.rocm/ziglang/zig
        if [ ! -x "$zig" ]; then
            requirement=$(mktemp)
            trap 'rm -f "$requirement"' EXIT
            echo "ziglang==0.17.1 --hash=sha256:ea6cc5d87b033cf0aedfbc8f9549a908cae6c50ac31f1698188fa48a74524b54" >"$requirement"
            python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --require-hashes --no-deps \
                --only-binary=:all: --no-compile --target .rocm -r "$requirement" >&2
        fi
        "$zig" clang --version | head -1 >&2
        echo "export QUANTKV_HIP_CLANG='$zig clang'"
        ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
