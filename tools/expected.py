"""The expected speed of kernels and layers: computed, recorded in benchmarks/expected, compared with what is recorded.

resources.json      registers of every kernel; threads and shared memory of the table of kernels
loops.json          what the main loop of each hot kernel does for a trip of a warp
convolutions.json   the convolutions of the networks, by tools/zoo_convolutions.py
layers.json         for each of them, pass and batch size what the planner chooses and what that takes at best
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import hot_kernels
import machine_code
import plans
import zoo_convolutions
from fastconv.operators import kernels
from gpu_model import GPUS, Gpu, Trip, blocks_per_multiprocessor, bound
from zoo_convolutions import Convolution

FOLDER = zoo_convolutions.FILE.parent
RESOURCES, LOOPS, LAYERS = (FOLDER / f"{name}.json" for name in ("resources", "loops", "layers"))
BATCHES = (1, 32, 256)
TOLERATED = 0.05
Json = dict[str, Any]

# ------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Loop:
    """A hot kernel's main loop on one architecture, and what a launch of it takes."""

    name: str
    threads: int
    shared_bytes: int
    stages: int
    registers: int
    trip: Trip

    @property
    def unit(self) -> str:
        """What the instructions are counted for: what is done in one trip of the largest tile, or moved."""
        counts = self.trip.counts
        return "32 HMMA" if counts.get("tensor") else "KiB" if self.trip.moved else "512 FFMA"

    @property
    def instructions(self) -> float:
        """For each unit."""
        counts = self.trip.counts
        done = counts.get("tensor", 0) / 32 or self.trip.moved / 1024 or counts.get("fma", 0) / 512
        return self.trip.instructions / done

    def blocks(self, gpu: Gpu) -> int:
        """On a multiprocessor."""
        return blocks_per_multiprocessor(gpu, self.registers, self.threads, self.shared_bytes)

    def bytes_in_flight(self, gpu: Gpu) -> int:
        """On a multiprocessor: the stages that are filled while one is used, or what is loaded in a trip."""
        if self.stages:
            return self.shared_bytes * (self.stages - 1) // self.stages * self.blocks(gpu)
        return self.trip.loaded * self.threads // 32 * self.blocks(gpu)


def loops() -> dict[str, dict[str, Loop]]:
    """By architecture and name."""
    library = machine_code.library()
    found: dict[str, dict[str, Loop]] = {gpu.arch: {} for gpu in GPUS}
    for kernel in hot_kernels.hot_kernels():
        for gpu in filter(kernel.runs_on, GPUS):
            trip = kernel.trip(machine_code.code(library, gpu.arch)[kernel.code])
            registers = machine_code.kernels(library)[gpu.arch][kernel.code].registers
            shape = kernel.threads, kernel.shared_bytes, kernel.stages
            found[gpu.arch][kernel.name] = Loop(kernel.name, *shape, registers, trip)
    return found


def recorded_loops() -> dict[str, dict[str, Loop]]:
    record = json.loads(LOOPS.read_text())
    return {
        arch: {name: Loop(name, **{**loop, "trip": Trip(**loop["trip"])}) for name, loop in each.items()}
        for arch, each in record.items()
    }


def _as_json(loop: Loop) -> Json:
    facts = asdict(loop)
    del facts["name"]
    facts["trip"]["counts"] = dict(sorted(loop.trip.counts.items()))
    return facts


def resources() -> Json:
    """What resources.json holds, of what is built here."""
    from fastconv import _C

    table = {entry["name"]: [entry["threads"], entry["shared_bytes"]] for entry in _C.kernel_table()}
    return {
        "nvcc": nvcc_version(),
        "table": {"fields": ["threads at most", "dynamic shared bytes"], **table},
        "code": {
            arch: {name: kernel.registers for name, kernel in each.items()}
            for arch, each in sorted(machine_code.kernels(machine_code.library()).items())
        },
    }


def recorded_resources() -> Json:
    return dict(json.loads(RESOURCES.read_text()))


def nvcc_version() -> str:
    from fastconv import _C

    match = re.search(r"nvcc ([\d.]+)", _C.build_info()["cuda"])
    return match[1] if match else "none"


