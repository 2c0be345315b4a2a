#!/usr/bin/env python3
"""Plants bugs in the CUDA kernels, one at a time, and fails if the tests do not notice.

    scripts/simt.sh [--sanitize] -- scripts/check_mutations.py [--list] [--some] [WORD ..]

testing/mutations.toml lists them: a text that occurs once in a file, what it becomes, and the tests that must
fail; `capability`: on a device of that one; `multiprocessors`: of so many. Those marked `sanitize` only show to
AddressSanitizer and are for --sanitize; the others run without. WORDs choose by a part of the name; --some (CI) takes
those marked `ci`, and plants a bug of decode in one format's kernels. A test is run in several orders until it fails.

The tests are built once. For a mutation, the kernel sources are copied, changed and compiled by the commands that the
build left beside its objects; the changed library stands before the right one on the loader's path.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

# Objects that hold the same kernels for one format each: with --some only the last of these, which tests use most.
FORMATS = ("_packed_fp8", "_packed_16_bit", "_e5m2", "_f16", "_bf16", "_e4m3")
ROOT = Path(__file__).resolve().parent.parent
ORDERS = ["forward", "reverse", "2", "3"]
TEST_SECONDS = 300
LIBRARY = "libquantkv_cuda.so"
SANITIZED = os.environ.get("QUANTKV_SIMT_LIBRARY")  # the folder of that with the sanitizers in it, under --sanitize


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if os.environ.get("QUANTKV_SIMT") != "1":
        sys.exit(__doc__)
    sanitize = SANITIZED is not None
    listed = tomllib.loads((ROOT / "testing/mutations.toml").read_text())["mutation"]
    for mutation in listed:
        check_entry(mutation)
    chosen = [m for m in listed if m.get("sanitize", False) == sanitize and (not words or any(w in m["name"] for w in words))]
    some = "--some" in sys.argv
    if some:
        chosen = [m for m in chosen if m.get("ci", False)]
    if "--list" in sys.argv:
        print("\n".join(f"{m['name']}: {', '.join(m['tests'])}" for m in chosen))
        return
    if not chosen:
        sys.exit("no mutation has that name")
    build = Build(sorted({test for m in chosen for test in m["tests"]}))

    survivors = []
    with tempfile.TemporaryDirectory(prefix="quantkv-mutations-") as folder:
        # Linked as the changed ones will be: a test that fails for another reason than a bug fails here already.
        right = link(build, build.objects, Path(folder) / "right")
        needed = {pair for m in chosen for pair in tests_of(m)}
        for test, filter in sorted(pair for pair in needed if not pair[1] or (pair[0], "") not in needed):
            # CI has just run these in every order: that they pass as linked here is all it must see.
            seen = first_failure(build, right, [(test, filter)], orders=ORDERS[:1] if some else ORDERS)
            if seen:
                sys.exit(f"{test} {filter} fails without a mutation ({seen})")
        for mutation in chosen:
            began = time.monotonic()
            try:
                seen = first_failure(build, mutate(build, mutation, Path(folder), some), tests_of(mutation), mutation)
            except CompileError as error:
                sys.exit(f"{mutation['name']}: the changed source does not compile:\n{error}")
            print(f"{'caught  ' if seen else 'SURVIVED'} {mutation['name']} [{time.monotonic() - began:.0f} s]"
                  f"{': ' + seen if seen else ''}", flush=True)
            if not seen:
                survivors.append(mutation["name"])
    print(f"{len(chosen)} mutations, {len(survivors)} survived")
    sys.exit(1 if survivors else 0)


class CompileError(Exception):
    pass


def check_entry(mutation):
    """A list that no longer matches the sources is an error, not a survivor."""
    text = (ROOT / mutation["file"]).read_text()
    count = text.count(mutation["find"])
    if count != 1:
        sys.exit(f"mutations.toml, {mutation['name']}: the text to find occurs {count} times in {mutation['file']}")


def tests_of(mutation):
    """("parity_attention", "windows") of "parity_attention::windows"."""
    return [tuple((test + "::").split("::")[:2]) for test in mutation["tests"]]


class Build:
    """The test programs, the objects of the library of kernels, and the commands that made them."""

    def __init__(self, tests):
        features = os.environ.get("QUANTKV_TEST_FEATURES", "cuda")
        command = ["cargo", "test", "--features", features, "--no-run", "--message-format=json-render-diagnostics"]
        for test in sorted({test.split("::")[0] for test in tests}):
            command += ["--test", test]
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
        self.programs, out_dir = {}, None
        for line in output.splitlines():
            message = json.loads(line)
            if message["reason"] == "compiler-artifact" and message.get("executable"):
                self.programs[message["target"]["name"]] = message["executable"]
            if message["reason"] == "build-script-executed" and "quantkv" in message["package_id"]:
                if (Path(message["out_dir"]) / LIBRARY).is_file():
                    out_dir = Path(message["out_dir"])
        objects = Path(os.environ.get("QUANTKV_OBJECT_DIR", SANITIZED or out_dir))
        folder = max(filter(is_of_this_kind, objects.glob("*/scheduler.cmd")), key=lambda file: file.stat().st_mtime).parent
        self.objects = {file.stem: file for file in folder.glob("*.o")}
        self.commands = {file.stem: shlex.split(file.read_text()) for file in folder.glob("*.cmd")}

    def depends_on(self, stem, file):
        rule = self.objects[stem].with_suffix(".d").read_text().replace("\\\n", " ")
        return any(os.path.normpath(word) == file for word in rule.split())


def is_of_this_kind(record):
    """Whether these objects are of the build at hand: one folder holds those of other architectures and sanitizers too."""
    words = shlex.split(record.read_text())
    sanitized = any(word.startswith("-fsanitize") for word in words)
    if sanitized != (SANITIZED is not None):
        return False
    return f"-DQUANTKV_SIMT_ARCH={os.environ['QUANTKV_SIMT_ARCH']}" in words


def mutate(build, mutation, folder, some):
    """Makes the library with the bug in it. Its folder."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for part in ["csrc", "testing/simt"]:
        shutil.copytree(ROOT / part, tree / part)
    file = tree / mutation["file"]
    file.write_text(file.read_text().replace(mutation["find"], mutation["replace"]))
    objects, running = dict(build.objects), []
    for stem, command in build.commands.items():
        if not build.depends_on(stem, mutation["file"]) or (some and stem.endswith(FORMATS[:-1])):
            continue
        object = folder / f"{stem}.o"
        command = list(command)
        command[command.index("-o") + 1] = str(object)
        command[command.index("-MF") + 1] = str(object.with_suffix(".d"))
        running.append(start(command + ["-O1", "-w"], tree))
        objects[stem] = object
        if len(running) == 2:
            finish(running.pop(0))
    for process in running:
        finish(process)
    return link(build, objects, folder / "lib")


