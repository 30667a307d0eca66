"""Which implementation of an op runs: chosen by argument, by context, or by the input's device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import library

_current = "auto"


@dataclass(frozen=True)
class Backend:
    """One implementation of all ops.

    Attributes:
        namespace: of its operators in ``torch.ops``; None for the plain aten functions.
        device: the type of the tensors that it takes, "" for any.
        problem: why it cannot run here; None if it can.
        module: what defines the operators, imported when the backend is first asked for.
    """

    namespace: str | None
    device: Callable[[], str]
    problem: Callable[[], str | None]
    module: str | None = None


def no_gpu() -> str | None:
    """Why no GPU can run kernels here; None if one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0 (Ampere)"
    return None


def driver_cuda() -> int | None:
    """The major version of CUDA that the driver is for. Torch has no name for it that all its releases know."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        failed = True
    return None if failed else version.value // 1000


def _no_cuda() -> str | None:
    if not library.LOADED:
        return library.PROBLEM
    built = library.build_info()["cuda"]
    if not library.has_cuda():
        return f"the library has no CUDA kernels ({built})"
    return no_gpu() or old_driver(built)


@functools.cache
def old_driver(built: str) -> str | None:
    """Why the driver cannot run the library, which brings a CUDA runtime of its own, newer perhaps than torch's."""
    runtime, driver = re.search(r"by nvcc (\d+)", built), driver_cuda()
    if runtime is None or driver is None or driver >= int(runtime[1]):
        return None
    return (
        f"the NVIDIA driver is for CUDA {driver}, and the library was built with CUDA {runtime[1]}: update the driver, "
        f"or build fastconv with CUDA {driver} (CUDA_HOME)"
    )


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed: pip install "fastconv[triton]"'
    return None if interpreted() else no_gpu()


def _no_cudnn() -> str | None:
    reason = no_gpu()
    if reason is None and not torch.backends.cudnn.is_available():
        return f"torch {torch.__version__} was built without cuDNN"
    if reason is None and not torch.backends.cudnn.enabled:
        return "cuDNN is switched off (torch.backends.cudnn.enabled)"
    return reason


_BACKENDS = {
    "cpu": Backend("fastconv", lambda: "cpu", lambda: library.PROBLEM),
    "cuda": Backend("fastconv", lambda: "cuda", _no_cuda),
    "triton": Backend(
        "fastconv_triton", lambda: "cpu" if interpreted() else "cuda", _no_triton, module="fastconv.triton_kernels"
    ),
    "cudnn": Backend("fastconv_cudnn", lambda: "cuda", _no_cudnn, module="fastconv.aten_kernels.cudnn"),
    "reference": Backend(None, lambda: "", lambda: None),
}
# What "auto" takes for the tensors of a device where nothing was measured, see `fastconv.operators.measured`. The
# kernels for GPUs are proved by emulation only: CUDA tensors run what torch has.
_AUTO = {"cpu": "cpu", "meta": "cpu"}
# In tables of what was measured, the convolutions that `fastconv.swap` prepares on a CPU: no op can run them.
PREPARED = "onednn"


def names() -> tuple[str, ...]:
    return "auto", *_BACKENDS


def add(name: str, backend: Backend) -> None:
    """Makes one more backend known, whose operators have the schemas of csrc/schemas.cpp."""
    _BACKENDS[name] = backend


def remove(name: str) -> None:
    """Takes back what `add` made known."""
    del _BACKENDS[name]


def available() -> dict[str, str | None]:
    """Every backend, with None if it can run here, else the reason why not."""
    return {name: problem(name) for name in _BACKENDS}


def problem(name: str) -> str | None:
    """Why this backend cannot run here; None if it can. Asks no other one."""
    return _BACKENDS[name].problem()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, ops without a ``backend=`` argument run on this backend.

    The choice holds for the whole process, all threads included.

    Args:
        name: ``"auto"`` (what `fastconv.qualify` found best on this machine; for calls that were not
            measured, ``"cpu"`` on a CPU and the reference on a GPU), ``"cpu"`` (the C++ library), ``"cuda"``
            (CUDA C++ kernels), ``"triton"`` (Triton kernels), ``"cudnn"`` (cuDNN's fused convolutions with
            a ReLU, as torch has them; all else, gradients too, as the reference), or ``"reference"`` (the
            plain aten meaning of the op).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message says why.
    """
    global _current
    _require(name)
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def current() -> str:
    """The name that the enclosing `use_backend` was given; "auto" outside of any."""
    return _current


def is_auto(backend: str | None) -> bool:
    """Whether an op with this argument runs what "auto" takes."""
    name = _current if backend is None else backend
    return isinstance(name, str) and name == "auto"


def default(device: torch.device) -> str:
    """What "auto" takes for a call of which nothing was measured on this machine."""
    return _AUTO.get(device.type, "reference") if library.LOADED else "reference"


def is_possible(name: str, device: torch.device) -> bool:
    """Whether there is such a backend, and it can run on the device; prepares it if so."""
    if name not in _BACKENDS or _BACKENDS[name].device() not in ("", device.type):
        return False
    return _prepare(name) is None


def choose(backend: str | None, input: torch.Tensor, asker: str = "fastconv") -> str:
    """The backend that an op runs for `input`: a name from `names`, other than "auto", which is `default`. Errors begin
    with the `asker`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here, or not on this tensor.
    """
    name = _current if backend is None else backend
    device = input.device.type
    if is_auto(name):
        return default(input.device)
    _require(name, asker)
    needed = _BACKENDS[name].device()
    if needed and device not in (needed, "meta"):
        raise RuntimeError(
            f"{asker}: got a tensor on {input.device} for backend '{name}', needed one on "
            f"{needed}; move it, or leave the backend to 'auto'"
        )
    return name


def namespace(name: str) -> str | None:
    """Where in ``torch.ops`` the operators of a backend that `choose` returned are; None for the reference."""
    return _BACKENDS[name].namespace


def _require(name: str, asker: str = "fastconv") -> None:
    if not isinstance(name, str) or name not in names():
        shown = repr(name[:40]) if isinstance(name, str) else f"of type {type(name).__name__[:40]}"
        raise ValueError(
            f"{asker}: got backend {shown}, needed one of {', '.join(names())}; see `python -m fastconv info`"
        )
    if name == "auto":
        return
    reason = _prepare(name)
    if reason is not None:
        raise RuntimeError(
            f"{asker}: got backend '{name}', which cannot run here: {reason}; leave the backend to 'auto'"
        )


def _prepare(name: str) -> str | None:
    """Imports what defines the backend's operators; or says why it cannot run."""
    backend = _BACKENDS[name]
    reason = backend.problem()
    if reason is None and backend.module is not None:
        importlib.import_module(backend.module)
    return reason


# What torch.compiler.assume_constant_result does, without importing Dynamo: it calls the function while it traces,
# instead of tracing an import.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
