"""Random calls of every op on every backend, each compared with eager and with float64.

    python tests/support/random_calls.py --calls 100000 --seed 7          on every backend that runs here, in its share
    python tests/support/random_calls.py --backend cpu --calls 5000
    python tests/support/random_calls.py --backend cpu --seed 7 --only 123      the one call that a failure names

A call is decided by backend, seed and number alone. Compared are values and gradients (by
`fastconv.measure.tolerance`), where they are NaN or Inf, shapes, dtypes and strides, and in every fourth call what the
fake kernels say of these. tests/ops/test_random_calls.py runs 10,000 of them. All tensors are the CPU's: the Triton
kernels run in its interpreter, the CUDA kernels in the emulator, both on small tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from torch._subclasses import FakeTensorMode

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from fastconv.measure.timing import true_float32
from fastconv.measure.tolerance import POLICY, away_from_kinks, compare, poisoned_outputs
from support.cases import CONV_OPS, layout_of, mapped, run, tensors
from support.drawn_calls import Call, laid_out, make
from support.eager import eager, onednn_computes
from support.kernel_backends import problem

# How many of 10,000 calls each backend gets.
SHARES = {"cpu": 7000, "reference": 1500, "triton": 700, "cuda-emulated": 800}
Arguments = Callable[[dict[str, Any]], dict[str, Any]]
Sums = Callable[[Arguments], Tensor]  # of the call with these arguments, the output or gradient that is judged


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
    policy, info = POLICY[dtype], torch.finfo(dtype)
    terms = sums(magnitudes).detach().abs().nan_to_num(posinf=0.0)
    floor = policy.last_bit * oracle.abs() + policy.summation * terms
    through_onednn = call.backend in ("cpu", "reference")
    # Rounded as in eager: the result between two convolutions, and by oneDNN the one to which the residual is added.
    if call.op == "depthwise_separable_conv2d" or (through_onednn and call.arguments.get("residual") is not None):
        floor = floor + policy.last_bit * terms
    # So are aten's own bias gradients of a dilated filter, after each image.
    if call.backend == "reference" and dtype.itemsize == 2 and not onednn_computes(call.low):
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
    # What torch's fakes say of aten is torch's; of ours every fourth call, as that takes as long as all the rest.
    if call.backend != "reference" and call.number % 4 == 0:
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

    Not where it is empty or unbatched, and not where eager's sum takes them from an odd operand. Without oneDNN aten
    joins the results of groups by a concatenation, which makes one pixel of many channels contiguous.
    """
    a = call.arguments
    others = [a[name] for name in ("residual", "other") if a.get(name) is not None]
    joined = not onednn_computes(call.low) and (call.op.startswith("depthwise") or a.get("groups", 1) > 1)
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
        if not away_from_kinks(hidden, a["depthwise_activation"], call.low).all():
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
