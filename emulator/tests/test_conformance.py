"""What the emulator takes instructions to do, held against numpy, torch and CuTe; and the program that asks a GPU."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("ninja", reason="the emulator is built by ninja")
from conformance_words import CPU, as_dtype, assert_same, given

import emulator
from emulator import conformance
from emulator.conformance import EMULATED
from fastconv.operators import backends, kernels
from fastconv.qualification import conformance as checking
from fastconv.qualification import conformance_cases

# ---- numbers, as torch has them


@pytest.mark.parametrize(("name", "dtype"), [("Half", torch.float16), ("BFloat16", torch.bfloat16)])
def test_16_bit_numbers(program, output, name, dtype):
    values = as_dtype(given(program, f"pack2<{name}>"), torch.float32)
    packed = as_dtype(output[f"pack2<{name}>"], dtype).view(-1, 2)
    assert_same(packed, torch.stack([values, values * -1.5], 1).to(dtype))
    pairs = as_dtype(given(program, f"unpack2<{name}>.x"), dtype).view(-1, 2).float()
    for column, part in enumerate("xy"):
        assert_same(as_dtype(output[f"unpack2<{name}>.{part}"], torch.float32), pairs[:, column])


def test_every_half(program):
    """Those that are not a float's upper or lower half in the cases above."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.uint32)
    for words in halves.reshape(-1, 256):
        values = program.run_words("unpack2<Half>.x", words), program.run_words("unpack2<Half>.y", words)
        for column, part in enumerate(values):
            expected = as_dtype(words, torch.float16).view(-1, 2)[:, column].float()
            assert_same(as_dtype(part, torch.float32), expected)
            # And back: the exact value, -1.5 times it being another half.
            assert_same(as_dtype(program.run_words("pack2<Half>", part), torch.float16)[::2], expected.half())


def test_tf32_is_rounded_to_nearest(program, output):
    values = given(program, "to_tf32").view(np.float32).astype(np.float64)
    rounded = output["to_tf32"]
    finite = np.isfinite(values) & (np.abs(values) > 1e-30) & (np.abs(values) < 1e38)
    assert (rounded[finite] & 0x1FFF == 0).all()
    error = np.abs(rounded[finite].view(np.float32).astype(np.float64) - values[finite])
    assert (error <= np.abs(values[finite]) * 2.0**-11).all()
    tie = np.float32([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11])
    words = np.resize(tie, 256).view(np.uint32)
    away = np.float32([1 + 2.0**-10, -1 - 2.0**-10, 1 + 2 * 2.0**-10])
    assert (program.run_words("to_tf32", words).view(np.float32)[:3] == away).all()


@pytest.mark.parametrize(("name", "function"), [("relu", torch.relu), ("relu6", torch.nn.functional.relu6)])
def test_activations(program, output, name, function):
    values = as_dtype(given(program, f"activate {name}"), torch.float32).requires_grad_()
    result = function(values)
    assert_same(as_dtype(output[f"activate {name}"], torch.float32), result.detach())
    values = as_dtype(given(program, f"passes_gradient {name}"), torch.float32)
    aten = {
        "relu": lambda g: torch.ops.aten.threshold_backward(g, values, 0),
        "relu6": lambda g: torch.ops.aten.hardtanh_backward(g, values, 0.0, 6.0),
    }
    passes = aten[name](torch.ones_like(values))
    # At a NaN aten's hardtanh_backward says one thing on the CPU and, as this one, another on a GPU.
    ours = torch.from_numpy(output[f"passes_gradient {name}"].astype(np.float32))
    assert (ours[values.isnan()] == 1).all()
    assert_same(ours[~values.isnan()], passes[~values.isnan()])


# ---- data that moves


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(program, output, size):
    rows = given(program, f"cp_async<{size}>").reshape(32, -1)
    expected = rows[np.arange(32) ^ 9]
    expected[::3] = 0
    assert (output[f"cp_async<{size}>"].reshape(32, -1) == expected).all()


def test_shuffles(program, output):
    words, lane = given(program, "shuffles"), np.arange(32)
    segment = lane // 8 * 8
    sources = [lane ^ 5, lane * 7 % 32, segment + (lane + 3) % 8, np.where(lane < 3, lane, lane - 3)]
    sources += [np.where(lane % 16 + 5 < 16, lane + 5, lane)]
    for i, source in enumerate(sources):
        assert (output["shuffles"][32 * i :][:32] == words[source]).all(), i
    votes = sum(1 << i for i in range(32) if words[i] % 3 == 0)
    assert (output["shuffles"][192:] == votes).all()


