"""The process in which candidates run: ``python -m fastconv.qualification.worker DEVICE [MODULE ...]``.

Modules are imported first; they may add backends, see `fastconv.operators.backends.add`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..operators import kernels, tables
from . import conformance
from .calls import OperatorCall
from .examination import Broken, Examination, Options
from .processes import Worker, serve


def worker(device: torch.device, modules: Sequence[str] = ()) -> Worker:
    """The parent's end of such a process, which can import what can be imported here."""
    command = [sys.executable, "-m", "fastconv.qualification.worker", str(device), *modules]
    return Worker(command, environ={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


def main(device_name: str, *modules: str) -> None:
    device = torch.device(device_name)
    for module in modules:
        importlib.import_module(module)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Aten at its best; and torch keeps the engine of cuDNN's that it chose first: the one that is judged.
        torch.backends.cudnn.benchmark = True

    def handle(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "conformance" in request:
            yield from conformance.answers(request["conformance"], device)
            return
        if device.type == "cpu":
            torch.set_num_threads(request["threads"])
        torch.backends.cudnn.allow_tf32 = request["allow_tf32"]
        kernels.disable(request["disabled"])
        options = request["options"]
        if options["among"] is not None:
            options["among"] = tuple(options["among"])
        known = [tables.candidate(document) for document in request["known"]]
        backward = [(operator, family, tuple(size)) for operator, family, size in request["backward"]]
        call = OperatorCall.from_json(request["call"])
        try:
            yield from Examination(call, device, Options(**options), known).run(backward)
        except Broken as error:
            print(error, file=sys.stderr)
            sys.exit(1)

    serve(handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
