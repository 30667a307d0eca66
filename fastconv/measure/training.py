"""Networks in training: one step of SGD with momentum, its gradients verified, its time and memory.

Weights are float32; a network computes in it, or under autocast in 16 bits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.measure import memory, networks
from fastconv.measure.calls import DTYPES
from fastconv.measure.contenders import (
    CHANNELS_LAST,
    COMPILED,
    CONTIGUOUS,
    LRN_ONLY,
    SWAPPED,
    Result,
    Row,
    images_for,
    prepare,
)
from fastconv.measure.timing import CPU, Budget, take_turns, true_float32, untuned_cudnn
from fastconv.measure.tolerance import BASELINE_FACTOR

# A gradient is a sum over ReLUs and max pools, some of which rounding makes choose otherwise.
GRADIENT_FLOOR = 1e-3


def train(
    network: str,
    batch: int,
    budget: Budget,
    who: Sequence[str],
    dtype: str = "fp32",
    device: torch.device = CPU,
) -> Row:
    """Time and peak memory of a step of each contender whose gradients are right.

    Args:
        network: its name in `networks`.
        batch: of the step that is timed.
        budget: of time for all rows.
        who: the contenders, among them CHANNELS_LAST.
        dtype: a name in `DTYPES`; of 16 bits, that of autocast.
        device: where.
    """
    row = Row(network, "training", dtype, batch)
    try:
        model, shape = networks.build(network)
    except (ImportError, ValueError) as problem:
        row.note = f"skipped: {problem}"
        return row
    model = model.to(device)
    images, labels = torch.randn(batch, *shape).to(device), torch.randint(10, (batch,)).to(device)
    has_lrn = any(isinstance(module, nn.LocalResponseNorm) for module in model.modules())
    _judge(row, model, images[:4], labels[:4], [one for one in who if has_lrn or one != LRN_ONLY])

    right = [who for who, result in row.results.items() if not result.note]
    steps = {}
    for one in right:
        step = Step(prepare(one, copy.deepcopy(model)), dtype)
        steps[one] = functools.partial(step, images_for(one, images), labels)
        steps[one]()
    take_turns(steps, row.results, budget.next_task(), device)
    if device.type == "cpu":
        del steps, step
        for one in right:
            arguments = (network, one, str(batch), str(torch.get_num_threads()), dtype)
            row.results[one].peak_bytes = memory.peak_bytes(run_steps, *arguments)
    else:
        for one, repeat in steps.items():
            row.results[one].peak_bytes = memory.peak_device_bytes(repeat, device)
    return row


def _judge(row: Row, model: nn.Module, images: Tensor, labels: Tensor, contenders: Sequence[str]) -> None:
    """Enters the error of each contender's gradients, without dropout.

    Under autocast, too, it is that in float32 which is entered: in 16 bits the gradients of a deep network that is not
    trained yet are little but rounding, and a bound upon them says less.
    """
    still = copy.deepcopy(model)
    for module in still.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with untuned_cudnn():
        oracle = _gradients(CONTIGUOUS, copy.deepcopy(still).double(), images.double(), labels)
    for dtype in dict.fromkeys([row.dtype, "fp32"]):
        for who in contenders:
            if who in row.results and row.results[who].note:  # wrong in 16 bits
                continue
            if who == COMPILED:  # it would compile for these few images, too, for minutes
                row.results[who] = Result()
                continue
            with true_float32():
                found = _gradients(who, prepare(who, copy.deepcopy(still)), images, labels, dtype)
            error = _error(found, oracle, dtype)
            if who in (LRN_ONLY, SWAPPED):
                row.judge(who, error)
                continue
            row.results[who] = Result(error=error)
            if who == CHANNELS_LAST:
                row.allowed_error = BASELINE_FACTOR * error + GRADIENT_FLOOR


def _error(found: dict[str, Tensor], oracle: dict[str, Tensor], dtype: str) -> float:
    """Norm of the error by norm of the gradient: of that parameter where it is largest, in 16 bits of all together,
    for a bias before a batch norm, whose gradient is 0, has nothing but error there.
    """
    errors = torch.stack([(found[name].double() - exact).norm() for name, exact in oracle.items()])
    sizes = torch.stack([exact.norm() for exact in oracle.values()])
    return float((errors / sizes).max() if dtype == "fp32" else errors.norm() / sizes.norm())


def _loss(model: nn.Module, images: Tensor, labels: Tensor, dtype: str = "fp32") -> Tensor:
    with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        outputs = model(images)
        heads = (outputs,) if isinstance(outputs, Tensor) else outputs  # GoogLeNet has three
        return torch.stack([F.cross_entropy(head, labels) for head in heads]).sum()


def _gradients(who: str, model: nn.Module, images: Tensor, labels: Tensor, dtype: str = "fp32") -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = _loss(model, images_for(who, images), labels, dtype)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class Step:
    """Steps of training a model."""

    def __init__(self, model: nn.Module, dtype: str) -> None:
        self._model, self._dtype = model, dtype
        # The rate is too small for anything to grow in as many steps as there may be.
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        _loss(self._model, images, labels, self._dtype).backward()
        self._optimizer.step()


def run_steps(network: str, who: str, batch: str, threads: str, dtype: str) -> None:
    """What `memory.peak_bytes` runs: the network is built, and steps twice."""
    torch.set_num_threads(int(threads))
    model, shape = networks.build(network)
    images, labels = torch.randn(int(batch), *shape), torch.randint(10, (int(batch),))
    images = images_for(who, images)
    step = Step(prepare(who, model), dtype)
    step(images[:2], labels[:2])  # momentum comes with the first step
    step(images, labels)
