"""Small models, and what it means that a swapped one agrees with its original: for the tests of fastconv.swap."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import models
from fastconv.measure.tolerance import assert_close_to_oracle
from fastconv.models.resnet import Bottleneck, ResNet
from fastconv.swapping import swap
from fastconv.swapping.explanation import explain
from fastconv.swapping.regions import region_of

JOINS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "torch.add": torch.add,
    "method": lambda x, y: x.add(y),
    "in-place": lambda x, y: x.add_(y),
    "iadd": operator.iadd,
}


def short_resnet50(classes: int) -> nn.Module:
    """Of the bottlenecks without a projection, which are all alike, one."""
    return ResNet(Bottleneck, (2, 1, 1, 1), classes)


def short_xception(classes: int) -> nn.Module:
    """With two of the eight middle blocks, which are all alike."""
    model = models.xception(classes)
    model.middle = model.middle[:2]
    return model


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with fresh random weights and with batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.5, 0.5),
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2.0),
            ):
                value = getattr(module, name)
                if value is not None:
                    value.data.uniform_(low, high, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
    return model


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in tensors(item)] if value is not None else []


def agree(fast: nn.Module, model: nn.Module, *inputs: Any, baseline: nn.Module | None = None, **kwargs: Any) -> None:
    """In evaluation, without gradients: outputs within the policy, of eager's type, dtype and layout.

    Args:
        baseline: what is allowed twice its error; default: the model.
    """
    assert not model.training
    fast.eval()
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(*to_double(inputs), **to_double(kwargs))
        expected = model(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
        allowed = expected if baseline is None else baseline(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
        for _ in range(2):  # weights that have changed are made ready at the second call
            got = fast(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
            assert type(got) is type(expected)
            outputs = list(zip(*map(tensors, (got, expected, oracle, allowed)), strict=True))
            assert outputs
            for out, eager, exact, base in outputs:
                assert out.stride() == eager.stride()
                assert_close_to_oracle(out, exact, base, what=type(model).__name__)


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    return type(value)(map(to_double, value)) if isinstance(value, list | tuple) else value


def agree_in_training(model: nn.Module, *inputs: Tensor, seed: int = 0) -> None:
    """In float64, where rounding cannot flip a ReLU: outputs, all gradients, and buffers, from one step of each."""
    model = copy.deepcopy(model).double()
    results = []
    for network in (model, swap(model)):
        network = copy.deepcopy(network)
        leaves = [t.detach().double().requires_grad_() for t in inputs]
        torch.manual_seed(seed)
        outputs = tensors(network(*leaves))
        torch.manual_seed(seed)
        sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
        found = {f"output {i}": out for i, out in enumerate(outputs)}
        found |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        found |= {f"grad {name}": p.grad for name, p in network.named_parameters()}
        found |= dict(network.named_buffers())
        results.append(found)
    expected, got = results
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=name)


def inference_choices(model: nn.Module) -> dict[str, str]:
    return {row.module: str(row.inference) for row in explain(model).rows if "<" not in row.module}


def change_all(model: nn.Module, change: Any) -> None:
    """Calls ``change(module, tensor)`` for all numbers of its convolutions and batch norms."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point():
                    change(module, tensor)


def run_count(fast: nn.Module) -> int:
    """How many prepared convolutions there are in the program for one tensor in evaluation mode."""
    programs = region_of(fast).programs(1, (torch.empty(0),), {})
    return 0 if isinstance(programs, str) else len(programs.inference.calls)


class ConvBN(nn.Sequential):
    def __init__(self, *args: Any, relu: nn.Module | None = None, **kwargs: Any) -> None:
        conv = nn.Conv2d(*args, **kwargs)
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels))
        if relu is not None:
            self.append(relu)


class Block(nn.Module):
    """A residual block; `join` adds."""

    def __init__(self, join: Any, channels: int = 8) -> None:
        super().__init__()
        self.first = ConvBN(channels, channels, 3, padding=1, relu=nn.ReLU(inplace=True))
        self.second = ConvBN(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.join(self.second(self.first(x)), x))


def small_net() -> nn.Module:
    return seeded(
        nn.Sequential(
            ConvBN(3, 8, 3, padding=1, relu=nn.ReLU(inplace=True)),
            nn.MaxPool2d(2),
            Block(torch.add),
            nn.Conv2d(8, 6, 1),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )
    ).eval()


def image(*shape: int, seed: int = 1, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 16, 16), generator=generator).contiguous(memory_format=layout)


def features(seed: int = 1) -> Tensor:
    return image(2, 8, 12, 12, seed=seed)


class Acting(nn.Module):
    """A part that can be swapped, and whatever else the forward does."""

    def __init__(self, act: Any, state: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.b = nn.Parameter(torch.ones(8, 1, 1))
        self.act = act
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.act(self, self.relu(self.conv(x)))
