"""What the tests of conformance cases share."""

import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emulator.build import HERE, find_clang, import_build


@pytest.fixture(scope="module")
def program():
    from conformance_words import Program

    return Program()


@pytest.fixture(scope="module")
def words(program):
    """Of the cases that run here: without clang those with plain stores to shared memory do not."""
    from emulator import conformance

    found, problems = conformance.emulate()
    assert problems == [] or find_clang() is None
    return found


@pytest.fixture(scope="module")
def output(words):
    return {name: np.array(output, np.uint32) for name, output in words.items()}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Lane and element to position, for each operand."""
    spec = importlib.util.find_spec("cutlass_library")
    toolchain = import_build().toolchain
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("CuTe's headers are not installed (pip install --no-deps nvidia-cutlass)")
    cuda = toolchain.find_cuda()
    if cuda is None:
        pytest.skip("CuTe's headers need those of the CUDA toolkit, which is not installed here")
    headers = [Path(spec.submodule_search_locations[0]) / "source/include", cuda.include, cuda.include / "cccl"]
    program = tmp_path_factory.mktemp("cute") / "layouts"
    include = [word for path in headers for word in ("-isystem", str(path))]
    compiler = toolchain.find_compiler().command
    subprocess.run(
        [*compiler, "-std=c++20", "-w", *include, str(HERE / "cute/layouts.cpp"), "-o", str(program)], check=True
    )
    printed = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name: np.array(positions) for name, positions in json.loads(printed).items()}
