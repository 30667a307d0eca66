"""The operators by torch's own kernels: those in plain aten, and those on cuDNN with stand-ins for its fused ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fastconv import ops, use_backend
from fastconv.aten_kernels import OPERATORS, cudnn
from fastconv.measure.calls import laid_out
from fastconv.operators import backends
from fastconv.operators.convolution import FusedConvolution, Geometry
from fastconv.operators.schemas import SCHEMAS, WITH_OUT
from support.cases import CASES, CONV_OPS, FIRST, LAYOUTS, Case, Concatenation, layout_of, named, run
from support.dispatching import Recorder
from support.eager import eager

BACKWARD = "_backward"


def calls(case: Case, dtype: torch.dtype, layout: str, gradient: Callable[[Tensor], Tensor] = torch.randn_like) -> Any:
    """The operators that a case calls, forward and backward, with their arguments."""
    arguments = case.arguments(dtype, layout, requires_grad=True)
    with Recorder() as recorder, use_backend("cpu"):
        outputs = run(case.op, arguments)
        torch.autograd.backward(outputs, [gradient(output) for output in outputs])
    detached = [pytree.tree_map_only(Tensor, Tensor.detach, args) for _, args in recorder.calls]
    return [(call.name().partition("::")[2], args) for (call, _), args in zip(recorder.calls, detached, strict=True)]


def flat(found: Any) -> list[Tensor]:
    return pytree.tree_leaves(found)


def fakes(name: str, args: Any) -> list[Tensor]:
    """What the operator's fake kernel says."""
    with FakeTensorMode() as mode:
        given = pytree.tree_map_only(Tensor, mode.from_tensor, args)
        return flat(getattr(torch.ops.fastconv, name)(*given))


def check_as_fake(name: str, args: Any, found: Any) -> None:
    for one, fake in zip(flat(found), fakes(name, args), strict=True):
        assert (one.shape, one.dtype) == (fake.shape, fake.dtype), name
        assert layout_of(one) == layout_of(fake), name


