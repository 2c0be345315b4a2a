#!/usr/bin/env python3
"""Plants bugs in AMD's device code, one at a time, and fails if the tests do not notice.

    scripts/amd.sh --arch ARCH -- scripts/check_rocm_mutations.py [--list] [WORD ..]

testing/mutations_rocm.toml lists them; those that cannot show on ARCH are left out; WORDs choose by a part of the name.
A test is run in several orders until it fails.

The tests are built once, with the right code in the library: under scripts/amd.sh what runs is the retargeted code in
the stand-in runtime. For a mutation the sources and the objects made from them are copied, and scripts/amd.sh makes
the runtime again there: only what includes the changed file is compiled.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from check_mutations import ORDERS, ROOT, failure_of, tests_of


def main():
    arch = os.environ.get("QUANTKV_AMD_ARCH")
    if arch is None:
        sys.exit(__doc__)
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    listed = tomllib.loads((ROOT / "testing/mutations_rocm.toml").read_text())["mutation"]
    for mutation in listed:
        count = (ROOT / mutation["file"]).read_text().count(mutation["find"])
        if count != 1:
            sys.exit(f"mutations_rocm.toml, {mutation['name']}: the text to find occurs {count} times in {mutation['file']}")
    chosen = [m for m in listed if arch in m.get("archs", [arch]) and (not words or any(word in m["name"] for word in words))]
    if "--list" in sys.argv:
        print("\n".join(f"{m['name']}: {', '.join(m['tests'])}" for m in chosen))
        return
    if not chosen:
        sys.exit("no mutation has that name")
    programs = build_tests(sorted({test for m in chosen for test, _ in tests_of(m)}))
    runtime = Path(os.environ["QUANTKV_AMD_RUNTIME"])
    for test in sorted({pair for m in chosen for pair in tests_of(m)}):
        if seen := first_failure(programs, runtime, [test], ["forward"]):
            sys.exit(f"{'::'.join(test)} fails without a mutation ({seen})")

    survivors = []
    with tempfile.TemporaryDirectory(prefix="quantkv-rocm-mutations-") as folder:
        for mutation in chosen:
            began = time.monotonic()
            seen = first_failure(programs, mutate(arch, runtime, mutation, Path(folder) / "tree"), tests_of(mutation), ORDERS)
            print(f"{'caught  ' if seen else 'SURVIVED'} {mutation['name']} [{time.monotonic() - began:.0f} s]"
                  f"{': ' + seen if seen else ''}", flush=True)
            if not seen:
                survivors.append(mutation["name"])
    print(f"{arch}: {len(chosen)} mutations, {len(survivors)} survived")
    sys.exit(1 if survivors else 0)


def build_tests(names):
    command = ["cargo", "test", "--locked", "--features", "rocm", "--no-run", "--message-format=json-render-diagnostics"]
    for name in names:
        command += ["--test", name]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    return {
        message["target"]["name"]: message["executable"]
        for message in messages
        if message["reason"] == "compiler-artifact" and message.get("executable")
    }


def mutate(arch, runtime, mutation, tree):
    """Makes the runtime with the bug in it. Its folder."""
    shutil.rmtree(tree, ignore_errors=True)
    for part in ["csrc", "testing/simt", "testing/amd", "scripts"]:
        shutil.copytree(ROOT / part, tree / part)
    # With their times, so that only what is older than the changed file is made again.
    made = tree / "target/amd"
    shutil.copytree(runtime, made / arch)
    shutil.copy2(runtime.parent / "retarget", made / "retarget")
    (made / arch / "libamdhip64.so.7").unlink()
    file = tree / mutation["file"]
    file.write_text(file.read_text().replace(mutation["find"], mutation["replace"]))
    command = [tree / "scripts/amd.sh", "--arch", arch, "--target-dir", tree / "target", "--prepare"]
    result = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{mutation['name']}: the changed source does not compile:\n{result.stdout}")
    return made / arch


def first_failure(programs, runtime, tests, orders):
    """What noticed: the test, the order, and its words. None if nothing did."""
    for order in orders:
        for test, filter in tests:
            environment = dict(os.environ, QUANTKV_AMD_ORDER=order, QUANTKV_TEST_DEVICES="rocm",
                               LD_LIBRARY_PATH=f"{runtime}:{os.environ['LD_LIBRARY_PATH']}")
            if seen := failure_of([programs[test]], test, filter, order, environment):
                return seen
    return None


main()
