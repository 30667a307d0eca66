"""Models to try `fastconv.swap` on: timm's, torchvision's, and forwards of our own for what neither has.

The names are in zoo.txt; ``python tools/zoo.py`` makes that list anew. Nothing is downloaded: the weights are random,
and batch norms are not the identity.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import synthetic
from fastconv.measure import networks

LIST = Path(__file__).with_name("zoo.txt")
_LARGEST = 60_000_000  # parameters
_ALSO = ("torchvision:regnet_x_400mf", "torchvision:regnet_y_400mf")  # cannot be made without memory, to be counted
_BOXES = [[4.0, 6.0, 40.0, 44.0], [10.0, 20.0, 60.0, 50.0]]


class Unusable(Exception):
    """The model itself cannot be built or run here."""


@dataclass
class Subject:
    """A model in evaluation mode, with arguments for it.

    Attributes:
        calls: positional arguments, of different sizes where the model takes more than one.
        training: those of a training step.
        settings: keyword arguments of every call.
    """

    name: str
    model: nn.Module
    calls: list[tuple[Any, ...]]
    training: tuple[Any, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """All of zoo.txt, and the forwards of our own."""
    listed = [line.split("#")[0].strip() for line in LIST.read_text().splitlines()]
    return [*(f"synthetic:{name}" for name in synthetic.FORWARDS), *filter(None, listed)]


def build(name: str) -> Subject:
    """The model of this name, "timm:resnet18" for example; the same numbers every time.

    Raises:
        Unusable: it cannot be built, or runs for none of the sizes that are tried.
    """
    source, _, model = name.partition(":")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _calibrate(_SOURCES[source](name, model))
        except Unusable:
            raise
        except Exception as error:
            raise Unusable(f"{type(error).__name__}: {error}") from error


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms get statistics and weights, and every constant parameter noise: many are made as 0, 1 or 1e-6."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _calibrate(subject: Subject) -> Subject:
    """Statistics near those of the images, where the model trains: with others the images' traces fade on the way."""
    norms = [module for module in subject.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_var is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    subject.model.train()
    with torch.no_grad(), contextlib.suppress(Exception):
        subject.model(*in_layout(subject.training, "contiguous"), **subject.settings)
    subject.model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()) + 1e-6)
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.5)
    return subject