def by_autograd(args: Any, op: str, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the forward operator's tensors, in its arguments' order."""
    leaves = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(), args)
    wanted = [leaf for leaf in flat(leaves) if isinstance(leaf, Tensor)]
    return list(torch.autograd.grad(flat(OPERATORS[op](*leaves)), wanted, grads))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- plain aten


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_eagers(case: Case, layout: str) -> None:
    (name, args), *_ = calls(case, torch.float64, layout)
    found = flat(OPERATORS[name](*args))
    for one, expected in zip(found, eager(case.op, case.arguments(torch.float64, layout)), strict=True):
        close(one.reshape(expected.shape), expected)
    check_as_fake(name, args, found)


def transposed(output: Tensor) -> Tensor:
    return torch.randn_like(output.mT.contiguous()).mT if output.dim() > 1 else torch.randn_like(output)


@pytest.mark.parametrize("gradient", [torch.randn_like, transposed], ids=["", "transposed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_is_autograds(case: Case, layout: str, gradient: Callable[[Tensor], Tensor]) -> None:
    (op, args), *backwards = calls(case, torch.float64, layout, gradient)
    for name, given in backwards:
        assert name.endswith(BACKWARD)
        grads = given[0] if isinstance(given[0], list) else [given[0]]
        expected = by_autograd(args, op, grads)
        found = OPERATORS[name](*given)
        check_as_fake(name, given, found)
        if not isinstance(given[-1], list):  # no mask
            close(found, expected[0])
            continue
        wanted = [gradient for part, want in zip(found, given[-1], strict=True) for gradient in flat(part) if want]
        close(wanted, expected)


@pytest.mark.parametrize("op", CONV_OPS)
def test_output_masks(op: str) -> None:
    _, (name, args) = calls(FIRST[op], torch.float64, "channels_last")
    whole = OPERATORS[name](*args[:-1], [True] * len(args[-1]))
    for mask in itertools.product([True, False], repeat=len(whole)):
        some = OPERATORS[name](*args[:-1], list(mask))
        for one, full, want in zip(some, whole, mask, strict=True):
            assert [g.shape for g in flat(one)] == [g.shape if want else (0,) for g in flat(full)]
            if want:
                close(one, full)


def test_weight_gradient_of_one_channels_last_image_in_groups() -> None:
    """aten's own is wrong in float64 where the batch has a stride that leads nowhere (seen with torch 2.14)."""
    one, two = (torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(4, 2, 3, 2, dtype=torch.float64))
    image = one.permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    image = image.as_strided(image.shape, (4, *image.stride()[1:]))
    weight = two.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    options = ([1, 1], [0, 0], [1, 1], 2, "none", [True] * 4)
    found = OPERATORS["conv2d_backward"](grad, None, image, weight, *options)
    close(found, OPERATORS["conv2d_backward"](grad, None, image.contiguous(), two, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ops.__all__)
def test_other_dtypes(op: str, layout: str, dtype: torch.dtype) -> None:
    """The dtype of the arguments, and values that are right but for its rounding, as float64's are right."""
    for name, args in calls(named(op)[0], dtype, layout):
        found = OPERATORS[name](*args)
        check_as_fake(name, args, found)
        expected = OPERATORS[name](*pytree.tree_map_only(Tensor, Tensor.double, args))
        for one, exact in zip(flat(found), flat(expected), strict=True):
            if not exact.numel():  # outside of the mask
                continue
            rounding = 20 * torch.finfo(dtype).eps * float(exact.abs().max())
            torch.testing.assert_close(one.double(), exact, rtol=0, atol=rounding)


def test_16_bit_squares_do_not_overflow_in_the_gradient_of_lrn() -> None:
    input, grad = torch.full((1, 8, 2, 2), 300.0), torch.ones(1, 8, 2, 2)
    found, exact = (
        OPERATORS["local_response_norm_backward"](grad.to(dtype), input.to(dtype), 5, 1.0, 0.75, 1.0, "none")
        for dtype in (torch.float16, torch.float64)
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["add_relu_backward", "conv2d_backward"])
def test_results_are_no_views_of_the_arguments(name: str) -> None:
    """Without an activation the gradient of a summand is the result's own."""
    grad, image, weight = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1)
    others = (image, "none")
    if name == "conv2d_backward":
        others = (None, image, weight, [1, 1], [0, 0], [1, 1], 1, "none", [False, False, False, True])
    found = flat(OPERATORS[name](grad, *others))[-1]
    assert torch.equal(found, grad)
    assert found.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("case", named(*WITH_OUT), ids=str)
def test_out(case: Case) -> None:
    (name, args), *_ = calls(case, torch.float32, "channels_last")
    results = OPERATORS[name](*args)
    joined = Concatenation.of(flat(results), 3, "channels_last")
    out = joined.argument(case.op)
    assert OPERATORS[f"{name}.out"](*args, out) is None
    torch.testing.assert_close(joined.slices, flat(results))
    joined.check_the_rest()
    wrong = [tensor.double() for tensor in joined.slices]
    with pytest.raises(RuntimeError, match=f"{name}: got out.*, needed"):
        OPERATORS[f"{name}.out"](*args, wrong if name.endswith("group") else wrong[0])


# ------------------------------------------------------------------------------------------------------ cuDNN


class Fused:
    """What cuDNN would compute, here: a stand-in for torch's two fused operators, in the layout that theirs has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "") -> None:
        self.calls: list[str] = []
        self.error = error
        self.biases: list[Tensor | None] = []
        for name in ("relu", "add_relu"):
            monkeypatch.setattr(torch, f"cudnn_convolution_{name}", getattr(self, name))
        monkeypatch.setattr(cudnn, "without_engine", set())

    def relu(self, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return self._run("relu", input, weight, bias, None, geometry)

    def add_relu(
        self, input: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *geometry: Any
    ) -> Tensor:
        assert alpha == 1
        return self._run("add_relu", input, weight, bias, z, geometry)

    def _run(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, geometry: Any
    ) -> Tensor:
        self.calls.append(name)
        self.biases.append(bias)
        if self.error:
            raise RuntimeError(self.error)
        assert input.dtype in (torch.float16, torch.bfloat16, torch.float32)
        found = F.conv2d(input, weight, bias, *geometry)
        # cuDNN's output has the strides of its format in every dimension, also where there is one element
        layouts = [suggest_memory_format(tensor) for tensor in (input, weight)]
        layout = torch.channels_last if torch.channels_last in layouts else torch.contiguous_format
        return torch.empty_like(found, memory_format=layout).copy_(F.relu(found if z is None else found + z))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    return Fused(monkeypatch)


def expected_calls(case: Case) -> list[str]:
    """Where cuDNN has something fused: a ReLU behind a convolution of at least one element."""
    if not case.shapes["input"][0]:
        return []
    name = "relu" if case.shapes.get("residual") is None else "add_relu"
    if case.op == "depthwise_separable_conv2d":
        chosen = [case.options.get(f"{part}_activation", "none") for part in ("depthwise", "pointwise")]
    else:
        chosen = [case.options.get("activation", "relu" if case.op.endswith("relu") else "none")]
    of_each = [name] * chosen.count("relu")
    return of_each * len(case.shapes.get("weights", [None]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", named(*CONV_OPS), ids=str)
def test_fused_where_cudnn_has_it(case: Case, layout: str, fused: Fused) -> None:
    (name, args), *_ = calls(case, torch.float32, layout)
    found = cudnn.OPERATORS[name](*args)
    assert fused.calls == expected_calls(case)
    torch.testing.assert_close(found, OPERATORS[name](*args))
    check_as_fake(name, args, found)


def test_what_is_not_a_convolution_is_atens() -> None:
    forwards = {op for op in cudnn.OPERATORS if cudnn.OPERATORS[op] is not OPERATORS[op]}
    assert forwards == {*CONV_OPS, *(f"{op}.out" for op in WITH_OUT)}


def convolution(dtype: torch.dtype = torch.float32, activation: str = "relu", **other: Any) -> FusedConvolution:
    geometry = Geometry([1, 1], [0, 0], [1, 1], 1)
    conv = FusedConvolution(
        torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4), None, geometry, activation
    )
    return conv._replace(**{n: v.to(dtype) for n, v in conv._asdict().items() if isinstance(v, Tensor)})._replace(
        **other
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_that_are_fused(dtype: torch.dtype) -> None:
    assert cudnn.is_fused(convolution(dtype))


def huge(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    "conv",
    [
        convolution(torch.float64),
        convolution(activation="relu6"),
        convolution(activation="none"),
        convolution(input=torch.randn(0, 3, 5, 5)),
        convolution(input=torch.randn(2, 3, 0, 5), geometry=Geometry([1, 1], [2, 0], [1, 1], 1)),
        convolution(input=huge(2**16, 2**9, 8, 8)),
        convolution(input=huge(2**21, 3, 18, 18), weight=huge(8, 3, 3, 3)),
    ],
    ids=["float64", "relu6", "none", "no image", "no pixel", "large input", "large result"],
)
def test_what_is_left_to_aten(conv: FusedConvolution) -> None:
    assert not cudnn.is_fused(conv)


def test_left_to_aten_where_torch_is_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused operators ask for no deterministic engine."""
    conv = convolution()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        assert not cudnn.is_fused(conv)
    for warn_only in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda only=warn_only: only)
        assert cudnn.is_fused(conv) == warn_only
    with torch.backends.cudnn.flags(enabled=False):
        assert not cudnn.is_fused(conv)


