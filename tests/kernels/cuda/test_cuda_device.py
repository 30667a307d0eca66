"""What only a GPU can show: streams, graphs, several devices, memory; each test skips without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import models, ops, swap
from support.cases import named
from support.kernel_backends import on


@pytest.fixture(params=["cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


def first_call(op: str) -> Callable[[], list[Tensor]]:
    """The op on its first case, float16 and channels_last; outputs and gradients."""
    case = named(op)[0]
    arguments = case.arguments(torch.float16, "channels_last", device="cuda", requires_grad=True)
    leaves = [t for value in arguments.values() for t in (value if isinstance(value, list) else [value])]
    leaves = [t for t in leaves if isinstance(t, Tensor)]

    def call() -> list[Tensor]:
        found = getattr(ops, op)(**arguments)
        outputs = list(found) if isinstance(found, list | tuple) else [found]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    return call


@pytest.mark.parametrize("op", ops.__all__)
def test_capture_in_a_graph(backend: str, op: str) -> None:
    """No allocation outside of torch's, no synchronisation: a replay gives the same bits."""
    call = first_call(op)
    expected = [t.detach().clone() for t in call()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for _ in range(2):
        for tensor in found:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("op", ops.__all__)
def test_another_stream(backend: str, op: str) -> None:
    """Work is queued on the current stream, behind what is there."""
    call = first_call(op)
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # brings memory for this stream, which the driver may wait for
        torch.cuda._sleep(200_000_000)  # clock cycles, 0.1 s
        found = call()
        assert not stream.query()  # the sleep is still under way, and the call has not waited for it
    stream.synchronize()
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_another_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    input = torch.randn(2, 16, 8, 8, device="cuda:1")
    weight = torch.randn(24, 16, 3, 3, device="cuda:1")
    found = ops.conv2d_relu(input, weight)
    assert found.device == input.device
    torch.testing.assert_close(found, F.relu(F.conv2d(input, weight)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ops.__all__)
def test_the_same_bits_every_time(backend: str, op: str) -> None:
    call = first_call(op)
    expected = call()
    for _ in range(5):
        for one, two in zip(call(), expected, strict=True):
            assert torch.equal(one, two)


@pytest.mark.slow
def test_tensors_beyond_2_31_elements(backend: str) -> None:
    """Correct where they are elements, refused where they would be pixels of one image batch."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    input = torch.randn(34, 64, 1000, 1000, device="cuda", dtype=torch.float16)
    input = input.contiguous(memory_format=torch.channels_last)
    weight = 0.1 * torch.randn(16, 64, 1, 1, device="cuda", dtype=torch.float16)
    found = ops.pointwise_conv2d(input, weight, activation="relu")
    assert input.numel() > 2**31
    torch.testing.assert_close(found[-1:], F.relu(F.conv2d(input[-1:], weight)), rtol=2e-2, atol=2e-2)
    del found
    normed = ops.local_response_norm(input, 5)
    torch.testing.assert_close(normed[-1:], F.local_response_norm(input[-1:], 5), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["alexnet2012", "resnet50", "googlenet"])
def test_a_training_step_of_a_whole_network(backend: str, name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, num_classes=10).to("cuda", memory_format=torch.channels_last).eval()
    images = torch.randn(models.input_shape(name, batch=4), device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4, device="cuda")

    def gradients(network: torch.nn.Module) -> list[Tensor]:
        loss = F.cross_entropy(network(images), labels)
        return list(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True))

    for ours, theirs in zip(gradients(swap(model)), gradients(model), strict=True):
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
