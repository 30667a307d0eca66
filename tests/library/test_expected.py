"""What is expected of the CUDA kernels, as benchmarks/expected has it, against what is built and planned here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ninja", reason="the build's own requirements are not installed here")
from support.kernel_backends import emulated
from support.tools import expected, gpu_model, machine_code, sass_tables, zoo_convolutions

Loops = dict[str, dict[str, expected.Loop]]
A100, H100 = gpu_model.GPUS
RECORD = "python tools/sass.py --write records what is meant"


def told(changes: list[expected.Change]) -> str:
    return "\n".join(map(str, [*changes, RECORD])) if changes else ""


# -------------------------------------------------------------------------------------- what is recorded


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_library")
def test_loops_are_those_recorded() -> None:
    emulated()
    nvcc = expected.recorded_resources()["nvcc"]
    if nvcc != expected.nvcc_version():
        pytest.skip(f"recorded with nvcc {nvcc}, built with {expected.nvcc_version()}")
    changes = expected.loop_changes(expected.recorded_loops(), expected.loops())
    assert not changes, told(changes)


def test_plans_are_those_recorded() -> None:
    """With the kernels as they are recorded: nothing but the emulator is built for this."""
    emulated()
    changes = expected.layer_changes(expected.recorded_layers(), expected.layers(expected.recorded_loops()))
    assert not changes, told(changes)


def test_the_readme_shows_what_is_recorded() -> None:
    assert sass_tables.shown() == sass_tables.markdown(), RECORD
    assert sass_tables.HOPPER.read_text() == sass_tables.hopper(expected.recorded_layers()), RECORD


@pytest.mark.parametrize("network", zoo_convolutions.NETWORKS)
def test_the_convolutions_are_those_of_the_networks(network: str) -> None:
    if network.startswith("torchvision:"):
        pytest.importorskip("torchvision", exc_type=ImportError)
    name = network.rpartition(":")[2]
    found = zoo_convolutions.convolutions(network)
    assert zoo_convolutions.load()[name] == found, "python tools/zoo_convolutions.py writes them"


# -------------------------------------------------------------------------------------- what is noticed


def with_trip(loops: Loops, arch: str, name: str, counts: Mapping[str, int]) -> Loops:
    """With so many more instructions of these classes in a loop."""
    loop = loops[arch][name]
    more = {**loop.trip.counts, **{kind: loop.trip.counts.get(kind, 0) + n for kind, n in counts.items()}}
    return {**loops, arch: {**loops[arch], name: replace(loop, trip=replace(loop.trip, counts=more))}}


def test_a_change_of_a_loop_is_noticed() -> None:
    """With its reason: of the kernel that the issue slots bind both numbers, of another the instructions alone."""
    loops = expected.recorded_loops()
    assert expected.loop_changes(loops, loops) == []
    name = next(name for name, loop in loops["sm_80"].items() if gpu_model.bound(loop.trip, A100).by == "issue")
    all_of_it = loops["sm_80"][name].trip.instructions
    slightly = with_trip(loops, "sm_80", name, {"address": all_of_it // 25})
    assert expected.loop_changes(loops, slightly) == []
    more = all_of_it // 10
    worse = with_trip(loops, "sm_80", name, {"address": more})
    first, second = expected.loop_changes(loops, worse)
    assert first.worse
    assert str(first).startswith(f"worse: {name} on sm_80: instructions to ")
    assert str(first).endswith(f", address +{more}")
    assert second.worse
    assert "share of the peak of A100" in str(second)
    assert str(second).endswith(", bound by issue, then issue")
    back = expected.loop_changes(worse, loops)
    assert [change.worse for change in back] == [False, False]
    assert str(back[0]).startswith(f"to record: {name}")


def test_fewer_blocks_are_noticed() -> None:
    loops = expected.recorded_loops()
    name, loop = next((name, loop) for name, loop in loops["sm_80"].items() if loop.blocks(A100) > 1)
    fat = {**loops, "sm_80": {**loops["sm_80"], name: replace(loop, registers=255)}}
    (change,) = expected.loop_changes(loops, fat)
    assert change.worse
    assert f"blocks on a multiprocessor {loop.blocks(A100)} -> " in str(change)
    assert str(change).endswith(f"registers {loop.registers} -> 255")


def test_kernels_that_come_and_go_are_noticed() -> None:
    loops = expected.recorded_loops()
    name = next(iter(loops["sm_90a"]))
    fewer = {**loops, "sm_90a": {other: loop for other, loop in loops["sm_90a"].items() if other != name}}
    assert [str(change) for change in expected.loop_changes(loops, fewer)] == [f"to record: {name} on sm_90a is gone"]
    assert [str(change) for change in expected.loop_changes(fewer, loops)] == [f"to record: {name} on sm_90a is new"]


def test_a_change_of_a_layer_is_noticed() -> None:
    layers = expected.recorded_layers()
    assert expected.layer_changes(layers, layers) == []
    conv, key = next((conv, key) for conv, each in layers.items() for key in each)
    first, *others = layers[conv][key]
    for factor, worse in ((1.04, None), (1.06, True), (0.94, False)):
        changed = {
            **layers,
            conv: {**layers[conv], key: [replace(first, microseconds=factor * first.microseconds), *others]},
        }
        found = expected.layer_changes(layers, changed)
        assert [change.worse for change in found] == ([] if worse is None else [worse])
        assert all(f"{conv}, {key}, batch 1" in str(change) and str(first) in str(change) for change in found)
    without = {other: each for other, each in layers.items() if other != conv}
    assert [str(change) for change in expected.layer_changes(without, layers)] == [f"to record: {conv} is new"]


@pytest.mark.parametrize(
    "layer",
    [
        expected.Layer("128x128", 96, 1, 8, 0.95, 0.89, 1.702, 1.0),
        expected.Layer("64x64_masked", 384, 4, 1, 1.0, 0.5, 123.4, 0.87),
    ],
    ids=str,
)
def test_layers_are_read_as_they_are_written(layer: expected.Layer) -> None:
    assert expected.Layer.parse(str(layer)) == layer


def test_a_plan_of_an_unknown_kernel_is_noticed() -> None:
    emulated()
    conv = next(iter(expected.recorded_layers()))
    with pytest.raises(LookupError, match=r"was chosen for .*, but loops\.json does not have it"):
        expected.layer(conv, "fprop", 1, A100, {})


def test_measured_times_are_found_by_their_layers(tmp_path: Path) -> None:
    """As make gpu-results writes them; other contenders, directions and ops are passed over."""
    row = {"case": "a", "op": "conv2d_relu", "layer": "resnet50/layer3.1.conv2", "batch": 32, "dtype": "fp16"}
    row |= {"contender": "fastconv", "layout": "channels_last", "direction": "forward", "median_s": 2e-3}
    others = [{"contender": "eager"}, {"direction": "backward"}, {"op": "add_relu", "layer": "resnet50/layer1.0.relu"}]
    file = tmp_path / "results.jsonl"
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in [{"gpu": "H100"}, row, *({**row, **o} for o in others)])
    )
    times = sass_tables.measured(file)
    assert list(times.values()) == [2e-3]
    table = sass_tables.layers("resnet50", expected.recorded_layers(), times)
    measured = {row[0]: row[-1] for row in table.rows if row[-1]}
    assert measured == {"256x14 k256 3x3": "2000"}


# -------------------------------------------------------------------------------------- machine code

SASS = """
        Function : _Z4loopv
    .headerflags    @"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
                                                                /* 0x000fe40000000f00 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;      /* 0x0 */
        /*0020*/              @!P0 BRA 0x40 ;                   /* 0x0 */
        /*0030*/              @!PT LDS RZ, [RZ] ;               /* 0x0 */
        /*0040*/                   LDSM.16.M88.4 R4, [R3] ;     /* 0x0 */
        /*0050*/               @P1 BRA 0x80 ;                   /* 0x0 */
        /*0060*/                   LDS.64 R8, [R3] ;            /* 0x0 */
        /*0070*/                   FADD R8, R8, R9 ;            /* 0x0 */
        /*0080*/                   HMMA.16816.F32 R4, R4, R6, R4 ;  /* 0x0 */
        /*0090*/                   LOP3.LUT P2, RZ, R2, 0x1, RZ, 0xc0, !PT ;  /* 0x0 */
        /*00a0*/                   LOP3.LUT R2, R2, 0x1, RZ, 0xc0, !PT ;  /* 0x0 */
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R17], [R8.64], P1 ;  /* 0x0 */
        /*00c0*/               @P2 BRA 0x40 ;                   /* 0x0 */
        /*00d0*/                   STG.E.U16 [R2.64], R4 ;      /* 0x0 */
        /*00e0*/               @P3 BRA 0x10 ;                   /* 0x0 */
        /*00f0*/                   EXIT ;                       /* 0x0 */
        /*0100*/                   BRA 0x100;                   /* 0x0 */
