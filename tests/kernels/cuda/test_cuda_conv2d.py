"""The CUDA convolution kernels: every one of the table, against float64, in the emulator and on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle
from fastconv.operators import backends
from support.cases import Concatenation
from support.cuda_kernels import check_same_bits_in_any_order, emulated_gpu, operators, through_mask
from support.eager import activate
from support.kernel_backends import as_tf32, device_of, emulated, forced, kernel_table

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
PASSES = ("fprop", "dgrad", "wgrad")


def variants() -> list[tuple[str, str]]:
    """(pass, the rest of the name) of every kernel but the reductions."""
    found = []
    for kind, name in itertools.product(PASSES, FORMATS):
        tiles = ["64x64", "gather"]
        if name != "fp32":
            tiles += ["128x128", "128x64"]
        if FORMATS[name] is not torch.float32:
            tiles += ["256x128", "256x64"]
            tiles += ["64x128", "32x256", "64x128_narrow"] if kind == "wgrad" else ["256x32", "128x64_narrow"]
        found += [(kind, f"{name}_{tile}") for tile in tiles]
    return found


def reduced(name: str) -> str:
    """The type whose parts of a split depth are added: TF32 is rounded on the way in alone."""
    return "fp32" if name == "tf32" else name


def test_the_table_has_these_kernels(backend: str) -> None:
    names = {f"conv2d_{kind}_{rest}_sm80" for kind, rest in variants()}
    names |= {"conv2d_pack_any", "conv2d_gradient_vec16", "conv2d_gradient_vec1", "conv2d_gradient_bias"}
    names |= {f"conv2d_{kind}_{dtype}_reduce_sm80" for kind in PASSES for dtype in ("fp16", "bf16", "fp32")}
    assert {kernel["name"] for kernel in kernel_table(backend) if kernel["op"].startswith("conv2d")} == names


# ------------------------------------------------------------------------------------------------ one convolution


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


@pytest.mark.parametrize(("kind", "rest"), variants(), ids=lambda value: value)
def test_every_kernel(backend: str, kind: str, rest: str) -> None:
    """Tiles that are full and tiles that are not, along every extent."""
    name, tile = rest.split("_", 1)
    gathers, is_narrow = tile.endswith("gather"), tile.endswith("narrow")
    # To gather, groups have odd channels: others are packed into vectors.
    channels, filters = (10, 14) if gathers else (12, 76) if is_narrow else (24, 136) if "128" in tile else (16, 72)
    groups = 2 if gathers else 1
    with forced(backend, f"conv2d_{kind}", f"conv2d_{kind}_{rest}_sm80"):
        for activation, stride in itertools.product(("none", "relu", "relu6"), (1, 2)):
            options = {"stride": stride, "padding": 1, "groups": groups, "activation": activation}
            shape, weight = (2, channels, 9, 8), (filters, channels // groups, 3, 3)
            check(backend, convolution(backend, name, shape, weight, **options), (kind,))


LAYERS = {
    "AlexNet's first": ((1, 3, 35, 35), (24, 3, 11, 11), {"stride": 4}),
    "AlexNet's second, in two groups": ((1, 16, 9, 9), (32, 8, 5, 5), {"padding": 2, "groups": 2}),
    "VGG": ((1, 64, 7, 7), (64, 64, 3, 3), {"padding": 1}),
    "ResNet's stem": ((1, 3, 23, 22), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "ResNet's strided 3x3": ((2, 32, 10, 10), (32, 32, 3, 3), {"stride": 2, "padding": 1}),
    "ResNet's shortcut": ((1, 32, 8, 8), (64, 32, 1, 1), {"stride": 2}),
    "the end of a bottleneck": ((2, 32, 7, 7), (128, 32, 1, 1), {}),
    "Inception's 1x7": ((1, 24, 9, 9), (24, 24, 1, 7), {"padding": 3}),
    "ResNeXt's groups of 4": ((1, 32, 6, 6), (32, 4, 3, 3), {"padding": 1, "groups": 8}),
    "one channel": ((1, 1, 12, 12), (6, 1, 5, 5), {}),
    "dilated": ((1, 8, 12, 12), (8, 8, 3, 3), {"dilation": 3, "padding": 3}),
    "stride beyond the filter": ((1, 8, 10, 10), (8, 8, 2, 2), {"stride": 3}),
    "padding beyond the filter": ((1, 8, 4, 4), (8, 8, 3, 3), {"padding": 5}),
    "one pixel": ((3, 16, 1, 1), (24, 16, 1, 1), {}),
    "one row of pixels for a whole filter": ((1, 8, 11, 11), (8, 8, 11, 11), {}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["fp16", "tf32"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_networks(backend: str, layer: str, name: str, layout: torch.memory_format) -> None:
    shape, filters, options = LAYERS[layer]
    conv = convolution(backend, name, shape, filters, activation="relu", layout=layout, **options)
    check(backend, conv)


# ----------------------------------------------------------------------------------------------- splitting, layout


# Whose depth is split: few results, of many products each
DEEP = {
    "fprop": ((1, 264, 4, 5), (40, 264, 3, 3)),
    "dgrad": ((1, 40, 4, 5), (264, 40, 3, 3)),
    "wgrad": ((2, 24, 40, 33), (40, 24, 1, 1)),
}


def deep(name: str, kind: str = "fprop") -> Convolution:
    return convolution("cuda-emulated", name, *DEEP[kind], padding=DEEP[kind][1][2] // 2, activation="relu")


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_split_depth(name: str, kind: str) -> None:
    """Small grids are spread over the GPU, deterministically."""
    with emulated_gpu(multiprocessors=24) as library:
        check("cuda-emulated", deep(name, kind), (kind,))
        assert f"conv2d_{kind}_{reduced(name)}_reduce_sm80" in library.launches()


def test_the_same_bits_in_any_order() -> None:
    def call() -> list[Tensor]:
        conv = deep("fp16", "dgrad")
        arguments = conv.grad, conv.output, conv.input, conv.weight, *conv.geometry, "relu"
        return operators("cuda-emulated").conv2d_backward(*arguments, [True] * 3 + [False])[:3]

    with emulated_gpu(multiprocessors=24):
        check_same_bits_in_any_order(call)


def test_channel_slices_are_read_in_place(backend: str) -> None:
    """The pixel pitch is that of the wider tensor: Inception's concatenation costs nothing."""
    device = device_of(backend)
    wide = torch.randn(2, 64, 6, 5, device=device).half().contiguous(memory_format=torch.channels_last)
    input = wide[:, 16:48]
    weight = (0.2 * torch.randn(24, 32, 1, 1, device=device)).half()
    kernel = "conv2d_fprop_fp16_64x64_sm80"
    with forced(backend, "conv2d_fprop", kernel):  # which takes vectors only
        found = ops.pointwise_conv2d(input, weight, None, activation="relu")
    exact, baseline = (F.relu(F.conv2d(input.to(d), weight.to(d))) for d in (torch.float64, torch.float16))
    assert_close_to_oracle(found, exact, baseline, what="slice")


