#!/usr/bin/env python3
"""Finds registers that a warpgroup's product still reads, and that something else is written to before it was waited for.

    cuobjdump -sass LIBRARY | scripts/check_products.py [--echo]     --echo: what was read goes on to stdout
    scripts/check_products.py --self-test

wgmma takes A from registers in the background. ptxas keeps what lies there until the wait that follows, but does not look for
one across the back edge of a loop: there it counts the registers as free (nvcc 13.0), and one call in some hundreds comes out
wrong. csrc/hopper waits in the same turn of a loop; this looks at what came of it.

It goes along every path of a kernel with the registers of products under way, and how many groups of products have been
committed since: a product that names `gsb0` ends its group, DEPBAR waits for all but the youngest groups.
"""
import re
import sys
from collections import deque

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
PREDICATED = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+@")
# What writes to no register, whatever it names first. Anything else that names one first counts as writing to it.
WRITES_NONE = set(
    "ST STS STG STL STAS RED LDGSTS LDGDEPBAR DEPBAR BAR BRA BRX JMP BSYNC BSSY BREAK EXIT RET NOP WARPSYNC YIELD MEMBAR FENCE ERRBAR "
    "CCTL ISETP FSETP DSETP HSETP2 PLOP3 R2P R2UR WARPGROUP HGMMA SYNCS UBLKCP UTMALDG KILL NANOSLEEP".split()
)


class Instruction:
    def __init__(self, line, match):
        self.address, self.text = int(match[1], 16), match[2]
        self.predicated = PREDICATED.match(line) is not None
        name, _, operands = self.text.partition(" ")
        self.base = name.split(".")[0]
        self.parts = name.split(".")
        self.operands = [operand.strip() for operand in operands.split(",")] if operands else []

    def written(self):
        """First register, and how many."""
        if self.base in WRITES_NONE:
            return 0, 0
        named = [operand for operand in self.operands if not re.fullmatch(r"!?U?P(\d+|T|R)", operand)]
        match = re.match(r"R(\d+)\b", named[0]) if named else None
        if not match:
            return 0, 0
        count = 1
        if "128" in self.parts or (self.base == "LDSM" and "4" in self.parts):
            count = 4
        elif "64" in self.parts or "WIDE" in self.parts or (self.base == "CS2R" and "32" not in self.parts):
            count = 2
        return int(match[1]), count

    def target(self):
        match = re.search(r"0x([0-9a-f]+)\)?$", self.text)
        return int(match[1], 16) if match else None


def successors(code):
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for i, instruction in enumerate(code):
        following = [i + 1] if i + 1 < len(code) else []
        if instruction.base in ("BRA", "CALL"):
            # BRA P1, label is a condition too, and so is a branch by whether the warp is together.
            conditional = instruction.predicated or len(instruction.operands) > 1 or "DIV" in instruction.parts
            target = index.get(instruction.target())
            following = ([target] if target is not None else []) + (following if conditional else [])
        elif instruction.base in ("EXIT", "RET", "BRX", "JMP") and not instruction.predicated:
            following = []
        yield following


def after(instruction, under_way):
    """Registers of A, with groups committed since, after the instruction."""
    if instruction.base == "HGMMA":
        a = re.match(r"R(\d+)", instruction.operands[1])
        if a:
            under_way = {**under_way, **{register: 0 for register in range(int(a[1]), int(a[1]) + 4)}}
        if "gsb0" in instruction.operands:
            under_way = {register: groups + 1 for register, groups in under_way.items()}
    elif instruction.base == "WARPGROUP" and "DEPBAR" in instruction.parts:
        left = int(re.search(r"gsb0, 0x([0-9a-f]+)", instruction.text)[1], 16)
        under_way = {register: groups for register, groups in under_way.items() if groups <= left}
    return under_way


