"""Networks in training: one step of SGD with momentum in float32, its gradients verified, its time and memory."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.measure import memory, networks
from fastconv.measure.contenders import (
    CHANNELS_LAST,
    CONTIGUOUS,
    IN_TRAINING,
    LRN_ONLY,
    SWAPPED,
    Result,
    Row,
    images_for,
    prepare,
)
from fastconv.measure.timing import Budget, take_turns
from fastconv.measure.tolerance import BASELINE_FACTOR

# A gradient is a sum over ReLUs and max pools, some of which rounding makes choose otherwise.
GRADIENT_FLOOR = 1e-3


def train(network: str, batch: int, budget: Budget) -> Row:
    """Time and peak memory of a step of each contender whose gradients are right."""
    row = Row(network, "training", "fp32", batch)
    try:
        model, shape = networks.build(network)
    except (ImportError, ValueError) as problem:
        row.note = f"skipped: {problem}"
        return row
    images, labels = torch.randn(batch, *shape), torch.randint(10, (batch,))
    _judge(row, model, images[:4], labels[:4])

    right = [who for who, result in row.results.items() if not result.note]
    steps = {}
    for who in right:
        step = Step(prepare(who, copy.deepcopy(model)))
        steps[who] = functools.partial(step, images_for(who, images), labels)
        steps[who]()
    take_turns(steps, row.results, budget.next_task())
    del steps, step
    for who in right:
        arguments = (network, who, str(batch), str(torch.get_num_threads()))
        row.results[who].peak_bytes = memory.peak_bytes(run_steps, *arguments)
    return row


def _judge(row: Row, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Enters the error of each contender's gradients, without dropout."""
    still = copy.deepcopy(model)
    for module in still.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    oracle = _gradients(CONTIGUOUS, copy.deepcopy(still).double(), images.double(), labels)
    has_lrn = any(isinstance(module, nn.LocalResponseNorm) for module in model.modules())
    for who in IN_TRAINING if has_lrn else (CHANNELS_LAST, CONTIGUOUS, SWAPPED):
        found = _gradients(who, prepare(who, copy.deepcopy(still)), images, labels)
        error = max(float((found[name].double() - exact).norm() / exact.norm()) for name, exact in oracle.items())
        if who in (LRN_ONLY, SWAPPED):
            row.judge(who, error)
            continue
        row.results[who] = Result(error=error)
        if who == CHANNELS_LAST:
            row.allowed_error = BASELINE_FACTOR * error + GRADIENT_FLOOR


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    outputs = model(images)
    heads = (outputs,) if isinstance(outputs, Tensor) else outputs  # GoogLeNet has three
    return torch.stack([F.cross_entropy(head, labels) for head in heads]).sum()


def _gradients(who: str, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = _loss(model, images_for(who, images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class Step:
    """Steps of training a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # The rate is too small for anything to grow in as many steps as there may be.
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        _loss(self._model, images, labels).backward()
        self._optimizer.step()


def run_steps(network: str, who: str, batch: str, threads: str) -> None:
    """What `memory.peak_bytes` runs: the network is built, and steps twice."""
    torch.set_num_threads(int(threads))
    model, shape = networks.build(network)
    images, labels = torch.randn(int(batch), *shape), torch.randint(10, (int(batch),))
    images = images_for(who, images)
    step = Step(prepare(who, model))
    step(images[:2], labels[:2])  # momentum comes with the first step
    step(images, labels)
