"""The picture that ``python -m fastconv demo`` ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from torch import Tensor

if TYPE_CHECKING:
    from fastconv.demo import Inference, Training

FASTCONV = "#e4572e"
TORCH = "#8d99a6"
TORCH_CHANNELS_LAST = "#c3cad1"
INK = "#22303c"
MUTED = "#66727e"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TORCH_CHANNELS_LAST,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw(
    photographs: Sequence[Tensor],
    inferences: Sequence[Inference],
    trainings: dict[str, Training],
    machine: str,
    path: Path,
) -> None:
    """Photographs and speed above; errors and training below."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 8), facecolor="white")
        figure.text(0.03, 0.955, "fastconv: the same numbers, sooner", fontsize=18, weight="bold")
        figure.text(0.03, 0.925, machine, color=MUTED)
        top = GridSpec(
            2, 2, figure, left=0.03, right=0.97, top=0.86, bottom=0.49, width_ratios=(1, 2.2)
        )
        for row, photograph in enumerate(photographs):
            _photograph(figure.add_subplot(top[row, 0]), photograph)
        _speed(figure.add_subplot(top[:, 1]), inferences)
        bottom = GridSpec(1, 2, figure, left=0.12, right=0.97, top=0.37, bottom=0.08, wspace=0.2)
        _errors(figure.add_subplot(bottom[0]), inferences)
        _training(figure.add_subplot(bottom[1]), trainings)
        figure.savefig(path, dpi=150)


def _photograph(axes: Axes, photograph: Tensor) -> None:
    axes.imshow(photograph.permute(1, 2, 0))
    axes.set_axis_off()


def _speed(axes: Axes, inferences: Sequence[Inference]) -> None:
    axes.set_title("Speed, relative to torch as given")
    height = 0.27
    bars = (
        ("eager", "torch", TORCH),
        ("channels_last", "torch, channels_last", TORCH_CHANNELS_LAST),
        ("fastconv", "fastconv", FASTCONV),
    )
    for offset, (key, label, colour) in enumerate(bars):
        speeds = [i.seconds["eager"] / i.seconds[key] for i in inferences]
        positions = [row + (offset - 1) * height for row in range(len(inferences))]
        axes.barh(positions, speeds, height * 0.92, color=colour, label=label)
        for position, speed, inference in zip(positions, speeds, inferences, strict=True):
            own = key == "fastconv"
            axes.text(
                speed,
                position,
                f" {speed:.2f}x  {1e3 * inference.seconds[key]:.0f} ms"
                if own
                else f" {1e3 * inference.seconds[key]:.0f} ms",
                va="center",
                fontsize=9,
                color=FASTCONV if own else MUTED,
                weight="bold" if own else "normal",
            )
    _network_axis(axes, inferences)
    axes.set_xlim(left=0)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, columnspacing=1.2)


def _errors(axes: Axes, inferences: Sequence[Inference]) -> None:
    axes.set_title("Largest error against float64")
    for row, inference in enumerate(inferences):
        axes.plot(
            [inference.torch_error, inference.error], [row, row], color=TORCH_CHANNELS_LAST, lw=2
        )
    rows = range(len(inferences))
    marks = {"s": 70, "zorder": 3}
    axes.scatter([i.torch_error for i in inferences], rows, color=TORCH, label="torch", **marks)
    axes.scatter([i.error for i in inferences], rows, color=FASTCONV, label="fastconv", **marks)
    axes.set_xscale("log")
    _network_axis(axes, inferences)
    axes.set_xlabel("in units of the largest class score")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, columnspacing=1.2)


def _network_axis(axes: Axes, inferences: Sequence[Inference]) -> None:
    axes.set_yticks(range(len(inferences)), [i.title for i in inferences])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#edf0f2")
    axes.set_axisbelow(True)


def _training(axes: Axes, trainings: dict[str, Training]) -> None:
    axes.set_title("LeNet-5 learns handwritten digits")
    styles = {"torch.nn": (TORCH, 4.5), "fastconv": (FASTCONV, 1.2)}
    for label, training in trainings.items():
        colour, width = styles[label]
        axes.plot(
            training.losses,
            color=colour,
            lw=width,
            label=f"{label}: {training.accuracy:.1%} right on unseen digits",
        )
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss")
    axes.margins(x=0)
    axes.grid(color="#edf0f2")
    axes.legend(loc="upper right")
