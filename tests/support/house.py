"""What keeps the house in order: no private names in other folders, no import circles, no long files without a reason.

Sources are read, nothing is imported, so that any state of the tree can be asked. tests/library/test_house.py holds the
tree to these rules, support/house_numbers.py prints where it stands.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("fastconv", "csrc", "emulator", "tests", "tools", "benchmarks", "_build")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")

# Private names that other folders may use, and why.
SHARED = {"fastconv._C": "the compiled library, which Python finds by this name"}
# Imports that close a circle on purpose, and why.
_LATE = "by its name, when a kernel of it is first asked for: Triton may be missing, and takes a second to import"
DELIBERATE = {
    ("fastconv.operators.backends", "fastconv.triton_kernels"): _LATE,
    ("fastconv.operators.cuda_by_triton", "fastconv.triton_kernels"): _LATE,
    ("fastconv.operators.backends", "fastconv.aten_kernels.cudnn"): "by its name, like the other backends' modules",
    ("fastconv.operators.variants", "fastconv.triton_kernels.table"): _LATE,
    ("fastconv.operators.auto", "fastconv.auto_kernels"): "by its name, when a table is in force",
    ("fastconv", "fastconv.qualification.qualify"): "when it is asked for: it needs the whole package",
    ("fastconv.swapping.regions", "fastconv.qualification.qualify"): "by its name, for swap(model, qualify=...)",
}
MOST_LINES = 400
REASON = "One file because"  # in the first lines of a file that is longer
HEAD = 30


@dataclass(frozen=True)
class Use:
    """A name of another module that a module uses."""

    path: Path  # of the module that uses it
    line: int
    module: str  # to which the name belongs
    name: str | None  # None: the module itself

    @property
    def dotted(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"

    @property
    def private(self) -> list[str]:
        """The dotted name up to each of its parts that begin with an underscore."""
        parts = self.dotted.split(".")
        return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if _is_private(part)]


def sources(root: Path, places: Iterable[str] = PLACES, suffixes: Iterable[str] = SUFFIXES) -> list[Path]:
    """The sources of a checkout, without what a build left behind."""
    found = []
    for path in (path for place in places for path in (root / place).rglob("*") if path.suffix in suffixes):
        if not any(part.startswith(".") or part in ("build", "__pycache__") for part in path.relative_to(root).parts):
            found.append(path)
    return sorted(found)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


# ------------------------------------------------------------------------------------------------- Python modules


def dotted_name(path: Path) -> str:
    """The name by which a file is imported: from the outermost folder that is a package."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts)


@functools.cache
def modules(root: Path) -> dict[str, Path]:
    """Every Python module of the checkout by its name; of a compiled one, the stub."""
    return {dotted_name(path): path for path in sources(root, suffixes=[".py", ".pyi"])}


