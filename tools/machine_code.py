"""The machine code of CUDA kernels (SASS), as cuobjdump prints it: instructions by class, and the loops among them.

A loop is what lies between a branch backwards and its target. What stands in a loop is counted once, also what a branch
within it may leave out: the steady state of a pipeline leaves out nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emulator.build import import_build

# By the first pattern that an instruction, with its suffixes, begins with.
CLASSES = {
    "tensor": r"HMMA|IMMA|HGMMA|DMMA|UTC[A-Z]+MMA",
    "fma": r"FFMA",
    "ldsm": r"LDSM",
    "shared": r"LDS|STS|ATOMS|SHFL",
    "copy": r"LDGSTS|UBLKCP|UTMA",
    "global": r"LDG\b|STG|LD\b|ST\b|RED|ATOM",
    "local": r"LDL|STL",
    "move": r"MOV|IMAD\.MOV|IMAD\.U32|CS2R|S2R",
    "uniform": r"ULDC|LDC|R2UR|S2UR|U[A-Z]",
    "branch": r"BR|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC|BAR|DEPBAR|LDGDEPBAR|YIELD|NANOSLEEP|SYNCS|ERRBAR|MEMBAR",
    "predicate": r"ISETP|FSETP|DSETP|HSETP2|HSET2|PLOP3|SEL|FSEL|P2R|R2P|VOTE",
    "address": r"IMAD|IADD|LEA|SHF|LOP3|VIADD|IABS|IMNMX|VIMNMX|PRMT|BMSK|SGXT|POPC|FLO",
    "convert": r"F2F|F2FP|I2F|F2I|I2FP|FRND|HADD2\.F32",
    "float": r"F|D|H|MUFU",
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
        """Of a branch, where it goes. The way out of a loop may be a call that does not come back."""
        if not self.name.startswith(("BRA", "CALL")):
            return None
        match = re.search(r"(?:^|[\s,])0x([0-9a-f]+)$", self.operands)
        return int(match[1], 16) if match else None

    @property
    def bytes(self) -> int:
        """What a warp moves, of loads, stores and copies; nothing where the guard says never."""
        if self.guard == "!PT":
            return 0
        if self.kind == "ldsm":
            match = re.search(r"\.([124])\b", self.name)
            return 128 * int(match[1] if match else 1)
        match = re.search(r"\.[US]?(8|16|64|128)\b", self.name)
        return 32 * (int(match[1]) if match else 32) // 8


Code = tuple[Instruction, ...]
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in CLASSES.items()}


@dataclass(frozen=True)
class Loop:
    instructions: Code
    counts: Counter[str] = field(compare=False)  # by class

    @property
    def begin(self) -> int:
        return self.instructions[0].address

    @property
    def end(self) -> int:
        return self.instructions[-1].address


def counted(code: Code) -> Counter[str]:
    """By class."""
    return Counter(instruction.kind for instruction in code)


def loop_of(instructions: Code) -> Loop:
    return Loop(instructions, counted(instructions))


def loops(code: Code) -> list[Loop]:
    """All of them, in the order of their ends: an inner loop comes before the one around it."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    found = {}
    for i, instruction in enumerate(code):
        first = position.get(instruction.target) if instruction.target is not None else None
        # The last instruction of a kernel is a branch to itself, which nothing reaches.
        if first is not None and first < i and instruction.name.startswith("BRA"):
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


def main_loop(code: Code) -> Loop | None:
    """Of the tensor cores' instructions; without these, of the most multiply-adds. Of equals the shortest."""
    found = loops(code)
    for kind in ("tensor", "fma"):
        candidates = innermost(found, kind)
        if candidates:
            return max(candidates, key=lambda loop: (loop.counts[kind], -len(loop.instructions)))
    return None


# ----------------------------------------------------------------------------------------- kernels that move data


def _is_global(instruction: Instruction, store: bool | None = None) -> bool:
    return instruction.kind == "global" and (store is None or instruction.name.startswith("ST") == store)


def stored(code: Code) -> int:
    return sum(instruction.bytes for instruction in code if _is_global(instruction, store=True))


def loaded(code: Code) -> int:
    """Bytes that a warp gets from global memory, once through."""
    return sum(instruction.bytes for instruction in code if _is_global(instruction, store=False))


def moving(code: Code) -> Code:
    """What a kernel that moves data does for the bytes that it stores.

    Its body is the outermost loop in which all its widest stores are, else all of it. Branches in it go the shortest
    way that meets all its widest loads and stores: ragged ends and the general case of what has a quick one are left
    out.
    """
    widest = max(i.bytes for i in code if _is_global(i, store=True))
    wide = {i.address for i in code if _is_global(i, store=True) and i.bytes == widest}
    found = [loop.instructions for loop in loops(code)]
    return _shortest(max((each for each in found if wide <= {i.address for i in each}), key=len, default=code))


