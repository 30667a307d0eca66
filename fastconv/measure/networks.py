"""The networks that are measured and explained, by name; with random weights, so that nothing is downloaded.

A name is one of fastconv.models ("resnet50" or "fastconv:resnet50"), or another package's: "torchvision:mobilenet_v2",
"timm:mobilenetv3_small_100".
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastconv import models

Shape = tuple[int, ...]


def known() -> str:
    """The names that `build` takes, in words."""
    return ", ".join((*models.names(), "torchvision:NAME or timm:NAME"))


def check(name: str) -> None:
    """Raises ValueError if no package can have such a network; imports none of them."""
    package, plain = _split(name)
    if package not in _BUILDERS or (package == "fastconv" and plain not in models.names()):
        raise ValueError(f"got network {name!r}, needed one of {known()}")


def build(name: str, seed: int = 0) -> tuple[nn.Module, Shape]:
    """A network in training mode, and the ``[C, H, W]`` of the images that it was made for.

    Args:
        name: see above.
        seed: of its weights.

    Raises:
        ImportError: its package cannot be imported.
        ValueError: there is no such network, or it takes no images.
    """
    check(name)
    package, plain = _split(name)
    torch.manual_seed(seed)
    return _BUILDERS[package](plain)


def title(name: str) -> str:
    """The network's name as people write it, as far as that is known."""
    package, plain = _split(name)
    return models.title(plain) if package == "fastconv" else plain


def _split(name: str) -> tuple[str, str]:
    package, colon, plain = name.partition(":")
    return (package, plain) if colon else ("fastconv", name)


def _ours(plain: str) -> tuple[nn.Module, Shape]:
    return models.build(plain), models.input_shape(plain)[1:]


def torchvision_model(plain: str, **more: Any) -> nn.Module:
    """One of torchvision's with random weights, in training mode; nothing is downloaded. `more` goes to its builder."""
    builder = _imported("torchvision").models.get_model_builder(plain)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # the default is a download
    if plain in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # the default, which warns that it will be another one
    return builder(**options, **more)


def _torchvision(plain: str) -> tuple[nn.Module, Shape]:
    package = _imported("torchvision")
    _require("torchvision", plain, package.models.list_models())
    preset = _preset(package, plain)
    if preset in ("VideoClassification", "OpticalFlow"):
        raise ValueError(f"network 'torchvision:{plain}' takes no images, which is all that is tried here")
    model = torchvision_model(plain)
    side = getattr(model, "image_size", None) or _side(package, plain)
    return model, (3, side, side)


def _preset(package: ModuleType, plain: str) -> str:
    return type(_transforms(package, plain)).__name__


def _side(package: ModuleType, plain: str) -> int:
    """Of the images that the weights were trained on: 299 for inception_v3, of a segmentation network 520."""
    preset = _transforms(package, plain)
    sides = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)
    return sides[0] if sides else 224  # a detector resizes them itself


def _transforms(package: ModuleType, plain: str) -> Any:
    weights = list(package.models.get_model_weights(plain))
    return weights[0].transforms() if weights else None


def _timm(plain: str) -> tuple[nn.Module, Shape]:
    package = _imported("timm")
    if not package.is_model(plain):
        _require("timm", plain, package.list_models())
    model = package.create_model(plain, pretrained=False)
    return model, tuple(model.pretrained_cfg.get("input_size", (3, 224, 224)))


def _imported(package: str) -> ModuleType:
    try:
        return __import__(package)
    except (ImportError, RuntimeError, OSError) as problem:  # RuntimeError: built for another torch
        raise ImportError(f'{package} cannot be imported ({problem}); pip install "fastconv[zoo]"') from problem


def _require(package: str, plain: str, names: Sequence[str]) -> None:
    if plain not in names:
        close = difflib.get_close_matches(plain, names) or names[:3]
        raise ValueError(f"{package} has no network {plain!r}; it has {', '.join(close)} and others")


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Shape]]] = {
    "fastconv": _ours,
    "torchvision": _torchvision,
    "timm": _timm,
}
