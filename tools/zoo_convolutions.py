"""The convolutions of some networks, as the table of expected times has them.

python tools/zoo_convolutions.py    writes benchmarks/expected/convolutions.json; needs torchvision
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/expected/convolutions.json"
NETWORKS = (
    "alexnet2012",
    "vgg16",
    "googlenet",
    "torchvision:inception_v3",
    "resnet50",
    "torchvision:mobilenet_v2",
)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """Of an image [channels, *image] by [filters, channels / groups, *kernel]."""

    channels: int
    image: Pair
    filters: int
    kernel: Pair
    stride: Pair
    padding: Pair
    groups: int
    relu: bool  # whether a ReLU follows at once, through which the gradient comes back; else a batch norm

    def __str__(self) -> str:
        def of(pair: Pair) -> str:
            return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"

        text = f"{self.channels}x{of(self.image)} k{self.filters} {self.kernel[0]}x{self.kernel[1]}"
        text += f" s{of(self.stride)}" if self.stride != (1, 1) else ""
        text += f" g{self.groups}" if self.groups > 1 else ""
        text += "" if self.is_same else f" p{of(self.padding)}"
        return text + (" relu" if self.relu else "")

    @property
    def is_same(self) -> bool:
        """Whether the padding is the usual one, half of the filter."""
        return self.padding == (self.kernel[0] // 2, self.kernel[1] // 2)

    @property
    def output(self) -> Pair:
        sizes = zip(self.image, self.kernel, self.stride, self.padding, strict=True)
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        return height, width

    @property
    def is_depthwise(self) -> bool:
        return 1 < self.groups == self.channels

    @property
    def weights(self) -> int:
        return self.filters * self.channels // self.groups * self.kernel[0] * self.kernel[1]

    def flop(self, batch: int) -> int:
        return 2 * batch * self.output[0] * self.output[1] * self.weights

    def results(self, direction: str, batch: int) -> int:
        """Elements of what a pass computes: output, gradient of the image, gradient of the weight."""
        if direction == "wgrad":
            return self.weights
        channels, (height, width) = (self.filters, self.output) if direction == "fprop" else (self.channels, self.image)
        return batch * channels * height * width

    def bytes(self, direction: str, batch: int) -> int:
        """Of 16-bit elements, each tensor once; the gradient before a ReLU takes the ReLU's output, too."""
        masked = self.relu and direction != "fprop"
        output = self.results("fprop", batch) * (2 if masked else 1)
        return 2 * (self.results("dgrad", batch) + self.weights + output)


def load() -> dict[str, dict[Convolution, int]]:
    """How often each network has each convolution, in the order of the network."""

    def convolution(values: list[object]) -> Convolution:
        return Convolution(*(tuple(value) if isinstance(value, list) else value for value in values))  # type: ignore[arg-type]

    return {
        network: {convolution(values): count for count, *values in rows}
        for network, rows in json.loads(FILE.read_text())["networks"].items()
    }


def convolutions(network: str) -> dict[Convolution, int]:
    """Those that the network calls in evaluation, of images of the size that it was made for."""
    from fastconv.measure import networks

    with torch.device("meta"):
        model, shape = networks.build(network)
        image = torch.empty(1, *shape)
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    found: Counter[Convolution] = Counter()

    def note(module: nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        assert module.dilation == (1, 1)
        pairs = tuple(inputs[0].shape[2:]), module.kernel_size, module.stride, module.padding
        size, kernel, stride, padding = cast(list[Pair], pairs)
        channels, filters, groups = module.in_channels, module.out_channels, module.groups
        found[Convolution(channels, size, filters, kernel, stride, padding, groups, relu=not has_norm)] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(image)
    return found


def main() -> int:
    rows = []
    for network in NETWORKS:
        lines = [json.dumps([count, *astuple(conv)]) for conv, count in convolutions(network).items()]
        rows.append(f'"{network.rpartition(":")[2]}": [\n' + ",\n".join(lines) + "\n]")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text('{"networks": {\n' + ",\n".join(rows) + "\n}}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
