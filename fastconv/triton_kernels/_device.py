"""Device functions that the kernels share."""

import triton
import triton.language as tl

# Under the interpreter (TRITON_INTERPRET=1) tl.dot of bfloat16 is wrong, a cast to bfloat16 cuts off instead of
# rounding, and casts to and from it lose a bit of subnormal numbers; all of it is worked around there and only there.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32. PRECISION counts for float32 operands: "ieee" or "tf32"."""
    if INTERPRETED:
        a = widen(a)
        b = widen(b)
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
    if WIDE:  # noqa: SIM108
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
def pixel(m, P, Q):
    """(n, p, q) of pixel m in [N, P, Q]."""
    image = m // Q
    return image // P, image % P, m % Q
