"""Local response normalization across channels and its backward.

    d[c] = k + scale * sum over the window of c  x[j]^2,      y[c] = x[c] * d[c]^-beta
    dx[c] = g[c] * d[c]^-beta - 2 scale beta x[c] * sum over windows that hold c  g[j] x[j] d[j]^-(beta + 1)

x is the input, or what an activation makes of it as it is loaded; the gradient then passes where x lets it.

A thread owns a few channels of its pixels, and reads the channels on both sides, too, as far as windows reach; it finds
them in L1 or L2, where its neighbours read them. Every channel is a register of its own then, and windows are summed
without an exchange between threads. (A running sum that lets the last channel go would need fewer additions; but
rounding errors pile up in it, and an Inf or NaN would never leave it.) Windows too wide for that are summed from
memory.

Any dense tensor is taken as it lies in memory: the channel's stride splits it into what lies outside and inside.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import activations, checks
from ..operators import local_response_norm as aten
from . import launch, table
from .device import activate, index, masked, narrow, quotient, widen
from .operands import Form, divisor, form, unit_of


@triton.jit
def columns(tile, COUNT: tl.constexpr):
    """The columns of a tile as a tuple: of no cost where a thread has whole rows."""
    if COUNT == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, COUNT // 2]), [0, 2, 1]))
        return columns(left, COUNT // 2) + columns(right, COUNT // 2)


@triton.jit
def from_columns(values, COUNT: tl.constexpr):
    """The tile of these columns."""
    if COUNT == 1:
        return tl.reshape(values[0], [values[0].shape[0], 1])
    else:
        left = from_columns(values[: COUNT // 2], COUNT // 2)
        right = from_columns(values[COUNT // 2 :], COUNT // 2)
        return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [left.shape[0], COUNT])


@triton.jit
def load_channels(
    ptr, stride, inside, channel, C, ACTIVATION: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tuple of COUNT channels from `channel` + FIRST on, 0 where there is none; ptr is at `channel`."""
    STEP: tl.constexpr = 1 if PLANES else UNIT
    START: tl.constexpr = FIRST // STEP * STEP
    found = ()
    for i in tl.static_range(START, FIRST + COUNT, STEP):
        exists = channel >= -i if i < 0 else channel < C - i
        wanted = tl.where(exists, inside, False)  # the interpreter of Triton 3.9 takes no mask & scalar
        vector = activate(widen(tl.load(ptr + i * stride, wanted[:, None], 0.0)), ACTIVATION)
        if PLANES:
            found = found + (vector,)
        else:
            found = found + columns(vector, UNIT)
    return found[FIRST - START : FIRST - START + COUNT]


