"""oneDNN's convolutions, by torch's own operators: for which layers, in which formats and dtypes, where they fail."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...operators import backends, measured
from .convolution import FusedConv, fold, numeric_padding, shape_of_output

_PACKS_KEPT = 4  # formats; a pack is as large as the weight
_SHAPES_KEPT = 32
# Below this many products aten's own choice of a kernel is followed: oneDNN's calls cost more than its kernels save.
_FEW_PRODUCTS = 500_000

packed_conv2d = torch.ops.mkldnn._convolution_pointwise.default
packed_conv2d_add = torch.ops.mkldnn._convolution_pointwise.binary
_NO_SCALARS: list[float] = []
_ACTIVATIONS = {
    "none": lambda output: output,
    "relu": torch.relu_,
    "relu6": lambda output: output.clamp_(0, 6),
}


def onednn_for(source: FusedConv, instead: Callable[[], Run] | None = None) -> OneDNN | None:
    """The convolution with its present weights prepared for oneDNN; None where that cannot or is not to run it.

    Args:
        instead: makes what runs calls for which something else was measured to be faster; None runs all of them in
            oneDNN.
    """
    weight = source.conv.weight
    is_there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if weight.device.type != "cpu" or not is_there or backends.current() not in ("auto", "cpu"):
        return None
    compute, padding = compute_dtype(weight.dtype), numeric_padding(source.conv)
    if compute is None or padding is None:
        return None
    return OneDNN(source, torch.float32 if _ends_the_process(source.conv, compute) else compute, padding, instead)


def compute_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which oneDNN computes for a model of this dtype here; None if it does not."""
    native = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in native:
        return None
    return dtype if native[dtype]() else torch.float32


