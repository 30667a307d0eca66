"""The machine code of CUDA kernels (SASS), as cuobjdump prints it: instructions by class, and the loops among them.

A loop is what lies between a branch backwards and its target. What stands in a loop is counted once, also what a branch
within it may leave out: the steady state of a pipeline leaves out nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# By the first pattern that an instruction, with its suffixes, begins with.
CLASSES = {
    "tensor": "HMMA|IMMA|HGMMA|DMMA",
    "ldsm": "LDSM",
    "shared": "LDS|STS|ATOMS|MATCH|SHFL",
    "copy": "LDGSTS|UBLKCP|UTMA",
    "global": "LDG|STG|LD\\b|ST\\b|LDL|STL|RED|ATOM",
    "move": "MOV|IMAD\\.MOV|IMAD\\.U32|CS2R|S2R|MOVM",
    "uniform": "ULDC|LDC|R2UR|S2UR|U[A-Z]",
    "branch": "BR|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC|BAR|DEPBAR|LDGDEPBAR|YIELD|NANOSLEEP|SYNCS|ERRBAR|MEMBAR",
    "predicate": "ISETP|FSETP|DSETP|HSETP2|HSET2|PLOP3|SEL|FSEL|P2R|R2P|VOTE",
    "address": "IMAD|IADD|LEA|SHF|LOP3|VIADD|IABS|IMNMX|VIMNMX|PRMT|BMSK|SGXT|POPC|FLO|ISCADD|LOP",
    "convert": "F2F|F2FP|I2F|F2I|I2FP|FRND|HADD2\\.F32|F2IP",
    "float": "F|D|H|MUFU",
}
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*)")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate without which it does nothing, "" where there is none
    name: str  # with all suffixes
    operands: str

    @property
    def kind(self) -> str:
        """One of CLASSES, or "other"."""
        if self.name.startswith("LOP3") and re.match(r"P[0-6],", self.operands):
            return "predicate"
        for kind, pattern in _PATTERNS.items():
            if pattern.match(self.name):
                return kind
        return "other"

    @property
    def target(self) -> int | None:
        """Of a branch, where it goes."""
        match = re.search(r"(?:^|[\s,])0x([0-9a-f]+)$", self.operands) if self.name.startswith("BRA") else None
        return int(match[1], 16) if match else None

    @property
    def bits(self) -> int:
        """What a thread moves: of loads and stores, 32 unless a suffix says otherwise."""
        match = re.search(r"\.(?:[US])?(8|16|64|128)\b", self.name)
        return int(match[1]) if match else 32


_PATTERNS = {kind: re.compile(pattern) for kind, pattern in CLASSES.items()}


@dataclass(frozen=True)
class Loop:
    instructions: tuple[Instruction, ...]
    counts: Counter[str] = field(compare=False)  # by class

    @property
    def begin(self) -> int:
        return self.instructions[0].address

    @property
    def end(self) -> int:
        return self.instructions[-1].address


def loop_of(instructions: tuple[Instruction, ...]) -> Loop:
    return Loop(instructions, Counter(instruction.kind for instruction in instructions))


def loops(code: tuple[Instruction, ...]) -> list[Loop]:
    """All of them, in the order of their ends: an inner loop comes before the one around it."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    found = {}
    for i, instruction in enumerate(code):
        first = position.get(instruction.target) if instruction.target is not None else None
        # The last instruction of a kernel is a branch to itself, which nothing reaches.
        if first is not None and first < i:
            found[first, i] = loop_of(code[first : i + 1])
    return list(found.values())


def innermost(found: list[Loop], kind: str) -> list[Loop]:
    """The loops that have instructions of this class, and no smaller such loop in them."""
    having = [loop for loop in found if loop.counts[kind]]
    return [
        loop
        for loop in having
        if not any(o is not loop and loop.begin <= o.begin and o.end <= loop.end for o in having)
    ]


def main_loop(code: tuple[Instruction, ...]) -> Loop | None:
    """Of the tensor cores' instructions; without these, of the most arithmetic. Of equals the shortest."""
    found = loops(code)
    for kind in ("tensor", "float"):
        candidates = innermost(found, kind)
        if candidates:
            return max(candidates, key=lambda loop: (loop.counts[kind], -len(loop.instructions)))
    return None


# ------------------------------------------------------------------------------------------------------- cuobjdump


@functools.cache
def find_cuobjdump() -> str | None:
    """The one on the path, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    folders = (triton.submodule_search_locations or ()) if triton else ()
    candidates = [
        shutil.which("cuobjdump"),
        *(str(Path(folder) / "backends/nvidia/bin/cuobjdump") for folder in folders),
    ]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def dump(file: Path, *options: str) -> str:
    command = [str(find_cuobjdump()), *options, str(file)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def readable(names: list[str]) -> dict[str, str]:
    """Of kernels, without fastconv's namespace and the parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout
    result = {}
    for name, text in zip(names, plain.splitlines(), strict=True):
        text = re.sub(r"\(anonymous namespace\)::|fastconv::cuda::(sm80::)?|^void ", "", text)
        # The parameters are the last parenthesis that is opened outside of <>.
        depth, end = 0, len(text)
        for i, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        result[name] = text[:end]
    assert len(set(result.values())) == len(names), "two kernels of one name"
    return result


def _functions(text: str) -> Iterator[tuple[str, str, tuple[Instruction, ...]]]:
    arch = name = ""
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            address, guard, word, operands = match.groups()
            found.append(Instruction(int(address, 16), guard or "", word, operands.strip()))
        elif match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            if found:
                yield arch, name, tuple(found)
            name, found = match[1], []
    if found:
        yield arch, name, tuple(found)


def code(file: Path, arch: str | None = None) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of each kernel in a library or a cubin, of one architecture."""
    found = {name: code for _, name, code in _functions(dump(file, "-sass", *(["-arch", arch] if arch else [])))}
    plain = readable(sorted(found))
    return {plain[name]: code for name, code in found.items()}