def test_every_word_is_written(output):
    """By chance none of them is the mark, inputs being what they are. What boxes leave alone is told below."""
    unwritten = [name for name, words in output.items() if (words == conformance_cases.UNWRITTEN).any()]
    assert all(name.startswith("tma_store_") for name in unwritten)


# ---- fragments, as CuTe's host code lays them out


def to_words(values: np.ndarray, dtype: str) -> np.ndarray:
    """[lane, element] as registers, two to a word but for float32"""
    if dtype == "float32":
        return values.astype(np.float32).view(np.uint32)
    torch_dtype = getattr(torch, dtype)
    return torch.from_numpy(values.astype(np.float32)).to(torch_dtype).view(torch.int16).numpy().view(np.uint32)


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("mma_m16n8k16<Half>", "float16", 16),
        ("mma_m16n8k16<BFloat16>", "bfloat16", 16),
        ("mma_m16n8k8_tf32", "float32", 8),
    ],
)
def test_mma_fragments_are_those_of_cute(program, layouts, name, dtype, depth):
    random = np.random.default_rng(0)
    a, b, d = (random.integers(-8, 9, shape) for shape in ((16, depth), (8, depth), (16, 8)))
    # CuTe counts positions along the first index.
    lanes = [matrix.T.reshape(-1)[layouts[f"{name} {operand}"]] for matrix, operand in ((a, "a"), (b, "b"), (d, "d"))]
    words = [to_words(lanes[0], dtype), to_words(lanes[1], dtype), to_words(lanes[2], "float32")]
    result = program.run_words(name, np.concatenate([part.reshape(-1) for part in words]))
    expected = (a @ b.T + d).T.reshape(-1)[layouts[f"{name} d"]]
    assert (result.view(np.float32).reshape(32, 4) == expected).all()


@pytest.mark.parametrize("name", ["ldmatrix_x2", "ldmatrix_x4", "ldmatrix_x2_trans", "ldmatrix_x4_trans"])
def test_ldmatrix_is_that_of_cute(program, layouts, name):
    matrices = int(name[10])
    elements = np.arange(512, dtype=np.uint16)
    # Lane l gives the address of row l ^ 5, rows being 16 elements apart.
    rows = elements.reshape(32, 16)[np.arange(32) ^ 5][: 8 * matrices, :8]
    at = {position: rows[lane, i] for (lane, i), position in np.ndenumerate(layouts[f"{name} source"][: 8 * matrices])}
    expected = np.vectorize(at.__getitem__)(layouts[f"{name} destination"])
    result = program.run_words(name, elements.view(np.uint32)).view(np.uint16)
    assert (result.reshape(32, 2 * matrices) == expected).all()


def test_low_bits_of_tf32_operands_do_not_count(program, output):
    words = given(program, "mma_m16n8k8_tf32, low bits set")
    assert (words[:192] & 0x1FFF).any()
    cleared = words.copy()
    cleared[:192] &= 0xFFFFE000
    assert (program.run_words("mma_m16n8k8_tf32", cleared) == output["mma_m16n8k8_tf32, low bits set"]).all()


# ---- what a user's GPU is compared with


def test_every_instruction_has_a_case(program):
    """And a kernel that uses it."""
    tried = {instruction for case in program.cases.values() for instruction in case.uses}
    used = {instruction for kernel in kernels.table(EMULATED) for instruction in kernel["uses"]}
    assert tried == used


def test_each_case_tries_what_it_says(program, words):
    library = emulator.library()
    for name in words:
        library.reset_statistics()
        conformance.run(EMULATED, name)
        assert set(program.cases[name].uses) <= set(library.statistics()["instructions"][name]), name


def test_the_expected_words_are_those_of_the_emulator(program, words):
    expected = conformance_cases.expected()
    assert list(expected) == list(program.cases), "python emulator/conformance.py --expected"
    differences = [conformance_cases.difference(program.cases[name], words[name], expected[name]) for name in words]
    assert not any(differences), "python emulator/conformance.py --expected"


