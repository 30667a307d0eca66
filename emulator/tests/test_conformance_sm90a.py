"""What the emulator takes the instructions of sm_90a to do, held against numpy and CuTe."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("ninja", reason="the emulator is built by ninja")
from conformance_words import as_dtype, given

from fastconv.qualification import conformance_cases

# ---- warps that wait for each other, registers


@pytest.mark.parametrize("name", ["mbarrier", "mbarrier, 3 places"])
def test_mbarrier(program, output, name):
    assert (output[name].reshape(-1, 32) == given(program, name).reshape(-1, 32)[:, ::-1]).all()


def test_mbarriers_expect_boxes(program, output):
    rows = given(program, "mbarrier_arrive_expect").view(np.uint16).reshape(-1, 64)
    assert (output["mbarrier_arrive_expect"].view(np.uint16).reshape(-1, 64) == swizzled(rows)).all()


def test_named_barriers(program, output):
    words, thread = given(program, "named_barrier_sync"), np.arange(128)
    rounds = [words]
    for _ in range(5):
        rounds.append(3 * rounds[-1] + rounds[-1][thread ^ 37])
    assert (output["named_barrier_sync"] == np.where(thread < 64, rounds[3], rounds[5])).all()


def test_registers_that_warpgroups_hand_each_other(program, output):
    name = "registers_decrease, registers_increase"
    words, thread = given(program, name), np.arange(384)
    for count, some in ((12, thread < 128), (190, thread >= 128)):
        mixed = [words[(thread + i) % 384] for i in range(count)]
        for i in [*range(count)] * 3:
            mixed[i] = 5 * mixed[i] + mixed[(i + 7) % count]
        total = np.zeros(384, np.uint32)
        for word in mixed:
            total = 3 * total + word
        assert (output[name] == total)[some].all()


# ---- boxes of tensors


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of 64 elements as a box has them, and back: chunk c of row r lies at chunk c ^ r % 8."""
    row = np.arange(len(rows))[:, None]
    return rows.reshape(-1, 8, 8)[row, np.arange(8) ^ row % 8].reshape(rows.shape)


def box(size: Sequence[int], stride: Sequence[int], extent: Sequence[int], at: Sequence[int]) -> np.ndarray:
    """[row, channel] of a box: which element of the tensor it is, -1 for none. The innermost dimension comes first, as
    in csrc/cuda/runtime/tensor_map.h."""
    axes = [np.arange(first, first + count) for first, count in zip(at, (64, *extent), strict=True)]
    grid = np.meshgrid(*reversed(axes), indexing="ij")[::-1]
    inside = np.logical_and.reduce([(along >= 0) & (along < most) for along, most in zip(grid, size, strict=True)])
    element = sum(along * step for along, step in zip(grid, (1, *stride), strict=True))
    return np.where(inside, element, -1).reshape(-1, 64)


def pixels(image, strides, first, step, count, pixels, at, offset, *, rows_first=False) -> np.ndarray:
    """The same of a box of pixels. All but `at`, a channel, an image, a row and a column of the walk, have rows before
    columns. `rows_first`: as a GPU would walk that takes the corners in that order, the library's having columns first.
    """
    (n, h, w, c), (channel, number, *place) = image, at
    last = [first[axis] + (count[axis] - 1) * step[axis] for axis in (0, 1)]
    lower, upper = list(first), [last[0] - (h - 1), last[1] - (w - 1)]
    if rows_first:
        lower, upper = lower[::-1], upper[::-1]
    y, x = (first[axis] + place[axis] * step[axis] for axis in (0, 1))
    channels = channel + np.arange(64)
    rows = []
    for _ in range(pixels):
        row, column = y + offset[0], x + offset[1]
        element = np.dot(strides, (number, row, column)) + channels
        inside = (channels < c) & (number < n and 0 <= row < h and 0 <= column < w)
        rows.append(np.where(inside, element, -1))
        x += step[1]
        if x > w - 1 + upper[1]:
            x, y = lower[1], y + step[0]
        if y > h - 1 + upper[0]:
            y, number = lower[0], number + 1
    return np.stack(rows)


