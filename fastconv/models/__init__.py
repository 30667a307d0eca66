"""Reference networks in plain torch.nn, written from the papers: the "before" of every comparison.

No fastconv operator is used here. Weights are random (He initialisation), reproducible with
``torch.manual_seed``.

>>> model = fastconv.models.build("resnet50", num_classes=10)
>>> model(torch.randn(fastconv.models.input_shape("resnet50", batch=4))).shape
torch.Size([4, 10])
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fastconv.models.alexnet import AlexNet2012, alexnet2012
from fastconv.models.googlenet import GoogLeNet, GoogLeNetOutput, googlenet
from fastconv.models.lenet import LeNet5, lenet5
from fastconv.models.resnet import ResNet, resnet18, resnet50
from fastconv.models.vgg import VGG, vgg16
from fastconv.models.xception import Xception, xception

__all__ = [
    "VGG",
    "AlexNet2012",
    "GoogLeNet",
    "GoogLeNetOutput",
    "LeNet5",
    "ResNet",
    "Xception",
    "alexnet2012",
    "build",
    "googlenet",
    "input_shape",
    "lenet5",
    "names",
    "resnet18",
    "resnet50",
    "title",
    "vgg16",
    "xception",
]


class _Entry(NamedTuple):
    builder: Callable[..., nn.Module]
    title: str
    channels: int
    size: int


_REGISTRY = {
    "lenet5": _Entry(lenet5, "LeNet-5", 1, 32),
    "alexnet2012": _Entry(alexnet2012, "AlexNet 2012", 3, 227),
    "vgg16": _Entry(vgg16, "VGG-16", 3, 224),
    "googlenet": _Entry(googlenet, "GoogLeNet", 3, 224),
    "resnet18": _Entry(resnet18, "ResNet-18", 3, 224),
    "resnet50": _Entry(resnet50, "ResNet-50", 3, 224),
    "xception": _Entry(xception, "Xception", 3, 299),
}


def names() -> tuple[str, ...]:
    """The names that `build` knows, oldest network first."""
    return tuple(_REGISTRY)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name, in training mode; ``kwargs`` go to its constructor.

    Raises:
        ValueError: if there is no such network.
    """
    return _entry(name).builder(**kwargs)


def input_shape(name: str, batch: int = 1) -> tuple[int, int, int, int]:
    """The ``[N, C, H, W]`` that the paper feeds the network with."""
    entry = _entry(name)
    return batch, entry.channels, entry.size, entry.size


def title(name: str) -> str:
    """The network's name as people write it, for tables and pictures."""
    return _entry(name).title


def _entry(name: str) -> _Entry:
    if name not in _REGISTRY:
        raise ValueError(f"fastconv.models: there is no network {name!r}; choose one of {', '.join(names())}")
    return _REGISTRY[name]
