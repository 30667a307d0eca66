"""Sample inputs of every op, each with the reason it is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastconv import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = tuple(FORMATS)
CONV_OPS = (
    "conv2d_relu",
    "conv2d_add_relu",
    "pointwise_conv2d",
    "pointwise_conv2d_group",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
)


@dataclass(frozen=True)
class Case:
    """A call of one op: tensor arguments by shape, the others by value."""

    op: str
    name: str
    shapes: dict[str, Any]  # a shape, a list of shapes, or None
    why: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def small(self) -> bool:
        """Few enough elements for numerical differentiation."""
        return sum(math.prod(s) for s in self._flat_shapes()) <= 600

    @property
    def activations(self) -> list[str]:
        """The names of the options that hold an activation."""
        return [name for name in self.options if name.endswith("activation")]

    def _flat_shapes(self) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for shape in self.shapes.values():
            if isinstance(shape, list):
                found.extend(s for s in shape if s is not None)
            elif shape is not None:
                found.append(shape)
        return found

    def arguments(
        self,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        *,
        seed: int = 0,
        requires_grad: bool = False,
        device: torch.device | None = None,
    ) -> dict[str, Any]:
        """Random arguments; weights are scaled so that outputs have the size of the inputs."""
        generator = torch.Generator("cpu").manual_seed(seed)
        device = device or torch.get_default_device()

        def tensor(name: str, shape: tuple[int, ...] | None) -> Tensor | None:
            if shape is None:
                return None
            value = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            if "weight" in name:
                value = value * 1.4 / math.sqrt(math.prod(shape[1:]))
            value = value.to(device, dtype)
            if layout == "channels_last" and len(shape) in (4, 5):
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                value = value.contiguous(memory_format=formats[len(shape)])
            return value.requires_grad_(requires_grad)

        return {
            **{
                name: [tensor(name, s) for s in shape] if isinstance(shape, list) else tensor(name, shape)
                for name, shape in self.shapes.items()
            },
            **self.options,
        }


def run(op: str, arguments: dict[str, Any], **more: Any) -> list[Tensor]:
    """The op's outputs, always as a list."""
    out = getattr(ops, op)(**{**arguments, **more})
    return list(out) if isinstance(out, (list, tuple)) else [out]


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
    found = []
    for value in arguments.values():
        found.extend(value if isinstance(value, list) else [value])
    return [value for value in found if isinstance(value, Tensor)]


