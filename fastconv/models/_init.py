"""Weight initialisation shared by the reference networks."""

from torch import nn


def kaiming_(model: nn.Module) -> None:
    """He initialisation, which keeps activations at scale through any depth without training.

    He et al. 2015, "Delving Deep into Rectifiers", eq. 10. A depthwise convolution feeds its
    pointwise one without a ReLU, so it takes the gain of a linear layer.
    """
    for module in model.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if depthwise else "relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
