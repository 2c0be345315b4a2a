#!/usr/bin/env python3
"""Plants bugs in AMD's device code, one at a time, and fails if the tests do not notice.

    scripts/amd.sh --arch ARCH -- scripts/check_rocm_mutations.py [--list] [--some] [WORD ..]

testing/mutations_rocm.toml lists them; those that cannot show on ARCH are left out; WORDs choose by a part of the name,
--some (CI) those marked `some`. A test is run in several orders until it fails, with few random cases, the same ones
every time.

The tests are built once, with the right code in the library: under scripts/amd.sh what runs is the retargeted code in
the stand-in runtime. For a mutation the sources and the objects made from them are copied, and scripts/amd.sh makes
the runtime again there, unoptimized: only what includes the changed file is compiled, and of that only the mutation's
`sources` where it names them, the code objects that its tests use.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from check_mutations import ORDERS, ROOT, failure_of, tests_of

# What is noticed is noticed soon: a mutation that takes more cases is one that the tests hardly see.
CASES = {"PROPTEST_CASES": "24", "PROPTEST_RNG_SEED": "81"}


def main():
    arch = os.environ.get("QUANTKV_AMD_ARCH")
    if arch is None:
        sys.exit(__doc__)
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    listed = tomllib.loads((ROOT / "testing/mutations_rocm.toml").read_text())["mutation"]
    for mutation in listed:
        check_entry(mutation)
    chosen = [m for m in listed if arch in m.get("archs", [arch]) and (not words or any(word in m["name"] for word in words))]
    if "--some" in sys.argv:
        chosen = [m for m in chosen if m.get("some", False)]
    if "--list" in sys.argv:
        print("\n".join(f"{m['name']}: {', '.join(m['tests'])}" for m in chosen))
        return
    if not chosen:
        sys.exit("no mutation has that name")
    programs = build_tests(sorted({test for m in chosen for test, _ in tests_of(m)}))
    runtime = Path(os.environ["QUANTKV_AMD_RUNTIME"])
    needed = {pair for m in chosen for pair in tests_of(m)}
    for test in sorted(pair for pair in needed if not pair[1] or (pair[0], "") not in needed):
        if seen := first_failure(programs, runtime, [test], ["forward"]):
            sys.exit(f"{'::'.join(test)} fails without a mutation ({seen})")

    survivors = []
    with tempfile.TemporaryDirectory(prefix="quantkv-rocm-mutations-") as folder:
        for mutation in chosen:
            began = cpu_seconds()
            changed = mutate(arch, runtime, mutation, Path(folder) / "tree")
            made = cpu_seconds()
            seen = first_failure(programs, changed, tests_of(mutation), ORDERS)
            print(f"{'caught  ' if seen else 'SURVIVED'} {mutation['name']} [CPU {made - began:.0f} + {cpu_seconds() - made:.0f} s]"
                  f"{': ' + seen if seen else ''}", flush=True)
            if not seen:
                survivors.append(mutation["name"])
    print(f"{arch}: {len(chosen)} mutations, {len(survivors)} survived, {cpu_seconds():.0f} s of CPU time")
    sys.exit(1 if survivors else 0)


def check_entry(mutation):
    """A list that no longer matches the sources is an error, not a survivor."""
    count = (ROOT / mutation["file"]).read_text().count(mutation["find"])
    if count != 1:
        sys.exit(f"mutations_rocm.toml, {mutation['name']}: the text to find occurs {count} times in {mutation['file']}")
    for source in mutation.get("sources", []):
        if not (ROOT / f"csrc/hip/{source}.hip").is_file():
            sys.exit(f"mutations_rocm.toml, {mutation['name']}: there is no csrc/hip/{source}.hip")


def build_tests(names):
    features = os.environ.get("QUANTKV_TEST_FEATURES", "rocm")
    command = ["cargo", "test", "--locked", "--features", features, "--no-run", "--message-format=json-render-diagnostics"]
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
    objects = list((made / arch).glob("*.o"))
    keeps = [object for object in objects if object.stem not in mutation.get("sources", [object.stem])]
    # The changed file is newer than all objects but those that keep the right code. Not by the clock, which stands still
    # between two quick writes.
    newest = max(object.stat().st_mtime_ns for object in objects)
    file = tree / mutation["file"]
    file.write_text(file.read_text().replace(mutation["find"], mutation["replace"]))
    os.utime(file, ns=(newest + 1_000_000, newest + 1_000_000))
    for object in keeps:
        os.utime(object, ns=(newest + 2_000_000, newest + 2_000_000))
    before = {object: object.stat().st_mtime_ns for object in objects}
    command = [tree / "scripts/amd.sh", "--arch", arch, "--target-dir", tree / "target", "--prepare", "--quick"]
    result = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{mutation['name']}: the changed source does not compile:\n{result.stdout}")
    changed = {object.stem for object, time in before.items() if object.stat().st_mtime_ns != time}
    if not changed or changed != set(mutation.get("sources", changed)):
        sys.exit(f"{mutation['name']}: of its sources only {sorted(changed)} have {mutation['file']} in them")
    return made / arch


def first_failure(programs, runtime, tests, orders):
    """What noticed: the test, the order, and its words. None if nothing did."""
    for order in orders:
        for test, filter in tests:
            environment = dict(os.environ, **CASES, QUANTKV_AMD_ORDER=order, QUANTKV_TEST_DEVICES="rocm",
                               LD_LIBRARY_PATH=f"{runtime}:{os.environ['LD_LIBRARY_PATH']}")
            if seen := failure_of([programs[test]], test, filter, order, environment):
                return seen
    return None


def cpu_seconds():
    """Of the commands that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


main()
