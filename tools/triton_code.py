"""What the Triton kernels compile to, without a GPU: every entry of the table, on one architecture.

    python tools/triton_code.py 90                  a line for each kernel: its loop, accesses, registers
    python tools/triton_code.py 90 --only PATTERN   of the kernels whose function, entry or call matches; --names
    python tools/triton_code.py 90 --brief          one call for each entry and dtype; --json: one JSON object a line
    python tools/triton_code.py 90 --write          records the float16 kernels in benchmarks/expected/triton.json, by
                                                    version of Triton and architecture; --compare: with what is there
    python tools/triton_code.py --goals             the goals for Hopper, and what is recorded; fails if one is missed

One file because the calls, what they compile to and what is recorded of it are one table.

A process of its own, as Triton must not be in its interpreter. The launchers run on meta tensors, so that each kernel
gets the very arguments, hence the specialization, of a call; a stand-in for the driver names the architecture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import fastconv.triton_kernels as ft
import machine_code
from fastconv.operators.convolution import output_shape
from fastconv.triton_kernels import launch, table


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


# ------------------------------------------------------------------------------------------------- the calls

Calls = Iterator[tuple[str, Callable[[], Any]]]


def tensor(*shape: int, dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> Tensor:
    found = torch.empty(shape, dtype=dtype, device="meta")
    return found.to(memory_format=layout) if len(shape) == 4 else found


def convolution(
    K: int, C: int, side: int, pad: int, stride: int = 1, groups: int = 1, image: int = 56, **kind: Any
) -> Callable[[], Any]:
    """Forward with all that its epilogue has, and backward."""

    def forward_and_backward() -> None:
        x, w = tensor(8, C, image, image, **kind), tensor(K, C // groups, side, side, **kind)
        geometry = ([stride] * 2, [pad] * 2, [1, 1], groups)
        y = tensor(*output_shape(x.shape, w.shape, geometry), **kind)
        ft.conv2d_add_relu(x, w, tensor(K, dtype=kind["dtype"]), y, *geometry, "relu6")
        ft.conv2d_backward(y, y, x, w, *geometry, "relu6", [True] * 4)

    return forward_and_backward


def convolutions(dtype: torch.dtype) -> Calls:
    """One for each class of the table, in AlexNet's, VGG's and ResNet's sizes, and what has been slow."""
    for width in (32, 64, 256):
        yield f"stem {width}", convolution(width, 3, 7, 3, 2, dtype=dtype)
        yield f"3x3 {width}", convolution(width, width, 3, 1, dtype=dtype)
        yield f"1x1 {width}", convolution(width, width, 1, 0, dtype=dtype)
    for width in (28, 60, 132):  # vectors of 8 bytes
        width += 0 if dtype.itemsize == 2 else 2
        yield f"3x3 thin {width}", convolution(width, width, 3, 1, image=14, dtype=dtype)
    yield "3x3 small grid", convolution(128, 512, 3, 1, image=7, dtype=dtype)
    yield "1x1 stride 2", convolution(256, 256, 1, 0, 2, dtype=dtype)
    yield "3x3 24 channels", convolution(96, 24, 3, 1, dtype=dtype)
    yield "1x1 40 channels", convolution(96, 40, 1, 0, dtype=dtype)
    yield "3x3 20 channels", convolution(96, 20, 3, 2, 2, dtype=dtype)
    yield "1x1 20 channels", convolution(96, 20, 1, 0, 2, dtype=dtype)
    yield "3x3 contiguous", convolution(128, 128, 3, 1, dtype=dtype, layout=torch.contiguous_format)
    yield "1x1 contiguous", convolution(128, 128, 1, 0, image=14, dtype=dtype, layout=torch.contiguous_format)
    yield "3x3 32 groups", convolution(256, 256, 3, 1, 1, 32, dtype=dtype)


