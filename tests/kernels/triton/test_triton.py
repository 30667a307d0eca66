"""The Triton kernels: the numerics suite on backend "triton", and what only these kernels have.

Without a GPU they run in Triton's interpreter (conftest.py turns it on), which executes one program after the
other in numpy: results are checked as everywhere else, races and miscompilations are not. Every case runs in float32;
in 16 bits, and in all combinations of dtype and layout where it is the first of its op, when slow tests do.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv
from fastconv import models, ops
from fastconv.measure.timing import true_float32
from fastconv.operators.schemas import WITH_OUT
from support import numerics
from support.cases import CASES, CONV_OPS, FIRST, LAYOUTS, Case, named, run
from support.interpreter import overflow_is_an_error
from support.kernel_backends import on_triton
from support.numerics import judge, random

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from support.swap_models import short_resnet50, short_xception
from support.swap_models import tensors as swapped_tensors

HALVES = (torch.float16, torch.bfloat16)
# Each dtype, and each layout
SAMPLED = [(torch.float32, "contiguous"), (torch.float16, "channels_last"), (torch.bfloat16, "contiguous")]

# Minutes of interpretation: as many taps as pixels, each tap a step of the depthwise kernels.
LONG = {"depthwise_conv2d-large_filter", "conv2d_relu-stem11x11"}


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with on_triton() as found:
        yield found


def combinations() -> list[Any]:
    """Each case in every dtype and every layout, first cases in all pairs of them; most in 16 bits are slow.

    Kernels read through strides, in an order that may be the layout's, and widen both kinds of 16 bits as they read.
    """
    found = []
    for case in CASES:
        for dtype, layout in itertools.product((torch.float32, *HALVES), LAYOUTS):
            first = case in FIRST.values()
            if not first and (dtype, layout) not in SAMPLED[: 2 if str(case) in LONG else 3]:
                continue
            always = str(case) not in LONG and (
                (dtype, layout) == SAMPLED[0] or (first and dtype in HALVES and layout == "channels_last")
            )
            marks = () if always else pytest.mark.slow
            found.append(pytest.param(case, dtype, layout, id=f"{case}-{dtype}-{layout}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype", "layout"), combinations())
def test_forward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_forward(case, dtype, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in named(*WITH_OUT) if str(case) not in LONG], ids=str)
def test_out(case: Case, layout: str, device: torch.device) -> None:
    numerics.check_out(case, torch.float32, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_from_one_slice_into_the_next(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_from_one_slice_into_the_next(dtype, layout, device)


@pytest.mark.parametrize(("case", "dtype", "layout"), combinations())
def test_backward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_backward(case, dtype, layout, device)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_float64_is_the_aten_composition(case: Case, device: torch.device) -> None:
    numerics.check_forward(case, torch.float64, "contiguous", device)
    numerics.check_backward(case, torch.float64, "channels_last", device)


@pytest.mark.parametrize("make", [numerics.expanded, numerics.transposed, numerics.sliced])
@pytest.mark.parametrize("case", [case for case in FIRST.values() if len(case.shapes["input"]) == 4], ids=str)
def test_odd_gradients(case: Case, make: Any, device: torch.device) -> None:
    numerics.check_odd_gradients(case, "channels_last", make, device)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_non_contiguous_inputs(case: Case, device: torch.device) -> None:
    numerics.check_non_contiguous_inputs(case, torch.float32, "contiguous", device)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_special_values_through_activations(dtype: torch.dtype, activation: str) -> None:
    numerics.check_special_values_through_activations(dtype, activation)


@pytest.mark.parametrize("op", CONV_OPS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values_through_convolutions(op: str, value: float) -> None:
    numerics.check_special_values_through_convolutions(op, torch.float32, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_special_values_through_lrn(value: float) -> None:
    numerics.check_special_values_through_lrn(torch.float16, "channels_last", value)


# ----------------------------------------------------------------------------- what these kernels have


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (4, 6), (2, 1)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (4, 3), (3, 4)], ids=str)
def test_dgrad_phases(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    """Stride and dilation with and without common factors, strides beyond the filter, several groups."""
    arguments = {"input": random(1, 6, 15, 13), "weight": random(4, 3, 3, 2) * 0.3, "bias": random(4)}
    options = {"stride": stride, "dilation": dilation, "padding": (4, 2), "groups": 2, "activation": "none"}
    judge("conv2d_relu", {**arguments, **options})


@pytest.mark.slow
def test_more_channels_than_a_tile() -> None:
    """Several tiles in every direction, none of them full."""
    arguments = {"input": random(2, 70, 9, 8), "weight": random(150, 70, 3, 3) * 0.04, "bias": random(150)}
    judge("conv2d_relu", {**arguments, "padding": 1, "activation": "none"})
    pointwise = {"input": random(3, 130, 7, 7), "weight": random(140, 130, 1, 1) * 0.1, "bias": random(140)}
    judge("pointwise_conv2d", pointwise)


def test_more_branches_than_a_launch_takes() -> None:
    weights = [random(k, 20, 1, 1) * 0.2 for k in (33, 1, 65, 8, 16, 70)]
    judge("pointwise_conv2d_group", {"input": random(2, 20, 5, 6), "weights": weights})


@pytest.mark.parametrize("outputs", [200, 600])
def test_separable_with_many_output_channels(outputs: int) -> None:
    """More columns than a tile has, and more tiles of them than the fused kernel takes."""
    judge(
        "depthwise_separable_conv2d",
        {
            "input": random(1, 40, 6, 7),
            "depthwise_weight": random(40, 1, 3, 3) * 0.5,
            "pointwise_weight": random(outputs, 40, 1, 1) * 0.2,
            "padding": 1,
        },
        grad=False,
    )


@pytest.mark.parametrize(("channels", "size"), [(300, 5), (200, 40), (5, 9), (1, 3)])
def test_lrn_tiles_of_channels(channels: int, size: int) -> None:
    """Tiles with a halo on both sides; windows wider than a halo may be; a single channel."""
    for layout in (torch.contiguous_format, torch.channels_last):
        input = random(2, channels, 3, 2).contiguous(memory_format=layout)
        options = {"size": size, "alpha": 0.8, "beta": 0.75, "k": 1.5, "activation": "relu" if size == 5 else "relu6"}
        judge("local_response_norm", {"input": input * 4, **options})


def test_channel_slices_in_place() -> None:
    """An Inception module's concatenation without a copy: read from a slice, written into slices."""
    from fastconv.triton_kernels.pointwise_conv2d import pointwise_conv2d
    from fastconv.triton_kernels.pointwise_conv2d_group import pointwise_conv2d_group

    wide = random(2, 40, 5, 6).contiguous(memory_format=torch.channels_last)
    input = wide[:, 8:28]
    weights, biases = [random(k, 20, 1, 1) for k in (12, 7)], [random(12), random(7)]
    expected = [F.relu(F.conv2d(input, w, b)) for w, b in zip(weights, biases, strict=True)]
    for layout in (torch.channels_last, torch.contiguous_format):
        joined = torch.full((2, 30, 5, 6), torch.nan).contiguous(memory_format=layout)
        pointwise_conv2d_group(input, weights, biases, "relu", out=[joined[:, :12], joined[:, 12:19]])
        pointwise_conv2d(input, weights[1], biases[1], None, [1, 1], "relu", out=joined[:, 20:27])
        torch.testing.assert_close(joined[:, :19], torch.cat(expected, 1))
        torch.testing.assert_close(joined[:, 20:27], expected[1])
        assert joined[:, 19].isnan().all()
        assert joined[:, 27:].isnan().all()


