"""Fused CNN kernels for PyTorch: conv+ReLU, residual add, 1x1, depthwise-separable, LRN."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import models, nn, ops
from .operators.backends import use_backend
from .swapping import explain, swap
from .version import __version__

if TYPE_CHECKING:
    from .qualification.qualify import qualify

__all__ = ["__version__", "explain", "models", "nn", "ops", "qualify", "swap", "use_backend"]


def __getattr__(name: str) -> Any:
    """`qualify`, with all that it needs, once it is asked for: who serves a model has done with it."""
    if name == "qualify":
        return import_module("fastconv.qualification.qualify").qualify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
