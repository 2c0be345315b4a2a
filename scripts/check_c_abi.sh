#!/usr/bin/env bash
# The C ABI as a C programmer gets it: the shared library exports what csrc/quantkv*.h declare and nothing else,
# needs no C++ library and no CUDA library, the headers are C11 and C++, and the example compiles and either runs
# right or says that there is no device. Needs nvcc and the runtime's headers (scripts/get-cuda.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
cc=${CC:-cc} cxx=${CXX:-c++}
export CUDA_HOME=${CUDA_HOME:-$PWD/.cuda/nvidia/cu13}
strict=(-Wall -Wextra -Werror -pedantic -Icsrc)

for header in csrc/quantkv*.h; do
    "$cc" -x c -std=c11 "${strict[@]}" -fsyntax-only "$header"
    "$cxx" -x c++ -std=c++11 "${strict[@]}" -fsyntax-only "$header"
done

library=$(scripts/build-c-library.sh --dev | tail -1)
dir=$(dirname "$library")
exported=$(nm -D --defined-only "$library" | awk '{print $3}' | sort)
declared=$(cat csrc/quantkv.h csrc/quantkv_decoder.h | sed -n 's/^QUANTKV_API .*[ *]\(quantkv_[a-z0-9_]*\)(.*/\1/p' | sort)
if ! diff <(echo "$declared") <(echo "$exported"); then
    echo "the headers declare (<) what $library does not export (>)"; exit 1
fi
needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
echo "$library: $(wc -l <<<"$exported") functions, $(stat -c %s "$library") bytes, needs" $needed
if grep -vE '^(libc|libdl|libpthread|librt|libgcc_s|libm|ld-linux.*)\.so' <<<"$needed"; then
    echo "the library needs more than the C library"; exit 1
fi

"$cc" -std=c11 -O2 "${strict[@]}" -isystem "$CUDA_HOME/include" examples/c/attend.c -o "$dir/attend" \
    "-L$dir" -lquantkv_cuda "-L$CUDA_HOME/lib64" -lcudart_static -ldl -lpthread -lrt -lm
status=0
output=$(LD_LIBRARY_PATH=$dir "$dir/attend" 2>&1) || status=$?
echo "$output"
case $status in
    0) ;;
    3) grep -q 'driver version is insufficient\|no CUDA-capable device' <<<"$output" ;;
    *) echo "examples/c/attend.c answers $status"; exit 1 ;;
esac
