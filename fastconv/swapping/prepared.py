"""Convolutions made ready for inference: batch norm folded, weights packed, arguments parsed, all of it once.

What is prepared is a cached view of the parameters and never stale: `PreparedConvs.refresh` compares their present
state with the one that was prepared, before every forward.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import backends, library
from .fused import FusedConv, FusedSeparable, fold, output_shape

if library.LOADED:
    from .. import _C

_PACKS_KEPT = 4  # formats; a pack is as large as the weight
_SHAPES_KEPT = 32
_CACHED_WEIGHTS = 2**16  # float32: 256 KiB, half of a usual second-level cache
# Below this many products aten's own choice of a kernel is followed: oneDNN's calls cost more than its kernels save.
_FEW_PRODUCTS = 500_000

_conv = torch.ops.mkldnn._convolution_pointwise.default
_conv_add = torch.ops.mkldnn._convolution_pointwise.binary
_NO_SCALARS: list[float] = []
_ACTIVATIONS = {
    "none": lambda output: output,
    "relu": torch.relu_,
    "relu6": lambda output: output.clamp_(0, 6),
}


class PreparedConv(FusedConv):
    """A `FusedConv` for inference, which runs on prepared weights where there are any.

    Args:
        args, named: as for `FusedConv`.
        pool: a max pool to apply to the result.
    """

    ready: _Folded | _OneDNN | None = None

    def __init__(self, *args: Any, pool: Callable[[Tensor], Tensor] | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        self.pool = pool

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        ready = self.ready
        if ready is None or torch.compiler.is_compiling():
            return self.pooled(super().__call__(input, residual))
        return ready(input, residual)

    def pooled(self, output: Tensor) -> Tensor:
        return output if self.pool is None else self.pool(output)

    def sources(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """Where the tensors that are prepared live; whether they are there at all, a `Watch` sees."""
        conv, bn = self.conv, self.bn
        found = [(conv._parameters, "weight"), (conv._parameters, "bias")]
        if bn is not None:
            found += [(bn._parameters, "weight"), (bn._parameters, "bias")]
            found += [(bn._buffers, "running_mean"), (bn._buffers, "running_var")]
        return [(store, name) for store, name in found if store.get(name) is not None]

    def settings(self) -> tuple[Any, ...]:
        """What else the prepared weights depend on."""
        conv = self.conv
        eps = None if self.bn is None else self.bn.eps
        return conv.stride, conv.padding, conv.dilation, conv.groups, eps

    def prepare(self) -> None:
        self.ready = _prepare(self)

    def kernel(self, input: Tensor) -> str:
        ready = self.ready
        return super().kernel(input) if ready is None else ready.kernel(input)


class PreparedSeparable(FusedSeparable):
    """A `FusedSeparable` for inference: one kernel where that is faster than two prepared ones."""

    depthwise: PreparedConv
    pointwise: PreparedConv

    def __call__(self, input: Tensor) -> Tensor:
        depthwise, pointwise = self.depthwise.ready, self.pointwise.ready
        if depthwise is None or pointwise is None or torch.compiler.is_compiling():
            return super().__call__(input)
        if isinstance(depthwise, _Folded) or self._pays(input):
            return self.call(input, depthwise.weights, pointwise.weights)
        return pointwise(depthwise(input, None), None)

    def _pays(self, input: Tensor) -> bool:
        """Whether the CPU's kernel is faster than oneDNN's convolutions.

        It is for channels_last, packs the 1x1 weight on every call, and wants to keep it in the cache.

        Measured on Zen 3 with two threads, MobileNet-v2's and Xception's layers: 1.2 to 1.4 times as fast as
        oneDNN's two convolutions and the activation between them while it fits, 0.9 times when it does not.
        """
        return (
            input.dtype is torch.float32
            and self.pointwise.conv.weight.dtype is torch.float32
            and self.pointwise.conv.weight.numel() <= _CACHED_WEIGHTS
            and input.dim() == 4
            and input.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled("cpu")
        )

    def kernel(self, input: Tensor) -> str:
        if isinstance(self.depthwise.ready, _Folded) or self._pays(input):
            return super().kernel(input)
        return f"{self.depthwise.kernel(input)}; then 1x1 likewise"


def prepared_convs(call: Any) -> list[PreparedConv]:
    """The convolutions that a fused call of an inference program prepares."""
    if isinstance(call, PreparedSeparable):
        return [call.depthwise, call.pointwise]
    return [call] if isinstance(call, PreparedConv) else []


class PreparedConvs:
    """All prepared convolutions of one program, kept up to date together.

    The state that is compared: the identity, version, address, size, strides and dtype of every tensor, the
    batch norms' eps, the convolutions' geometry, and for the CPU a fingerprint of the data. Every write that torch
    counts changes the version. A write that it does not count (through ``.data``, NumPy or another library) is seen
    if it changes one of the bytes of which the fingerprint is taken: all of a tensor of up to 4 KiB (batch norms,
    biases), and of a larger one 64 stretches of 64 bytes, evenly spread from its first byte to its last. So a tensor
    that was overwritten as a whole is always noticed, and a single number changed in that way may not be.
    """

    def __init__(self, convs: Sequence[PreparedConv]) -> None:
        self._convs = convs
        self._state: list[Any] | None = None
        self._pending: list[Any] | None = None
        self._tensors: list[Tensor] = []  # keeps the identities in _state unique
        self._lock = threading.Lock()
        self._slots = [slot for conv in convs for slot in conv.sources()]

    def refresh(self) -> bool:
        """Makes everything ready for the present parameters; False if they have only just changed.

        Parameters that change between any two forwards, as in training, are not worth preparing: after a change it
        takes a second forward with the same ones.
        """
        tensors, state = self._observe()
        if state == self._state:
            return True
        with self._lock:
            if state == self._state:
                return True
            if self._state is not None and state != self._pending:
                self._pending = state
                return False
            for conv in self._convs:
                conv.prepare()
            self._tensors, self._state = tensors, state
        return True

    def _observe(self) -> tuple[list[Tensor], list[Any]]:
        tensors = [store[name] for store, name in self._slots]
        addresses = list(map(Tensor.data_ptr, tensors))
        sizes = list(map(operator.attrgetter("nbytes"), tensors))
        try:
            versions = list(map(operator.attrgetter("_version"), tensors))
        except RuntimeError:  # tensors made in inference mode have no version
            versions = [None if t.is_inference() else t._version for t in tensors]
        state = [
            list(map(id, tensors)),
            addresses,
            sizes,
            versions,
            list(map(Tensor.stride, tensors)),
            list(map(operator.attrgetter("dtype"), tensors)),
            [conv.settings() for conv in self._convs],
            torch._C._get_mkldnn_enabled(),
            backends.current(),
        ]
        if tensors and tensors[0].device.type == "cpu":
            state.append(_C.fingerprint(addresses, sizes))
        return tensors, state


def _compute_dtype(dtype: torch.dtype) -> torch.dtype | None:
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


def _numeric_padding(conv: nn.Conv2d) -> list[int] | None:
    """The padding in numbers; None for a "same" that pads one side more than the other."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else [t // 2 for t in total]
    return list(conv.padding)