# As csrc/cuda/conformance/sm90a/boxes.cu has them
LOADED = {
    "tma_load_2d": box((64, 16), (64,), (8,), (0, 3)),
    "tma_load_2d, 6 channels left": box((70, 20), (88,), (16,), (64, 0)),
    "tma_load_2d, before the first": box((72, 20), (72,), (16,), (-24, -5)),
    "tma_load_2d, past the last": box((72, 20), (80,), (16,), (32, 18)),
    "tma_load_2d, outside": box((64, 4), (64,), (8,), (0, 100)),
    "tma_load_3d": box((64, 5, 4), (64, 320), (3, 2), (0, 1, 1)),
    "tma_load_3d, edges": box((90, 5, 4), (104, 624), (4, 3), (40, -1, 2)),
}
STORED = {
    "tma_store_2d": box((72, 12), (80,), (8,), (0, 2)),
    "tma_store_2d, past the last": box((70, 12), (88,), (16,), (40, 5)),
    "tma_store_2d, before the first": box((64, 8), (64,), (8,), (-16, -3)),
    "tma_store_3d": box((64, 5, 3), (64, 320), (4, 2), (0, 1, 1)),
    "tma_store_3d, edges": box((90, 5, 3), (104, 624), (4, 2), (40, -2, 2)),
}
WALKS = {
    "3x3": ((2, 9, 7, 64), (4032, 448, 64), (-1, -1), (1, 1), (9, 7), 72, (0, 0, 0, 0), (0, 0)),
    "3x3, from the middle": ((2, 9, 7, 64), (4032, 448, 64), (-1, -1), (1, 1), (9, 7), 40, (0, 0, 3, 5), (2, 2)),
    "3x3, stride 2, past the last image": (
        *((2, 9, 7, 40), (3024, 336, 48), (-1, -1), (2, 2), (5, 4), 40, (0, 0, 2, 1), (1, 2)),
    ),
    "3x3, dilation 2, 6 channels left": (
        *((3, 8, 8, 70), (4608, 576, 72), (-2, -2), (1, 1), (8, 8), 24, (64, 1, 7, 3), (4, 2)),
    ),
    "5x1: columns first": ((2, 9, 7, 64), (4032, 448, 64), (-2, 0), (1, 1), (9, 7), 32, (0, 0, 0, 0), (1, 0)),
    "5x3, stride 2x1, dilation 1x2: columns first": (
        *((1, 13, 6, 40), (3120, 240, 40), (-2, 0), (2, 1), (7, 2), 16, (0, 0, 1, 1), (3, 2)),
    ),
    "1x7, stride 1x3: columns first": (
        *((2, 8, 8, 16), (1024, 128, 16), (0, -3), (1, 3), (8, 3), 32, (0, 0, 1, 0), (0, 4)),
    ),
    "a part of each image: columns first": (
        *((2, 6, 10, 64), (3840, 640, 64), (1, -2), (1, 1), (4, 3), 16, (0, 0, 3, 1), (2, 1)),
    ),
    "stride 8: columns first": ((4, 1, 20, 96), (1920, 1920, 96), (0, 0), (8, 8), (1, 3), 8, (32, 1, 0, 2), (0, 3)),
    "256 pixels: columns first": (
        *((2, 16, 16, 8), (2048, 128, 8), (-1, 0), (1, 1), (16, 16), 256, (0, 0, 4, 9), (1, 0)),
    ),
}
LOADED |= {f"tma_load_im2col, {name}": pixels(*walk) for name, walk in WALKS.items()}


@pytest.mark.parametrize("name", LOADED)
def test_boxes_that_are_loaded(program, output, name):
    elements, at = given(program, name).view(np.uint16), LOADED[name]
    rows = np.where(at < 0, 0, elements[at])
    assert (output[name].view(np.uint16).reshape(-1, 64) == swizzled(rows)).all()


@pytest.mark.parametrize("name", STORED)
def test_boxes_that_are_stored(program, output, name):
    rows, at = swizzled(given(program, name).view(np.uint16).reshape(-1, 64)), STORED[name]
    expected = np.full(len(output[name]), conformance_cases.UNWRITTEN, np.uint32).view(np.uint16)
    expected[at[at >= 0]] = rows[at >= 0]
    assert (output[name].view(np.uint16) == expected).all()


