"""``python -m fastconv tune``: block sizes of the Triton kernels measured on this GPU, as a table of the user's own.

The shipped table (fastconv/triton/table.py) serves without; nothing is ever tuned unasked. Each entry of the table is
timed on one call that stands for its shape class, with a few neighbours of the shipped sizes as candidates; a candidate
counts only if its result is right. The batch size does not matter to an entry, so one run serves all.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import backends

if TYPE_CHECKING:
    from .triton.table import Config, Table

Call = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", help="only the kernels whose name contains this")
    parser.add_argument("--batch", type=int, default=32, help="of the calls that are timed (default: 32)")
    parser.add_argument("--dry-run", action="store_true", help="print the table instead of writing it")


def run(args: argparse.Namespace) -> int:
    reason = backends.available()["triton"]
    if reason is None and not torch.cuda.is_available():
        reason = "no GPU is visible (Triton's interpreter is on: TRITON_INTERPRET=1)"
    if reason is not None:
        print(f"fastconv: tune measures on a GPU, and Triton cannot run on one here: {reason}", file=sys.stderr)
        return 1
    from .triton import table

    entries: Table = {}
    for kernel, name, call in calls(args.batch, args.kernel or ""):
        best, milliseconds, before = measure(kernel, name, call)
        entries.setdefault(kernel, {})[name] = best
        print(f"{kernel:<26} {name:<24} {before:8.4f} -> {milliseconds:8.4f} ms  {best}")
    facts = {"gpu": table.device_name(), "torch": torch.__version__, "triton": _triton_version()}
    if args.dry_run:
        return 0
    kept = {kernel: dict(rows) for kernel, rows in table.user_entries().items()}
    for kernel, rows in entries.items():
        kept.setdefault(kernel, {}).update(rows)
    table.write(kept, facts, table.user_path())
    print(f"written to {table.user_path()}; it is read when the next process starts")
    return 0


def _triton_version() -> str:
    import triton

    return triton.__version__


def candidates(kernel: str, name: str, shipped: Config) -> Iterator[Config]:
    """The shipped entry first, then its neighbours: half and double in each direction, other warps and stages."""
    yield shipped
    sizes = [key for key in shipped if key.startswith("BLOCK") or key == "ELEMENTS"]
    matrix = "BLOCK_K" in shipped
    choices = [sorted({max(shipped[key] // 2, 16 if matrix else 1), shipped[key], 2 * shipped[key]}) for key in sizes]
    most_warps = 4 if "spatial" in name or "ragged" in name or kernel == "conv2d_wgrad" else 8
    warps = [4, 8] if most_warps == 8 else [2, 4]
    stages = [2, 3, 4] if matrix else [shipped["num_stages"]]
    for *blocks, num_warps, num_stages in itertools.product(*choices, warps, stages):
        found = {**shipped, **dict(zip(sizes, blocks, strict=True)), "num_warps": num_warps, "num_stages": num_stages}
        if found != shipped:
            yield found


def measure(kernel: str, name: str, call: Call) -> tuple[Config, float, float]:
    """(the fastest entry, its milliseconds, those of the shipped one); all by the median."""
    from triton.testing import do_bench

    from .triton import table

    shipped = table.SHIPPED[kernel][name]
    expected: Any = None
    best, fastest, before = shipped, float("inf"), float("inf")
    original = table._find
    for candidate in candidates(kernel, name, shipped):

        def find(wanted: str, entry: str, candidate: Config = candidate) -> Config:
            return candidate if (wanted, entry) == (kernel, name) else original(wanted, entry)

        table._find = find  # type: ignore[assignment]
        try:
            result = _flat(call())
            if expected is None:
                expected = result
            if not all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(result, expected, strict=True)):
                print(f"{kernel} {name}: wrong with {candidate}, left out", file=sys.stderr)
                continue
            milliseconds = do_bench(call, return_mode="median")
        except Exception as error:
            # too much shared memory, too many registers: not an entry for this card
            if candidate is shipped:
                raise
            print(f"{kernel} {name}: {type(error).__name__} with {candidate}", file=sys.stderr)
            continue
        finally:
            table._find = original
        if candidate is shipped:
            before = milliseconds
        if milliseconds < fastest:
            best, fastest = candidate, milliseconds
    return best, fastest, before


def _flat(result: Any) -> list[torch.Tensor]:
    return [r.float() for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, torch.Tensor) and r.numel()]


def calls(batch: int, only: str) -> Iterator[tuple[str, str, Call]]:
    """(kernel, entry, a call that stands for it) for every entry of the table whose kernel's name contains `only`."""
    from . import triton as ft
    from .triton import table

    widths = {"narrow": 32, "medium": 64, "wide": 256}
    same = ([1, 1], [1, 1], [1, 1])
    call: Call

    def tensor(*shape: int, dtype: torch.dtype, along: str = "channels") -> torch.Tensor:
        value = torch.randn(shape, device="cuda", dtype=dtype)
        return value.contiguous(memory_format=torch.channels_last) if along == "channels" else value

    for kernel, rows in table.SHIPPED.items():
        for name in rows if only in kernel else ():
            kind, *classes = name.split()
            dtype = torch.float32 if kind in ("tf32", "ieee") else torch.float16
            width = widths.get(classes[-1] if classes else "", 96)
            if kind in ("tf32", "ieee"):
                torch.backends.cudnn.conv.fp32_precision = kind  # type: ignore[attr-defined]
            if kernel.startswith("conv2d"):
                stem, taps = "ragged" in classes, 1 if "pointwise" in classes else 7 if "ragged" in classes else 3
                x = tensor(batch, 3 if stem else width, 56, 56, dtype=dtype)
                w = tensor(width, x.shape[1], taps, taps, dtype=dtype) / (x.shape[1] * taps**2) ** 0.5
                g = tensor(batch, width, 56, 56, dtype=dtype)
                geometry = ([1, 1], [taps // 2] * 2, [1, 1], 1)
                wanted = [kernel == "conv2d_dgrad", kernel == "conv2d_wgrad", False, False]
                call = partial(ft.conv2d_backward, g, None, x, w, *geometry, "none", wanted)
                if kernel == "conv2d_fprop":
                    call = partial(ft.conv2d_relu, x, w, None, *geometry, "relu")
            elif kernel == "pointwise_group":
                x = tensor(batch, 256, 28, 28, dtype=dtype)
                weights = [tensor(k, 256, 1, 1, dtype=dtype) / 16 for k in (width, 16, width)]
                call = partial(ft.pointwise_conv2d_group, x, weights, [], "relu")
            elif kernel == "depthwise_separable_fprop":
                x, d = tensor(batch, 256, 28, 28, dtype=dtype), tensor(256, 1, 3, 3, dtype=dtype) / 3
                w = tensor(width, 256, 1, 1, dtype=dtype) / 16
                call = partial(ft.depthwise_separable_conv2d, x, d, w, None, None, *same, "relu6", "none")
            elif kernel.startswith("depthwise"):
                x, d = tensor(batch, 256, 28, 28, dtype=dtype, along=kind), tensor(256, 1, 3, 3, dtype=dtype)
                wanted = [kernel == "depthwise_dgrad", kernel == "depthwise_wgrad", False, False]
                call = partial(ft.conv2d_backward, x, None, x, d, *same, 256, "none", wanted)
                if kernel == "depthwise_fprop":
                    call = partial(ft.depthwise_conv2d, x, d, None, *same, "relu6")
            elif kernel == "local_response_norm":
                x = tensor(batch, 96, 55, 55, dtype=dtype, along=kind)
                call = partial(ft.local_response_norm_backward, x, x, 5, 5e-4, 0.75, 2.0)
            elif kernel in ("mask_and_sum", "sum_parts"):
                x = tensor(batch, 256, 56, 56, dtype=dtype, along="pixels" if kind == "pixels" else "channels")
                w = tensor(256, 256, 1, 1, dtype=dtype)
                wanted = [False, False, True, True]
                call = partial(ft.conv2d_backward, x, x, x, w, [1, 1], [0, 0], [1, 1], 1, "relu", wanted)
            else:
                x = tensor(batch, 256, 56, 56, dtype=dtype)
                call = partial(ft.add_relu, x, x, "relu")
            yield kernel, name, call