class _Names(ast.NodeVisitor):
    """Collects what one module uses of the others."""

    def __init__(self, path: Path, known: dict[str, Path]) -> None:
        self.path, self.known = path, known
        self.bound: dict[str, Use] = {}  # by import, in any scope
        self.imports: list[Use] = []
        self.uses: list[Use] = []
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            self._bind(node)
        self.visit(tree)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found = self._module(alias.name)
                if found is not None:
                    use = Use(self.path, node.lineno, found, None)
                    self.imports.append(use)
                    first = alias.name.partition(".")[0]
                    self.bound[alias.asname or first] = use if alias.asname else Use(self.path, 0, first, None)
        elif isinstance(node, ast.ImportFrom):
            base = self._base(node)
            for alias in node.names:
                if f"{base}.{alias.name}" in self.known:
                    use = Use(self.path, node.lineno, f"{base}.{alias.name}", None)
                elif base in self.known:
                    use = Use(self.path, node.lineno, base, alias.name)
                else:
                    continue
                self.imports.append(use)
                self.bound[alias.asname or alias.name] = use
        elif isinstance(node, ast.Constant) and "." in str(node.value) and node.value in self.known:
            self.imports.append(Use(self.path, node.lineno, node.value, None))  # for importlib.import_module

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = dotted_name(self.path).split(".")
        up = node.level - (self.path.stem == "__init__")
        return ".".join([*package[: len(package) - up], *filter(None, [node.module])])

    def _module(self, name: str) -> str | None:
        """The longest part of a dotted name that is a module of the checkout."""
        while name and name not in self.known:
            name = name.rpartition(".")[0]
        return name or None

    def _meaning(self, node: ast.AST) -> Use | None:
        """The module, or the name of a module, that an expression stands for."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id)
        if isinstance(node, ast.Attribute):
            of = self._meaning(node.value)
            if of is not None and of.name is None:
                inner = f"{of.module}.{node.attr}"
                known = inner in self.known
                return Use(self.path, node.lineno, inner if known else of.module, None if known else node.attr)
        return None

    def _use(self, owner: ast.AST, name: str, line: int) -> None:
        of = self._meaning(owner)
        if of is not None:
            inner = f"{of.module}.{name}"
            known = of.name is None and inner in self.known
            self.uses.append(Use(self.path, line, inner if known else of.module, None if known else name))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._use(node.value, node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """As in ``monkeypatch.setattr(module, "name", ...)``."""
        for owner, name in zip(node.args, node.args[1:], strict=False):
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._use(owner, name.value, node.lineno)
        self.generic_visit(node)


@functools.cache
def names(root: Path) -> dict[str, _Names]:
    known = modules(root)
    return {name: _Names(path, known) for name, path in known.items()}


# -------------------------------------------------------------------------------------------------- private names


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_uses(root: Path) -> dict[Use, str]:
    """Where a folder uses what begins with an underscore and belongs to another one, with the private name."""
    found = {}
    for user in names(root).values():
        for use in [*user.imports, *user.uses]:
            away = [name for name in use.private if not user.path.is_relative_to(_home(root, name))]
            if away and away[0] not in SHARED:
                found[use] = away[0]
    return dict(sorted(found.items(), key=lambda item: (item[0].path, item[0].line)))


def _home(root: Path, private: str) -> Path:
    """The folder within which a private module, or a private name of a module, may be used."""
    known = modules(root)
    if private in known:
        path = known[private]
        return path.parent.parent if path.stem == "__init__" else path.parent
    return known[private.rpartition(".")[0]].parent


# ------------------------------------------------------------------------------------------------- import circles

Graph = dict[str, set[str]]


def imports(root: Path, package: str = "fastconv", deliberate: Iterable[tuple[str, str]] = ()) -> Graph:
    """Which modules of a package each of them imports, wherever in the file, those apart that are `deliberate`."""
    inside = {name: user for name, user in names(root).items() if f"{name}.".startswith(f"{package}.")}
    graph: Graph = {}
    for name, user in inside.items():
        found = {use.module for use in user.imports if use.module in inside and use.module != name}
        graph[name] = {other for other in found if (name, other) not in set(deliberate)}
    return graph


def rooms(graph: Graph) -> dict[str, Graph]:
    """By folder: which of its subfolders and modules import which others of them."""
    found: dict[str, Graph] = defaultdict(lambda: defaultdict(set))
    packages = {name.rpartition(".")[0] for name in graph} - {""}
    for folder in packages:
        for name, others in graph.items():
            for other in others:
                one, two = (_child(folder, name, packages), _child(folder, other, packages))
                if one and two and one != two:
                    found[folder][one].add(two)
    return found


def _child(folder: str, module: str, packages: set[str]) -> str | None:
    """Which subfolder or module of the folder it is, or is in."""
    if module == folder:
        return f"{folder}.__init__"
    if not module.startswith(f"{folder}."):
        return None
    return f"{folder}.{module.removeprefix(f'{folder}.').partition('.')[0]}"


def circles(graph: Graph) -> list[list[str]]:
    """Of each group of nodes that all reach each other, a shortest circle."""
    reached = {node: _reach(graph, node) for node in graph}
    found, seen = [], set()
    for node in sorted(graph):
        group = {other for other in reached[node] if node in reached.get(other, ())}
        if node in group and not group & seen:
            found.append(min((_circle(graph, member) for member in sorted(group)), key=len))
            seen |= group
    return found


def _reach(graph: Graph, start: str) -> set[str]:
    found, open_ = set(), [start]
    while open_:
        for other in graph.get(open_.pop(), ()):
            if other not in found:
                found.add(other)
                open_.append(other)
    return found


def _circle(graph: Graph, start: str) -> list[str]:
    paths = [[start]]
    while True:
        path = paths.pop(0)
        for other in sorted(graph.get(path[-1], ())):
            if other == start:
                return [*path, start]
            if other not in path:
                paths.append([*path, other])


def room_circles(graph: Graph) -> list[list[str]]:
    """Between subfolders of one folder, or between these and its modules."""
    return [circle for folder, inner in sorted(rooms(graph).items()) for circle in circles(inner)]


# ----------------------------------------------------------------------------------------------------- long files


def long_files(root: Path) -> dict[Path, int]:
    """Files of more than `MOST_LINES` lines that do not say at their head why they are one file."""
    found = {}
    for path in sources(root):
        lines = lines_of(path)
        if len(lines) > MOST_LINES and not has_reason(lines):
            found[path] = len(lines)
    return found


def has_reason(lines: list[str]) -> bool:
    """Whether a line at the head begins with the `REASON`, but for what makes it a comment."""
    return any(re.match(rf"\W*{REASON}\b", line) for line in lines[:HEAD])
