"""The cases that tell whether a GPU's instructions do what the kernels were proved with: words in, words out.

The library has them, see csrc/cuda/conformance. What goes in is made here, from integers alone, the same everywhere and
at all times; what has to come out is in conformance.json, which the emulator of a checkout wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..operators import kernels

EXPECTED = Path(__file__).with_name("conformance.json")
# A kernel that leaves a word alone shows.
UNWRITTEN = 0xA5A5A5A5
# Of rounded results: float32 sums of at most 17 terms, powf and the approximations of roots, log2 and exp2
TOLERANCE = 1e-5

_NAN = 0x7FC00000
_SPECIAL = (
    *(0.0, -0.0, math.inf, -math.inf, math.nan, 6.0, -6.0, 65504.0, 65520.0, 65519.996, 6e-8, 3e-8, 6.1e-5, 1e-40),
    *(1.0009765625, 1.00048828125, 1.00390625, 1.001953125, 1.0004883, 3.4e38, 2.0**-133),
)
# The matrices a, b and d of a case, in elements, and how a and b lie in words
_MMA_SIZES = {"half": (256, 128, 128), "bfloat16": (256, 128, 128), "tf32": (128, 64, 128)}


@dataclass(frozen=True)
class Case:
    """Attributes:
    uses: the instructions that it tries, as `fastconv.operators.kernels.table` has them.
    input: the kind of its words, see `words`.
    exact: whether every bit counts; else `TOLERANCE` is allowed.
    arch: the GPUs that it is for, 80 for compute capability 8.0: that alone, or all from there on.
    only: whether that alone.
    """

    name: str
    uses: tuple[str, ...]
    input: str
    in_words: int
    out_words: int
    exact: bool
    arch: int
    only: bool

    def runs_on(self, arch: int) -> bool:
        return arch == self.arch if self.only else arch >= self.arch


def cases(backend: str) -> dict[str, Case]:
    """Those of a backend's library, by their names, in its order; none where it has no CUDA kernels."""
    library = kernels.library_of(backend)
    found = [] if library is None else library.conformance_cases()
    return {one["name"]: Case(**{**one, "uses": tuple(one["uses"])}) for one in found}


def arch_of(device: torch.device) -> int:
    """80 for a GPU of compute capability 8.0"""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def possible(among: dict[str, Case], device: torch.device) -> dict[str, Case]:
    """Those that the device can run: on a CPU, where they are emulated, all."""
    if device.type != "cuda":
        return among
    arch = arch_of(device)
    return {name: case for name, case in among.items() if case.runs_on(arch)}


# ----------------------------------------------------------------------------------------------- what goes in


def words(kind: str, count: int) -> list[int]:
    """The input of a case, as 32-bit words."""
    random = _random(len(kind))
    if kind == "bits":
        return list(itertools.islice(random, count))
    if kind == "positive floats":
        return [_float(word & 0x7FFFFFFF, -29, 29) for word in itertools.islice(random, count)]
    if kind == "floats":
        special = [_word_of(value) for value in _SPECIAL]
        return [*special, *(_float(next(random), -27, 27) for _ in range(count - len(special)))][:count]
    instruction, dtype, values = kind.split(" ", 2)
    fractions = values == "fractions"
    if instruction == "wgmma":
        return _packed([_factor(word, fractions) for word in itertools.islice(random, 2 * count)], dtype)
    a, b, d = ([_factor(next(random), fractions) for _ in range(size)] for size in _MMA_SIZES[dtype])
    if values == "low bits":
        # Were these 13 bits not ignored, the sums would be other ones.
        a, b = ([word | next(random) >> 19 for word in part] for part in (a, b))
    else:
        a, b = (_packed(part, dtype) for part in (a, b))
    return a + b + d


def _random(seed: int) -> Iterator[int]:
    """32-bit words of splitmix64."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ word >> 27) * 0x94D049BB133111EB) % 2**64
        yield (word ^ word >> 31) >> 32


def _float(word: int, low: int, high: int) -> int:
    """The word's sign and fraction, with an exponent of two in this range."""
    return word & 0x807FFFFF | (127 + low + (word >> 23 & 0xFF) % (high - low + 1)) << 23


