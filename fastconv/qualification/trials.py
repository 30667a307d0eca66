"""What a candidate is tried on: arguments of a call, with the truth and what aten makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..aten_kernels import OPERATORS
from ..measure.tolerance import POLICY, TF32, Policy, away_from_kinks, compare
from ..operators import library
from ..operators.shape_classes import IMAGES, dtype_class
from .calls import OUTPUTS, OperatorCall, TensorSpec, flat, mapped_tensors, tensors_of
from .truth import exact

FIRST, SECOND = "random values", "other values"
_FEW_IMAGES = 2
# Pixels of a block of NaN or Inf, each way: more if the operator does not read fewer.
_BLOCKS = (2, 8, 2**31)
# About so many channels of a separable convolution's input are as large as a ReLU6 needs them.
_LARGE_CHANNELS = 32
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Trial:
    """Attributes:
    name: the kind of values.
    nonfinite: "NaN" or "Inf" if some are, else "".
    args: the arguments, which must be the same after a run.
    truth, baseline: the outputs in float64, and aten's.
    """

    def __init__(
        self, name: str, call: OperatorCall, args: list[Any], device: torch.device, nonfinite: str = ""
    ) -> None:
        self.name = name
        self.nonfinite = nonfinite
        self.args = args
        self._call = call
        self._kept = [_memory(tensor).clone() for tensor in tensors_of(args)]
        self.truth = exact(call, args, device)
        self.baseline = flat(OPERATORS[call.operator](*args))

    # ------------------------------------------------------------------------------- what was left behind

    def put_back(self) -> bool:
        """Whether the arguments were changed since they were made; then they are made what they were."""
        changed = False
        for tensor, kept in zip(tensors_of(self.args), self._kept, strict=True):
            memory = _memory(tensor)
            if not torch.equal(_bits(memory), _bits(kept)):
                memory.copy_(kept)
                changed = True
        return changed

    def flaw(self, outputs: Sequence[Tensor], *, any_layout: bool = False) -> str:
        """What is wrong with the tensors, whatever their values; "" if nothing is."""
        if len(outputs) != len(self.baseline):
            return f"it returned {len(outputs)} tensors, not {len(self.baseline)}"
        for i, (output, baseline) in enumerate(zip(outputs, self.baseline, strict=True)):
            if (output.shape, output.dtype) != (baseline.shape, baseline.dtype):
                return f"the shape or dtype{_which(i, outputs)} is {tuple(output.shape)}, {output.dtype}"
        taken = {_storage(tensor) for tensor in tensors_of(self.args)}
        for i, output in enumerate(outputs):
            if output.numel() and _storage(output) in taken:
                return f"the memory{_which(i, outputs)} is that of an argument or of another result"
            taken.add(_storage(output))
        for i, output in enumerate(outputs):
            if not any_layout and _layout(output) not in [_layout(like[i]) for like in (self._fakes, self.baseline)]:
                which = f"result {i}" if len(outputs) > 1 else "it"
                return f"{which} lies in memory as {output.stride()}, not as {self._fakes[i].stride()}"
        return ""

    @functools.cached_property
    def _fakes(self) -> list[Tensor]:
        """What torch.compile takes the outputs to be. Without the library, aten's are."""
        if not library.LOADED:
            return self.baseline
        with FakeTensorMode() as mode:
            args = mapped_tensors(self.args, mode.from_tensor)
            return flat(getattr(torch.ops.fastconv, self._call.operator).default(*args))

    # ------------------------------------------------------------------------------------------- the values

    def verdict(self, outputs: Sequence[Tensor]) -> tuple[str, float, float]:
        """Why they are wrong ("" if they are right), their error and aten's; they are without a `flaw`."""
        worst, worst_baseline = 0.0, 0.0
        for i, (output, truth, baseline) in enumerate(zip(outputs, self.truth, self.baseline, strict=True)):
            found = compare(output, truth, baseline, border=self._border(output), policy=self._policies[i])
            scale = found.scale or 1.0
            worst = max(worst, *(region.error / scale for region in found.regions))
            worst_baseline = max(worst_baseline, *(region.baseline_error / scale for region in found.regions))
            if not found.ok:
                region = max(found.regions, key=lambda one: one.used)
                return f"wrong{_which(i, outputs)} with {self.name}: {region}", worst, worst_baseline
        return "", worst, worst_baseline

    @functools.cached_property
    def _policies(self) -> list[Policy]:
        """Of each output. A cap that aten itself oversteps is none that others could keep: there it is aten's error,
        unless that is infinite."""
        first = self.args[0][0] if isinstance(self.args[0], list) else self.args[0]
        is_tf32 = "conv2d" in self._call.operator and dtype_class(first) == "tf32"
        found = []
        for truth, baseline in zip(self.truth, self.baseline, strict=True):
            policy = TF32 if is_tf32 and baseline.dtype is torch.float32 else POLICY[baseline.dtype]
            own = compare(baseline, truth, baseline)
            error = own.regions[0].error / (own.scale or 1.0)
            # a rounding more, so that aten's largest error is not beyond itself
            found.append(policy._replace(cap=error * (1 + 1e-12)) if policy.cap < error < torch.inf else policy)
        return found

    def _border(self, output: Tensor) -> int | None:
        """How many rows and columns padding can reach; None where that is no question."""
        padding = self._call.named().get("padding")
        if padding is None or output.dim() != 4 or min(output.shape[-2:]) < 2:
            return None
        return max(1, *padding)

    # ---------------------------------------------------------------------------------- values without size

    def nonfinite_verdict(self, outputs: Sequence[Tensor]) -> tuple[str, bool]:
        """Why they are wrong where aten and the truth agree on what is NaN, Inf or neither; and whether a NaN was lost,
        which is not for this to call wrong."""
        lost = False
        for output, agreed in zip(outputs, self._agreed, strict=True):
            lost |= bool((agreed.nan & ~output.isnan()).any())
            if bool((agreed.finite & ~output.isfinite()).any()):
                article = "a" if self.nonfinite == "NaN" else "an"
                return f"it spreads {article} {self.nonfinite} to where aten has none", lost
            if bool((agreed.infinite & (output != agreed.value)).any()):
                return "it turns an Inf into another value", lost
        return "", lost

    @property
    def is_telling(self) -> bool:
        """Whether there is a NaN or Inf in an output at all."""
        return any(bool((agreed.nan | agreed.infinite).any()) for agreed in self._agreed)

    @functools.cached_property
    def _agreed(self) -> list[_Agreed]:
        return [_Agreed.of(truth, baseline) for truth, baseline in zip(self.truth, self.baseline, strict=True)]


