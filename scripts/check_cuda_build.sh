#!/usr/bin/env bash
# Gates on device code that need nvcc but no GPU: what users are told when the toolchain is wrong, the rules of
# csrc/, and what the compiler made of the kernels (registers, stack, instructions) for every architecture.
#
#   scripts/check_cuda_build.sh [messages | sources | kernels]...     all three by default
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_HOME=${CUDA_HOME:-$PWD/.cuda/nvidia/cu13} CARGO_TERM_COLOR=never

fail() { echo "check_cuda_build: $*" >&2; exit 1; }

# What the published crate, with one small kernel, says of toolchains that will not do.
messages() {
    local crate
    crate=$(mktemp -d)
    trap 'rm -rf "$crate"' RETURN
    cargo package --quiet --locked --allow-dirty --no-verify
    tar -xf target/package/quantkv-*.crate -C "$crate" --strip-components=1
    rm -rf "$crate"/csrc/cuda
    mkdir "$crate/csrc/cuda"
    cat >"$crate/csrc/cuda/small.cu" <<'CU'
#include "core/launch.h"
QKV_KERNEL void zero(float *p) { p[quantkv::thread_index()] = 0; }
extern "C" int zero_32(float *p, void *stream) { return QKV_LAUNCH((zero), (quantkv::Grid{1, 1, 1}), 32, 0, stream, p); }
CU
    # An environment without CUDA, into which each case puts its own.
    local path
    path=$(tr : '\n' <<<"$PATH" | while read -r folder; do [ -e "$folder/nvcc" ] || echo "$folder"; done | paste -sd:)
    says() { # fail|pass words variables...
        local want=$1 words=$2 output got=pass
        shift 2
        output=$(cd "$crate" && env -u NVCC -u CUDA_HOME -u CUDA_PATH -u CUDA_COMPUTE_CAP -u QUANTKV_CUDA_ARCHS \
            -u QUANTKV_OBJECT_DIR PATH="$path" CARGO_TARGET_DIR="$OLDPWD/target/messages" "$@" \
            cargo check --locked --lib --no-default-features --features cuda 2>&1) || got=fail
        [ $got = "$want" ] || fail "with $*: expected to $want, and:"$'\n'"$output"
        grep -q -- "$words" <<<"$output" || fail "with $*: '$words' is not said in:"$'\n'"$output"
        ! grep -q 'panicked at' <<<"$output" || fail "with $*: a panic:"$'\n'"$output"
        echo "$*: $(grep -m1 -o -- ".*$words.*" <<<"$output")"
    }
    local nvcc=$CUDA_HOME/bin/nvcc old=$crate/old-nvcc
    printf '#!/bin/sh\necho "Cuda compilation tools, release 12.3, V12.3.107"\n' >"$old"
    chmod +x "$old"
    if [ -e /usr/local/cuda/bin/nvcc ]; then
        echo "(nvcc in /usr/local/cuda: its absence cannot be tested)"
    else
        says fail 'scripts/get-cuda.sh installs it' NOTHING=set
    fi
    says fail 'NVCC=/nowhere/nvcc is not a file' NVCC=/nowhere/nvcc
    says fail '/nowhere/bin/nvcc is not there' CUDA_HOME=/nowhere
    says fail 'old-nvcc is nvcc 12.3, and 12.4 or newer is needed' NVCC="$old"
    says fail 'answered what no nvcc does' NVCC="$(type -P true)"
    says fail "architecture '37'.* does not know" NVCC="$nvcc" QUANTKV_CUDA_ARCHS=80,37
    says fail "CUDA_COMPUTE_CAP names the architecture 'x'" NVCC="$nvcc" CUDA_COMPUTE_CAP=x
    says fail "QUANTKV_STUB is 1 or 0, not 'yes'" QUANTKV_STUB=yes
    says fail 'the published crate has no' QUANTKV_SIMT=1
    says pass 'Finished' QUANTKV_STUB=1
    says pass 'Finished' DOCS_RS=1
    says pass 'Finished' NVCC="$nvcc" QUANTKV_CUDA_ARCHS=compute_90,75
    # A spill, an error; and what the compiler says of a source that is wrong.
    cat >"$crate/csrc/cuda/spill.cu" <<'CU'
__global__ void __launch_bounds__(1024, 1) spill(float *p, int n) {
  float a[128];
#pragma unroll
  for (int i = 0; i < 128; i++) a[i] = p[i * 1024 + threadIdx.x];
  for (int j = 0; j < n; j++) {
#pragma unroll
    for (int i = 0; i < 128; i++) a[i] = a[i] * a[(i + 7) % 128] + p[j];
  }
#pragma unroll
  for (int i = 0; i < 128; i++) p[i * 1024 + threadIdx.x] = a[i];
}
CU
    says fail 'A kernel spills registers' NVCC="$nvcc" QUANTKV_CUDA_ARCHS=80
    says pass 'Finished' NVCC="$nvcc" QUANTKV_CUDA_ARCHS=80 QUANTKV_ALLOW_SPILLS=1
    echo 'wrong' >"$crate/csrc/cuda/spill.cu"
    says fail 'csrc/cuda/spill.cu(1): error' NVCC="$nvcc" QUANTKV_CUDA_ARCHS=80
}

