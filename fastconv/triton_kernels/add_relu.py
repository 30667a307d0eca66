"""Addition + ReLU and its backward, one pass each over tensors as they lie in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import activations, checks
from . import launch, table
from .device import activate, index, masked, narrow, widen
from .operands import unit_of


@triton.jit
def add_some(a_ptr, b_ptr, y_ptr, i, inside, ACTIVATION: tl.constexpr):
    value = widen(tl.load(a_ptr + i, inside)) + widen(tl.load(b_ptr + i, inside))
    tl.store(y_ptr + i, narrow(activate(value, ACTIVATION), y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["units"])
def add_relu_fprop(
    a_ptr, b_ptr, y_ptr, units,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = activation(a + b), BLOCK elements to a program, of `units` vectors of UNIT; in float32, so that the sum is
    rounded once.

    Without a mask, which would take vectors longer than UNIT apart, but for the last program's.
    """
    first, size = index(tl.program_id(0), WIDE) * BLOCK, index(units, WIDE) * UNIT
    i = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        add_some(a_ptr, b_ptr, y_ptr, i, None, ACTIVATION)
    else:
        add_some(a_ptr, b_ptr, y_ptr, i, tl.max_constancy(i < size, UNIT), ACTIVATION)


@triton.jit
def mask_some(g_ptr, z_ptr, y_ptr, i, inside, ACTIVATION: tl.constexpr):
    grad = widen(tl.load(g_ptr + i, inside))
    grad = masked(grad, widen(tl.load(z_ptr + i, inside)), ACTIVATION)
    tl.store(y_ptr + i, narrow(grad, y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["units"])
def add_relu_dgrad(
    g_ptr, z_ptr, y_ptr, units,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = g where the activation's output z let the value through, in blocks as `add_relu_fprop`'s."""
    first, size = index(tl.program_id(0), WIDE) * BLOCK, index(units, WIDE) * UNIT
    i = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        mask_some(g_ptr, z_ptr, y_ptr, i, None, ACTIVATION)
    else:
        mask_some(g_ptr, z_ptr, y_ptr, i, tl.max_constancy(i < size, UNIT), ACTIVATION)


def add_relu(input: Tensor, other: Tensor, activation: str) -> Tensor:
    """`fastconv.ops.add_relu` of one shape and dtype.

    float16, bfloat16 and float32 of the same dense layout; float64, and operands that lie differently in memory (or
    were expanded), by the aten composition, which reads any strides.
    """
    checks.elementwise("add_relu", input, "other", other, activation)
    contiguous = input.is_contiguous() and other.is_contiguous()  # whatever else they may be
    output = torch.empty_like(input, memory_format=torch.contiguous_format if contiguous else torch.preserve_format)
    alike = contiguous or input.stride() == other.stride() == output.stride()
    if input.dtype == torch.float64 or not alike:
        return activations.activate(input + other, activation)
    _flat(add_relu_fprop, input, other, output, activation)
    return output


def add_relu_backward(grad_output: Tensor, output: Tensor, activation: str) -> Tensor:
    """The gradient of input and of other, in the layout of `output`.

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    checks.elementwise("add_relu_backward", output, "grad_output", grad_output, activation)
    output, grad_input = launch.dense(output)
    if output.dtype == torch.float64:
        return grad_input.copy_(activations.mask(grad_output, output, activation))
    _flat(add_relu_dgrad, launch.with_strides_of(output, grad_output), output, grad_input, activation)
    return grad_input


def _flat(kernel: triton.JITFunction, first: Tensor, second: Tensor, result: Tensor, activation: str) -> None:
    size = result.numel()
    config = table.config("add_relu", "any")
    unit, wide = unit_of(result.dtype, size), size > launch.NARROW_LIMIT
    programs = launch.cdiv(size, config["BLOCK"])
    launch.launch(
        kernel, programs, first, second, result, size // unit,
        ACTIVATION=activation, UNIT=unit, WIDE=wide, **config,
    )  # fmt: skip
