"""Calls of the ops drawn at random: op, shapes, layouts, options, special values, gradients.

A call is decided by backend, seed and number alone; support/random_calls.py makes and judges them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastconv.operators.schemas import WITH_OUT
from support.cases import CONV_OPS, DTYPES, tensors
from support.eager import eager, onednn_computes

SMALL = ("triton", "cuda-emulated")
OPS = (*CONV_OPS, "add_relu", "local_response_norm")
SPECIAL = ("nan", "inf", "-inf", "-0.0", "denormals", "flushed", "huge")
ACTIVATIONS = ("none", "relu", "relu6")


@dataclass
class Call:
    """One call, with all that decides it."""

    backend: str
    seed: int
    number: int
    op: str
    arguments: dict[str, Any]
    dtype: torch.dtype
    special: str = "none"
    autocast: torch.dtype | None = None
    wanted: list[int] = field(default_factory=list)  # which of the tensors require grad
    grad_layout: str = "contiguous"
    out_layout: str | None = None

    @property
    def low(self) -> torch.dtype:
        """In which its convolutions compute."""
        return self.dtype if self.autocast is None or self.dtype == torch.float64 else self.autocast

    def __str__(self) -> str:
        def show(value: Any) -> Any:
            if isinstance(value, Tensor):
                return f"{list(value.shape)}:{list(value.stride())}"
            return [show(v) for v in value] if isinstance(value, list) else value

        arguments = ", ".join(f"{name}={show(value)}" for name, value in self.arguments.items())
        more = f"special {self.special}, autocast {self.autocast}, wanted {self.wanted}, grads {self.grad_layout}"
        return (
            f"python tests/support/random_calls.py --backend {self.backend} --seed {self.seed} --only {self.number}: "
            f"{self.op}({arguments}), {self.dtype}, {more}, out {self.out_layout}"
        )


def laid_out(values: Tensor, layout: str, rng: random.Random) -> Tensor:
    """The values (of an expanded dimension, the first of them) in this layout."""
    shape, dims = values.shape, values.dim()
    if layout == "channels_last" and dims in (4, 5):
        return values.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[dims])
    if layout == "expanded" and dims:
        for d in rng.sample(range(dims), rng.randint(1, dims)):
            values = values.narrow(d, 0, min(1, shape[d]))
        return values.expand(shape) if values.numel() or 0 in shape else values
    if layout == "transposed":
        order = rng.sample(range(dims), dims)
        back = [order.index(d) for d in range(dims)]
        return values.permute(order).contiguous().permute(back)
    if layout == "sliced" and dims:
        wide = values.new_zeros([*shape[:-1], 2 * shape[-1] + 3])
        part = wide[..., 1 : 1 + 2 * shape[-1] : 2]
        return part.copy_(values)
    if layout == "channels" and dims == 4:
        wide = values.new_zeros([shape[0], shape[1] + 3, *shape[2:]]).contiguous(memory_format=torch.channels_last)
        return wide[:, 1 : 1 + shape[1]].copy_(values)
    if layout == "odd ones":  # a dimension of one element may have any stride
        values = values.contiguous()
        strides = [
            rng.choice((1, 2, stride)) if n == 1 else stride for n, stride in zip(shape, values.stride(), strict=True)
        ]
        return values.as_strided(shape, strides)
    return values.contiguous()


LAYOUTS = ("contiguous", "channels_last", "expanded", "transposed", "sliced", "channels", "odd ones")


def special_values(kind: str, dtype: torch.dtype, values: Tensor, rng: random.Random) -> Tensor:
    """With some of the values replaced."""
    if not values.numel():
        return values
    info = torch.finfo(dtype)
    flat = values.flatten().clone()
    if kind in ("nan", "inf", "-inf"):
        flat[rng.randrange(len(flat))] = float(kind)
    elif kind == "huge":
        flat[rng.randrange(len(flat))] = info.max / 2
    elif kind == "-0.0":
        flat[torch.rand(len(flat)) < 0.5] = -0.0
    elif kind in ("denormals", "flushed"):  # and larger ones among them, whose results flushing cannot excuse
        scales = torch.tensor([2.0**-3, 0.5, 1.0, 2.0**16], dtype=torch.float64)[torch.randint(4, flat.shape)]
        flat = (flat * (info.smallest_normal * scales)).to(dtype)
    return flat.view(values.shape)


def make(backend: str, seed: int, number: int) -> Call:
    rng = random.Random(f"{backend} {seed} {number}")
    torch.manual_seed(rng.randrange(2**31))
    while True:
        found = _draw(backend, seed, number, rng)
        if found is not None:
            return found


def _draw(backend: str, seed: int, number: int, rng: random.Random) -> Call | None:
    op = rng.choice(OPS)
    dtype = rng.choice(DTYPES)
    special = rng.choice(("none",) * 8 + SPECIAL)
    if dtype == torch.float64 and special == "flushed":  # the oracle would be, too
        special = "denormals"
    sizes = (1, 2, 3, 4, 5) if backend in SMALL else (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16)
    batch, channels = rng.choice((1, 1, 2, 3)), rng.choice(sizes)
    image = (batch, channels, rng.choice(sizes), rng.choice(sizes))
    if rng.random() < 0.04:
        image = (0, *image[1:])
    activation = rng.choice(ACTIVATIONS)
    result = None
    if op in CONV_OPS:
        shapes, options = _convolution(op, image, sizes, activation, rng)
        result = _result(op, shapes, options)
        if result is None:
            return None  # a filter larger than the image
        if op == "conv2d_add_relu" or (op == "pointwise_conv2d" and rng.random() < 0.5):
            shapes["residual"] = tuple(result.shape)
        unbatched = image[0] == 1 and rng.random() < 0.3
    else:
        draw = _sum if op == "add_relu" else _norm
        shapes, options = draw(image, sizes, activation, rng)
        unbatched = False
    autocast = rng.choice((torch.bfloat16, torch.float16)) if rng.random() < 0.08 else None
    arguments = _tensors(shapes, dtype, special, unbatched, rng)
    call = Call(backend, seed, number, op, {**arguments, **options}, dtype, special, autocast)
    if op in WITH_OUT and rng.random() < 0.15:
        call.out_layout = rng.choice(("contiguous", "channels_last", "channels", "sliced"))
    elif rng.random() < 0.6:
        count = len(tensors(arguments))
        call.wanted = sorted(rng.sample(range(count), rng.randint(1, count)))
        call.grad_layout = rng.choice(LAYOUTS)
    return None if result is not None and fault_of_torch(call, result) else call


Shapes = dict[str, Any]  # of tensor arguments: a shape, a list of shapes, or None
Options = dict[str, Any]


def _convolution(
    op: str, image: tuple[int, ...], sizes: Sequence[int], activation: str, rng: random.Random
) -> tuple[Shapes, Options]:
    """All but the residual, whose shape is that of the result."""
    channels = image[1]
    shapes: Shapes = {"input": image}
    options: Options = {}
    taps = rng.choice(((1, 1), (1, 1), (3, 3), (2, 2), (1, 3), (5, 4)))
    filters = rng.choice(sizes)
    hidden = 0
    if op.startswith("depthwise"):
        hidden = channels * rng.choice((1, 1, 1, 2, 3))
        shapes["depthwise_weight" if op == "depthwise_separable_conv2d" else "weight"] = (hidden, 1, *taps)
    elif op in ("conv2d_relu", "conv2d_add_relu"):
        groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
        filters = groups * rng.choice((1, 2, 3))
        options["groups"] = groups
        shapes["weight"] = (filters, channels // groups, *taps)
    elif op == "pointwise_conv2d":
        shapes["weight"] = (filters, channels, 1, 1)
    options |= _geometry(op, rng)
    if op == "pointwise_conv2d_group":
        widths = [rng.choice(sizes) for _ in range(rng.randint(1, 5))]
        shapes["weights"] = [(k, channels, 1, 1) for k in widths]
        if rng.random() < 0.7:
            shapes["biases"] = [(k,) if rng.random() < 0.7 else None for k in widths]
    elif op == "depthwise_separable_conv2d":
        shapes["pointwise_weight"] = (filters, hidden, 1, 1)
        shapes["depthwise_bias"] = rng.choice((None, (hidden,)))
        shapes["pointwise_bias"] = rng.choice((None, (filters,)))
        options["depthwise_activation"], options["pointwise_activation"] = rng.choice(ACTIVATIONS), activation
        return shapes, options
    else:
        shapes["bias"] = rng.choice((None, (shapes["weight"][0],)))
    options["activation"] = activation
    return shapes, options


def _geometry(op: str, rng: random.Random) -> Options:
    def steps(low: int, high: int) -> Any:
        return rng.choice((rng.randint(low, high), (rng.randint(low, high), rng.randint(low, high))))

    if op == "pointwise_conv2d":
        return {"stride": steps(1, 3)}
    if op == "pointwise_conv2d_group":
        return {}
    found = {
        "stride": steps(1, 3),
        "padding": rng.choice((0, steps(0, 2), "same", "valid")),
        "dilation": steps(1, 2),
    }
    return {**found, "stride": 1} if found["padding"] == "same" else found


def _result(op: str, shapes: Shapes, options: Options) -> Tensor | None:
    """On the meta device, what eager returns; None where it raises."""

    def meta(shape: Any) -> Any:
        if isinstance(shape, list):
            return [torch.empty(s, device="meta") for s in shape]
        return None if shape is None else torch.empty(shape, device="meta")

    probe = {name: meta(shape) for name, shape in shapes.items() if not name.endswith(("bias", "biases"))}
    try:
        return eager(op, {**probe, **options, "residual": None})[0]
    except RuntimeError:
        return None


def _sum(image: tuple[int, ...], sizes: Sequence[int], activation: str, rng: random.Random) -> tuple[Shapes, Options]:
    dims = rng.randint(0, 5)
    shape = tuple(rng.choice((0, *sizes[:5]) if rng.random() < 0.1 else sizes[:6]) for _ in range(dims))
    if dims == 4 and rng.random() < 0.7:
        shape = image
    other = shape
    if rng.random() < 0.2:
        other = tuple(rng.choice((1, n)) for n in shape)[rng.randint(0, dims) :]
    return {"input": shape, "other": other}, {"activation": activation}


def _norm(image: tuple[int, ...], sizes: Sequence[int], activation: str, rng: random.Random) -> tuple[Shapes, Options]:
    shape = (*image[:2], *[rng.choice(sizes[:5]) for _ in range(rng.choice((1, 2, 2, 2, 3)))])
    options = {
        "size": rng.choice((1, 2, 3, 5, 9)),
        "alpha": rng.choice((1e-4, 0.5)),
        "beta": rng.choice((0.75, 0.5, 1.0)),
        "k": rng.choice((1.0, 2.0)),
        "activation": activation,
    }
    return {"input": shape}, options


def _tensors(shapes: Shapes, dtype: torch.dtype, special: str, unbatched: bool, rng: random.Random) -> dict[str, Any]:
    """In layouts of any kind; one of them has the special values."""
    poisoned = rng.choice(list(shapes))

    def tensor(name: str, shape: tuple[int, ...] | None) -> Tensor | None:
        if shape is None:
            return None
        value = torch.randn(shape, dtype=torch.float64)
        if "weight" in name:
            value = value * 1.4 / math.sqrt(math.prod(shape[1:]))
        value = value.to(dtype)
        # Not the weights: two small factors would leave nothing but zeros, and whether eager multiplies Inf with the
        # zeros of the padding depends on which of torch's kernels it takes.
        if name == poisoned or special in ("denormals", "flushed"):
            value = special_values(special, dtype, value, rng) if "weight" not in name else value
        value = laid_out(value, rng.choice(LAYOUTS), rng)
        return value.squeeze(0) if unbatched and name in ("input", "residual") else value

    return {
        name: [tensor(name, s) for s in shape] if isinstance(shape, list) else tensor(name, shape)
        for name, shape in shapes.items()
    }


def _meets_a_row(a: dict[str, Any], weight: Tensor, result: Tensor, pairs: list[tuple[int, int]]) -> bool:
    (dilation, _), (stride, _) = pairs
    padding = a.get("padding", 0)
    if isinstance(padding, str):
        return True  # around every pixel of the image
    before = padding if isinstance(padding, int) else padding[0]
    rows = itertools.product(range(result.shape[-2]), range(weight.shape[2]))
    return any(0 <= y * stride - before + r * dilation < a["input"].shape[-2] for y, r in rows)


def fault_of_torch(call: Call, result: Tensor) -> str | None:
    """Why eager itself is wrong for such a call, or ends the process; such calls are not made.

    tests/ops/test_random_calls.py has that our own are right there.
    """
    a, kinds = call.arguments, {call.dtype, call.autocast}
    for weight in [a[name] for name in ("weight", "depthwise_weight") if name in a]:
        pairs = [(v, v) if isinstance(v, int) else v for v in (a.get("dilation", 1), a.get("stride", 1))]
        idle = any(t == 1 and d > 1 for t, d in zip(weight.shape[2:], pairs[0], strict=True))
        if idle and kinds & {torch.float16, torch.bfloat16}:
            return "oneDNN's 16-bit convolutions end the process where a filter of one pixel is dilated"
        if torch.bfloat16 in kinds and pairs[1][1] > 1 and result.shape[-1] == 1:
            return "oneDNN's bfloat16 convolutions are wrong where a single column of output has a stride"
        if torch.bfloat16 in kinds and pairs[1][1] > a["input"].shape[-1]:
            return "oneDNN's bfloat16 weight gradients are wrong where the stride is wider than the image"
        if torch.bfloat16 in kinds and pairs[0][0] > 1 and not _meets_a_row(a, weight, result, pairs):
            return "oneDNN's bfloat16 convolutions end the process where a dilated filter meets padding alone"
        unbatched = a["input"].dim() == 3 and weight.is_contiguous(memory_format=torch.channels_last)
        if not onednn_computes(call.low) and unbatched and a.get("groups", 1) > 1:
            return "aten's own weight gradients of groups are wrong for an unbatched channels_last image"
    return None