# The rules of csrc/: what a vendor's compiler has and others have not stays behind the seam.
sources() {
    local seam='^csrc/core/(amdgcn/)?(platform|prim|prim_hopper|prim_matrix|launch)\.h:'
    only_in_seam() { # pattern reason folders...
        local found
        found=$(grep -rnE --include='*.h' --include='*.cu' --include='*.hip' --include='*.cpp' -- "$1" "${@:3}" | grep -vE "$seam" | grep -vE ':[0-9]+: *(//|\*|/\*)' || true)
        [ -z "$found" ] || fail "$2:"$'\n'"$found"
    }
    only_in_seam '\basm\b' 'inline assembly outside core/prim.h and core/prim_hopper.h' csrc
    only_in_seam '<<<' 'a launch that is not QKV_LAUNCH' csrc
    only_in_seam 'extern +__shared__' 'dynamic shared memory that is not QKV_DYNAMIC_SHARED' csrc
    only_in_seam '#include *<(cuda|cub|thrust|mma|cooperative_groups|crt|nv)' 'a vendor header outside the seam' csrc
    only_in_seam '__builtin_amdgcn|__hip_|__GFX|__gfx|amdgpu_' 'a name of AMD outside csrc/core/amdgcn' csrc/core csrc/ops csrc/hopper csrc/amdgcn csrc/launch csrc/cuda
    only_in_seam '__(global|device|host|shared|constant|forceinline|launch_bounds|syncthreads|syncwarp|shfl|ballot|ldg)|threadIdx|blockIdx|blockDim|gridDim' \
        'a name of CUDA C++ in a kernel: the seam has another' csrc/core csrc/ops csrc/hopper csrc/amdgcn csrc/launch csrc/cuda csrc/hip
    local found
    found=$(grep -rnE '#include *<' csrc/ops csrc/hopper csrc/amdgcn csrc/launch csrc/cuda csrc/hip csrc/core | grep -vE "$seam" | grep -vE '<(stdint|stddef)\.h>' || true)
    [ -z "$found" ] || fail "kernels include <stdint.h> and <stddef.h> and nothing else of the system's:"$'\n'"$found"
    found=$(grep -nE '\basm\b' csrc/core/platform.h csrc/core/launch.h | grep -vE '^[^:]*:[0-9]+: *//' || true)
    [ -z "$found" ] || fail "inline assembly outside core/prim.h:"$'\n'"$found"
    echo "sources: the seam holds"
}

