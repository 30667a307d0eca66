"""Random networks, swapped: whatever hypothesis puts together computes, writes and learns what it did before."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastconv.swapping import swap

CHANNELS = 4

# Each takes the layers of its own, and two of the values so far, which all have one shape.
OPERATIONS = {
    "conv": lambda own, a, b: own.conv(a),
    "conv, bn, relu": lambda own, a, b: own.relu(own.bn(own.conv(a))),
    "conv, add, relu": lambda own, a, b: own.relu(own.conv(a) + b),
    "conv, bn, iadd, relu": lambda own, a, b: own.relu(operator.iadd(own.bn(own.conv(a)), b)),
    "conv, iadd into b, relu": lambda own, a, b: own.relu(operator.iadd(b, own.conv(a))),
    "bn": lambda own, a, b: own.bn(a),
    "relu": lambda own, a, b: own.relu(a),
    "relu_": lambda own, a, b: F.relu_(a),
    "add": lambda own, a, b: a + b,
    "iadd": lambda own, a, b: operator.iadd(a, b),
    "add_": lambda own, a, b: a.add_(b),
    "add pixel": lambda own, a, b: a + b[:, :, :1, :1],
    "mul": lambda own, a, b: a * 0.5,
    "mul_": lambda own, a, b: a.mul_(0.5),
    "pool": lambda own, a, b: F.max_pool2d(a, 3, 1, 1),
    "cat": lambda own, a, b: own.join(torch.cat([a, b], 1)),
    "view": lambda own, a, b: a.view(a.shape[0], -1).view(b.shape),
    "flatten": lambda own, a, b: torch.flatten(a, 1).view(b.shape),
    "half": lambda own, a, b: torch.cat([a[:, : CHANNELS // 2], b[:, CHANNELS // 2 :]], 1),
    "lrn": lambda own, a, b: F.local_response_norm(a, 3, 0.1),
    "detach": lambda own, a, b: a.detach(),
    "identity": lambda own, a, b: own.identity(a),
}
CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "padding": 1, "groups": CHANNELS},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
]


class Layers(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, **CONVS[k % 4])
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.relu = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True)][k // 4]
        self.join = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.identity = nn.Identity()


class RandomNet(nn.Module):
    def __init__(self, program: list[tuple[str, int, int, int]], results: list[int]) -> None:
        super().__init__()
        self.program, self.results = program, results
        self.layers = nn.ModuleList(Layers(k % 16) for *_, k in program)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, (name, i, j, k) in enumerate(self.program):
            # Later values more often: chains are what there is to fuse.
            a, b = (values[len(values) - 1 - n % len(values)] for n in (i, j))
            own = self.layers[0 if k == 0 else step]  # sometimes shared
            values.append(OPERATIONS[name](own, a, b))
        return tuple(values[r % len(values)] for r in self.results)


numbers = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 5])
instructions = st.tuples(st.sampled_from(list(OPERATIONS)), numbers, numbers, st.integers(0, 31))
networks = st.builds(
    RandomNet,
    st.lists(instructions, min_size=1, max_size=14),
    st.lists(st.integers(-1, 12), min_size=1, max_size=2),
)
layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])
sizes = st.sampled_from([6, 6, 1, 2, 5])


def outcome(net: nn.Module, x: Tensor, target: Tensor | None) -> dict[str, Any]:
    """Everything that can be seen of a call; with a target, of a training step."""
    x = x.clone()
    outputs = net(x)
    seen = {f"output {i}": out for i, out in enumerate(outputs)} | {"input": x}
    if target is not None and any(out.requires_grad for out in outputs):
        sum((out * target).sum() for out in outputs).backward()
        seen |= {name: p.grad for name, p in net.named_parameters()}
    return seen | dict(net.named_buffers())


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_random_networks(net, training, gradients, seed):
    torch.manual_seed(seed)
    net.double().train(training)
    x, target = torch.randn(2, 2, CHANNELS, 6, 6, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        try:
            expected = outcome(copy.deepcopy(net), x, target if gradients else None)
        except RuntimeError:  # written in place what autograd needs
            assume(False)
        got = outcome(swap(net), x, target if gradients else None)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=name)
        if isinstance(value, Tensor):
            assert got[name].stride() == value.stride(), name


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, layouts, layouts, st.tuples(st.integers(1, 2), sizes, sizes), st.integers(0, 2**16))
def test_random_networks_in_inference(net, layout, weights, size, seed):
    """In float32, in which convolutions are prepared, and with outputs of eager's strides."""
    torch.manual_seed(seed)
    net.eval().to(memory_format=weights)
    batch, height, width = size
    x = torch.empty(batch, CHANNELS, height, width, memory_format=layout).normal_()
    fast = swap(net)
    with torch.no_grad():
        try:
            expected = outcome(copy.deepcopy(net), x, None)
        except RuntimeError:  # a view that the layout does not allow
            assume(False)
        for _ in range(2):  # with the weights that the first has prepared
            got = outcome(fast, x, None)
            for name, value in expected.items():
                scale = max(1.0, float(value.abs().max()))
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)
                assert got[name].stride() == value.stride(), name
