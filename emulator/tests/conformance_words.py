"""The words of conformance cases in the emulator, and as arrays."""

import numpy as np
import torch

from emulator import conformance
from emulator.conformance import EMULATED
from fastconv.qualification import conformance_cases

CPU = torch.device("cpu")


class Program:
    """The cases in the emulator."""

    def __init__(self) -> None:
        self.cases = conformance.cases(EMULATED)

    def run_words(self, name: str, given: np.ndarray) -> np.ndarray:
        """A case on an input of one's own."""
        assert given.dtype == np.uint32
        return np.array(conformance_cases.run(EMULATED, self.cases[name], given.tolist(), CPU), np.uint32)


def given(program, name: str) -> np.ndarray:
    case = program.cases[name]
    return np.array(conformance_cases.words(case.input, case.in_words), np.uint32)


def as_dtype(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int32).copy()).view(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
