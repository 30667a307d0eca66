"""Random networks, swapped: whatever hypothesis puts together computes, writes and learns what it did before."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastconv.swap import swap

CHANNELS = 4

# Each takes the network, the values so far, which all have one shape, and three numbers to choose by.
OPERATIONS = {
    "conv": lambda net, v, i, j, k: net.convs[k % len(net.convs)](v[i]),
    "bn": lambda net, v, i, j, k: net.norms[k % len(net.norms)](v[i]),
    "relu": lambda net, v, i, j, k: F.relu(v[i]),
    "relu_": lambda net, v, i, j, k: F.relu_(v[i]),
    "ReLU": lambda net, v, i, j, k: net.relus[k % len(net.relus)](v[i]),
    "add": lambda net, v, i, j, k: v[i] + v[j],
    "iadd": lambda net, v, i, j, k: operator.iadd(v[i], v[j]),
    "add_": lambda net, v, i, j, k: v[i].add_(v[j]),
    "add pixel": lambda net, v, i, j, k: v[i] + v[j][:, :, :1, :1],
    "mul": lambda net, v, i, j, k: v[i] * 0.5,
    "pool": lambda net, v, i, j, k: F.max_pool2d(v[i], 3, 1, 1),
    "cat": lambda net, v, i, j, k: net.joins[k % len(net.joins)](torch.cat([v[i], v[j]], 1)),
    "view": lambda net, v, i, j, k: v[i].view(v[i].shape[0], -1).view(v[j].shape),
    "flatten": lambda net, v, i, j, k: torch.flatten(v[i], 1).view(v[j].shape),
    "half": lambda net, v, i, j, k: torch.cat([v[i][:, : CHANNELS // 2], v[j][:, CHANNELS // 2 :]], 1),
    "lrn": lambda net, v, i, j, k: F.local_response_norm(v[i], 3, 0.1),
    "detach": lambda net, v, i, j, k: v[i].detach(),
    "identity": lambda net, v, i, j, k: net.identity(v[i]),
}


class RandomNet(nn.Module):
    def __init__(self, program: list[tuple[str, int, int, int]], results: list[int]) -> None:
        super().__init__()
        self.program, self.results = program, results
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same", dilation=2, groups=2),
            ]
        )
        self.joins = nn.ModuleList(nn.Conv2d(2 * CHANNELS, CHANNELS, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(3))
        self.relus = nn.ModuleList([nn.ReLU(inplace=True), nn.ReLU(), nn.ReLU6()])
        self.identity = nn.Identity()
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for name, i, j, k in self.program:
            # Later values more often: chains are what there is to fuse.
            i, j = len(values) - 1 - i % len(values), len(values) - 1 - j % len(values)
            values.append(OPERATIONS[name](self, values, i, j, k))
        return tuple(values[r % len(values)] for r in self.results)


numbers = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 5])
instructions = st.tuples(
    st.sampled_from([*OPERATIONS, *["conv", "bn", "ReLU", "iadd", "add"] * 3]), numbers, numbers, st.integers(0, 3)
)
networks = st.builds(
    RandomNet, st.lists(instructions, min_size=1, max_size=14), st.lists(st.integers(-1, 12), min_size=1, max_size=2)
)


def outcome(net: nn.Module, x: Tensor, target: Tensor | None) -> dict[str, Any]:
    """Everything that can be seen of a call; with a target, of a training step."""
    net, x = copy.deepcopy(net), x.clone()
    outputs = net(x)
    seen = {f"output {i}": out for i, out in enumerate(outputs)} | {"input": x}
    if target is not None and any(out.requires_grad for out in outputs):
        sum((out * target).sum() for out in outputs).backward()
        seen |= {name: p.grad for name, p in net.named_parameters()}
    return seen | dict(net.named_buffers())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_random_networks(net, training, gradients, seed):
    torch.manual_seed(seed)
    net.double().train(training)
    x, target = torch.randn(2, 2, CHANNELS, 6, 6, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        try:
            expected = outcome(net, x, target if gradients else None)
        except RuntimeError:  # written in place what autograd needs
            assume(False)
        got = outcome(swap(net), x, target if gradients else None)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=name)
        if isinstance(value, Tensor):
            assert got[name].stride() == value.stride(), name


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, st.sampled_from([torch.contiguous_format, torch.channels_last]), st.integers(0, 2**16))
def test_random_networks_in_inference(net, layout, seed):
    """In float32, in which convolutions are prepared, and with outputs of eager's layout."""
    torch.manual_seed(seed)
    net.eval()
    x = torch.randn(2, CHANNELS, 6, 6).contiguous(memory_format=layout)
    fast = swap(net)
    with torch.no_grad():
        try:
            expected = outcome(net, x, None)
        except RuntimeError:  # a view that the layout does not allow
            assume(False)
        for _ in range(2):
            got = outcome(fast, x, None)
            for name, value in expected.items():
                scale = max(1.0, float(value.abs().max()))
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)
                if layout is torch.contiguous_format:
                    assert got[name].stride() == value.stride(), name
