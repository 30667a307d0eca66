"""VGG: Simonyan, Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image
Recognition"."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastconv.models._init import kaiming_
from fastconv.models.registry import register

__all__ = ["VGG", "vgg16"]


class VGG(nn.Module):
    """Stages of 3x3 convolutions with ReLU, a 2x2 max pool after each, three linear layers.

    Input ``[N, 3, 224, 224]``. Parameters are named as in torchvision, whose weights load.

    Args:
        stages: The output channels of every convolution, one sequence per stage (table 1).
    """

    def __init__(self, stages: Sequence[Sequence[int]], num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in stages:
            for out_channels in stage:
                layers += [
                    nn.Conv2d(channels, out_channels, kernel_size=3, padding=1),
                    nn.ReLU(inplace=True),
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@register("VGG-16", published="2014-09-04", image=(3, 224, 224))
def vgg16(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-16, configuration D of table 1, see `VGG`; 138,357,544 parameters."""
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    return VGG(stages, num_classes, dropout)
