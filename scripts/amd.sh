#!/usr/bin/env bash
# ROCm without a GPU: the device code of one architecture, run on the CPU behind a stand-in for HIP's runtime.
#
#   scripts/amd.sh --arch gfx942                        every test that runs on ROCm devices
#   scripts/amd.sh --arch gfx942 -- COMMAND..           that command instead, a test program or cargo itself
#   scripts/amd.sh --self-test                          the translator's own tests
#
#   --arch ARCH        gfx90a, gfx942 (default), gfx950, gfx1100 or gfx1201
#   --order ORDER      of blocks, waves and lanes: forward (default), reverse, or the seed (2, 3, ..) of a shuffle
#   --target-dir DIR   where cargo builds (default target): what other builds have there, it need not build again
#   --prepare          only what COMMAND would need
#   --quick            what must be compiled is not optimized for x86-64: for a run or two
#
# clang makes LLVM IR of csrc/hip/*.hip as it does for the device, testing/amd/retarget.rs turns it into IR for x86-64,
# and testing/amd/{machine,instructions,hip}.cpp run it as libamdhip64.so.7 (docs/rocm.md), with testing/amd/rocblas.cpp
# as its librocblas.so.5. The crate is built as ever, with real code for that architecture; it only finds another
# runtime. The compiler is QUANTKV_HIP_CLANG, else that of .rocm, else clang-22 to clang-19; for ARCH alone
# QUANTKV_HIP_CLANG_ARCH (QUANTKV_HIP_CLANG_GFX950), as for the library's code. QUANTKV_HIP_ARCHS: the library's
# architectures, if not ARCH alone. With all of them in it, the same test programs serve every ARCH.
# QUANTKV_TEST_FEATURES: features that programs of tests are built with, if not rocm alone.
set -euo pipefail
cd "$(dirname "$0")/.."

arch=gfx942 order=forward cargo_target=${CARGO_TARGET_DIR:-target} self_test=0 prepare_only=0 quick=0
while [ $# -gt 0 ]; do
    case $1 in
        --arch) arch=$2; shift ;;
        --order) order=$2; shift ;;
        --target-dir) cargo_target=$2; shift ;;
        --self-test) self_test=1 ;;
        --prepare) prepare_only=1 ;;
        --quick) quick=1 ;;
        --) shift; break ;;
        *) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
    shift
done

# Lanes of a wave, whether the FP8 instructions are FNUZ, the number in a code object's flags.
case $arch in
    gfx90a) wave=64 fnuz=0 machine=0x3f ;;
    gfx942) wave=64 fnuz=1 machine=0x4c ;;
    gfx950) wave=64 fnuz=0 machine=0x4f ;;
    gfx1100) wave=32 fnuz=0 machine=0x41 ;;
    gfx1201) wave=32 fnuz=0 machine=0x4e ;;
    *) echo "amd.sh: '$arch' is not known here" >&2; exit 2 ;;
esac

target=$cargo_target/amd
mkdir -p "$target/$arch"
target=$(cd "$target" && pwd)
out=$target/$arch

# $1 is older than one of the files that follow, or not there.
is_stale() {
    local made=$1 file
    shift
    [ -f "$made" ] || return 0
    for file in "$@"; do [ "$made" -nt "$file" ] || return 0; done
    return 1
}

if is_stale "$target/retarget" testing/amd/retarget.rs; then
    rustc --edition 2024 -O testing/amd/retarget.rs -o "$target/retarget"
fi
if [ $self_test = 1 ]; then
    rustc --edition 2024 --test testing/amd/retarget.rs -o "$target/retarget-tests"
    "$target/retarget-tests"
    exit 0
fi

# The compiler that is named, else the ziglang wheel's (scripts/get-rocm-clang.sh --zig), else Debian's.
if [ -z "${QUANTKV_HIP_CLANG:-}" ]; then
    if [ -x .rocm/ziglang/zig ]; then
        QUANTKV_HIP_CLANG="$PWD/.rocm/ziglang/zig clang"
    else
        for name in clang-22 clang-21 clang-20 clang-19; do
            if command -v $name >/dev/null; then QUANTKV_HIP_CLANG=$name; break; fi
        done
    fi
fi
: "${QUANTKV_HIP_CLANG:?clang 19 or newer is needed, and 22 for gfx950: scripts/get-rocm-clang.sh}"
export QUANTKV_HIP_CLANG QUANTKV_HIP_ARCHS=${QUANTKV_HIP_ARCHS:-$arch}
of_arch=QUANTKV_HIP_CLANG_${arch^^}
read -r -a clang <<<"${!of_arch:-$QUANTKV_HIP_CLANG}"
program=$(command -v "${clang[0]}")

