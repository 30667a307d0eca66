"""fastconv.swap: the rest of torch's machinery on a swapped model: copies, threads, compile, export, transforms."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.swapping import swap
from fastconv.swapping.regions import region_of
from support.swap_models import (
    agree,
    change_all,
    image,
    run_count,
    small_net,
)

# ---------------------------------------------------------------------------------- the rest of torch's machinery


def test_reference_backend():
    model = small_net()
    fast = swap(model)
    with fastconv.use_backend("reference"):
        agree(fast, model, image())


def test_without_onednn():
    model = small_net()
    fast = swap(model)
    with torch.backends.mkldnn.flags(enabled=False):
        agree(fast, model, image())
    agree(fast, model, image())


def test_inference_mode():
    model = small_net()
    fast = swap(model)
    with torch.inference_mode():
        fast(image())
    agree(fast, model, image())
    with torch.inference_mode():
        made_inside = small_net()
        fast = swap(made_inside)
        for _ in range(2):
            torch.testing.assert_close(fast(image()), made_inside(image()), rtol=1e-4, atol=1e-5)


def test_deepcopy_is_independent():
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image())
    twin = copy.deepcopy(fast)
    assert type(twin) is type(fast)
    assert run_count(twin) == run_count(fast)
    expected = copy.deepcopy(model)
    change_all(model, lambda module, t: t.data.mul_(2))
    agree(twin, expected, image())
    agree(fast, model, image())


def test_save_and_load():
    model = small_net()
    fast = swap(model)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert run_count(loaded) == run_count(fast)
    agree(loaded, model, image())


def test_swapping_twice():
    model = small_net()
    once = swap(model)
    twice = swap(once)
    assert type(twice) is type(once)
    agree(twice, model, image())


def test_a_module_that_is_one_layer():
    for layer in (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LocalResponseNorm(3)):
        agree(swap(layer.eval()), layer, image())


def test_data_parallel_replicas():
    fast = swap(small_net())
    replica = fast._replicate_for_data_parallel()
    replica._modules = {}
    assert region_of(replica) is not region_of(fast)
    assert region_of(replica).module is replica


def test_threads():
    model = small_net()
    fast = swap(model)
    inputs = [image(1 + i % 3, 3, 16 + 2 * (i % 4), 16, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    failures = []

    def work(i: int) -> None:
        with torch.no_grad():
            for k in range(12):
                j = (i + k) % len(inputs)
                if not torch.allclose(fast(inputs[j]), expected[j], rtol=1e-4, atol=1e-5):
                    failures.append(j)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
def test_compile(mode):
    torch._dynamo.reset()
    model = small_net().train(mode == "train")
    fast = swap(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode != "eval"):
        for n in (2, 3):
            expected = copy.deepcopy(model)(image(n, 3, 16, 16))
            torch.testing.assert_close(compiled(image(n, 3, 16, 16)), expected, rtol=1e-4, atol=1e-5)
            if mode == "train":
                break
    if mode == "eval":
        with torch.no_grad():
            model[0][0].weight.mul_(2)
            torch.testing.assert_close(compiled(image()), model(image()), rtol=1e-4, atol=1e-5)


def test_export():
    fast = swap(small_net())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fast, (image(),), dynamic_shapes=({0: batch},))
    ops = [str(node.target) for node in program.graph.nodes if "fastconv" in str(node.target)]
    assert ops == [
        "fastconv.conv2d_relu.default",
        "fastconv.conv2d_relu.default",
        "fastconv.conv2d_add_relu.default",
        "fastconv.pointwise_conv2d.default",
    ]
    torch.testing.assert_close(
        program.module()(image(5, 3, 16, 16)), small_net()(image(5, 3, 16, 16)), rtol=1e-4, atol=1e-5
    )


TRANSFORMS = {
    "vmap": lambda net: torch.func.vmap(net)(image(3, 2, 3, 16, 16)),
    "grad": lambda net: torch.func.grad(lambda x: net(x).sum())(image()),
    "jvp": lambda net: torch.func.jvp(net, (image(),), (image(seed=2),))[1],
    "forward AD": lambda net: dual(net),
    "functional_call": lambda net: torch.func.functional_call(
        net, {k: v * 1.5 for k, v in net.named_parameters()}, (image(),)
    ),
    "stateless, twice": lambda net: [
        torch.func.functional_call(net, {k: v * s for k, v in net.named_parameters()}, (image(),)) for s in (1, 2)
    ][1],
    "double backward": lambda net: second_order(net),
    "jit.trace": lambda net: torch.jit.trace(net, image(), check_trace=False)(image(seed=3)),
    "fx.symbolic_trace": lambda net: torch.fx.symbolic_trace(net)(image()),
    "flop counter": lambda net: count_flops(net),
    "checkpoint": lambda net: checkpoint(net, image(), use_reentrant=False),
}


def dual(net: nn.Module) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = net(torch.autograd.forward_ad.make_dual(image(), image(seed=2)))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


def second_order(net: nn.Module) -> Tensor:
    x = image().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def count_flops(net: nn.Module) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        net(image())
    return torch.tensor(counter.get_total_flops())


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_transforms(transform, grad):
    model = small_net()
    fast = swap(model)
    with torch.set_grad_enabled(grad or transform is TRANSFORMS["double backward"]):
        fast(image())
        torch.testing.assert_close(transform(fast), transform(model), rtol=1e-3, atol=1e-4)
