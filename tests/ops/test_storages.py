"""Tensors without their memory, and out whose memory is of no use: one clear error, and never a read or write of it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastconv import nn, ops
from fastconv.operators.schemas import WITH_OUT
from support.bad_calls import BACKENDS, check_words, message_of
from support.cases import FIRST, Case, run
from support.kernel_backends import device_of

# ----------------------------------------------------------------------------------------- storages

FREED = "bytes of storage, needed "


def freed(tensor: Tensor, left: int = 0) -> Tensor:
    """The tensor without its memory but for so many bytes, as sharded training leaves parameters between their uses."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(left)
    return tensor


def without_memory(case: Case, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    """The case's arguments with one tensor after the other freed, or short of its last byte."""
    found = []
    for name, shape in case.shapes.items():
        for i in range(len(shape)) if isinstance(shape, list) else [None]:
            arguments = case.arguments(**options)
            tensor = arguments[name] if i is None else arguments[name][i]
            for left in (0, tensor.untyped_storage().nbytes() - 1):
                gone = freed(tensor, left)
                value = gone if i is None else [gone if j == i else t for j, t in enumerate(arguments[name])]
                found.append((name, {**arguments, name: value}))
    return found


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_freed_arguments(case: Case, where: str) -> None:
    device_of(where)
    for name, arguments in without_memory(case):
        found = message_of(lambda given=arguments: run(case.op, given, backend=where))
        assert FREED in found
        check_words(case.op, found)
        if "residual" in name or where not in ("cpu", "reference"):
            continue
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert FREED in message_of(lambda given=arguments: run(case.op, given, backend=where))


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_freed_under_vmap(case: Case) -> None:
    arguments = case.arguments()
    for name, shape in case.shapes.items():
        if isinstance(shape, tuple):
            stacked = freed(torch.ones(4, *shape))
            call = torch.vmap(lambda tensor, name=name: run(case.op, {**arguments, name: tensor}))
            assert FREED in message_of(lambda call=call, stacked=stacked: call(stacked))


def test_freed_before_an_op_reads_it() -> None:
    """Where the public function itself makes a copy."""
    x, w = torch.ones(1, 3, 5, 5), torch.ones(3, 3, 2, 2)
    assert FREED in message_of(lambda: ops.conv2d_relu(freed(x), w, padding="same"))
    for pair in ((freed(x), x.double()), (x, freed(x.double())), (freed(x), x[0]), (x[0], freed(x))):
        assert FREED in message_of(lambda given=pair: ops.add_relu(*given))
    for name in ("input", "residual", "out"):
        given = {"input": x[0], "residual": x[0].clone(), "out": x[0].clone(), "weight": w[..., :1, :1]}
        given[name] = freed(given[name])
        found = message_of(partial(ops.pointwise_conv2d, **given))
        assert f"got {name} of shape [3, 5, 5] with 0" in found
    reflecting = nn.Conv2dReLU(3, 3, 3, padding=1, padding_mode="reflect")
    assert FREED in message_of(lambda: reflecting(freed(x)))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("op", WITH_OUT)
def test_freed_out(op: str, where: str) -> None:
    device_of(where)
    arguments = FIRST[op].arguments()
    out = run(op, arguments)
    out[-1] = freed(out[-1], 8)
    given = out if op.endswith("group") else out[0]
    found = message_of(lambda: run(op, {**arguments, "out": given}, backend=where))
    assert re.match(rf"fastconv::{op}: got out.* with 8 {FREED}", found)


@pytest.mark.parametrize("where", BACKENDS)
def test_views_of_what_is_left(where: str) -> None:
    """An offset, a slice and an expansion need what they reach and no more."""
    device_of(where)
    memory = torch.zeros(100)
    view = memory[10:40].view(5, 6)[:, 1:4]
    memory.untyped_storage().resize_((10 + 4 * 6 + 4) * 4)
    ops.add_relu(view, view, backend=where)
    ops.add_relu(memory[:1].expand(200), memory[:1].expand(200), backend=where)
    memory.untyped_storage().resize_((10 + 4 * 6 + 4) * 4 - 1)
    assert "with 151 bytes of storage, needed 152" in message_of(lambda: ops.add_relu(view, view, backend=where))
    empty = freed(torch.zeros(3, 0))
    assert ops.add_relu(empty, empty, backend=where).shape == (3, 0)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_freed_in_the_backward(case: Case) -> None:
    """Of what was saved, and of the incoming gradient."""
    for i in range(len(FIRST[case.op].shapes) + 2):
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> int:
            saved.append(tensor.detach().clone())
            return len(saved) - 1

        with torch.autograd.graph.saved_tensors_hooks(keep, saved.__getitem__):
            outputs = run(case.op, case.arguments(requires_grad=True))
        gradients = [torch.ones_like(output) for output in outputs]
        if i > len(saved):
            return
        if i == len(saved):
            gradients[-1] = freed(gradients[-1])
        else:
            saved[i] = freed(saved[i])
        found = message_of(lambda outputs=outputs, gradients=gradients: torch.autograd.backward(outputs, gradients))
        assert re.search(rf"fastconv::\w+_backward: got .* {FREED}", found)


# ---------------------------------------------------------------------------------------------- out


def strided(*dims: tuple[int, int]) -> Tensor:
    sizes, strides = [size for size, _ in dims], [stride for _, stride in dims]
    return torch.zeros(4000).as_strided(sizes, strides)


@pytest.mark.parametrize("where", [*BACKENDS, "meta"])
def test_out_that_overlaps_itself(where: str) -> None:
    """Refused exactly where two of its elements share memory."""
    if where != "meta":
        device_of(where)
    generator = np.random.default_rng(0)
    layouts = [
        ((2, 1), (4, 1), (5, 1), (4, 1)),
        ((2, 80), (4, 20), (5, 4), (4, 1)),
        ((2, 80), (4, 20), (5, 3), (4, 1)),
        ((2, 3), (4, 6), (5, 24), (4, 120)),
        ((2, 7), (4, 14), (5, 56), (4, 280)),
        ((2, 3), (4, 2), (5, 24), (4, 120)),
        ((2, 3), (4, 2), (5, 24), (4, 1)),
        *(tuple(zip((2, 4, 5, 4), generator.integers(1, 60, 4).tolist(), strict=True)) for _ in range(40)),
    ]
    refused = 0
    for layout in layouts:
        out = strided(*layout)
        places = sum(
            (torch.arange(size).view([-1] + [1] * (3 - i)) * stride for i, (size, stride) in enumerate(layout))
        )
        overlaps = places.unique().numel() < places.numel()
        arguments = {**FIRST["conv2d_relu"].arguments(), "out": out}
        backend = where
        if where == "meta":
            backend = None
            arguments = tree_map_only(
                Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), device="meta"), arguments
            )
        if overlaps:
            refused += 1
            found = message_of(
                lambda arguments=arguments, backend=backend: run("conv2d_relu", arguments, backend=backend)
            )
            assert "needed memory for every element; pass a tensor whose elements do not overlap" in found
            check_words("conv2d_relu", found)
        else:
            run("conv2d_relu", arguments, backend=backend)
    assert 0 < refused < len(layouts)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("op", WITH_OUT)
def test_out_of_inference_mode(op: str, where: str) -> None:
    """torch's own rule for what is written in place."""
    device_of(where)
    arguments = FIRST[op].arguments()
    with torch.inference_mode():
        results = run(op, arguments)
        [result.fill_(7) for result in results]
        made_there = tree_map_only(Tensor, torch.clone, arguments)
    out = results if op.endswith("group") else results[0]
    for given in (arguments, made_there):
        found = message_of(lambda given=given: run(op, {**given, "out": out}, backend=where))
        assert f"fastconv::{op}: got out that was made in inference mode, needed a tensor from outside of it; " in found
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert message_of(lambda given=given: run(op, {**given, "out": out}, backend=where)) == found
    assert all((result == 7).all() for result in results)
    with torch.inference_mode():
        run(op, {**arguments, "out": out}, backend=where)
