"""10,000 random calls, shared out among the backends; see random_calls.py, which also makes more of them by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastconv import ops
from support.cases import FORMATS, layout_of
from support.kernel_backends import device_of
from support.random_calls import SHARES, Call, check, sweep

PARTS = 20  # shared by the workers


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(PARTS))
@pytest.mark.parametrize("backend", SHARES)
def test_random_calls(backend: str, seed: int) -> None:
    device_of(backend)
    wrong = sweep(backend, seed, range(SHARES[backend] // PARTS))
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("backend", SHARES)
def test_some_random_calls(backend: str) -> None:
    device_of(backend)
    wrong = sweep(backend, 100, range(SHARES[backend] // 100))
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_wrong_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line makes it again."""
    real = ops.add_relu
    monkeypatch.setattr(ops, "add_relu", lambda *args, **named: real(*args, **named) + 1e-3)
    arguments = {"input": torch.ones(2), "other": torch.ones(2), "activation": "relu"}
    with pytest.raises(AssertionError, match=r"random_calls.py --backend cpu --seed 3 --only 5: add_relu.*max error"):
        check(Call("cpu", 3, 5, "add_relu", arguments, torch.float32))


# ------------------------------------------------------------------------------------------------ what they found


def subnormals(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape) * torch.finfo(dtype).smallest_normal).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", SHARES)
def test_subnormal_numbers(backend: str, dtype: torch.dtype) -> None:
    """Sums of two are exact; a product with one is, too, in a kernel of our own."""
    device_of(backend)
    a, b = subnormals(2, 8, 5, 5, dtype=dtype), subnormals(2, 8, 5, 5, dtype=dtype)
    expected = (a.double() + b.double()).relu().to(dtype)
    assert torch.equal(ops.add_relu(a, b, backend=backend), expected)
    if backend in ("triton", "cuda-emulated"):
        ones = torch.ones(8, 1, 1, 1, dtype=dtype)
        assert torch.equal(ops.depthwise_conv2d(a, ones, backend=backend), a)
        dense = torch.eye(8, dtype=dtype)[:, :, None, None]
        assert torch.equal(ops.pointwise_conv2d(a, dense, backend=backend), a)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda-emulated"])
@pytest.mark.parametrize(
    ("dtype", "filter", "width", "step", "dilation"),
    [
        (torch.bfloat16, (3, 3, 2, 2), 3, 2, 1),  # eager's is wrong
        (torch.bfloat16, (3, 1, 3, 3), 3, 3, 1),
        (torch.float16, (3, 1, 1, 1), 1, 2, 2),  # eager's ends the process
        (torch.bfloat16, (6, 1, 1, 1), 1, 2, 2),
    ],
    ids=["bfloat16", "bfloat16 depthwise", "float16", "bfloat16 dilated"],
)
def test_where_onednn_fails(
    backend: str, dtype: torch.dtype, filter: tuple[int, ...], width: int, step: int, dilation: int
) -> None:
    """A single column of output with a stride; a filter of one pixel that is dilated, which ends eager's process."""
    device_of(backend)
    weight = torch.randn(filter).to(dtype)
    padding = 1 if dilation > 1 else 0
    for height, layout in itertools.product((5, 8, 16), FORMATS.values()):
        input = torch.randn(2, 3, height, width).to(dtype).contiguous(memory_format=layout)
        geometry = (None, (1, step), padding, dilation, 3 // filter[1])
        expected = torch.relu(torch.nn.functional.conv2d(input.double(), weight.double(), *geometry))
        found = ops.conv2d_relu(input, weight, *geometry, backend=backend)
        torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda-emulated"])
def test_strides_wider_than_the_image(backend: str) -> None:
    """In bfloat16, where eager's weight gradient reads memory beside the image."""
    device_of(backend)
    input, weight = torch.randn(1, 16, 5, 1).bfloat16(), torch.randn(16, 16, 1, 3).bfloat16()
    geometry = (None, (1, 2), (0, 2))
    grads = []
    for dtype, options in ((torch.bfloat16, {"backend": backend}), (torch.float64, {"backend": "reference"})):
        beside = [torch.full((size,), 3e38) for size in (1000, 5000, 20000, 100000)]
        del beside
        leaf = weight.to(dtype, copy=True).requires_grad_()
        output = ops.conv2d_relu(input.to(dtype), leaf, *geometry, activation="none", **options)
        grads += torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda-emulated"])
def test_filters_that_meet_padding_alone(backend: str) -> None:
    """In bfloat16, for which eager's process ends."""
    device_of(backend)
    input = torch.randn(2, 3, 5, 3).bfloat16().requires_grad_()
    weight = torch.randn(3, 3, 2, 2).bfloat16().requires_grad_()
    bias = torch.randn(3).bfloat16().requires_grad_()
    output = ops.conv2d_relu(input, weight, bias, 1, (5, 1), (10, 1), activation="none", backend=backend)
    assert torch.equal(output, bias[:, None, None].expand_as(output))
    grads = torch.autograd.grad(output.sum(), (input, weight, bias))
    assert [int(grad.count_nonzero()) for grad in grads] == [0, 0, 3]


def test_weight_gradient_of_an_unbatched_image() -> None:
    """With groups, channels_last and in float64, where eager's is wrong."""
    input = torch.randn(1, 4, 5, 4).double().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 2, 2, 2).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    grads = []
    for image in (input.squeeze(0), input.contiguous()):
        output = ops.conv2d_relu(image, weight, groups=2, activation="none", backend="cpu")
        grads += torch.autograd.grad((output * output).sum(), weight)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", SHARES)
