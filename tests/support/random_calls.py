"""Random calls of every op on every backend, each compared with eager and with float64.

    python tests/support/random_calls.py --calls 100000 --seed 7          on every backend that runs here, in its share
    python tests/support/random_calls.py --backend cpu --calls 5000
    python tests/support/random_calls.py --backend cpu --seed 7 --only 123      the one call that a failure names

A call is decided by backend, seed and number alone. Compared are values and gradients (by
`fastconv.measure.tolerance`), where they are NaN or Inf, shapes, dtypes and strides, and what the fake kernels say of
these. tests/ops/test_random_calls.py runs 10,000 of them. All tensors are the CPU's: the Triton kernels run in its
interpreter, the CUDA kernels in the emulator, both on small tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from fastconv.measure.tolerance import _POLICY, away_from_kinks, compare, poisoned_outputs
from fastconv.operators.schemas import WITH_OUT
from support.cases import CONV_OPS, DTYPES, layout_of, mapped, run, tensors
from support.kernel_backends import problem, true_float32

# How many of 10,000 calls each backend gets.
SHARES = {"cpu": 7000, "reference": 1500, "triton": 700, "cuda-emulated": 800}
SMALL = ("triton", "cuda-emulated")
OPS = (*CONV_OPS, "add_relu", "local_response_norm")
Arguments = Callable[[dict[str, Any]], dict[str, Any]]
Sums = Callable[[Arguments], Tensor]  # of the call with these arguments, the output or gradient that is judged
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


# ------------------------------------------------------------------------------------------------ making calls


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
    small = backend in SMALL
    op = rng.choice(OPS)
    dtype = rng.choice(DTYPES)
    special = rng.choice(("none",) * 8 + SPECIAL)
    if dtype == torch.float64 and special == "flushed":  # the oracle would be, too
        special = "denormals"
    sizes = (1, 2, 3, 4, 5) if small else (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16)
    batch, channels = rng.choice((1, 1, 2, 3)), rng.choice(sizes)
    height, width = rng.choice(sizes), rng.choice(sizes)
    if rng.random() < 0.04:
        batch = 0
    shapes: dict[str, Any]
    options: dict[str, Any] = {}
    activation = rng.choice(ACTIVATIONS)
    result = None

    def steps(low: int, high: int) -> Any:
        return rng.choice((rng.randint(low, high), (rng.randint(low, high), rng.randint(low, high))))

    if op in CONV_OPS:
        taps = rng.choice(((1, 1), (1, 1), (3, 3), (2, 2), (1, 3), (5, 4)))
        filters = rng.choice(sizes)
        shapes = {"input": (batch, channels, height, width)}
        if op.startswith("depthwise"):
            hidden = channels * rng.choice((1, 1, 1, 2, 3))
            name = "depthwise_weight" if op == "depthwise_separable_conv2d" else "weight"
            shapes[name] = (hidden, 1, *taps)
        elif op in ("conv2d_relu", "conv2d_add_relu"):
            groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
            filters = groups * rng.choice((1, 2, 3))
            options["groups"] = groups
            shapes["weight"] = (filters, channels // groups, *taps)
        elif op == "pointwise_conv2d":
            shapes["weight"] = (filters, channels, 1, 1)
        if op == "pointwise_conv2d":
            options["stride"] = steps(1, 3)
        elif op != "pointwise_conv2d_group":
            options.update(
                stride=steps(1, 3), padding=rng.choice((0, steps(0, 2), "same", "valid")), dilation=steps(1, 2)
            )
            if options["padding"] == "same":
                options["stride"] = 1
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
        else:
            shapes["bias"] = rng.choice((None, (shapes["weight"][0],)))
        if op != "depthwise_separable_conv2d":
            options["activation"] = activation
        probe = {
            name: [torch.empty(s, device="meta") for s in shape]
            if isinstance(shape, list)
            else None
            if shape is None
            else torch.empty(shape, device="meta")
            for name, shape in shapes.items()
            if name != "biases" and not name.endswith("bias")
        }
        try:
            (result, *_) = eager(op, {**probe, **options, **({"residual": None} if "residual" not in probe else {})})
        except RuntimeError:
            return None  # a filter larger than the image
        if op == "conv2d_add_relu" or (op == "pointwise_conv2d" and rng.random() < 0.5):
            shapes["residual"] = tuple(result.shape)
        unbatched = batch == 1 and rng.random() < 0.3
    elif op == "add_relu":
        dims = rng.randint(0, 5)
        shape = tuple(rng.choice((0, *sizes[:5]) if rng.random() < 0.1 else sizes[:6]) for _ in range(dims))
        if dims == 4 and rng.random() < 0.7:
            shape = (batch, channels, height, width)
        other = shape
        if rng.random() < 0.2:
            other = tuple(rng.choice((1, n)) for n in shape)[rng.randint(0, dims) :]
        shapes, options, unbatched = {"input": shape, "other": other}, {"activation": activation}, False
    else:
        shape = (batch, channels, *[rng.choice(sizes[:5]) for _ in range(rng.choice((1, 2, 2, 2, 3)))])
        options = {
            "size": rng.choice((1, 2, 3, 5, 9)),
            "alpha": rng.choice((1e-4, 0.5)),
            "beta": rng.choice((0.75, 0.5, 1.0)),
        }
        options |= {"k": rng.choice((1.0, 2.0)), "activation": activation}
        shapes, unbatched = {"input": shape}, False

    autocast = rng.choice((torch.bfloat16, torch.float16)) if rng.random() < 0.08 else None
    names = list(shapes)
    poisoned = rng.choice(names)

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
        if unbatched and name in ("input", "residual"):
            return laid_out(value, rng.choice(LAYOUTS), rng).squeeze(0)
        return laid_out(value, rng.choice(LAYOUTS), rng)

    arguments = {
        name: [tensor(name, s) for s in shape] if isinstance(shape, list) else tensor(name, shape)
        for name, shape in shapes.items()
    }
    call = Call(backend, seed, number, op, {**arguments, **options}, dtype, special, autocast)
    if op in WITH_OUT and rng.random() < 0.15:
        call.out_layout = rng.choice(("contiguous", "channels_last", "channels", "sliced"))
    elif rng.random() < 0.6:
        count = len(tensors(arguments))
        call.wanted = sorted(rng.sample(range(count), rng.randint(1, count)))
        call.grad_layout = rng.choice(LAYOUTS)
    return None if result is not None and fault_of_torch(call, result) else call


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
        if call.dtype == torch.float64 and unbatched and a.get("groups", 1) > 1:
            return "aten's float64 weight gradients of groups are wrong for an unbatched channels_last image"
    return None


# ------------------------------------------------------------------------------------------------ eager


def _activate(value: Tensor, name: str) -> Tensor:
    return {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[name](value)


def eager(op: str, a: dict[str, Any]) -> list[Tensor]:
    """The call as a user of torch would write it."""
    if op == "add_relu":
        return [_activate(a["input"] + a["other"], a["activation"])]
    if op == "local_response_norm":
        value, dtype = _activate(a["input"], a["activation"]), a["input"].dtype
        wide = value.float() if dtype in (torch.bfloat16, torch.float16) else value  # torch has none on the CPU
        options = [a[name] for name in ("size", "alpha", "beta", "k")]
        if wide.dim() > 4 and wide.stride(-2) != wide.shape[-1] * wide.stride(-1):  # eager's view would raise
            dtype = torch.float32 if torch.is_autocast_enabled("cpu") and dtype != torch.float64 else dtype
            return [torch.empty_like(a["input"], dtype=dtype).copy_(F.local_response_norm(wide.contiguous(), *options))]
        normed = F.local_response_norm(wide, *options)
        return [normed if torch.is_autocast_enabled("cpu") else normed.to(dtype)]
    if op == "pointwise_conv2d_group":
        biases = a.get("biases") or [None] * len(a["weights"])
        return [
            _activate(F.conv2d(a["input"], w, b), a["activation"]) for w, b in zip(a["weights"], biases, strict=True)
        ]
    geometry = [a.get("stride", 1), a.get("padding", 0), a.get("dilation", 1)]
    if op == "depthwise_separable_conv2d":
        channels = a["input"].shape[-3]
        hidden = F.conv2d(a["input"], a["depthwise_weight"], a.get("depthwise_bias"), *geometry, channels)
        hidden = _activate(hidden, a["depthwise_activation"])
        return [_activate(F.conv2d(hidden, a["pointwise_weight"], a.get("pointwise_bias")), a["pointwise_activation"])]
    groups = a["input"].shape[-3] if op == "depthwise_conv2d" else a.get("groups", 1)
    result = F.conv2d(a["input"], a["weight"], a.get("bias"), *geometry, groups)
    if a.get("residual") is not None:
        result = result + a["residual"]
    return [_activate(result, a["activation"])]


# ------------------------------------------------------------------------------------------------ judging


@contextlib.contextmanager
def flushing(wanted: bool) -> Iterator[None]:
    """Within, if wanted, this thread takes subnormal numbers for zeros."""
    if not wanted:
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class Wrong(AssertionError):
    pass


class EagerRaises(Exception):
    pass


def raises(function: Callable[[], Any]) -> bool:
    try:
        function()
    except RuntimeError:
        return True
    return False


def judge(call: Call, what: str, found: Tensor, oracle: Tensor, baseline: Tensor, sums: Sums) -> None:
    """Values by the policy of `fastconv.measure.tolerance`; NaN and Inf where eager has them.

    That policy's floor is in units of the largest result. The few results of a small call may all have cancelled, hence
    `floor_of_terms` for what exceeds it.
    """
    found, oracle, baseline = found.detach(), oracle.detach(), baseline.detach()
    subnormal = smallest(found.dtype)
    if call.autocast is not None and call.op in CONV_OPS and found.dtype != torch.float64:
        # Computed in the one type and converted to the other: as precise as the coarser of them.
        coarser = torch.bfloat16 if torch.bfloat16 in (found.dtype, call.autocast) else torch.float16
        found, baseline = found.to(coarser), baseline.to(coarser)
        subnormal = max(subnormal, smallest(coarser))
    rounded = oracle.to(found.dtype)
    for name in ("isnan", "isposinf", "isneginf"):
        ours, theirs, right = (getattr(tensor, name)() for tensor in (found, baseline, rounded))
        if ((ours != theirs) & ~((ours == right) & eager_errs(call))).any():
            raise Wrong(f"{what}: {name} at {int(ours.sum())} elements, eager's at {int(theirs.sum())}")
    finite = found.isfinite() & baseline.isfinite() & rounded.isfinite()
    found, oracle, baseline = (torch.where(finite, tensor, 0) for tensor in (found, oracle, baseline))
    if compare(found, oracle, baseline).ok:
        return
    floor = floor_of_terms(call, oracle, found.dtype, sums) + subnormal
    right = (found.double() - oracle).abs() <= floor
    if call.op == "local_response_norm" and call.special == "huge":  # in eager, too, its square overflows float32
        right |= (found.double() - baseline.double()).abs() <= floor
    verdict = compare(found, torch.where(right, found.double(), oracle), baseline)
    if not verdict.ok:
        worst = verdict.regions[0].index
        raise Wrong(
            f"{what}: {verdict}; {float(found[worst])!r}, float64 {float(oracle[worst])!r}, "
            f"eager {float(baseline[worst])!r}"
        )


def smallest(dtype: torch.dtype) -> float:
    """A unit in the last place of every subnormal number, whatever its size."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def eager_errs(call: Call) -> bool:
    """Whether eager may have NaN or Inf where float64 has none, or the other way round; ours may be like either."""
    if call.special == "huge":  # what eager rounds on the way may overflow where the value itself does not
        return True
    # oneDNN fills up a bfloat16 tile's filters with zeros, and multiplies these with whatever lies beside the pixel.
    bfloat16 = call.op in CONV_OPS and torch.bfloat16 in (call.dtype, call.autocast)
    return bfloat16 and call.special in ("nan", "inf", "-inf")


