#!/usr/bin/env bash
# Runs the CUDA kernels and everything above them on the CPU: no GPU, no nvcc, only a C++20 compiler.
#
#   scripts/simt.sh                          the shim's own tests, then every test that runs on CUDA devices
#   scripts/simt.sh -- cargo test --features cuda --test parity_attention     that command instead
#   scripts/simt.sh --self-test              only the shim's own tests
#
#   --sanitize         with AddressSanitizer and UndefinedBehaviorSanitizer
#   --order ORDER      of blocks, warps and lanes: forward (default), reverse, or the seed (2, 3, ..) of a shuffle
#   --arch CC          the kernels' paths for a device of compute capability 75, 80 or 90 (default)
#   --eager            streams do everything at once, instead of as late as allowed
#   --target-dir DIR   where cargo builds (default target/simt): what other builds have there, it need not build again
#
# The kernels are compiled over testing/simt, the driver is testing/mock_cuda (docs/testing-without-gpu.md). Objects
# are kept in target/simt*, apart from those of other builds. QUANTKV_TEST_FEATURES: features that programs of tests are
# built with, if not cuda alone.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitize=0 order=forward arch=90 streams=late self_test_only=0 cargo_target=
while [ $# -gt 0 ]; do
    case $1 in
        --sanitize) sanitize=1 ;;
        --order) order=$2; shift ;;
        --arch) arch=$2; shift ;;
        --eager) streams=eager ;;
        --target-dir) cargo_target=$2; shift ;;
        --self-test) self_test_only=1 ;;
        --) shift; break ;;
        *) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
    shift
done

cxx=${CXX:-c++}
target=${CARGO_TARGET_DIR:-target}/simt
[ "$arch" = 90 ] || target+=-$arch
mkdir -p "$target"
programs=$(cd "$target" && pwd) # where cargo builds them
[ "$sanitize" = 0 ] || target+=-sanitized
mkdir -p "$target/driver"
target=$(cd "$target" && pwd)

flags=(-std=c++20 -O1 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -fno-omit-frame-pointer)
if [ "$sanitize" = 1 ]; then
    flags+=(-fsanitize=address,undefined -fno-sanitize-recover=undefined)
    # Nothing is freed at the end of a test process, nor by kernels that a fault ended.
    export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}
    export UBSAN_OPTIONS=print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}
fi

# $1 is older than one of the files that follow, or not there.
is_stale() {
    local made=$1 file
    shift
    [ -f "$made" ] || return 0
    for file in "$@"; do [ "$made" -nt "$file" ] || return 0; done
    return 1
}

driver=$target/driver/libcuda.so.1
if is_stale "$driver" testing/mock_cuda/*.cpp testing/mock_cuda/driver.h testing/simt/device_model.h scripts/simt.sh; then
    "$cxx" "${flags[@]}" -DQUANTKV_SIMT_ARCH="$arch" -fvisibility=hidden -shared -Wl,-soname,libcuda.so.1 \
        testing/mock_cuda/*.cpp -o "$driver"
    ln -sf libcuda.so.1 "$target/driver/libcuda.so" # the name that cudarc tries first
fi

export QUANTKV_SIMT_ORDER=$order QUANTKV_MOCK_STREAMS=$streams

kernel_flags=("${flags[@]}" -fno-strict-aliasing -ffp-contract=off -DQUANTKV_SIMT "-DQUANTKV_SIMT_ARCH=$arch")
kernel_flags+=(-Itesting -Icsrc)

# make_program OUT SOURCES..: each source on a core of its own.
make_program() {
    local out=$1 objects=$1.objects
    shift
    rm -rf "$objects"
    mkdir -p "$objects"
    printf '%s\0' "$@" | OUT=$objects xargs -0 -n 1 -P "$(nproc)" \
        bash -c '"${@:1:$#-1}" -x c++ -c "${!#}" -o "$OUT/$(tr / . <<<"${!#}").o"' compile "$cxx" "${kernel_flags[@]}"
    "$cxx" "${flags[@]}" "$objects"/*.o -o "$out"
}

self_test() {
    local test=$target/self-test
    if is_stale "$test" testing/simt/*.{cpp,h} testing/simt/tests/* csrc/core/*.h scripts/simt.sh; then
        make_program "$test" testing/simt/tests/*.cpp testing/simt/*.cpp
    fi
    "$test" 2>/dev/null # where the faults that it provokes are reported
    # The instructions, by the tests that hold hardware to the same definitions.
    test=$target/conformance
    if is_stale "$test" testing/simt/*.{cpp,h} testing/conformance/* csrc/core/*.h scripts/simt.sh; then
        make_program "$test" testing/conformance/*.cu testing/simt/*.cpp
    fi
    "$test"
}

if [ $# -eq 0 ]; then self_test; fi
if [ "$self_test_only" = 1 ]; then exit 0; fi
if [ $# -eq 0 ]; then
    set -- cargo test --features "${QUANTKV_TEST_FEATURES:-cuda}" --test mock_driver
    for test in $(grep -l 'testing/devices.rs' tests/*.rs); do set -- "$@" --test "$(basename "$test" .rs)"; done
fi

export CARGO_TARGET_DIR=${cargo_target:-$programs} CARGO_INCREMENTAL=0
export QUANTKV_SIMT=1 QUANTKV_SIMT_ARCH=$arch QUANTKV_REQUIRE_CUDA=1
# cudarc's version is then the newest it knows, not what a toolkit on this machine says.
unset CUDA_HOME CUDA_PATH
# cargo runs tests with the first; rustc itself need not have the sanitizer.
export LD_LIBRARY_PATH=$target/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ "$sanitize" = 1 ]; then
    # The sanitizers are in the library of kernels, which a build without Rust code makes. So nothing above it is built
    # for them: the programs are those of other runs, and what cargo runs them with puts this library before theirs.
    QUANTKV_SIMT_LIBRARY=$(QUANTKV_SIMT_SANITIZE=1 cargo check --locked --lib --no-default-features --features cuda \
        --message-format=json-render-diagnostics | grep '"reason":"build-script-executed"' |
        sed -n 's/.*"package_id":"[^"]*quantkv.*"out_dir":"\([^"]*\)".*/\1/p' | tail -1)
    [ -f "$QUANTKV_SIMT_LIBRARY/libquantkv_cuda.so" ] || { echo "simt.sh: no library with the sanitizers was made" >&2; exit 1; }
    export QUANTKV_SIMT_LIBRARY
    preload=$("$cxx" -print-file-name=libasan.so)
    runner=$target/run-with-asan
    printf '#!/bin/sh\nLD_LIBRARY_PATH=$QUANTKV_SIMT_LIBRARY:$LD_LIBRARY_PATH LD_PRELOAD=%s exec "$@"\n' "$preload" >"$runner"
    chmod +x "$runner"
    host=$(rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)
    export "CARGO_TARGET_${host}_RUNNER=$runner"
fi
"$@"
