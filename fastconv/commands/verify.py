"""``python -m fastconv verify``: every op's error beside torch's own, against float64.

On layers of the networks, in every dtype and layout, forward and backward. What counts as right is
said in ``fastconv/measure/tolerance.py``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import Verdict, away_from_kinks, compare, poisoned_outputs
from fastconv.operators import backends

Shape = tuple[int, ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Layer:
    """One call of an op as a network makes it: tensor arguments by shape, the others by value."""

    op: str
    name: str
    shapes: dict[str, Shape | list[Shape]]
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device) -> dict[str, Any]:
        """Random tensors; weights are scaled so that activations keep their size."""

        def tensor(name: str, shape: Shape) -> Tensor:
            value = torch.randn(shape, device=device)
            if "weight" in name:
                value *= math.sqrt(2 / math.prod(shape[1:]))
            value = value.to(dtype)
            return value.contiguous(memory_format=memory_format) if len(shape) == 4 else value

        return {
            name: [tensor(name, s) for s in shape] if isinstance(shape, list) else tensor(name, shape)
            for name, shape in self.shapes.items()
        }

    def __call__(self, arguments: dict[str, Any], backend: str, **more: Any) -> list[Tensor]:
        options = {**self.options, **more}
        outputs = getattr(ops, self.op)(**arguments, **options, backend=backend)
        return outputs if isinstance(outputs, list) else [outputs]

    def preactivations(self, arguments: dict[str, Any]) -> list[Tensor]:
        """What goes into the last activation."""
        if self.op == "local_response_norm":
            return self(arguments, "reference")
        return self(arguments, "reference", **{self._activation_argument: "none"})

    @property
    def activation(self) -> str:
        """The last activation that takes what was rounded; an LRN's takes the input."""
        if self.op == "local_response_norm":
            return "none"
        default = "relu" if self.op.endswith("relu") else "none"
        return self.options.get(self._activation_argument, default)

    @property
    def _activation_argument(self) -> str:
        separable = self.op == "depthwise_separable_conv2d"
        return "pointwise_activation" if separable else "activation"

    @property
    def border(self) -> int | None:
        """How many rows and columns of the output padding can reach."""
        if "conv2d" not in self.op:
            return None
        padding = self.options.get("padding", 0)
        return max(1, *padding) if isinstance(padding, tuple) else max(1, padding)


