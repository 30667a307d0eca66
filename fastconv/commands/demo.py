"""``python -m fastconv demo``: the same networks with torch.nn and with fastconv, on real input.

Two photographs through five networks, and LeNet-5 learning to read handwritten digits. Ends with a
table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fastconv
from fastconv import models
from fastconv.commands.demo_results import Inference, Training
from fastconv.measure import environment, networks, timing
from fastconv.measure.tolerance import compare

if TYPE_CHECKING:
    from rich.table import Table

NETWORKS = ("alexnet2012", "vgg16", "googlenet", "resnet50", "xception")
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
TIMING_SECONDS = 12.0  # per network
EPOCHS = 12
BATCH = 32
REQUIRED_ACCURACY = 0.97


Advance = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fastconv-demo.png"),
        help="where the picture goes; default: %(default)s",
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of all weights; default: 0")


def run(args: argparse.Namespace) -> int:
    """Measures, draws, prints; 1 if the results differ by more than rounding explains."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import sklearn  # noqa: F401
        from rich.console import Console
    except ImportError as missing:
        print(f'The demo needs {missing.name}: pip install "fastconv[demo]"')
        return 2
    from fastconv.commands import demo_picture

    console = Console()
    console.print(
        "[bold]fastconv demo[/bold]: the same weights with torch.nn and swapped, on real input\n"
        "The weights are random (seeded), not trained: what counts is that both agree.\n"
    )
    photographs = load_photographs()
    inferences = []
    with _progress(console) as task:
        for name in args.networks:
            with task(networks.title(name), 6) as advance:
                inferences.append(compare_network(name, photographs, args.seed, advance))
        trainings = {}
        for label, prepare in (("torch.nn", None), ("fastconv", fastconv.swap)):
            with task(f"LeNet-5, {label}", EPOCHS) as advance:
                trainings[label] = train_lenet(prepare, args.seed, advance)

    demo_picture.draw(photographs, inferences, trainings, f"{machine()}, random weights", args.output)
    console.print(_network_table(inferences))
    for label, training in trainings.items():
        console.print(
            f"LeNet-5 on handwritten digits, {label:<9} last loss {training.losses[-1]:.4f}, "
            f"test accuracy {training.accuracy:.1%}"
        )
    console.print(f"\n{machine()}\npicture: {args.output}", soft_wrap=True)
    found = problems(inferences, trainings)
    for problem in found:
        console.print(f"[bold red]FAILED[/bold red] {problem}")
    return 1 if found else 0


def problems(inferences: Sequence[Inference], trainings: dict[str, Training]) -> list[str]:
    """What must not happen: errors beyond the policy, other classes, nothing learnt."""
    found = []
    for inference in inferences:
        if not inference.verdict.ok:
            found.append(f"{inference.title}: {inference.verdict}")
        if not inference.top5_equal:
            found.append(f"{inference.title}: the five highest scores are of other classes")
    for label, training in trainings.items():
        if training.accuracy < REQUIRED_ACCURACY:
            found.append(
                f"LeNet-5 with {label}: test accuracy {training.accuracy:.1%}, "
                f"at least {REQUIRED_ACCURACY:.0%} was expected"
            )
    return found


def machine() -> str:
    """What the times depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, float32, {environment.facts()['CPU']}, {capability}"


# ------------------------------------------------------------------------------------- networks


def load_photographs() -> list[Tensor]:
    """scikit-learn's photographs as [3, H, W] in 0..1."""
    from sklearn.datasets import load_sample_image

    return [torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1) / 255 for name in PHOTOGRAPHS]


