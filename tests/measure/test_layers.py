"""The layers that are measured are those of the networks that they are named for."""

from collections import defaultdict

import pytest
import torch
from torch import nn

from fastconv import models, ops
from fastconv.measure import networks
from fastconv.measure.layers import LAYERS, layers_of

# Networks that are neither ours nor torchvision's.
ELSEWHERE = {"mobilenet_v1": "timm:mobilenetv1_100"}


def test_every_op_has_layers():
    for op in ops.__all__:
        assert len(layers_of(op)) >= 2
        assert any(layer.verified for layer in layers_of(op))


def test_layers_have_names_and_reasons():
    names = [(layer.op, layer.name) for layer in LAYERS]
    assert len(set(names)) == len(names)
    assert all(layer.why for layer in LAYERS)


def network(name):
    """Without memory, on an image of the network's size."""
    package = "fastconv" if name in models.names() else "torchvision"
    try:
        with torch.device("meta"):
            model, shape = networks.build(ELSEWHERE.get(name, f"{package}:{name}"))
    except ImportError as problem:
        pytest.skip(str(problem))
    return model.eval(), (1, *shape)


@pytest.mark.parametrize("name", sorted({layer.name.split("/")[0] for layer in LAYERS}))
def test_layers_are_those_of_the_network(name):
    if name == "vgg_a_lrn":
        pytest.skip("no package has it; Simonyan and Zisserman, table 1")
    model, shape = network(name)
    calls = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, path=path: calls.update({path: (module, inputs, output)})
        )
    model(torch.empty(shape, device="meta"))
    for layer in LAYERS:
        network_name, _, path = layer.name.removesuffix("+relu").partition("/")
        if network_name == name:
            check(layer, {p: call for p, call in calls.items() if f"{p}.".startswith(f"{path}.")})


def check(layer, calls):
    """That these modules, the named one and those within, do what the layer says."""
    input = layer.shapes["input"]
    if layer.op == "add_relu":
        ((_, _, output),) = (call for path, call in calls.items() if path == layer.name.split("/")[1])
        assert output.shape == input
        return
    if layer.op == "local_response_norm":
        ((module, (x,), _),) = calls.values()
        assert x.shape == input
        settings = {name: value for name, value in layer.options.items() if name != "activation"}
        assert settings == {name: getattr(module, name) for name in settings}
        return
    weights = [
        shape
        for name, value in layer.shapes.items()
        if "weight" in name
        for shape in (value if isinstance(value, list) else [value])
    ]
    convs = defaultdict(list)
    for module, (x,), _ in calls.values():
        if isinstance(module, nn.Conv2d):
            convs[tuple(module.weight.shape)].append((module, tuple(x.shape)))
    assert all(weight in convs for weight in weights)
    module = next(module for module, shape in convs[weights[0]] if shape == input)
    pairs = {"stride": 1, "padding": 0}
    for option, default in pairs.items():
        value = layer.options.get(option, default)
        assert getattr(module, option) == (value if isinstance(value, tuple) else (value, value))
    if layer.op in ("conv2d_relu", "conv2d_add_relu"):
        assert module.groups == layer.options.get("groups", 1)