@pytest.mark.parametrize("name", ["fence_proxy_async", "tma_store_wait_read"])
def test_boxes_that_are_stored_in_turns(program, output, name):
    assert (output[name] == given(program, name)).all()


def test_every_box_is_held_against_numpy(program):
    boxes = {name for name, case in program.cases.items() if case.uses in {("tma_tiled",), ("tma_im2col",)}}
    assert boxes == LOADED.keys()


@pytest.mark.parametrize("name", WALKS)
def test_walks_tell_which_corner_is_first(name):
    """A GPU that takes rows first fails the cases that say so."""
    differs = (pixels(*WALKS[name], rows_first=True) != LOADED[f"tma_load_im2col, {name}"]).any()
    assert differs == ("columns first" in name)


# ---- matrices and products


def test_stmatrix(program, output):
    words = given(program, "stmatrix_x4")
    fragments, expected = words[:128].reshape(8, 4, 4), words[128:].reshape(32, 8).copy()
    for lane in range(32):
        expected[lane ^ 5, :4] = fragments[lane % 8, :, lane // 8]
    assert (output["stmatrix_x4"].reshape(32, 8) == expected).all()


def test_transposed_stmatrix(program, output):
    words = given(program, "stmatrix_x4_trans")
    # [row and two columns, matrix], then [matrix, row, column]
    fragments = words[:128].reshape(32, 4).T.copy().view(np.uint16).reshape(4, 8, 8)
    expected = words[128:].view(np.uint16).reshape(32, 16).copy()
    for lane in range(32):
        expected[lane ^ 5, :8] = fragments[lane // 8, :, lane % 8]
    assert (output["stmatrix_x4_trans"].view(np.uint16).reshape(32, 16) == expected).all()


def wgmma_place(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """[thread, number]: row and column of a sum, as csrc/cuda/ptx/sm90a.cuh says it"""
    thread, i = np.arange(128)[:, None], np.arange(columns // 2)
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (thread % 4) + i % 2


def wgmma_operands(words: np.ndarray, dtype: str, by_extent: Sequence[bool]) -> list[np.ndarray]:
    """[row or column, depth] of a and b"""
    values = as_dtype(words, {"Half": torch.float16, "BFloat16": torch.bfloat16}[dtype]).double().numpy()
    boxes = [part.reshape(-1, 64, 64) for part in (values[:4096], values[4096:])]
    turned = [part.swapaxes(1, 2) if turn else part for part, turn in zip(boxes, by_extent, strict=True)]
    return [part.reshape(-1, 64) for part in turned]


@pytest.mark.parametrize("dtype", ["Half", "BFloat16"])
@pytest.mark.parametrize("columns", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("end", "by_extent"),
    [
        ("", (False, False)),
        (", b by extent", (False, True)),
        (", a by extent", (True, False)),
        (", both by extent", (True, True)),
    ],
)
def test_wgmma(program, output, dtype, columns, end, by_extent):
    name = f"wgmma<{dtype}> of {columns} columns{end}"
    a, b = wgmma_operands(given(program, name), dtype, by_extent)
    assert (output[name].reshape(128, -1) == folded_sums(a, b)).all()


def folded_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What the cases make of 64 rows and some columns, [row or column, depth]."""
    columns = len(b)
    sums = a @ b.T + a[:, 16:48] @ b[:, 16:48].T
    mine = sums[wgmma_place(columns)] + np.arange(128)[:, None] - 3 * np.arange(columns // 2)
    folded = np.zeros((128, columns // 64), np.uint32)
    for number in mine.astype(np.float32).view(np.uint32).reshape(128, -1, 32).transpose(2, 0, 1):
        folded = 31 * folded + number
    return folded


FROM_ROWS = {
    # Whether a and b lie by extent; where b's columns begin, 64 at a time
    "wgmma<Half> from row 1": (False, False, [1, 65]),
    "wgmma<Half> from row 6, a by extent": (True, False, [6, 70]),
    "wgmma<Half> from rows 5, 6, 7, both by extent": (True, True, [5, 6, 7]),
    "wgmma<BFloat16> from rows 7, 10, 13, both by extent": (True, True, [7, 10, 13]),
}


@pytest.mark.parametrize("name", FROM_ROWS)
def test_wgmma_from_any_row(program, output, name):
    a_by_extent, b_by_extent, rows = FROM_ROWS[name]
    values = as_dtype(given(program, name), torch.bfloat16 if "BFloat16" in name else torch.float16).double().numpy()
    a, b = values[:4096].reshape(64, 64), values[4096:].reshape(-1, 64)
    parts = [b[row : row + 64] for row in rows]
    b = np.concatenate([part.T for part in parts] if b_by_extent else parts)
    assert (output[name].reshape(128, -1) == folded_sums(a.T if a_by_extent else a, b)).all()


@pytest.mark.parametrize("dtype", ["Half", "BFloat16"])
def test_wgmma_rounded(program, output, dtype):
    name = f"wgmma<{dtype}>, rounded"
    a, b = wgmma_operands(given(program, name), dtype, (False, False))
    mine = (a[:, :16] @ b[:, :16].T)[wgmma_place(64)][np.arange(128), np.arange(128) % 32]
    np.testing.assert_allclose(output[name].view(np.float32), mine, rtol=0, atol=conformance_cases.TOLERANCE)


# ---- clusters


def test_ranks(program, output):
    assert (output["cluster_rank"].reshape(4, 32) == given(program, "cluster_rank") + np.arange(4)[:, None]).all()


def test_arrivals_at_other_blocks(program, output):
    words = given(program, "mbarrier_arrive_at")[:5] * np.arange(1, 5, dtype=np.uint32)[:, None]
    assert (output["mbarrier_arrive_at"].reshape(4, 5) == words).all()


@pytest.mark.parametrize("mode", ["2d", "3d", "im2col"])
def test_boxes_for_several_blocks(program, output, mode):
    """Of four boxes both have the first two, each what the other one brought for it."""
    boxes = given(program, f"tma_multicast_{mode}").reshape(4, -1)
    assert (output[f"tma_multicast_{mode}"].reshape(2, 3, -1) == boxes[[[0, 1, 3], [0, 1, 2]]]).all()


# ---- as CuTe's host code has them


@pytest.mark.parametrize("name", ["stmatrix_x4", "stmatrix_x4_trans"])
def test_stmatrix_is_that_of_cute(program, layouts, name):
    elements = np.arange(256, dtype=np.uint16).reshape(32, 8)
    words = np.concatenate([elements.view(np.uint32).reshape(-1), np.zeros(256, np.uint32)])
    rows = program.run_words(name, words).view(np.uint16).reshape(32, 16)[np.arange(32) ^ 5, :8]
    at = {position: elements[place] for place, position in np.ndenumerate(layouts[f"{name} source"])}
    assert (rows == np.vectorize(at.__getitem__)(layouts[f"{name} destination"])).all()


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_sums_of_wgmma_lie_as_those_of_cute(layouts, columns):
    row, column = wgmma_place(columns)
    assert (layouts[f"wgmma {columns} d"] == row + 64 * column).all()


@pytest.mark.parametrize("extent", [64, 128, 192, 256])
def test_operands_of_wgmma_are_those_of_cute(program, layouts, extent):
    """Where their elements lie, and the descriptors: of the whole, and of what begins with the third 16 places."""
    place = swizzled(np.arange(64 * extent).reshape(-1, 64))
    by_extent = place.reshape(-1, 64, 64).swapaxes(1, 2).reshape(-1, 64)
    assert (layouts[f"wgmma {extent} by depth"] == place).all()
    assert (layouts[f"wgmma {extent} by extent"] == by_extent).all()
    lane = 0 if extent == 64 else 8  # what lies behind 64 rows or columns: nothing, or the next ones, 8192 bytes on
    for major, (kind, step) in enumerate((("depth", 32), ("extent", 2048))):
        for descriptor, first in zip(layouts[f"wgmma {extent} by {kind} descriptors"], (0, 2 * step), strict=True):
            words = program.run_words("wgmma_operand", np.full(32, first, np.uint32))
            assert words.view(np.uint64).reshape(32, 2)[lane, major] == descriptor
