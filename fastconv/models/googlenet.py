"""GoogLeNet: Szegedy et al. 2014, "Going Deeper with Convolutions"."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastconv.models._init import kaiming_
from fastconv.models.registry import register

__all__ = ["GoogLeNet", "GoogLeNetOutput", "googlenet"]


class GoogLeNetOutput(NamedTuple):
    """What GoogLeNet returns in training: class scores of the network and of both side branches."""

    logits: Tensor
    aux1: Tensor
    aux2: Tensor


class ConvReLU(nn.Sequential):
    """Convolution with bias, then ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding),
            nn.ReLU(inplace=True),
        )


class Inception(nn.Module):
    """Inception module (figure 2b): 1x1, 3x3, 5x5 and pooling branches side by side.

    The arguments are a row of table 1.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        reduce3x3: int,
        conv3x3: int,
        reduce5x5: int,
        conv5x5: int,
        pool_proj: int,
    ) -> None:
        super().__init__()
        self.branch1 = ConvReLU(in_channels, conv1x1, 1)
        self.branch2 = nn.Sequential(ConvReLU(in_channels, reduce3x3, 1), ConvReLU(reduce3x3, conv3x3, 3, padding=1))
        self.branch3 = nn.Sequential(ConvReLU(in_channels, reduce5x5, 1), ConvReLU(reduce5x5, conv5x5, 5, padding=2))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1), ConvReLU(in_channels, pool_proj, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class AuxiliaryClassifier(nn.Module):
    """The classifier of section 5 that brings gradient to the middle of the network."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(kernel_size=5, stride=3)
        self.conv = ConvReLU(in_channels, 128, 1)
        self.classifier = nn.Sequential(
            nn.Linear(128 * 4 * 4, 1024),
            nn.ReLU(inplace=True),
            nn.Dropout(0.7),
            nn.Linear(1024, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.conv(self.pool(x)), 1))


class GoogLeNet(nn.Module):
    """The network of the 2014 paper: biases and LRN, no batch norm; 6,998,552 parameters.

    Both auxiliary classifiers come on top (6,379,728 parameters); they run only in training, where
    the output is a `GoogLeNetOutput` instead of a tensor. torchvision's ``googlenet`` differs: it
    has batch norm, no LRN, and 3x3 filters in place of the 5x5.

    Input ``[N, 3, 224, 224]``.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvReLU(3, 64, 7, stride=2, padding=3),
            # Rounding up gives the map sizes of table 1: 56, 28, 14, 7.
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
            ConvReLU(64, 64, 1),
            ConvReLU(64, 192, 3, padding=1),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        )
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        self.aux1 = AuxiliaryClassifier(512, num_classes)
        self.aux2 = AuxiliaryClassifier(528, num_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutput:
        x = self.inception3b(self.inception3a(self.stem(x)))
        x4a = self.inception4a(self.maxpool3(x))
        x4d = self.inception4d(self.inception4c(self.inception4b(x4a)))
        x = self.inception4e(x4d)
        x = self.inception5b(self.inception5a(self.maxpool4(x)))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        if self.training:
            return GoogLeNetOutput(logits, self.aux1(x4a), self.aux2(x4d))
        return logits


@register("GoogLeNet", published="2014-09-17", image=(3, 224, 224))
def googlenet(num_classes: int = 1000, dropout: float = 0.4) -> GoogLeNet:
    """GoogLeNet as published in 2014, see `GoogLeNet`."""
    return GoogLeNet(num_classes, dropout)
