"""Which precision torch's switches allow."""

from __future__ import annotations

import torch


def allow_tf32() -> bool:
    """Whether float32 convolutions may round their factors to TF32, by torch's switches for cuDNN."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
