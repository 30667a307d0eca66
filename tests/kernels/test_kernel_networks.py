"""Swapped networks on the GPU kernels, forward and backward, with images small enough for the emulator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import models, swap, use_backend
from fastconv.measure.tolerance import BASELINE_FACTOR
from fastconv.operators import kernels
from support.cuda_kernels import emulated_hopper
from support.kernel_backends import device_of, emulated, on
from support.swap_models import short_resnet50, short_xception

CLASSES = 10
# A gradient passes ReLUs and max pools, some of which rounding makes choose otherwise.
GRADIENT_FLOOR = 1e-3


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


def headed(trunk: nn.Module, channels: int) -> nn.Module:
    """A network's convolutions with one linear layer behind, which takes images of any size."""
    return nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


# With the side of the image, and the kernels that must have run in inference
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "alexnet2012": (lambda: headed(models.alexnet2012().features, 256), 67, {"conv2d_fprop", "local_response_norm"}),
    "vgg16": (lambda: headed(models.vgg16().features, 512), 32, {"conv2d_fprop"}),
    "googlenet": (lambda: models.googlenet(CLASSES), 64, {"conv2d_fprop", "local_response_norm"}),
    "resnet50": (lambda: short_resnet50(CLASSES), 33, {"conv2d_fprop"}),
    "xception": (lambda: short_xception(CLASSES), 39, {"conv2d_fprop", "depthwise_separable_conv2d"}),
}


def runs(emulated: list[str]) -> pytest.MarkDecorator:
    """All networks on a GPU. The emulator takes up to half a minute for one, and what two have alike it sees once."""
    found = [pytest.param("cuda-emulated", n, marks=pytest.mark.slow if n == "xception" else ()) for n in emulated]
    found += [pytest.param("cuda", name) for name in NETWORKS]
    return pytest.mark.parametrize(("backend", "name"), found, indirect=["backend"])


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, side, _ = NETWORKS[name]
    model = make().eval()
    images = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():  # statistics of these images, lest values grow from layer to layer
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(images.repeat(2, 1, 1, 1)) if name != "googlenet" else None
    model = model.eval().to(device, dtype, memory_format=torch.channels_last)
    return model, images.to(device, dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@runs(["alexnet2012", "googlenet", "resnet50", "xception"])
def test_inference(backend: str, name: str) -> None:
    check_inference(backend, name)


@pytest.mark.parametrize(
    ("name", "tile"), [("googlenet", "128x128"), ("googlenet", "256x64_halo"), ("resnet50", "128x128")]
)
def test_inference_by_the_kernels_for_hopper(name: str, tile: str) -> None:
    kernel = f"conv2d_fprop_fp16_{tile}_sm90a"
    with emulated_hopper() as library, kernels.preferred({"conv2d_fprop": kernel}, "cuda-emulated"):
        check_inference("cuda-emulated", name)
        assert library.launches()[kernel] > 10


def check_inference(backend: str, name: str) -> None:
    model, images = build(name, device_of(backend), torch.float16)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
        with use_backend("reference"):  # which knows LRN in float16 on the CPU, unlike eager
            baseline = swap(model)(images)
        if backend == "cuda-emulated":
            emulated().reset_statistics()
        found = swap(model)(images)
    assert error(found, exact) <= BASELINE_FACTOR * error(baseline, exact) + torch.finfo(torch.float16).eps
    if backend == "cuda-emulated":
        launched = " ".join(emulated().launches())
        assert all(kernel in launched for kernel in NETWORKS[name][2]), launched


@pytest.mark.slow
@runs(["alexnet2012", "googlenet", "resnet50"])
def test_training_step(backend: str, name: str) -> None:
    """Gradients of every parameter; batch norms keep their statistics, as when a trained network is tuned.

    In float32: in 16 bits a single max pool that chooses otherwise moves gradients by several percent.
    """
    model, images = build(name, device_of(backend), torch.float32)
    labels = torch.tensor([1, 2], device=images.device)

    def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*network.named_parameters(), strict=True)
        loss = F.cross_entropy(network(x), labels)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {key: g for key, g in zip(names, found, strict=True) if g is not None}

    exact = gradients(copy.deepcopy(model).double(), images.double())
    with use_backend("reference"):
        baseline = gradients(swap(model), images)
    found = gradients(swap(model), images)
    assert found.keys() == exact.keys()
    for key, oracle in exact.items():
        allowed = BASELINE_FACTOR * error(baseline[key], oracle) + GRADIENT_FLOOR
        assert error(found[key], oracle) <= allowed, key