@triton.jit
def window_sums(values, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Sums of SIZE neighbours, from each of the first COUNT on: of windows of half the size, which two share."""
    sums = ()
    if SIZE == 1:
        sums = values[:COUNT]
    elif SIZE % 2 == 0:
        halves = window_sums(values, COUNT + SIZE // 2, SIZE // 2)
        for i in tl.static_range(COUNT):
            sums = sums + (halves[i] + halves[i + SIZE // 2],)
    else:
        others = window_sums(values, COUNT, SIZE - 1)
        for i in tl.static_range(COUNT):
            sums = sums + (others[i] + values[i + SIZE - 1],)
    return sums


@triton.jit
def powers(d, beta, BETA: tl.constexpr, NORMAL: tl.constexpr):
    """d^-beta and d^-(beta + 1); the usual exponents through roots, which are more exact than a logarithm.

    The approximate root is right in all but the last bit; it takes a d below the normal numbers for 0.
    """
    if BETA == 0.75 or BETA == 0.5:
        root = tl.rsqrt(d) if NORMAL else 1.0 / tl.sqrt_rn(d)
        power = root * tl.sqrt(root) if BETA == 0.75 else root
        return power, power * root * root
    elif BETA == 1.0:
        power = 1.0 / d
        return power, power * power
    else:
        power = tl.exp2(-beta * tl.log2(d))
        return power, power / d


@triton.jit(do_not_specialize=["rows", "C", "inner", "groups"])
def local_response_norm_kernel(
    x_ptr, g_ptr, y_ptr,
    rows, C, inner, groups,  # inner and groups as divisors
    scale, beta, k,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,  # channels of a window on either side of its own
    BETA: tl.constexpr,  # beta, if there is a short cut for it, else None
    NORMAL: tl.constexpr,  # no d is 0 or below the normal numbers
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Forward, or with a gradient g the backward, for BLOCK_M rows of BLOCK_N channels, of which there are `groups`.

    PLANES: a row is UNIT pixels that lie side by side; an image has `inner` of them, and a program one group. Else
    channels lie side by side, and C is in units of UNIT; a row is one of the groups of a pixel.
    """
    program = index(tl.program_id(0), WIDE)
    if PLANES:
        block = quotient(program, groups, WIDE)
        channel = (program - block * groups.value) * BLOCK_N
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        stride = index(inner.value, WIDE)
        offset = m + (quotient(m, inner, WIDE) * (C - 1) + channel) * stride
        stride *= UNIT
    else:
        m = program * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel = quotient(m, groups, WIDE)
        channel = (m - pixel * groups.value) * BLOCK_N
        offset = pixel * C + channel // UNIT
        stride = 1
        C *= UNIT
    inside = m < rows
    vector = (offset * UNIT)[:, None] + tl.arange(0, UNIT)[None, :]
    # the backward takes terms of neighbours, too, whose windows reach as far once more
    SIZE: tl.constexpr = BEFORE + AFTER + 1
    LOW: tl.constexpr = 0 if g_ptr is None else AFTER
    COUNT: tl.constexpr = BLOCK_N if g_ptr is None else BLOCK_N + SIZE - 1
    x = load_channels(
        x_ptr + vector, stride, inside, channel, C, ACTIVATION, -LOW - BEFORE, COUNT + SIZE - 1, PLANES, UNIT
    )
    squares = ()
    for i in tl.static_range(COUNT + SIZE - 1):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, COUNT, SIZE)
    results = ()
    if g_ptr is None:
        for i in tl.static_range(BLOCK_N):
            power, _steeper = powers(k + scale * sums[i], beta, BETA, NORMAL)
            results = results + (x[i + BEFORE] * power,)
    else:
        direct = ()
        terms = ()
        g = load_channels(g_ptr + vector, stride, inside, channel, C, "none", -LOW, COUNT, PLANES, UNIT)
        for i in tl.static_range(COUNT):
            power, steeper = powers(k + scale * sums[i], beta, BETA, NORMAL)
            term = g[i] * x[i + BEFORE] * steeper
            if not NORMAL:  # d may be 0 where there is no channel
                term = tl.where(channel >= LOW - i if i < LOW else channel < C - (i - LOW), term, 0.0)
            direct = direct + (g[i] * power,)
            terms = terms + (term,)
        # channel j is in the window of c from BEFORE below it, so c collects from BEFORE above itself
        sums = window_sums(terms, BLOCK_N, SIZE)
        factor = 2 * scale * beta
        for i in tl.static_range(BLOCK_N):
            value = x[i + LOW + BEFORE]
            results = results + (masked(direct[i + LOW] - factor * value * sums[i], value, ACTIVATION),)
    STEP: tl.constexpr = 1 if PLANES else UNIT
    for i in tl.static_range(0, BLOCK_N, STEP):
        result = results[i] if PLANES else from_columns(results[i : i + UNIT], UNIT)
        result = narrow(result, y_ptr.dtype.element_ty)
        tl.store(y_ptr + vector + i * stride, result, tl.where(channel < C - i, inside, False)[:, None])


