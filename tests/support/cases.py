"""Sample inputs of every op, each with the reason it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.calls import FORMATS, Layer, Shape, mapped, named_tensors
from fastconv.measure.calls import run as run  # with the cases, as tests take it

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = tuple(FORMATS)
CONV_OPS = (
    "conv2d_relu",
    "conv2d_add_relu",
    "pointwise_conv2d",
    "pointwise_conv2d_group",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
)


class Case(Layer):
    """A call of one op that tests make: a `Layer` whose numbers are the same in every dtype and on every device."""

    @property
    def small(self) -> bool:
        """Few enough elements for numerical differentiation."""
        shapes = (shape if isinstance(shape, list) else [shape] for shape in self.shapes.values())
        return sum(math.prod(shape) for group in shapes for shape in group if shape is not None) <= 600

    @property
    def activations(self) -> list[str]:
        """The names of the options that hold an activation."""
        return [name for name in self.options if name.endswith("activation")]

    def arguments(
        self,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        *,
        seed: int = 0,
        requires_grad: bool = False,
        device: torch.device | None = None,
    ) -> dict[str, Any]:
        """All arguments, at random; weights are scaled so that outputs have the size of the inputs."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(name: str, shape: Shape) -> Tensor:
            value = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return value * 1.4 / math.sqrt(math.prod(shape[1:])) if "weight" in name else value

        found = self.tensors(dtype, layout, device or torch.get_default_device(), draw)
        return {**mapped(found, lambda tensor: tensor.requires_grad_(requires_grad)), **self.options}


def layout_of(tensor: Tensor) -> list[int]:
    """The strides that tell: not those of a dimension of one, nor any of an empty tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1 and tensor.numel()]


@dataclass(frozen=True)
class Concatenation:
    """A tensor that holds results side by side, with channels before and behind them that are nobody's."""

    whole: Tensor
    channels: slice  # all results'
    slices: list[Tensor]

    @staticmethod
    def of(results: list[Tensor], offset: int, layout: str, multiple: int = 8) -> Concatenation:
        """For results like these, from channel `offset` on; as many channels as a multiple of that."""
        first = results[0]
        batch, (_, *pixels) = first.shape[:-3], first.shape[-3:]
        widths = [result.shape[-3] for result in results]
        channels = slice(offset, offset + sum(widths))
        behind = channels.stop // multiple * multiple + multiple
        whole = torch.empty(batch.numel(), behind, *pixels, dtype=first.dtype, device=first.device)
        whole = whole.contiguous(memory_format=FORMATS[layout]).fill_(_NOBODYS)
        inside = whole[:, channels].split(widths, 1)
        return Concatenation(whole, channels, [part if batch else part.squeeze(0) for part in inside])

    @property
    def inside(self) -> Tensor:
        return self.whole[:, self.channels]

    def argument(self, op: str) -> Any:
        """As the op takes it for `out`."""
        return self.slices if op == "pointwise_conv2d_group" else self.slices[0]

    def check_the_rest(self) -> None:
        rest = self.whole.clone()
        rest[:, self.channels] = _NOBODYS
        assert (rest == _NOBODYS).all()


_NOBODYS = -7


