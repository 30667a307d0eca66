"""fastconv.swap: what happens to a model after the swap: changes, modes, dtypes, odd inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.swapping import swap
from fastconv.swapping.calls import onednn
from fastconv.swapping.calls.prepared import PreparedConv
from support.swap_models import (
    JOINS,
    Block,
    ConvBN,
    agree,
    agree_in_training,
    change_all,
    features,
    image,
    run_count,
    seeded,
    small_net,
)

# ------------------------------------------------------------------------------------------- changes after swap


def step(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    model(image()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assign(model: nn.Module) -> None:
    model[0][0].weight.data = torch.randn(8, 3, 3, 3) * 0.3
    model[0][1].running_mean.data = torch.randn(8)


def numpy_write(module: nn.Module, tensor: Tensor) -> None:
    tensor.detach().numpy()[...] *= 1.5


def train(model: nn.Module) -> None:
    model.train()
    for seed in range(2):
        model(image(seed=seed))
    model.eval()


def each(change: Any) -> Any:
    return lambda model: change_all(model, change)


CHANGES = {
    "SGD": step,
    "SGD foreach": lambda model: step(model, foreach=True),
    "SGD fused": lambda model: step(model, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(seeded(small_net(), 7).state_dict()),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(
        seeded(small_net(), 7).state_dict(), assign=True
    ),
    "copy_": torch.no_grad()(each(lambda module, t: t.copy_(t * 1.5))),
    "mul_ of one number": torch.no_grad()(lambda model: model[2].first[0].weight[3, 2, 1, 0].mul_(7)),
    "data.copy_": each(lambda module, t: t.data.copy_(t.data * 1.5)),
    "data.copy_ of one tensor": lambda model: model[2].first[0].weight.data.mul_(1.5),
    "data of one batch norm channel": lambda model: model[2].first[1].weight.data[3].zero_(),
    "data = new": assign,
    "data = transposed": lambda model: setattr(
        model[2].first[0].weight, "data", model[2].first[0].weight.data.transpose(2, 3)
    ),
    "numpy": each(numpy_write),
    "set_": torch.no_grad()(lambda model: model[0][0].weight.set_(torch.randn(8, 3, 3, 3))),
    "new Parameter": lambda model: setattr(model[0][0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "statistics": train,
    "reset_parameters": lambda model: [m.reset_parameters() for m in model.modules() if hasattr(m, "reset_parameters")],
    "double": lambda model: model.double(),
    "half and back": lambda model: model.half().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) * 1.5, model.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("which", ["model", "fast"])
def test_changed_weights_are_seen_by_both(change, which):
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image()), fast(image())
    torch.manual_seed(0)
    change(model if which == "model" else fast)
    agree(fast, model, image().to(model[-1].weight.dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0][1], "eps", 0.5),
        lambda model: setattr(model[0][0], "padding", (2, 2)),
        lambda model: setattr(model[0], "2", nn.Identity()),
        lambda model: setattr(model[0], "2", nn.GELU()),
        lambda model: model.__setitem__(3, nn.Conv2d(8, 6, 3)),
        lambda model: setattr(model[2], "join", torch.sub),
        lambda model: model[2].second.append(nn.Tanh()),
    ],
    ids=["eps", "padding", "relu replaced", "relu is gelu", "conv", "attribute", "appended"],
)
def test_changed_modules_are_seen(change):
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image())
    apart = copy.deepcopy(model)
    for net in (apart, fast):
        torch.manual_seed(0)
        change(net)
    agree(fast, apart, image())


def test_new_weights_are_prepared_when_they_stay(monkeypatch):
    fast = swap(small_net())
    calls = []
    monkeypatch.setattr(PreparedConv, "prepare", lambda conv, old=PreparedConv.prepare: calls.append(conv) or old(conv))
    with torch.no_grad():
        for _ in range(3):
            fast(image())
    first = len(calls)
    assert first == run_count(fast)
    with torch.no_grad():
        for _ in range(3):  # as in training: never twice the same weights
            fast[0][0].weight.mul_(1.1)
            fast(image())
        assert len(calls) == first
        fast(image())
    assert len(calls) == 2 * first


def test_weights_are_packed_as_each_batch_wants_them(monkeypatch):
    """oneDNN's calls are up to five times as slow on a weight in another format than the one it would choose."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval()
    fast = swap(model)
    used = []
    monkeypatch.setattr(
        onednn, "packed_conv2d", lambda *args, old=onednn.packed_conv2d: used.append(args[1]) or old(*args)
    )
    pack = torch.ops.mkldnn._reorder_convolution_weight
    with torch.no_grad():
        for batch in (1, 2, 8, 1, 8):
            x = image(batch, 64, 28, 28)
            agree(fast, model, x)
            wanted = pack(model[0].weight, [1, 1], [1, 1], [1, 1], 1, list(x.shape))
            assert torch.equal(onednn.packed_bytes(used[-1]), onednn.packed_bytes(wanted))
    kept = {id(packed): onednn.packed_bytes(packed) for packed in used}.values()
    assert len({bytes(content.numpy()) for content in kept}) == len(kept), "equal packs are shared"