LAYERS = (
    Layer(
        "conv2d_relu",
        "AlexNet 11x11",
        {"input": (1, 3, 227, 227), "weight": (96, 3, 11, 11), "bias": (96,)},
        {"stride": 4},
    ),
    Layer(
        "conv2d_relu",
        "AlexNet 5x5, 2 groups",
        {"input": (1, 96, 27, 27), "weight": (256, 48, 5, 5), "bias": (256,)},
        {"padding": 2, "groups": 2},
    ),
    Layer(
        "conv2d_relu",
        "ResNet-50 stem 7x7",
        {"input": (1, 3, 224, 224), "weight": (64, 3, 7, 7), "bias": (64,)},
        {"stride": 2, "padding": 3},
    ),
    Layer(
        "conv2d_relu",
        "ResNet-50 layer3 3x3",
        {"input": (1, 256, 14, 14), "weight": (256, 256, 3, 3), "bias": (256,)},
        {"padding": 1},
    ),
    Layer(
        "conv2d_relu",
        "GoogLeNet 4e 5x5",
        {"input": (2, 32, 14, 14), "weight": (128, 32, 5, 5), "bias": (128,)},
        {"padding": 2},
    ),
    Layer(
        "conv2d_add_relu",
        "ResNet-18 layer2 3x3",
        {
            "input": (1, 128, 28, 28),
            "weight": (128, 128, 3, 3),
            "bias": (128,),
            "residual": (1, 128, 28, 28),
        },
        {"padding": 1},
    ),
    Layer(
        "pointwise_conv2d",
        "ResNet-50 layer1 expand",
        {
            "input": (1, 64, 56, 56),
            "weight": (256, 64, 1, 1),
            "bias": (256,),
            "residual": (1, 256, 56, 56),
        },
        {"activation": "relu"},
    ),
    Layer(
        "pointwise_conv2d",
        "ResNet-50 layer3 shortcut",
        {"input": (1, 512, 28, 28), "weight": (1024, 512, 1, 1), "bias": (1024,)},
        {"stride": 2},
    ),
    Layer(
        "pointwise_conv2d",
        "MobileNet-v2 expand",
        {"input": (1, 24, 56, 56), "weight": (144, 24, 1, 1), "bias": (144,)},
        {"activation": "relu6"},
    ),
    Layer(
        "pointwise_conv2d_group",
        "GoogLeNet 3a 1x1s",
        {
            "input": (1, 192, 28, 28),
            "weights": [(64, 192, 1, 1), (96, 192, 1, 1), (16, 192, 1, 1)],
            "biases": [(64,), (96,), (16,)],
        },
        {"activation": "relu"},
    ),
    Layer(
        "depthwise_conv2d",
        "MobileNet-v2 3x3 stride 2",
        {"input": (1, 144, 56, 56), "weight": (144, 1, 3, 3), "bias": (144,)},
        {"stride": 2, "padding": 1, "activation": "relu6"},
    ),
    Layer(
        "depthwise_conv2d",
        "Xception middle 3x3",
        {"input": (1, 728, 19, 19), "weight": (728, 1, 3, 3)},
        {"padding": 1},
    ),
    Layer(
        "depthwise_separable_conv2d",
        "Xception middle",
        {
            "input": (1, 728, 19, 19),
            "depthwise_weight": (728, 1, 3, 3),
            "pointwise_weight": (728, 728, 1, 1),
            "pointwise_bias": (728,),
        },
        {"padding": 1},
    ),
    Layer(
        "depthwise_separable_conv2d",
        "MobileNet-v1 stride 2",
        {
            "input": (1, 256, 28, 28),
            "depthwise_weight": (256, 1, 3, 3),
            "pointwise_weight": (512, 256, 1, 1),
            "depthwise_bias": (256,),
            "pointwise_bias": (512,),
        },
        {
            "stride": 2,
            "padding": 1,
            "depthwise_activation": "relu",
            "pointwise_activation": "relu",
        },
    ),
    Layer(
        "add_relu",
        "ResNet-50 layer1",
        {"input": (1, 256, 56, 56), "other": (1, 256, 56, 56)},
    ),
    Layer(
        "local_response_norm",
        "AlexNet norm1",
        {"input": (1, 96, 55, 55)},
        {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0, "activation": "relu"},
    ),
    Layer(
        "local_response_norm",
        "GoogLeNet norm2",
        {"input": (1, 192, 56, 56)},
        {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0},
    ),
)


@dataclass(frozen=True)
class Comparison:
    """One tensor judged: an output, or the gradient of an argument."""

    tensor: str
    layout: str
    verdict: Verdict


