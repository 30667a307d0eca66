"""Fused CNN kernels for PyTorch: conv+ReLU, residual add, 1x1, depthwise-separable, LRN."""

from . import models, nn, ops
from .operators.backends import use_backend
from .swapping import explain, swap
from .version import __version__

__all__ = ["__version__", "explain", "models", "nn", "ops", "swap", "use_backend"]