def test_the_bias_is_contiguous(fused: Fused) -> None:
    """cuDNN's plan of one call serves the next, whose bias has another stride."""
    conv = convolution(bias=torch.randn(8)[::2])
    torch.testing.assert_close(cudnn.convolve(conv), F.relu(F.conv2d(conv.input, conv.weight, conv.bias)))
    (bias,) = fused.biases
    assert bias is not None
    assert bias.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_in_another_layout(layout: str, fused: Fused) -> None:
    conv = convolution(residual=torch.randn(3, 3, 4, 2).permute(3, 2, 0, 1))
    conv = conv._replace(input=laid_out(conv.input, layout))
    found, expected = cudnn.convolve(conv), F.relu(F.conv2d(*conv[:3]) + conv.residual)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    assert fused.calls == ["add_relu"]


def test_one_channel_has_plain_strides(fused: Fused) -> None:
    """As behind torch's ReLU, and behind its sums."""
    conv = convolution(weight=torch.randn(1, 3, 3, 3), bias=None)
    conv = conv._replace(input=laid_out(conv.input, "channels_last"))
    for residual in (None, torch.randn(2, 1, 3, 3)):
        assert cudnn.convolve(conv._replace(residual=residual)).stride() == (9, 9, 3, 1)
    assert fused.calls == ["relu", "add_relu"]


