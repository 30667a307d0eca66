"""Makes the emulated kernels a backend where it is imported: in a process that examines candidates, say.

PLANTED in the environment spoils what is known of the instructions' cases there: ``wrong CASE``, ``crashes CASE``,
``hangs CASE`` or ``fails CASE``, several with a semicolon between them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

import torch

from fastconv.qualification import conformance_cases
from fastconv.qualification.conformance_cases import Case
from support.kernel_backends import add_emulated

BACKEND, PLANTED = "cuda-emulated", "FASTCONV_TEST_PLANTED"
_expected, _run_case = conformance_cases.expected, conformance_cases.run_case
_planted: dict[str, str] = {}
for _one in filter(None, os.environ.get(PLANTED, "").split(";")):
    _how, _, _name = _one.partition(" ")
    _planted[_name] = _how


def _other_expected() -> dict[str, dict[str, str]]:
    found = _expected()
    for name, how in _planted.items():
        if how == "wrong":
            found[name] = {key: "0" * len(value) for key, value in found[name].items()}
    return found


def _other_run_case(backend: str, case: Case, device: torch.device) -> Sequence[int]:
    if _planted.get(case.name) == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if _planted.get(case.name) == "hangs":
        time.sleep(600)
    if _planted.get(case.name) == "fails":
        raise RuntimeError("CUDA error: an illegal memory access\nand advice")
    return _run_case(backend, case, device)


if _planted:
    conformance_cases.expected, conformance_cases.run_case = _other_expected, _other_run_case
PROBLEM = add_emulated()
