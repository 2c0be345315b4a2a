#!/usr/bin/env python3
"""Turns what scripts/gpu.sh brought back into a page of docs/results.

  scripts/results.py FOLDER [FOLDER..]     writes docs/results/NAME-DATE.md, and NAME-DATE-decode.svg and .csv beside it

FOLDER holds summary.txt and logs.txt of one call of gpu.sh on a machine with a GPU, and cuda.csv, cuda.svg, peers.md as far
as that call made them. Several folders are calls on the same kind of machine; later ones win where both have a file.
Nothing is filled in by hand: what did not run is not on the page.
"""
import csv
import os
import re
import shutil
import sys


def read(folder, name):
    path = os.path.join(folder, name)
    return open(path).read() if os.path.exists(path) else ""


def section(logs, name):
    """The log of one step out of logs.txt."""
    match = re.search(rf"^######## {re.escape(name)}\n(.*?)(?=^######## |\Z)", logs, re.M | re.S)
    return match.group(1).strip() if match else ""


def bench_tables(path):
    """A markdown table for each operation of cuda.csv."""
    rows = list(csv.DictReader(open(path)))
    for operation in dict.fromkeys(row["operation"] for row in rows):
        limit = "plain read" if operation == "decode" else "plain copy"
        yield f"\n### {operation}\n"
        if operation == "prefill":
            yield "| shape | us | spread | TFLOP/s |\n|---|---:|---:|---:|"
        elif operation == "schedule":
            yield "| shape | us |\n|---|---:|"
        else:
            yield f"| shape | us | spread | MB | TB/s | {limit}, us | share of it |\n|---|---:|---:|---:|---:|---:|---:|"
        for row in rows:
            if row["operation"] != operation:
                continue
            us, spread = float(row["us"]), f"{float(row['us_fastest']):.2f}-{float(row['us_slowest']):.2f}"
            if operation == "prefill":
                yield f"| {row['shape']} | {us:.1f} | {spread} | {float(row['tflops']):.0f} |"
            elif operation == "schedule":
                yield f"| {row['shape']} | {us:.2f} |"
            else:
                ceiling = f"{float(row['limit_us']):.2f}" if row["limit_us"] else "-"
                share = f"{float(row['of_limit']):.3f}" if row["of_limit"] else "-"
                yield f"| {row['shape']} | {us:.2f} | {spread} | {int(row['bytes']) / 1e6:.1f} | {float(row['tb_per_s']):.3f} | {ceiling} | {share} |"


def main(folders):
    if not folders:
        sys.exit(__doc__)
    logs = [read(folder, "logs.txt") for folder in folders]
    facts = [section(text, "facts") for text in logs]
    told = next((text for text in facts if text), "")
    gpu = re.search(r"NVIDIA (?:GeForce |RTX )?(\S+)", told)
    date = re.search(r"\d{4}-\d\d-\d\d", told)
    if not gpu or not date:
        sys.exit("no facts of a GPU in these folders: did gpu.sh run there?")
    name = f"{gpu.group(1).strip(',').lower()}-{date.group(0)}"
    target = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "docs", "results")
    page = [f"# {gpu.group(1).strip(',')}, {date.group(0)}\n", "Made by `scripts/results.py` from the logs of `scripts/gpu.sh`; [how](README.md).\n"]
    for folder, text, fact in zip(folders, logs, facts):
        if not fact:  # tables alone, of an earlier call
            continue
        page += ["```text", fact, "```\n", "```text", read(folder, "summary.txt").strip(), "```\n"]
        failed = re.findall(r"^(FAIL .*)$", text, re.M)
        if failed:
            page += ["What conformance found:\n", "```text", *failed, "```\n"]
    with_bench = [folder for folder in folders if os.path.exists(os.path.join(folder, "cuda.csv"))]
    if with_bench:
        folder = with_bench[-1]
        log = section(logs[folders.index(folder)], "bench")
        heading = re.findall(r"^(?:empty kernel|plain read).*$", log, re.M)
        page += ["## Bench\n", *[f"* {line}" for line in heading]]
        page += [f"\nShapes: format, batch x context, queries, heads, head dim, page, layout. All: [{name}.csv]({name}.csv)."]
        shutil.copy(os.path.join(folder, "cuda.csv"), os.path.join(target, name + ".csv"))
        if os.path.exists(os.path.join(folder, "cuda.svg")):
            shutil.copy(os.path.join(folder, "cuda.svg"), os.path.join(target, name + "-decode.svg"))
            page += [f"\n![Share of a plain read of the same bytes]({name}-decode.svg)"]
        page += list(bench_tables(os.path.join(folder, "cuda.csv")))
        not_run = re.findall(r"^(?:decode|prefill|schedule|cache_write|copy_blocks|swap_blocks) .*(?:no kernel|not fit|FAILED).*$", log, re.M)
        if not_run:
            page += ["\n### Not measured\n", "```text", *not_run, "```"]
    for folder in folders:
        peers = read(folder, "peers.md")
        if peers:
            page += ["\n## Beside others, in one process\n", "Microseconds; `scripts/peers.py` says who is who.\n", peers]
    for text in logs:
        for model in re.findall(r"^######## (llama\S+)$", text, re.M):
            page += [f"\n## {model}\n", "```text", section(text, model), "```"]
    path = os.path.join(target, name + ".md")
    with open(path, "w") as file:
        file.write("\n".join(page).rstrip() + "\n")
    print(os.path.normpath(path))


if __name__ == "__main__":
    main(sys.argv[1:])