"""


def test_loops_of_machine_code() -> None:
    (code,) = machine_code.parse(SASS).values()
    assert [(loop.begin, loop.end) for loop in machine_code.loops(code)] == [(0x40, 0xC0), (0x10, 0xE0)]
    loop = machine_code.main_loop(code)
    assert loop is not None
    assert (loop.begin, loop.end) == (0x40, 0xC0)
    assert loop.counts == Counter(ldsm=1, branch=2, shared=1, float=1, tensor=1, predicate=1, address=1, copy=1)
    moved = {instruction.name: instruction.bytes for instruction in code}
    assert moved["LDS"] == 0
    assert moved["LDS.64"] == 256
    assert moved["LDSM.16.M88.4"] == moved["LDGSTS.E.BYPASS.128"] == 512
    assert moved["STG.E.U16"] == 64


MOVING = """
        Function : _Z4movev
        /*0000*/              @!P0 BRA 0x70 ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/               @P1 BRA 0x50 ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   STG.E.128 [R2.64], R4 ;
        /*0060*/                   EXIT ;
        /*0070*/                   LDG.E.U16 R4, [R2.64] ;
        /*0080*/                   STG.E.U16 [R2.64], R4 ;
        /*0090*/               @P2 BRA 0x70 ;
        /*00a0*/                   EXIT ;
