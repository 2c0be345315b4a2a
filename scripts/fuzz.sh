#!/usr/bin/env bash
# Fuzzes the reader of KV scales for a minute, guided by coverage, on the stable toolchain: libFuzzer with LLVM's
# coverage instrumentation, without a sanitizer, which would need nightly. Seeds are of real checkpoints (fuzz/seeds).
#   scripts/fuzz.sh [SECONDS]      60 unless said
#   scripts/fuzz.sh FILE...        replays what was found
set -euo pipefail
files=()
seconds=60
for argument in "$@"; do
    if [ -f "$argument" ]; then files+=("$(realpath "$argument")"); else seconds=$argument; fi
done
cd "$(dirname "$0")/../fuzz"

# What `cargo fuzz build --sanitizer none` passes. --target keeps it away from build scripts, which have no libFuzzer.
host=$(rustc -vV | sed -n 's/^host: //p')
flags=(--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares)
RUSTFLAGS="${flags[*]}" cargo build --locked --release --target "$host" --target-dir target
fuzzer=target/$host/release/checkpoint

memory=/dev/shm
[ -w "$memory" ] || memory=${TMPDIR:-/tmp}
work=$(mktemp -d -p "$memory")
trap 'rm -rf "$work"' EXIT
export QUANTKV_FUZZ_DIR=$work/checkpoint
if [ ${#files[@]} != 0 ]; then
    "$fuzzer" "${files[@]}"
    exit
fi

mkdir -p artifacts "$work/corpus"
status=0
"$fuzzer" "$work/corpus" seeds/checkpoint -dict=checkpoint.dict -max_total_time="$seconds" -seed=2026 -max_len=16384 -timeout=10 \
    -rss_limit_mb=2048 -artifact_prefix=artifacts/ -print_final_stats=1 >"$work/log" 2>&1 || status=$?
grep -E 'INITED|DONE|^stat::number_of_executed_units|^stat::average_exec' "$work/log" || true
if [ "$status" != 0 ]; then
    grep -E 'panicked|^assertion|left:|right:|^==|ERROR|SUMMARY|Test unit written' -A1 "$work/log" | head -60 || tail -20 "$work/log"
    echo "replay it: scripts/fuzz.sh fuzz/artifacts/FILE"
    exit 1
fi
# Without its instrumentation the fuzzer would run blind and find as much.
coverage=$(sed -n 's/.*INITED cov: \([0-9]*\).*/\1/p' "$work/log")
[ "${coverage:-0}" -gt 300 ] || { echo "the seeds reach ${coverage:-no} edges: the instrumentation is missing"; exit 1; }