def _shortest(code: Code) -> Code:
    """The shortest way from the first instruction to the last, or out, that meets all the widest loads and stores.

    And all square roots: LRN's quick way with its usual beta has two, and not to compute at all is quicker still.
    """
    position = {instruction.address: i for i, instruction in enumerate(code)}
    widest = {store: max((i.bytes for i in code if _is_global(i, store)), default=0) for store in (False, True)}
    stops = [
        i
        for i, one in enumerate(code)
        if one.name == "MUFU.RSQ" or any(_is_global(one, s) and one.bytes == widest[s] for s in widest)
    ]
    path, at = [0], 0
    for stop in [*stops, None]:
        before: dict[int, int] = {at: at}
        length = {at: 0}
        ends = []
        for i in range(at, len(code)):
            if i not in length:
                continue
            one = code[i]
            following = [] if one.name.startswith(("BRA", "EXIT", "RET")) and not _is_conditional(one) else [i + 1]
            if one.target is not None:
                following.append(position.get(one.target, -1))
            if stop is None and (one.name.startswith("EXIT") or i == len(code) - 1):
                ends.append(i)
            for j in following:
                if i < j < len(code) and length[i] + 1 < length.get(j, len(code)):
                    length[j], before[j] = length[i] + 1, i
        end = min(ends, key=lambda i: length[i], default=None) if stop is None else stop if stop in length else None
        if end is None or end == at:
            continue
        way = [end]
        while before[way[-1]] != at:
            way.append(before[way[-1]])
        path += reversed(way)
        at = end
    return tuple(code[i] for i in path)


def _is_conditional(branch: Instruction) -> bool:
    return branch.guard not in ("", "PT") or re.match(r"!?U?P\d", branch.operands) is not None


# ------------------------------------------------------------------------------------------------------- cuobjdump


@functools.cache
def find_cuobjdump() -> str | None:
    """Of the toolkit, or the one that comes with Triton."""
    cuda = import_build().toolchain.find_cuda()
    near = [Path(cuda.include).parent / "bin", Path(cuda.nvcc).parent] if cuda else []
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        near.append(Path(folder) / "backends/nvidia/bin")
    candidates = [shutil.which("cuobjdump"), *(str(folder / "cuobjdump") for folder in near)]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def library() -> Path:
    """The installed library, or the one that FASTCONV_CUDA_OBJECTS names."""
    from fastconv import _C

    return Path(os.environ.get("FASTCONV_CUDA_OBJECTS") or _C.__file__)


def _dump(file: Path, *options: str) -> str:
    command = [str(find_cuobjdump()), *options, str(file)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def readable(names: Sequence[str]) -> dict[str, str]:
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
    return result


def _of_kernels(names: Sequence[str]) -> dict[str, str]:
    found = readable(names)
    assert len(set(found.values())) == len(names), "two kernels of one name"
    return found


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture."""

    registers: int
    stack: int  # bytes of local memory to a thread: spilled registers, arrays with an index that is not constant
    shared: int  # static


@functools.cache
def kernels(file: Path) -> dict[str, dict[str, Kernel]]:
    """By architecture and name."""
    found: dict[str, dict[str, Kernel]] = {}
    arch = name = ""
    for line in _dump(file, "-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function\s*:?\s*(\w+):?\s*$", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.setdefault(arch, {})[name] = Kernel(registers, stack + local, shared)
    plain = _of_kernels(sorted({name for each in found.values() for name in each}))
    return {arch: {plain[name]: kernel for name, kernel in sorted(each.items())} for arch, each in found.items()}


def parse(sass: str) -> dict[str, Code]:
    """The instructions of each kernel, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in sass.splitlines():
        if match := _LINE.match(line):
            address, guard, word, operands = match.groups()
            current.append(Instruction(int(address, 16), guard or "", word, operands.strip()))
        elif match := re.match(r"\s*Function : (\w+)", line):
            current = found[match[1]] = []
    return {name: tuple(instructions) for name, instructions in found.items()}


@functools.cache
def code(file: Path, arch: str | None = None) -> dict[str, Code]:
    """The instructions of each kernel in a library or a cubin, of one architecture."""
    found = parse(_dump(file, "-sass", *(["-arch", arch] if arch else [])))
    plain = _of_kernels(sorted(found))
    return {plain[name]: instructions for name, instructions in found.items()}


def ptx(file: Path, folder: Path) -> list[Path]:
    """The PTX in a library, a file in the folder for each source."""
    command = [str(find_cuobjdump()), "-xptx", "all", str(file.resolve())]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return sorted(folder.glob("*.ptx"))
