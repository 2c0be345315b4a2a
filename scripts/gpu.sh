#!/usr/bin/env bash
# Tests and benches for a machine with a GPU, made on one without.
#
#   scripts/gpu.sh build [--alone]   here: needs cargo and nvcc (scripts/get-cuda.sh, CUDA_HOME); fills .gpu/, which git
#                                    ignores: stripped test and bench programs, conformance tests, shared libraries.
#                                    --alone: and the fixtures and sources, so that .gpu/ needs no checkout around it
#   scripts/gpu.sh run               there: facts, conformance, tests, compute-sanitizer, the quick bench
#   scripts/gpu.sh test | sanitize | bench [ARGS] | peers [ARGS] | model [ARGS] | profile [WORDS]
#                                    there: one of these; ARGS go to the bench, scripts/peers.py or generate
#   scripts/gpu.sh emulate [FLAGS]   here: conformance, and the bench's small shapes, over the emulator; no GPU, no nvcc;
#                                    FLAGS go to scripts/simt.sh
#
# There needs: a driver for CUDA 13; compute-sanitizer, ncu and PyTorch where a step uses them (else it is skipped). No
# cargo, no network. Every step has a limit of its own and what is left of GPU_BUDGET seconds (570); the rest goes on
# after a failure; a table of all steps comes last. Logs go to $OUT (else .gpu/logs).
#
#   QUANTKV_CUDA_ARCHS   as for build.rs; 90a by default here
#   GPU_TESTS            names of tests/*.rs to take along; by default those that use a CUDA device
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
gpu=$root/.gpu
if [ -e "$root/made-by-gpu.sh" ]; then gpu=$(cd "$root/.." && pwd); fi # this is .gpu/tree
verb=${1:-help}
[ $# -eq 0 ] || shift

# ---- here ------------------------------------------------------------------------------------------------

# The executables of the test and bench targets that the arguments select, "name path" lines, as cargo's messages say.
executables() {
    cargo test "$@" --locked --release --features cuda --no-run --message-format=json-render-diagnostics |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}

build() {
    cd "$root"
    export CARGO_INCREMENTAL=0 QUANTKV_CUDA_ARCHS=${QUANTKV_CUDA_ARCHS:-90a}
    local nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/nvcc}} name path arch tests
    nvcc=${nvcc:-nvcc}
    tests=${GPU_TESTS:-$(grep -lE 'cuda|mod devices;' tests/*.rs | sed 's|tests/||; s|\.rs$||' |
        grep -vxE 'build_script|mock_driver' | tr '\n' ' ')}
    echo "tests: ${tests:-none}"
    rm -rf "$gpu"
    mkdir -p "$gpu/release/deps" "$gpu/release/examples" "$gpu/lib"

    # The layout of a target folder: tests look for example programs beside themselves.
    local select=()
    for name in $tests; do select+=(--test "$name"); done
    if [ ${#select[@]} -gt 0 ]; then
        executables "${select[@]}" | while read -r name path; do
            strip -o "$gpu/release/deps/$name" "$path"
        done
    fi
    cargo build --locked --release --features cuda --example generate --example calibrate --example accuracy
    for name in generate calibrate accuracy; do
        strip -o "$gpu/release/examples/$name" "${CARGO_TARGET_DIR:-target}/release/examples/$name"
    done
    executables --bench cuda | while read -r name path; do
        strip -o "$gpu/release/deps/bench-$name" "$path"
    done

    echo "conformance, ceilings, the C library"
    local gencode=()
    for arch in ${QUANTKV_CUDA_ARCHS//,/ }; do gencode+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
    local flags=(-std=c++17 -O3 -Icsrc)
    "$nvcc" "${flags[@]}" "${gencode[@]}" testing/conformance/*.cu -o "$gpu/conformance"
    # As PTX for the oldest device: the driver compiles it for the one at hand, so that the ways without FP8
    # instructions and asynchronous copies run on hardware too.
    "$nvcc" "${flags[@]}" -gencode arch=compute_75,code=compute_75 testing/conformance/*.cu -o "$gpu/conformance-sm75"
    "$nvcc" "${flags[@]}" "${gencode[@]}" -shared -Xcompiler -fPIC,-fvisibility=hidden csrc/bench/ceilings.cu \
        -o "$gpu/release/deps/libquantkv_bench.so"
    scripts/build-c-library.sh "$gpu/lib" >/dev/null
    strip "$gpu"/conformance* "$gpu"/lib/*.so "$gpu"/release/deps/*.so

    if [ "${1:-}" = --alone ]; then
        mkdir -p "$gpu/tree"
        cp -a --parents csrc tests/fixtures models examples scripts README.md "$gpu/tree"
        touch "$gpu/tree/made-by-gpu.sh"
    fi
    pack
    {
        echo "root=$root" # compiled into the tests
        echo "commit=$(git rev-parse --short HEAD)$([ -z "$(git status --porcelain -uno)" ] || echo ' and changes')"
        echo "archs=$QUANTKV_CUDA_ARCHS"
        echo "nvcc=$("$nvcc" --version | sed -n 's/.*release //p')"
        echo "tests=$tests"
    } >"$gpu/facts"
    du -ah --max-depth=3 "$gpu" | sort -h | tail -25
    local bytes tracked
    bytes=$(du -sb "$gpu" | cut -f1)
    tracked=$(git ls-files -z | du -cb --files0-from=- | tail -1 | cut -f1)
    echo "$((bytes >> 20)) MiB in .gpu, $((tracked >> 20)) MiB tracked"
    [ $((bytes + tracked)) -lt $((60 << 20)) ] || echo "WARNING: together more than 60 MiB"
}

# The programs have most of their bytes in common: together they shrink to about a sixth.
pack() {
    python3 - "$gpu" <<'PYTHON'
import lzma, os, sys, tarfile
folder = sys.argv[1]
filters = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": 64 << 20}]
with lzma.open(os.path.join(folder, "programs.tar.xz"), "wb", filters=filters) as packed:
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(os.path.join(folder, "release"), arcname="release")
PYTHON
    rm -rf "$gpu/release"
}

unpack() {
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1] + "/programs.tar.xz").extractall(sys.argv[1])' "$gpu"
}

# Conformance over the emulator for devices old and new, then small shapes of the bench.
emulate() {
    cd "$root"
    local out=${CARGO_TARGET_DIR:-target}/simt-conformance arch
    mkdir -p "$out"
    for arch in 75 80 90; do scripts/simt.sh --arch "$arch" --self-test; done
    local flags=(-std=c++20 -O1 -Wall -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off -fPIC -DQUANTKV_SIMT)
    "${CXX:-c++}" "${flags[@]}" -DQUANTKV_SIMT_ARCH=90 -Itesting -Icsrc -shared -Wl,-Bsymbolic -x c++ csrc/bench/*.cu \
        -x none testing/simt/*.cpp -o "$out/libquantkv_bench.so"
    QUANTKV_BENCH_LIBRARY=$(cd "$out" && pwd)/libquantkv_bench.so \
        scripts/simt.sh "$@" -- cargo test --locked --features "${QUANTKV_TEST_FEATURES:-cuda}" --bench cuda -- --verify-only
}

# ---- there -----------------------------------------------------------------------------------------------

budget=${GPU_BUDGET:-570}
rows=()

# step NAME LIMIT COMMAND...: runs it within the limit, keeps its output in a log, notes PASS or FAIL.
step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS status=0 verdict
    shift 2
    if [ "$left" -lt 5 ]; then
        rows+=("$(printf '%-34s %-8s' "$name" 'NOT RUN')")
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    printf '\n=== %s\n' "$name"
    # In the foreground of this script, so that a limit ends all of it; the log is whole whatever happens.
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
    case $status in
        0) verdict=PASS ;;
        124 | 137) verdict="TIMEOUT" ;;
        *) verdict="FAIL $status" ;;
    esac
    if grep -qiE '^ *skipped' "$logs/$name.log" && [ $status = 0 ]; then verdict="SKIPPED?"; fi
    if [ $status = 0 ]; then tail -n "${keep:-3}" "$logs/$name.log"; else tail -n 30 "$logs/$name.log"; fi
    rows+=("$(printf '%-34s %-8s %4ss  %s' "$name" "$verdict" $((SECONDS - start)) "$(summary "$name")")")
}

# A line that says how much a step did.
summary() {
    grep -hE 'test result:|checks, .* failed|ERROR SUMMARY|shapes failed|RACECHECK SUMMARY|geometric mean' "$logs/$1.log" |
        tail -1 | sed 's/^=* *//' | cut -c1-90
}

# Where logs go, what the programs need, one folder they were compiled to look in.
prepare() {
    . <(grep -E '^(commit|archs|nvcc|tests)=' "$gpu/facts" | sed 's/=\(.*\)/="\1"/')
    local made_in
    made_in=$(sed -n 's/^root=//p' "$gpu/facts")
    [ -d "$gpu/release" ] || unpack
    [ -d "$gpu/tree" ] && tree=$gpu/tree || tree=$root
    if [ ! -e "$made_in" ]; then
        mkdir -p "$(dirname "$made_in")"
        ln -s "$tree" "$made_in"
    fi
    cd "$tree"
    out=${OUT:-$gpu/logs}
    logs=$out/logs
    mkdir -p "$logs"
    export QUANTKV_FIXTURES=$tree/tests/fixtures QUANTKV_TEST_DEVICES=cuda
    export QUANTKV_REQUIRE_CUDA=1 QUANTKV_BENCH_LIBRARY=$gpu/release/deps/libquantkv_bench.so OUT="$out"
    export PATH=$PATH:/usr/local/cuda/bin
    # cuBLASLt as PyTorch brings it, for the decoder.
    local cublas
    cublas=$(python3 -c 'import glob, site
print(":".join(f.rsplit("/", 1)[0] for d in site.getsitepackages() for f in glob.glob(d + "/nvidia/*/lib/libcublasLt.so*")))' || true)
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64:$cublas
    bench=$gpu/release/deps/bench-cuda
}

facts() {
    echo "commit $commit, built for $archs with nvcc $nvcc"
    date -u +'%Y-%m-%d %H:%M UTC'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.limit --format=csv ||
        echo 'no nvidia-smi'
    uname -r
    "$bench" --verify-only no-such-shape
}

conformance() {
    step conformance 60 "$gpu/conformance"
    step conformance-sm75 90 "$gpu/conformance-sm75"
}

tests() {
    local name
    for name in $tests; do
        [ -x "$gpu/release/deps/$name" ] || continue
        step "$name" 120 "$gpu/release/deps/$name"
    done
    # The bundled model in f32, where both devices owe the same greedy tokens.
    step generate 60 bash -c '
        text() { "$0" --activations f32 --temperature 0 --max-tokens 60 --json "$@" | grep -o "\"text\":\"[^\"]*\""; }
        cpu=$(text --device cpu) && cuda=$(text --device cuda) && echo "$cpu" && echo "$cuda" && [ "$cpu" = "$cuda" ]
    ' "$gpu/release/examples/generate"
    keep=40 step programs 100 python3 "$root/scripts/check_programs.py" "$gpu/release/examples" cuda
}

# Decode steps of a model of 8 billion made-up weights, over caches of bf16 and of FP8.
model() {
    local dtype length
    for length in 1024 8192 32768; do
        for dtype in auto fp8_e4m3; do
            keep=20 step "llama-3.1-8b-$dtype-$length" 120 "$gpu/release/examples/generate" --device cuda \
                --random-weights llama-3.1-8b --prompt-length "$length" --max-prefill-tokens 2048 --max-tokens 64 \
                --ignore-eos --kv-cache-dtype "$dtype" "$@"
        done
    done
}

# Small shapes of every operation, hostile tables and graphs, with every access looked at.
sanitizers() {
    local tool name
    command -v compute-sanitizer >/dev/null || { rows+=("sanitizers                         SKIPPED   no compute-sanitizer"); return; }
    local run=(env PROPTEST_CASES=4 compute-sanitizer --error-exitcode 9 --print-limit 20 --report-api-errors no)
    step memcheck-bench 100 "${run[@]}" --tool memcheck "$bench" --verify-only
    for name in hostile_data cuda; do
        [ -x "$gpu/release/deps/$name" ] || continue
        step "memcheck-$name" 120 "${run[@]}" --tool memcheck "$gpu/release/deps/$name" --test-threads 1
    done
    step memcheck-conformance 60 "${run[@]}" --tool memcheck "$gpu/conformance" --step 100003
    for tool in initcheck synccheck; do
        step "$tool-bench" 100 "${run[@]}" --tool "$tool" "$bench" --verify-only
    done
    # Neither prefill nor the instructions it is made of: racecheck takes accesses that arrivals order (one lane at a
    # barrier in shared memory for its warp, bar.arrive before another group's bar.sync) for races.
    step racecheck-bench 100 "${run[@]}" --tool racecheck "$bench" --verify-only decode schedule cache_write copy_blocks
    step racecheck-conformance 60 "${run[@]}" --tool racecheck "$gpu/conformance" --step 1000003 \
        arithmetic conversions fp8 matrix memory
}

# The counters of one launch of each operation that the words select.
profile() {
    command -v ncu >/dev/null || { rows+=("profile                            SKIPPED   no ncu"); return; }
    keep=60 step profile 280 ncu --clock-control none --set basic --section MemoryWorkloadAnalysis --section WarpStateStats \
        --section LaunchStats --section Occupancy --kernel-name-base demangled --launch-count "${NCU_LAUNCHES:-12}" \
        --kernel-name 'regex:attention|cache_write|copy_blocks' "$bench" --replays 1 "$@"
}

# One file of all logs: few files come back from some machines.
finish() {
    {
        printf '%-34s %-8s %s\n' step result time
        printf '%s\n' "${rows[@]}"
    } >"$out/summary.txt"
    local log
    for log in "$logs"/*.log; do printf '\n######## %s\n' "$(basename "$log" .log)"; cat "$log"; done >"$out/logs.txt"
    rm -rf "$logs"
    printf '\n'
    cat "$out/summary.txt"
    ! grep -qE ' (FAIL|TIMEOUT|NOT RUN|SKIPPED\?)' "$out/summary.txt"
}

case $verb in
    build) build "$@" ;;
    emulate) emulate "$@" ;;
    run | test | sanitize | bench | peers | model | profile)
        prepare
        set +e
        keep=40 step facts 60 bash "$root/scripts/gpu.sh" facts
        case $verb in
            run) conformance; tests; sanitizers; keep=200 step bench 170 "$bench" --quick ;;
            test) conformance; tests ;;
            sanitize) sanitizers ;;
            bench) keep=300 step bench 560 "$bench" "$@" ;;
            peers) keep=200 step peers 560 python3 "$tree/scripts/peers.py" --ours "$gpu/lib/libquantkv_cuda.so" \
                --ceilings "$QUANTKV_BENCH_LIBRARY" --out "$out" "$@" ;;
            model) model "$@" ;;
            profile) profile "$@" ;;
        esac
        finish
        ;;
    facts) prepare; facts ;;
    *) sed -n '2,24s/^# \{0,1\}//p' "$0"; [ "$verb" = help ] ;;
esac
