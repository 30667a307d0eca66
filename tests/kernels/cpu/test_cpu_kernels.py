"""What is particular to csrc/cpu/kernels: every instruction set, ragged ends, threads, odd values.

The other tests run the build of the kernels that this machine picks; the last test here runs this
file again with each lesser one.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle, poisoned_outputs
from fastconv.operators import library

if not library.LOADED:
    pytest.skip(f"the compiled library is missing: {library.PROBLEM}", allow_module_level=True)

from fastconv import _C

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# One less and one more than 1, 2 and 4 vectors of SSE, AVX2 and AVX-512, in fp32 and fp64
RAGGED = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 65)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def random(*shape: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return value.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else value


def surrounded_by_nan(tensor: Tensor) -> Tensor:
    """The same values and strides in the middle of NaN, which a read out of bounds would bring."""
    margin = 64
    memory = torch.full((tensor.numel() + 2 * margin,), torch.nan, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), margin).copy_(tensor)


def check(op: Callable[..., Tensor], tensors: list[Tensor | None], **options: Any) -> None:
    """The op on tensors that lie between NaNs, against float64."""
    with poisoned_outputs():
        out = op(*(t if t is None else surrounded_by_nan(t) for t in tensors), **options)
    oracle = op(*(t if t is None else t.double() for t in tensors), backend="reference", **options)
    baseline = op(*tensors, backend="reference", **options)
    border = 1 if out.dim() == 4 else None
    assert_close_to_oracle(out, oracle, baseline, what=op.__name__, border=border)


# ------------------------------------------------------------------------------------- ragged ends


@dtypes
@pytest.mark.parametrize("n", RAGGED)
def test_add_relu_of_any_length(n: int, dtype: torch.dtype) -> None:
    for activation in ("none", "relu", "relu6"):
        pair = [random(n, dtype=dtype) * 4, random(n, dtype=dtype, seed=1) * 4]
        check(ops.add_relu, pair, activation=activation)


@dtypes
@layouts
@pytest.mark.parametrize("n", RAGGED)
def test_local_response_norm_of_any_length(n: int, dtype: torch.dtype, layout: str) -> None:
    shape = (2, 7, 1, n) if layout == "contiguous" else (2, n, 2, 3)
    input = random(*shape, dtype=dtype, layout=layout) * 3
    for activation in ("none", "relu", "relu6"):
        check(ops.local_response_norm, [input], size=4 + n % 2, alpha=0.5, k=0.5, activation=activation)


@dtypes
@pytest.mark.parametrize("channels", RAGGED)
def test_depthwise_of_any_channels(channels: int, dtype: torch.dtype) -> None:
    tensors = [
        random(2, channels, 4, 9, dtype=dtype, layout="channels_last"),
        random(channels, 1, 3, 3, dtype=dtype, seed=1),
        random(channels, dtype=dtype, seed=2),
    ]
    check(ops.depthwise_conv2d, tensors, padding=1, activation="relu")


@dtypes
@pytest.mark.parametrize("out_channels", RAGGED)
def test_separable_of_any_channels(out_channels: int, dtype: torch.dtype) -> None:
    tensors = [
        random(1, 11, 5, 6, dtype=dtype, layout="channels_last"),
        random(11, 1, 3, 3, dtype=dtype, seed=1),
        random(out_channels, 11, 1, 1, dtype=dtype, seed=2),
        random(11, dtype=dtype, seed=3),
        random(out_channels, dtype=dtype, seed=4),
    ]
    check(ops.depthwise_separable_conv2d, tensors, padding=1, depthwise_activation="relu")


def unfolded(input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """A depthwise convolution of one image; aten's own takes a hundred times as long in float64."""
    columns = F.unfold(input, weight.shape[2:], padding=padding, stride=stride)
    products = columns.view(*weight.shape[:1], -1, columns.shape[-1]) * weight.flatten(1)[..., None]
    return products.sum(1).view(1, weight.shape[0], input.shape[2] + 2 * padding[0] - 2, -1)


