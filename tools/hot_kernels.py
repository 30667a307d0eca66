"""The kernels that matter for speed: a call that runs each of them, and what its machine code does in its main loop."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import machine_code
import plans
from fastconv.measure.timing import tf32
from gpu_model import GPUS, Gpu, Trip
from zoo_convolutions import Convolution

# Those for 16-bit types run the same code for both, and are tried with float16.
HOT = re.compile(
    r"conv2d_(fprop|dgrad|wgrad)_(fp16|tf32|fp32)_(?!reduce)|depthwise_conv2d_\w+_n\w+_\dx|depthwise_separable_conv2d_\w+_3x"
    r"|(add_relu|activation_dgrad|conv2d_gradient)\w*_vec16|local_response_norm_\w+_(vec|lanes)"
)
# Of kernels that move data: tensors that are moved, by those that are stored.
MOVED = {
    "add_relu_fprop": 3,
    "activation_dgrad": 3,  # gradient, output, result
    "conv2d_gradient": 3,
    "local_response_norm_fprop": 2,
    "local_response_norm_dgrad": 3,
}
# Of depthwise kernels: tensors as large as the result that a stride of 1 moves.
DEPTHWISE = {"depthwise_conv2d_fprop": 2, "depthwise_conv2d_dgrad": 3, "depthwise_conv2d_wgrad": 3}
LANES = 32
BOX = 64  # pixels, filters or channels that the TMA brings at once


@dataclass(frozen=True)
class HotKernel:
    """A kernel as it is launched.

    Attributes:
        name: in the table of kernels.
        code: as machine_code has it.
        arch: the compute capability that it is for, and later ones; or `only` that one.
        stages: of its asynchronous pipeline, 0 without one.
        tile: M x N x K of a GEMM.
    """

    name: str
    op: str
    code: str
    arch: int
    only: bool
    threads: int
    shared_bytes: int
    stages: int
    tile: tuple[int, int, int]

    def runs_on(self, gpu: Gpu) -> bool:
        return gpu.number == self.arch if self.only else gpu.number >= self.arch

    def trip(self, code: machine_code.Code) -> Trip:
        if self.op in MOVED:
            path = machine_code.moving(code)
            moved = MOVED[self.op] * machine_code.stored(path)
            return Trip(machine_code.counted(path), 0, machine_code.loaded(path), moved)
        body = machine_code.main_loop(code)
        assert body is not None, self.name
        if any(one.name.startswith("HGMMA") for one in body.instructions):
            return self._warpgroup_trip(body, shares=any("MULTICAST" in one.name for one in code))
        if self.op in DEPTHWISE:
            # A step of a strip, whatever it branches around: each element takes a multiply-add for each tap.
            elements = body.counts["fma"] // int(self.name[-1]) ** 2 * LANES
            loaded = machine_code.loaded(body.instructions)
            return Trip(body.counts, 0, loaded, DEPTHWISE[self.op] * 2 * elements)
        kinds = {kind: [one for one in body.instructions if one.kind == kind] for kind in machine_code.CLASSES}
        through_shared = sum(one.bytes for kind in ("ldsm", "shared", "copy") for one in kinds[kind])
        copied = sum(one.bytes for one in kinds["copy"]) + machine_code.loaded(body.instructions)
        return Trip(body.counts, through_shared // 128, copied)

    def _warpgroup_trip(self, body: machine_code.Loop, shares: bool) -> Trip:
        """Of a warp among those that multiply, for one stage: it has a quarter of each HGMMA of its warpgroup.

        Where it `shares`, two blocks each bring half of B for both. With a halo pixels come once for nine positions, at
        most as many around them as there are in the tile.
        """
        columns = [int(one.name.split(".")[1].split("x")[1]) for one in body.instructions if one.kind == "tensor"]
        rows, width, depth = self.tile
        counts = Counter({**body.counts, "tensor": sum(columns) // 8})
        stage = 2 * (rows + width) * depth  # bytes that come for the warps which share the tile
        if "_halo_" in self.name:
            around = 2 * depth * BOX if self.op.endswith("wgrad") else 2 * 2 * rows * depth // 9
            stage = 2 * depth * BOX + around
        brought = stage - width * depth if shares else stage
        sharing = 4 * rows * width * depth // (64 * 16 * sum(columns))
        read = sum(2 * 16 * (64 + n) for n in columns) // 4
        return Trip(counts, (read + stage // sharing) // 128, brought // sharing, asynchronous=True)


def hot_kernels() -> Iterator[HotKernel]:
    for entry in plans.table():
        if HOT.match(entry["name"]):
            yield _launched(entry)


def _launched(entry: dict[str, Any]) -> HotKernel:
    name, op = entry["name"], entry["op"]
    for call, allowed in _calls(op):
        with contextlib.suppress(RuntimeError), plans.forced(op, name), tf32(allowed):
            gpu = next(each for each in GPUS if each.number >= entry["arch"])
            launch = next(each for each in plans.plan(gpu, call)[-1].launches if each.kernel == name)
            shape = launch.threads, launch.shared_bytes, entry["stages"], tuple(entry["tile"])
            return HotKernel(name, op, launch.code, entry["arch"], entry["only"], *shape)
    raise RuntimeError(f"{name}: none of the calls in {Path(__file__).name} runs it")


def _calls(op: str) -> Iterator[tuple[plans.Call, bool]]:
    """Calls of this op, one of which each of its kernels runs; and whether TF32 is allowed in it."""
    for dtype, allowed in ((torch.float16, False), (torch.float32, True), (torch.float32, False)):
        for call in _calls_with(op, dtype):
            yield call, allowed


def _calls_with(op: str, dtype: torch.dtype) -> Iterator[plans.Call]:
    family, _, direction = op.rpartition("_")
    ops = torch.ops.fastconv_emulated
    image = plans.empty((1, 64, 16, 16), dtype)
    if family == "add_relu":
        yield partial(ops.add_relu, image, torch.empty_like(image), "relu")
    elif family == "activation":
        yield partial(ops.add_relu_backward, image, torch.empty_like(image), "relu")
    elif family == "local_response_norm":
        for given in (image, image.contiguous()):
            if direction == "fprop":
                yield partial(ops.local_response_norm, given, 5, 1e-4, 0.75, 1.0, "none")
            else:
                yield partial(ops.local_response_norm_backward, given, given, 5, 1e-4, 0.75, 1.0, "none")
    elif family == "depthwise_separable_conv2d":
        weights = plans.empty((64, 1, 3, 3), dtype), plans.empty((64, 64, 1, 1), dtype)
        yield partial(ops.depthwise_separable_conv2d, image, *weights, None, None, *[[1, 1]] * 3, "relu", "relu")
    else:
        groups = 64 if family == "depthwise_conv2d" else 1
        layouts = (torch.channels_last, torch.contiguous_format)
        for side, relu, layout in itertools.product((3, 5), (True, False), layouts):
            padding = (side // 2, side // 2)
            conv = Convolution(64, (16, 16), 64, (side, side), (1, 1), padding, groups, relu)
            # Gradients are prepared for both passes.
            yield plans.call_of(conv, 1, "wgrad" if direction == "gradient" else direction, dtype, layout)
        for stride in (1, 2, 4) if family == "conv2d" and direction != "gradient" else ():
            photograph = Convolution(3, (64, 64), 64, (3, 3), (stride, stride), (1, 1), 1, True)
            yield plans.call_of(photograph, 1, direction, dtype)