def _ends_the_process(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Whether oneDNN's float16 kernels fail for this layer; see through_fp32 in csrc/cpu/conv2d.cpp."""
    spread = zip(conv.kernel_size, conv.dilation, strict=True)
    return dtype is torch.float16 and any(pixels == 1 and step > 1 for pixels, step in spread)


class Run(Protocol):
    """A convolution with its weights."""

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor: ...
    def kernel(self, input: Tensor, residual: Tensor | None = None) -> str: ...


class _Met(NamedTuple):
    """What is known of inputs of one shape and layout.

    Attributes:
        packed: the weight; None where aten is faster.
        shape: of the output.
        other: what runs such calls, where that is not this.
    """

    packed: Tensor | None
    shape: tuple[int, ...]
    other: Run | None


class OneDNN:
    """Prepared for oneDNN: batch norm folded, weights packed in the format for each shape of input that it meets.

    Results are channels_last. Where oneDNN has no kernel for the model's 16-bit dtype on this processor, or one that
    fails, sums are float32 on float32 weights, and rounded once.

    The activation is a pass of its own over the result: oneDNN's would turn NaN into 0. A max pool comes before it,
    which leaves less to pass over: no activation changes which of two numbers is the larger, and both keep NaN.
    """

    def __init__(
        self, source: FusedConv, compute: torch.dtype, padding: list[int], instead: Callable[[], Run] | None
    ) -> None:
        conv, bn = source.conv, source.bn
        self._source = source
        self._make_instead = instead
        self._dtype = conv.weight.dtype
        self._compute = compute
        weight = conv.weight.detach().to(compute)
        bias = None if conv.bias is None else conv.bias.detach().to(compute)
        if bn is not None:
            weight, bias = fold(weight, bias, bn)
        if bias is not None:
            bias = bias.contiguous()  # oneDNN's calls ignore its stride
        self._weight, self._bias = self.weights = weight, bias
        self._geometry = (padding, list(conv.stride), list(conv.dilation), conv.groups)
        self._activate = _ACTIVATIONS[source.activation]
        self._known: dict[tuple[torch.Size, tuple[int, ...]], _Met] = {}
        self._packs: list[Tensor] = []  # one for each format
        self._lock = threading.Lock()

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor:
        dtype = input.dtype
        if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        elif dtype is not self._dtype:
            return self._source.unprepared(input, residual)  # it says what is wrong
        packed, shape, other = self._known.get((input.shape, input.stride())) or self._meet(input, residual)
        if other is not None:
            return other(input, residual)
        compute, geometry = self._compute, self._geometry
        if input.dtype is not compute:
            input = input.to(compute)
        if packed is None:
            padding, stride, dilation, groups = geometry
            output = F.conv2d(input, self._weight, self._bias, stride, padding, dilation, groups)
        elif residual is not None and residual.dtype is dtype and residual.shape == shape:
            if dtype is not compute:
                residual = residual.to(compute)
            residual = residual.contiguous(memory_format=torch.channels_last)
            output = packed_conv2d_add(
                input, residual, packed, self._bias, *geometry, "add", 1.0, None, _NO_SCALARS, None
            )
            residual = None
        else:
            output = packed_conv2d(input, packed, self._bias, *geometry, "none", _NO_SCALARS, None)
        if output.dtype is not dtype:
            output = output.to(dtype)
        if residual is not None:
            output = output + residual
        return self._activate(self._source.pooled(output))

    def kernel(self, input: Tensor, residual: Tensor | None = None) -> str:
        packed, _, other = self._known.get((input.shape, input.stride())) or self._meet(input, residual)
        if other is not None:
            return other.kernel(input, residual)
        name = str(self._compute).removeprefix("torch.")
        return f"aten {name}" if packed is None else f"oneDNN {name}, prepacked, channels_last"

    def _fails(self, input: Tensor, shape: tuple[int, ...]) -> bool:
        """Whether oneDNN's bfloat16 kernels fail for this input; see through_fp32 in csrc/cpu/conv2d.cpp."""
        conv, padding = self._source.conv, self._geometry[0]
        if self._compute is not torch.bfloat16 or min(shape) <= 0:
            return False
        rows = (
            y * conv.stride[0] + r * conv.dilation[0] - padding[0]
            for r in range(conv.kernel_size[0])
            for y in range(shape[-2])
        )
        meets_no_row = conv.dilation[0] > 1 and not any(0 <= row < input.shape[-2] for row in rows)
        return meets_no_row or (shape[-1] == 1 and conv.stride[1] > 1)

    @functools.cached_property
    def _wide(self) -> OneDNN:
        """The same in float32."""
        return OneDNN(self._source, torch.float32, self._geometry[0], self._make_instead)

    @functools.cached_property
    def _instead(self) -> Run:
        assert self._make_instead is not None
        return self._make_instead()

    def _meet(self, input: Tensor, residual: Tensor | None) -> _Met:
        shape = shape_of_output(self._source.conv, input)
        with self._lock:
            other, packs = None, False
            if self._fails(input, shape):
                other = self._wide
            elif self._is_possible(input, shape):
                pays = self._was_faster(input, residual)
                packs = self._pays(input, shape) if pays is None else pays
                other = self._instead if pays is False else None
            met = _Met(self._pack(input) if packs else None, shape, other)
            if len(self._known) >= _SHAPES_KEPT:
                self._known = {}
            self._known[input.shape, input.stride()] = met
        return met

    def _was_faster(self, input: Tensor, residual: Tensor | None) -> bool | None:
        """Whether this was measured to be faster than all else; None if it was not measured."""
        if self._make_instead is None:
            return True
        if not measured.in_force(input.device):
            return None
        call = self._source.operator_call(input, residual)
        return None if call is None else measured.prepared_pays(*call)

    def _is_possible(self, input: Tensor, shape: tuple[int, ...]) -> bool:
        return (
            input.dim() == 4
            and input.shape[1] == self._source.conv.in_channels
            and min(input.shape) > 0
            and min(shape) > 0
        )

    def _pays(self, input: Tensor, shape: tuple[int, ...]) -> bool:
        weight = self._weight
        if shape[0] * shape[2] * shape[3] * weight.numel() >= _FEW_PRODUCTS:
            return True
        padding, stride, dilation, groups = self._geometry
        chosen = torch._C._select_conv_backend(
            input.to(self._compute), weight, self._bias, stride, padding, dilation, False, [0, 0], groups
        )
        return chosen.name == "Mkldnn"

    def _pack(self, input: Tensor) -> Tensor:
        # oneDNN's choice of a format depends on the image's size and on the batch. In another one calls take up to
        # five times as long, and nothing tells which one a pack has but its bytes.
        padding, stride, dilation, groups = self._geometry
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            self._weight, padding, stride, dilation, groups, list(input.shape)
        )
        content = packed_bytes(packed)
        for known in self._packs:
            if torch.equal(packed_bytes(known), content):
                return known
        if len(self._packs) >= _PACKS_KEPT:
            self._packs, self._known = [], {}
        self._packs.append(packed)
        return packed


def packed_bytes(packed: Tensor) -> Tensor:
    """A view of the memory of a tensor in oneDNN's own format."""
    address, nbytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)