def compare_network(name: str, photographs: Sequence[Tensor], seed: int, advance: Advance) -> Inference:
    """Build a network, swap it, compare both with float64 and time them in turns."""
    advance("build")
    model, (_, _, size) = networks.build(name, seed)
    x = torch.stack([_normalise(_centre_crop(photograph, size)) for photograph in photographs])
    advance("calibrate")
    _calibrate(model, photographs, size)
    model.eval()
    advance("float64")
    with torch.no_grad():
        x_channels_last = x.contiguous(memory_format=torch.channels_last)
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        oracle = copy.deepcopy(channels_last).double()(x_channels_last.double())
        advance("swap")
        fast = fastconv.swap(model)
        advance("compare")
        expected, found = model(x), fast(x)
        channels_last(x_channels_last)  # warm, as the others are by now
        advance("time")
        calls = {
            "eager": lambda: model(x),
            "channels_last": lambda: channels_last(x_channels_last),
            "fastconv": lambda: fast(x),
        }
        results = {name: timing.Result() for name in calls}
        timing.take_turns(calls, results, TIMING_SECONDS)
    return Inference(
        title=networks.title(name),
        verdict=compare(found, oracle, expected),
        top5_equal=torch.equal(expected.topk(5).indices, found.topk(5).indices),
        seconds={name: result.median for name, result in results.items()},
    )


def _centre_crop(photograph: Tensor, size: int) -> Tensor:
    height, width = photograph.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(photograph[:, top : top + side, left : left + side], size)


def _resize(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def _normalise(image: Tensor) -> Tensor:
    """By the usual ImageNet statistics."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]


def _calibrate(model: nn.Module, photographs: Sequence[Tensor], size: int) -> None:
    """Give batch norm the statistics of crops of the photographs, as training would."""
    crops = []
    for photograph in photographs:
        height, width = photograph.shape[-2:]
        for side in torch.randint(size // 2, height, (4,)).tolist():
            top = int(torch.randint(height - side + 1, ()))
            left = int(torch.randint(width - side + 1, ()))
            crop = photograph[:, top : top + side, left : left + side]
            crops.append(_normalise(_resize(crop, size)))
    update_bn([torch.stack(crops)], model)


# ------------------------------------------------------------------------------------- training


@timing.threads(1)  # of layers as small as LeNet-5's
def train_lenet(prepare: Callable[[nn.Module], nn.Module] | None, seed: int, advance: Advance) -> Training:
    """Train LeNet-5 on scikit-learn's digits; the same weights and batches for the same seed."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None]
    # A margin of four pixels, as LeNet-5's own digits have.
    images = F.pad(F.interpolate(pixels, (24, 24), mode="bilinear"), (4, 4, 4, 4))
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(digits.target)
    train, test = map(
        torch.from_numpy,
        train_test_split(np.arange(len(labels)), random_state=0, stratify=digits.target),
    )

    torch.manual_seed(seed)
    model: nn.Module = models.lenet5().train()
    if prepare is not None:
        model = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = EPOCHS * math.ceil(len(train) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    losses = []
    for epoch in range(EPOCHS):
        advance(f"epoch {epoch + 1}")
        for batch in train[torch.randperm(len(train))].split(BATCH):
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[batch].roll(shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        correct = model(images[test]).argmax(1) == labels[test]
    return Training(losses, correct.float().mean().item())


# ------------------------------------------------------------------------------------- printing


@contextmanager
def _progress(console: Any) -> Iterator[Callable[..., Any]]:
    """Progress bars: each ``with task(title, steps) as advance`` is one line."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[step]}"),
    )
    with Progress(*columns, console=console) as progress:

        @contextmanager
        def task(title: str, steps: int) -> Iterator[Advance]:
            identity = progress.add_task(title, total=steps, completed=-1, step="")
            yield lambda step: progress.update(identity, advance=1, step=step)
            progress.update(identity, completed=steps, step="")

        yield task


def _network_table(inferences: Sequence[Inference]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"\n{len(PHOTOGRAPHS)} photographs, float32, medians of runs that take turns",
        caption="errors: the largest against float64, relative to the largest class score",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in (
        "error\ntorch",
        "\nfastconv",
        "same\ntop 5",
        "ms\ntorch",
        "channels\nlast",
        "\nfastconv",
        "faster than\nboth by",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for inference in inferences:
        speedups = (inference.speedup("eager"), inference.speedup("channels_last"))
        table.add_row(
            inference.title,
            f"{inference.torch_error:.1e}",
            f"{inference.error:.1e}",
            "yes" if inference.top5_equal else "[bold red]no",
            *(f"{1e3 * seconds:.0f}" for seconds in inference.seconds.values()),
            "[bold]{:.2f}x {:.2f}x".format(*speedups),
        )
    return table