def test_moving_average_of_a_swapped_model():
    model = small_net()
    fast = swap(model)
    average = torch.optim.swa_utils.AveragedModel(fast, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(fast)
    step(fast)
    average.update_parameters(fast)
    reference = copy.deepcopy(small_net())
    reference.load_state_dict({k[7:]: v for k, v in average.state_dict().items() if k.startswith("module.")})
    agree(average.module, reference, image())


# ------------------------------------------------------------------------------------------------------- modes


def test_train_after_eval_after_train():
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image())
    for _ in range(2):
        agree_in_training(model.train(), image())
        model.eval()
        train(fast)
        agree(fast, model, image())


def test_frozen_batch_norms():
    model = small_net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    agree_in_training(model, image())
    fast = swap(model)
    fast.train()
    fast[0][1].eval()
    model.train()
    model[0][1].eval()
    results = []
    for net in (copy.deepcopy(model), copy.deepcopy(fast)):
        results.append((net(image()), dict(net.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_dropout_draws_the_same(mode):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Conv2d(8, 4, 3))
    model.train(mode)
    model[2].train()
    fast = swap(model)
    with torch.no_grad():
        results = [torch.random.manual_seed(0) and net(image()) for net in (model, fast)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_gradients_in_evaluation_mode():
    agree_in_training(small_net(), image())


def test_gradients_of_some_parameters():
    model = small_net()
    for p in model.parameters():
        p.requires_grad_(False)
    model[3].weight.requires_grad_()
    fast = swap(model)
    fast(image()).sum().backward()
    grad, model[3].weight.grad = model[3].weight.grad, None
    model(image()).sum().backward()
    torch.testing.assert_close(grad, model[3].weight.grad)
    model[3].weight.requires_grad_(False)
    assert not fast(image()).requires_grad
    x = image().requires_grad_()
    (ours,) = torch.autograd.grad(fast(x).sum(), x)
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_an_optimizer_from_before_the_swap():
    model, reference = small_net().train(), small_net().train()
    # Not Adam, which turns a gradient that is zero but for rounding (a bias before a batch norm) into a full step.
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (model, reference)]
    fast = swap(model)
    losses = []
    for net, optimizer in zip((fast, reference), optimizers, strict=True):
        for i in range(3):
            loss = net(image(seed=i)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    agree(fast.eval(), reference.eval(), image())


# ---------------------------------------------------------------------------------------- dtypes and edge values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = small_net().to(dtype)
    agree(swap(model), model, image().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_autocast(dtype, join):
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self[0](x)
            return y, self[1](y), F.relu(self[1].second(x) + x)

    model = seeded(Net(ConvBN(8, 8, 1, relu=nn.ReLU6()), Block(join))).eval()
    fast = swap(model)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(features().double())
        with torch.autocast("cpu", dtype):
            for _ in range(2):
                for ours, theirs, exact in zip(fast(features()), model(features()), oracle, strict=True):
                    assert ours.dtype == theirs.dtype
                    assert ours.stride() == theirs.stride()
                    error, allowed = ((t.double() - exact).abs().max() for t in (ours, theirs))
                    assert error <= 2 * allowed
    with torch.autocast("cpu", dtype):
        outputs = [net.train()(features()) for net in (model, fast)]
    for theirs, ours in zip(*outputs, strict=True):
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_edge_values(value, dtype):
    model = seeded(
        nn.Sequential(
            ConvBN(8, 8, 3, padding=1, relu=nn.ReLU()),
            ConvBN(8, 8, 1, relu=nn.ReLU6()),
            Block(torch.add),
        )
    )
    model = model.eval().to(dtype)
    x = features().to(dtype)
    x[0, 2, 1, 7] = value
    fast = swap(model)
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = fast(x), model(x)
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isinf(), theirs.isinf())
            assert ours.isnan().any()


def test_bad_inputs_fail_as_before():
    model = small_net()
    fast = swap(model)
    for x in (image(2, 4, 16, 16), image().double(), image()[0, 0]):
        with torch.no_grad():
            for net in (model, fast, fast):
                with pytest.raises(RuntimeError):
                    net(x)


def test_images_of_many_sizes():
    model = small_net()
    fast = swap(model)
    for size in (16, 18, 20, 22, 24, 26, 16):
        agree(fast, model, image(1, 3, size, 16))
        agree(fast, model, image(3, 3, size, 16))
