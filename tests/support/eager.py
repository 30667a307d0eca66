"""The ops as users of torch write them: the eager code that each op stands for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.swapping.calls.onednn import compute_dtype


def activate(value: Tensor, name: str) -> Tensor:
    """The activation of this name, as the ops take it."""
    return {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[name](value)


def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether eager's convolutions of this type are oneDNN's on this processor, and not aten's own."""
    return compute_dtype(dtype) == dtype


def eager(op: str, a: dict[str, Any]) -> list[Tensor]:
    """The call as a user of torch would write it; options that are not given have the op's defaults."""
    parameters = inspect.signature(getattr(ops, op)).parameters.values()
    a = {p.name: p.default for p in parameters if p.default is not p.empty} | a
    if op == "add_relu":
        return [activate(a["input"] + a["other"], a["activation"])]
    if op == "local_response_norm":
        value, dtype = activate(a["input"], a["activation"]), a["input"].dtype
        autocasts = torch.is_autocast_enabled(a["input"].device.type)
        wide = value.float() if dtype in (torch.bfloat16, torch.float16) else value  # torch has none on the CPU
        options = [a[name] for name in ("size", "alpha", "beta", "k")]
        if wide.dim() > 4 and wide.stride(-2) != wide.shape[-1] * wide.stride(-1):  # eager's view would raise
            dtype = torch.float32 if autocasts and dtype != torch.float64 else dtype
            return [torch.empty_like(a["input"], dtype=dtype).copy_(F.local_response_norm(wide.contiguous(), *options))]
        normed = F.local_response_norm(wide, *options)
        return [normed if autocasts else normed.to(dtype)]
    if op == "pointwise_conv2d_group":
        biases = a["biases"] or [None] * len(a["weights"])
        return [
            activate(F.conv2d(a["input"], w, b), a["activation"]) for w, b in zip(a["weights"], biases, strict=True)
        ]
    geometry = [a.get("stride", 1), a.get("padding", 0), a.get("dilation", 1)]
    if op == "depthwise_separable_conv2d":
        channels = a["input"].shape[-3]
        hidden = F.conv2d(a["input"], a["depthwise_weight"], a["depthwise_bias"], *geometry, channels)
        hidden = activate(hidden, a["depthwise_activation"])
        return [activate(F.conv2d(hidden, a["pointwise_weight"], a["pointwise_bias"]), a["pointwise_activation"])]
    groups = a["input"].shape[-3] if op == "depthwise_conv2d" else a.get("groups", 1)
    result = F.conv2d(a["input"], a["weight"], a.get("bias"), *geometry, groups)
    if a.get("residual") is not None:
        result = result + a["residual"]
    return [activate(result, a["activation"])]
