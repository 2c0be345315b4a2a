#!/usr/bin/env bash
# generate on a ROCm device gives the tokens that it gives on the CPU: greedy ones of the bundled model, its prompt cut
# into chunks, with activations in f32 (the portable attention kernel) and bf16 (matrix cores), products by our own kernel
# and, where it must be there, by rocBLAS.
#
#   scripts/amd.sh --arch gfx942 -- scripts/check_rocm_generate.sh
#
# Or without scripts/amd.sh, on a machine with an AMD GPU (QUANTKV_REQUIRE_ROCBLAS=1: and rocBLAS).
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --locked --features "${QUANTKV_TEST_FEATURES:-rocm}" --example generate
generate=${CARGO_TARGET_DIR:-target}/debug/examples/generate
products_of=(portable)
[ "${QUANTKV_REQUIRE_ROCBLAS:-0}" != 1 ] || products_of+=(rocblas)
tokens() { # arguments of generate
    "$generate" --max-tokens 10 --max-prefill-tokens 16 --json "$@" 2>/dev/null | python3 -c '
import json, sys
run = json.load(sys.stdin)
print([output["token_ids"] for request in run["requests"] for output in request["outputs"]])'
}
for cache in auto fp8 fp8_e5m2 fp8_e4m3_fnuz; do
    expected=$(tokens --device cpu --kv-cache-dtype $cache)
    for activations in f32 bf16; do
        for products in "${products_of[@]}"; do
            got=$(tokens --device rocm --kv-cache-dtype $cache --activations $activations --products $products)
            if [ "$got" != "$expected" ] || [ "$got" = '[]' ]; then
                echo "cache $cache, activations $activations, products $products: $got, and on the CPU $expected" >&2
                exit 1
            fi
        done
    done
    echo "cache $cache: the CPU's tokens, $expected"
done