@triton.jit(do_not_specialize=["units", "C", "inner", "before", "after"])
def local_response_norm_wide(
    x_ptr, g_ptr, t_ptr, y_ptr,
    units, C, inner, before, after,  # C and inner as divisors
    scale, beta, k,
    BETA: tl.constexpr, NORMAL: tl.constexpr, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Windows of any size: forward; with g the backward's terms, in float32; with these, t, the backward.

    A program has BLOCK vectors of UNIT elements of one channel, of which there are `units`, `inner` one behind the
    other.
    """
    u = index(tl.program_id(0), WIDE) * BLOCK + tl.arange(0, BLOCK)
    plane = quotient(u, inner, WIDE)
    channel = plane - quotient(plane, C, WIDE) * C.value
    inside = (u < units)[:, None]
    vector = (u * UNIT)[:, None] + tl.arange(0, UNIT)[None, :]
    squares = tl.zeros((BLOCK, UNIT), tl.float32)
    terms = tl.zeros((BLOCK, UNIT), tl.float32)
    for shift in range(-before, after + 1):
        step = shift * index(inner.value, WIDE) * UNIT
        exists = (channel >= -shift) & (channel < C.value - shift)
        value = activate(widen(tl.load(x_ptr + vector + step, inside & exists[:, None], 0.0)), ACTIVATION)
        squares += value * value
        if t_ptr is not None:  # the windows that hold a channel mirror its own
            exists = (channel >= shift) & (channel < C.value + shift)
            terms += tl.load(t_ptr + vector - step, inside & exists[:, None], 0.0)
    x = activate(widen(tl.load(x_ptr + vector, inside, 0.0)), ACTIVATION)
    power, steeper = powers(k + scale * squares, beta, BETA, NORMAL)
    if g_ptr is None:
        result = x * power
    else:
        g = widen(tl.load(g_ptr + vector, inside, 0.0))
        if t_ptr is None:
            result = g * x * steeper
        else:
            result = masked(g * power - 2 * scale * beta * x * terms, x, ACTIVATION)
    tl.store(y_ptr + vector, narrow(result, y_ptr.dtype.element_ty), inside)


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str) -> Tensor:
    """`fastconv.ops.local_response_norm`: input [N, C, ...] -> the same shape, dtype and layout.

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    checks.local_response_norm("local_response_norm", input, size, activation)
    x, output = launch.dense(input)
    if x.dtype == torch.float64:
        return output.copy_(aten.by_aten(x, size, alpha, beta, k, activation))
    _run(x, None, output, size, alpha, beta, k, activation)
    return output


def local_response_norm_backward(
    grad_output: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str
) -> Tensor:
    """The gradient of the input, in its layout; dtypes as for `local_response_norm`."""
    checks.local_response_norm("local_response_norm_backward", input, size, activation, grad_output)
    x, grad_input = launch.dense(input)
    grad = launch.with_strides_of(x, grad_output)
    if x.dtype == torch.float64:
        scale, x = alpha / size, activations.activate(x, activation)
        d = k + scale * aten.window_sum(x * x, size)
        terms = aten.window_sum(grad * x * d ** -(beta + 1), size, adjoint=True)
        return grad_input.copy_(activations.mask(grad * d**-beta - 2 * scale * beta * x * terms, x, activation))
    _run(x, grad, grad_input, size, alpha, beta, k, activation)
    return grad_input


# Channels that a thread has at least, in order not to read more of its neighbours' than of its own.
_LEAST_CHANNELS = 8


class _Plan(NamedTuple):
    """All of a launch but its tensors."""

    asked: table.Asked
    any_size: bool  # which kernel
    programs: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(
    x: Form, backward: bool, preferences: Any, size: int, alpha: float, beta: float, k: float, activation: str
) -> _Plan:
    channels, elements = x.shape[1], math.prod(x.shape)
    inner = x.strides[1] if channels > 1 else elements
    planes = inner > 1
    asked = table.ask("local_response_norm", "pixels" if planes else "channels")
    before, after = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)
    scalars = alpha / size, float(beta), float(k)
    meta = {
        **asked.config,
        "BETA": float(beta) if beta in (0.5, 0.75, 1.0) else None,
        "NORMAL": alpha >= 0 and beta >= 0 and k > 1e-30,
        "ACTIVATION": activation,
        "WIDE": launch.wide(x),
    }
    rows, width = asked.config["BLOCK_M"], asked.config["BLOCK_N"]
    unit = unit_of(x.dtype, inner if planes else channels)
    halo = (before + after) * (2 if backward else 1)
    # values of the input that a thread holds, such that half of its registers, or little more, suffice for all
    most = 96 if not backward and x.dtype.itemsize == 2 else 64
    if 2 * halo > most:
        rows *= unit_of(x.dtype)  # elements
        if not planes:
            unit = 1
        del meta["BLOCK_M"], meta["BLOCK_N"]
        numbers = elements // unit, divisor(channels), divisor(inner // unit), before, after, *scalars
        meta |= {"UNIT": unit, "BLOCK": rows // unit}
        return _Plan(asked, True, launch.cdiv(elements, rows), numbers, meta)
    if planes:
        while unit * (max(halo, _LEAST_CHANNELS) + halo) > most:
            unit //= 2
        lanes = unit
    else:
        width = max(width * 2 // x.dtype.itemsize, 1)
        unit, lanes = min(unit, width), 1
    width = min(width, triton.next_power_of_2(channels))
    while lanes * (width + halo) > most:
        width //= 2
    groups = launch.cdiv(channels, width)
    pixels = elements // channels
    count = pixels // unit if planes else pixels * groups
    programs = launch.cdiv(count, rows) * (groups if planes else 1)
    meta |= {"BEFORE": before, "AFTER": after, "PLANES": planes, "UNIT": unit, "BLOCK_N": width}
    numbers = (
        count, channels if planes else channels // unit, divisor(max(inner // unit, 1)), divisor(groups), *scalars
    )  # fmt: skip
    return _Plan(asked, False, programs, numbers, meta)


def _run(x: Tensor, grad: Tensor | None, result: Tensor, *options: Any) -> None:
    if x.numel() == 0:
        return
    plan = _plan(form(x), grad is not None, table.preferences(), *options)
    table.note(plan.asked)
    if plan.any_size:
        terms = None
        if grad is not None:
            terms = torch.empty(x.numel(), dtype=torch.float32, device=x.device)
            launch.launch(local_response_norm_wide, plan.programs, x, grad, None, terms, *plan.numbers, **plan.meta)
        launch.launch(local_response_norm_wide, plan.programs, x, grad, terms, result, *plan.numbers, **plan.meta)
    else:
        launch.launch(local_response_norm_kernel, plan.programs, x, grad, result, *plan.numbers, **plan.meta)