def others(dtype: torch.dtype) -> Calls:
    """Those that reach the rest of the table, in both layouts."""
    channels_last, contiguous = torch.channels_last, torch.contiguous_format

    def vector(size: int) -> Tensor:
        return tensor(size, dtype=dtype)

    for width in (32, 64, 128, 256):
        x = tensor(8, 192, 28, 28, dtype=dtype)
        weights = [tensor(k, 192, 1, 1, dtype=dtype) for k in (width, 16, width)]
        biases = [vector(w.shape[0]) for w in weights]
        yield (
            f"group {width}",
            lambda x=x, weights=weights, biases=biases: ft.pointwise_conv2d_group(x, weights, biases, "relu"),
        )
        for side in (3, 7):
            dw, pw = tensor(192, 1, side, side, dtype=dtype), tensor(width, 192, 1, 1, dtype=dtype)
            yield (
                f"{side}x{side} {width}",
                lambda x=x, dw=dw, pw=pw: ft.depthwise_separable_conv2d(
                    x, dw, pw, vector(dw.shape[0]), vector(pw.shape[0]), [1, 1], [1, 1], [1, 1], "relu6", "relu"
                ),
            )
    for layout in (channels_last, contiguous):
        name = "channels_last" if layout == channels_last else "contiguous"
        x = tensor(8, 96, 56, 56, layout=layout, dtype=dtype)
        for side in (3, 7):
            for stride in (1, 2) if side == 3 else (2,):
                w, out = tensor(96, 1, side, side, dtype=dtype), 56 // stride
                geometry = ([stride] * 2, [side // 2] * 2, [1, 1])
                y = tensor(8, 96, out, out, layout=layout, dtype=dtype)
                words = f"{side}x{side} stride {stride} {name}"
                yield words, lambda x=x, w=w, g=geometry: ft.depthwise_conv2d(x, w, vector(96), *g, "relu")
                yield (
                    words,
                    lambda x=x, w=w, y=y, g=geometry: ft.conv2d_backward(y, y, x, w, *g, 96, "relu", [True] * 4),
                )
        yield f"96 {name}", lambda x=x: ft.local_response_norm(x, 5, 1e-4, 0.75, 2.0, "relu")
        yield f"96 {name} backward", lambda x=x: ft.local_response_norm_backward(x, x, 5, 1e-4, 0.75, 2.0, "relu")
        deep = tensor(8, 1000, 7, 7, layout=layout, dtype=dtype)
        yield f"1000 {name} backward", lambda x=deep: ft.local_response_norm_backward(x, x, 5, 1e-4, 0.6, 2.0, "none")
    for size in (56, 7):  # elements that are, and are not, a multiple of a vector's
        flat = torch.empty((3, 3, size, size), dtype=dtype, device="meta")
        yield f"{size}x{size}", lambda x=flat: ft.add_relu(x, x, "relu")
        yield f"{size}x{size}", lambda x=flat: ft.add_relu_backward(x, x, "relu")


# ------------------------------------------------------------------------------------------------- what they compile to


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, counted.

    Attributes:
        call: of the function above that launched it.
        wide: whether its offsets have 64 bits.
        tensor_core: the kinds of instructions for them, in the PTX.
        loop: instructions of its main loop, see `machine_code.main_loop`.
        kinds: these by their class.
        accesses: to global memory, in the whole kernel: by "load", "store" and "copy" (to shared memory, asynchronous;
            "box" where the TMA does it) how many there are of each number of bytes a thread, "16".
    """

    function: str
    call: str
    kernel: str
    entry: str
    dtype: str
    wide: bool
    config: dict[str, int]
    registers: int
    stack: int
    shared: int
    tensor_core: list[str]
    instructions: int
    loop: int
    kinds: dict[str, int]
    accesses: dict[str, dict[str, int]]
    names: dict[str, int]

    def __str__(self) -> str:
        sizes = " ".join(f"{value}" for value in self.config.values())
        accesses = ", ".join(
            f"{kind} " + " ".join(f"{n}x{size}" for size, n in sizes.items()) for kind, sizes in self.accesses.items()
        )
        dtype = f"{self.dtype}{' wide' if self.wide else ''}"
        words = f"{self.function} | {self.entry} | {self.call} | {dtype} | {sizes} | "
        words += f"loop {self.loop} of {self.instructions}, {self.kinds.get('tensor', 0)} tensor | {accesses} | "
        return words + f"{self.registers} registers, {self.stack} stack, {self.shared // 1024} KiB"


def accesses(code: machine_code.Code) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {"load": Counter(), "store": Counter(), "copy": Counter()}
    for one in code:
        if one.guard == "!PT" or one.kind not in ("global", "copy"):
            continue
        kind = "copy" if one.kind == "copy" else "store" if one.name.startswith("ST") else "load"
        size = "box" if one.name.startswith("UTMA") else str(one.bytes // 32)
        found[kind][size] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items() if counts}


def copies(ptx: str) -> dict[str, int]:
    """As `accesses` has them, but before ptxas has unrolled and dropped some."""
    sizes = re.findall(r"cp\.async\.(?:c[ag]\.shared\.global .*, 0x(\w+), .*|bulk\.tensor)", ptx)
    return dict(Counter(str(int(size, 16)) if size else "box" for size in sizes))


def read(cubin: bytes, instructions: bool) -> tuple[machine_code.Kernel, machine_code.Code]:
    """What it takes, and its instructions, which a second goes into."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(file.name)
        (by_name,) = machine_code.kernels(path).values()
        (kernel,) = by_name.values()
        (code,) = machine_code.code(path).values() if instructions else [()]
    return kernel, code


def described(
    function: str, call: str, entry: tuple[str, str], dtype: str, meta: Any, compiled: Any, instructions: bool
) -> Compiled:
    kernel, code = read(compiled.asm["cubin"], instructions)
    loop = machine_code.main_loop(code)
    inside = loop.instructions if loop else ()
    ptx = compiled.asm["ptx"]
    return Compiled(
        function,
        call,
        *entry,
        dtype.removeprefix("torch."),
        meta.get("WIDE", False),
        {key: value for key, value in meta.items() if key.startswith(("BLOCK", "num_"))},
        kernel.registers,
        kernel.stack,
        compiled.metadata.shared,
        sorted({i for i in ("mma.sync", "wgmma", "tcgen05.mma") if i in ptx}),
        len(code),
        len(inside),
        dict(loop.counts) if loop else {},
        accesses(code) if code else {"copy": copies(ptx)},
        dict(Counter(i.name for i in inside or code).most_common()),
    )


def compiled(architecture: int, pattern: str = "", brief: bool = False) -> Iterator[Compiled]:
    """Every kernel, as it is compiled.

    `brief`: for each entry and dtype that of the first call alone, only float16's taken apart, and float32's without
    tensor cores, in which the architectures hardly differ, only for sm_80.
    """
    triton.runtime.driver.set_active(Driver(architecture))
    seen: set[tuple[str, ...]] = set()
    made: list[Compiled] = []
    call = ""
    asked: list[table.Asked] = []

    def compile_only(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        name, entry = kernel.fn.__name__, table.split_entry(asked[-1].entry)
        dtype = str(getattr(args[0], "base", args[0]).dtype)
        if brief and entry[1].startswith("ieee") and architecture != 80:
            return
        # what differs only in numbers that nothing is specialized for is the same code
        special = [
            a.dtype if isinstance(a, Tensor) else None if parameter.do_not_specialize else a
            for a, parameter in zip(args, kernel.params, strict=False)
        ]
        key = (name, entry[1], dtype, str(meta["WIDE"]) if brief else f"{special} {meta}")
        if key in seen or not re.search(pattern, f"{name} | {entry[1]} | {call} | {dtype}"):
            return
        seen.add(key)
        code = kernel.warmup(*args, grid=(programs,), **meta)
        instructions = not brief or dtype == "torch.float16"
        made.append(described(name, call, entry, dtype, meta, code, instructions))

    launch.launch = compile_only
    launch.processors = lambda device: 132
    launch.has_large_tiles = lambda device: architecture in (90, 100)
    launch.convolution_layout = lambda input, weight, geometry: (
        torch.channels_last if input.stride(1) == 1 else torch.contiguous_format
    )

    def through(calls: Calls) -> Iterator[Compiled]:
        nonlocal call, asked
        for name, run in calls:
            call = name
            launch.forget_plans()
            with table.noted() as asked:
                run()
            yield from made
            made.clear()

    for dtype, precision in ((torch.float16, ""), (torch.float32, "tf32"), (torch.float32, "ieee")):
        torch.backends.cudnn.conv.fp32_precision = precision or "none"
        yield from through(convolutions(dtype))
        yield from through(others(dtype))
    if architecture != 80:  # what follows has the same tiles and shared memory, on every architecture
        return
    # bfloat16, which shares float16's entries, with 64-bit offsets, which tensors of more than 2^31 elements take
    launch.wide = lambda *tensors: True
    yield from through(c for c in [*convolutions(torch.bfloat16), *others(torch.bfloat16)] if "64" in c[0])


# ------------------------------------------------------------------------------------------------- what is recorded

RECORDED = Path(__file__).resolve().parents[1] / "benchmarks" / "expected" / "triton.json"
Record = dict[str, dict[str, Any]]

# Pairs of 16 bits that the four tensor cores of a multiprocessor multiply in a clock, on an H100.
_PRODUCTS = 2048


def slots(one: Compiled) -> float | None:
    """Of 1024 clocks of an H100's tensor cores, how many of a scheduler's slots the main loop's instructions take."""
    tile = [one.config.get(f"BLOCK_{letter}", 0) for letter in "MNK"]
    if not one.kinds.get("tensor"):
        return None
    return round(one.loop * one.config["num_warps"] / 4 * 1024 * _PRODUCTS / math.prod(tile))


def record(kernels: Iterable[Compiled]) -> Record:
    """Of float16 kernels, by function, entry and call: what of their code a change may worsen."""
    found: Record = {}
    for one in kernels:
        if one.dtype == "float16" and not one.wide:
            found[f"{one.function} | {one.entry} | {one.call}"] = {
                "loop": one.loop,
                "all": one.instructions,
                **({"slots": slots(one)} if slots(one) else {}),
                "registers": one.registers,
                "stack": one.stack,
                **{f"{kind} {size}": n for kind, sizes in one.accesses.items() for size, n in sizes.items()},
            }
    return found


def recorded() -> dict[str, Record]:
    """By "3.8.0 sm_90"."""
    found: dict[str, Record] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return found


def changes(architecture: int, found: Record, whole: bool) -> list[str]:
    """Against what is recorded for this version of Triton, if it is; where all was compiled, what is gone, too."""
    before = recorded().get(f"{triton.__version__} sm_{architecture}", found)
    keys = sorted(before.keys() | found.keys()) if whole else found
    return [f"{key}: {before.get(key)} -> {found.get(key)}" for key in keys if before.get(key) != found.get(key)]


def write(architecture: int, found: Record) -> None:
    every = {**recorded(), f"{triton.__version__} sm_{architecture}": found}
    blocks = []
    for name, kernels in sorted(every.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(kernels.items()))
        blocks.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    RECORDED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


@dataclass(frozen=True)
class Goal:
    """For one kernel on sm_90: a number of its record, times `scale`, is at most `most`; it was `before`.

    A number may be divided by another one of the record: "all / store 16".
    """

    what: str
    key: str
    number: str  # of the record, or "narrow": accesses of less than 16 bytes of these kinds
    most: float
    before: float
    scale: float = 1.0

    def reached(self, found: Record) -> float:
        kernel = found[self.key]
        number, _, per = self.number.partition(" / ")
        if number in kernel:
            return float(kernel[number]) * self.scale / (kernel[per] if per else 1)
        kinds = self.number.split()
        sizes = [key.split() for key in kernel if " " in key]
        return sum(kernel[f"{kind} {size}"] for kind, size in sizes if kind in kinds and size not in ("16", "box"))


_FPROP, _WGRAD = "conv2d_fprop | 16bit spatial wide |", "conv2d_wgrad | 16bit"
_LRN, _GROUP = "local_response_norm_kernel | pixels | 96 contiguous", "pointwise_group | 16bit wide | group 256"
_DEPTHWISE = "depthwise_fprop | channels | 3x3 stride 1 channels_last"
_SEPARABLE = "depthwise_separable_fprop | 16bit wide | 3x3 128"
# of a step of the separable kernel: all warps, for each of its channels (8 warps and 32 channels before)
_CONFIG = table.SHIPPED["depthwise_separable_fprop"]["16bit wide"]
_A_CHANNEL = _CONFIG["num_warps"] / _CONFIG["BLOCK_K"]
GOALS_VERSION = "3.8.0"  # in whose code they were set; other versions' schedules differ by a few instructions
GOALS = [
    Goal("fprop 3x3: slots in 1024 tensor clocks", f"{_FPROP} 3x3 256", "slots", 420, 844),
    Goal("wgrad 3x3: slots in 256", f"{_WGRAD} spatial wide | 3x3 256", "slots", 300, 741, 1 / 4),
    Goal("wgrad 1x1: slots in 256", f"{_WGRAD} pointwise wide | 1x1 256", "slots", 190, 703, 1 / 4),
    Goal("add_relu: accesses of less than 16 bytes", "add_relu_fprop | any | 56x56", "load store", 0, 24),
    Goal("LRN, contiguous: such accesses", _LRN, "load store", 0, 32),
    Goal("group of 1x1: such stores", _GROUP, "store", 0, 32),
    Goal("separable 3x3: a block's instructions for a channel", _SEPARABLE, "loop", 550 / 4, 863 / 4, _A_CHANNEL),
    Goal("depthwise 3x3: instructions a vector of results", _DEPTHWISE, "all / store 16", 450, 736),
    Goal("3x3 of 24 channels: copies of less than 16 bytes", f"{_FPROP} 3x3 24 channels", "load copy", 1, 97),
    Goal("3x3, contiguous: such copies", f"{_FPROP} 3x3 contiguous", "load copy", 1, 161),
]


def goals() -> tuple[list[str], bool]:
    """A table of them, with a column for each version of Triton that is recorded; whether theirs reaches all."""
    on_hopper = {name.removesuffix(" sm_90"): found for name, found in recorded().items() if name.endswith(" sm_90")}
    versions = dict(sorted(on_hopper.items(), key=lambda item: [int(number) for number in item[0].split(".")]))
    theirs = list(versions).index(GOALS_VERSION)
    lines, all_reached = [], True
    for goal in GOALS:
        reached = [goal.reached(found) for found in versions.values()]
        all_reached &= reached[theirs] <= goal.most
        lines.append([f"{goal.what:<52}", *(f"{number:.0f}" for number in (goal.before, goal.most, *reached))])
    head = [f"{'on sm_90, float16':<52}", "before", "goal", *versions]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)], all_reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", type=int, nargs="?", choices=(80, 90, 100))
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels whose function, entry or call matches")
    parser.add_argument("--brief", action="store_true", help="one call for each entry and dtype")
    parser.add_argument("--names", action="store_true", help="count the instructions of the loops, too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="record it")
    parser.add_argument("--compare", action="store_true", help="with what is recorded, which a change of fails")
    parser.add_argument("--goals", action="store_true", help="and what is recorded; fails if one is missed")
    args = parser.parse_args()
    if args.goals:
        lines, all_reached = goals()
        print("\n".join(lines))
        sys.exit(0 if all_reached else "a goal is missed")
    if args.architecture is None:
        parser.error("needs an architecture")
    found = []
    for one in compiled(args.architecture, args.only, args.brief):
        found.append(one)
        print(json.dumps(asdict(one)) if args.json else one, flush=True)
        if args.names:
            print("    " + ", ".join(f"{count} {name}" for name, count in one.names.items()), flush=True)
    if args.write:
        write(args.architecture, record(found))
    whole = not args.brief and not args.only
    if args.compare and (found_changes := changes(args.architecture, record(found), whole)):
        sys.exit("\n".join(found_changes))


if __name__ == "__main__":
    main()