def lost(code):
    """(instruction, register) of every write to a register that a product may still read."""
    ways = list(successors(code))
    before = {0: {}}
    found = set()
    waiting = deque([0])
    while waiting:
        i = waiting.popleft()
        under_way = before[i]
        first, count = code[i].written()
        found |= {(i, register) for register in range(first, first + count) if register in under_way}
        under_way = after(code[i], under_way)
        for way in ways[i]:
            known = before.get(way)
            if known is None:
                before[way] = dict(under_way)
                waiting.append(way)
                continue
            younger = {r: g for r, g in under_way.items() if r not in known or known[r] > g}
            if younger:
                known.update(younger)
                waiting.append(way)
    return [(code[i], register) for i, register in sorted(found)]


def check(name, code):
    if not any(instruction.base == "HGMMA" for instruction in code):
        return None
    found = lost(code)
    for instruction, register in found[:4]:
        print(f"{name}: at 0x{instruction.address:x} R{register} is written while a product may read it: {instruction.text}", file=sys.stderr)
    if len(found) > 4:
        print(f"{name}: and {len(found) - 4} more", file=sys.stderr)
    return len(found)


def run(lines, echo=False):
    kernels, found, name, code = 0, 0, None, []

    def end():
        nonlocal kernels, found
        result = check(name, code) if code else None
        if result is not None:
            kernels, found = kernels + 1, found + result

    for line in lines:
        if echo:
            sys.stdout.write(line)
        if "Function :" in line:
            end()
            name, code = line.split(":", 1)[1].strip(), []
        else:
            match = INSTRUCTION.match(line)
            if match:
                code.append(Instruction(line, match))
    end()
    return kernels, found


def self_test():
    def kernel(*instructions):
        return ["Function : test\n"] + [f"  /*{16 * i:04x}*/  {text} ;\n" for i, text in enumerate(instructions)]

    product, wait = "HGMMA.64x32x16.F32 R24, R72, gdesc[UR20], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    other = "HGMMA.64x32x16.F32 R40, gdesc[UR16], R40, gsb0"
    cases = [
        (0, kernel(product, wait, "LDS.128 R72, [R2]", "EXIT")),
        (4, kernel(product, "LDS.128 R72, [R2]", wait, "EXIT")),
        (2, kernel(product, "@P1 LDS.128 R74, [R2]", wait, "EXIT")),
        (1, kernel(product, "IMAD.MOV.U32 R75, RZ, RZ, R3", wait, "EXIT")),
        (2, kernel(product, "IMAD.WIDE.U32 R72, R3, R4, R6", wait, "EXIT")),
        (0, kernel(product, "STS.128 [R72], R72", "ISETP.GE.AND P1, PT, R72, RZ, PT", wait, "EXIT")),
        # Two groups on their way, of which the first is waited for.
        (0, kernel(product, other, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R72, RZ", "EXIT")),
        (1, kernel(other, product, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R72, RZ", "EXIT")),
        # A loop whose next turn writes, and waits then; and the other way round.
        (1, kernel("MOV R72, R2", wait, product, "@P0 BRA 0x0", wait, "EXIT")),
        (0, kernel(wait, "MOV R72, R2", product, "@P0 BRA 0x0", wait, "EXIT")),
        # One of two ways waits.
        (1, kernel(product, "@P0 BRA 0x30", wait, "MOV R73, RZ", "EXIT")),
        (1, kernel(product, "BRA P1, 0x30", wait, "SHFL.BFLY PT, R73, R2, 0x1, 0x1f", "EXIT")),
    ]
    for i, (want, lines) in enumerate(cases):
        stderr, sys.stderr = sys.stderr, open("/dev/null", "w")
        got = run(lines)
        sys.stderr = stderr
        if got != (1, want):
            sys.exit(f"case {i}: {got[1]} found, {want} are there")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    if "--self-test" in sys.argv:
        self_test()
    else:
        kernels, found = run(sys.stdin, "--echo" in sys.argv)
        print(f"{kernels} kernels with products of warpgroups, {found} registers lost", file=sys.stderr)
        sys.exit(1 if found or not kernels else 0)
