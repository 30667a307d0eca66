"""What launchers share: the launch itself, layouts, precision, index width, how work is split."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton
from torch import Tensor

from ..operators.convolution import Geometry, output_shape
from ..operators.precision import allow_tf32
from .operands import Form

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# 32-bit offsets below this; the distance to 2^31 covers the lanes of a tile that lie beyond its tensor.
NARROW_LIMIT = 2**31 - 2**20

# A part of a reduction that is split among programs has at least so many steps of its loop: fewer cost more in writing
# and adding the parts than they gain.
_LEAST_STEPS = 4
_PROGRAMS_PER_PROCESSOR = 2


class Launch(NamedTuple):
    """A launch: the kernel's name, how many programs, and its compile-time arguments, block sizes among them."""

    kernel: str
    programs: int
    meta: dict[str, Any]


_Noted = TypeVar("_Noted")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_planners: list[Any] = []
_recorders: list[list[Launch]] = []


@contextlib.contextmanager
def listening(lists: list[list[_Noted]]) -> Iterator[list[_Noted]]:
    """Yields a new list, which is one of `lists` within the block."""
    found: list[_Noted] = []
    lists.append(found)
    try:
        yield found
    finally:
        lists[:] = [other for other in lists if other is not found]


def recorded() -> contextlib.AbstractContextManager[list[Launch]]:
    """Yields a list to which every launch is added, of any thread; an op whose call adds none was left to aten."""
    return listening(_recorders)


def planner(function: _Function) -> _Function:
    """What a launch passes beside tensors is found once for each combination of arguments, which are hashable."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _planners.append(cached)
    return cast(_Function, cached)


def plans() -> int:
    """How many are kept."""
    return sum(each.cache_info().currsize for each in _planners)


def forget_plans() -> None:
    """For who changes what they depend on, such as `processors`."""
    for each in _planners:
        each.cache_clear()


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Launches the kernel on the device of its first tensor; no programs, no launch."""
    if programs == 0:
        return
    for found in _recorders:
        found.append(Launch(kernel.__name__, programs, meta))
    device = getattr(args[0], "base", args[0]).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)


def cdiv(value: int, divisor: int) -> int:
    """Rounded up; a fifth of the time of triton.cdiv."""
    return -(-value // divisor)


def guarded(config: dict[str, int], taps: int) -> dict[str, int]:
    """At most 4 warps for filters larger than 1x1.

    A flat loop over taps and channels has been seen to miscompile with 8 warps. test_eight_warps of
    tests/kernels/triton tries that on a GPU; the guard goes when it has passed there on every supported version.
    """
    return {**config, "num_warps": min(config["num_warps"], 4)} if taps > 1 else config


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision for float32: what torch's switch for convolutions says; a 1x1 is one of them.

    To other dtypes it says nothing.
    """
    return "tf32" if dtype == torch.float32 and allow_tf32() else "ieee"


def dtype_class(dtype: torch.dtype, precision: str) -> str:
    """The part of a table's key that the operands decide."""
    return precision if dtype == torch.float32 else "16bit"


def width_class(channels: int) -> str:
    """The part of a table's key that the number of a tile's columns decides."""
    return "narrow" if channels <= 32 else "medium" if channels <= 64 else "wide"


def wide(*tensors: Tensor | Form | None) -> bool:
    """Whether an offset into one of them, or an index over its elements, may pass 2^31."""
    return any(t is not None and _reaches(t.shape, t.stride() if isinstance(t, Tensor) else t.strides) for t in tensors)


def _reaches(shape: Sequence[int], strides: Sequence[int]) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return max(math.prod(shape), last) > NARROW_LIMIT


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter a few, so that reductions are split there, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def has_large_tiles(device: torch.device) -> bool:
    """Whether it is a data-centre card from Hopper on: the room of `table.LARGE`, wgmma or what came after, TMA."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def split(steps: int, tiles: int, device: torch.device, programs: int = _PROGRAMS_PER_PROCESSOR) -> tuple[int, int]:
    """(steps of a part, parts) for a reduction of `steps` steps in each of `tiles` tiles.

    As many parts as fill the device. The same for the same shapes on the same kind of device, hence the same bits.
    """
    parts = max(1, programs * processors(device) // tiles) if tiles else 1
    part_steps = max(cdiv(steps, parts), min(_LEAST_STEPS, steps), 1)
    return part_steps, cdiv(steps, part_steps)


# ------------------------------------------------------------------------------------------ layouts


def convolution_layout(input: Tensor, weight: Tensor, geometry: Geometry) -> torch.memory_format:
    """The layout in which eager's convolution returns its output, and its backward both gradients: torch decides."""
    stride, padding, dilation, groups = geometry
    chosen = torch._C._select_conv_backend(
        input, weight, None, stride, padding, dilation, False, [0, 0], groups, [weight.shape[0]]
    )
    return torch._C._conv_determine_backend_memory_format(input, weight, chosen)


def new_output(input: Tensor, weight: Tensor, geometry: Geometry, plain: bool = False) -> Tensor:
    """An unwritten result in eager's layout; `plain` where a sum or a ReLU follows, see
    `fastconv.operators.activations.activate`."""
    shape = output_shape(input.shape, weight.shape, geometry)
    layout = convolution_layout(input, weight, geometry)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if plain and output.is_contiguous():  # made anew: autograd would not let the caller overwrite a view
        return torch.empty(shape, dtype=input.dtype, device=input.device)
    return output


def dense(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(the tensor without gaps or overlaps, an unwritten one like it): itself, or a copy if it has some."""
    if tensor.is_contiguous():  # whatever else it may be
        return tensor, torch.empty_like(tensor, memory_format=torch.contiguous_format)
    like = torch.empty_like(tensor)
    return (tensor if like.stride() == tensor.stride() else like.copy_(tensor)), torch.empty_like(like)


def with_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, that lies in memory as `like` does."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)
