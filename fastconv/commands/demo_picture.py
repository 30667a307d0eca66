"""The picture that ``python -m fastconv demo`` ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from fastconv.commands.demo_results import Inference, Training

FASTCONV = "#e4572e"
TORCH = "#7f8c99"
CHANNELS_LAST = "#c5ccd3"
INK = "#22303c"
MUTED = "#66727e"
GRID = "#e9edf0"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": CHANNELS_LAST,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}
_LEFT, _RIGHT = 0.03, 0.97


def draw(
    photographs: Sequence[Tensor],
    inferences: Sequence[Inference],
    trainings: dict[str, Training],
    machine: str,
    path: Path,
) -> None:
    """Photographs and times above; errors and training below."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.6))
        figure.text(_LEFT, 0.945, "fastconv: the same numbers, sooner", size=19, weight="bold")
        figure.text(_LEFT, 0.908, machine, color=MUTED)
        figure.legend(
            handles=[
                Patch(color=TORCH, label="torch"),
                Patch(color=CHANNELS_LAST, label="torch, channels_last"),
                Patch(color=FASTCONV, label="fastconv"),
            ],
            loc="upper right",
            bbox_to_anchor=(_RIGHT + 0.01, 0.985),
            ncols=3,
            handlelength=1.2,
            columnspacing=1.4,
        )
        above = figure.add_gridspec(2, 2, left=_LEFT, right=_RIGHT, top=0.83, bottom=0.48, width_ratios=(1, 2.1))
        above.update(wspace=0.4, hspace=0.08)
        for row, photograph in enumerate(photographs):
            _photograph(figure.add_subplot(above[row, 0]), photograph)
        figure.axes[0].set_title(f"{len(photographs)} photographs")
        equal = sum(inference.top5_equal for inference in inferences)
        figure.axes[-1].annotate(
            f"same 5 best classes in {equal} of {len(inferences)} networks",
            (0, 0),
            (0, -15),
            xycoords="axes fraction",
            textcoords="offset points",
            color=MUTED,
        )
        _times(figure.add_subplot(above[:, 1]), inferences)
        below = figure.add_gridspec(1, 2, left=0.135, right=_RIGHT, top=0.36, bottom=0.08)
        _errors(figure.add_subplot(below[0]), inferences)
        _training(figure.add_subplot(below[1]), trainings)
        figure.savefig(path, dpi=160)


def _photograph(axes: Axes, photograph: Tensor) -> None:
    axes.imshow(photograph.permute(1, 2, 0).numpy())
    axes.set_anchor("W")
    axes.set_axis_off()


def _times(axes: Axes, inferences: Sequence[Inference]) -> None:
    axes.set_title("Relative speed, and median time per batch")
    height = 0.27
    for offset, (key, colour) in enumerate(
        (("eager", TORCH), ("channels_last", CHANNELS_LAST), ("fastconv", FASTCONV))
    ):
        for row, inference in enumerate(inferences):
            speed = inference.seconds["eager"] / inference.seconds[key]
            position = row + (offset - 1) * height
            axes.barh(position, speed, height * 0.9, color=colour)
            label = f"{1e3 * inference.seconds[key]:.0f} ms"
            ours = key == "fastconv"
            axes.annotate(
                f"{speed:.2f}x   {label}" if ours else label,
                (speed, position),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=FASTCONV if ours else MUTED,
                weight="bold" if ours else "normal",
            )
    fastest = max(i.seconds["eager"] / min(i.seconds.values()) for i in inferences)
    axes.set_xlim(0, 1.34 * max(fastest, 1.0))  # room for the labels
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    _name_rows(axes, inferences)


def _errors(axes: Axes, inferences: Sequence[Inference]) -> None:
    axes.set_title("Largest error against float64")
    errors = np.array([(i.torch_error, i.error) for i in inferences])
    rows = np.arange(len(inferences))
    axes.hlines(rows, errors.min(1), errors.max(1), color=CHANNELS_LAST, lw=2)
    for column, colour in enumerate((TORCH, FASTCONV)):
        axes.scatter(errors[:, column], rows, s=75, color=colour, zorder=3)
    axes.set_xscale("log")
    positive = errors[errors > 0] if (errors > 0).any() else np.array([1e-7])
    axes.set_xlim(10 ** np.floor(np.log10(positive.min())), 10 ** np.ceil(np.log10(positive.max())))
    axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    axes.set_xlabel("relative to the largest class score")
    axes.margins(y=0.12)
    _name_rows(axes, inferences)


def _name_rows(axes: Axes, inferences: Sequence[Inference]) -> None:
    axes.set_yticks(range(len(inferences)), [i.title for i in inferences], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _training(axes: Axes, trainings: dict[str, Training]) -> None:
    axes.set_title("LeNet-5 learns handwritten digits")
    styles = {"torch.nn": (TORCH, 5), "fastconv": (FASTCONV, 1.5)}
    for label, training in trainings.items():
        colour, width = styles[label]
        axes.plot(
            _running_mean(training.losses),
            color=colour,
            lw=width,
            solid_capstyle="round",
            label=f"{label}: {training.accuracy:.1%} of unseen digits",
        )
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss, mean of 20 steps")
    axes.margins(x=0)
    axes.grid()
    axes.legend(loc="upper right")


def _running_mean(values: Sequence[float], window: int = 20) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")