# What became of the kernels. Builds all architectures, unless QUANTKV_CUDA_ARCHS says otherwise.
kernels() {
    local library archs resources status=0
    library=$(scripts/build-c-library.sh --dev | tail -1)
    resources=$(cuobjdump -res-usage "$library")
    archs=$(awk '/^Fatbin/ { elf = /elf/ } /^arch = sm_/ && elf { print substr($3, 4) }' <<<"$resources" | sort -u | paste -sd' ')
    echo "code for $archs, $(stat -c %s "$library") bytes"
    # Registers of each kernel by architecture; no kernel has a stack frame (spills, or arrays indexed by a
    # variable), except where a line of the limits says how much.
    awk -v limits=scripts/kernel-limits.txt '
        BEGIN {
            while ((getline line < limits) > 0) {
                if (line ~ /^#/ || split(line, f, " ") < 3) continue
                n++; pattern[n] = f[1]; most[n] = f[2]; stack[n] = f[3]
            }
        }
        /^arch = /   { arch = substr($3, 4) }
        / Function / { name = $2; sub(/:$/, "", name) }
        /REG:/ {
            match($0, /REG:[0-9]+/);   regs = substr($0, RSTART + 4, RLENGTH - 4) + 0
            match($0, /STACK:[0-9]+/); frame = substr($0, RSTART + 6, RLENGTH - 6) + 0
            match($0, /LOCAL:[0-9]+/); local = substr($0, RSTART + 6, RLENGTH - 6) + 0
            limit = 255; frame_limit = 0
            for (i = 1; i <= n; i++) if (name ~ pattern[i]) { limit = most[i]; frame_limit = stack[i] }
            if (regs > limit)                       { print "too many registers: " name " sm_" arch ": " regs " of " limit; bad = 1 }
            if (frame + local > frame_limit)        { print "local memory: " name " sm_" arch ": " frame + local " bytes"; bad = 1 }
            if (!(arch in seen)) { seen[arch] = 1; order[++m] = arch }
            if (!(name in listed)) { listed[name] = 1; kernel[++k] = name }
            table[name, arch] = regs
        }
        END {
            for (j = 1; j <= k; j++) {
                line = ""
                for (i = 1; i <= m; i++) line = line sprintf("%s%5s", i > 1 ? " " : "", ((kernel[j], order[i]) in table) ? table[kernel[j], order[i]] : "-")
                if (j == 1) { head = ""; for (i = 1; i <= m; i++) head = head sprintf("%s%5s", i > 1 ? " " : "", order[i]); print "registers\n" head }
                print line "  " kernel[j]
            }
            if (k == 0) { print "no kernels"; bad = 1 }
            exit bad
        }' <<<"$resources" || status=1
    # Instructions that must be there: the code paths they stand for were compiled in.
    local arch sass products
    scripts/check_products.py --self-test
    for arch in $archs; do
        products=(cat)
        case $arch in 90*) products=(scripts/check_products.py --echo) ;; esac
        # Products and conversions alone: all instructions are a million lines.
        sass=$(cuobjdump -sass -arch "sm_$arch" "$library" | "${products[@]}" |
            { grep -oE ' (HGMMA|HMMA|F2FP)\.[A-Z0-9_.x]+' || true; } | sort | uniq -c) || status=1 # sm_75 has none
        has() { grep -qE " $1" <<<"$sass" || { echo "sm_$arch has no $1: $2"; status=1; }; }
        case $arch in
            75) ;;
            90*)
                has 'HGMMA\.64x128x16\.F32$' 'products of warpgroups'
                has 'HGMMA\.64x32x16\.F32$' 'those of the wide decode kernel'
                ;;&
            *) has 'HMMA\.16816\.F32(\.BF16)?$' 'products by tensor cores' ;;
        esac
        case $arch in
            75 | 80 | 86 | 87) ! grep -qE 'E4M3' <<<"$sass" || { echo "sm_$arch has FP8 conversions?"; status=1; } ;;
            *)
                has 'F2FP\.(SATFINITE\.)?E4M3' 'encoding E4M3 by instruction'
                has 'F2FP\.F16\.E4M3' 'decoding E4M3 by instruction'
                ;;
        esac
    done
    [ $status = 0 ] || fail "the kernels are not as they should be"
}

PATH=$CUDA_HOME/bin:$PATH
[ $# -gt 0 ] || set -- messages sources kernels
for part in "$@"; do "$part"; done
