"""Reference networks in plain torch.nn, written from the papers: the "before" of every comparison.

No fastconv operator is used here. Weights are random (He initialisation), reproducible with
``torch.manual_seed``. A new network is a file whose builder is registered, and a line here.

>>> model = fastconv.models.build("resnet50", num_classes=10)
>>> model(torch.randn(fastconv.models.input_shape("resnet50", batch=4))).shape
torch.Size([4, 10])
"""

# ruff: noqa: F403 (each file says in its __all__ what is public)

from fastconv.models.alexnet import *
from fastconv.models.googlenet import *
from fastconv.models.lenet import *
from fastconv.models.registry import *
from fastconv.models.resnet import *
from fastconv.models.vgg import *
from fastconv.models.xception import *

__all__ = sorted(name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__))
