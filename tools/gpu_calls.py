"""One call of each kernel that matters most, for `ncu --profile-from-start off python tools/gpu_calls.py`.

Profiling is on during these calls alone, each of which was made once before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from fastconv.measure.layers import LAYERS
from fastconv.operators import backends

FORWARD = (
    "conv2d_relu-resnet50/layer3.1.conv2",
    "pointwise_conv2d-resnet50/layer1.1.conv1",
    "depthwise_conv2d-mobilenet_v2/features.3.conv.1.0",
    "depthwise_separable_conv2d-xception/middle.0.body.1",
    "local_response_norm-alexnet2012/features.2",
)
BACKWARD = ("conv2d_relu-resnet50/layer3.1.conv2",)


def calls(backend: str, device: torch.device, batch: int) -> dict[str, Callable[[], Any]]:
    """By name; in float16 and channels_last, as networks make them."""
    layers = {str(layer): layer.sized(batch) for layer in LAYERS}
    found: dict[str, Callable[[], Any]] = {}
    for name in FORWARD:
        layer, tensors = layers[name], layers[name].tensors(torch.float16, "channels_last", device)
        found[name] = lambda layer=layer, tensors=tensors: layer(tensors, backend)
    for name in BACKWARD:
        layer, tensors = layers[name], layers[name].tensors(torch.float16, "channels_last", device)
        leaves = [tensors["input"].requires_grad_(), tensors["weight"].requires_grad_()]
        (output,) = layer(tensors, backend)
        grad = torch.randn_like(output)
        found[f"backward of {name}"] = lambda output=output, leaves=leaves, grad=grad: torch.autograd.grad(
            output, leaves, grad, retain_graph=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=backends.names(), help="default: cuda")
    parser.add_argument("--device", default="cuda", type=torch.device, help="default: cuda")
    parser.add_argument("--batch", default=32, type=int, help="default: 32")
    args = parser.parse_args()
    for name, call in calls(args.backend, args.device, args.batch).items():
        print(f"== {name}", flush=True)
        call()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
