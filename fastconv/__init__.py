"""Fused CNN kernels for PyTorch: conv+ReLU, residual add, 1x1, depthwise-separable, LRN."""

__version__ = "0.1.0"

from . import models, nn, ops
from .backends import use_backend

__all__ = ["__version__", "models", "nn", "ops", "use_backend"]