@pytest.mark.parametrize("filter", [1, 2, 3, 5])
def test_depthwise_rows_of_any_width(filter: int) -> None:
    """Rows are cut into tiles of 6, 4, 2 and 1 pixels, and into borders."""
    weight = random(33, 1, 3, filter, dtype=torch.float32, seed=1)
    for width in range(1, 16):
        input = random(1, 33, 4, width, dtype=torch.float32, layout="channels_last")
        for stride, padding in itertools.product((1, 2, 3), (0, 1, 4)):
            if width + 2 * padding < filter:
                continue
            geometry = (1, stride), (1, padding)
            out = ops.depthwise_conv2d(surrounded_by_nan(input), weight, None, *geometry)
            oracle = unfolded(input.double(), weight.double(), *geometry)
            what = f"width {width}, stride {stride}, padding {padding}"
            assert_close_to_oracle(out, oracle, oracle.float(), what=what, border=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_separable_of_any_pixels(dtype: torch.dtype) -> None:
    """The matrix product takes 6 pixels at a time (12 with AVX-512)."""
    depthwise = random(35, 1, 3, 3, dtype=dtype, seed=1)
    pointwise = random(24, 35, 1, 1, dtype=dtype, seed=2)
    for width in range(1, 30):
        input = random(1, 35, 3, width, dtype=dtype, layout="channels_last")
        out = ops.depthwise_separable_conv2d(surrounded_by_nan(input), depthwise, pointwise, padding=(0, 1))
        hidden = unfolded(input.double(), depthwise.double(), (1, 1), (0, 1))
        oracle = F.conv2d(hidden, pointwise.double())
        assert_close_to_oracle(out, oracle, oracle.to(dtype), what=f"{width} pixels")


# ------------------------------------------------------------------------------------------ values


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal down to the sign of zero; any NaN equals any other."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_every_16_bit_number(dtype: torch.dtype, activation: str) -> None:
    """Conversion and rounding are written here for CPUs without an instruction for them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for shift in (0, 2**14 + 1, 2**15 + 3):
        other = numbers.roll(shift)
        expected = ops.add_relu(numbers, other, activation=activation, backend="reference")
        assert same_bits(ops.add_relu(numbers, other, activation=activation), expected)


SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 6.0, 6.5, -6.0, float("inf"), float("-inf"), float("nan"))


@dtypes
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activations_of_special_values(dtype: torch.dtype, activation: str) -> None:
    input = torch.tensor(SPECIAL * 4, dtype=dtype)
    zero = torch.full_like(input, -0.0)
    exact = F.relu if activation == "relu" else F.relu6
    assert same_bits(ops.add_relu(input, zero, activation=activation), exact(input))

    output = input.clone()  # the mask for any output, also those that no activation returns
    grad = torch.ones_like(output)
    mask = torch.ops.fastconv.add_relu_backward(grad, output, activation)
    expected = (
        torch.ops.aten.threshold_backward(grad, output, 0)
        if activation == "relu"
        else torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
    )
    # torch's hardtanh_backward stops at NaN in some vector widths and not in others.
    seen = ~output.isnan() if activation == "relu6" else torch.ones_like(output, dtype=torch.bool)
    assert same_bits(mask[seen], expected[seen])
    assert (mask[output.isnan()] == 1).all()


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e18])
@pytest.mark.parametrize(("size", "activation"), [(4, "none"), (5, "none"), (5, "relu")])
def test_an_odd_value_stays_in_its_windows(value: float, size: int, activation: str, layout: str) -> None:
    input = random(2, 37, 3, 5, dtype=torch.float32, layout=layout).requires_grad_()
    odd = input.detach().clone()
    odd[1, 20, 1, 2] = value
    odd.requires_grad_()
    outputs = [ops.local_response_norm(x, size, alpha=0.5, activation=activation) for x in (input, odd)]
    gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y, x in zip(outputs, (input, odd), strict=True)]
    touched = torch.zeros_like(input, dtype=torch.bool)
    reached = touched.clone()
    # channel c sums over c - size // 2 ... c + (size - 1) // 2; a gradient over what c is in, too
    touched[1, 20 - (size - 1) // 2 : 20 + size // 2 + 1, 1, 2] = True
    reached[1, 20 - size + 1 : 20 + size, 1, 2] = True
    assert torch.equal(outputs[0][~touched], outputs[1][~touched])
    seen = touched & ((input > 0) | (activation == "none"))
    assert not torch.isclose(outputs[0][seen], outputs[1][seen]).any()
    assert torch.equal(gradients[0][~reached], gradients[1][~reached])


@layouts
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("scale", [1e-20, 1e15, 1e18])
def test_local_response_norm_of_any_magnitude(beta: float, scale: float, layout: str) -> None:
    """d^beta must not overflow on the way where it does not in the end."""
    input = random(2, 9, 4, 5, dtype=torch.float32, layout=layout) * scale
    check(ops.local_response_norm, [input], size=3, alpha=1e-4, beta=beta, k=1.0)


@pytest.mark.parametrize("beta", [0.5, 0.75, 0.3])
def test_local_response_norm_of_a_negative_base(beta: float) -> None:
    input = random(1, 5, 3, 3, dtype=torch.float32)
    for k in (-1.0, -100.0):
        out = ops.local_response_norm(input, 3, 1.0, beta, k)
        expected = ops.local_response_norm(input, 3, 1.0, beta, k, backend="reference")
        assert torch.allclose(out, expected, equal_nan=True)
    assert out.isnan().all()


# ----------------------------------------------------------------------------------------- threads


def calls(dtype: torch.dtype, layout: str) -> dict[str, Callable[[], Tensor]]:
    """Each kernel on more than several threads' least share of work, cut at odd places."""
    x = random(3, 37, 31, 29, dtype=dtype, layout=layout)
    g = random(3, 37, 31, 29, dtype=dtype, layout=layout, seed=1)
    depthwise = random(37, 1, 3, 3, dtype=dtype, seed=2)
    pointwise = random(50, 37, 1, 1, dtype=dtype, seed=3)
    kernels = torch.ops.fastconv
    window = (5, 1e-4, 0.75, 2.0, "relu")
    return {
        "add_relu": lambda: kernels.add_relu(x, g, "relu6"),
        "add_relu_backward": lambda: kernels.add_relu_backward(g, x, "relu6"),
        "local_response_norm": lambda: kernels.local_response_norm(x, *window),
        "local_response_norm_backward": lambda: kernels.local_response_norm_backward(g, x, *window),
        "depthwise_conv2d": lambda: ops.depthwise_conv2d(x, depthwise, padding=1),
        "depthwise_separable_conv2d": lambda: ops.depthwise_separable_conv2d(x, depthwise, pointwise, padding=1),
    }


@layouts
@dtypes
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    threads = torch.get_num_threads()
    for name, call in calls(dtype, layout).items():
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            try:
                outputs.append(call())
            finally:
                torch.set_num_threads(threads)
        assert all(same_bits(outputs[0], output) for output in outputs[1:]), name


# ------------------------------------------------------------------------------- instruction sets


CAPABILITIES = ("default", "avx2", "avx512")
LESSER = CAPABILITIES[: CAPABILITIES.index(_C.cpu_capability())]

unless_chosen = pytest.mark.skipif(
    "FASTCONV_CPU_CAPABILITY" in os.environ, reason="the environment has chosen the kernels"
)


def run_with(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "FASTCONV_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )


@unless_chosen
@pytest.mark.parametrize("capability", [*CAPABILITIES, "no such thing"])
def test_the_environment_lowers_the_capability(capability: str) -> None:
    run = run_with(capability, "-c", "from fastconv import _C; print(_C.cpu_capability())")
    expected = capability if capability in LESSER else _C.cpu_capability()
    assert run.stdout.strip() == expected, run.stderr


@unless_chosen
@pytest.mark.parametrize("capability", LESSER)
def test_this_file_with_a_lesser_capability(capability: str) -> None:
    run = run_with(capability, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert run.returncode == 0, run.stdout[-4000:]
