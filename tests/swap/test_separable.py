"""Depthwise convolutions and the 1x1 convolutions after them, as one op of a swapped model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv.measure.tolerance import assert_close_to_oracle


class Separable(nn.Module):
    """MobileNet's block, or without batch norms Xception's, after an ordinary convolution."""

    def __init__(
        self,
        bn: bool,
        between: nn.Module,
        channels: int = 24,
        out_channels: int = 40,
        twice: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=not bn)
        self.bn1 = nn.BatchNorm2d(channels) if bn else nn.Identity()
        self.between = between
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=not bn)
        self.bn2 = nn.BatchNorm2d(out_channels) if bn else nn.Identity()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.bn1(self.depthwise(self.stem(x))))
        y = self.bn2(self.pointwise(hidden))
        return y + hidden.mean() if self.twice else y


def model_of(*args: Any, **kwargs: Any) -> Separable:
    torch.manual_seed(0)
    model = Separable(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def ops_of(model: nn.Module, mode: str) -> list[str]:
    return [getattr(row, mode).op for row in fastconv.explain(model).rows]


X = torch.randn(2, 3, 15, 14, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [(24, 40), (256, 300)], ids=["cached", "large"])
@pytest.mark.parametrize("between", [nn.ReLU6(), nn.ReLU(inplace=True), nn.Identity()], ids=str)
@pytest.mark.parametrize("bn", [False, True], ids=["plain", "bn"])
def test_inference(bn: bool, between: nn.Module, channels: tuple[int, int], layout: torch.memory_format) -> None:
    """With weights that stay in the cache, and with larger ones, which run as two convolutions."""
    model = model_of(bn, between, *channels).eval()
    fast = fastconv.swap(model)
    x = X.contiguous(memory_format=layout)
    with torch.no_grad():
        found, baseline = fast(x), model(x)
        oracle = model.double()(x.double())
    assert "depthwise_separable_conv2d" in ops_of(fast, "inference")
    assert_close_to_oracle(found, oracle, baseline, what="separable", border=1)
    assert found.stride() == baseline.stride()


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.Identity()], ids=str)
def test_training(between: nn.Module) -> None:
    model = model_of(False, between).train()
    fast = fastconv.swap(model)
    assert "depthwise_separable_conv2d" in ops_of(fast, "training")
    found, expected = fast(X), model(X)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, parameters, grad),
        torch.autograd.grad(expected, parameters, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_training_batch_norm_is_left_between() -> None:
    fast = fastconv.swap(model_of(True, nn.ReLU()).train())
    assert "depthwise_separable_conv2d" not in ops_of(fast, "training")
    torch.testing.assert_close(fast(X), model_of(True, nn.ReLU()).train()(X))


def test_another_reader_keeps_them_apart() -> None:
    model = model_of(True, nn.ReLU(), twice=True).eval()
    fast = fastconv.swap(model)
    assert "depthwise_separable_conv2d" not in ops_of(fast, "inference")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


@pytest.mark.parametrize("change", ["depthwise.weight", "pointwise.weight", "bn1.running_var", "bn2.bias"])
def test_new_weights_are_seen(change: str) -> None:
    model = model_of(True, nn.ReLU()).eval()
    fast = fastconv.swap(model)
    with torch.no_grad():
        before = [fast(X) for _ in range(3)][-1]
        dict([*model.named_parameters(), *model.named_buffers()])[change].data.mul_(1.5)
        for _ in range(3):  # prepared again on the second
            torch.testing.assert_close(fast(X), model(X))
    assert not torch.equal(before, model(X))


@pytest.mark.parametrize(
    ("layer", "attribute", "value"),
    [
        ("depthwise", "stride", (1, 1)),
        ("depthwise", "padding", (2, 2)),
        ("pointwise", "stride", (2, 2)),
        ("pointwise", "padding", (1, 1)),
    ],
)
def test_another_geometry_is_seen(layer: str, attribute: str, value: tuple[int, int]) -> None:
    """On which it depends whether they are one op, and how large its result is."""
    model = model_of(True, nn.ReLU()).eval()
    fast = fastconv.swap(model)
    with torch.no_grad():
        fast(X)
        for net in (model, fast):
            setattr(getattr(net, layer), attribute, value)
        for _ in range(3):  # prepared again on the second
            torch.testing.assert_close(fast(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = model_of(True, nn.ReLU6()).eval().to(dtype)
    x = X.to(dtype)
    with torch.no_grad():
        baseline = model(x)
        found = fastconv.swap(model)(x)
        oracle = model.double()(x.double())
    assert_close_to_oracle(found, oracle, baseline, what="separable", border=1)
