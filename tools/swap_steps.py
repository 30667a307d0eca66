"""A step of training of a model and of its swapped copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from output_values import leaves, other_nature, to_double, unequal
from swap_report import Eager, line_of, run_model
from zoo import Subject


def compare_step(subject: Subject, training: bool, found: Callable[[str], None]) -> None:
    """In float64, where rounding hardly ever flips a ReLU: outputs, all gradients, statistics."""
    model = copy.deepcopy(subject.model).double()
    fast = fastconv.swap(copy.deepcopy(model))
    args = subject.training if training else subject.calls[0]
    try:
        expected = _step(model, to_double(args), subject.settings, training)
    except Exception as error:
        raise Eager(line_of(error)) from error
    got = _step(fast, to_double(args), subject.settings, training)
    nature = other_nature(expected["output"], got["output"])
    if nature:
        found(nature)
        return
    for kind in expected:
        theirs, ours = _by_path(expected[kind]), _by_path(got[kind])
        if theirs.keys() != ours.keys():
            found(f"{kind}: not the same are there: {sorted(theirs.keys() ^ ours.keys())[:3]}")
            continue
        floats = [t for t in theirs.values() if t.is_floating_point() and t.numel()]
        scale = max((float(t.detach().abs().nan_to_num(0, 0, 0).max()) for t in floats), default=0.0)
        wrong = [(path, text) for path, one in theirs.items() for text in unequal(one, ours[path], scale)]
        if wrong:
            path, text = wrong[0]
            found(f"{kind} {path}: {text}; {len(wrong)} of {len(theirs)} differ")


def _step(model: nn.Module, args: Any, settings: dict[str, Any], training: bool) -> dict[str, Any]:
    model.train(training)
    images = [t for _, t in leaves(args[:1]) if t.is_floating_point()]
    for image in images:
        image.requires_grad_()
    inputs = [image * 1 for image in images]  # a leaf must not be overwritten, as some forwards do
    output = run_model(model, (_with_leaves(args[0], iter(inputs)), *args[1:]), settings, grad=True)
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64)
    for _, tensor in leaves(output):
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            loss = loss + (tensor * weights).sum()
    if not loss.requires_grad:
        raise RuntimeError("no output has a gradient")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "output": output,
        "gradient of": gradients,
        "gradient of the input": {str(i): image.grad for i, image in enumerate(images) if image.grad is not None},
        "buffer": dict(model.named_buffers()),
    }


def _with_leaves(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors) if value.is_floating_point() else value
    return type(value)(_with_leaves(item, tensors) for item in value) if isinstance(value, list | tuple) else value


def _by_path(value: Any) -> dict[str, Tensor]:
    return dict(leaves(value))


def change_weights(model: nn.Module) -> None:
    """A step of an optimizer, with gradients of noise, and other statistics."""
    torch.manual_seed(3)
    parameters = [p for p in model.parameters() if p.is_floating_point() and p.requires_grad]
    for parameter in parameters:
        parameter.grad = 0.05 * torch.randn_like(parameter) * parameter.detach().abs().mean()
    torch.optim.SGD(parameters, lr=1.0).step()
    for parameter in parameters:
        parameter.grad = None
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1)
