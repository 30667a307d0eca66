"""AlexNet: Krizhevsky, Sutskever, Hinton 2012, "ImageNet Classification with Deep Convolutional
Neural Networks"."""

import torch
from torch import Tensor, nn

from fastconv.models._init import kaiming_
from fastconv.models.registry import register

__all__ = ["AlexNet2012", "alexnet2012"]


class AlexNet2012(nn.Module):
    """The network of the 2012 paper, its two GPUs as two groups; 60,965,224 parameters.

    Unlike torchvision's ``alexnet`` (the one-column network of 2014) it has 96 filters first,
    groups in layers 2, 4 and 5, and local response normalisation. Pooling overlaps (3x3, stride 2).

    Input ``[N, 3, 227, 227]``: the paper says 224, which does not give its own 55x55 maps.
    Initialised after He et al.; the paper's N(0, 0.01) with unit biases needs training before the
    output depends visibly on the image.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=11, stride=4),
            nn.ReLU(inplace=True),
            # torch divides alpha by size, as the authors' cuda-convnet did.
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@register("AlexNet 2012", published="2012-12", image=(3, 227, 227))
def alexnet2012(num_classes: int = 1000, dropout: float = 0.5) -> AlexNet2012:
    """AlexNet as published in 2012, see `AlexNet2012`."""
    return AlexNet2012(num_classes, dropout)