# ------------------------------------------------------------------------------------------ into the caller's tensor


def check_out(
    conv: Convolution,
    offset: int,
    residual: Tensor | None = None,
    layout: str = "channels_last",
    multiple: int = 8,
) -> None:
    """Into a slice of the channels of a wider tensor, the rest of which stays as it is."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    inner = replace(conv, activation="none") if residual is not None else conv
    oracle, baseline = inner.forward(torch.float64), inner.forward(conv.input.dtype)
    joined = Concatenation.of([baseline], offset, layout, multiple)
    arguments = {"stride": conv.geometry[0], "padding": conv.geometry[1], "groups": conv.geometry[3]}
    arguments |= {"activation": conv.activation, "out": joined.slices[0]}
    if residual is None:
        found = ops.conv2d_relu(conv.input, conv.weight, conv.bias, **arguments)
    else:
        found = ops.conv2d_add_relu(conv.input, conv.weight, conv.bias, residual, **arguments)
        oracle, baseline = (activate(y + residual.to(y.dtype), conv.activation) for y in (oracle, baseline))
    assert found is joined.slices[0]
    joined.check_the_rest()
    assert_close_to_oracle(found, oracle, baseline, what="out", border=1)


OFFSETS = (0, 8, 1, 3)  # in fp16 the second is the only one of the last three at which vectors of 16 bytes fit


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", FORMATS)
def test_out_at_any_offset(backend: str, name: str, offset: int) -> None:
    """At pitches that vectors allow and at others; the second has a stride, and filters that no vector divides."""
    one = convolution(backend, name, (2, 16, 6, 5), (24, 16, 3, 3), padding=1, activation="relu")
    two = convolution(backend, name, (2, 16, 7, 7), (19, 16, 3, 3), stride=2, activation="relu6")
    for conv, multiple in itertools.product((one, two), (8, 13)):
        check_out(conv, offset, multiple=multiple)


@pytest.mark.parametrize("kernel", ["256x128", "64x64", "gather"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_out_of_every_kernel(backend: str, offset: int, kernel: str) -> None:
    with forced(backend, "conv2d_fprop", f"conv2d_fprop_fp16_{kernel}_sm80"):
        groups = 2 if kernel == "gather" else 1
        conv = convolution(backend, "fp16", (1, 10, 6, 5), (136, 10 // groups, 3, 3), groups=groups, activation="relu")
        check_out(conv, offset)


@pytest.mark.parametrize("offset", OFFSETS)
def test_out_in_groups(backend: str, offset: int) -> None:
    check_out(convolution(backend, "fp16", (1, 32, 6, 6), (48, 16, 3, 3), groups=2), offset)
    check_out(convolution(backend, "fp16", (1, 16, 6, 6), (16, 1, 3, 3), groups=16), offset)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["beside", "elsewhere"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_out_with_a_residual(backend: str, offset: int, where: str, layout: str) -> None:
    """The kernels read a residual with the strides of the result."""
    conv = convolution(backend, "fp16", (2, 16, 6, 5), (24, 16, 3, 3), padding=1, activation="relu")
    residual = conv.grad
    if where == "beside":
        joined = Concatenation.of([residual], offset, layout)
        residual = joined.slices[0].copy_(residual)
    check_out(conv, offset, residual, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out_of_a_photograph(backend: str, layout: str) -> None:
    """A few contiguous channels are read as they lie, the result is written as it lies."""
    conv = convolution(backend, "fp16", (1, 3, 11, 11), (24, 3, 5, 5), stride=2, layout=torch.contiguous_format)
    check_out(conv, 3, layout=layout)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", FORMATS)
def test_out_of_a_split_depth(name: str, offset: int) -> None:
    with emulated_gpu(multiprocessors=24) as library:
        conv = deep(name)
        check_out(conv, offset)
        check_out(conv, offset, conv.grad)
        assert library.launches()[f"conv2d_fprop_{reduced(name)}_reduce_sm80"] == 2


@pytest.mark.parametrize("name", ["fp16", "tf32"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("sizes", [[8, 24, 16], [3, 5, 8], [8] * 10], ids=["vectors", "odd", "more than one launch"])
def test_branches_into_one_tensor(backend: str, sizes: list[int], offset: int, name: str) -> None:
    """An Inception module's concatenation."""
    conv = convolution(backend, name, (2, 16, 5, 6), (sum(sizes), 16, 1, 1), activation="relu")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    oracle, baseline = conv.forward(torch.float64), conv.forward(conv.input.dtype)
    joined = Concatenation.of(list(baseline.split(sizes, 1)), offset, "channels_last")
    weights, biases = conv.weight.split(sizes), conv.bias.split(sizes)
    ops.pointwise_conv2d_group(conv.input, weights, biases, activation="relu", out=joined.slices)
    joined.check_the_rest()
    assert_close_to_oracle(joined.inside, oracle, baseline, what="concatenation")


