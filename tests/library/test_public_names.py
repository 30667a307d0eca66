"""What users type, written down here: whatever of it the package lacks was taken from them."""

import argparse
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import fastconv
from fastconv import models, nn, ops
from fastconv.__main__ import COMMANDS

FACE = {"swap": "model", "explain": "model inputs", "use_backend": "name"}
OPS = {
    "add_relu": "input other activation backend",
    "conv2d_add_relu": "input weight bias residual stride padding dilation groups activation backend out",
    "conv2d_relu": "input weight bias stride padding dilation groups activation backend out",
    "depthwise_conv2d": "input weight bias stride padding dilation activation backend",
    "depthwise_separable_conv2d": "input depthwise_weight pointwise_weight depthwise_bias pointwise_bias stride "
    "padding dilation depthwise_activation pointwise_activation backend",
    "local_response_norm": "input size alpha beta k activation backend",
    "pointwise_conv2d": "input weight bias residual stride activation backend out",
    "pointwise_conv2d_group": "input weights biases activation backend out",
}
# Those of torch.nn.Conv2d and torch.nn.LocalResponseNorm, on which most are built, come through *args and **kwargs.
NN = {
    "AddReLU": "activation",
    "Conv2dAddReLU": "args activation kwargs",
    "Conv2dReLU": "args activation kwargs",
    "DepthwiseConv2d": "in_channels out_channels kernel_size stride padding dilation groups args activation kwargs",
    "DepthwiseSeparableConv2d": "in_channels out_channels kernel_size stride padding dilation multiplier bias "
    "padding_mode depthwise_activation pointwise_activation device dtype",
    "LocalResponseNorm": "size alpha beta k activation",
    "PointwiseConv2d": "in_channels out_channels kernel_size args activation kwargs",
    "PointwiseConv2dGroup": "in_channels out_channels bias activation device dtype",
}
MODELS = {
    "VGG": "stages num_classes dropout",
    "AlexNet2012": "num_classes dropout",
    "GoogLeNet": "num_classes dropout",
    "GoogLeNetOutput": "logits aux1 aux2",
    "LeNet5": "num_classes in_channels image_size",
    "ResNet": "block depths num_classes",
    "Xception": "num_classes",
    "alexnet2012": "num_classes dropout",
    "googlenet": "num_classes dropout",
    "lenet5": "num_classes in_channels image_size",
    "resnet18": "num_classes",
    "resnet50": "num_classes",
    "vgg16": "num_classes dropout",
    "xception": "num_classes",
    "build": "name kwargs",
    "input_shape": "name batch",
    "names": "",
    "title": "name",
}
NETWORKS = "lenet5 alexnet2012 vgg16 googlenet resnet18 resnet50 xception"
OPTIONS = {
    "demo": "--output --networks --seed",
    "info": "",
    "explain": "model --batch --size",
    "verify": "--device --backend --op --dtype --seed",
    "bench": "--networks --dtypes --batches --train --train-batch --device --backend --threads --minutes --longest "
    "--no-compile --json --markdown",
}


def has_parameters(function: Callable[..., Any], names: str) -> bool:
    """Those that are written down, in this order; there may be more."""
    found = iter(inspect.signature(function).parameters)
    return all(name in found for name in names.split())


@pytest.mark.parametrize(
    ("room", "names"),
    [(fastconv, FACE), (ops, OPS), (nn, NN), (models, MODELS)],
    ids=["fastconv", "ops", "nn", "models"],
)
def test_names_and_parameters(room: Any, names: dict[str, str]) -> None:
    missing = [name for name in names if name not in room.__all__]
    assert not missing, f"{room.__name__} has lost {missing}"
    for name, parameters in names.items():
        function = getattr(room, name)
        found = list(inspect.signature(function).parameters)
        assert has_parameters(function, parameters), f"{room.__name__}.{name} has {found}, needed {parameters.split()}"


@pytest.mark.parametrize(("room", "names"), [(ops, OPS), (nn, NN), (models, MODELS)], ids=["ops", "nn", "models"])
def test_new_names_are_written_down(room: Any, names: dict[str, str]) -> None:
    assert sorted(room.__all__) == sorted(names)


def test_the_rooms() -> None:
    assert {*fastconv.__all__} >= {"models", "nn", "ops", "__version__"}


def test_networks() -> None:
    assert set(models.names()) >= set(NETWORKS.split())


@pytest.mark.parametrize("command", OPTIONS)
def test_commands(command: str) -> None:
    assert command in COMMANDS
    parser = argparse.ArgumentParser()
    importlib.import_module(f"fastconv.commands.{command}").add_arguments(parser)
    known = {word for action in parser._actions for word in [*action.option_strings, action.dest]}
    missing = [option for option in OPTIONS[command].split() if option not in known]
    assert not missing, f"python -m fastconv {command} no longer takes {missing}"
