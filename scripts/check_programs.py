#!/usr/bin/env python3
"""Runs calibrate and accuracy on a device and on the CPU, and fails where their answers differ.

    scripts/check_programs.py FOLDER DEVICE [PROGRAM] [--small]

FOLDER holds the example programs (target/release/examples); DEVICE is for their --device, such as cuda or rocm. Both run the
bundled model in f32, where what differs is the order of sums. So scales and perplexities must agree to 1e-4: 32-bit
sums over 256 to 1024 products, each good to 2^-24, through four layers. What FP8 costs (KL) hangs on codes that such a
difference flips; it must agree to a fifth. --small is for the emulators. PROGRAM: calibrate or accuracy, not both.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMS = 1e-4
FLIPS = 0.2


def main():
    words = [word for word in sys.argv[1:] if word != "--small"]
    folder, device, *programs = words if len(words) in (2, 3) else sys.exit(__doc__)
    if not {*programs} <= {"calibrate", "accuracy"}:
        sys.exit(__doc__)
    for program in programs or ["calibrate", "accuracy"]:
        getattr(Check(Path(folder), device), program)("--small" in sys.argv)


class Check:
    def __init__(self, folder, device):
        self.folder, self.device = folder, device

    def both(self, program, *arguments):
        """What the program prints as JSON on the CPU, and on the device."""
        answers = []
        for device in ["cpu", self.device]:
            command = [self.folder / program, *arguments, "--json", "--device", device, "--activations", "f32"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}")
            answers.append(json.loads(done.stdout))
        cpu, other = answers
        if cpu["device"] == other["device"]:
            sys.exit(f"{program} ran on {cpu['device']} and {other['device']}")
        return cpu, other

    def calibrate(self, small):
        samples, length = ("2", "32") if small else ("16", "512")
        for strategy in ["tensor", "head", "channel"]:
            cpu, other = self.both(
                "calibrate", "--model", "models/tales-3m", "--text", "README.md", "--dry-run", "--strategy", strategy,
                "--samples", samples, "--sequence-length", length,
            )
            pairs = [
                (left, right)
                for a, b in zip(cpu["layers"], other["layers"], strict=True)
                for side in ["k", "v"]
                for left, right in zip(a[side]["scale"], b[side]["scale"], strict=True)
            ]
            worst = max(difference(*pair) for pair in pairs)
            report(f"calibrate --strategy {strategy}: {len(pairs)} scales differ by up to {worst:.1e}", worst <= SUMS)

    def accuracy(self, small):
        sizes = ["--samples", "1", "--calibration-samples", "1", "--sequence-length", "32", "--tales", "0", "--max-tokens", "2"]
        rows = ["--formats", "fp8_e4m3,fp8_e4m3_fnuz"]
        if not small:
            sizes = ["--samples", "8", "--calibration-samples", "8", "--sequence-length", "256", "--tales", "4", "--facts", "4"]
            rows = []
        cpu, other = self.both("accuracy", *sizes, *rows)
        names = [row["name"] for row in cpu["rows"]]
        if not names or names != [row["name"] for row in other["rows"]]:
            sys.exit(f"accuracy has other rows: {names}, {[row['name'] for row in other['rows']]}")
        for a, b in zip(cpu["rows"], other["rows"]):
            reference = difference(a["reference_perplexity"], b["reference_perplexity"])
            cost = difference(a["mean_kl"], b["mean_kl"])
            report(f"accuracy {a['name']}: reference perplexity differs by {reference:.1e}, KL {a['mean_kl']} by {cost:.0%}",
                   reference <= SUMS and cost <= FLIPS)


def difference(left, right):
    """Relative, of numbers that are not negative; None is a number that was not finite."""
    if left is None or right is None:
        return 0.0 if left == right else float("inf")
    return abs(left - right) / max(left, right, 1e-30)


def report(line, good):
    print(line if good else f"FAILED: {line}", flush=True)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