def test_branches_share_a_launch() -> None:
    library = emulated()
    conv = convolution("cuda-emulated", "fp16", (2, 16, 5, 6), (80, 16, 1, 1))
    joined = Concatenation.of(list(conv.grad.split(8, 1)), 8, "channels_last")
    library.reset_statistics()
    ops.pointwise_conv2d_group(conv.input, conv.weight.split(8), out=joined.slices, backend="cuda-emulated")
    assert sum(library.launches().values()) == 2  # ten branches, at most eight at once


def memory_operators(backend: str, conv: Convolution, out: Tensor, residual: Tensor | None = None) -> list[str]:
    """The operators that allocate or copy while the result is computed into `out`."""
    ops.conv2d_relu(conv.input, conv.weight, conv.bias)  # what is done once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if residual is None:
            ops.conv2d_relu(conv.input, conv.weight, conv.bias, out=out)
        else:
            ops.conv2d_add_relu(conv.input, conv.weight, conv.bias, residual, out=out)
    names = [event.name for event in profile.events()]
    assert f"{backends.namespace(backend)}::conv2d_{'add_' if residual is not None else ''}relu" in names
    return [name for name in names if name.startswith(("aten::empty", "aten::new_empty", "aten::copy_"))]


def test_out_costs_no_copy(backend: str) -> None:
    """Where its channels lie side by side, and those of a residual likewise, the kernel writes it in place."""
    conv = convolution(backend, "fp16", (2, 16, 6, 5), (24, 16, 3, 3))
    shape = [2, 40, 4, 3]
    slices = conv.input.new_zeros(shape).contiguous(memory_format=torch.channels_last)
    planes = conv.input.new_zeros(shape)
    residual = torch.zeros_like(slices)
    assert memory_operators(backend, conv, conv.grad) == []
    assert memory_operators(backend, conv, slices[:, 3:27]) == []
    assert memory_operators(backend, conv, slices[:, 3:27], residual[:, :24]) == []
    assert memory_operators(backend, conv, planes[:, 3:27]).count("aten::copy_") == 1
    assert memory_operators(backend, conv, slices[:, 3:27], conv.grad).count("aten::copy_") == 1