def tensors(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensor arguments, lists flattened, in a fixed order."""
    return [tensor for _, tensor in named_tensors(arguments)]


def named(*names: str) -> list[Case]:
    """The cases of these ops."""
    return [case for case in CASES if case.op in names]


def _conv(name: str, input: Shape, weight: Shape, why: str, *, bias: bool = True, **options: Any) -> Case:
    shapes = {"input": input, "weight": weight, "bias": weight[:1] if bias else None}
    return Case("conv2d_relu", name, shapes, why, options)


def _residual(case: Case, output: Shape) -> Case:
    return Case("conv2d_add_relu", case.name, {**case.shapes, "residual": output}, case.why, case.options)


def _pointwise(
    name: str, input: Shape, filters: int, why: str, *, bias: bool = True, residual: bool = False, **options: Any
) -> Case:
    *batch, channels, height, width = input
    shapes: dict[str, Any] = {"input": input, "weight": (filters, channels, 1, 1)}
    if bias:
        shapes["bias"] = (filters,)
    if residual:
        shapes["residual"] = (*batch, filters, height, width)
    return Case("pointwise_conv2d", name, shapes, why, options)


def _group(
    name: str, input: Shape, filters: Sequence[int], why: str, *, biases: Sequence[bool] = (), **options: Any
) -> Case:
    shapes: dict[str, Any] = {"input": input, "weights": [(k, input[-3], 1, 1) for k in filters]}
    if biases:
        shapes["biases"] = [(k,) if has else None for k, has in zip(filters, biases, strict=True)]
    return Case("pointwise_conv2d_group", name, shapes, why, options)


def _depthwise(name: str, input: Shape, weight: Shape, why: str, *, bias: bool = True, **options: Any) -> Case:
    shapes = {"input": input, "weight": weight, **({"bias": weight[:1]} if bias else {})}
    return Case("depthwise_conv2d", name, shapes, why, options)


def _separable(
    name: str, input: Shape, hidden: int, filters: int, why: str, *, biases: Sequence[str] = (), **options: Any
) -> Case:
    """`biases` are "depthwise", "pointwise" or both."""
    shapes = {"input": input, "depthwise_weight": (hidden, 1, 3, 3), "pointwise_weight": (filters, hidden, 1, 1)}
    widths = {"depthwise": hidden, "pointwise": filters}
    shapes |= {f"{which}_bias": (widths[which],) for which in biases}
    return Case("depthwise_separable_conv2d", name, shapes, why, options)


def _add(name: str, input: Shape, other: Shape, why: str, **options: Any) -> Case:
    return Case("add_relu", name, {"input": input, "other": other}, why, options)


def _lrn(name: str, input: Shape, why: str, **options: Any) -> Case:
    return Case("local_response_norm", name, {"input": input}, why, options)


_BOTH = ("depthwise", "pointwise")
_ONE_IMAGE, _NO_IMAGE = "[C, H, W] as torch.nn.Conv2d takes it", "a batch of none"

_SMALL = _conv("small", (2, 3, 5, 4), (4, 3, 3, 3), "second derivatives by differences", padding=1)
_STRIDED = _conv(
    "small_strided",
    (1, 4, 6, 5),
    (4, 2, 3, 2),
    "stride, dilation and groups at once, without bias",
    bias=False,
    stride=(2, 1),
    padding=(1, 2),
    dilation=(1, 2),
    groups=2,
)
_RELU6 = _conv("small_relu6", (2, 2, 4, 4), (3, 2, 3, 3), "the mask has two ends", activation="relu6")

_SHARP: dict[str, Any] = {"size": 5, "alpha": 0.8, "beta": 0.75, "k": 2.0}

CASES: list[Case] = [
    # ------------------------------------------------------------------------------- conv2d_relu
    _SMALL,
    _STRIDED,
    _RELU6,
    _conv("plain", (2, 5, 7, 7), (6, 5, 3, 3), "no activation: no mask", activation="none"),
    _conv("vgg", (2, 16, 14, 14), (24, 16, 3, 3), "VGG's 3x3 with padding 1", padding=1),
    _conv("stem7x7", (2, 3, 29, 30), (8, 3, 7, 7), "three channels", stride=2, padding=3),
    _conv("stem11x11", (2, 3, 47, 47), (12, 3, 11, 11), "AlexNet's first layer", stride=4),
    _conv(
        "alexnet2",
        (2, 12, 13, 13),
        (16, 6, 5, 5),
        "AlexNet's convolution in two groups",
        padding=2,
        groups=2,
    ),
    _conv("same", (2, 5, 9, 8), (7, 5, 3, 3), "padding by name", padding="same"),
    _conv("same_even", (2, 5, 9, 8), (7, 5, 4, 2), "one row more below than above", padding="same"),
    _conv("valid", (2, 5, 9, 8), (7, 5, 3, 3), "padding by name", padding="valid"),
    _conv("inception1x7", (2, 8, 9, 9), (8, 8, 1, 7), "a row filter", padding=(0, 3)),
    _conv("pad_exceeds_filter", (1, 3, 4, 4), (5, 3, 2, 2), "whole outputs of bias", padding=3),
    _conv("one_pixel", (3, 7, 1, 1), (5, 7, 1, 1), "every layout is the same"),
    _conv("one_output", (2, 6, 5, 5), (9, 6, 5, 5), "the filter covers the input"),
    _conv("dilated", (1, 4, 15, 14), (6, 4, 3, 3), "atrous", padding=4, dilation=4),
    _conv("gap", (1, 4, 16, 16), (6, 4, 1, 1), "stride beyond the filter skips pixels", stride=3),
    _conv("unbatched", (4, 9, 9), (6, 4, 3, 3), "[C, H, W] as torch.nn.Conv2d takes it"),
    _conv("empty_batch", (0, 4, 9, 9), (6, 4, 3, 3), "a batch of none", padding=1),
    # --------------------------------------------------------------------------- conv2d_add_relu
    _residual(_SMALL, (2, 4, 5, 4)),
    _residual(_STRIDED, (1, 4, 3, 7)),
    _residual(_RELU6, (2, 3, 2, 2)),
    _residual(
        _conv("basic_block", (2, 16, 14, 13), (16, 16, 3, 3), "ResNet-18's", padding=1),
        (2, 16, 14, 13),
    ),
    _residual(_conv("unbatched", (4, 9, 9), (6, 4, 3, 3), "[C, H, W] too"), (6, 7, 7)),
    _residual(_conv("empty_batch", (0, 4, 9, 9), (6, 4, 3, 3), "a batch of none"), (0, 6, 7, 7)),
    _residual(
        _conv("linear", (2, 4, 7, 7), (4, 4, 3, 3), "the sum alone", padding=1, activation="none"),
        (2, 4, 7, 7),
    ),
    # -------------------------------------------------------------------------- pointwise_conv2d
    _pointwise("small", (2, 3, 3, 4), 5, "everything at once", residual=True, activation="relu"),
    _pointwise("plain", (2, 6, 4, 3), 4, "no bias, no residual, no activation", bias=False),
    _pointwise("shortcut", (2, 8, 9, 10), 16, "ResNet's strided shortcut, odd and even sides", stride=2),
    _pointwise("expand", (2, 16, 7, 7), 64, "the end of a bottleneck", residual=True, activation="relu"),
    _pointwise("linear_bottleneck", (2, 24, 7, 7), 8, "MobileNet-v2 adds without an activation", residual=True),
    _pointwise("relu6", (1, 5, 8, 9), 11, "channel counts that are multiples of nothing", activation="relu6"),
    _pointwise("unbatched", (4, 5, 6), 7, _ONE_IMAGE, bias=False, residual=True, activation="relu"),
    _pointwise("empty_batch", (0, 4, 5, 6), 7, _NO_IMAGE, activation="relu"),
    # -------------------------------------------------------------------- pointwise_conv2d_group
    _group(
        *("small", (2, 3, 3, 3), (2, 4), "second derivatives by differences"),
        biases=(True, True),
        activation="relu",
    ),
    _group("one_bias", (2, 3, 3, 2), (2, 3), "one branch with a bias, one without", biases=(False, True)),
    _group(
        *("inception", (2, 24, 7, 7), (8, 12, 3), "the three 1x1 reductions of an Inception module"),
        biases=(True, True, True),
        activation="relu",
    ),
    _group("one_branch", (2, 4, 5, 3), (6,), "the smallest group, without biases or activation"),
    _group("unbatched", (4, 5, 3), (6, 2), _ONE_IMAGE, biases=(True, True), activation="relu6"),
    _group("empty_batch", (0, 4, 5, 3), (6, 2), _NO_IMAGE),
    # -------------------------------------------------------------------------- depthwise_conv2d
    _depthwise(
        *("small", (2, 3, 5, 4), (6, 1, 3, 3), "a multiplier of 2, stride and padding"),
        stride=2,
        padding=1,
        activation="relu",
    ),
    _depthwise("mobilenet", (2, 24, 14, 15), (24, 1, 3, 3), "MobileNet's 3x3", padding=1, activation="relu6"),
    _depthwise(
        *("odd_channels", (1, 19, 9, 9), (19, 1, 5, 5)),
        "a number of channels that no vector divides, 5x5, no bias",
        bias=False,
        stride=2,
        padding=2,
    ),
    _depthwise(
        *("large_filter", (1, 8, 13, 13), (8, 1, 11, 11)),
        "the largest filter in use, nearly all of it over padding",
        padding="same",
        activation="relu",
    ),
    _depthwise(
        *("dilated", (1, 6, 12, 11), (6, 1, 3, 2), "dilation and a filter that is not square"),
        dilation=(2, 3),
        padding=(2, 1),
    ),
    _depthwise("unbatched", (4, 7, 7), (4, 1, 3, 3), _ONE_IMAGE, activation="relu"),
    _depthwise("empty_batch", (0, 4, 7, 7), (4, 1, 3, 3), _NO_IMAGE, bias=False),
    # ---------------------------------------------------------------- depthwise_separable_conv2d
    _separable(
        *("small", (2, 3, 4, 4), 6, 4, "a multiplier of 2 and both activations"),
        biases=_BOTH,
        padding=1,
        depthwise_activation="relu",
        pointwise_activation="relu6",
    ),
    _separable("xception", (2, 24, 9, 9), 24, 40, "no bias and nothing between the two, as in Xception", padding=1),
    _separable(
        *("mobilenet", (2, 19, 14, 13), 19, 33, "stride 2, channel counts that no tile divides"),
        biases=_BOTH,
        stride=2,
        padding=1,
        depthwise_activation="relu6",
        pointwise_activation="none",
    ),
    _separable(
        *("dilated", (1, 5, 11, 12), 5, 6, "dilation, and a bias on one side only"),
        biases=("pointwise",),
        dilation=2,
        padding="same",
        pointwise_activation="relu",
    ),
    _separable("unbatched", (4, 7, 7), 4, 5, _ONE_IMAGE),
    _separable("empty_batch", (0, 4, 7, 7), 4, 5, _NO_IMAGE, depthwise_activation="relu"),
    # ---------------------------------------------------------------------------------- add_relu
    _add("small", (3, 5), (3, 5), "any rank"),
    _add("relu6", (2, 3, 4, 5), (2, 3, 4, 5), "the mask has two ends", activation="relu6"),
    _add("broadcast", (2, 5, 4, 3), (5, 1, 1), "a per-channel summand, whose gradient is a sum"),
    _add("broadcast_both", (4, 1, 3), (2, 1), "both are expanded"),
    _add("sum", (2, 3, 7, 7), (2, 3, 7, 7), "no activation: no mask", activation="none"),
    _add("resnet", (2, 67, 14, 14), (2, 67, 14, 14), "several vectors and a rest, several threads"),
    _add("scalar", (), (), "no dimensions"),
    _add("empty", (0, 3), (0, 3), "no elements"),
    # ----------------------------------------------------------------------- local_response_norm
    _lrn("small", (2, 6, 3, 4), "values large enough for the window to matter", **_SHARP),
    _lrn(
        *("alexnet", (2, 96, 13, 13), "the paper's constants (alpha is divided by the size)"),
        **{**_SHARP, "alpha": 5e-4},
    ),
    _lrn(
        *("even", (2, 7, 3, 5), "an even window is not symmetric, its gradient is the mirror image"),
        size=4,
        alpha=0.5,
    ),
    _lrn("wider_than_channels", (2, 3, 4, 5), "every window is clipped", size=9, alpha=0.5, beta=0.5),
    _lrn("size_one", (2, 5, 4, 3), "each channel alone", size=1, alpha=1.0, beta=1.0),
    _lrn("any_beta", (2, 9, 5, 5), "an exponent without a short cut", size=3, alpha=0.7, beta=0.6, k=0.5),
    _lrn("three_dimensions", (3, 10, 21), "[N, C, L]", size=3, alpha=0.3),
    _lrn("five_dimensions", (2, 5, 2, 3, 4), "[N, C, D, H, W]", size=3, alpha=0.3),
    _lrn("relu", (2, 6, 4, 4), "the convolution's activation in the same pass", **_SHARP, activation="relu"),
    _lrn(
        *("relu6_even", (2, 7, 3, 5), "both bounds, a window that is not symmetric"),
        size=4,
        alpha=0.5,
        beta=0.6,
        k=0.5,
        activation="relu6",
    ),
    _lrn("empty", (0, 5, 4, 4), _NO_IMAGE, size=3),
]

FIRST = {op: named(op)[0] for op in ops.__all__}  # the case that stands for its op