def floor_of_terms(call: Call, oracle: Tensor, dtype: torch.dtype, sums: Sums) -> Tensor:
    """What a right result may be away from the truth, whatever eager's error: for each element by its own terms."""
    policy, info = _POLICY[dtype], torch.finfo(dtype)
    terms = sums(magnitudes).detach().abs().nan_to_num(posinf=0.0)
    floor = policy.last_bit * oracle.abs() + policy.summation * terms
    through_onednn = call.backend in ("cpu", "reference")
    # Rounded as in eager: the result between two convolutions, and by oneDNN the one to which the residual is added.
    if call.op == "depthwise_separable_conv2d" or (through_onednn and call.arguments.get("residual") is not None):
        floor = floor + policy.last_bit * terms
    # oneDNN takes subnormal 16-bit numbers for zeros where the processor has instructions for these types.
    if call.special == "flushed" or (call.special == "denormals" and through_onednn and dtype.itemsize == 2):
        # A subnormal factor, product or sum that becomes zero: each less than the smallest normal number.
        floor = floor + 4 * info.smallest_normal * sums(counted).detach().abs()
    return floor


def judge_form(what: str, found: Tensor, expected: Tensor, whose: str = "eager's", whole: bool = False) -> None:
    """Shape, dtype and strides: those of dimensions of one element, too, where a `whole` output goes to other ops."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise Wrong(f"{what}: {found.dtype} {list(found.shape)}, {whose} {expected.dtype} {list(expected.shape)}")
    if (found.stride() if whole else layout_of(found)) != (expected.stride() if whole else layout_of(expected)):
        raise Wrong(f"{what} {list(found.shape)}: strides {found.stride()}, {whose} {expected.stride()}")


def check(call: Call) -> None:
    """Makes the call and raises `Wrong`, with the line that makes it again, where it is."""
    try:
        with flushing(call.special == "flushed"):
            _check(call)
    except EagerRaises:
        return
    except Exception as error:
        raise Wrong(f"{call}: {'' if isinstance(error, Wrong) else type(error).__name__ + ': '}{error}") from error


def _check(call: Call) -> None:
    context: Any = contextlib.nullcontext()
    if call.autocast is not None:
        context = torch.autocast("cpu", call.autocast)
    # contiguous: some of aten's float64 gradients are not to be trusted otherwise, see `fault_of_torch`
    exact = mapped_by_name(call.arguments, lambda name, t: in_float64(call, name, t).contiguous())
    if call.out_layout is not None:
        with torch.no_grad(), context:
            _check_out(call, exact)
        return
    leaves = leaves_of(call, call.arguments)
    plain, wide = leaves_of(call, call.arguments), leaves_of(call, exact)
    with context:
        with poisoned_outputs():
            found = run(call.op, leaves, backend=call.backend)
        baseline = eager(call.op, plain)
    oracle = eager(call.op, wide)
    for i, (ours, truth, theirs) in enumerate(zip(found, oracle, baseline, strict=True)):
        judge_form(f"output {i}", ours, theirs, whole=follows_eager_wholly(call))
        judge(call, f"output {i}", ours, truth, theirs, lambda of, i=i: eager(call.op, of(exact))[i])
    rng = random.Random(f"gradients {call.seed} {call.number}")
    # a group's outputs all require grad where one does, eager's branches each for itself
    used = [i for i, output in enumerate(baseline) if output.requires_grad]
    grads = []
    for i in used:
        mask = clear(call, found[i], baseline[i], oracle[i])
        # An expanded gradient has one value for all: it can leave none of them out.
        layout = call.grad_layout if mask.all() or call.grad_layout != "expanded" else "contiguous"
        grads.append(laid_out(_normal(baseline[i]) * mask, layout, rng))

    def gradients(
        outputs: list[Tensor], arguments: dict[str, Any], like: Callable[[Tensor], Tensor]
    ) -> Sequence[Tensor]:
        asked = [tensor for tensor in tensors(arguments) if tensor.requires_grad]
        return torch.autograd.grad([outputs[i] for i in used], asked, [like(grad) for grad in grads]) if used else []

    try:
        with poisoned_outputs():
            ours = gradients(found, leaves, lambda grad: grad)
    except RuntimeError:
        # aten's float64 convolutions want a contiguous gradient where some weights of one row are channels_last
        if call.dtype == torch.float64 and raises(lambda: gradients(baseline, plain, lambda grad: grad)):
            raise EagerRaises from None
        raise
    if call.backend != "reference":  # what torch's fakes say of aten is torch's
        compare_with_fake(call, found, ours, gradients)
    if not used or ill_conditioned(call, exact):
        return
    truths = gradients(oracle, wide, Tensor.double)
    theirs = gradients(baseline, plain, lambda grad: grad)

    def sums(of: Arguments, at: int) -> Tensor:
        arguments, more = leaves_of(call, of(exact)), 1 if of is counted else 0
        return gradients(eager(call.op, arguments), arguments, lambda grad: grad.double().abs() + more)[at]

    for at, (i, one, truth, other) in enumerate(zip(call.wanted, ours, truths, theirs, strict=True)):
        name = names_of(call)[i]
        # In eager those of the others lie as the gradient that came in, or as a chain of pointwise ops left them.
        if call.op in CONV_OPS and name != "residual":
            judge_form(f"gradient of {name}", one, other)
        judge(call, f"gradient of {name}", one, truth, other, lambda of, at=at: sums(of, at))


def compare_with_fake(call: Call, found: list[Tensor], grads: Sequence[Tensor], gradients: Callable[..., Any]) -> None:
    """What the fake kernels say is what the real ones did."""
    context: Any = contextlib.nullcontext() if call.autocast is None else torch.autocast("cpu", call.autocast)
    with FakeTensorMode() as mode:
        fake = leaves_of(call, mapped(call.arguments, mode.from_tensor))
        with context:
            outputs = run(call.op, fake, backend=call.backend)
        for i, (pretended, real) in enumerate(zip(outputs, found, strict=True)):
            judge_form(f"fake output {i}", pretended, real, "the real one's")
        for i, pretended, real in zip(
            call.wanted, gradients(outputs, fake, mode.from_tensor), grads, strict=bool(grads)
        ):
            judge_form(f"fake gradient of {names_of(call)[i]}", pretended, real, "the real one's")


def _normal(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64).to(like.dtype)


def follows_eager_wholly(call: Call) -> bool:
    """Whether an output has eager's strides also for dimensions of one element, from which later ops take the layout.

    Not where it is empty or unbatched, and not where eager's sum takes them from an odd operand. In float64 aten joins
    the results of groups by a concatenation, which makes one pixel of many channels contiguous.
    """
    a = call.arguments
    others = [a[name] for name in ("residual", "other") if a.get(name) is not None]
    joined = call.dtype == torch.float64 and (call.op.startswith("depthwise") or a.get("groups", 1) > 1)
    return a["input"].dim() == 4 and a["input"].numel() > 0 and call.op in CONV_OPS and not others and not joined


def names_of(call: Call) -> list[str]:
    """The name of each of the tensors."""
    return [name for name, value in call.arguments.items() for _ in tensors({name: value})]


def mapped_by_name(arguments: dict[str, Any], function: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: mapped({name: value}, lambda t, name=name: function(name, t))[name] for name, value in arguments.items()
    }


def in_float64(call: Call, name: str, tensor: Tensor) -> Tensor:
    """The number that the op computes with: autocast rounds what goes into a convolution."""
    low = call.autocast
    if low is None or call.op not in CONV_OPS or tensor.dtype == torch.float64:
        return tensor.double()
    if name == "residual" and torch.promote_types(tensor.dtype, low) != low:
        return tensor.double()
    return tensor.to(low).double()


def magnitudes(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with nothing that could cancel."""
    return {**mapped(arguments, Tensor.abs), **linear(arguments)}


