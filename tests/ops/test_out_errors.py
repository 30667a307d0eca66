"""An out that does not fit, overlaps another argument, or would be differentiated: one clear error on every backend."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastconv import ops
from fastconv.operators.schemas import WITH_OUT
from support.bad_calls import BACKENDS, Bad, on_place, t
from support.cases import FIRST, FORMATS, named, run

PLACES = [*BACKENDS, "fake", "meta"]
OUT_TABLE = [
    Bad(
        "conv2d_relu",
        {"out": t(2, 4, 5, 5)},
        "got out of shape [2, 4, 5, 5], float32 on {0}, needed [2, 4, 5, 4], float32 on {0}, as the result is; "
        "allocate it so, it is not resized",
    ),
    Bad(
        "conv2d_add_relu",
        {"out": t(2, 4, 5, 4, dtype=torch.float16)},
        "got out of shape [2, 4, 5, 4], float16 on {0}, needed [2, 4, 5, 4], float32 on {0}, as the result is; "
        "allocate it so, it is not resized",
    ),
    Bad(
        "pointwise_conv2d",
        {"out": t(5, 3, 4)},
        "got out of shape [5, 3, 4], float32 on {0}, needed [2, 5, 3, 4], float32 on {0}, as the result is; "
        "allocate it so, it is not resized",
    ),
    Bad(
        "pointwise_conv2d",
        {"out": t(1, 5, 3, 4).expand(2, 5, 3, 4)},
        "got out of shape [2, 5, 3, 4] with strides [0, 12, 4, 1], needed memory for every element; "
        "pass a tensor whose elements do not overlap",
    ),
    Bad(
        "pointwise_conv2d_group",
        {"out": [t(2, 2, 3, 3)]},
        "got 1 tensors in out, needed 2, one for each weight; pass as many",
    ),
    Bad(
        "pointwise_conv2d_group",
        {"out": [t(2, 2, 3, 3), t(2, 2, 3, 3)]},
        "got out[1] of shape [2, 2, 3, 3], float32 on {0}, needed [2, 4, 3, 3], float32 on {0}, as the result is; "
        "allocate it so, it is not resized",
    ),
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("bad", OUT_TABLE, ids=str)
def test_bad_out(bad: Bad, where: str) -> None:
    backend, arguments = on_place(where, {**FIRST[bad.op].arguments(), **bad.changes})
    message = bad.message.format("meta" if where == "meta" else "cpu")
    with pytest.raises(RuntimeError, match=re.escape(f"fastconv::{bad.op}: {message}")):
        run(bad.op, arguments, backend=backend)


OVERLAPS = "that overlaps the memory of another argument, needed memory of its own; pass another tensor, or a slice"


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("layout", FORMATS)
def test_out_that_overlaps(layout: str, where: str) -> None:
    """Slices of one tensor are refused exactly where they share an element."""
    backend, _ = on_place(where, None)
    wide = t(2, 20, 6, 8).contiguous(memory_format=FORMATS[layout])
    weight = torch.zeros(4, 8, 1, 1)

    def refuses(input: Tensor, *out: Tensor) -> bool:
        try:
            ops.pointwise_conv2d_group(input, [weight] * len(out), out=out, backend=backend)
        except RuntimeError as error:
            if f"fastconv::pointwise_conv2d_group: got out[{len(out) - 1}] {OVERLAPS}" not in str(error):
                raise
            return True
        return False

    for first in range(17):
        assert refuses(wide[:, 4:12], wide[:, first : first + 4]) == (0 < first < 12)
        assert refuses(t(2, 8, 6, 8), wide[:, 8:12], wide[:, first : first + 4]) == (4 < first < 12)
    quarter = wide[:, :8, 2:4, 4:6]
    for row, column in itertools.product(range(5), range(7)):
        out = wide[:, 4:8, row : row + 2, column : column + 2]
        assert refuses(quarter, out) == (0 < row < 4 and 2 < column < 6)
    assert not refuses(wide[:1, :8], wide[1:, :4])
    even, odd = wide[..., ::2], wide[..., 1::2]
    assert not refuses(even[:, :8], odd[:, :4])
    assert refuses(even[:, :8], even[:, 4:8])


@pytest.mark.parametrize("where", BACKENDS)
def test_out_that_overlaps_a_parameter(where: str) -> None:
    backend, _ = on_place(where, None)
    arguments = named("conv2d_add_relu")[0].arguments()
    with pytest.raises(RuntimeError, match=f"fastconv::conv2d_add_relu: got out {OVERLAPS}"):
        run("conv2d_add_relu", {**arguments, "out": arguments["residual"]}, backend=backend)
    memory = torch.zeros(2, 4, 5, 4)
    for name in ("weight", "bias"):
        shared = memory.view(-1)[: arguments[name].numel()].view_as(arguments[name])
        with pytest.raises(RuntimeError, match=f"fastconv::conv2d_add_relu: got out {OVERLAPS}"):
            run("conv2d_add_relu", {**arguments, name: shared, "out": memory}, backend=backend)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("op", WITH_OUT)
def test_out_is_not_differentiable(op: str, where: str) -> None:
    """torch's own rule; and nothing was written."""
    arguments = named(op)[0].arguments()
    results = [torch.full_like(result, 7) for result in run(op, arguments)]
    for name in ("input", "bias" if "bias" in arguments else "biases", "out"):
        given = {**arguments, "out": results if op.endswith("group") else results[0]}
        given[name] = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), given[name])
        backend, given = on_place(where, given)
        message = f"fastconv::{op}: got out beside an argument that requires grad, needed no such argument while"
        if where != "meta":  # which on_place makes anew, without
            with pytest.raises(RuntimeError, match=message):
                run(op, given, backend=backend)
        assert all((result == 7).all() for result in results)
        with torch.no_grad():
            run(op, given, backend=backend)
        [result.fill_(7) for result in results]