# -------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """What the planner chooses for a convolution, one of its passes at one batch size, and what that takes.

    Attributes:
        kernel: as the table of kernels has it, without the op and what all have.
        blocks: of all launches of the kernel.
        launches: of the kernel; in dgrad one for each phase of the stride.
        fill: useful work by all work, of the first launch.
        waves: blocks by the places for one in each multiprocessor until the last is done, of all launches.
        splits: blocks that share the depth of a tile.
        microseconds: at best, by gpu_model.
        choice: the time of the kernel that would be fastest by gpu_model, by that of the one which is chosen.
        unproven: the same, of the kernels that are chosen only where they are qualified; 1 where none is faster.
    """

    kernel: str
    blocks: int
    launches: int
    splits: int
    fill: float
    waves: float
    microseconds: float
    choice: float
    unproven: float = 1

    def __str__(self) -> str:
        launches = f"/{self.launches}" if self.launches > 1 else ""
        splits = f" x{self.splits}" if self.splits > 1 else ""
        numbers = f"{self.fill:.2f} {self.waves:.2f} {self.microseconds:.4g} {self.choice:.2f}"
        numbers += f" {self.unproven:.2f}" if self.unproven < 1 else ""
        return f"{self.kernel} {self.blocks}{launches}{splits} {numbers}"

    @classmethod
    def parse(cls, text: str) -> Layer:
        match = re.fullmatch(r"(\S+) (\d+)(?:/(\d+))?(?: x(\d+))? (\S+) (\S+) (\S+) (\S+)(?: (\S+))?", text)
        assert match is not None, text
        kernel, blocks, launches, splits, *numbers = match.groups()
        return cls(
            kernel, int(blocks), int(launches or 1), int(splits or 1), *(float(each) for each in numbers if each)
        )

    @property
    def share(self) -> float:
        """Of the multiprocessors' time that goes into useful work."""
        return self.fill * self.waves


def roofline(conv: Convolution, direction: str, batch: int, gpu: Gpu) -> float:
    """Microseconds for the bytes, each tensor once, or for the arithmetic at the peak: the longer."""
    memory = conv.bytes(direction, batch) / gpu.bytes_per_second
    return 1e6 * max(memory, conv.flop(batch) / gpu.flop_per_second)


