"""Strides of what a swapped network returns in inference: eager's, down to dimensions of one element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastconv.swapping import swap
from support.swap_models import seeded


class Net(nn.Module):
    """Two convolutions of a kind, and what follows or joins them."""

    def __init__(self, kind: str, channels: int, between: int) -> None:
        super().__init__()
        groups = channels if kind == "separable" else 1
        self.first = nn.Conv2d(channels, groups if groups > 1 else between, 3, padding=1, groups=groups)
        self.bn = nn.BatchNorm2d(self.first.out_channels)
        self.second = nn.Conv2d(self.first.out_channels, channels, 1)
        self.act: Callable[[Tensor], Tensor] = nn.ReLU6() if "relu6" in kind else nn.ReLU()
        self.call = KINDS[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


KINDS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "conv": lambda net, x: net.first(x),
    "conv, relu": lambda net, x: net.act(net.first(x)),
    "conv, relu6": lambda net, x: net.act(net.first(x)),
    "two": lambda net, x: net.second(net.first(x)),
    "conv, bn": lambda net, x: net.bn(net.first(x)),
    "bn, add, relu": lambda net, x: net.act(net.second(net.act(net.bn(net.first(x)))) + x),
    "add x, relu6": lambda net, x: net.act(x + net.second(net.first(x))),
    "add": lambda net, x: x + net.second(net.first(x)),
    "pool": lambda net, x: F.max_pool2d(net.act(net.first(x)), 3, 1, 1),
    "global pool": lambda net, x: F.adaptive_avg_pool2d(net.first(x), 1),
    "squeeze": lambda net, x: x * net.second(F.adaptive_avg_pool2d(net.act(net.first(x)), 1)).sigmoid(),
    "separable": lambda net, x: net.second(net.act(net.first(x))),
    "separable, relu": lambda net, x: net.act(net.second(net.act(net.bn(net.first(x))))),
    "lrn": lambda net, x: F.local_response_norm(net.act(net.first(x)), 3),
    "cat": lambda net, x: torch.cat([x, net.first(x)], 1),
    "mean": lambda net, x: net.first(x).mean(0),
    "one image": lambda net, x: net.second(net.first(x[0])),
    "upsampled": lambda net, x: F.interpolate(net.first(x), scale_factor=2),
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: torch.empty_like(x, memory_format=torch.channels_last).copy_(x),
    "expanded": lambda x: x[:1].expand(x.shape),
    "one channel expanded": lambda x: x[:, :1].expand(x.shape),
    "sliced": lambda x: F.pad(x, (1, 0, 0, 2))[:, :, :-2, 1:],
    "sliced channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "transposed": lambda x: x.mT.contiguous().mT,
}
WEIGHTS: dict[str, Callable[[Net], object]] = {
    "contiguous": lambda net: None,
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "first": lambda net: net.first.to(memory_format=torch.channels_last),
    "second": lambda net: net.second.to(memory_format=torch.channels_last),
}


def check(kind: str, weights: str, layout: str, shape: tuple[int, ...], between: int = 4) -> None:
    net = seeded(Net(kind, shape[1], between)).eval()
    WEIGHTS[weights](net)
    x = INPUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    fast = swap(net)
    with torch.inference_mode():
        expected = net(x)
        for _ in range(2):
            found = fast(x)
            assert found.stride() == expected.stride(), (tuple(found.shape), found.stride(), expected.stride())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(WEIGHTS)),
    st.sampled_from(list(INPUTS)),
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 3),
)
def test_strides(kind: str, weights: str, layout: str, shape: tuple[int, ...], between: int) -> None:
    check(kind, weights, layout, shape, between)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 7, 7), (2, 4, 7, 6), (2, 3, 1, 1), (1, 2, 5, 1)], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_small_images(kind: str, weights: str, shape: tuple[int, ...]) -> None:
    for layout in INPUTS:
        check(kind, weights, layout, shape)


def test_another_size_of_the_result() -> None:
    """By a layer whose settings are read at every call."""
    model = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))).eval()
    fast = swap(model)
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    for size in (2, 5, 1):
        model[2].output_size = fast[2].output_size = size
        with torch.no_grad():
            got, expected = fast(x), model(x)
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()
