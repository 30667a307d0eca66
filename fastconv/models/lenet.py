"""LeNet-5: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition"."""

import torch
from torch import Tensor, nn

from fastconv.models._init import kaiming_
from fastconv.models.registry import register

__all__ = ["LeNet5", "lenet5"]


class LeNet5(nn.Module):
    """LeNet-5 in its common teaching form; 61,706 parameters.

    As in the paper: the sizes of all layers and the 2x2 averaging. Simplified, as is usual: ReLU
    for the scaled tanh, no trainable coefficients in the subsampling, every map of C3 sees every
    map of S2, and a linear output layer for the radial basis functions.

    Input ``[N, in_channels, 32, 32]``, or 28x28 with ``image_size=28``, where the first
    convolution pads by the two pixels that the paper's larger images bring along.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 32) -> None:
        super().__init__()
        if image_size not in (28, 32):
            raise ValueError(f"LeNet5: image_size is {image_size}, it must be 28 or 32")
        padding = (32 - image_size) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel_size=5, padding=padding),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(inplace=True),
            nn.Linear(120, 84),
            nn.ReLU(inplace=True),
            nn.Linear(84, num_classes),
        )
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@register("LeNet-5", published="1998-11", image=(1, 32, 32))
def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 32) -> LeNet5:
    """LeNet-5 for images of 32x32 (or 28x28) pixels, see `LeNet5`."""
    return LeNet5(num_classes, in_channels, image_size)
