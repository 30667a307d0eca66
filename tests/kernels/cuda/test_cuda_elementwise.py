"""add_relu, activations and local_response_norm on CUDA: every kernel against float64, emulated and on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle, poisoned_outputs
from support import numerics
from support.cases import DTYPES, LAYOUTS, Case, layout_of, named
from support.cuda_kernels import among_nan, check_same_bits_in_any_order, operators, random, through_mask
from support.kernel_backends import device_of, forced, kernel_table

ACTIVATIONS = ("none", "relu", "relu6")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def kernels(*ops: str) -> set[str]:
    return {f"{op}_{rest}" for op in ops for rest in KERNELS[op]}


KERNELS = {
    "add_relu_fprop": ("vec16", "vec1", "strided"),
    "activation_fprop": ("vec16", "vec1"),
    "activation_dgrad": ("vec16", "vec1", "strided"),
    "local_response_norm_fprop": ("nhwc_lanes", "nhwc_vec", "nhwc", "nchw_vec", "nchw", "wide"),
    "local_response_norm_dgrad": ("nhwc_lanes", "nhwc_vec", "nhwc", "nchw_vec", "nchw", "wide"),
}


def test_the_table_has_these_kernels(backend: str) -> None:
    found = {kernel["name"] for kernel in kernel_table(backend) if kernel["op"] in KERNELS}
    assert found == kernels(*KERNELS)


# -------------------------------------------------------------------------------------------- every case of the ops

# test_op_numerics.py has them on a GPU in every dtype and layout, in the emulator always in those that are not here.
OTHERS = [pair for pair in itertools.product(DTYPES, LAYOUTS) if numerics.EMULATED.get(pair) != ()]


@pytest.mark.parametrize("backend", ["cuda-emulated"], indirect=True)
@pytest.mark.parametrize(("dtype", "layout"), OTHERS, ids=str)
@pytest.mark.parametrize("case", named("add_relu", "local_response_norm"), ids=str)
def test_cases(backend: str, case: Case, dtype: torch.dtype, layout: str) -> None:
    numerics.check_forward(case, dtype, layout, device_of(backend))
    numerics.check_backward(case, dtype, layout, device_of(backend))


# ------------------------------------------------------------------------------------------------ sums and activations

# Around vectors, warps and blocks
LENGTHS = (1, 3, 8, 9, 63, 511, 4097, 8192)


@dtypes
@pytest.mark.parametrize("rest", KERNELS["add_relu_fprop"])
def test_every_add_kernel(backend: str, rest: str, dtype: torch.dtype) -> None:
    with forced(backend, "add_relu_fprop", f"add_relu_fprop_{rest}"):
        for n, activation in itertools.product(LENGTHS, ACTIVATIONS):
            pair = [random(backend, n, dtype=dtype, scale=4, seed=seed) for seed in (0, 1)]
            if rest == "vec1":
                pair = [among_nan(t) for t in pair]
            elif rest == "strided":
                if n == 1:
                    continue
                pair[1] = pair[1].repeat_interleave(2)[::2]
            expected = ops.add_relu(*pair, activation=activation, backend="reference")
            assert same_bits(ops.add_relu(*pair, activation=activation), expected), (n, activation)


@dtypes
@pytest.mark.parametrize("rest", KERNELS["activation_dgrad"])
def test_every_mask_kernel(backend: str, rest: str, dtype: torch.dtype) -> None:
    with forced(backend, "activation_dgrad", f"activation_dgrad_{rest}"):
        for n, activation in itertools.product(LENGTHS, ACTIVATIONS):
            output = random(backend, n, dtype=dtype, scale=4)
            grad = random(backend, n, dtype=dtype, seed=1)
            if rest == "vec1":
                grad, output = among_nan(grad), among_nan(output)
            elif rest == "strided":
                if n == 1:
                    continue
                grad = grad[:1].expand(n)
            found = operators(backend).add_relu_backward(grad, output, activation)
            assert same_bits(found, through_mask(grad, output, activation)), (n, activation)


# ReLU as a pass of its own serves convolutions that go through aten: of filters larger than shared memory
@dtypes
@pytest.mark.parametrize("rest", KERNELS["activation_fprop"])
def test_every_activation_kernel(backend: str, rest: str, dtype: torch.dtype) -> None:
    input = random(backend, 1, 1, 160, 160, dtype=dtype)
    weight = random(backend, 1, 1, 158, 157, dtype=dtype, seed=1, scale=0.01)
    with forced(backend, "activation_fprop", f"activation_fprop_{rest}"):
        found = ops.depthwise_conv2d(input, weight, activation="relu")
    oracle, baseline = (F.relu(F.conv2d(input.to(d), weight.to(d))) for d in (torch.float64, dtype))
    assert_close_to_oracle(found, oracle, baseline, what="relu")


SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 6.0, 6.5, -6.0, float("inf"), float("-inf"), float("nan"))


@dtypes
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activations_of_special_values(backend: str, activation: str, dtype: torch.dtype) -> None:
    input = torch.tensor(SPECIAL * 4, dtype=dtype, device=device_of(backend))
    zero = torch.full_like(input, -0.0)
    exact = F.relu if activation == "relu" else F.relu6
    # As torch's CPU kernels, which keep -0.0; those for GPUs may lose its sign.
    assert same_bits(ops.add_relu(input, zero, activation=activation).cpu(), exact(input.cpu()))
    mask = operators(backend).add_relu_backward(torch.ones_like(input), input, activation)
    inside = ~(input <= 0) & ~((input >= 6) & (activation == "relu6"))  # NaN passes, as in aten
    assert torch.equal(mask, inside.to(dtype))


def pairs_of_layouts() -> dict[str, tuple[Tensor, Tensor]]:
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    last = {"memory_format": torch.channels_last}
    return {
        "nchw + nhwc": (x, y.contiguous(**last)),
        "nhwc + nchw": (x.contiguous(**last), y),
        "nhwc + nhwc": (x.contiguous(**last), y.contiguous(**last)),
        "nchw + expanded": (x, y[:, :1, :1, :1].expand_as(x)),
        "nhwc + per channel": (x.contiguous(**last), y[:1, :, :1, :1].expand_as(x)),
        "expanded + nhwc": (y[:1].expand_as(x), x.contiguous(**last)),
        "transposed + nchw": (torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0), y),
        "nchw + transposed": (x, torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0)),
        "slices": (torch.randn(2, 6, 4, 9)[:, ::2, :, 1:6], torch.randn(4, 3, 4, 5)[1:3]),
        "one channel": (torch.randn(2, 1, 4, 5).contiguous(**last), torch.randn(2, 1, 4, 5)),
        "one pixel": (torch.randn(2, 3, 1, 1).contiguous(**last), torch.randn(2, 3, 1, 1)),
        "rank 2": (torch.randn(7, 9).mT, torch.randn(9, 7)),
        "nothing": (torch.randn(0, 4).mT, torch.randn(4, 0)),
        "ndhwc + ncdhw": (
            torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
            torch.randn(2, 3, 4, 5, 6),
        ),
        "eight dimensions": (torch.randn(2, 3, 2, 3, 2, 3, 2, 3).permute(7, 5, 3, 1, 6, 4, 2, 0), torch.randn(1)),
    }


@pytest.mark.parametrize("name", pairs_of_layouts())
def test_pairs_of_layouts(backend: str, name: str) -> None:
    """The result and its layout are those of input + other."""
    torch.manual_seed(0)
    input, other = (t.to(device_of(backend)) for t in pairs_of_layouts()[name])
    if other.shape != input.shape:
        other = torch.randn(input.shape, device=input.device).flip(0)
    expected = F.relu(input + other)
    found = operators(backend).add_relu(input, other, "relu")
    assert torch.equal(found, expected)
    assert layout_of(found) == layout_of(expected)
    grad = torch.randn_like(expected)
    for gradient in (grad, grad.mT.contiguous().mT, grad.sum().expand_as(grad)):
        found = operators(backend).add_relu_backward(gradient, expected, "relu")
        assert torch.equal(found, torch.where(expected > 0, gradient, 0))
        assert layout_of(found) == layout_of(torch.empty_like(expected))


# ------------------------------------------------------------------------------------------------ local_response_norm


def check_lrn(input: Tensor, grad: Tensor, *options: float, activation: str, what: str) -> None:
    leaf = input.detach().requires_grad_()
    exact = input.detach().double().requires_grad_()
    base = input.detach().requires_grad_()
    with poisoned_outputs():
        output = ops.local_response_norm(leaf, *options, activation=activation)
        (found,) = torch.autograd.grad(output, leaf, grad)
    oracle, baseline = (
        ops.local_response_norm(x, *options, activation=activation, backend="reference") for x in (exact, base)
    )
    assert_close_to_oracle(output, oracle, baseline, what=what)
    triple = found, *torch.autograd.grad(oracle, exact, grad.double()), *torch.autograd.grad(baseline, base, grad)
    assert_close_to_oracle(*triple, what=f"gradient of {what}")
    assert layout_of(output) == layout_of(found) == layout_of(input)


# For each kernel shapes that fill its blocks and shapes that do not, with the sizes that it takes
LRN = {
    # whole pixels to a warp (64 channels), or an overlap of warps; with the ends of a pixel anywhere in them
    "nhwc_lanes": (
        "channels_last",
        [(3, 64, 3, 5), (2, 88, 3, 5), (3, 8, 1, 1), (1, 2064, 1, 2), (2, 24, 5, 7)],
        (5,),
    ),
    "nhwc_vec": ("channels_last", [(2, 24, 3, 5), (3, 8, 1, 1), (1, 2064, 1, 2)], (1, 4, 5, 9)),
    "nhwc": ("channels_last", [(2, 19, 3, 5), (3, 7, 1, 1), (1, 300, 1, 2)], (1, 4, 5, 9)),
    "nchw_vec": ("contiguous", [(2, 7, 4, 4), (1, 3, 2, 4), (1, 37, 4, 8), (2, 1, 4, 4)], (5,)),
    "nchw": ("contiguous", [(2, 7, 3, 5), (1, 37, 9, 9), (3, 2, 1, 1)], (5,)),
    "wide": ("contiguous", [(2, 7, 3, 5), (1, 37, 3, 3), (2, 1, 2, 2)], (1, 2, 5, 41)),
}


@pytest.mark.parametrize(
    ("rest", "dtype"),
    [pair for pair in itertools.product(LRN, DTYPES) if pair != ("nhwc_lanes", torch.float64)],
    ids=str,
)
def test_every_lrn_kernel(backend: str, rest: str, dtype: torch.dtype) -> None:
    layout, shapes, sizes = LRN[rest]
    passes = [f"local_response_norm_{kind}" for kind in ("fprop", "dgrad")]
    with forced(backend, passes[0], f"{passes[0]}_{rest}"), forced(backend, passes[1], f"{passes[1]}_{rest}"):
        combinations = itertools.product(shapes, sizes, (0.75, 0.6))
        for (shape, size, beta), activation in zip(combinations, itertools.cycle(ACTIVATIONS), strict=False):
            input = random(backend, *shape, dtype=dtype, layout=layout, scale=3)
            grad = random(backend, *shape, dtype=dtype, layout=layout, seed=1)
            if rest in ("nhwc", "nchw"):
                input = among_nan(input)
            what = f"{shape}, size {size}, beta {beta}, {activation}"
            check_lrn(input, grad, size, 0.5, beta, 0.5, activation=activation, what=what)


@pytest.mark.parametrize("name", ["strided", "transposed", "three dimensions", "channels_last_3d", "a huge window"])
def test_lrn_of_other_tensors(backend: str, name: str) -> None:
    make = {
        "strided": lambda: torch.randn(2, 12, 3, 8)[..., ::2],
        "transposed": lambda: torch.randn(5, 4, 6, 2).permute(3, 2, 1, 0),
        "three dimensions": lambda: torch.randn(3, 10, 21),
        "channels_last_3d": lambda: torch.randn(2, 6, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d),
        "a huge window": lambda: torch.randn(1, 2500, 1, 1).contiguous(memory_format=torch.channels_last),
    }[name]
    torch.manual_seed(0)
    input = make().to(device_of(backend))
    size = 9001 if name == "a huge window" else 5
    output = ops.local_response_norm(input, size, 0.5)
    grad = torch.randn_like(output)
    (found,) = torch.autograd.grad(ops.local_response_norm(leaf := input.requires_grad_(), size, 0.5), leaf, grad)
    exact = input.detach().double().requires_grad_()
    oracle = ops.local_response_norm(exact, size, 0.5, backend="reference")
    baseline = ops.local_response_norm(leaf, size, 0.5, backend="reference")
    assert_close_to_oracle(output, oracle, baseline, what=name)
    triple = found, *torch.autograd.grad(oracle, exact, grad.double()), *torch.autograd.grad(baseline, leaf, grad)
    assert_close_to_oracle(*triple, what=f"gradient, {name}")


@layouts
@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("size", "activation"), [(4, "none"), (5, "none"), (5, "relu")])
@pytest.mark.parametrize("channels", [37, 40])
def test_an_odd_value_stays_in_its_windows(
    backend: str, channels: int, size: int, activation: str, value: float, dtype: torch.dtype, layout: str
) -> None:
    input = random(backend, 2, channels, 3, 5, dtype=dtype, layout=layout)
    odd = input.clone(memory_format=torch.preserve_format)
    odd[1, 20, 1, 2] = value
    outputs, gradients = [], []
    for x in (input, odd):
        leaf = x.requires_grad_()
        outputs.append(ops.local_response_norm(leaf, size, alpha=0.5, activation=activation))
        gradients += torch.autograd.grad(outputs[-1], leaf, torch.ones_like(outputs[-1]))
    expected = ops.local_response_norm(odd, size, alpha=0.5, activation=activation, backend="reference")
    assert torch.equal(outputs[1].isnan(), expected.isnan())
    touched, reached = torch.zeros_like(input, dtype=torch.bool), torch.zeros_like(input, dtype=torch.bool)
    # channel c sums over c - size // 2 ... c + (size - 1) // 2; a gradient over what c is in, too
    touched[1, 20 - (size - 1) // 2 : 20 + size // 2 + 1, 1, 2] = True
    reached[1, 20 - size + 1 : 20 + size, 1, 2] = True
    assert torch.equal(outputs[0][~touched], outputs[1][~touched])
    assert torch.equal(gradients[0][~reached], gradients[1][~reached])


@layouts
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("scale", "k"), [(1e-20, 1.0), (1e-20, 1e-30), (1e15, 1.0), (1e18, 1.0)])
@pytest.mark.parametrize(
    ("dtype", "channels", "size"), [(torch.float32, 9, 3), (torch.float32, 8, 5), (torch.bfloat16, 16, 5)], ids=str
)
def test_lrn_of_any_magnitude(
    backend: str, dtype: torch.dtype, channels: int, size: int, scale: float, k: float, beta: float, layout: str
) -> None:
    """d^beta must not overflow on the way where it does not in the end."""
    input = random(backend, 2, channels, 4, 4, dtype=dtype, layout=layout, scale=scale)
    oracle = ops.local_response_norm(input.double(), size, 1e-4, beta, k, backend="reference")
    baseline = ops.local_response_norm(input, size, 1e-4, beta, k, backend="reference")
    found = ops.local_response_norm(input, size, 1e-4, beta, k)
    assert_close_to_oracle(found, oracle, baseline, what="magnitude")


@layouts
@dtypes
@pytest.mark.parametrize(
    ("beta", "k"),
    [*itertools.product((0.75, 0.3), (-1.0, -100.0, 0.0)), (1.0, -100.0), (0.0, 0.0), (0.0, -1.0), (-2.0, 0.0)],
)
@pytest.mark.parametrize(("channels", "size"), [(5, 3), (8, 5)])
def test_lrn_of_odd_bases(
    backend: str, beta: float, k: float, channels: int, size: int, dtype: torch.dtype, layout: str
) -> None:
    """A power of a negative number is NaN unless it is an integer one, and of zero a quotient by zero."""
    input = random(backend, 1, channels, 3, 4, dtype=dtype, layout=layout)
    input[:, :, 1] = 0
    found = ops.local_response_norm(input, size, 1.0, beta, k)
    expected = ops.local_response_norm(input, size, 1.0, beta, k, backend="reference")
    torch.testing.assert_close(found, expected, equal_nan=True)


@layouts
@dtypes
@pytest.mark.parametrize("channels", [7, 8, 96])
def test_lrn_beside_what_does_not_exist(backend: str, channels: int, dtype: torch.dtype, layout: str) -> None:
    """Windows of zeros alone, which channels beyond the ends would have, have no gradient: 0 / 0."""
    input = random(backend, 1, channels, 3, 4, dtype=dtype, layout=layout)
    input[:, :2] = input[:, -2:] = 0
    grad = random(backend, 1, channels, 3, 4, dtype=dtype, layout=layout, seed=1)
    check_lrn(input, grad, 5, 1.0, 0.75, 0.0, activation="none", what="zeros at the ends")


def test_float16_squares_do_not_overflow(backend: str) -> None:
    input = torch.full((1, 8, 2, 2), 300.0, device=device_of(backend))
    expected = ops.local_response_norm(input.double(), 5, 1.0, backend="reference")
    torch.testing.assert_close(ops.local_response_norm(input.half(), 5, 1.0).double(), expected, rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("op", [op for op in KERNELS if op != "activation_fprop"])
def test_a_forced_kernel_that_does_not_fit(backend: str, op: str) -> None:
    """It says so; no other kernel is taken instead."""
    x = random(backend, 2, 7, 3, 5, dtype=torch.float32)
    strided = x.repeat_interleave(2, 3)[..., ::2]
    calls = {
        "add_relu_fprop": ("vec16", lambda: ops.add_relu(x, strided)),
        "activation_dgrad": ("strided", lambda: operators(backend).add_relu_backward(x, x, "relu")),
        "local_response_norm_fprop": ("nhwc", lambda: ops.local_response_norm(x, 5)),
        "local_response_norm_dgrad": (
            "nchw",
            lambda: operators(backend).local_response_norm_backward(x, x, 3, 1, 1, 1, "none"),
        ),
    }
    rest, call = calls[op]
    with forced(backend, op, f"{op}_{rest}"), pytest.raises(RuntimeError, match="was forced, but needs"):
        call()


def test_the_same_bits_in_any_order() -> None:
    emulated = operators("cuda-emulated")
    x = random("cuda-emulated", 2, 37, 5, 4, dtype=torch.float16)
    check_same_bits_in_any_order(
        lambda: [
            emulated.local_response_norm(x, 5, 0.5, 0.75, 1.0, "relu"),
            emulated.local_response_norm_backward(x, x, 4, 0.5, 0.75, 1.0, "relu"),
            emulated.add_relu(x, x, "relu"),
        ]
    )
