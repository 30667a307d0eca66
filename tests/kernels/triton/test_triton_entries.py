"""Every entry of the Triton kernels' table is reached by a small layer, and right there: on a GPU, their smoke.

In the interpreter, without a GPU, block sizes mean little: most entries are among the slow tests.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastconv.commands.verify import comparisons
from fastconv.measure.calls import Layer
from fastconv.measure.timing import true_float32
from fastconv.operators import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

WIDTHS = {"narrow": 32, "medium": 64, "wide": 72}
LAYOUTS = {"pixels": "contiguous", "channels": "channels_last"}


def entries() -> list[Any]:
    """(kernel, entry, whether of the larger cards) of the whole table."""
    from fastconv.triton_kernels import table

    found = []
    for large, rows in ((False, table.SHIPPED), (True, table.LARGE)):
        for kernel, entry in ((kernel, entry) for kernel, row in rows.items() for entry in row):
            marks: Any = ()
            if entry.startswith("tf32"):
                marks = pytest.mark.skipif(backends.interpreted(), reason="the interpreter has no TF32")
            elif not large and (entry.startswith("ieee") or entry.endswith(("medium", "wide"))):
                marks = pytest.mark.slow
            found.append(
                pytest.param(kernel, entry, large, id=f"{kernel} {entry}{' large' if large else ''}", marks=marks)
            )
    return found


def convolution(K: int, C: int, taps: int) -> Layer:
    shapes = {"input": (2, C, 5, 6), "weight": (K, C, taps, taps), "bias": (K,)}
    return Layer("conv2d_relu", "entry", shapes, "", {"padding": taps // 2, "activation": "relu6"})


def layer_for(kernel: str, classes: list[str]) -> Layer:
    """A layer whose forward or backward asks for such an entry."""
    width = WIDTHS.get(classes[-1], 0)
    if kernel.startswith("conv2d"):
        kind = classes[1]
        # vectors of 8 bytes are four of 16 bits, or two
        depth = {"pointwise": 40, "spatial": 24, "thin": 20 if classes[0] == "16bit" else 6}[kind]
        channels = (depth, width) if kernel == "conv2d_dgrad" else (width, depth)
        return convolution(*channels, 1 if kind == "pointwise" else 3)
    if kernel == "finish_parts":  # one tile, of whose depth there are several parts
        return convolution(8, 72, 3)
    if kernel == "pointwise_group":
        shapes = {
            "input": (2, 24, 5, 6),
            "weights": [(width, 24, 1, 1), (16, 24, 1, 1)],
            "biases": [(width,), (16,)],
        }
        return Layer("pointwise_conv2d_group", "entry", shapes, "", {"activation": "relu"})
    if kernel == "depthwise_separable_fprop":
        shapes = {
            "input": (2, 24, 5, 6),
            "depthwise_weight": (24, 1, 3, 3),
            "pointwise_weight": (width, 24, 1, 1),
            "depthwise_bias": (24,),
            "pointwise_bias": (width,),
        }
        options = {"stride": 1, "padding": 1, "depthwise_activation": "relu"}
        return Layer("depthwise_separable_conv2d", "entry", shapes, "", options)
    if kernel == "local_response_norm":
        return Layer(kernel, "entry", {"input": (2, 24, 5, 6)}, "", {"size": 5, "activation": "relu"})
    if kernel == "sum_parts":  # of so many pixels there are several
        return Layer("pointwise_conv2d", "entry", {"input": (2, 8, 12, 13), "weight": (8, 8, 1, 1), "bias": (8,)}, "")
    if kernel == "add_relu":
        return Layer(kernel, "entry", {"input": (2, 24, 5, 6), "other": (2, 24, 5, 6)}, "")
    # depthwise, and masks with sums over pixels
    shapes = {"input": (1, 8, 3, 4), "weight": (8, 1, 3, 3), "bias": (8,)}
    return Layer("depthwise_conv2d", "entry", shapes, "", {"padding": 1, "activation": "relu6"})


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside, torch's switch for float32 convolutions is at "tf32" or "ieee"."""
    with true_float32():  # which puts it back
        if name in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = name
        yield


@pytest.mark.parametrize(("kernel", "entry", "large"), entries())
def test_every_entry(kernel: str, entry: str, large: bool) -> None:
    from fastconv.triton_kernels import table

    if (reason := backends.problem("triton")) is not None:
        pytest.skip(reason)
    classes = entry.split()
    layer = layer_for(kernel, classes)
    dtype = torch.float32 if classes[0] in ("tf32", "ieee") else torch.float16
    device = torch.device("cpu" if backends.interpreted() else "cuda")
    rows = table.LARGE if large else table.SHIPPED
    with precision(classes[0]), table.preferred({f"{kernel} {entry}": rows[kernel][entry]}), table.noted() as asked:
        found = comparisons(layer, dtype, LAYOUTS.get(entry, "channels_last"), device, "triton")
    assert f"{kernel} {entry}" in [one.entry for one in asked]
    for comparison in itertools.chain(*found):
        assert comparison.verdict.ok, f"{comparison.tensor}: {comparison.verdict}"