@dataclass(frozen=True)
class _Agreed:
    """Of what kind the elements are, where aten and the truth agree on it; `value` tells Inf from -Inf."""

    value: Tensor
    nan: Tensor
    infinite: Tensor
    finite: Tensor

    @staticmethod
    def of(truth: Tensor, baseline: Tensor) -> _Agreed:
        rounded = truth.to(baseline.dtype)  # what overflows it is Inf by right
        infinite = rounded.isinf() & (rounded == baseline)
        return _Agreed(baseline, rounded.isnan() & baseline.isnan(), infinite, rounded.isfinite() & baseline.isfinite())


def makers(call: OperatorCall, device: torch.device) -> Iterator[Callable[[], Trial | None]]:
    """What makes the trials of a call, one by one: None where there would be nothing to see."""
    few = call.of_images(_FEW_IMAGES)

    def ordinary(name: str, call: OperatorCall, seed: int) -> Callable[[], Trial]:
        return lambda: Trial(name, call, _drawn(call, device, seed), device)

    def spoilt(argument: str, spoil: _Spoil, nonfinite: str) -> Callable[[], Trial | None]:
        def make() -> Trial | None:
            for size in _BLOCKS:
                args = spoil(few, argument, _drawn(few, device, 3), size)
                trial = Trial(f"{nonfinite} in {argument}", few, args, device, nonfinite)
                if trial.is_telling:
                    return trial
            return None

        return make

    yield ordinary(FIRST, call, 0)
    yield ordinary(SECOND, few, 1)
    for name, other in _other_layouts(few):
        yield ordinary(f"{name} gradients", other, 2)
    for argument, value in few.named().items():
        if argument in IMAGES and argument not in OUTPUTS and value is not None and not _masks_by_relu6(few, argument):
            yield spoilt(argument, _with_nan, "NaN")
    if not call.is_backward:
        yield spoilt("input", _with_inf, "Inf")


def _masks_by_relu6(call: OperatorCall, argument: str) -> bool:
    """Whether the result itself is masked by this argument's ReLU6. In aten's gradient of it what belongs to a NaN is
    masked, or is not: as the element falls into a vector, or into what is left over."""
    is_lrn = call.operator == "local_response_norm_backward"
    return is_lrn and argument == "input" and call.named()["activation"] == "relu6"


# ---------------------------------------------------------------------------------------------- the arguments


def _drawn(call: OperatorCall, device: torch.device, seed: int) -> list[Any]:
    return _gated(call, call.draw(device, seed))


