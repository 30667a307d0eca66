"""fastconv.swap: what is fused, and what is not: additions, activations, pools, LRN, geometries."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.swapping import swap
from fastconv.swapping.explanation import explain
from support.swap_models import (
    JOINS,
    Block,
    ConvBN,
    agree,
    agree_in_training,
    features,
    image,
    inference_choices,
    seeded,
)

# ------------------------------------------------------------------------------------------------ what is fused


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_residual_blocks_are_fused(join):
    model = seeded(Block(join)).eval()
    fast = swap(model)
    assert inference_choices(fast)["second.0"] == "conv + bn + add + relu -> conv2d_add_relu"
    agree(fast, model, features())
    agree(fast, model, features().contiguous(memory_format=torch.channels_last))
    agree_in_training(model.train(), features())


def test_the_shortcut_of_a_block_may_be_a_convolution():
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = ConvBN(8, 8, 3, padding=1)
            self.down = ConvBN(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.main(x)
            shortcut = self.down(x)
            y += shortcut
            return F.relu(y, inplace=True)

    model = seeded(Down()).eval()
    fast = swap(model)
    assert inference_choices(fast) == {
        "main.0": "conv + bn -> conv2d",
        "down.0": "conv + bn + add + relu -> pointwise_conv2d",
    }
    agree(fast, model, features())
    agree_in_training(model.train(), features())


BROADCASTS = {
    "per channel": (1, 8, 1, 1),
    "per pixel": (12, 12),
    "larger batch": (6, 8, 12, 12),
}


@pytest.mark.parametrize("shape", BROADCASTS.values(), ids=BROADCASTS)
def test_broadcasting_additions_are_not_fused(shape):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.conv(x) + y)

    model = seeded(Net()).eval()
    x = image(*((1 if shape[0] == 6 else 2), 8, 12, 12))
    agree(swap(model), model, x, image(*shape, seed=2))
    agree_in_training(model, x, image(*shape, seed=2))


ADDITIONS = {
    "alpha": lambda x, y: torch.add(x, y, alpha=2),
    "scalar": lambda x, y: x + 1,
    "itself": lambda x, y: x + x,
}


@pytest.mark.parametrize("join", ADDITIONS.values(), ids=ADDITIONS)
def test_other_additions(join):
    model = seeded(Block(join)).eval()
    agree(swap(model), model, features())


ACTIVATIONS = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU inplace": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.Hardtanh(0, 6)": (nn.Hardtanh(0, 6, inplace=True), "relu6"),
    "F.relu": (F.relu, "relu"),
    "F.relu inplace": (lambda x: F.relu(x, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "x.relu()": (lambda x: x.relu(), "relu"),
    "x.relu_()": (lambda x: x.relu_(), "relu"),
    "F.relu6": (lambda x: F.relu6(x, True), "relu6"),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6), "relu6"),
    "nn.Hardtanh": (nn.Hardtanh(), None),
    "F.hardtanh(-1, 1)": (F.hardtanh, None),
    "nn.GELU": (nn.GELU(), None),
    "clamp": (lambda x: x.clamp(min=0), None),
}


@pytest.mark.parametrize(("activation", "fused"), ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("bn", [False, True], ids=["conv", "conv-bn"])
def test_activations(activation, fused, bn):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBN(3, 6, 3, bias=False) if bn else nn.Conv2d(3, 6, 3)
            if isinstance(activation, nn.Module):
                self.act = copy.deepcopy(activation)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, "act", activation)(self.conv(x))

    model = seeded(Net()).eval()
    fast = swap(model)
    (choice,) = inference_choices(fast).values()
    pattern = " + ".join(["conv", *["bn"] * bn, *([fused] if fused else [])])
    assert choice.startswith(f"{pattern} -> ")
    agree(fast, model, image() * 4)
    agree_in_training(model.train(), image() * 4)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("overwrite", [lambda y: y.mul_(2), torch.relu_, None], ids=["mul_", "relu_", "by the caller"])
def test_overwriting_a_relu6(inplace, overwrite):
    """In eager its gradient comes from its input, and survives."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 6, 3), nn.ReLU6(inplace)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.conv(x))
            return y if overwrite is None else overwrite(y)

    model = seeded(Net()).eval()
    grads = []
    for net in (model, swap(model)):
        x = (image() * 4).requires_grad_()
        output = net(x)
        (output if overwrite else output.mul_(2)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


POOLS = {
    "module": (nn.MaxPool2d(3, 2, 1), True),
    "dilated": (nn.MaxPool2d(2, dilation=2, ceil_mode=True), True),
    "function": (lambda y: F.max_pool2d(y, 3, stride=1), True),
    "keywords": (lambda y: F.max_pool2d(input=y, kernel_size=3), True),
    "with indices": (lambda y: F.max_pool2d(y, 3, return_indices=True)[0], False),
    "average": (nn.AvgPool2d(2), False),
    "read twice": (lambda y: F.max_pool2d(y, 2) + y.mean(), False),
}


@pytest.mark.parametrize(("pool", "fused"), POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("activation", [F.relu, F.relu6])
def test_max_pools(pool, fused, activation):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBN(3, 6, 3, bias=False)
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(activation(self.conv(x)))

    model = seeded(Net()).eval()
    fast = swap(model)
    (choice,) = inference_choices(fast).values()
    assert (" + max_pool -> " in choice) == fused
    x = image() * 4
    agree(fast, model, x)
    agree_in_training(model, x)
    x[0, 1, 5, 6], x[1, 1, 5, 6] = float("nan"), float("inf")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_local_response_norm():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lrn = nn.LocalResponseNorm(5, alpha=0.1, beta=0.6, k=2.0)

        def forward(self, x: Tensor) -> Tensor:
            return F.local_response_norm(self.lrn(x), 3, 0.2, k=1.5)

    model = Net().eval()
    fast = swap(model)
    assert [row.inference.op for row in explain(fast).rows] == ["local_response_norm"] * 2
    agree(fast, model, features())
    agree_in_training(model, features())
    fast.lrn.k = model.lrn.k = 3.0
    agree(fast, model, features())


LRNS = {
    "ReLU in place": (lambda y: F.local_response_norm(F.relu(y, inplace=True), 3, 0.4), "relu + lrn"),
    "ReLU6": (lambda y: F.local_response_norm(F.relu6(y), size=3, alpha=0.4, k=2.0), "relu6 + lrn"),
    "the input by name": (lambda y: F.local_response_norm(input=y.relu(), size=3), "relu + lrn"),
    "another activation": (lambda y: F.local_response_norm(F.gelu(y), 3, 0.4), "lrn"),
    "read before": (lambda y: F.local_response_norm(F.relu(y), 3, 0.4) + y, "lrn"),
    "read between": (lambda y: F.local_response_norm(z := F.relu(y), 3, 0.4) + z, "lrn"),
    "a view of what is read": (lambda y: F.local_response_norm(y.flatten(2).relu_(), 3).mean() + y, "lrn"),
}


@pytest.mark.parametrize(("norm", "pattern"), LRNS.values(), ids=LRNS)
def test_activations_before_lrn(norm, pattern):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBN(3, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return norm(self.conv(x))

    model = seeded(Net()).eval()
    fast = swap(model)
    choices = [str(row.inference) for row in explain(fast).rows if "lrn" in row.inference.pattern]
    assert choices == [f"{pattern} -> local_response_norm"]
    agree(fast, model, image() * 4)
    agree_in_training(model, image() * 4)
    agree_in_training(model.train(), image() * 4)


def test_an_activation_that_overwrites_the_callers_tensor():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.local_response_norm(F.relu_(x), 3)

    x, y = image(), image()
    torch.testing.assert_close(swap(Net())(x), Net()(y))
    assert torch.equal(x, y)


GEOMETRIES = {
    "5x3": {"kernel_size": (5, 3), "stride": (2, 1), "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
    "multiplier": {"kernel_size": 3, "groups": 8, "out_channels": 16},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "padded 1x1": {"kernel_size": 1, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even filter": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
def test_geometries(options, bias):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBN(8, **{"out_channels": 8, **options}, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(y + y.detach().flip(0))

    class Residual(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.conv(x) + y)

    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(2, 8, 13, 11, layout=layout)
        model = seeded(Net()).eval()
        agree(swap(model), model, x)
        model = seeded(Residual()).eval()
        agree(swap(model), model, x, torch.randn_like(model.conv(x)))


@pytest.mark.parametrize(
    ("dtype", "filter", "groups", "settings", "width"),
    [
        (torch.bfloat16, (2, 2), 1, {"stride": (1, 2)}, 3),  # eager's is wrong
        (torch.bfloat16, (3, 3), 3, {"stride": (1, 3)}, 3),
        (torch.float16, (1, 1), 3, {"stride": (1, 2), "padding": 1, "dilation": 2}, 1),  # eager's ends the process
        (torch.bfloat16, (2, 2), 1, {"padding": (5, 1), "dilation": (10, 1)}, 3),
    ],
    ids=["bfloat16", "bfloat16 depthwise", "float16", "padding alone"],
)
@pytest.mark.parametrize("residual", [False, True], ids=["conv", "residual"])
def test_where_onednn_fails(dtype, filter, groups, settings, width, residual):
    """A single column of output with a stride; filters of one pixel that are dilated, or that meet padding alone."""
    conv = seeded(nn.Conv2d(3, 3, filter, groups=groups, **settings)).to(dtype).eval()
    wide = copy.deepcopy(conv).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, y):
            return torch.relu(self.conv(x) + y) if residual else torch.relu(self.conv(x))

    fast = swap(Net())
    for height in (5, 8, 64):
        x = torch.randn(2, 3, height, width).to(dtype)
        with torch.no_grad():
            y = torch.randn_like(wide(x.double())).to(dtype)
            expected = wide(x.double()) + y if residual else wide(x.double())
            for _ in range(2):
                torch.testing.assert_close(fast(x, y), expected.relu().to(dtype))