def mapped(arguments: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with the function applied to every tensor."""

    def one(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
            return [one(v) for v in value]
        return function(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


def _conv(
    name: str,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    why: str,
    bias: bool = True,
    **options: Any,
) -> Case:
    shapes = {"input": input, "weight": weight, "bias": (weight[0],) if bias else None}
    return Case("conv2d_relu", name, shapes, why, options)


def _residual(case: Case, output: tuple[int, ...]) -> Case:
    shapes = {**case.shapes, "residual": output}
    return Case("conv2d_add_relu", case.name, shapes, case.why, case.options)


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
    Case(
        "pointwise_conv2d",
        "small",
        {"input": (2, 3, 3, 4), "weight": (5, 3, 1, 1), "bias": (5,), "residual": (2, 5, 3, 4)},
        "everything at once",
        {"activation": "relu"},
    ),
    Case(
        "pointwise_conv2d",
        "plain",
        {"input": (2, 6, 4, 3), "weight": (4, 6, 1, 1)},
        "no bias, no residual, no activation",
    ),
    Case(
        "pointwise_conv2d",
        "shortcut",
        {"input": (2, 8, 9, 10), "weight": (16, 8, 1, 1), "bias": (16,)},
        "ResNet's strided shortcut, odd and even sides",
        {"stride": 2},
    ),
    Case(
        "pointwise_conv2d",
        "expand",
        {
            "input": (2, 16, 7, 7),
            "weight": (64, 16, 1, 1),
            "bias": (64,),
            "residual": (2, 64, 7, 7),
        },
        "the end of a bottleneck",
        {"activation": "relu"},
    ),
    Case(
        "pointwise_conv2d",
        "linear_bottleneck",
        {"input": (2, 24, 7, 7), "weight": (8, 24, 1, 1), "bias": (8,), "residual": (2, 8, 7, 7)},
        "MobileNet-v2 adds without an activation",
    ),
    Case(
        "pointwise_conv2d",
        "relu6",
        {"input": (1, 5, 8, 9), "weight": (11, 5, 1, 1), "bias": (11,)},
        "channel counts that are multiples of nothing",
        {"activation": "relu6"},
    ),
    Case(
        "pointwise_conv2d",
        "unbatched",
        {"input": (4, 5, 6), "weight": (7, 4, 1, 1), "residual": (7, 5, 6)},
        "[C, H, W] as torch.nn.Conv2d takes it",
        {"activation": "relu"},
    ),
    Case(
        "pointwise_conv2d",
        "empty_batch",
        {"input": (0, 4, 5, 6), "weight": (7, 4, 1, 1), "bias": (7,)},
        "a batch of none",
        {"activation": "relu"},
    ),
    # -------------------------------------------------------------------- pointwise_conv2d_group
    Case(
        "pointwise_conv2d_group",
        "small",
        {
            "input": (2, 3, 3, 3),
            "weights": [(2, 3, 1, 1), (4, 3, 1, 1)],
            "biases": [(2,), (4,)],
        },
        "second derivatives by differences",
        {"activation": "relu"},
    ),
    Case(
        "pointwise_conv2d_group",
        "one_bias",
        {
            "input": (2, 3, 3, 2),
            "weights": [(2, 3, 1, 1), (3, 3, 1, 1)],
            "biases": [None, (3,)],
        },
        "one branch with a bias, one without",
    ),
    Case(
        "pointwise_conv2d_group",
        "inception",
        {
            "input": (2, 24, 7, 7),
            "weights": [(8, 24, 1, 1), (12, 24, 1, 1), (3, 24, 1, 1)],
            "biases": [(8,), (12,), (3,)],
        },
        "the three 1x1 reductions of an Inception module",
        {"activation": "relu"},
    ),
    Case(
        "pointwise_conv2d_group",
        "one_branch",
        {"input": (2, 4, 5, 3), "weights": [(6, 4, 1, 1)]},
        "the smallest group, without biases or activation",
    ),
    Case(
        "pointwise_conv2d_group",
        "unbatched",
        {"input": (4, 5, 3), "weights": [(6, 4, 1, 1), (2, 4, 1, 1)], "biases": [(6,), (2,)]},
        "[C, H, W] as torch.nn.Conv2d takes it",
        {"activation": "relu6"},
    ),
    Case(
        "pointwise_conv2d_group",
        "empty_batch",
        {"input": (0, 4, 5, 3), "weights": [(6, 4, 1, 1), (2, 4, 1, 1)]},
        "a batch of none",
    ),
    # -------------------------------------------------------------------------- depthwise_conv2d
    Case(
        "depthwise_conv2d",
        "small",
        {"input": (2, 3, 5, 4), "weight": (6, 1, 3, 3), "bias": (6,)},
        "a multiplier of 2, stride and padding",
        {"stride": 2, "padding": 1, "activation": "relu"},
    ),
    Case(
        "depthwise_conv2d",
        "mobilenet",
        {"input": (2, 24, 14, 15), "weight": (24, 1, 3, 3), "bias": (24,)},
        "MobileNet's 3x3",
        {"padding": 1, "activation": "relu6"},
    ),
    Case(
        "depthwise_conv2d",
        "odd_channels",
        {"input": (1, 19, 9, 9), "weight": (19, 1, 5, 5)},
        "a number of channels that no vector divides, 5x5, no bias",
        {"stride": 2, "padding": 2},
    ),
    Case(
        "depthwise_conv2d",
        "large_filter",
        {"input": (1, 8, 13, 13), "weight": (8, 1, 11, 11), "bias": (8,)},
        "the largest filter in use, nearly all of it over padding",
        {"padding": "same", "activation": "relu"},
    ),
    Case(
        "depthwise_conv2d",
        "dilated",
        {"input": (1, 6, 12, 11), "weight": (6, 1, 3, 2), "bias": (6,)},
        "dilation and a filter that is not square",
        {"dilation": (2, 3), "padding": (2, 1)},
    ),
    Case(
        "depthwise_conv2d",
        "unbatched",
        {"input": (4, 7, 7), "weight": (4, 1, 3, 3), "bias": (4,)},
        "[C, H, W] as torch.nn.Conv2d takes it",
        {"activation": "relu"},
    ),
    Case(
        "depthwise_conv2d",
        "empty_batch",
        {"input": (0, 4, 7, 7), "weight": (4, 1, 3, 3)},
        "a batch of none",
    ),
    # ---------------------------------------------------------------- depthwise_separable_conv2d
    Case(
        "depthwise_separable_conv2d",
        "small",
        {
            "input": (2, 3, 4, 4),
            "depthwise_weight": (6, 1, 3, 3),
            "pointwise_weight": (4, 6, 1, 1),
            "depthwise_bias": (6,),
            "pointwise_bias": (4,),
        },
        "a multiplier of 2 and both activations",
        {"padding": 1, "depthwise_activation": "relu", "pointwise_activation": "relu6"},
    ),
    Case(
        "depthwise_separable_conv2d",
        "xception",
        {
            "input": (2, 24, 9, 9),
            "depthwise_weight": (24, 1, 3, 3),
            "pointwise_weight": (40, 24, 1, 1),
        },
        "no bias and nothing between the two, as in Xception",
        {"padding": 1},
    ),
    Case(
        "depthwise_separable_conv2d",
        "mobilenet",
        {
            "input": (2, 19, 14, 13),
            "depthwise_weight": (19, 1, 3, 3),
            "pointwise_weight": (33, 19, 1, 1),
            "depthwise_bias": (19,),
            "pointwise_bias": (33,),
        },
        "stride 2, channel counts that no tile divides",
        {
            "stride": 2,
            "padding": 1,
            "depthwise_activation": "relu6",
            "pointwise_activation": "none",
        },
    ),
    Case(
        "depthwise_separable_conv2d",
        "dilated",
        {
            "input": (1, 5, 11, 12),
            "depthwise_weight": (5, 1, 3, 3),
            "pointwise_weight": (6, 5, 1, 1),
            "pointwise_bias": (6,),
        },
        "dilation, and a bias on one side only",
        {"dilation": 2, "padding": "same", "pointwise_activation": "relu"},
    ),
    Case(
        "depthwise_separable_conv2d",
        "unbatched",
        {"input": (4, 7, 7), "depthwise_weight": (4, 1, 3, 3), "pointwise_weight": (5, 4, 1, 1)},
        "[C, H, W] as torch.nn.Conv2d takes it",
    ),
    Case(
        "depthwise_separable_conv2d",
        "empty_batch",
        {
            "input": (0, 4, 7, 7),
            "depthwise_weight": (4, 1, 3, 3),
            "pointwise_weight": (5, 4, 1, 1),
        },
        "a batch of none",
        {"depthwise_activation": "relu"},
    ),
    # ---------------------------------------------------------------------------------- add_relu
    Case("add_relu", "small", {"input": (3, 5), "other": (3, 5)}, "any rank"),
    Case(
        "add_relu",
        "relu6",
        {"input": (2, 3, 4, 5), "other": (2, 3, 4, 5)},
        "the mask has two ends",
        {"activation": "relu6"},
    ),
    Case(
        "add_relu",
        "broadcast",
        {"input": (2, 5, 4, 3), "other": (5, 1, 1)},
        "a per-channel summand, whose gradient is a sum",
    ),
    Case("add_relu", "broadcast_both", {"input": (4, 1, 3), "other": (2, 1)}, "both are expanded"),
    Case(
        "add_relu",
        "sum",
        {"input": (2, 3, 7, 7), "other": (2, 3, 7, 7)},
        "no activation: no mask",
        {"activation": "none"},
    ),
    Case(
        "add_relu",
        "resnet",
        {"input": (2, 67, 14, 14), "other": (2, 67, 14, 14)},
        "several vectors and a rest, several threads",
    ),
    Case("add_relu", "scalar", {"input": (), "other": ()}, "no dimensions"),
    Case("add_relu", "empty", {"input": (0, 3), "other": (0, 3)}, "no elements"),
    # ----------------------------------------------------------------------- local_response_norm
    Case(
        "local_response_norm",
        "small",
        {"input": (2, 6, 3, 4)},
        "values large enough for the window to matter",
        {"size": 5, "alpha": 0.8, "beta": 0.75, "k": 2.0},
    ),
    Case(
        "local_response_norm",
        "alexnet",
        {"input": (2, 96, 13, 13)},
        "the paper's constants (alpha is divided by the size)",
        {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0},
    ),
    Case(
        "local_response_norm",
        "even",
        {"input": (2, 7, 3, 5)},
        "an even window is not symmetric, its gradient is the mirror image",
        {"size": 4, "alpha": 0.5},
    ),
    Case(
        "local_response_norm",
        "wider_than_channels",
        {"input": (2, 3, 4, 5)},
        "every window is clipped",
        {"size": 9, "alpha": 0.5, "beta": 0.5},
    ),
    Case(
        "local_response_norm",
        "size_one",
        {"input": (2, 5, 4, 3)},
        "each channel alone",
        {"size": 1, "alpha": 1.0, "beta": 1.0},
    ),
    Case(
        "local_response_norm",
        "any_beta",
        {"input": (2, 9, 5, 5)},
        "an exponent without a short cut",
        {"size": 3, "alpha": 0.7, "beta": 0.6, "k": 0.5},
    ),
    Case(
        "local_response_norm",
        "three_dimensions",
        {"input": (3, 10, 21)},
        "[N, C, L]",
        {"size": 3, "alpha": 0.3},
    ),
    Case(
        "local_response_norm",
        "five_dimensions",
        {"input": (2, 5, 2, 3, 4)},
        "[N, C, D, H, W]",
        {"size": 3, "alpha": 0.3},
    ),
    Case(
        "local_response_norm",
        "relu",
        {"input": (2, 6, 4, 4)},
        "the convolution's activation in the same pass",
        {"size": 5, "alpha": 0.8, "beta": 0.75, "k": 2.0, "activation": "relu"},
    ),
    Case(
        "local_response_norm",
        "relu6_even",
        {"input": (2, 7, 3, 5)},
        "both bounds, a window that is not symmetric",
        {"size": 4, "alpha": 0.5, "beta": 0.6, "k": 0.5, "activation": "relu6"},
    ),
    Case("local_response_norm", "empty", {"input": (0, 5, 4, 4)}, "a batch of none", {"size": 3}),
]


def named(*names: str) -> list[Case]:
    """The cases of these ops."""
    return [case for case in CASES if case.op in names]


# By op, its first
FIRST = {op: named(op)[0] for op in ops.__all__}