def test_local_response_norm_of_a_transposed_volume(backend: str) -> None:
    """In float64, which Triton leaves to aten; eager's raises."""
    device_of(backend)
    volume = torch.randn(1, 3, 4, 5, 3, dtype=torch.float64)
    expected = torch.nn.functional.local_response_norm(volume, 3)
    found = ops.local_response_norm(volume.mT.contiguous().mT, 3, backend=backend)
    torch.testing.assert_close(found, expected)


def pair(one: str, two: str) -> tuple[torch.Tensor, torch.Tensor]:
    made = {
        "expanded": torch.randn(1, 2, 1, 16).expand(1, 2, 5, 16),
        "channels_last": torch.randn(1, 2, 5, 16).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(1, 2, 16, 5).mT,
        "contiguous": torch.randn(1, 2, 5, 16),
    }
    return made[one], made[two]


@pytest.mark.parametrize("backend", SHARES)
@pytest.mark.parametrize("one", ["expanded", "channels_last", "transposed", "contiguous"])
@pytest.mark.parametrize("two", ["expanded", "channels_last", "transposed", "contiguous"])
def test_layout_of_a_sum(backend: str, one: str, two: str) -> None:
    """The fake kernel says what the real one does, which is eager's."""
    device_of(backend)
    a, b = pair(one, two)
    expected = torch.relu(a + b)
    assert ops.add_relu(a, b, backend=backend).stride() == expected.stride()
    if backend != "reference":
        with FakeTensorMode() as mode:
            fake = ops.add_relu(mode.from_tensor(a), mode.from_tensor(b), backend=backend)
        assert layout_of(fake) == layout_of(expected)


@pytest.mark.parametrize("backend", SHARES)
def test_layouts_that_are_contiguous_and_channels_last(backend: str) -> None:
    """Results are contiguous in every stride, as eager's: a convolution behind them reads the layout from that."""
    device_of(backend)
    image = torch.randn(2, 4, 4, 1).permute(0, 3, 1, 2)
    depthwise = torch.randn(1, 3, 3, 3).contiguous(memory_format=torch.channels_last)[:, 1:2]
    pixel, pointwise = torch.randn(2, 1, 1, 1), torch.randn(4, 1, 1, 1)
    calls = {
        "add_relu": lambda x: ops.add_relu(x, x, backend=backend),
        "local_response_norm": lambda x: ops.local_response_norm(x, 3, backend=backend),
        "separable": lambda x: ops.depthwise_separable_conv2d(pixel, depthwise, pointwise, padding=1, backend=backend),
    }
    expected = {
        "add_relu": (image + image).stride(),
        "local_response_norm": torch.nn.functional.local_response_norm(image, 3).stride(),
        "separable": ops.depthwise_separable_conv2d(
            pixel, depthwise, pointwise, padding=1, backend="reference"
        ).stride(),
    }
    for name, call in calls.items():
        assert call(image).stride() == expected[name], name
        if backend != "reference":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert call(mode.from_tensor(image)).stride() == expected[name], name
