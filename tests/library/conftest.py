"""A table of measured times on disk, and what is said about it; the machine code of the CUDA kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastconv.operators import library
from fastconv.operators.table_files import export, path_of
from support.table_files import HERE, Messages, entry, table


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    """Of a table for HERE, with one entry."""
    return export(table(entry()), path_of(HERE, tmp_path))


@pytest.fixture
def said() -> Iterator[Messages]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield Messages(caught)


@pytest.fixture(scope="module")
def cuda_library() -> None:
    """That there is machine code to look at, and that it is what csrc says now."""
    if not library.LOADED:
        pytest.skip("the library is not built here")
    from emulator.build import import_build
    from fastconv import _C
    from support.tools import machine_code

    if not _C.kernel_table():
        pytest.skip(f"the library has no CUDA kernels: {_C.build_info()['cuda']}")
    if machine_code.find_cuobjdump() is None:
        pytest.skip("cuobjdump is not installed here; it comes with the CUDA toolkit and with Triton")
    build = import_build()
    if build.sources.CSRC.is_dir() and _C.build_info()["source_hash"] != build.ninjafile.source_hash():
        pytest.skip("the library is older than csrc; build it again")