ENGINES = "GET was unable to find an engine to execute this computation"
STATUS = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"


@pytest.mark.parametrize("error", [ENGINES, STATUS])
def test_without_an_engine(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """aten's, and the search for one is not repeated for such a call."""
    stand_in, conv = Fused(monkeypatch, error), convolution()
    for _ in range(2):
        torch.testing.assert_close(cudnn.convolve(conv), F.relu(F.conv2d(*conv[:3])))
    assert stand_in.calls == ["relu"]
    cudnn.convolve(conv._replace(input=torch.randn(2, 3, 6, 5)))
    cudnn.convolve(conv._replace(residual=torch.randn(2, 4, 3, 3)))
    assert stand_in.calls == ["relu", "relu", "add_relu"]
    with pytest.raises(RuntimeError, match=error):
        cudnn.fused(conv)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    Fused(monkeypatch, "CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cudnn.convolve(convolution())


def test_bad_arguments_do_not_reach_cudnn(fused: Fused) -> None:
    image, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match="conv2d_relu: got 3 channels in input"):
        cudnn.OPERATORS["conv2d_relu"](image, weight, None, [1, 1], [0, 0], [1, 1], 1, "relu")
    assert not fused.calls


@pytest.mark.parametrize("name", SCHEMAS)
def test_namespace(name: str) -> None:
    operator, _, overload = name.partition(".")
    registered = getattr(getattr(torch.ops, cudnn.NAMESPACE), operator)
    assert getattr(registered, overload or "default")._schema == torch._C.parse_schema(
        f"{cudnn.NAMESPACE}::{name}{SCHEMAS[name]}"
    )
    for key in ("CUDA", "Meta", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{cudnn.NAMESPACE}::{name}", key)


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.ones(1, 2, 3, 3)
    if backends.problem("cudnn") is not None:
        with pytest.raises(RuntimeError, match=r"'cudnn', which cannot run here: .+; leave the backend to 'auto'"):
            ops.add_relu(images, images, backend="cudnn")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with torch.backends.cudnn.flags(enabled=True):
        assert backends.problem("cudnn") is None
        with pytest.raises(RuntimeError, match=r"got a tensor on cpu for backend 'cudnn', needed one on cuda"):
            ops.add_relu(images, images, backend="cudnn")
    with torch.backends.cudnn.flags(enabled=False):
        assert backends.problem("cudnn") == "cuDNN is switched off (torch.backends.cudnn.enabled)"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert backends.problem("cudnn") == f"torch {torch.__version__} was built without cuDNN"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.problem("cudnn") == "no GPU is visible"