def _factor(word: int, fractions: bool) -> int:
    """A float32 whose products and sums are exact, an integer from -8 to 8; or a fraction of either sign, so small that
    what hardware rounds away of their sums is within `TOLERANCE`."""
    return _float(word, -3, -1) if fractions else _word_of(float(word % 17 - 8))


def _packed(part: Sequence[int], dtype: str) -> list[int]:
    if dtype == "tf32":
        return [word & 0xFFFFE000 for word in part]
    if dtype == "bfloat16":
        halves = [word >> 16 for word in part]
    else:
        halves = [struct.unpack("<H", struct.pack("<e", _value_of(word)))[0] for word in part]
    return [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)]


def _word_of(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _value_of(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


# ----------------------------------------------------------------------------------------------- what comes out


def run(backend: str, case: Case, given: Sequence[int], device: torch.device) -> list[int]:
    """The words that a case makes of those given.

    Raises:
        RuntimeError: the device reports an error.
    """
    library = kernels.library_of(backend)
    assert library is not None
    assert len(given) == case.in_words
    on_gpu = device.type == "cuda"
    source, out = (
        torch.frombuffer(array("I", part), dtype=torch.int32).to(device)
        for part in (given, [UNWRITTEN] * case.out_words)
    )
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
        library.conformance_run(list(cases(backend)).index(case.name), source.data_ptr(), out.data_ptr(), stream)
        return [word % 2**32 for word in out.tolist()]


def run_case(backend: str, case: Case, device: torch.device) -> list[int]:
    """The same, of the input that every device gets."""
    return run(backend, case, words(case.input, case.in_words), device)


def compared(case: Case, mine: Sequence[int], theirs: Sequence[int]) -> str:
    """How two outputs of a case differ; "" where they do not."""
    if len(mine) != len(theirs):
        return f"{case.name}: {len(mine)} words and {len(theirs)}"
    wrong = [at for at, pair in enumerate(zip(mine, theirs, strict=True)) if not _same(case, *pair)]
    if not wrong:
        return ""
    at = wrong[0]
    return f"{case.name}: {len(wrong)} of {len(mine)} words, word {at}: {mine[at]:08x} and {theirs[at]:08x}"


def expectation(case: Case, output: Sequence[int]) -> dict[str, str]:
    """What conformance.json has of a case that is to have these words: all, or a hash where every bit counts."""
    data = b"".join(struct.pack("<I", _plain(case, word)) for word in output)
    return {"sha256": hashlib.sha256(data).hexdigest()[:16]} if case.exact else {"words": data.hex()}


def expected() -> dict[str, dict[str, str]]:
    """What conformance.json has, by the cases' names."""
    found: dict[str, dict[str, str]] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


def difference(case: Case, output: Sequence[int], wanted: dict[str, str]) -> str:
    """How words differ from an `expectation`; "" where they do not."""
    if case.exact:
        is_right = expectation(case, output) == wanted
        return "" if is_right else f"{case.name}: its {len(output)} words are not the expected ones"
    return compared(case, output, struct.unpack(f"<{len(wanted['words']) // 8}I", bytes.fromhex(wanted["words"])))


def _same(case: Case, one: int, other: int) -> bool:
    if case.exact:
        return _plain(case, one) == _plain(case, other)
    a, b = _value_of(one), _value_of(other)
    # The terms of a sum may be larger than it.
    scale = abs(b) + (1.0 if case.input.startswith(("mma", "wgmma")) else 0.0)
    return a == b or abs(a - b) <= TOLERANCE * scale


def _plain(case: Case, word: int) -> int:
    """A float's NaN may have other bits; of integers, none of these words is one by chance."""
    return _NAN if case.input != "bits" and word & 0x7FFFFFFF > 0x7F800000 else word
