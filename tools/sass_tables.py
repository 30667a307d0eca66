"""The tables of `sass.py`: for people, and for csrc/README.md."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import expected
import zoo_convolutions
from expected import BATCHES, Layers, Loop
from fastconv.measure.layers import LAYERS
from gpu_model import GPUS, bound
from zoo_convolutions import Convolution

README = Path(__file__).resolve().parents[1] / "csrc/README.md"
HOPPER = expected.FOLDER / "hopper.md"
AROUND = 2.0  # microseconds that a launch takes before its first product and after its last: a guess
BEGIN, END = "<!-- python tools/sass.py --write -->", "<!-- end -->"
# Of a network's layers, in this order: means, the least, and times by times; the last is the roofline's by the time of
# the kernels that run only where they are qualified
_OF_NETWORKS = ("fill x waves", "least", "of roofline", "choice", "unproven")
# What the kernels for Hopper are to reach of the roofline of layers like these
_GOALS: tuple[tuple[str, str, float, Callable[[Convolution], bool]], ...] = (
    ("3x3, 128 channels or more", "fprop", 0.70, lambda conv: conv.kernel == (3, 3) and conv.channels >= 128),
    ("3x3, 64 channels", "fprop", 0.65, lambda conv: conv.kernel == (3, 3) and conv.channels == 64),
    ("1x1", "fprop", 0.80, lambda conv: conv.kernel == (1, 1)),
    ("3x3, 128 channels or more", "dgrad", 0.60, lambda conv: conv.kernel == (3, 3) and conv.channels >= 128),
    ("3x3, 128 channels or more", "wgrad", 0.60, lambda conv: conv.kernel == (3, 3) and conv.channels >= 128),
    ("1x1", "dgrad", 0.60, lambda conv: conv.kernel == (1, 1)),
    ("1x1", "wgrad", 0.60, lambda conv: conv.kernel == (1, 1)),
)
_GOAL_NETWORKS = ("resnet50", "vgg16", "googlenet", "alexnet2012")
_COLUMNS = ("tensor", "fma", "ldsm", "shared", "copy", "global", "local", "address", "predicate", "branch")


@dataclass
class Table:
    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def print(self) -> None:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        print(f"\n{self.title}")
        for row in (self.head, *self.rows):
            first, *others = zip(row, widths, strict=True)
            print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]))

    def markdown(self) -> str:
        rule = ["---", *["--:"] * (len(self.head) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.head, rule, *self.rows))


def kernels(loops: dict[str, dict[str, Loop]]) -> Table:
    head = ["kernel", "arch", "to", "all", *_COLUMNS, "other", "registers", "blocks", "in flight", "bound"]
    table = Table("Main loops: instructions of a warp", head)
    for name in dict.fromkeys(name for each in loops.values() for name in each):
        for gpu in GPUS:
            if name not in loops[gpu.arch]:
                continue
            loop = loops[gpu.arch][name]
            scale = loop.instructions / loop.trip.instructions
            counts = [loop.trip.counts.get(kind, 0) for kind in _COLUMNS]
            numbers = [loop.instructions, *(count * scale for count in counts)]
            numbers.append((loop.trip.instructions - sum(counts)) * scale)
            takes = [str(loop.registers), str(loop.blocks(gpu)), f"{loop.bytes_in_flight(gpu) / 1024:.0f} KiB"]
            cells = [f"{number:.0f}" for number in numbers]
            table.rows.append([name, gpu.arch, loop.unit, *cells, *takes, f"{gpu.name} {bound(loop.trip, gpu)}"])
    return table


def networks(layers: Layers) -> Iterator[Table]:
    """For each GPU what the planner makes of the networks, a column for each batch size."""
    for gpu in GPUS:
        head = ["network and pass"]
        head += [f"{what}, batch {batch}" for what in _OF_NETWORKS for batch in BATCHES]
        means = "means and least of the layers, and shares of their times"
        table = Table(f"The planner on {gpu.name}: {means}", head)
        for network, found in zoo_convolutions.load().items():
            for direction in ("fprop", "dgrad", "wgrad"):
                key = f"{gpu.name} {direction}"
                counts = {conv: count for conv, count in found.items() if key in layers[conv]}
                columns: list[list[str]] = [[] for _ in _OF_NETWORKS]
                for i, batch in enumerate(BATCHES):
                    all_of_it = [layers[conv][key][i] for conv, count in counts.items() for _ in range(count)]
                    shares = [layer.share for layer in all_of_it]
                    time = sum(layer.microseconds for layer in all_of_it)
                    least = sum(expected.roofline(conv, direction, batch, gpu) * n for conv, n in counts.items())
                    fastest = sum(layer.microseconds * layer.choice for layer in all_of_it)
                    unproven = sum(layer.microseconds * min(layer.choice, layer.unproven) for layer in all_of_it)
                    values = statistics.mean(shares), min(shares), least / time, fastest / time, least / unproven
                    for column, value in zip(columns, values, strict=True):
                        column.append(f"{value:.2f}")
                table.rows.append([f"{network} {direction}", *(cell for column in columns for cell in column)])
        yield table


def goals(layers: Layers) -> Table:
    """Shares of the roofline of what is chosen now, and of the kernels that run only where they are qualified."""
    head = [
        "layers",
        "pass",
        "goal",
        *(f"batch {batch}, {what}" for batch in BATCHES for what in ("chosen", "unproven")),
    ]
    table = Table("The kernels for Hopper on H100: shares of the roofline, by the layers' time", head)
    known = zoo_convolutions.load()
    for name, direction, goal, belongs in _GOALS:
        counts = Counter[Convolution]()
        for network in _GOAL_NETWORKS:
            counts.update({conv: n for conv, n in known[network].items() if belongs(conv) and conv.groups == 1})
        row = [name, direction, f"{goal:.2f}"]
        for i in range(len(BATCHES)):
            times = [[n * each for each in _hopper_times(layers, conv, direction, i)] for conv, n in counts.items()]
            least, chosen, unproven = map(sum, zip(*times, strict=True))
            row += [f"{least / chosen:.2f}", f"{least / unproven:.2f}"]
        table.rows.append(row)
    return table


def _hopper_times(layers: Layers, conv: Convolution, direction: str, batch: int) -> tuple[float, float, float]:
    """Microseconds on H100: the roofline's, of the kernel that is chosen, of the fastest if all were qualified."""
    layer = layers[conv][f"{GPUS[1].name} {direction}"][batch]
    least = expected.roofline(conv, direction, BATCHES[batch], GPUS[1])
    fastest = layer.microseconds * min(layer.choice, layer.unproven)
    return least, layer.microseconds + AROUND, fastest + AROUND