def test_other_words_are_not_the_expected_ones(program, words):
    """One bit of one word, in each case; where the last bits are the hardware's own, a higher one."""
    expected = conformance_cases.expected()
    for name, right in words.items():
        case = program.cases[name]
        wrong = list(right)
        wrong[len(wrong) // 3] ^= 1 << 30 if case.exact else 1 << 12
        said = conformance_cases.difference(case, wrong, expected[name])
        assert said.startswith(f"{name}: "), name
        if not case.exact:
            assert f"1 of {len(wrong)} words, word {len(wrong) // 3}: " in said
            wrong[len(wrong) // 3] = right[len(wrong) // 3] ^ 1
            assert conformance_cases.difference(case, wrong, expected[name]) == ""


def test_a_nan_has_any_bits(program, words):
    case, output = program.cases["activate relu"], words["activate relu"]
    assert 0x7FC00000 in output
    other = [0xFFC00001 if word == 0x7FC00000 else word for word in output]
    assert conformance_cases.difference(case, other, conformance_cases.expected()[case.name]) == ""
    assert conformance_cases.compared(case, other, output) == ""


# ---- the comparison with a GPU


def test_compare_finds_a_difference(words):
    assert conformance.compare(words, words, 90) == []
    other = dict(words)
    other["cp_async<16>"] = [words["cp_async<16>"][0] ^ 1, *words["cp_async<16>"][1:]]
    other["powf"] = (np.array(words["powf"], np.uint32).view(np.float32) * np.float32(1.001)).view(np.uint32).tolist()
    del other["shuffles"]
    problems = conformance.compare(words, other, 90)
    assert [problem.partition(":")[0] for problem in problems] == ["cp_async<16>", "powf", "shuffles"]
    assert "1 of 128 words, word 0" in problems[0]


def test_recorded_words_of_gpus(words):
    files = sorted(conformance.GOLDENS.glob("*.json"))
    if not files:
        pytest.skip("no GPU has run the conformance program yet (emulator/conformance.py --record)")
    for file in files:
        document = json.loads(file.read_text())
        assert conformance.compare(words, document["cases"], document["arch"]) == [], file.name


@pytest.mark.parametrize(("arch", "has_sm90a"), [(80, False), (86, False), (90, True), (100, False)])
def test_cases_for_other_gpus_are_left_out(program, words, monkeypatch, arch, has_sm90a):
    """Where a GPU is asked, by `fastconv.qualify` too, and where it is compared."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
    found = conformance_cases.possible(program.cases, torch.device("cuda"))
    assert "shuffles" in found
    assert ("mbarrier" in found) == has_sm90a
    assert conformance_cases.possible(program.cases, CPU) == program.cases
    theirs = {name: words[name] for name in words if name in found}
    assert conformance.compare(words, theirs, arch) == []
    monkeypatch.setattr(backends, "is_possible", lambda name, device: name == EMULATED)
    monkeypatch.setattr(backends, "available", lambda: {EMULATED: None})
    (answer,) = checking.answers({"among": None}, torch.device("cuda"))
    assert answer["cases"].keys() == found.keys()


def test_each_case_asks_the_gpu_by_itself(program, words, tmp_path, monkeypatch):
    """One that ends its process costs the others nothing. The emulator stands in for the GPU."""
    some = ["shuffles", "to_tf32", "activate relu"]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntest "$3" = shuffles && kill -9 $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(conformance.sys, "executable", str(python))
    monkeypatch.setattr(conformance, "cases", lambda _: {name: program.cases[name] for name in some})
    found, failed = conformance.ask_gpu(EMULATED)
    assert found == {name: words[name] for name in some[1:]}
    assert failed == ["shuffles: it ended with status -9"]


def test_what_differs_on_a_gpu_is_said_once(words, tmp_path, monkeypatch, capsys):
    """What it has just recorded is not compared a second time; what another GPU recorded, is."""
    changed = words | {"shuffles": [word ^ 1 for word in words["shuffles"]]}
    missing = changed.pop("to_tf32")
    other = words | {"to_tf32": [word + 1 for word in missing]}
    (tmp_path / "other.json").write_text(json.dumps({"arch": 90, "cases": other}))
    monkeypatch.setattr(conformance, "GOLDENS", tmp_path)
    monkeypatch.setattr(conformance, "ask_gpu", lambda: (changed, ["to_tf32: it hangs"]))
    monkeypatch.setattr(conformance.backends, "problem", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(sys, "argv", ["conformance.py", "--record"])
    assert conformance.main() == 1
    *_, crash, difference, other = capsys.readouterr().out.splitlines()
    assert crash == "Some GPU: to_tf32: it hangs"
    assert difference.startswith("Some GPU: shuffles: ")
    assert other.startswith("other.json: to_tf32: ")
    recorded = json.loads((tmp_path / "some-gpu.json").read_text())
    assert (recorded["cases"], recorded["arch"]) == (changed, 90)
