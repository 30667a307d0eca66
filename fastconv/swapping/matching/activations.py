"""Activations, which several patterns end with, or begin with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from .effects import Effect, argument
from .matcher import Match, Matcher

ATTRIBUTES = ("min_val", "max_val")  # of layers, on which it depends which activation they are


def activation_of(node: fx.Node, matcher: Matcher) -> str | None:
    """ "relu" or "relu6", if that is what the node computes of its first argument."""
    if matcher.effects.of[node] not in (Effect.NEW, Effect.IN_PLACE):
        return None
    if node.op == "call_module":
        module = matcher.module(node)
        if type(module) is nn.ReLU:
            return "relu"
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    elif node.op == "call_method" or node.target in (torch.relu, torch.relu_, F.relu_):
        known = node.target in ("relu", "relu_", torch.relu, torch.relu_, F.relu_)
        return "relu" if known and len(node.args) == 1 and not node.kwargs else None  # else it fails, and is to
    elif node.target is F.relu:
        return "relu"
    elif node.target is F.relu6:
        return "relu6"
    elif node.target is F.hardtanh:
        bounds = argument(node, "min_val"), argument(node, "max_val")
        return "relu6" if bounds == (0, 6) else None
    return None


def take_activation(match: Match, matcher: Matcher) -> str:
    """Lets a match grow by the activation after it: "relu" or "relu6"; "none" where it does not."""
    node = None if match.reason else matcher.next(match)
    activation = None if node is None else activation_of(node, matcher)
    if activation == "relu6" and not matcher.fold and matcher.effects.is_ever_written(node):
        # In eager, in place or not, the gradient comes from the input.
        match.reason = "its ReLU6 may be overwritten, and the fused one needs it for the gradient"
    elif activation is not None:
        match.nodes.append(node)
        match.parts.append(activation)
        return activation
    elif node is not None:
        match.reason = f"{matcher.describe(node)} follows"
    return "none"