def test_a_forced_kernel_that_does_not_fit(backend: str) -> None:
    conv = convolution(backend, "fp16", (1, 10, 6, 6), (4, 5, 3, 3), groups=2)
    message = r"was forced, but needs channels_last.* \(a group's channels are not whole vectors\)"
    with forced(backend, "conv2d_fprop", "conv2d_fprop_fp16_64x64_sm80"), pytest.raises(RuntimeError, match=message):
        ops.conv2d_relu(conv.input, conv.weight, None, *conv.geometry)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("sizes", [[8, 24, 16], [3, 5], [8] * 10], ids=["vectors", "odd", "more than one launch"])
def test_branches(backend: str, sizes: list[int], activation: str) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(1)

    def tensor(*size: int) -> Tensor:
        value = torch.randn(size, generator=generator).to(device, torch.float16)
        return value.contiguous(memory_format=torch.channels_last) if len(size) == 4 else value

    input, weights = tensor(2, 16, 5, 6), [0.4 * tensor(k, 16, 1, 1) for k in sizes]
    biases, grads = [tensor(k) for k in sizes], [tensor(2, k, 5, 6) for k in sizes]

    def run(dtype: torch.dtype, name: str) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (input, *weights, *biases)]
        n = len(sizes)
        outputs = ops.pointwise_conv2d_group(
            leaves[0], leaves[1 : n + 1], leaves[n + 1 :], activation=activation, backend=name
        )
        gradients = torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])
        return [*outputs, *gradients]

    found = run(torch.float16, backend)
    for i, triple in enumerate(
        zip(found, run(torch.float64, "reference"), run(torch.float16, "reference"), strict=True)
    ):
        assert_close_to_oracle(*triple, what=f"result {i}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_special_values(backend: str, name: str, value: float) -> None:
    conv = convolution(backend, name, (1, 16, 6, 6), (8, 16, 3, 3), padding=1, activation="relu")
    conv.input[0, 3, 2, 2] = value
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    found = ops.conv2d_relu(conv.input, conv.weight, conv.bias, *conv.geometry)
    expected = F.relu(F.conv2d(conv.input, conv.weight, conv.bias, *conv.geometry))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