def layer(conv: Convolution, direction: str, batch: int, gpu: Gpu, loops: dict[str, Loop]) -> Layer:
    made = plans.plan(gpu, plans.call_of(conv, batch, direction))
    (chosen,) = (each for each in made if each.choice.op.endswith(f"conv2d_{direction}"))
    kernel, candidate = chosen.choice.chosen, chosen.candidate
    own = [launch for launch in chosen.launches if launch.kernel == kernel]
    if conv.is_depthwise:
        own = own[:1]  # wgrad's second kernel has the same name
    blocks = sum(launch.blocks for launch in own)
    waves = blocks / sum(-(-launch.blocks // gpu.multiprocessors) * gpu.multiprocessors for launch in own)
    if kernel not in loops:
        raise LookupError(f"{kernel} was chosen for {conv}, but {LOOPS.name} does not have it: make sass ARGS=--write")
    moved = conv.bytes(direction, batch) / gpu.bytes_per_second
    work = moved if conv.is_depthwise else conv.flop(batch) / gpu.flop_per_second

    def seconds(of: kernels.Candidate, waves: float) -> float:
        done = max(moved, work / (bound(loops[of.kernel].trip, gpu).share * of.fill * waves))
        if of.splits == 1:
            return done
        # Each part is written and read, as float32, and is still in L2 then.
        parts = 4 * of.splits * conv.results(direction, batch)
        return done + 2 * parts / (gpu.l2_bytes_per_clock * gpu.hertz)

    beside = _bytes_beside(conv, batch, chosen.launches) / gpu.bytes_per_second
    able = [each for each in chosen.choice.candidates if not each.reason and each.kernel in loops]
    times = {each.kernel: beside + seconds(each, each.waves) for each in able}
    own_time = times[kernel]
    choice = min(times[each.kernel] for each in able if not each.unproven) / own_time
    unproven = min((times[each.kernel] / own_time for each in able if each.unproven), default=1.0)
    short = kernel.removeprefix(chosen.choice.op + "_").removesuffix("_sm80").removeprefix("fp16_")
    microseconds = 1e6 * (beside + seconds(candidate, waves))
    return Layer(
        short, blocks, len(own), candidate.splits, candidate.fill, waves, microseconds, choice, min(unproven, 1.0)
    )


def _bytes_beside(conv: Convolution, batch: int, launches: Sequence[plans.Launch]) -> int:
    """What the kernels move that prepare the operands: images of few channels and gradients before the ReLU."""
    moved = 0
    for launch in launches:
        if launch.kernel.startswith("conv2d_pack"):
            pixels, packed = launch.blocks * launch.threads, -(-conv.channels // 4) * 4
            moved += 2 * pixels * (conv.channels + packed)
        elif launch.kernel.startswith("conv2d_gradient_vec"):
            moved += 3 * 2 * conv.results("fprop", batch)
    return moved


Layers = dict[Convolution, dict[str, list[Layer]]]  # by "A100 fprop", in the order of BATCHES


def directions(conv: Convolution) -> Iterator[str]:
    """Nobody needs the gradient of a photograph."""
    yield from (name for name in plans.PASSES if name != "dgrad" or conv.channels > 3)


def layers(loops: dict[str, dict[str, Loop]]) -> Layers:
    convolutions = dict.fromkeys(conv for each in zoo_convolutions.load().values() for conv in each)
    return {
        conv: {
            f"{gpu.name} {name}": [layer(conv, name, batch, gpu, loops[gpu.arch]) for batch in BATCHES]
            for gpu in GPUS
            for name in directions(conv)
        }
        for conv in convolutions
    }


def recorded_layers() -> Layers:
    record = json.loads(LAYERS.read_text())
    convolutions = {str(conv): conv for each in zoo_convolutions.load().values() for conv in each}
    return {
        convolutions[name]: {key: [Layer.parse(text) for text in texts] for key, texts in each.items()}
        for name, each in record.items()
        if name in convolutions
    }


# ------------------------------------------------------------------------------------------- record and comparison


def write(loops: dict[str, dict[str, Loop]], layers: Layers) -> None:
    """Records it, a line for each kernel and layer."""
    text = json.dumps(resources(), indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    RESOURCES.write_text(text + "\n")
    parts = [
        f'"{arch}": {{\n{_lines({name: _as_json(loop) for name, loop in each.items()})}\n}}'
        for arch, each in loops.items()
    ]
    LOOPS.write_text("{" + ",\n".join(parts) + "}\n")
    rows = {str(conv): {key: list(map(str, each)) for key, each in found.items()} for conv, found in layers.items()}
    LAYERS.write_text("{\n" + _lines(rows) + "\n}\n")


def _lines(entries: Json) -> str:
    return ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())


@dataclass(frozen=True)
class Change:
    """Of a number by more than is tolerated.

    Attributes:
        worse: whether it is a regression; else it is to be recorded.
    """

    what: str
    worse: bool

    def __str__(self) -> str:
        return f"{'worse' if self.worse else 'to record'}: {self.what}"


def changes(loops: dict[str, dict[str, Loop]], layers: Layers) -> list[Change]:
    """What is built here against what is recorded."""
    lines = [Change(line, worse=False) for line in resource_changes(recorded_resources(), resources())]
    return [*lines, *loop_changes(recorded_loops(), loops), *layer_changes(recorded_layers(), layers)]


def resource_changes(recorded: Json, now: Json) -> list[str]:
    """One line for each kernel that is new, gone or changed."""
    lines = []
    pairs = [("table", recorded["table"], now["table"])]
    pairs += [(arch, recorded["code"].get(arch, {}), each) for arch, each in now["code"].items()]
    for what, before, after in pairs:
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                lines.append(f"{what}: {name}: {before.get(name, 'not there')} -> {after.get(name, 'not there')}")
    return lines


def loop_changes(recorded: dict[str, dict[str, Loop]], now: dict[str, dict[str, Loop]]) -> list[Change]:
    found = []
    for gpu in GPUS:
        before, after = recorded.get(gpu.arch, {}), now[gpu.arch]
        for name in sorted(before.keys() | after.keys()):
            what = f"{name} on {gpu.arch}"
            if name not in before or name not in after:
                found.append(Change(f"{what} is {'new' if name in after else 'gone'}", worse=False))
                continue
            one, other = before[name], after[name]
            reason = f", {_classes(one.trip, other.trip)}"
            found += _more(f"{what}: instructions to {other.unit}", one.instructions, other.instructions, reason)
            limit, limit_now = bound(one.trip, gpu), bound(other.trip, gpu)
            reason = f", bound by {limit.by}, then {limit_now.by}"
            found += _more(f"{what}: share of the peak of {gpu.name}", limit.share, limit_now.share, reason, up=False)
            reason = f", registers {one.registers} -> {other.registers}"
            found += _more(f"{what}: blocks on a multiprocessor", one.blocks(gpu), other.blocks(gpu), reason, up=False)
    return found


def layer_changes(recorded: Layers, now: Layers) -> list[Change]:
    found = [Change(f"{conv} is new", worse=False) for conv in now.keys() - recorded.keys()]
    for conv in now.keys() & recorded.keys():
        for key, texts in now[conv].items():
            for batch, before, after in zip(BATCHES, recorded[conv].get(key, []), texts, strict=True):
                reason = f": {before} -> {after}"
                what = f"{conv}, {key}, batch {batch}: microseconds"
                found += _more(what, before.microseconds, after.microseconds, reason)
    return sorted(found, key=str)


def _more(what: str, before: float, after: float, reason: str, up: bool = True) -> list[Change]:
    """What became of a number that should be small or, unless `up` is what is worse, large."""
    if abs(after - before) <= TOLERATED * before:
        return []
    return [Change(f"{what} {before:.4g} -> {after:.4g}{reason}", worse=(after > before) == up)]


def _classes(before: Trip, after: Trip) -> str:
    """The classes of instructions that changed, the most first."""
    kinds = before.counts.keys() | after.counts.keys()
    changes = {kind: after.counts.get(kind, 0) - before.counts.get(kind, 0) for kind in kinds}
    ranked = sorted(changes.items(), key=lambda item: (-abs(item[1]), item[0]))
    return ", ".join(f"{kind} {change:+d}" for kind, change in ranked if change) or "the same instructions"
