"""Measures how often a model recalls a fact of a tale, for each KV cache format.

Runs the `generate` example over fresh tales (scripts/tales.py) and counts the answers that repeat
the fact word for word. Prints a Markdown table.

    cargo build --release --example generate
    python3 scripts/recall.py --count 200

Tales of training are drawn from other seeds.
"""

import argparse
import json
import pathlib
import random
import subprocess
import tempfile

import tales

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(program, model, prompts, dtype, extra):
    """Greedy answers up to the first full stop, and the lengths of the prompts in tokens."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(prompts))
        file.flush()
        command = [program, "--prompts-file", file.name, "--kv-cache-dtype", dtype, "--temperature", "0"]
        command += ["--max-tokens", "20", "--stop", ".", "--json", *extra]
        if model:
            command += ["--model", model]
        result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    answers = [request["outputs"][0]["text"] for request in result["requests"]]
    return answers, [len(request["prompt_token_ids"]) for request in result["requests"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default=str(ROOT / "target/release/examples/generate"))
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--count", type=int, default=200, help="tales for each number of facts and fillers")
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 4, 8, 12])
    parser.add_argument("--fillers", type=int, nargs="+", default=[0, 20, 50, 100])
    parser.add_argument("--dtypes", nargs="+", default=["auto", "fp8_e4m3", "fp8_e5m2"])
    parser.add_argument("--calculate-kv-scales", action="store_true")
    parser.add_argument("--seed", type=int, default=20260101)
    args = parser.parse_args()
    extra = ["--calculate-kv-scales"] if args.calculate_kv_scales else []

    print("| facts | tokens | " + " | ".join(args.dtypes) + " |", flush=True)
    print("|---|---|" + "---|" * len(args.dtypes), flush=True)
    for facts in args.facts:
        for fillers in args.fillers:
            rng = random.Random(f"{args.seed} {facts} {fillers}")
            cases = [tales.recall_case(rng, facts, fillers) for _ in range(args.count)]
            cells = []
            for dtype in args.dtypes:
                answers, lengths = run(args.program, args.model, [prompt for prompt, _ in cases], dtype, extra)
                right = sum(f"{got}." == f" {answer}" for got, (_, answer) in zip(answers, cases))
                cells.append(f"{right}/{args.count}")
            print(f"| {facts} | {min(lengths)}-{max(lengths)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
