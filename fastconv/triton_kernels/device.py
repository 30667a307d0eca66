"""Device functions that the kernels share."""

import math

import triton
import triton.language as tl

# Under the interpreter (TRITON_INTERPRET=1) tl.dot of bfloat16 is wrong, a cast to bfloat16 cuts off instead of
# rounding, and casts to and from it lose a bit of subnormal numbers; all of it is worked around there and only there.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Tensor cores cut factors off after 10 bits of mantissa, which takes half of the last of these bits on average. Scaled
# by this before, they lose nothing on average (over mantissas m with density 1 / m), and what needs no more bits stays
# what it is. One multiplication for each factor; rounding to nearest takes four instructions.
TF32_SCALE = tl.constexpr(1 + 2**-11 * math.log(2))


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32. PRECISION counts for float32 operands: "ieee" or "tf32"."""
    if INTERPRETED:
        a = widen(a)
        b = widen(b)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a *= TF32_SCALE
        b *= TF32_SCALE
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def widen(value):
    """As float32, which is exact."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """float32 rounded to DTYPE, to the nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        # a NaN is not rounded, which could carry into its sign
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        value = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """As aten has it: NaN stays NaN, which tl.maximum would lose, and -0.0 stays."""
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == "relu6":
        value = tl.where(value < 0, 0.0, tl.where(value > 6, 6.0, value))
    return value


@triton.jit
def masked(grad, output, ACTIVATION: tl.constexpr):
    """The gradient before the activation, from the one after it and the activation's output."""
    if ACTIVATION == "relu":
        grad = tl.where(output <= 0, 0.0, grad)
    if ACTIVATION == "relu6":
        grad = tl.where((output <= 0) | (output >= 6), 0.0, grad)
    return grad


@triton.jit
def index(value, WIDE: tl.constexpr):
    """An index in 64 bits where an offset made of it may pass 2^31. (With an early return Triton compiles both.)"""
    if WIDE:
        result = tl.cast(value, tl.int64)
    else:
        result = value
    return result


@triton.jit
def grouped_tile(program, rows, columns, GROUP: tl.constexpr):
    """(row, column) of the program's tile: GROUP rows of tiles at a time, all their columns one after the other, so
    that programs that run together share their operands in L2."""
    group = program // (GROUP * columns)
    inside = program % (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@triton.jit
def quotient(n, divisor, WIDE: tl.constexpr):
    """n // divisor.value for 0 <= n, see `operands.divisor`."""
    if WIDE:
        result = n // divisor.value
    else:
        doubled = (n * 2).to(tl.uint32, bitcast=True)
        high = tl.umulhi(doubled, divisor.magic.to(tl.uint32, bitcast=True))
        result = (high >> divisor.shift).to(tl.int32, bitcast=True)
    return result


@triton.jit
def image_of(m, P, Q, WIDE: tl.constexpr):
    """(n, p, q) of pixel m in [N, P, Q], where P and Q are divisors."""
    row = quotient(m, Q, WIDE)
    n = quotient(row, P, WIDE)
    return n, row - n * P.value, m - row * Q.value


@triton.jit
def within(position, size):
    """0 <= position < size; of 32 bits in one comparison."""
    if position.dtype == tl.int64:
        result = (position >= 0) & (position < size)
    else:
        result = position.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)
    return result


@triton.jit
def pixel_offset(n, p, q, strides, columns, UNIT: tl.constexpr, PLANES: tl.constexpr):
    """Of pixel (n, p, q) in a tensor as `operands.Result` describes it, which has so many columns."""
    if PLANES:
        offset = n * (strides.n * UNIT) + (p * columns + q)
        offset = tl.max_contiguous(tl.multiple_of(offset, UNIT), UNIT)
    else:
        offset = (n * strides.n + p * strides.h + q * strides.w) * UNIT
    return offset


@triton.jit
def columns_of(k, channel, UNIT: tl.constexpr, PLANES: tl.constexpr):
    """The offsets of channels k in a tensor as `operands.Result` describes it."""
    return k * (channel * UNIT) if PLANES else k


@triton.jit
def in_tile(in_rows, in_columns, UNIT: tl.constexpr, PLANES: tl.constexpr):
    """The mask of a tile of pixels x channels; the compiler is told of whole vectors of pixels."""
    inside = in_rows[:, None] & in_columns[None, :]
    return tl.max_constancy(inside, (UNIT, 1)) if PLANES else inside


@triton.jit
def begin(
    z_ptr, offset, in_rows, k, in_columns, channel,
    UNIT: tl.constexpr, PLANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile's sums begin with: the residual z, or zeros. (Added at the end it would need as many registers.)"""
    if z_ptr is not None:
        inside = in_tile(in_rows, in_columns, UNIT, PLANES)
        column = columns_of(k, channel, UNIT, PLANES)
        sums = widen(tl.load(z_ptr + (offset[:, None] + column[None, :]), inside, 0.0))
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return sums


@triton.jit
def finish(
    sums, bias_ptr, y_ptr, offset, in_rows, k, in_columns, channel,
    UNIT: tl.constexpr, PLANES: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = activation(sums + bias) for a tile of pixels x channels k, at the pixels' offsets."""
    if bias_ptr is not None:
        sums += widen(tl.load(bias_ptr + k, in_columns, 0.0))[None, :]
    value = narrow(activate(sums, ACTIVATION), y_ptr.dtype.element_ty)
    column = columns_of(k, channel, UNIT, PLANES)
    tl.store(y_ptr + (offset[:, None] + column[None, :]), value, in_tile(in_rows, in_columns, UNIT, PLANES))
