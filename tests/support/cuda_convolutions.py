"""One convolution for the CUDA kernels: its tensors, and what the kernels must find, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle
from support.cases import Concatenation
from support.cuda_kernels import operators, through_mask
from support.eager import activate
from support.kernel_backends import as_tf32, device_of

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
PASSES = ("fprop", "dgrad", "wgrad")


def reduced(name: str) -> str:
    """The type whose parts of a split depth are added: TF32 is rounded on the way in alone."""
    return "fp32" if name == "tf32" else name


@dataclass
class Convolution:
    """Tensors of one convolution on a device, with what the kernels must find, in float64."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    output: Tensor  # of a forward, for the mask
    geometry: tuple[list[int], list[int], list[int], int]
    activation: str
    tf32: bool

    def rounded(self, tensor: Tensor) -> Tensor:
        """As the tensor cores read it."""
        return as_tf32(tensor) if self.tf32 else tensor

    def forward(self, dtype: torch.dtype) -> Tensor:
        input, weight = (self.rounded(t).to(dtype) for t in (self.input, self.weight))
        value = F.conv2d(input, weight, self.bias.to(dtype), *self.geometry)
        return activate(value, self.activation)

    def backward(self, dtype: torch.dtype) -> list[Tensor]:
        grad = through_mask(self.grad, self.output, self.activation)
        stride, padding, dilation, groups = self.geometry
        factors = (self.rounded(t).to(dtype) for t in (grad, self.input, self.weight))
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            *factors, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
        )
        return [grad_input, grad_weight, grad.to(dtype).sum((0, 2, 3))]


def convolution(
    backend: str,
    name: str,
    shape: tuple[int, ...],
    filters: tuple[int, ...],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str = "none",
    layout: torch.memory_format = torch.channels_last,
) -> Convolution:
    generator = torch.Generator().manual_seed(0)
    device, dtype = device_of(backend), FORMATS[name]

    def tensor(*size: int, scale: float = 1.0) -> Tensor:
        value = (scale * torch.randn(size, generator=generator)).to(device, dtype)
        return value.contiguous(memory_format=layout) if value.dim() == 4 else value

    weight = tensor(*filters, scale=1.4 / (filters[1] * filters[2] * filters[3]) ** 0.5)
    geometry = [stride] * 2, [padding] * 2, [dilation] * 2, groups
    input, bias = tensor(*shape), tensor(filters[0])
    size = F.conv2d(input.to("meta"), weight.to("meta"), None, *geometry).shape
    output = 3 * tensor(*size)
    return Convolution(input, weight, bias, tensor(*size), output, geometry, activation, name == "tf32")


def check(backend: str, conv: Convolution, passes: tuple[str, ...] = PASSES) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    dtype = conv.input.dtype
    if "fprop" in passes:
        found = ops.conv2d_relu(conv.input, conv.weight, conv.bias, *conv.geometry, activation=conv.activation)
        assert_close_to_oracle(found, conv.forward(torch.float64), conv.forward(dtype), what="fprop", border=1)
    mask = ["dgrad" in passes, "wgrad" in passes, "wgrad" in passes, False]
    if not any(mask):
        return
    output = None if conv.activation == "none" else conv.output
    found = operators(backend).conv2d_backward(
        conv.grad, output, conv.input, conv.weight, *conv.geometry, conv.activation, mask
    )
    expected = zip(conv.backward(torch.float64), conv.backward(dtype), strict=True)
    for what, gradient, wanted, (oracle, baseline) in zip(
        ("dgrad", "wgrad", "bias"), found[:3], mask[:3], expected, strict=True
    ):
        if wanted:
            assert_close_to_oracle(gradient, oracle, baseline, what=what)


