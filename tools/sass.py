"""What the CUDA kernels can reach, without a GPU: from their machine code, and from what the planner chooses.

python tools/sass.py                      tables: kernels, networks; compared with what benchmarks/expected has
python tools/sass.py --write              records it there, and in csrc/README.md
python tools/sass.py --layers resnet50    each layer of a network, too
python tools/sass.py --measured FILE      with the times that make gpu-results put into benchmarks/results
python tools/sass.py --cubin FILE         the loops of any cubin or library, by their instructions
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import expected
import machine_code
import sass_tables
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
        best = machine_code.main_loop(code)
        found = machine_code.innermost(machine_code.loops(code), "tensor") or ([best] if best else [])
        for loop in found:
            mark = "*" if loop == best else " "
            print(f"  {mark} {loop.begin:#x}..{loop.end:#x} {counted(loop)}")
            if names:
                words = Counter(instruction.name for instruction in loop.instructions)
                print("      " + ", ".join(f"{count} {word}" for word, count in words.most_common()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record it instead of comparing")
    parser.add_argument("--layers", nargs="*", default=[], metavar="NETWORK", help="each layer of these, too")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="of benchmarks/results")
    parser.add_argument("--cubin", type=Path, metavar="FILE", help="a cubin or a library: only its loops")
    parser.add_argument("--arch", help="of --cubin: sm_80, sm_90a")
    parser.add_argument("--only", default="", metavar="TEXT", help="of --cubin: kernels whose name contains this")
    parser.add_argument("--names", action="store_true", help="of --cubin: count each instruction, too")
    args = parser.parse_args()
    if args.cubin:
        print_loops(args.cubin, args.arch, args.only, args.names)
        return 0
    loops = expected.loops()
    layers = expected.layers(loops)
    for table in (sass_tables.kernels(loops), *sass_tables.networks(layers), sass_tables.goals(layers)):
        table.print()
    for network in args.layers:
        sass_tables.layers(network, layers, sass_tables.measured(args.measured)).print()
    if args.write:
        expected.write(loops, layers)
        sass_tables.write_readme()
        print(f"recorded in {expected.FOLDER} and {sass_tables.README}")
        return 0
    changes = expected.changes(loops, layers)
    print("\n".join(map(str, changes)) or "as recorded")
    return int(bool(changes))


if __name__ == "__main__":
    sys.exit(main())