# Objects of another compiler are made again.
version=$("${clang[@]}" --version | head -1)
if [ "$(cat "$out/compiler" 2>/dev/null)" != "$version" ]; then
    rm -f "$out"/*.o
    echo "$version" >"$out/compiler"
fi
# The flags of build/hip.rs.
device=(-Wno-unused-command-line-argument -x hip -std=c++17 -nogpuinc -nogpulib -Icsrc -O3 -ffp-contract=on -mcode-object-version=5 --offload-device-only)
# zig has clang's own headers where clang does not look.
if [ ${#clang[@]} -gt 1 ] && [ -d "$(dirname "$program")/lib/include" ]; then
    device+=(-isystem "$(dirname "$program")/lib/include")
fi
# With AVX2, clang 22.1.8 dies of pairs of f16.
x86=(--target=x86_64-unknown-linux-gnu -O$((quick ? 0 : 2)) -fPIC -march=x86-64-v2 -mfma -mf16c -Wno-override-module)
retarget() { # a source's name
    local made=$out/$1 depends
    # The front end's own flags: zig's driver takes -MF and writes nothing.
    depends=(-Xclang -dependency-file -Xclang "$out/$1.d" -Xclang -MT -Xclang "$out/$1.o")
    "${clang[@]}" "${device[@]}" "--offload-arch=$arch" -S -emit-llvm "${depends[@]}" "csrc/hip/$1.hip" -o "$made.ll"
    "$target/retarget" "$arch" "$made.ll" "$made.x86.ll"
    "${clang[@]}" "${x86[@]}" -c "$made.x86.ll" -o "$made.o"
}
objects=() running=0
# The largest are last in the alphabet: they are begun first.
for source in $(grep -l '^#define QKV_CODE_OBJECT' csrc/hip/*.hip | sort -r); do
    name=$(basename "$source" .hip)
    objects+=("$out/$name.o")
    if [ ! -f "$out/$name.d" ]; then rm -f "$out/$name.o"; fi
    dependencies=()
    [ ! -f "$out/$name.d" ] || read -r -a dependencies <<<"$(sed 's/^[^:]*://; s/\\$//' "$out/$name.d" | tr '\n' ' ')"
    if is_stale "$out/$name.o" "$source" "$target/retarget" scripts/amd.sh "${dependencies[@]}"; then
        rm -f "$out/$name.o"
        retarget "$name" &
        running=$((running + 1))
        if [ $running -ge "$(nproc)" ]; then wait -n; running=$((running - 1)); fi
    fi
done
wait
for object in "${objects[@]}"; do [ -f "$object" ] || { echo "amd.sh: $object was not made" >&2; exit 1; }; done

runtime=$out/libamdhip64.so.7 machinery=$out/machinery.o
flags=(-std=c++20 -O2 -g -Wall -Wextra -Werror -fPIC -fvisibility=hidden)
if is_stale "$machinery" testing/amd/{machine.h,powers.h,machine.cpp,instructions.cpp,hip.cpp} testing/simt/fiber.* scripts/amd.sh; then
    "${CXX:-c++}" "${flags[@]}" -r -nostdlib \
        -DQUANTKV_AMD_WAVE=$wave -DQUANTKV_AMD_FNUZ=$fnuz -DQUANTKV_AMD_MACHINE=$machine "-DQUANTKV_AMD_ARCH=\"$arch\"" \
        testing/amd/{machine,instructions,hip}.cpp testing/simt/fiber.cpp -o "$machinery"
fi
if is_stale "$runtime" "${objects[@]}" "$machinery"; then
    "${CXX:-c++}" -shared -Wl,-soname,libamdhip64.so.7 "$machinery" "${objects[@]}" -o "$runtime"
fi
if is_stale "$out/librocblas.so.5" "$runtime" testing/amd/rocblas.cpp; then
    "${CXX:-c++}" "${flags[@]}" -shared -Wl,-soname,librocblas.so.5 testing/amd/rocblas.cpp "$runtime" -o "$out/librocblas.so.5"
fi
[ $prepare_only = 0 ] || exit 0

if [ $# -eq 0 ]; then
    set -- cargo test --features "${QUANTKV_TEST_FEATURES:-rocm}"
    for test in $(grep -lE 'devices(::rocm)?\(\)' tests/*.rs); do set -- "$@" --test "$(basename "$test" .rs)"; done
fi
export CARGO_TARGET_DIR=$cargo_target QUANTKV_AMD_ORDER=$order QUANTKV_AMD_EMULATED=1
export QUANTKV_REQUIRE_ROCM=1 QUANTKV_REQUIRE_ROCBLAS=1
export QUANTKV_AMD_ARCH=$arch QUANTKV_AMD_RUNTIME=$out LD_LIBRARY_PATH=$out${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
"$@"
