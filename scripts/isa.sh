#!/usr/bin/env bash
# ROCm without a GPU: the code objects that ship, run instruction by instruction behind a stand-in for HIP's runtime.
#
#   scripts/isa.sh --arch gfx942                        the small suite: every kernel, small shapes
#   scripts/isa.sh --arch gfx942 -- COMMAND..           that command instead, a test program or cargo itself
#   scripts/isa.sh --self-test                          the simulator's own tests
#
#   --arch ARCH        gfx90a, gfx942 (default), gfx1100 or gfx1201
#   --order ORDER      of blocks and waves: forward (default), reverse, or the seed (2, 3, ..) of a shuffle
#   --target-dir DIR   where cargo builds (default target)
#   --prepare          only what COMMAND would need
#
# The crate is built as ever, with real code for that architecture; it only finds another runtime: testing/amd/hip.cpp
# around the simulator in testing/isa (docs/isa.md). It reads what llvm-objdump-19 says of the code objects
# (scripts/get-rocm-clang.sh; QUANTKV_LLVM_OBJDUMP names another).
set -euo pipefail
cd "$(dirname "$0")/.."

arch=gfx942 order=forward cargo_target=${CARGO_TARGET_DIR:-target} self_test=0 prepare_only=0
while [ $# -gt 0 ]; do
    case $1 in
        --arch) arch=$2; shift ;;
        --order) order=$2; shift ;;
        --target-dir) cargo_target=$2; shift ;;
        --self-test) self_test=1 ;;
        --prepare) prepare_only=1 ;;
        --) shift; break ;;
        *) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
    shift
done

# The number in a code object's flags.
case $arch in
    gfx90a) machine=0x3f ;;
    gfx942) machine=0x4c ;;
    gfx1100) machine=0x41 ;;
    gfx1201) machine=0x4e ;;
    *) echo "isa.sh: '$arch' is not known here" >&2; exit 2 ;;
esac

mkdir -p "$cargo_target/isa/$arch" "$cargo_target/isa/disassembly"
cargo_target=$(cd "$cargo_target" && pwd)
target=$cargo_target/isa out=$cargo_target/isa/$arch

# $1 is older than one of the files that follow, or not there.
is_stale() {
    local made=$1 file
    shift
    [ -f "$made" ] || return 0
    for file in "$@"; do [ "$made" -nt "$file" ] || return 0; done
    return 1
}

# Fused multiply-add by instruction, as scripts/amd.sh.
rust=(rustc --edition 2024 --crate-name quantkv_isa -O -C target-cpu=x86-64-v3 -D warnings)
if [ $self_test = 1 ]; then
    "${rust[@]}" --test testing/isa/lib.rs -o "$target/tests"
    "$target/tests"
    exit 0
fi
if is_stale "$target/libquantkv_isa.a" testing/isa/*.rs; then
    "${rust[@]}" --crate-type staticlib testing/isa/lib.rs -o "$target/libquantkv_isa.a"
fi
runtime=$out/libamdhip64.so.7
if is_stale "$runtime" "$target/libquantkv_isa.a" testing/amd/{hip.cpp,machine.h} testing/isa/machine.cpp; then
    "${CXX:-c++}" -std=c++20 -O2 -g -Wall -Wextra -Werror -fPIC -fvisibility=hidden -shared -Wl,-soname,libamdhip64.so.7 \
        -Wl,--exclude-libs,ALL "-DQUANTKV_AMD_ARCH=\"$arch\"" -DQUANTKV_AMD_MACHINE=$machine \
        testing/amd/hip.cpp testing/isa/machine.cpp "$target/libquantkv_isa.a" -o "$runtime"
fi
[ $prepare_only = 0 ] || exit 0

export CARGO_TARGET_DIR=$cargo_target QUANTKV_AMD_ORDER=$order QUANTKV_AMD_EMULATED=1
export QUANTKV_REQUIRE_ROCM=1 QUANTKV_ISA_CACHE=$target/disassembly
export LD_LIBRARY_PATH=$out${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
"$@"