def _prepare(source: PreparedConv) -> _Folded | _OneDNN:
    weight = source.conv.weight
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if weight.device.type == "cpu" and onednn and backends.current() in ("auto", "cpu"):
        compute, padding = _compute_dtype(weight.dtype), _numeric_padding(source.conv)
        if compute is not None and padding is not None:
            if _ends_the_process(source.conv, compute):
                compute = torch.float32
            return _OneDNN(source, compute, padding)
    return _Folded(source)


class _Folded:
    """Prepared for the public ops: batch norm folded."""

    def __init__(self, source: PreparedConv) -> None:
        conv, bn = source.conv, source.bn
        self._source = source
        self._weight = conv.weight.detach()
        self._bias = None if conv.bias is None else conv.bias.detach()
        if bn is not None:
            self._weight, self._bias = fold(self._weight, self._bias, bn)
        self.weights = self._weight, self._bias

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return self._source.pooled(self._source.call(input, self._weight, self._bias, residual))

    def kernel(self, input: Tensor) -> str:
        return f"{FusedConv.kernel(self._source, input)}, batch norm folded"


class _OneDNN:
    """Prepared for oneDNN: batch norm folded, weights packed in the format for each shape of input that it meets.

    Results are channels_last. Where oneDNN has no kernel for the model's 16-bit dtype on this processor, or one that
    fails, sums are float32 on float32 weights, and rounded once.

    The activation is a pass of its own over the result: oneDNN's would turn NaN into 0. A max pool comes before it,
    which leaves less to pass over: no activation changes which of two numbers is the larger, and both keep NaN.
    """

    def __init__(self, source: PreparedConv, compute: torch.dtype, padding: list[int]) -> None:
        conv, bn = source.conv, source.bn
        self._source = source
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
        self._known: dict[torch.Size, tuple[Tensor | None, tuple[int, ...], bool]] = {}
        self._packs: list[Tensor] = []  # one for each format
        self._lock = threading.Lock()

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor:
        dtype = input.dtype
        if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        elif dtype is not self._dtype:
            return self._source.pooled(FusedConv.__call__(self._source, input, residual))  # it says what is wrong
        packed, shape, fails = self._known.get(input.shape) or self._meet(input)
        if fails:
            return self._wide(input, residual)
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
            output = _conv_add(input, residual, packed, self._bias, *geometry, "add", 1.0, None, _NO_SCALARS, None)
            residual = None
        else:
            output = _conv(input, packed, self._bias, *geometry, "none", _NO_SCALARS, None)
        if output.dtype is not dtype:
            output = output.to(dtype)
        if residual is not None:
            output = output + residual
        return self._activate(self._source.pooled(output))

    def kernel(self, input: Tensor) -> str:
        packed, _, fails = self._known.get(input.shape) or self._meet(input)
        if fails:
            return self._wide.kernel(input)
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
    def _wide(self) -> _OneDNN:
        """The same in float32."""
        return _OneDNN(self._source, torch.float32, self._geometry[0])

    def _meet(self, input: Tensor) -> tuple[Tensor | None, tuple[int, ...], bool]:
        """The packed weight for inputs of this shape, None where aten is faster; the output's shape; whether oneDNN
        fails for them."""
        shape = output_shape(self._source.conv, input)
        fails = self._fails(input, shape)
        with self._lock:
            packed = self._pack(input) if not fails and self._pays(input, shape) else None
            if len(self._known) >= _SHAPES_KEPT:
                self._known = {}
            self._known[input.shape] = packed, shape, fails
        return packed, shape, fails

    def _pays(self, input: Tensor, shape: tuple[int, ...]) -> bool:
        weight = self._weight
        if (
            input.dim() != 4
            or input.shape[1] != self._source.conv.in_channels
            or min(input.shape) == 0
            or min(shape) <= 0
        ):
            return False
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
        content = _bytes(packed)
        for known in self._packs:
            if torch.equal(_bytes(known), content):
                return known
        if len(self._packs) >= _PACKS_KEPT:
            self._packs, self._known = [], {}
        self._packs.append(packed)
        return packed


def _bytes(packed: Tensor) -> Tensor:
    """A view of the memory of a tensor in oneDNN's own format."""
    address, nbytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)