def comparisons(
    layer: Layer, dtype: torch.dtype, layout: str, device: torch.device, backend: str
) -> tuple[list[Comparison], list[Comparison]]:
    """The layer's outputs and its gradients, each against float64 on the CPU."""
    arguments = layer.arguments(dtype, LAYOUTS[layout], device)
    exact = mapped(arguments, lambda tensor: tensor.cpu().double())
    grads = [(gate * torch.randn(gate.shape)).to(device, dtype) for gate in gates(layer, exact, dtype)]

    with poisoned_outputs():
        outputs, gradients = _forward_backward(layer, arguments, grads, backend)
    baselines = _forward_backward(layer, arguments, grads, "reference")
    oracles = _forward_backward(layer, exact, [g.cpu().double() for g in grads], "reference")

    def judge(found: dict[str, Tensor], which: int, border: int | None) -> list[Comparison]:
        return [
            Comparison(
                name,
                layout,
                compare(
                    tensor,
                    oracles[which][name],
                    baselines[which][name],
                    border=border if tensor.dim() == 4 and min(tensor.shape[-2:]) > 1 else None,
                ),
            )
            for name, tensor in found.items()
        ]

    return judge(outputs, 0, layer.border), judge(gradients, 1, layer.border)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", type=torch.device, help="default: cpu")
    parser.add_argument("--backend", default="auto", choices=backends.names(), help="default: auto")
    parser.add_argument(
        "--op",
        action="append",
        choices=ops.__all__,
        metavar="OP",
        help="only this op (repeatable): " + ", ".join(ops.__all__),
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this (repeatable)")
    parser.add_argument("--seed", type=int, default=0, help="of the random tensors; default: 0")


def run(args: argparse.Namespace) -> int:
    """Prints one line per layer, dtype and pass; 1 if any comparison failed."""
    try:
        backend = backends.choose(args.backend, torch.empty(0, device=args.device))
    except (RuntimeError, AssertionError) as problem:  # AssertionError: torch without CUDA
        print(problem)
        return 2
    if args.device.type == "cuda":
        # The policy's bounds are those of true float32.
        torch.backends.cudnn.allow_tf32 = False
    print(
        f"torch {torch.__version__}, {args.device}, backend {backend}, seed {args.seed}\n"
        "largest error / largest value, against float64, of fastconv and of torch in the same\n"
        "dtype; of both layouts and all tensors, the one that uses most of its bound\n"
    )
    print(_HEADER)
    failures: list[str] = []
    for layer in LAYERS:
        if args.op and layer.op not in args.op:
            continue
        print(f"{layer.op}: {layer.name}")
        for name in args.dtype or DTYPES:
            torch.manual_seed(args.seed)
            both = [comparisons(layer, DTYPES[name], layout, args.device, backend) for layout in LAYOUTS]
            for found in zip(*both, strict=True):  # the outputs, then the gradients
                flat = [comparison for part in found for comparison in part]
                print(_row(name, max(flat, key=lambda c: c.verdict.used)), flush=True)
                failures += [
                    f"{layer.op}, {layer.name}, {name}, {c.layout}, {c.tensor}: {c.verdict}"
                    for c in flat
                    if not c.verdict.ok
                ]
    print(*(f"\nFAILED {failure}" for failure in failures), sep="")
    print(f"{len(failures)} comparisons failed" if failures else "all within the policy's bounds")
    return 1 if failures else 0


_HEADER = (
    f"  {'dtype':<7}{'tensor':<23}{'layout':<15}{'border':<20}{'interior':<20}{'used':>5}\n"
    f"  {'':<45}{'fastconv  torch':<20}{'fastconv  torch':<20}"
)


def _row(dtype: str, worst: Comparison) -> str:
    cells = {"border": "-", "interior": "-"}
    for region in worst.verdict.regions:
        scale = worst.verdict.scale or 1.0
        name = "interior" if region.name == "all" else region.name
        cells[name] = f"{region.error / scale:<8.1e}  {region.baseline_error / scale:<8.1e}"
    return (
        f"  {dtype:<7}{worst.tensor:<23}{worst.layout:<15}"
        f"{cells['border']:<20}{cells['interior']:<20}{worst.verdict.used:>5.0%}"
        f"  {'ok' if worst.verdict.ok else 'FAILED'}"
    )


def _forward_backward(
    layer: Layer, arguments: dict[str, Any], grads: list[Tensor], backend: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of all tensor arguments, by name."""
    arguments = mapped(arguments, lambda tensor: tensor.detach().requires_grad_())
    inputs = dict(named(arguments))
    outputs = layer(arguments, backend)
    gradients = torch.autograd.grad(outputs, list(inputs.values()), grads)
    return (
        dict(named({"output": outputs[0] if len(outputs) == 1 else outputs})),
        {f"grad {name}": grad for name, grad in zip(inputs, gradients, strict=True)},
    )


def gates(layer: Layer, exact: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Per output, 1 where its gradient does not hang on how a ReLU's input was rounded."""
    residual = exact.get("residual")
    rounds = residual is not None or "depthwise_weight" in exact

    def rounded(value: Tensor) -> float:
        """The size of the convolution before its residual, or of what the hidden result's rounding moves."""
        return float(value.abs().max() + (0 if residual is None else residual.abs().max())) if rounds else 0.0

    gates = [away_from_kinks(value, layer.activation, dtype, rounded(value)) for value in layer.preactivations(exact)]
    if "depthwise_activation" in layer.options:
        hidden = ops.depthwise_conv2d(
            exact["input"],
            exact["depthwise_weight"],
            exact["depthwise_bias"],
            layer.options["stride"],
            layer.options["padding"],
            backend="reference",
        )
        away = away_from_kinks(hidden, layer.options["depthwise_activation"], dtype)
        gates = [gate & away.all(dim=1, keepdim=True) for gate in gates]
    return gates


def mapped(arguments: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with the function applied to every tensor, lists included."""
    return {
        name: [function(v) for v in value] if isinstance(value, list) else function(value)
        for name, value in arguments.items()
    }


def named(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name; one of a list also has its index."""
    for name, value in arguments.items():
        if isinstance(value, list):
            yield from ((f"{name}[{i}]", tensor) for i, tensor in enumerate(value))
        else:
            yield name, value
