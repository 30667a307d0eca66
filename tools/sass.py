"""What the kernels are made of, read from their machine code."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import machine_code
from machine_code import CLASSES, Loop


def counted(loop: Loop) -> str:
    counts, tensor = loop.counts, loop.counts["tensor"]
    text = ", ".join(f"{counts[kind]} {kind}" for kind in (*CLASSES, "other") if counts[kind])
    total = len(loop.instructions)
    normal = f", {32 * total / tensor:.0f} to 32 HMMA" if tensor else ""
    return f"{total} instructions{normal}: {text}"


def print_loops(file: Path, arch: str | None, only: str, names: bool) -> None:
    for name, code in machine_code.code(file, arch).items():
        if only not in name:
            continue
        print(f"{name}: {len(code)} instructions")
        found = machine_code.loops(code)
        best = machine_code.main_loop(code)
        for loop in machine_code.innermost(found, "tensor") or ([best] if best else []):
            mark = "*" if loop == best else " "
            print(f"  {mark} {loop.begin:#x}..{loop.end:#x} {counted(loop)}")
            if names:
                words = Counter(instruction.name for instruction in loop.instructions)
                print("      " + ", ".join(f"{count} {word}" for word, count in words.most_common()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cubin", type=Path, metavar="FILE", required=True, help="a cubin or a library")
    parser.add_argument("--arch", help="of a library: sm_80, sm_90a")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains this")
    parser.add_argument("--names", action="store_true", help="count each instruction, too")
    args = parser.parse_args()
    print_loops(args.cubin, args.arch, args.only, args.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
