#!/usr/bin/env bash
# ROCm without a GPU: the code objects that ship, run instruction by instruction behind a stand-in for HIP's runtime.
#
#   scripts/isa.sh --arch gfx942                        the small suite: small shapes of nearly every kernel
#   scripts/isa.sh --arch gfx942 -- COMMAND..           that command instead, a test program or cargo itself
#   scripts/isa.sh --arch gfx942 --mutations            bugs planted in the machine code, each of which must be seen
#   scripts/isa.sh --self-test                          the simulator's own tests
#   scripts/isa.sh --known                              whether it knows every instruction of what cargo has built
#
#   --arch ARCH        gfx90a, gfx942 (default), gfx1100 or gfx1201
#   --order ORDER      of blocks and waves: forward (default), reverse, or the seed (2, 3, ..) of a shuffle
#   --target-dir DIR   where cargo builds (default target)
#   --coverage         also how much of the code was executed
#   --prepare          only what COMMAND would need
#
# The crate is built as ever, for all architectures or those in QUANTKV_HIP_ARCHS; it only finds another runtime: testing/amd/hip.cpp
# around the simulator in testing/isa (docs/isa.md). It reads what llvm-objdump-19 says of the code objects
# (scripts/get-rocm-clang.sh; QUANTKV_LLVM_OBJDUMP names another). QUANTKV_TEST_FEATURES as in scripts/amd.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

arch=gfx942 order=forward cargo_target=${CARGO_TARGET_DIR:-target} mode=suite coverage=0
while [ $# -gt 0 ]; do
    case $1 in
        --arch) arch=$2; shift ;;
        --order) order=$2; shift ;;
        --target-dir) cargo_target=$2; shift ;;
        --self-test | --known | --prepare | --mutations) mode=${1#--} ;;
        --coverage) coverage=1 ;;
        --) shift; mode=command; break ;;
        *) sed -n '2,22s/^# \{0,1\}//p' "$0"; exit 2 ;;
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
export QUANTKV_ISA_CACHE=$target/disassembly RUST_BACKTRACE=${RUST_BACKTRACE:-0}
if [ $mode = self-test ] || [ $mode = known ]; then
    if is_stale "$target/tests" testing/isa/*.rs testing/isa/tests/*.rs; then
        "${rust[@]}" --test testing/isa/lib.rs -o "$target/tests"
    fi
    if [ $mode = self-test ]; then exec "$target/tests"; fi
    QUANTKV_ISA_OBJECTS=${QUANTKV_ISA_OBJECTS:-${QUANTKV_OBJECT_DIR:-$cargo_target/debug/build}} exec "$target/tests" --ignored --nocapture
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
[ $mode != prepare ] || exit 0

export CARGO_TARGET_DIR=$cargo_target QUANTKV_AMD_ORDER=$order QUANTKV_AMD_EMULATED=1 QUANTKV_REQUIRE_ROCM=1
export LD_LIBRARY_PATH=$out${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ $mode = command ]; then exec "$@"; fi

# Random shapes are small and take most paths; what is left out is large: no other kernels, many more instructions.
tests=(parity_cache_write parity_convert parity_copies parity_attention parity_prefill decoder_ops cache block_copies hostile_data)
left_out=(large_writes large_conversions large_moves every_16_bit_pattern vllm_swap_256 vllm_prefill vllm_decode
    poison_follows long_sequences results_do_not_depend every_length_around every_head_dim every_feature prefill_over_dynamic)
export QUANTKV_TEST_DEVICES=rocm PROPTEST_CASES=${PROPTEST_CASES:-50} PROPTEST_RNG_SEED=${PROPTEST_RNG_SEED:-81}

features=${QUANTKV_TEST_FEATURES:-rocm}
cargo_tests=()
for test in "${tests[@]}"; do cargo_tests+=(--test "$test"); done
cargo test --features "$features" --no-run "${cargo_tests[@]}"

if [ $mode = mutations ]; then
    survivors=0
    while IFS='|' read -r for_arch test filter mutation; do
        read -r for_arch test filter <<<"$for_arch $test $filter"
        case $for_arch in "$arch" | '*') ;; *) continue ;; esac
        if said=$(QUANTKV_ISA_MUTATION=$mutation cargo test --quiet --features "$features" --test "$test" -- "$filter" 2>&1); then
            survivors=$((survivors + 1))
            echo "SURVIVED: $test $filter |$mutation ($(grep -c '^isa: planted' <<<"$said") planted)"
        elif ! grep -q '^isa: planted' <<<"$said"; then
            survivors=$((survivors + 1))
            echo "FAILED WITHOUT IT: $test $filter |$mutation"
        else
            echo "seen: $test $filter |$mutation: $(grep -m1 -E '^isa: kernel|panicked|is not' <<<"$said" | sed 's/^isa: kernel [^,]*, //' | cut -c1-120)"
        fi
    done < <(grep -v -e '^#' -e '^$' testing/isa/mutations.txt)
    [ $survivors = 0 ] || { echo "isa.sh: $survivors of the planted bugs were not seen" >&2; exit 1; }
    exit 0
fi

if [ $coverage = 1 ]; then
    export QUANTKV_ISA_COVERAGE=$out/coverage
    rm -rf "$QUANTKV_ISA_COVERAGE"
    mkdir "$QUANTKV_ISA_COVERAGE"
fi
skips=()
for name in "${left_out[@]}"; do skips+=(--skip "$name"); done
TIMEFORMAT="isa.sh: $arch, %U s of CPU time, %R s"
time cargo test --features "$features" "${cargo_tests[@]}" -- "${skips[@]}"
if [ $coverage = 1 ]; then
    cat "$QUANTKV_ISA_COVERAGE"/* | awk '
        { count[$1] = $2; if (!seen[$1, $3]++) executed[$1]++ }
        END {
            for (kernel in count) { kernels++; all += count[kernel]; some += executed[kernel] }
            printf "isa.sh: %d kernels were launched, %d of their %d instructions executed\n", kernels, some, all
        }'
fi