def link(build, objects, folder):
    """Makes the library of these objects in `folder`, and answers that."""
    command = next(iter(build.commands.values()))
    sanitizers = [flag for flag in command if "sanitize" in flag]
    folder.mkdir(exist_ok=True)
    finish(start([command[0], "-shared", *sanitizers, *map(str, objects.values()), "-ldl", "-o", str(folder / LIBRARY)], ROOT))
    return folder


def start(command, folder):
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate()
    if process.returncode != 0:
        raise CompileError(output)


def first_failure(build, library, tests, device={}, orders=ORDERS):
    """What noticed: the test, the order, and its words. None if nothing did."""
    for order in orders:
        for test, filter in tests:
            environment = dict(os.environ, QUANTKV_SIMT_ORDER=order, QUANTKV_TEST_DEVICES="cuda")
            for name, variable in [("capability", "QUANTKV_SIMT_CC"), ("multiprocessors", "QUANTKV_SIMT_MULTIPROCESSORS")]:
                if name in device:
                    environment[variable] = str(device[name])
            environment["LD_LIBRARY_PATH"] = f"{library}:{environment['LD_LIBRARY_PATH']}"
            environment["QUANTKV_SIMT_LIBRARY"] = str(library)  # what scripts/simt.sh runs sanitized tests with looks there
            runner = [value for name, value in environment.items() if name.startswith("CARGO_TARGET_") and name.endswith("_RUNNER")]
            if seen := failure_of([*runner, build.programs[test]], test, filter, order, environment):
                return seen
    return None


def failure_of(program, test, filter, order, environment):
    """What one run of a test says against the code, or None. Shared with check_rocm_mutations.py."""
    environment = dict(environment, PROPTEST_DISABLE_FAILURE_PERSISTENCE="true", PROPTEST_MAX_SHRINK_ITERS="0", RUST_BACKTRACE="0")
    try:
        result = subprocess.run([*program, *([filter] if filter else [])], cwd=ROOT, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{test}, order {order}: no end after {TEST_SECONDS} s"
    output = result.stdout.decode(errors="replace")
    if result.returncode != 0:
        return f"{test}, order {order}: {telling_line(output)}"
    if "running 0 tests" in output:
        sys.exit(f"{test} has no test named {filter}")
    return None


def telling_line(output):
    """The line of a test's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for sign in ["simt: kernel", "amd: ", "ERROR: AddressSanitizer", "runtime error:", "panicked at"]:
        for line, after in zip(lines, lines[1:] + [""]):
            if sign in line:
                return (after if sign == "panicked at" else line)[:160]
    return lines[-1][:160] if lines else ""


if __name__ == "__main__":
    main()
