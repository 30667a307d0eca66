"""An op as a function of tensors alone, as torch.autograd's checks take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.cases import Case, run, tensors


def function_of_tensors(case: Case, arguments: dict[str, Any]) -> Any:
    """The op as a function of its tensor arguments, in the order of `tensors`."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)

        def fill(value: Any) -> Any:
            if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
                return [fill(v) for v in value]
            return next(rest) if isinstance(value, Tensor) else value

        return tuple(run(case.op, {name: fill(value) for name, value in arguments.items()}))

    return function


def check_gradgradcheck(case: Case) -> None:
    arguments = case.arguments(torch.float64, seed=1, requires_grad=True)
    function = function_of_tensors(case, arguments)
    torch.autograd.gradgradcheck(function, tensors(arguments), fast_mode=True)
