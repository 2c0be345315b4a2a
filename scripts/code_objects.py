#!/usr/bin/env python3
"""Takes the code objects for AMD's GPUs out of a library, and says what became of their kernels.

    scripts/code_objects.py LIBRARY FOLDER      writes FOLDER/ARCH.N.hsaco, one for each architecture and source
    scripts/code_objects.py --check LIBRARY     the gates of scripts/check_rocm_build.sh; needs llvm-readelf and llvm-objdump

A bundle, as build/hip_bundle.rs writes it and the HIP runtime reads it, little-endian:

    "__CLANG_OFFLOAD_BUNDLE__"  u64 entries   then for each  u64 offset, u64 size, u64 length, "hipv4-amdgcn-amd-amdhsa--ARCH"

with offsets from the bundle's own start. The library is searched for bundles as bytes, so that what is judged is what
ships, whatever the build has left elsewhere.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"
TARGET = "hipv4-amdgcn-amd-amdhsa--"
LOCAL_DATA_SHARE = 64 * 1024

# Mnemonics that must occur in an architecture's code, and that must not.
CONVERSIONS = ["v_cvt_pk_f32_fp8", "v_cvt_pk_fp8_f32"]
MFMA = ["v_mfma_f32_16x16x16_f16", "v_mfma_f32_16x16x16_bf16"]
WMMA = ["v_wmma_f32_16x16x16_f16", "v_wmma_f32_16x16x16_bf16"]
NEEDED = {
    "gfx90a": ["v_mfma_f32_16x16x16f16", "v_mfma_f32_16x16x16bf16_1k"],
    "gfx942": [*CONVERSIONS, *MFMA],
    "gfx950": [*CONVERSIONS, "v_cvt_pk_bf8_f32", *MFMA],
    "gfx1100": WMMA,
    "gfx1201": [*CONVERSIONS, "v_cvt_pk_bf8_f32", *WMMA],
}
# A function that was not inlined is called by the first. The others reach scratch memory, where spills lie.
FORBIDDEN = ["s_swappc_b64", "scratch_load", "scratch_store", "buffer_store_dword"]
# gfx942's 8-bit floats are FNUZ with two mantissa bits less than no format here: any use is a mistake.
FORBIDDEN_ON = {"gfx90a": CONVERSIONS, "gfx1100": CONVERSIONS, "gfx942": ["v_cvt_pk_bf8_f32", "v_cvt_pk_f32_bf8"]}


def code_objects(library):
    """(architecture, bytes) of each code object, in the library's order."""
    at = library.find(MAGIC)
    while at >= 0:
        (count,) = struct.unpack_from("<Q", library, at + len(MAGIC))
        entry = at + len(MAGIC) + 8
        for _ in range(count):
            offset, size, length = struct.unpack_from("<3Q", library, entry)
            name = library[entry + 24 : entry + 24 + length].decode()
            entry += 24 + length
            if name.startswith(TARGET):
                yield name[len(TARGET) :], library[at + offset : at + offset + size]
        at = library.find(MAGIC, at + 1)


def unpack(library, folder):
    folder.mkdir(parents=True, exist_ok=True)
    files = defaultdict(list)
    for arch, code in code_objects(library.read_bytes()):
        file = folder / f"{arch}.{len(files[arch])}.hsaco"
        file.write_bytes(code)
        files[arch].append(file)
    if not files:
        sys.exit(f"{library} has no code objects")
    return files


def llvm(tool):
    """A tool of LLVM 19 or newer."""
    for name in [f"{tool}-{release}" for release in (19, 20, 21, 22)] + [tool]:
        if shutil.which(name):
            return name
    sys.exit(f"code_objects.py: {tool} is needed (Debian: apt-get install llvm-19)")


def kernels_of(file):
    """The fields of each kernel in a code object's metadata."""
    text = subprocess.run([llvm("llvm-readelf"), "--notes", file], check=True, capture_output=True, text=True).stdout
    # A list of kernels, each a map whose keys are sorted and stand at one depth; lists inside it are deeper.
    kernels = []
    for part in re.split(r"^  - \.", text, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^(?:    )?\.?(\w+): +(\S+)$", part, flags=re.MULTILINE))
        if "private_segment_fixed_size" not in fields:
            sys.exit(f"{file}: the metadata is of a form that is not known:\n{part}")
        kernels.append(fields)
    return kernels


def disassemble(arch, file):
    """How often each mnemonic occurs."""
    tool, input = llvm("llvm-objdump"), file
    if arch == "gfx950":
        # LLVM 19 cannot disassemble it; but for matrix products it is gfx942, which a byte of the flags makes it.
        code = bytearray(file.read_bytes())
        code[48] = 0x4C
        input = file.with_suffix(".as942")
        input.write_bytes(code)
    text = subprocess.run([tool, "-d", "--no-show-raw-insn", input], check=True, capture_output=True, text=True).stdout
    counts = defaultdict(int)
    for mnemonic in re.findall(r"^\t([a-z]\w*)", text, flags=re.MULTILINE):
        counts[mnemonic] += 1
    return counts


def check(files):
    problems = []
    for arch, of_arch in files.items():
        kernels = [kernel for file in of_arch for kernel in kernels_of(file)]
        counts = defaultdict(int)
        for file in of_arch:
            for mnemonic, count in disassemble(arch, file).items():
                counts[mnemonic] += count
        most = lambda field: max(int(kernel[field]) for kernel in kernels)
        print(
            f"{arch}: {len(kernels)} kernels; at most {most('vgpr_count')} vector registers, {most('sgpr_spill_count')} "
            f"scalar ones kept in those, {most('group_segment_fixed_size')} bytes of local data share (static)"
        )
        for kernel in kernels:
            for field, limit in [
                ("private_segment_fixed_size", 0),
                ("vgpr_spill_count", 0),
                ("group_segment_fixed_size", LOCAL_DATA_SHARE),
            ]:
                if int(kernel[field]) > limit:
                    problems.append(f"{arch}: {kernel['name']}: {field} is {kernel[field]}")
            if kernel["uses_dynamic_stack"] != "false":
                problems.append(f"{arch}: {kernel['name']}: the size of its stack is not known")
        occurs = lambda start: sum(count for mnemonic, count in counts.items() if mnemonic.startswith(start))
        if arch not in NEEDED:
            problems.append(f"{arch}: code_objects.py does not know what it must have")
        problems += [f"{arch}: no {start}" for start in NEEDED.get(arch, []) if not occurs(start)]
        # Read as gfx942, an instruction that only gfx950 has leaves a word that may look like any: the metadata must do.
        forbidden = [] if arch == "gfx950" else FORBIDDEN + FORBIDDEN_ON.get(arch, [])
        problems += [f"{arch}: {occurs(start)} times {start}" for start in forbidden if occurs(start)]
        if not occurs("s_endpgm"):
            problems.append(f"{arch}: the disassembly has no end of a program in it")
    if problems:
        sys.exit("\n".join(problems))


def main():
    match sys.argv[1:]:
        case ["--check", library]:
            with tempfile.TemporaryDirectory() as folder:
                check(unpack(Path(library), Path(folder)))
        case [library, folder]:
            for arch, files in unpack(Path(library), Path(folder)).items():
                print(f"{arch}: {len(files)}")
        case _:
            sys.exit(__doc__)


main()
