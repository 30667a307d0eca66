"""When is a result right? The one tolerance policy, used by the tests, ``verify`` and ``demo``.

An output is compared with an oracle computed in float64 from the very same inputs, and with what
torch itself returns in the same dtype (the baseline). Elementwise,

    |out - oracle| <= min(2 * max|baseline - oracle| + floor,  cap)

"No worse than twice what you had" is the bound that matters. The floor lets a correctly rounded
result differ from an exact baseline in its last bit; the cap stops a poor baseline (half precision
sums, an overflow) from excusing a poor kernel. Both are in units of the oracle, see `POLICY`.

The outer ring of the two last dimensions can be judged on its own: convolution bugs sit on the
border, where a global maximum or a cosine similarity does not see them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BASELINE_FACTOR = 2.0


class Policy(NamedTuple):
    """The floor and the cap of one dtype."""

    last_bit: float  # floor, in units of |oracle| at that element
    summation: float  # floor, in units of max|oracle|
    cap: float  # in units of max|oracle|


_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps

# last_bit: one unit in the last place. Rounding to nearest costs half of one, and a value on a tie
#   may fall to either side once its sum was taken in another order.
# summation: sums are accumulated in at least float32, whatever the dtype; two orders of adding a
#   few thousand random terms differ by a few float32 eps of the largest result. An all but exact
#   baseline (a one-pixel output, say) must not forbid that. In float64 the oracle is itself such a
#   sum and usually *is* the baseline, so the floor alone has to cover both orders.
# cap: half precision: inputs are exact and sums are in float32, so what remains is one rounding
#   (0.5 eps), or two where an operator rounds an intermediate as eager does (depthwise, then
#   pointwise); 2 eps is a result that rounds too often or sums in half precision. float32 and
#   float64: sqrt(terms) growth for 10^5 terms (the weight gradients) stays below 300 eps.
POLICY = {
    torch.float16: Policy(torch.finfo(torch.float16).eps, 4 * _EPS32, 2 * 2**-10),
    torch.bfloat16: Policy(torch.finfo(torch.bfloat16).eps, 4 * _EPS32, 2 * 2**-7),
    torch.float32: Policy(_EPS32, 4 * _EPS32, 300 * _EPS32),
    torch.float64: Policy(_EPS64, 32 * _EPS64, 300 * _EPS64),
}

# float32 whose factors were rounded to TF32, or cut off, as some of NVIDIA's instructions do: 10 bits of mantissa, as
# in half precision, in each of two factors.
TF32 = Policy(_EPS32, 4 * _EPS32, 2 * 2**-10)


@dataclass(frozen=True)
class Region:
    """The worst errors of one part of the output, against the float64 oracle."""

    name: str  # "all", or "border" and "interior"
    error: float  # of the output
    baseline_error: float  # of torch in the same dtype
    allowed: float  # the bound at the element that comes closest to it (or oversteps it furthest)
    used: float  # the error there as a share of that bound; above 1 is a failure
    index: tuple[int, ...]  # that element
    failures: int  # elements beyond their bound
    size: int

    @property
    def ok(self) -> bool:
        return self.failures == 0

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"{self.failures} of {self.size} elements beyond the bound"
        return (
            f"{self.name}: max error {self.error:.3g}, torch's own {self.baseline_error:.3g}, "
            f"allowed {self.allowed:.3g} at {self.index}: {verdict}"
        )


@dataclass(frozen=True)
class Verdict:
    """The outcome of `compare`: one `Region`, or border and interior."""

    regions: tuple[Region, ...]
    scale: float  # max|oracle|

    @property
    def ok(self) -> bool:
        return all(region.ok for region in self.regions)

    @property
    def used(self) -> float:
        """How much of the allowed error was used, at the worst element."""
        return max(region.used for region in self.regions)

    def __str__(self) -> str:
        return "; ".join(str(region) for region in self.regions)


def compare(
    out: Tensor, oracle64: Tensor, baseline: Tensor, *, border: int | None = None, policy: Policy | None = None
) -> Verdict:
    """Judge ``out`` by the policy of this module.

    Args:
        out: The result to judge, of any floating dtype.
        oracle64: The same in float64, from the same (already rounded) inputs. Same shape. The comparison runs on
            its device: on a GPU it takes milliseconds where a CPU takes seconds.
        baseline: What torch returns in ``out``'s dtype. Same shape and dtype as ``out``.
        border: Width of the outer ring of the last two dimensions that is judged apart from the
            interior; None judges the whole output at once.
        policy: `TF32` where both were computed with it; None for that of the dtype.

    Raises:
        ValueError: on a shape or dtype that differs, which no tolerance excuses.
    """
    if oracle64.dtype != torch.float64:
        raise ValueError(f"compare: the oracle is {oracle64.dtype}, it must be float64")
    if out.dtype != baseline.dtype or out.dtype not in POLICY:
        raise ValueError(
            f"compare: the output is {out.dtype} and torch's is {baseline.dtype}; they must be the same floating dtype"
        )
    if not out.shape == oracle64.shape == baseline.shape:
        raise ValueError(
            f"compare: the output is {tuple(out.shape)}, the oracle {tuple(oracle64.shape)} and "
            f"torch's result {tuple(baseline.shape)}; the shapes must be equal"
        )
    if out.numel() == 0:
        return Verdict((Region("all", 0.0, 0.0, 0.0, 0.0, (), 0, 0),), 0.0)
    oracle64 = oracle64.detach()
    policy = policy or POLICY[out.dtype]
    error = _abs_error(out, oracle64)
    baseline_error = _abs_error(baseline, oracle64)
    magnitude = oracle64.abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = float(magnitude.max())
    floor = policy.last_bit * magnitude + policy.summation * scale

    regions = []
    for name, mask in _regions(out.shape, border, oracle64.device):
        worst_baseline = float(baseline_error[mask].max())
        allowed = (BASELINE_FACTOR * worst_baseline + floor).clamp(max=policy.cap * scale)
        used = torch.where(error > 0, error / allowed, 0.0) * mask
        index = tuple(int(i) for i in torch.unravel_index(used.argmax(), out.shape))
        regions.append(
            Region(
                name=name,
                error=float(error[mask].max()),
                baseline_error=worst_baseline,
                allowed=float(allowed[index]),
                index=index,
                used=float(used[index]),
                failures=int((used > 1).sum()),
                size=int(mask.sum()),
            )
        )
    return Verdict(tuple(regions), scale)


def assert_close_to_oracle(
    out: Tensor, oracle64: Tensor, baseline: Tensor, *, what: str, border: int | None = None
) -> Verdict:
    """`compare`, raising AssertionError that names ``what``, the worst element and the seed."""
    verdict = compare(out, oracle64, baseline, border=border)
    if not verdict.ok:
        worst = max(verdict.regions, key=lambda region: region.failures)
        raise AssertionError(
            f"{what} ({out.dtype}, {tuple(out.shape)}, torch seed {torch.initial_seed()}): "
            f"{verdict}; at {worst.index} got {float(out[worst.index])!r}, "
            f"oracle {float(oracle64[worst.index])!r}, torch {float(baseline[worst.index])!r}"
        )
    return verdict


def away_from_kinks(
    preactivation64: Tensor, activation: str, dtype: torch.dtype = torch.float32, rounded: float = 0.0
) -> Tensor:
    """True where rounding in ``dtype`` cannot flip ReLU's (ReLU6's) mask.

    A gradient there is well conditioned. Near a kink both answers are right, and they differ by the
    whole gradient. Sums are in at least float32, and rounding the result to 16 bits keeps its sign,
    but may reach 6. `rounded` is the size of what is rounded to ``dtype`` before the last sum: a
    convolution before its residual is added, say, as eager does and oneDNN's 16-bit kernels do.
    """
    sums = 64 * torch.finfo(torch.float32).eps * _largest(preactivation64) + torch.finfo(dtype).eps * rounded
    away = torch.ones_like(preactivation64, dtype=torch.bool)
    if activation in ("relu", "relu6"):
        away &= preactivation64.abs() > sums
    if activation == "relu6":
        away &= (preactivation64 - 6.0).abs() > max(sums, 12 * torch.finfo(dtype).eps)
    return away


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill every freshly allocated tensor with NaN, so that an element left unwritten shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch fills empty tensors while deterministic algorithms are asked for.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _abs_error(result: Tensor, oracle64: Tensor) -> Tensor:
    """|result - oracle|; 0 where both are the same NaN or Inf, Inf where only one is."""
    result64 = result.detach().to(oracle64.device, torch.float64)
    # What overflows the result's own dtype is Inf there by right.
    rounded = oracle64.to(result.dtype).double()
    same = (result64 == rounded) | (result64.isnan() & rounded.isnan())
    finite = result64.isfinite() & rounded.isfinite()
    distance = torch.where(finite, (result64 - oracle64).abs(), torch.inf)
    return torch.where(~finite & same, 0.0, distance)


def _regions(shape: torch.Size, border: int | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    if border is None:
        yield "all", torch.ones(shape, dtype=torch.bool, device=device)
        return
    interior = torch.zeros(shape, dtype=torch.bool, device=device)
    rows, columns = (slice(border, max(side - border, border)) for side in shape[-2:])
    interior[..., rows, columns] = True
    for name, mask in (("border", ~interior), ("interior", interior)):
        if mask.any():
            yield name, mask
