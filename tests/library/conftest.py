"""A table of measured times on disk, and what is said about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

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