"""


def test_the_way_of_kernels_that_move_data() -> None:
    """Past the ragged end and what may be left out, through the widest loads and stores."""
    (code,) = machine_code.parse(MOVING).values()
    way = machine_code.moving(code)
    assert [instruction.address for instruction in way] == [0x00, 0x10, 0x20, 0x50, 0x60]
    assert machine_code.stored(way) == machine_code.loaded(way) == 512


# -------------------------------------------------------------------------------------- the model


def test_bounds() -> None:
    """Of fprop's tile of 128x128 and a copy, as one computes them by hand."""
    gemm = gpu_model.Trip({"tensor": 32, "ldsm": 12, "copy": 4, "address": 172}, shared=64, loaded=2048)
    assert gpu_model.bound(gemm, A100).share == 1
    assert gpu_model.bound(gemm, H100) == gpu_model.Bound("shared", 0.5)
    assert gpu_model.bound(replace(gemm, shared=32, loaded=0), H100).by == "issue"
    assert gpu_model.bound(replace(gemm, counts={"tensor": 32}, shared=0, loaded=0), H100).share == pytest.approx(0.62)
    # A warp's stage of 128x256x64 with wgmma: 1024 clocks for two warps of a quarter, 48 KiB from L2
    boxes = gpu_model.Trip({"tensor": 128, "address": 80}, 128, 48 * 1024 // 8, asynchronous=True)
    assert gpu_model.bound(boxes, H100).by == "L2"
    assert gpu_model.bound(boxes, H100).share == pytest.approx(1024 / (48 * 1024 * 132 / 5120))
    assert gpu_model.bound(replace(boxes, loaded=0), H100).share == 1
    copy = gpu_model.Trip({"global": 2, "address": 4}, 0, 512, moved=1024)
    assert gpu_model.bound(copy, A100) == gpu_model.Bound("memory", 1)
    slow = gpu_model.bound(replace(copy, counts={"address": 845}), H100)
    assert slow.by == "issue"
    assert slow.share == pytest.approx(4 * 1024 / 845 * 132 * 1.755e9 / 3e12)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(150, 256, 48 << 10, 1), (128, 256, 48 << 10, 2), (32, 256, 0, 8), (40, 128, 32 << 10, 4), (16, 32, 0, 32)],
)
def test_blocks_on_a_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert gpu_model.blocks_per_multiprocessor(A100, registers, threads, shared) == blocks


def test_peaks() -> None:
    """Those that NVIDIA names; the H100's at the clock that it keeps."""
    assert A100.flop_per_second == pytest.approx(312e12, rel=0.01)
    assert H100.flop_per_second == pytest.approx(989e12 * 1.755 / 1.83, rel=0.01)