def _other_layouts(call: OperatorCall) -> Iterator[tuple[str, OperatorCall]]:
    """The call of a backward with other gradients."""
    if not call.is_backward:
        return
    given = call.args[0]
    grads = given if isinstance(given, list) else [given]
    if any(len(spec.shape) != 4 or 0 in spec.shape for spec in grads):
        return

    def laid_out(spec: TensorSpec, format: torch.memory_format) -> TensorSpec:
        like = torch.empty(spec.shape, dtype=spec.dtype, device="meta", memory_format=format)
        return TensorSpec.of(like)

    def with_grads(found: list[TensorSpec]) -> OperatorCall:
        return OperatorCall(call.shape_class, (found if isinstance(given, list) else found[0], *call.args[1:]))

    for name, format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        found = [laid_out(spec, format) for spec in grads]
        if found != grads:
            yield name, with_grads(found)
    yield "expanded", with_grads([TensorSpec(spec.shape, (spec.shape[1], 1, 0, 0), spec.dtype) for spec in grads])


def _gated(call: OperatorCall, args: list[Any]) -> list[Any]:
    """Without gradient where it hangs on how the hidden result of a separable convolution is rounded near its
    activation's kinks: there both answers are right. An expanded gradient is the same everywhere: there without that
    activation."""
    named = call.named()
    activation = named.get("depthwise_activation", "none")
    if not call.is_backward or activation == "none":
        return args
    if 0 in args[0].stride():
        return ["none" if name == "depthwise_activation" else arg for name, arg in zip(named, args, strict=True)]
    given = dict(zip(named, args, strict=True))
    if activation == "relu6":
        _quiet(given["input"])
    tensors = [None if given[n] is None else given[n].double() for n in ("input", "depthwise_weight", "depthwise_bias")]
    geometry = (given["stride"], given["padding"], given["dilation"])
    hidden = OPERATORS["depthwise_conv2d"](*tensors, *geometry, "none")
    away = away_from_kinks(hidden, activation, given["input"].dtype)
    grad = given["grad_output"] * away.all(dim=1, keepdim=True).to(given["grad_output"].dtype)
    kept = torch.empty_strided(args[0].shape, args[0].stride(), dtype=grad.dtype, device=grad.device)
    return [kept.copy_(grad), *args[1:]]


def _quiet(input: Tensor) -> None:
    """Leaves few channels as large as they were drawn for a ReLU6: were all, of a thousand one would be near 6 at every
    pixel, and no gradient left. Odd steps from one to the next, so that they have every place in a vector."""
    if 0 in input.stride():
        return
    step = input.shape[1] // _LARGE_CHANNELS | 1
    large = torch.arange(input.shape[1], device=input.device) % step == 0
    input.mul_(torch.where(large, 1.0, 0.25).to(input.dtype)[:, None, None])


_Spoil = Callable[[OperatorCall, str, list[Any], int], list[Any]]


def _with_nan(call: OperatorCall, argument: str, args: list[Any], size: int) -> list[Any]:
    """In all channels of a block of the last image; where the gradient has it, its activation lets it through."""
    given = dict(zip(call.named(), mapped_tensors(args, _writable), strict=True))
    for i, tensor in enumerate(tensors_of([given[argument]])):
        _block(tensor, -1, size, i).fill_(torch.nan)
    if argument.startswith("grad_output"):
        for i, tensor in enumerate(tensors_of([given.get(name) for name in OUTPUTS])):
            _block(tensor, -1, size, i).fill_(1.0)
    return list(given.values())


def _with_inf(call: OperatorCall, argument: str, args: list[Any], size: int) -> list[Any]:
    """In a block of one channel, as more would add up to NaN: -Inf in the first image, Inf in the last."""
    given = dict(zip(call.named(), mapped_tensors(args, _writable), strict=True))
    tensor = given[argument]
    for image, value in ((0, -torch.inf), (-1, torch.inf)):
        block = _block(tensor, image, size)
        (block.narrow(1, block.shape[1] // 2, 1) if block.dim() > 1 and block.numel() else block).fill_(value)
    return list(given.values())


def _block(tensor: Tensor, image: int, size: int, place: int = 0) -> Tensor:
    """So many pixels each way in the middle of an image, or so many blocks from it; of what has no images, one of the
    first dimension."""
    if tensor.dim() == 0:
        return tensor
    block = tensor[image:] if image < 0 else tensor[image : image + 1]
    for dim in range(2, tensor.dim()):
        side = tensor.shape[dim]
        length = min(size, side)
        block = block.narrow(dim, min((side - length) // 2 + place * length, side - length), length)
    return block


# --------------------------------------------------------------------------------------------------- memory


def _writable(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if 0 in tensor.stride() else tensor


def _memory(tensor: Tensor) -> Tensor:
    """All from its first element to its last, be there others between them or several in one place."""
    spec = TensorSpec.of(tensor)
    return tensor.as_strided((spec.reach,), (1,), tensor.storage_offset())


def _bits(memory: Tensor) -> Tensor:
    return memory.view(_BITS[memory.element_size()])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> list[int]:
    """The strides that tell: not those of a dimension of one, nor any of an empty tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1 and tensor.numel()]


def _which(i: int, outputs: Sequence[Tensor]) -> str:
    return f" of result {i}" if len(outputs) > 1 else ""
