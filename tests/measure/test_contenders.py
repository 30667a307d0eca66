"""What eager networks need to take part."""

import pytest
import torch
from torch import nn

from fastconv.measure.contenders import CONTIGUOUS, prepare


def test_lrn_in_16_bits_has_a_baseline():
    """aten has no such kernel on the CPU."""
    model = nn.Sequential(nn.LocalResponseNorm(5)).bfloat16()
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="not implemented"):
        model(x)
    expected = nn.LocalResponseNorm(5)(x.float()).bfloat16()
    torch.testing.assert_close(prepare(CONTIGUOUS, model)(x), expected, rtol=0, atol=0)
