"""What `gpu_check.py` runs on a GPU, in the order of its worth."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path

from gpu_runner import Step

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
CUDA = [
    f"tests/kernels/cuda/test_{name}.py"
    for name in (
        *("cuda_conv2d", "cuda_conv2d_out", "cuda_conv2d_stem", "conv2d_operands"),
        *("cuda_depthwise", "cuda_depthwise_separable", "cuda_elementwise"),
    )
]
# Skip on GPUs of another compute capability
HOPPER = [f"tests/kernels/cuda/test_cuda_conv2d_{name}.py" for name in ("hopper", "halo")]
ENTRIES = "tests/kernels/triton/test_triton_entries.py"
ON_CUDA = ["--only-backend", "cuda", "-m", ""]

# Succeeds where the library was built from these sources, for the architecture that is named: here or elsewhere.
IS_BUILT = """
import sys
from _build.ninjafile import source_hash
from fastconv.operators import library
facts = library.build_info()
sys.exit(not (library.LOADED and facts["source_hash"] == source_hash() and sys.argv[1] in facts["cuda"]))
"""


def stages(arch: str | None, files: Path) -> list[list[Step]]:
    """One after the other: the time may run out. The steps of a stage run side by side.

    What proves may share the machine; what times has it to itself.

    Args:
        arch: as nvcc has it; None where there is no GPU.
        files: the folder of all that the steps write.
    """
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    # Memory that is free for compilers looks scarce on a machine that has just started.
    environ = {"FASTCONV_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
    if arch:
        environ["FASTCONV_CUDA_ARCHS"] = arch
    is_built = [PYTHON, "-c", IS_BUILT, f"sm_{arch or ''}"]
    conformance = [PYTHON, "emulator/conformance.py"]
    record = [*conformance, "--require-gpu", "--record", str(files / "goldens")]
    info, machine = [PYTHON, "-m", "fastconv", "info"], [PYTHON, "tools/machine.py"]
    measured = _Measured(files)
    proofs, timings = _proofs(files), _timings(measured)
    return [
        [Step("build", build, 240, build, environ, is_built)],
        [
            Step("conformance", record, 180, conformance),
            Step("info", info, 60, info),
            Step("machine", machine, 60, machine),
        ],
        *proofs[:1],  # each kernel, by name
        [measured.qualify("qualify-32", "--batch 32", 150)],
        *proofs[1:],
        *([step] for step in timings),
    ]


def _proofs(files: Path) -> list[list[Step]]:
    rooms = ("kernels/cuda/test_cuda_device", "kernels/cuda/test_choices")
    rooms += ("ops/test_op_numerics", "kernels/test_kernel_networks")
    others = [f"tests/{name}.py" for name in rooms]
    outcomes = ["--outcomes", str(files / "kernels.jsonl")]
    return [
        [
            _pytest("kernels-cuda", [*CUDA, *HOPPER, *ON_CUDA, "-k", "test_every", *outcomes], 90),
            _pytest("kernels-triton", [ENTRIES, "-m", "", *outcomes], 90),
        ],
        [
            _pytest("numerics-cuda", [*CUDA, *HOPPER, *others, *ON_CUDA, "-k", "not test_every"], 150),
            _pytest("numerics-triton", ["tests/kernels/triton", "-m", "", "-k", "not test_every_entry"], 150),
            _sanitized("memcheck-conv2d", [CUDA[0], *ON_CUDA, "-k", "test_every and (fp16 or fp32)"]),
            _sanitized("memcheck-others", [*CUDA[1:], *ON_CUDA, "-k", "test_every and (float16 or fp16)"]),
            _sanitized("memcheck-hopper", [*HOPPER, *ON_CUDA, "-k", "test_every and fp16"]),
            _sanitized("memcheck-triton", [ENTRIES, "-m", "", "-k", "not tf32 and not ieee"], "triton"),
            # Of the pipelines: kernels without asynchronous copies have little to race with.
            _sanitized("racecheck", [*CUDA, *ON_CUDA, "-k", "(test_every_kernel and fp16) or separable_kernel"]),
        ],
    ]


def _pytest(name: str, arguments: list[str], limit: int) -> Step:
    """In workers, each of which a CUDA error or a test that hangs ends, and another takes its place.

    So each kernel is to blame for what it does alone, as if it had a process to itself, without loading torch for each.
    """
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(min(8, os.cpu_count() or 1)), "--max-worker-restart", "100"]
    command = [*PYTEST, *arguments, "--test-seconds", "60"]
    return Step(name, [*command, *workers], limit, [*command, "--collect-only"])


def _sanitized(name: str, arguments: list[str], kernels: str = "fastconv") -> Step:
    command = [*PYTEST, *arguments, "--test-seconds", "120"]
    sanitizer = ["compute-sanitizer", "--tool", name.partition("-")[0]]
    sanitizer += ["--target-processes", "all", "--error-exitcode", "9", "--report-api-errors", "no"]
    if kernels == "fastconv":  # their namespace: torch's kernels are none of ours
        sanitizer += ["--kernel-regex", "kns=fastconv"]
    # Without torch's cache each tensor is an allocation of its own, and what reaches beyond it is seen.
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(name, [*sanitizer, *command], 150, [*command, "--collect-only"], environ)


def _timings(measured: _Measured) -> list[Step]:
    networks = "--networks resnet50 googlenet alexnet2012 torchvision:mobilenet_v2 --batches 1 64"
    forward, backward = "forward and channels_last and not compile", "backward and channels_last and not compile"
    return [
        measured.networks("networks", f"{networks} --train resnet50 --no-compile --backend auto", 80),
        measured.profiled("ncu", "--backend cuda", 60),
        measured.layers("layers-first", "--backend cuda --quick", forward, 50),
        measured.networks("networks-compile", "--networks resnet50 --batches 64 --train resnet50 --backend auto", 150),
        measured.qualify("qualify-1", "--batch 1", 80),
        measured.layers("layers-cuda", "--backend cuda", forward, 90),
        measured.qualify("qualify-search", "--batch 32 --search", 120),
        measured.layers("layers-cuda-backward", "--backend cuda", backward, 90),
        measured.networks("networks-cuda", f"{networks} --train --no-compile --backend cuda", 70),
        measured.networks("networks-triton", f"{networks} --train --no-compile --backend triton", 70),
        measured.layers("layers-triton", "--backend triton", "forward and fastconv and channels_last", 90),
        measured.profiled("ncu-triton", "--backend triton", 60),
        measured.layers("layers-compile", "--backend cuda", "forward and compile", 160),
    ]


class _Measured:
    """Steps that time, the results of which survive whatever comes: each is written as soon as it is there."""

    def __init__(self, files: Path) -> None:
        self._files = files
        self._tuned = files / "tuned"  # the table gets its name there
        # What was qualified on this machine is what `auto` takes.
        self._environ = {"FASTCONV_TABLES": str(files / "tables")}

    def qualify(self, name: str, options: str, limit: int) -> Step:
        qualify = [PYTHON, "-m", "fastconv", "qualify"]
        command = [*qualify, *shlex.split(f"--layers --device cuda --dtype fp16 {options}")]
        command += ["--minutes", f"{(limit - 20) / 60:.2f}", "--export", f"{self._tuned}{os.sep}"]
        small = shlex.split("--layers --device cpu --op add_relu --backends cpu")
        return Step(name, command, limit, [*qualify, *small], self._environ)

    def layers(self, name: str, options: str, chosen: str, limit: int) -> Step:
        command = [*PYTEST, "benchmarks", "--device", "cuda", "--dtype", "fp16", "--benchmark-max-time", "0.02"]
        command += [*shlex.split(f"--batch 32 {options}"), "-k", chosen, "--rows", str(self._files / "rows.jsonl")]
        return Step(name, command, limit, [*command, "--device", "cpu", "--backend", "auto", "--collect-only"])

    def networks(self, name: str, options: str, limit: int) -> Step:
        command = [PYTHON, "-m", "fastconv", "bench", "--device", "cuda", "--dtypes", "fp16", "--train-dtype", "bf16"]
        command += ["--train-batch", "64", "--minutes", f"{limit / 75:.1f}", *shlex.split(options)]
        command += ["--json", str(self._files / f"{name}.json")]
        small = "--device cpu --dtypes fp32 --batches 1 --minutes 0 --backend auto --networks lenet5"
        small += " --train lenet5 --train-batch 2 --train-dtype fp32"
        return Step(name, command, limit, [*command, *shlex.split(small)], self._environ)

    def profiled(self, name: str, options: str, limit: int) -> Step:
        calls = [PYTHON, "tools/gpu_calls.py", *shlex.split(options)]
        ncu = shlex.split("ncu --clock-control none --set full --profile-from-start off --launch-count 24")
        return Step(name, [*ncu, *calls], limit, [*calls, *shlex.split("--device cpu --backend auto --batch 1")])