def check_out_with_a_residual(conv: Convolution, activation: str, offset: int) -> None:
    """Into a slice of the channels of a wider tensor, the rest of which stays as it is; the residual is one, too."""
    inner = replace(conv, activation="none")
    joined = Concatenation.of([inner.forward(torch.float16)], offset, "channels_last", 8)
    residual = Concatenation.of([conv.grad], offset, "channels_last", 8).slices[0].copy_(conv.grad)
    found = ops.conv2d_add_relu(
        conv.input, conv.weight, conv.bias, residual, *conv.geometry, activation=activation, out=joined.slices[0]
    )
    assert found is joined.slices[0]
    joined.check_the_rest()
    oracle, baseline = (
        activate(inner.forward(dtype) + conv.grad.to(dtype), activation) for dtype in (torch.float64, torch.float16)
    )
    assert_close_to_oracle(found, oracle, baseline, what="out", border=1)


def check_slices(backend: str, side: int) -> None:
    """Of channels, of images, and of images' rows and columns are read in place: all that has a pitch, and what has
    none; of single rows and columns, whose stride says nothing."""
    device = device_of(backend)
    wide = torch.randn(3, 64, 8, 8, device=device).half().contiguous(memory_format=torch.channels_last)
    weights = (0.2 * torch.randn(24, 32, side, side, device=device)).half()
    slices = [wide[:, 16:48], wide[::2, 16:48], wide[:, :32, 2:7], wide[:, :32, :, 1:6], wide[:, :32, ::2, ::4]]
    for image in (*slices, wide[:, :24, 2:3], wide[:, :24, :, 1:2], wide[1:2, :24, 2:3]):
        weight, padding = weights[:, : image.shape[1]], side // 2
        found = ops.conv2d_relu(image, weight, None, padding=padding)
        exact, baseline = (
            F.relu(F.conv2d(image.to(d), weight.to(d), padding=padding)) for d in (torch.float64, torch.float16)
        )
        assert_close_to_oracle(found, exact, baseline, what="slice")


def check_special_values(conv: Convolution) -> None:
    """NaN and Inf of the input stay with the pixels that meet them."""
    found = ops.conv2d_relu(conv.input, conv.weight, conv.bias, *conv.geometry)
    expected = F.relu(F.conv2d(conv.input, conv.weight, conv.bias, *conv.geometry))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def check_branches(backend: str, sizes: list[int], shape: tuple[int, ...], activation: str) -> None:
    """1x1 convolutions of one image with so many filters each, and all their gradients."""
    generator = torch.Generator().manual_seed(1)
    count, channels, *side = shape

    def tensor(*size: int, scale: float = 1.0) -> Tensor:
        value = scale * torch.randn(size, generator=generator).to(device_of(backend), torch.float16)
        return value.contiguous(memory_format=torch.channels_last) if len(size) == 4 else value

    input, weights = tensor(*shape), [tensor(k, channels, 1, 1, scale=1.6 / channels**0.5) for k in sizes]
    biases, grads = [tensor(k) for k in sizes], [tensor(count, k, *side) for k in sizes]

    def run(dtype: torch.dtype, name: str) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (input, *weights, *biases)]
        n = len(sizes)
        outputs = ops.pointwise_conv2d_group(
            leaves[0], leaves[1 : n + 1], leaves[n + 1 :], activation=activation, backend=name
        )
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])]

    found = run(torch.float16, backend)
    oracle, baseline = run(torch.float64, "reference"), run(torch.float16, "reference")
    for i, triple in enumerate(zip(found, oracle, baseline, strict=True)):
        assert_close_to_oracle(*triple, what=f"result {i}")


# Whose depth is split: few results, of many products each
DEEP = {
    "fprop": ((1, 264, 4, 5), (40, 264, 3, 3)),
    "dgrad": ((1, 40, 4, 5), (264, 40, 3, 3)),
    "wgrad": ((2, 24, 40, 33), (40, 24, 1, 1)),
}


def deep(name: str, kind: str = "fprop") -> Convolution:
    return convolution("cuda-emulated", name, *DEEP[kind], padding=DEEP[kind][1][2] // 2, activation="relu")
