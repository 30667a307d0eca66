"""``python -m fastconv verify``: every op's error beside torch's own, against float64.

On layers of the networks, in every dtype and layout, forward and backward. What counts as right is
said in ``fastconv/measure/tolerance.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.calls import DTYPES, FORMATS, Layer, mapped, named_tensors
from fastconv.measure.layers import LAYERS
from fastconv.measure.tolerance import Verdict, compare, poisoned_outputs
from fastconv.operators import backends


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
    arguments = layer.tensors(dtype, layout, device)
    exact = mapped(arguments, lambda tensor: tensor.cpu().double())
    grads = [(gate * torch.randn(gate.shape)).to(device, dtype) for gate in layer.gates(exact, dtype)]

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
        if not layer.verified or (args.op and layer.op not in args.op):
            continue
        print(f"{layer.op}: {layer.name}")
        for name in args.dtype or DTYPES:
            torch.manual_seed(args.seed)
            both = [
                comparisons(layer.sized(layer.verified), DTYPES[name], layout, args.device, backend)
                for layout in FORMATS
            ]
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
    inputs = dict(named_tensors(arguments))
    outputs = layer(arguments, backend)
    gradients = torch.autograd.grad(outputs, list(inputs.values()), grads)
    return (
        dict(named_tensors({"output": outputs[0] if len(outputs) == 1 else outputs})),
        {f"grad {name}": grad for name, grad in zip(inputs, gradients, strict=True)},
    )