def hopper(layers: Layers) -> str:
    """What HOPPER shows: the layers of some networks at the larger batch sizes."""
    parts = [
        "# Hopper: what to expect of each layer",
        "Written by `python tools/sass.py --write`, from the model of `tools/gpu_model.py` (bytes, operations, waves "
        f"and fill) and {AROUND:.0f} us for what a launch takes before its first product and after its last, which is "
        "a guess. No GPU has a part in it. Shares of an H100's roofline, of the peak of its tensor cores or of its "
        "memory's bandwidth, whichever a layer meets first: of the kernel that is chosen now, which runs `mma.sync`, "
        "and of the fastest if those for Hopper were qualified. A gradient has the time of its mask in it where a ReLU "
        "follows the layer.",
    ]
    for network in _GOAL_NETWORKS:
        batches = range(1, len(BATCHES))
        head = [
            "layer",
            "pass",
            "bound by",
            *(f"batch {BATCHES[i]}: {what}" for i in batches for what in ("now", "then")),
        ]
        table = Table(network, head)
        for conv in zoo_convolutions.load()[network]:
            for direction in expected.directions(conv):
                row = [str(conv), direction, "memory" if _is_bound_by_memory(conv, direction) else "tensor cores"]
                for i in batches:
                    least, chosen, fastest = _hopper_times(layers, conv, direction, i)
                    row += [f"{least / chosen:.2f}", f"{least / fastest:.2f}"]
                table.rows.append(row)
        parts += [f"## {network}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def _is_bound_by_memory(conv: Convolution, direction: str) -> bool:
    batch = BATCHES[-1]
    return conv.bytes(direction, batch) / GPUS[1].bytes_per_second > conv.flop(batch) / GPUS[1].flop_per_second


def layers(network: str, layers: Layers, times: dict[tuple[Convolution, int], float]) -> Table:
    head = [
        "layer",
        "pass",
        "batch",
        "kernel",
        "blocks",
        "splits",
        "fill",
        "waves",
        "expected us",
        "unproven us",
        "roofline us",
    ]
    table = Table(f"{network}", [*head, *(["measured us"] if times else [])])
    for conv in zoo_convolutions.load()[network]:
        for gpu in GPUS:
            for direction in expected.directions(conv):
                for batch, layer in zip(BATCHES, layers[conv][f"{gpu.name} {direction}"], strict=True):
                    seconds = times.get((replace(conv, relu=False), batch)) if direction == "fprop" else None
                    blocks = f"{layer.blocks}/{layer.launches}" if layer.launches > 1 else str(layer.blocks)
                    row = [str(conv), f"{gpu.name} {direction}", str(batch), layer.kernel, blocks, str(layer.splits)]
                    row += [f"{layer.fill:.2f}", f"{layer.waves:.2f}", f"{layer.microseconds:.4g}"]
                    row.append(f"{layer.microseconds * layer.unproven:.4g}" if layer.unproven < 1 else "")
                    row.append(f"{expected.roofline(conv, direction, batch, gpu):.4g}")
                    if times:
                        row.append(f"{1e6 * seconds:.4g}" if seconds else "")
                    table.rows.append(row)
    return table


def measured(file: Path | None) -> dict[tuple[Convolution, int], float]:
    """Seconds of fastconv's forward in float16 and channels_last, by convolution and batch size."""
    found = {}
    known = {(layer.op, layer.name): layer for layer in LAYERS}
    for line in file.read_text().splitlines() if file else ():
        row = json.loads(line)
        if (row.get("contender"), row.get("layout"), row.get("direction")) != ("fastconv", "channels_last", "forward"):
            continue
        layer = known.get((row["op"], row["layer"]))
        if layer and "weight" in layer.shapes and row["dtype"] == "fp16":
            _, channels, *image = layer.shapes["input"]
            filters, _, *kernel = layer.shapes["weight"]
            stride, padding = (_pair(layer.options.get(name, value)) for name, value in (("stride", 1), ("padding", 0)))
            groups = layer.options.get("groups", channels if layer.op == "depthwise_conv2d" else 1)
            conv = Convolution(channels, _pair(image), filters, _pair(kernel), stride, padding, groups, False)
            found[conv, row["batch"]] = row["median_s"]
    return found


def _pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# -------------------------------------------------------------------------------------------------- csrc/README.md


def markdown() -> str:
    """What csrc/README.md is to show of what is recorded: all networks, and kernels but for those of float32."""
    loops, layers = expected.recorded_loops(), expected.recorded_layers()
    a100, h100 = (loops[gpu.arch] for gpu in GPUS)
    table = Table("", ["kernel", "to", "instructions", "registers", "blocks", "in flight", *(gpu.name for gpu in GPUS)])
    for name, loop in a100.items():
        if "fp32" in name or "tf32" in name or "gather" in name:
            continue
        both = list(zip((loop, h100[name]), GPUS, strict=True))
        numbers = [
            [f"{each.instructions:.0f}" for each, _ in both],
            [str(each.registers) for each, _ in both],
            [str(each.blocks(gpu)) for each, gpu in both],
            [f"{each.bytes_in_flight(gpu) / 1024:.0f}" for each, gpu in both],
        ]
        bounds = [str(bound(each.trip, gpu)) for each, gpu in both]
        table.rows.append([f"`{name}`", loop.unit, *(" / ".join(each) for each in numbers), *bounds])
    for name in (name for name in h100 if name not in a100):
        loop = h100[name]
        own = [f"{loop.instructions:.0f}", str(loop.registers), str(loop.blocks(GPUS[1]))]
        in_flight = f"{loop.bytes_in_flight(GPUS[1]) / 1024:.0f}"
        table.rows.append([f"`{name}`", loop.unit, *own, in_flight, "", str(bound(loop.trip, GPUS[1]))])
    columns = [
        (gpu, what, 1 + i * len(BATCHES))
        for gpu in GPUS
        for i, what in enumerate(_OF_NETWORKS)
        if what != "least" and (what != "unproven" or gpu is GPUS[1])
    ]
    short = Table("", ["network and pass", *(f"{gpu.name}, {what}" for gpu, what, _ in columns)])
    for rows in zip(*(each.rows for each in networks(layers)), strict=True):
        of_gpu = dict(zip(GPUS, rows, strict=True))
        cells = [" / ".join(of_gpu[gpu][i : i + len(BATCHES)]) for gpu, _, i in columns]
        short.rows.append([rows[0][0], *cells])
    parts = (BEGIN, table.markdown(), short.markdown(), goals(layers).markdown(), END)
    return "\n\n".join(parts)


def shown() -> str:
    """What csrc/README.md shows now."""
    _, begin, rest = README.read_text().partition(BEGIN)
    return begin + rest.partition(END)[0] + END


def write_readme() -> None:
    README.write_text(README.read_text().replace(shown(), markdown()))
    HOPPER.write_text(hopper(expected.recorded_layers()))
