"""What there is to run a call: aten, the backends that can run here, and convolutions as `fastconv.swap` prepares
them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..aten_kernels import OPERATORS
from ..operators import backends, convolution_operators, local_response_norm
from ..operators.activations import activate
from ..operators.convolution import FusedConvolution, by_aten
from ..operators.depthwise_separable import read as read_separable
from ..operators.schemas import WITH_OUT
from ..operators.table_text import name
from ..operators.variants import applied
from ..swapping.calls.convolution import FusedConv
from ..swapping.calls.onednn import OneDNN, onednn_for
from .calls import OperatorCall

REFERENCE = "reference"
_SINGLE = ("conv2d_relu", "conv2d_add_relu", "pointwise_conv2d", "depthwise_conv2d")


class Contender(NamedTuple):
    """A backend, with the kernels or block sizes to use, if they are not to be its own choice."""

    backend: str
    variant: dict[str, Any]

    def __str__(self) -> str:
        return name(self.backend, self.variant)

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return name(self.backend, dict(sorted(self.variant.items())))


def contenders(call: OperatorCall, device: torch.device, among: Iterable[str] | None = None) -> list[Contender]:
    """Those for a call, aten first, without variants; `among` limits the others to these backends."""
    names = [one for one in backends.available() if one != REFERENCE and backends.is_possible(one, device)]
    if device.type == "cpu" and among is None:
        names = [one for one in names if one != "triton"]  # in its interpreter, to be tested
    if device.type == "cpu" and not call.is_backward and (call.operator in _SINGLE or "separable" in call.operator):
        names.append(backends.PREPARED)
    return [Contender(one, {}) for one in (REFERENCE, *names) if one == REFERENCE or among is None or one in among]


def runner(contender: Contender, call: OperatorCall) -> Callable[[Sequence[Any]], Any]:
    """What runs the contender on arguments of the call, anything between two calls with the same ones not kept."""
    if contender.backend == REFERENCE:
        return lambda args: OPERATORS[call.operator](*args)
    if contender.backend == backends.PREPARED:
        return lambda args: prepared(call.operator, args)()
    overload = getattr(getattr(torch.ops, str(backends.namespace(contender.backend))), call.operator).default

    def run(args: Sequence[Any]) -> Any:
        with applied(contender.backend, contender.variant):
            return overload(*args)

    return run


def out_runner(contender: Contender, call: OperatorCall) -> Callable[[Sequence[Any], Any], None] | None:
    """What runs the contender on arguments of the call and on where its result is to go; None if nothing does."""
    namespace = None if contender.backend == backends.PREPARED else backends.namespace(contender.backend)
    if namespace is None or call.operator not in WITH_OUT:
        return None
    overload = getattr(getattr(torch.ops, namespace), call.operator).out

    def run(args: Sequence[Any], out: Any) -> None:
        with applied(contender.backend, contender.variant):
            overload(*args, out)

    return run


def bound(contender: Contender, call: OperatorCall, args: Sequence[Any]) -> Callable[[], Any]:
    """The same, ready to be called again and again, as whoever has it calls it.

    Aten without a check of ours, as a user writes it; a forward by way of the public function, which checks; what is
    prepared once is prepared here.
    """
    if contender.backend == backends.PREPARED:
        return prepared(call.operator, args)
    if contender.backend == REFERENCE:
        return _by_hand(call.operator, args)
    if not call.is_backward:
        names = [name for name in call.named() if not name.endswith("activation")]
        function = functools.partial(
            getattr(ops, call.operator),
            *args[: len(names)],
            **dict(list(zip(call.named(), args, strict=True))[len(names) :]),
            backend=contender.backend,
        )
        variant = applied(contender.backend, contender.variant)

        def public() -> Any:
            with variant:
                return function()

        return public
    run = runner(contender, call)
    return lambda: run(args)


def _by_hand(operator: str, args: Sequence[Any]) -> Callable[[], Any]:
    """What is written without this package."""
    if operator in _SINGLE:
        return functools.partial(by_aten, convolution_operators.read(operator, args))
    if operator == "depthwise_separable_conv2d":
        depthwise, pointwise = read_separable(operator, args)
        return lambda: by_aten(pointwise._replace(input=by_aten(depthwise)))
    if operator == "pointwise_conv2d_group":
        input, weights, biases, activation = args
        pairs = list(zip(weights, biases or [None] * len(weights), strict=True))
        return lambda: [activate(F.conv2d(input, *pair), activation) for pair in pairs]
    if operator == "add_relu":
        return lambda: activate(args[0] + args[1], args[2])
    if operator == "local_response_norm":
        return lambda: local_response_norm.by_aten(*args)
    return lambda: OPERATORS[operator](*args)


def prepared(operator: str, args: Sequence[Any]) -> Callable[[], Tensor]:
    """A forward on weights that `fastconv.swap` would have packed.

    Raises:
        RuntimeError: there is no such convolution for these arguments.
    """
    if "separable" in operator:
        depthwise, pointwise = read_separable(operator, args)
        first, second = _packed(depthwise), _packed(pointwise)
        return lambda: second(first(depthwise.input, None), None)
    conv = convolution_operators.read(operator, args)
    packed = _packed(conv)
    return lambda: packed(conv.input, conv.residual)


def _packed(conv: FusedConvolution) -> OneDNN:
    weight, geometry = conv.weight, conv.geometry
    filters, channels, *taps = weight.shape
    module = nn.utils.skip_init(
        nn.Conv2d,
        *(channels * geometry.groups, filters, tuple(taps), tuple(geometry.stride), tuple(geometry.padding)),
        *(tuple(geometry.dilation), geometry.groups, conv.bias is not None),
        dtype=weight.dtype,
    )
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if conv.bias is not None:
        module.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    found = onednn_for(FusedConv(module, activation=conv.activation, has_residual=conv.residual is not None))
    if found is None:
        raise RuntimeError("oneDNN is not there, or does not take this convolution")
    return found
