"""Xception: Chollet 2016, "Xception: Deep Learning with Depthwise Separable Convolutions"."""

import torch
from torch import Tensor, nn

from fastconv.models._init import kaiming_
from fastconv.models.registry import register

__all__ = ["Xception", "xception"]


class SeparableConv(nn.Module):
    """Depthwise 3x3, then pointwise 1x1, then batch norm; nothing between the two (section 4.7)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(x)))


class DownBlock(nn.Module):
    """Two separable convolutions and a pool of stride 2, around a 1x1 convolution of stride 2."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, relu_first: bool = True) -> None:
        super().__init__()
        # Not in place: the shortcut reads the same input.
        self.relu_in = nn.ReLU() if relu_first else nn.Identity()
        self.conv1 = SeparableConv(in_channels, channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = SeparableConv(channels, out_channels)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=2, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.conv1(self.relu_in(x))))
        return self.pool(y) + self.shortcut(x)


class MiddleBlock(nn.Module):
    """Three times ReLU and separable convolution, around the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),  # not in place: the identity reads the same input
            SeparableConv(channels, channels),
            nn.ReLU(inplace=True),
            SeparableConv(channels, channels),
            nn.ReLU(inplace=True),
            SeparableConv(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class Xception(nn.Module):
    """The network of figure 5: entry flow, eight middle blocks, exit flow; 22,855,952 parameters.

    Input ``[N, 3, 299, 299]``.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.entry = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, kernel_size=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            DownBlock(64, 128, 128, relu_first=False),
            DownBlock(128, 256, 256),
            DownBlock(256, 728, 728),
        )
        self.middle = nn.Sequential(*(MiddleBlock(728) for _ in range(8)))
        self.exit = nn.Sequential(
            DownBlock(728, 728, 1024),
            SeparableConv(1024, 1536),
            nn.ReLU(inplace=True),
            SeparableConv(1536, 2048),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Linear(2048, num_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.exit(self.middle(self.entry(x)))
        return self.fc(torch.flatten(x, 1))


@register("Xception", published="2016-10-07", image=(3, 299, 299))
def xception(num_classes: int = 1000) -> Xception:
    """Xception, see `Xception`."""
    return Xception(num_classes)
