"""What a docstring refers to is there, under the name by which it is called."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.names import MISSING, cannot_be_imported, get, modules

MODULES = modules()
# :func:`name`, and `name`, `name.of.it` or `name()` in single backticks; ``code`` and `a phrase` refer to nothing.
REFERENCE = re.compile(r"(?<!`)`~?([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`(?!`)")


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def identifiers(tree: ast.AST) -> set[str]:
    """All that the code names: variables, parameters, attributes, functions and classes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names = (getattr(node, kind, None) for kind in ("id", "arg", "attr", "name"))
        found.update(name for name in names if isinstance(name, str))
    return found


@functools.cache
def named_anywhere() -> frozenset[str]:
    return frozenset().union(*(identifiers(tree) for tree in map(tree_of, MODULES) if tree is not None))


@functools.cache
def tree_of(name: str) -> ast.Module | None:
    """A module's code; None for the compiled library."""
    path = Path(str(importlib.import_module(name).__file__))
    return ast.parse(path.read_text()) if path.suffix == ".py" else None


def resolves(reference: str, module: ModuleType) -> bool:
    """Whether a docstring of the module may refer so to something: by a full path; by a name that is known in the
    module or in its package, and what follows a dot; in lower case, as variables and files are, by a name that stands
    anywhere in the code."""
    if reference.startswith("fastconv."):
        return cannot_be_imported(reference) or get(reference) is not MISSING
    package = importlib.import_module(module.__package__ or "fastconv")
    known = any(get(reference, start) is not MISSING for start in (module, package))
    return known or (reference.islower() and reference in named_anywhere())


@pytest.mark.parametrize("name", MODULES)
def test_docstring_references(name):
    tree = tree_of(name)
    found = [] if tree is None else [one for text in docstrings(tree) for one in REFERENCE.findall(text)]
    module = importlib.import_module(name)
    assert [reference for reference in found if not resolves(reference, module)] == []


@pytest.mark.parametrize("reference", ["fastconv.swapping.swap.Watch", "fastconv.swap.none", "Watches", "Matcher.none"])
def test_what_is_not_there(reference):
    assert not resolves(reference, importlib.import_module("fastconv.swapping.matching.matcher"))