def in_layout(value: Any, layout: str) -> Any:
    """The arguments, copied, with images (and videos) in this layout: "contiguous" or "channels_last"."""
    if isinstance(value, Tensor):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        known = formats.get(value.dim()) if layout == "channels_last" else None
        return value.detach().clone(memory_format=known or torch.contiguous_format)
    if isinstance(value, dict):
        return type(value)((key, in_layout(item, layout)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(in_layout(item, layout) for item in value)
    return copy.deepcopy(value)


# ---------------------------------------------------------------------------------------------------- sources


def _synthetic(name: str, key: str) -> Subject:
    model = randomize(synthetic.build(key)).eval()
    calls = [(torch.randn(2, 3, *size),) for size in ((16, 16), (12, 20))]
    return Subject(name, model, calls, calls[0])


def _timm(name: str, key: str) -> Subject:
    import timm

    model = randomize(timm.create_model(key, pretrained=False)).eval()
    config = model.pretrained_cfg
    channels, *native = config.get("input_size", (3, 224, 224))
    sizes = [] if config.get("fixed_input_size") else [((64, 64), (96, 64)), ((128, 128), (160, 128))]
    return _first_that_runs(name, model, _images(channels, [*sizes, (tuple(native),)]))


def _torchvision(name: str, key: str) -> Subject:
    model = randomize(_torchvision_model(key)).eval()
    module = type(model).__module__
    if "detection" in module:
        return _detection(name, model)
    if "optical_flow" in module:
        pairs = [tuple(torch.rand(1, 3, *size) * 2 - 1 for _ in range(2)) for size in ((128, 128), (136, 160))]
        return Subject(name, model, pairs, pairs[0], {"num_flow_updates": 2})
    if "video" in module:
        videos = [(torch.randn(2, 3, *size),) for size in ((8, 64, 64), (8, 80, 64))]
        return _first_that_runs(name, model, [videos, [(torch.randn(1, 3, 16, 224, 224),)]])
    sizes = [((64, 64), (96, 80)), ((96, 96), (128, 96)), ((224, 224),), ((299, 299),)]
    return _first_that_runs(name, model, _images(3, sizes))


def _torchvision_model(key: str) -> nn.Module:
    has_second_head = key.startswith(("fcn", "deeplab"))
    return networks.torchvision_model(key, **({"aux_loss": True} if has_second_head else {}))


def _images(channels: int, candidates: list[tuple[tuple[int, ...], ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Batches of two images of each size; where there is one size only, a single image as well."""
    for sizes in candidates:
        calls: list[tuple[Any, ...]] = [(torch.randn(2, channels, *size),) for size in sizes]
        yield calls if len(calls) > 1 else [*calls, (torch.randn(1, channels, *sizes[0]),)]


def _first_that_runs(name: str, model: nn.Module, candidates: Any) -> Subject:
    """With the first arguments that the model takes in both modes, or at least in evaluation mode."""
    problem: Exception | None = None
    only_evaluation = None
    for calls in candidates:
        try:
            _try(model, calls)
        except Exception as error:
            problem = problem or error
            continue
        try:
            _try(copy.deepcopy(model).train(), calls[:1])
            return Subject(name, model, calls, calls[0])
        except Exception:
            only_evaluation = only_evaluation or calls
    if only_evaluation is None:
        raise Unusable(f"{type(problem).__name__}: {problem}")
    return Subject(name, model, only_evaluation, only_evaluation[0])


def _try(model: nn.Module, calls: list[tuple[Any, ...]]) -> None:
    with torch.no_grad():
        for args in calls:
            model(*args)


def _detection(name: str, model: nn.Module) -> Subject:
    """Small images, which the detector's own resizing would enlarge."""
    if not model.transform.fixed_size:
        model.transform.min_size, model.transform.max_size = (96,), 160
    images = [[torch.rand(3, 64, 80), torch.rand(3, 72, 64)], [torch.rand(3, 96, 64)]]
    target = {"boxes": torch.tensor(_BOXES), "labels": torch.tensor([1, 2])}
    if "mask" in name:
        target["masks"] = torch.zeros(2, 64, 80, dtype=torch.uint8)
        target["masks"][:, 8:40, 12:36] = 1
    if "keypoint" in name:
        target["keypoints"] = torch.tensor([[[20.0, 25.0, 1.0]] * 17] * 2)
    targets = [target, copy.deepcopy(target)]
    if "mask" in name:
        targets[1]["masks"] = torch.ones(2, 72, 64, dtype=torch.uint8)
    return Subject(name, model, [(one,) for one in images], (images[0], targets))


_SOURCES: dict[str, Callable[[str, str], Subject]] = {
    "synthetic": _synthetic,
    "timm": _timm,
    "torchvision": _torchvision,
}


# --------------------------------------------------------------------------------------------------- the list


def chosen() -> list[str]:
    """The rule behind zoo.txt.

    A family is what a name begins with, up to the first digit or size; it is represented by its smallest member that
    has convolutions. Of each module of timm, the two smallest families, or a quarter of them where there are many; of
    torchvision, all but the quantized ones. The smallest come first.
    """
    import timm
    import torchvision

    found = []
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        families = _smallest({f"timm:{name}": functools.partial(timm.create_model, name) for name in names})
        found += families[: max(2, len(families) // 4)]
    names = [name for name in torchvision.models.list_models() if not name.startswith("quantized")]
    found += _smallest({f"torchvision:{name}": functools.partial(_torchvision_model, name) for name in names})
    return [*(name for _, name in sorted(found)), *_ALSO]


def _smallest(members: dict[str, Callable[[], nn.Module]]) -> list[tuple[int, str]]:
    """The smallest member of each family with the number of its parameters, the smallest first."""
    found: dict[str, tuple[int, str]] = {}
    for name, make in members.items():
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make()
        except Exception:  # a few compute numbers when they are made
            continue
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > _LARGEST or not any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
            continue
        family = re.split(r"(?<!v)\d|_(?:tiny|small|base|large|nano|pico|femto|atto|xx?s|[tsmbl])(?:_|$)", name)[0]
        found[family] = min(found.get(family, (size, name)), (size, name))
    return sorted(found.values())


if __name__ == "__main__":
    print("# Made by `python tools/zoo.py`; the rule is in that file.")
    print(*chosen(), sep="\n")
