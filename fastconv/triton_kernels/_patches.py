"""What the depthwise kernels share: patches of outputs, each with the inputs and the taps that it meets.

A lane owns a patch. Its values are tuples: for each place in the patch a tensor of all lanes. An input is loaded once
for all the outputs that it meets; which these are, and at which taps, a `Window` says in each direction when the kernel
is compiled: also between the strides of the gradient of the input, where no product with a zero is left.

PIXELS says how tensors lie. Without it a lane's value is a vector of channels, [lanes, UNIT]. With it it is a pixel of
one channel, [lanes]; pixels are loaded in vectors along rows, whose elements then stand in registers of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .device import activate, index, narrow, quotient, widen, within
from .operands import Divisor

# A position that lies in no image.
FAR = tl.constexpr(1 << 30)


class Window(NamedTuple):
    """A patch in one direction: output o meets input i at tap t where divisor * i = step * o + dilation * t + shift.

    Outputs count from the patch's first one, number f of its image, inputs from number f * step / divisor.
    (The interpreter of Triton 3.6 forgets the names of constants' fields: the functions below take it apart.)
    """

    outputs: int
    taps: int
    step: int
    dilation: int
    shift: int
    divisor: int


@triton.constexpr_function
def outputs(window: Window) -> int:
    return window[0]


@triton.constexpr_function
def taps(window: Window) -> int:
    return window[1]


@triton.constexpr_function
def step(window: Window) -> int:
    return window[2]


@triton.constexpr_function
def dilation(window: Window) -> int:
    return window[3]


@triton.constexpr_function
def shift(window: Window) -> int:
    return window[4]


@triton.constexpr_function
def divisor(window: Window) -> int:
    return window[5]


@triton.constexpr_function
def advance(window: Window) -> int:
    """How many inputs lie between the first ones of two neighbouring patches."""
    outputs, _, step, _, _, divisor = window
    return outputs * step // divisor


@triton.constexpr_function
def ends(window: Window) -> list[int]:
    """Among them the least and the most of divisor * input."""
    outputs, taps, step, dilation, shift, _ = window
    return [step * o + dilation * t + shift for o in (0, outputs - 1) for t in (0, taps - 1)]


@triton.constexpr_function
def first_input(window: Window, vector: int = 1) -> int:
    """The number of the first vector of inputs that a patch meets."""
    return -(-min(ends(window)) // window[5]) // vector


@triton.constexpr_function
def last_input(window: Window, vector: int = 1) -> int:
    return max(ends(window)) // window[5] // vector


@triton.constexpr_function
def tap(window: Window, input: int, output: int) -> int:
    """Where they meet; -1 if they do not."""
    _, taps, step, dilation, shift, divisor = window
    found, rest = divmod(divisor * input - step * output - shift, dilation)
    return found if rest == 0 and 0 <= found < taps else -1


@triton.constexpr_function
def meet(window: Window, output: int, tap: int) -> bool:
    """Whether there is an input for both."""
    _, _, step, dilation, shift, divisor = window
    return (step * output + dilation * tap + shift) % divisor == 0


@triton.constexpr_function
def place_of(window: Window, output: int, tap: int, vector: int) -> int:
    """That of this input among those of the vectors that a patch meets."""
    _, _, step, dilation, shift, divisor = window
    return (step * output + dilation * tap + shift) // divisor - first_input(window, vector) * vector


@triton.constexpr_function
def itself(window: Window) -> Window:
    """The patch's outputs as its inputs."""
    return Window(window[0], 1, 1, 1, 0, 1)


@triton.constexpr_function
def windows(count: int, window: Window) -> int:
    """How many of them it takes for so many taps."""
    return -(-count // window[1])


@triton.constexpr_function
def log2(value: int) -> int:
    return value.bit_length() - 1


# --------------------------------------------------------------------------------------------- places


class Image(NamedTuple):
    """A tensor [N, C, rows, columns], and its strides."""

    pointer: Tensor
    n: int
    c: int
    h: int
    w: int
    rows: int
    columns: int


class Grid(NamedTuple):
    """The patches of a launch: those of an image lie in rows and columns, `count` are those of all."""

    count: int
    rows: Divisor
    columns: Divisor


class Patches(NamedTuple):
    """One for each lane."""

    n: Tensor
    row: Tensor
    column: Tensor
    wanted: Tensor  # whether there is one


@triton.jit
def image(pointer, n, h, other, rows, columns, UNIT: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr):
    """An `Image` whose strides come in units; `other` is the one of columns, with PIXELS of channels.

    The one along which it lies is 1. With PIXELS its columns come in units, too.
    """
    n, h, other = index(n, WIDE) * UNIT, index(h, WIDE) * UNIT, index(other, WIDE) * UNIT
    if PIXELS:
        found = Image(pointer, n, other, h, 1, rows, columns * UNIT)
    else:
        found = Image(pointer, n, 1, h, other, rows, columns)
    return found


@triton.jit
def corner(x, n, c, h, w):
    """Pointers into an image."""
    return x.pointer + (n * x.n + c * x.c + h * x.h + w * x.w)


@triton.jit
def place(m, grid, wanted, PIXELS: tl.constexpr, WIDE: tl.constexpr):
    """Patches m. Along channels they are numbered downwards: a program's own form a square rather than a line."""
    if PIXELS:
        line = quotient(m, grid.columns, WIDE)
        n = quotient(line, grid.rows, WIDE)
        found = Patches(n, line - n * grid.rows.value, m - line * grid.columns.value, wanted)
    else:
        line = quotient(m, grid.rows, WIDE)
        n = quotient(line, grid.columns, WIDE)
        found = Patches(n, m - line * grid.rows.value, line - n * grid.columns.value, wanted)
    return found


@triton.jit
def lanes(grid, share, K, UNIT: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(patches, channels) of this program's lanes.

    With PIXELS all K channels of an image have patches of their own. Without it K counts vectors of channels, of which
    the program has `share` for each of its patches; lanes without one have the last one.
    """
    lane = tl.arange(0, BLOCK)
    if PIXELS:
        m = index(tl.program_id(0), WIDE) * BLOCK + lane
        plane, row, column, wanted = place(m, grid, m < grid.count, PIXELS, WIDE)
        n = quotient(plane, share, WIDE)
        k = plane - n * share.value
        found = Patches(n, row, column, wanted)
    else:
        lane = lane[:, None]
        shares = tl.cdiv(K, share.value)
        patch, patches = quotient(lane, share, False), BLOCK // share.value
        m = index(tl.program_id(0) // shares, WIDE) * patches + patch
        vector = tl.program_id(0) % shares * share.value + (lane - patch * share.value)
        found = place(m, grid, (patch < patches) & (m < grid.count) & (vector < K), PIXELS, WIDE)
        k = tl.minimum(vector, K - 1) * UNIT + tl.arange(0, UNIT)[None, :]
    return found, k


# --------------------------------------------------------------------------------------------- registers


@triton.jit
def filled(value, COUNT: tl.constexpr):
    found = ()
    for _i in tl.static_range(COUNT):
        found = found + (value,)
    return found


@triton.jit
def split_columns(block, LANES: tl.constexpr, SIZE: tl.constexpr):
    """The SIZE columns of a block, in their order. Each lane has its row in registers: nothing moves."""
    found = (block,)
    for bit in tl.static_range(log2(SIZE)):
        evens = ()
        odds = ()
        for i in tl.static_range(1 << bit):
            if SIZE >> bit == 2:
                even, odd = tl.split(found[i])
            else:
                even, odd = tl.split(tl.reshape(found[i], (LANES, (SIZE >> bit) // 2, 2)))
            evens = evens + (even,)
            odds = odds + (odd,)
        found = evens + odds
    return found


@triton.jit
def joined(columns, SIZE: tl.constexpr):
    """SIZE tensors as one, with dimensions of 2 for their number behind its own."""
    for bit in tl.static_range(log2(SIZE)):
        pairs = ()
        for i in tl.static_range((SIZE >> bit) // 2):
            pairs = pairs + (tl.join(columns[i], columns[i + (SIZE >> bit) // 2]),)
        columns = pairs
    return columns[0]


@triton.jit
def load_row(x, pointers, h, w, wanted, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """What patches at column w of image x meet in row h, where the pointers are, as float32; zeros outside.

    From their first vector to their last.
    """
    w = tl.where(wanted & within(h, x.rows), w, -FAR)
    found = ()
    for v in tl.static_range(first_input(COLUMNS, VECTOR), last_input(COLUMNS, VECTOR) + 1):
        inside = within(w + v * VECTOR, x.columns)
        if VECTOR == 1:
            found = found + (widen(tl.load(pointers + v * x.w, inside, 0.0)),)
        else:
            vectors = tl.expand_dims(pointers, 1) + (v * VECTOR + tl.arange(0, VECTOR)[None, :])
            block = widen(tl.load(vectors, tl.expand_dims(inside, 1), 0.0))
            found = found + split_columns(block, pointers.shape[0], VECTOR)
    return found


@triton.jit
def load_taps(w, w_tap, wanted, COUNT: tl.constexpr):
    """Of filters whose taps lie w_tap apart."""
    found = ()
    for t in tl.static_range(COUNT):
        found = found + (widen(tl.load(w + t * w_tap, wanted, None if wanted is None else 0.0)),)
    return found


@triton.jit
def add_row(
    sums, inputs, others, FIRST: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, OF_TAPS: tl.constexpr
):
    """sums[FIRST + o] += inputs * taps for outputs o; OF_TAPS, sums[FIRST + t] += inputs * outputs for taps t.

    `inputs` as of `load_row`, `others` one row of taps, or of outputs.
    """
    count: tl.constexpr = taps(COLUMNS) if OF_TAPS else outputs(COLUMNS)
    found = ()
    for a in tl.static_range(count):
        total = sums[FIRST + a]
        for b in tl.static_range(outputs(COLUMNS) if OF_TAPS else taps(COLUMNS)):
            if meet(COLUMNS, b if OF_TAPS else a, a if OF_TAPS else b):
                total += inputs[place_of(COLUMNS, b if OF_TAPS else a, a if OF_TAPS else b, VECTOR)] * others[b]
        found = found + (total,)
    return sums[:FIRST] + found + sums[FIRST + count :]


# --------------------------------------------------------------------------------------------- kernels' parts


@triton.jit
def convolve(
    sums, x, c, patches, w, w_tap, w_wanted,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """sums + the convolution of image x in channels c with filters w, whose taps lie w_tap apart.

    Not UNROLLED a patch is one row, and a loop runs over those of the filter; inputs between strides count as zeros.
    """
    w0 = patches.column * advance(COLUMNS)
    pointers = corner(x, patches.n, c, 0, w0)
    if UNROLLED:
        weights = load_taps(w, w_tap, w_wanted, taps(ROWS) * taps(COLUMNS))
        for i in tl.static_range(first_input(ROWS), last_input(ROWS) + 1):
            h = patches.row * advance(ROWS) + i
            inputs = load_row(x, pointers + h * x.h, h, w0, patches.wanted, COLUMNS, VECTOR)
            for o in tl.static_range(outputs(ROWS)):
                if tap(ROWS, i, o) >= 0:
                    of_row = weights[tap(ROWS, i, o) * taps(COLUMNS) : (tap(ROWS, i, o) + 1) * taps(COLUMNS)]
                    sums = add_row(sums, inputs, of_row, o * outputs(COLUMNS), COLUMNS, VECTOR, False)
    else:
        for t in range(taps(ROWS)):
            h = patches.row * step(ROWS) + (t * dilation(ROWS) + shift(ROWS))
            wanted = patches.wanted
            if divisor(ROWS) > 1:
                wanted = wanted & (h % divisor(ROWS) == 0)
                h = h // divisor(ROWS)
            inputs = load_row(x, pointers + h * x.h, h, w0, wanted, COLUMNS, VECTOR)
            weights = load_taps(w + t * taps(COLUMNS) * w_tap, w_tap, w_wanted, taps(COLUMNS))
            sums = add_row(sums, inputs, weights, 0, COLUMNS, VECTOR, False)
    return sums


@triton.jit
def write(sums, z, y, wanted, WITH_Z: tl.constexpr, ACTIVATION: tl.constexpr):
    if WITH_Z:
        sums += widen(tl.load(z, wanted, 0.0))
    tl.store(y, narrow(activate(sums, ACTIVATION), y.dtype.element_ty), wanted)


@triton.jit
def store(
    sums, z, y, k, patches,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, WITH_Z: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = activation(sums, WITH_Z + z) in channels k of the patches."""
    n, wanted = patches.n, patches.wanted
    p, q = patches.row * outputs(ROWS), patches.column * outputs(COLUMNS)
    if PIXELS:
        n, k, p, wanted = tl.expand_dims(n, 1), tl.expand_dims(k, 1), tl.expand_dims(p, 1), tl.expand_dims(wanted, 1)
        q = tl.expand_dims(q, 1) + tl.arange(0, outputs(COLUMNS))[None, :]
    z_corner, y_corner = corner(z, n, k, p, q), corner(y, n, k, p, q)
    for o in tl.static_range(outputs(ROWS)):
        in_row = wanted & (p + o < y.rows)
        row = sums[o * outputs(COLUMNS) : (o + 1) * outputs(COLUMNS)]
        if PIXELS:
            block = tl.reshape(joined(row, outputs(COLUMNS)), (row[0].shape[0], outputs(COLUMNS)))
            write(block, z_corner + o * z.h, y_corner + o * y.h, in_row & (q < y.columns), WITH_Z, ACTIVATION)
        else:
            for i in tl.static_range(outputs(COLUMNS)):
                inside = in_row & (q + i < y.columns)
                write(
                    row[i], z_corner + (o * z.h + i * z.w), y_corner + (o * y.h + i * y.w), inside, WITH_Z, ACTIVATION
                )
