"""Compiles every Triton kernel in every configuration of the shipped table for one GPU architecture, without a GPU.

    python tests/support/triton_compile.py 90        # sm_90; prints one line of JSON for each kernel

A process of its own, as Triton must not be in its interpreter. The launchers run on meta tensors, so that each kernel
gets the very arguments, hence the specialization, of a call; a stand-in for the driver names the architecture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import fastconv.triton_kernels as ft
from fastconv.operators.convolution import output_shape
from fastconv.triton_kernels import launch, table

SHARED = re.compile(r"SHARED:(\d+)")


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


def parts(shape: tuple[int, ...], *, layout: str = "channels_last", dtype: torch.dtype = torch.float16) -> Tensor:
    value = torch.empty(shape, dtype=dtype, device="meta")
    return value.to(memory_format=torch.channels_last) if layout == "channels_last" else value


def convolutions(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """One call for each class of the convolution kernels' table; AlexNet's, VGG's and ResNet's sizes."""

    def tensor(*shape: int) -> Tensor:
        return parts(shape, dtype=dtype)

    def call(K: int, C: int, side: int, pad: int, stride: int = 1) -> Callable[[], Any]:
        def forward_and_backward() -> None:
            x, w, b = tensor(8, C, 56, 56), tensor(K, C, side, side), torch.empty(K, dtype=dtype, device="meta")
            geometry = ([stride] * 2, [pad] * 2, [1, 1], 1)
            y = tensor(*output_shape(x.shape, w.shape, geometry))
            ft.conv2d_add_relu(x, w, b, y, *geometry, "relu6")
            ft.conv2d_backward(y, y, x, w, *geometry, "relu6", [True] * 4)

        return forward_and_backward

    for width in (32, 64, 256):
        yield call(width, 3, 7, 3, 2)  # stem
        yield call(width, width, 3, 1)
        yield call(width, width, 1, 0)
    yield call(96, 20, 3, 2, 2)  # channels that no block divides
    yield call(96, 20, 1, 0, 2)


def others(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """The calls that reach the rest of the table, in both layouts."""

    def vector(size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for width in (32, 64, 256):
        x = parts((8, 192, 28, 28), dtype=dtype)
        weights = [parts((k, 192, 1, 1), dtype=dtype) for k in (width, 16, width)]
        biases = [vector(w.shape[0]) for w in weights]
        yield lambda x=x, weights=weights, biases=biases: ft.pointwise_conv2d_group(x, weights, biases, "relu")
        for side in (3, 7):
            dw, pw = parts((192, 1, side, side), dtype=dtype), parts((width, 192, 1, 1), dtype=dtype)
            yield lambda x=x, dw=dw, pw=pw: ft.depthwise_separable_conv2d(
                x, dw, pw, vector(dw.shape[0]), vector(pw.shape[0]), [1, 1], [1, 1], [1, 1], "relu6", "relu"
            )
    for layout in ("channels_last", "contiguous"):
        x = parts((8, 96, 56, 56), layout=layout, dtype=dtype)
        for side in (3, 7):
            w = parts((96, 1, side, side), dtype=dtype)
            geometry = ([2, 2], [side // 2] * 2, [1, 1])
            y = parts((8, 96, 28, 28), layout=layout, dtype=dtype)
            yield lambda x=x, w=w, g=geometry: ft.depthwise_conv2d(x, w, vector(96), *g, "relu")
            yield lambda x=x, w=w, y=y, g=geometry: ft.conv2d_backward(y, y, x, w, *g, 96, "relu", [True] * 4)
        yield lambda x=x: ft.local_response_norm(x, 5, 1e-4, 0.75, 2.0, "relu")
        yield lambda x=x: ft.local_response_norm_backward(x, x, 5, 1e-4, 0.75, 2.0, "relu")
        deep = parts((8, 1000, 7, 7), layout=layout, dtype=dtype)
        yield lambda x=deep: ft.local_response_norm_backward(x, x, 5, 1e-4, 0.6, 2.0, "none")
    yield lambda x=x: ft.add_relu(x, x, "relu")
    yield lambda x=x: ft.add_relu_backward(x, x, "relu")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (what was spilled lies there) and static shared memory, from the cubin itself."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(found) for name, found in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main(architecture: int) -> None:
    triton.runtime.driver.set_active(Driver(architecture))
    seen: set[Any] = set()
    entries: dict[str, str] = {}

    def remember(kernel: str, *classes: str, **more: Any) -> table.Config:
        entries["kernel"], entries["entry"] = kernel, " ".join(classes)
        return original(kernel, *classes, **more)

    def compile_only(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        described = [str(a.dtype) if isinstance(a, Tensor) else a for a in args]
        # of kernels without a matrix product one size is as good as another
        plain = kernel.fn.__name__ in ("mask_and_sum_kernel", "sum_parts_kernel")
        key = (kernel.fn.__name__, "" if plain else str(described), str(meta))
        if key in seen:
            return
        seen.add(key)
        compiled = kernel.warmup(*args, grid=(programs,), **meta)
        ptx = compiled.asm["ptx"]
        instructions = sorted({i for i in ("mma.sync", "wgmma", "tcgen05.mma") if i in ptx})
        print(
            json.dumps(
                {
                    "function": kernel.fn.__name__,
                    **entries,
                    "dtype": str(args[0].dtype),
                    "wide": meta.get("WIDE", False),
                    "num_warps": meta["num_warps"],
                    "shared": compiled.metadata.shared,
                    "tensor_core": instructions,
                    **resources(compiled.asm["cubin"]),
                }
            ),
            flush=True,
        )

    original, table.config = table.config, remember
    launch.launch = compile_only
    launch.processors = lambda device: 132
    launch.convolution_layout = lambda input, weight, geometry: (
        torch.channels_last if input.stride(1) == 1 else torch.contiguous_format
    )
    for dtype, precision in ((torch.float16, ""), (torch.float32, "tf32"), (torch.float32, "ieee")):
        torch.backends.cudnn.conv.fp32_precision = precision or "none"
        for call in [*convolutions(dtype), *others(dtype)]:
            call()
    if architecture != 80:  # what follows has the same tiles and shared memory, on every architecture
        return
    # 64-bit offsets, which tensors of more than 2^31 elements take: one kernel of each kind
    launch.wide, narrow = (lambda *tensors: True), launch.wide
    for call in [
        *list(convolutions(torch.float16))[3:5],
        *list(others(torch.float16))[3:5],
        *list(others(torch.float16))[-9:],
    ]:
        call()
    launch.wide = narrow
    # bfloat16 shares float16's entries; one kernel of each kind
    for call in [*list(convolutions(torch.bfloat16))[-2:], *list(others(torch.bfloat16))[:2]]:
        call()


if __name__ == "__main__":
    main(int(sys.argv[1]))
