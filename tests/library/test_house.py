"""The rules of the house, held against its sources; support/house.py reads them, CONTRIBUTING.md says why."""

from pathlib import Path

import pytest

from support import house, house_numbers
from support.house import ROOT

pytestmark = pytest.mark.skipif(
    not (ROOT / "fastconv" / "__init__.py").is_file(), reason="the package was installed, its sources are not here"
)


def test_an_underscore_means_private() -> None:
    found = [
        f"{use.path.relative_to(ROOT)}:{use.line} uses {name}, which is private to the folder it is in: give it a name "
        "without the underscore where it is, or go through what is public there"
        for use, name in house.private_uses(ROOT).items()
    ]
    assert not found, "\n".join(found)


def test_no_import_circles() -> None:
    """Between modules, and between folders."""
    graph = house.imports(ROOT, deliberate=house.DELIBERATE)
    found = [
        f"{' -> '.join(circle)}: move what both need below them, or what closes the circle to where it is imported from"
        for circle in [*house.circles(graph), *house.room_circles(graph)]
    ]
    assert not found, "\n".join(found)


def test_short_files() -> None:
    found = [
        f"{path.relative_to(ROOT)} has {count} lines, more than {house.MOST_LINES}: split it, or say in the text at "
        f"its head why it is one, in a line that begins with '{house.REASON}'"
        for path, count in house.long_files(ROOT).items()
    ]
    assert not found, "\n".join(found)


def test_exceptions_are_needed() -> None:
    """What is excused is there, so that an exception goes when its reason does."""
    graph = house.imports(ROOT)
    assert {pair for pair in house.DELIBERATE if pair[1] in graph.get(pair[0], ())} == set(house.DELIBERATE)
    used = {name for user in house.names(ROOT).values() for use in user.imports for name in use.private}
    assert used >= set(house.SHARED)
    for path in house.sources(ROOT):
        lines = path.read_text().splitlines()
        assert not house.has_reason(lines) or len(lines) > house.MOST_LINES, f"{path} is short enough, and says why not"


# ------------------------------------------------------------------------------------------- the rules themselves


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout that breaks every rule once, beside what is allowed."""
    for name, text in {
        "fastconv/__init__.py": "from . import b\nfrom .a import _seen\n",
        "fastconv/_C.pyi": "",
        "fastconv/late.py": "import importlib\nimportlib.import_module('fastconv.b.two')\n",
        "fastconv/a/__init__.py": "_seen = 1\n",
        "fastconv/a/_hidden.py": "value = 1\n",
        "fastconv/a/one.py": "from ._hidden import value\nfrom fastconv import _C\ndef f():\n    from ..b import two\n",
        "fastconv/a/inner/__init__.py": "from .._hidden import value\n",
        "fastconv/b/__init__.py": "",
        "fastconv/b/two.py": "import fastconv.a.one as one\nfrom .three import g\n",
        "fastconv/b/three.py": "def g():\n    from . import two\n    return two._own, two.__name__\n",
        "tests/support/__init__.py": "",
        "tests/support/names.py": "from fastconv.a._hidden import value\n",
        "tests/test_it.py": "from fastconv.b import three\ndef test(m):\n    m.setattr(three, '_x', 1)\n    three._y\n",
        "csrc/long.cpp": "\n" * 401,
        "csrc/excused.cpp": "// One file because a table is read as one.\n" + "\n" * 400,
        "csrc/build/long.cpp": "\n" * 401,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_private_names_are_found(tree: Path) -> None:
    found = {(str(use.path.relative_to(tree)), name) for use, name in house.private_uses(tree).items()}
    assert found == {
        ("fastconv/__init__.py", "fastconv.a._seen"),
        ("tests/support/names.py", "fastconv.a._hidden"),
        ("tests/test_it.py", "fastconv.b.three._x"),
        ("tests/test_it.py", "fastconv.b.three._y"),
    }


def test_circles_are_found(tree: Path) -> None:
    graph = house.imports(tree)
    assert house.circles(graph) == [["fastconv.a.one", "fastconv.b.two", "fastconv.a.one"]]
    assert graph["fastconv.late"] == {"fastconv.b.two"}
    assert house.room_circles(graph) == [
        ["fastconv.a", "fastconv.b", "fastconv.a"],
        ["fastconv.b.three", "fastconv.b.two", "fastconv.b.three"],
    ]
    graph = house.imports(
        tree, deliberate={("fastconv.a.one", "fastconv.b.two"), ("fastconv.b.three", "fastconv.b.two")}
    )
    assert house.circles(graph) == house.room_circles(graph) == []


def test_long_files_are_found(tree: Path) -> None:
    assert house.long_files(tree) == {tree / "csrc" / "long.cpp": 401}


def test_the_report_of_a_tree(tree: Path) -> None:
    text = house_numbers.report(tree)
    assert "private names used across folders, at 4 places: 4" in text
    assert "csrc/long.cpp: 401" in text