def counted(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call whose result is the number of terms, each as often as its weights say and once more."""
    factors = mapped_by_name(arguments, lambda name, t: t.abs() + 1 if "weight" in name else torch.ones_like(t))
    return {**factors, **linear(arguments)}


def linear(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: "none" for name in arguments if name.endswith("activation")}


def leaves_of(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    count = itertools.count()
    return mapped(arguments, lambda t: t.detach().requires_grad_(next(count) in call.wanted))


def clear(call: Call, *outputs: Tensor) -> Tensor:
    """1 where the activation's mask hangs on no rounding error."""
    first = outputs[0]
    names = [call.arguments[n] for n in ("activation", "pointwise_activation") if n in call.arguments]
    if names == ["none"] or call.op == "local_response_norm":
        return torch.ones_like(first)
    masks = [(o > 0) & (o < 6) for o in outputs]
    same = torch.ones_like(first, dtype=torch.bool)
    for output, mask in zip(outputs, masks, strict=True):
        same &= (mask == masks[0]) & (output.isfinite() == first.isfinite())
    if names == ["relu6"]:
        truth = outputs[-1]
        same &= (truth == 6) | away_from_kinks(truth.where(truth != 0, 3), "relu6", first.dtype)
    return same.to(first.dtype)


def ill_conditioned(call: Call, exact: dict[str, Any]) -> bool:
    """Whether gradients are no matter of right and wrong here."""
    a = call.arguments
    if call.op == "depthwise_separable_conv2d" and a["depthwise_activation"] != "none":
        renamed = {**exact, "weight": exact["depthwise_weight"], "bias": exact["depthwise_bias"], "activation": "none"}
        (hidden,) = eager("depthwise_conv2d", renamed)
        low = call.dtype if call.autocast is None else call.autocast
        if not away_from_kinks(hidden, a["depthwise_activation"], low).all():
            return True
    # torch's own gradient of relu6 at NaN differs between its vectors and their rest.
    return call.special in ("nan", "inf", "-inf", "huge") and "relu6" in a.values()


def _check_out(call: Call, exact: dict[str, Any]) -> None:
    baseline, oracle = eager(call.op, call.arguments), eager(call.op, exact)
    rng = random.Random(f"out {call.seed} {call.number}")
    places = [laid_out(torch.full_like(b.contiguous(), -7), call.out_layout or "", rng) for b in baseline]
    out = places if call.op == "pointwise_conv2d_group" else places[0]
    found = run(call.op, call.arguments, backend=call.backend, out=out)
    for i, (ours, place, truth, theirs) in enumerate(zip(found, places, oracle, baseline, strict=True)):
        if ours is not place:
            raise Wrong(f"output {i} is not the tensor that was passed as out")
        judge(call, f"output {i}", ours, truth, theirs, lambda of, i=i: eager(call.op, of(exact))[i])


# ------------------------------------------------------------------------------------------------ running


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sweep(backend: str, seed: int, numbers: range) -> list[str]:
    """What was wrong, a line for each call."""
    wrong = []
    with one_thread(), true_float32():
        for number in numbers:
            try:
                check(make(backend, seed, number))
            except Wrong as error:
                wrong.append(str(error))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=SHARES)
    parser.add_argument("--only", type=int)
    chosen = parser.parse_args()
    failed = 0
    for backend in SHARES if chosen.backend is None else [chosen.backend]:
        reason = problem(backend)
        if reason is not None:
            print(f"{backend}: not run, {reason}")
            continue
        share = chosen.calls if chosen.backend else chosen.calls * SHARES[backend] // sum(SHARES.values())
        numbers = range(share) if chosen.only is None else range(chosen.only, chosen.only + 1)
        wrong = sweep(backend, chosen.seed, numbers)
        failed += len(wrong)
        print("\n".join([*wrong, f"{backend}: {len(wrong)} of {len(numbers)} calls are wrong"]), flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
