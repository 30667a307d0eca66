"""What a caller hands in, as the operators' schemas have it: checked for its type, and in one form.

What is checked of tensors that fit the schemas is in `fastconv.operators.checks`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .messages import fail, given, listed, shape_of

INTEGERS = (
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)

Size2 = int | Sequence[int]
Padding = int | Sequence[int] | str

_LONG = 1024  # a stride that no image has


# ------------------------------------------------------------------------------------------ tensors


def tensors(op: str, /, **given: Any) -> None:
    """Each is a dense tensor of a dtype that the ops take."""
    for name, value in given.items():
        if not _is_usable(value):
            _refuse(op, name, value)


def optional_tensors(op: str, /, **given: Any) -> None:
    """The same for arguments that may be None."""
    for name, value in given.items():
        if value is not None and not _is_usable(value):
            _refuse(op, name, value)


def tensor_list(op: str, name: str, values: Any, *, optional: bool = False) -> list[Any]:
    """The same for the entries of a list, which is returned as one; they may be None if they are `optional`."""
    if not isinstance(values, (Sequence, torch.nn.ParameterList)) or isinstance(values, (str, bytes)):
        fail(op, given(name, values), "a list of tensors", f"pass {name} as a list, with one entry for each branch")
    found = list(values)
    for i, value in enumerate(found):
        if not (_is_usable(value) or (optional and value is None)):
            _refuse(op, f"{name}[{i}]", value)
    return found


def _is_usable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype in checks.FLOATING
        and value.layout is torch.strided
        and not value.is_nested
    )


def _refuse(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        fail(op, given(name, value), "a tensor", "pass a torch.Tensor")
    if value.is_nested:
        fail(op, f"{name} that is nested", "a dense tensor", "call the op for each of its tensors")
    if value.layout is not torch.strided:
        fail(op, f"{name} of layout {value.layout}", "a dense tensor", f"convert it with {name}.to_dense()")
    checks.floating_dtype(op, name, value)


def summands(op: str, input: Any, other: Any) -> None:
    """Two tensors whose sum has a dtype that the ops take: one of them may hold integers."""
    for name, value, beside in (("input", input, other), ("other", other, input)):
        if not _is_usable(value) and not (_is_usable(beside) and _holds_integers(value)):
            _refuse(op, name, value)


def _holds_integers(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.dtype in INTEGERS and value.layout is torch.strided and not value.is_nested
    )


# ------------------------------------------------------------------------------------------ numbers


def pair(op: str, name: str, value: Any, least: int) -> list[int]:
    """An int or a pair as the dispatcher's list."""
    if type(value) is int and least <= value <= checks.MOST:
        return [value, value]
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value, value]
    values = [_integer(entry) for entry in entries]
    if any(entry is None for entry in values):
        fail(op, given(name, value), "two integers (height, width)", "pass an int or a pair")
    checks.pair(op, name, values, least)
    return values


def count(op: str, name: str, value: Any, remedy: str) -> int:
    """An int from 1 on."""
    if type(value) is int and 1 <= value <= checks.MOST:
        return value
    number = _integer(value)
    if number is None:
        fail(op, given(name, value), "an integer", remedy)
    checks.count(op, name, number, remedy)
    return number


def real(op: str, name: str, value: Any) -> float:
    number = _real(value)
    if number is None:
        fail(op, given(name, value), "a number", "pass a float")
    return number


def _real(value: Any) -> float | None:
    """As a float; None for what is none, such as a bool, a tensor or an int past its range."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _integer(value: Any) -> Any:
    """As an int; None for what is none, such as a bool or a tensor."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        return None
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


# ------------------------------------------------------------------------ a convolution's arguments


def batch(op: str, input: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """An unbatched [C, H, W] as a batch of one, and what takes the batch off the result."""
    if input.dim() == 3:
        checks.storage(op, "input", input)
        return input.unsqueeze(0), _first
    return input, as_it_is


def batch_like(op: str, unbatch: Callable[[Tensor], Tensor], name: str, tensor: Tensor | None) -> Tensor | None:
    """What goes with the input, or None, as a batch of one if `batch` made the input one."""
    if tensor is None or unbatch is as_it_is:
        return tensor
    checks.storage(op, name, tensor)
    return tensor.unsqueeze(0)


def _first(output: Tensor) -> Tensor:
    return output.squeeze(0)


def as_it_is(output: Tensor) -> Tensor:
    return output


def geometry(
    op: str, input: Tensor, weight: Tensor, stride: Size2, padding: Padding, dilation: Size2
) -> tuple[Tensor, Callable[[Tensor], Tensor], list[int], list[int], list[int]]:
    """The input as a batch, what takes the batch off the result, then stride, padding and dilation as lists."""
    input, unbatch = batch(op, input)
    steps, spread = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    input, border = _resolve_padding(op, input, weight, steps, padding, spread)
    return input, unbatch, within(input, steps, border), border, spread


def within(input: Tensor, stride: list[int], padding: list[int]) -> list[int]:
    """The strides, or shorter ones that leave the padded image with their first step as well.

    torch's CPU backward crashes where a stride is thousands of times longer than the image.
    """
    if max(stride) <= _LONG or input.dim() != 4:
        return stride
    sizes = zip(stride, input.shape[2:], padding, strict=True)
    return [min(step, max(size + 2 * border, 1)) if step > _LONG else step for step, size, border in sizes]


def _resolve_padding(
    op: str, input: Tensor, weight: Tensor, stride: list[int], padding: Padding, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """``"same"`` and ``"valid"`` in numbers.

    "same" keeps H and W. Where that takes an odd number of rows or columns, the input itself is
    padded with the last of them (bottom, right), as ``torch.nn.functional.conv2d`` does.
    """
    if not isinstance(padding, str):
        return input, pair(op, "padding", padding, 0)
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        fail(op, given("padding", padding), "integers, 'same' or 'valid'", "pass one of them")
    if any(step != 1 for step in stride):
        fail(op, f"padding 'same' with stride {stride}", "stride 1", "pass the padding in numbers")
    checks.images(op, input, weight)
    total = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:], strict=True)]
    odd = [t % 2 for t in total]
    if any(odd):
        checks.storage(op, "input", input)
        input = F.pad(input, (0, odd[1], 0, odd[0]))
    return input, [t // 2 for t in total]


def padded(op: str, input: Tensor, borders: Sequence[int], mode: str) -> None:
    """The input can be padded with these borders (left, right, top, bottom) made of its own pixels."""
    if input.dim() not in (3, 4):
        fail(op, f"input of shape {shape_of(input)}", "[N, C, H, W] or [C, H, W]", "reshape it")
    sizes = zip((input.shape[-1], input.shape[-2]), (max(borders[:2]), max(borders[2:])), strict=True)
    if input.shape[-3] == 0 or any(border > _most_padding(size, mode) for size, border in sizes):
        fail(
            op,
            f"padding {listed(borders[::-2])} with padding_mode '{mode}' for input of shape {shape_of(input)}",
            "pixels enough to fill it",
            "pass a larger input or less padding",
        )
    checks.storage(op, "input", input)


def _most_padding(size: int, mode: str) -> int:
    if mode == "replicate" and size > 0:
        return checks.MOST
    return size - 1 if mode == "reflect" else size
