"""The modules: torch.nn's constructors, state_dicts and results."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import nn, ops

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))

# (fast module, plain module, what the plain one needs around it)
CONVS: dict[str, tuple[Callable[[], torch.nn.Conv2d], Callable[[], torch.nn.Conv2d], Callable]] = {
    "Conv2dReLU": (
        lambda: nn.Conv2dReLU(6, 8, 3, 2, 1, groups=2),
        lambda: torch.nn.Conv2d(6, 8, 3, 2, 1, groups=2),
        F.relu,
    ),
    "Conv2dReLU_reflect": (
        lambda: nn.Conv2dReLU(6, 8, 3, padding=2, padding_mode="reflect", activation="relu6"),
        lambda: torch.nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"),
        F.relu6,
    ),
    "Conv2dReLU_same": (
        lambda: nn.Conv2dReLU(6, 8, (4, 3), padding="same", padding_mode="circular", bias=False),
        lambda: torch.nn.Conv2d(6, 8, (4, 3), padding="same", padding_mode="circular", bias=False),
        F.relu,
    ),
    "PointwiseConv2d": (
        lambda: nn.PointwiseConv2d(6, 5, stride=2, activation="relu"),
        lambda: torch.nn.Conv2d(6, 5, 1, stride=2),
        F.relu,
    ),
    "DepthwiseConv2d": (
        lambda: nn.DepthwiseConv2d(6, 12, 3, padding=1, activation="relu6"),
        lambda: torch.nn.Conv2d(6, 12, 3, padding=1, groups=6),
        F.relu6,
    ),
}


@pytest.mark.parametrize("name", CONVS)
def test_drop_in(name: str) -> None:
    """Same state_dict, loaded both ways; same result and parameter gradients; a torch.nn.Conv2d."""
    make_fast, make_plain, after = CONVS[name]
    fast, plain = make_fast(), make_plain()
    assert isinstance(fast, torch.nn.Conv2d)
    fast.load_state_dict(plain.state_dict(), strict=True)
    make_plain().load_state_dict(fast.state_dict(), strict=True)
    found, expected = fast(X), after(plain(X))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", CONVS)
def test_copies_and_checkpoints(name: str) -> None:
    fast = CONVS[name][0]()
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(X), fast(X))


def test_constructors_take_torchs_arguments() -> None:
    """Every argument of torch.nn.Conv2d, by the same name and with the same default."""
    theirs = inspect.signature(torch.nn.Conv2d).parameters
    for module in (nn.Conv2dReLU, nn.Conv2dAddReLU):
        assert "kwargs" in inspect.signature(module).parameters
        built = module(4, 8, 3, padding_mode="zeros", device="meta", dtype=torch.float64)
        assert built.weight.dtype is torch.float64
        assert built.weight.is_meta
    ours = inspect.signature(nn.DepthwiseConv2d).parameters
    for name, parameter in list(theirs.items())[:6]:
        assert ours[name].default == parameter.default
    assert "weight_norm" not in dir(nn.Conv2dReLU(4, 4, 3))


def test_weight_norm() -> None:
    """Parametrised weights take part, as the module reads self.weight on every call."""
    fast = torch.nn.utils.parametrizations.weight_norm(nn.Conv2dReLU(6, 4, 3))
    expected = F.relu(F.conv2d(X, fast.weight, fast.bias))
    torch.testing.assert_close(fast(X), expected)


def test_add() -> None:
    module = nn.Conv2dAddReLU(6, 4, 3, padding=1)
    plain = torch.nn.Conv2d(6, 4, 3, padding=1)
    plain.load_state_dict(module.state_dict(), strict=True)
    residual = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(module(X, residual), F.relu(plain(X) + residual))
    pointwise = nn.PointwiseConv2d(6, 4)
    torch.testing.assert_close(pointwise(X, residual), F.conv2d(X, pointwise.weight, pointwise.bias) + residual)
    torch.testing.assert_close(nn.AddReLU("relu6")(X, X), F.relu6(X + X))


def test_pointwise_group_is_a_list_of_convs() -> None:
    module = nn.PointwiseConv2dGroup(6, [4, 3], activation="relu")
    plain = torch.nn.ModuleList([torch.nn.Conv2d(6, 4, 1), torch.nn.Conv2d(6, 3, 1)])
    plain.load_state_dict(module.state_dict(), strict=True)
    for found, conv in zip(module(X), plain, strict=True):
        torch.testing.assert_close(found, F.relu(conv(X)))
    outputs = nn.PointwiseConv2dGroup(6, [4, 3], bias=False, dtype=torch.float64)(X.double())
    assert [output.shape[1] for output in outputs] == [4, 3]


def test_depthwise_separable() -> None:
    module = nn.DepthwiseSeparableConv2d(
        6,
        10,
        3,
        stride=2,
        padding=1,
        multiplier=2,
        depthwise_activation="relu",
        padding_mode="reflect",
    )
    expected = module.pointwise(F.relu(module.depthwise(X)))
    torch.testing.assert_close(module(X), expected)
    assert list(module.state_dict()) == [
        "depthwise.weight",
        "depthwise.bias",
        "pointwise.weight",
        "pointwise.bias",
    ]


def test_local_response_norm() -> None:
    arguments = (5, 1e-2, 0.6, 2.0)
    fast, plain = nn.LocalResponseNorm(*arguments), torch.nn.LocalResponseNorm(*arguments)
    assert isinstance(fast, torch.nn.LocalResponseNorm)
    assert str(fast) == str(plain)
    torch.testing.assert_close(fast(X), plain(X))
    activated = nn.LocalResponseNorm(*arguments, activation="relu6")
    torch.testing.assert_close(activated(9 * X), plain(torch.nn.functional.relu6(9 * X)))


def test_representations_name_the_activation() -> None:
    for module in (CONVS["Conv2dReLU_reflect"][0](), nn.AddReLU("relu6"), nn.LocalResponseNorm(5, activation="relu6")):
        assert "activation='relu6'" in repr(module)


def test_modules_compile_without_breaks() -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(nn.Conv2dReLU(6, 8, 3), nn.LocalResponseNorm(3), nn.DepthwiseConv2d(8, 8, 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))


def test_gradients_flow_through_a_stack() -> None:
    model = torch.nn.Sequential(nn.Conv2dReLU(6, 8, 3), nn.LocalResponseNorm(3), nn.DepthwiseSeparableConv2d(8, 4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses: list[Tensor] = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert ops.conv2d_relu(X, model[0].weight, model[0].bias).min() >= 0