def test_out_with_gaps_between_its_rows() -> None:
    """One stride leads over all pixels in the kernel for a group; what lies otherwise is copied to."""
    arguments = {"input": random(2, 20, 5, 6), "weights": [random(k, 20, 1, 1) for k in (12, 7)]}
    out = [random(2, 12, 6, 5).mT, random(2, 7, 5, 12)[..., ::2]]
    found = ops.pointwise_conv2d_group(**arguments, out=out)
    for one, expected in zip(found, ops.pointwise_conv2d_group(**arguments, backend="reference"), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("case", [named("conv2d_relu")[1], *FIRST.values()], ids=str)
def test_wide_indices_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit variants, which tensors past 2^31 elements take, on a small one, whose 32 bits don't overflow."""
    from fastconv.triton_kernels import launch as launching

    arguments = case.arguments(requires_grad=True)

    def results() -> list[Tensor]:
        launching.forget_plans()
        return numerics.gradients(case, arguments, [torch.ones_like(o) for o in run(case.op, arguments)])

    with overflow_is_an_error():
        expected = results()
    monkeypatch.setattr(launching, "wide", lambda *tensors: True)
    found = results()
    monkeypatch.undo()
    launching.forget_plans()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_when_indices_are_wide() -> None:
    from fastconv.triton_kernels import launch as launching

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    assert not launching.wide(meta(2**10, 2**10, 2**10))
    assert launching.wide(meta(2**11, 2**10, 2**10))
    assert launching.wide(meta(2**10, 2, 2**11, 2**10)[:, 0])


def test_same_bits_every_time() -> None:
    """Weight and bias gradients are sums of parts, added in a fixed order."""
    arguments = {"input": random(4, 8, 15, 15), "weight": random(8, 8, 3, 3), "bias": random(8)}
    leaves = [t.requires_grad_() for t in arguments.values()]
    first, second = (
        torch.autograd.grad(ops.conv2d_relu(**arguments, activation="none").square().sum(), leaves) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_reductions_are_split() -> None:
    from fastconv.triton_kernels import launch as launching

    part_steps, parts = launching.split(100, 2, torch.device("cpu"))
    assert parts > 1
    assert (parts - 1) * part_steps < 100 <= parts * part_steps
    assert launching.split(3, 1, torch.device("cpu")) == (3, 1)
    assert launching.split(0, 1, torch.device("cpu")) == (1, 0)


def test_tf32_follows_torchs_switch() -> None:
    from fastconv.triton_kernels import launch as launching

    with true_float32():
        for value in ("none", "ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = value
            assert launching.precision(torch.float32) == ("tf32" if value == "tf32" else "ieee")
            assert launching.precision(torch.float16) == "ieee"


# -------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize(("taps", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (5, 1, 2), (3, (2, 3), (4, 5))], ids=str)
def test_eight_warps(
    taps: int,
    stride: Any,
    padding: Any,
    warps: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `launching.guarded` guards against, on the real compiler: every entry of the table, and twice its warps.

    The miscompilation was seen in float32 with the uneven stride and padding.
    """
    if device.type != "cuda":
        pytest.skip("a miscompilation shows on a GPU only")
    from fastconv.triton_kernels import launch as launching

    monkeypatch.setattr(launching, "guarded", lambda config, taps: {**config, "num_warps": warps})
    launching.forget_plans()
    for channels in (32, 64, 256):
        arguments = {
            "input": random(4, channels, 28, 28, dtype=dtype, device=device),
            "weight": random(channels, channels, taps, taps, dtype=dtype, device=device) / (taps * channels**0.5),
        }
        judge("conv2d_relu", {**arguments, "stride": stride, "padding": padding, "activation": "none"})
    launching.forget_plans()


def test_tensors_past_32_bits(device: torch.device) -> None:
    """More than 2^31 elements, on a GPU with the memory for them."""
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB of free memory")
    input = torch.randn(1, 1, 1, 2**31 + 2**12, dtype=torch.float16, device=device)
    found = ops.add_relu(input, input)
    assert torch.equal(found[..., -5000:], ops.add_relu(input[..., -5000:], input[..., -5000:]))
    image = input[0, 0, 0, : 2**31 + 2**11].view(1, 1, 2**20 + 1, 2**11)
    weight = torch.randn(16, 1, 1, 1, dtype=torch.float16, device=device)
    rows = ops.conv2d_relu(image, weight, None, (2**10, 1))
    torch.testing.assert_close(rows[:, :, -1:], ops.conv2d_relu(image[:, :, -1:], weight))


# --------------------------------------------------------------------------------------- networks


def slim(model: torch.nn.Module, image: Tensor) -> torch.nn.Module:
    """The network with an eighth of its channels, and linear layers that take what an image of this size leaves."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Conv2d):
                channels = [c if c == 3 else c // 8 for c in (child.in_channels, child.out_channels)]
                groups = channels[0] if child.groups == child.in_channels else child.groups
                sizes = (child.kernel_size, child.stride, child.padding, child.dilation)
                setattr(module, name, torch.nn.Conv2d(*channels, *sizes, groups, child.bias is not None))
            elif isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.BatchNorm2d(child.num_features // 8))
            elif isinstance(child, torch.nn.Linear):
                setattr(module, name, torch.nn.LazyLinear(max(child.out_features // 8, 10)))
            elif isinstance(child, torch.nn.Dropout):
                child.p = 0.0
    model(image)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size"), [(models.alexnet2012, 67), (models.googlenet, 80), (short_resnet50, 33), (short_xception, 39)]
)
def test_swapped_networks(
    make: Callable[[int], torch.nn.Module], size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of a step of training, and inference, against the reference.

    In training a convolution with a batch norm behind it is eager's; inference folds it.
    """
    from fastconv.triton_kernels import launch as launching

    launched: dict[str, int] = {}

    def launch(kernel: Any, *args: Any, **meta: Any) -> None:
        launched[kernel.__name__] = launched.get(kernel.__name__, 0) + 1
        original(kernel, *args, **meta)

    original = launching.launch
    monkeypatch.setattr(launching, "launch", launch)
    torch.manual_seed(0)
    image = torch.randn(2, 3, size, size).to(device, memory_format=torch.channels_last)
    fast = fastconv.swap(slim(make(10).to(device), image))

    state = {name: value.clone() for name, value in fast.state_dict().items()}

    def step(backend: str) -> list[Tensor]:
        fast.load_state_dict(state)  # running statistics as they were
        with fastconv.use_backend(backend):
            outputs = swapped_tensors(fast.train()(image))
            gradients = torch.autograd.grad(sum(o.square().mean() for o in outputs), list(fast.parameters()))
            with torch.no_grad():
                return [*(o.detach() for o in outputs), *gradients, *swapped_tensors(fast.eval()(image))]

    found = step("triton")
    assert launched.keys() >= {"add_relu_dgrad" if make is short_resnet50 else "conv2d_wgrad", "conv2d_fprop"}, launched
    for index, (one, other) in enumerate(zip(found, step("reference"), strict=True)):
        distance = float((one - other).norm() / other.norm().clamp(min=1e-6))
        assert distance < 1e-3, f"result {index} of shape {tuple(one.shape)}: {distance}"
