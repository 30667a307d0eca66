"""Puts what `make gpu-check` found on a GPU where the repository keeps it: `make gpu-results FROM=folder`.

The folder is that of a run, or what came back of it: `summary.json` and `files.tar.gz`. Goldens go to emulator/goldens,
the card's table to fastconv/tuned, and times to one file of benchmarks/results. What is there already is overwritten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"goldens": "emulator/goldens", "tuned": "fastconv/tuned"}


def sources_digest(root: Path = ROOT) -> str:
    """Of all that the figures are of: the package and its kernels."""
    digest = hashlib.sha256()
    for path in sorted([*(root / "fastconv").rglob("*.py"), *(root / "csrc").rglob("*")]):
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def to_commit(files: Path, summary: dict[str, Any], root: Path = ROOT) -> dict[str, bytes]:
    """The content of each file that is worth a commit, by its path in the repository.

    Args:
        files: the folder of all that the steps wrote.
        summary: of the run.
        root: of the repository.
    """
    found = {}
    for folder, place in PLACES.items():
        for path in sorted((files / folder).glob("*.json")):
            found[f"{place}/{path.name}"] = path.read_bytes()
    rows = [*_layers(files), *_networks(files)]
    if rows and summary["gpu"]:
        machine = _machine(files)
        head = {"gpu": summary["gpu"], "sources": summary["sources"], "machine": machine}
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', summary['gpu']).strip('-')}_{_commit(machine, summary, root)}"
        lines = "".join(json.dumps(row) + "\n" for row in [head, *rows])
        found[f"benchmarks/results/{name}.jsonl"] = lines.encode()
    return found


def _layers(files: Path) -> list[dict[str, Any]]:
    """Of each case the last row that passed, with its floor and its share of it."""
    path, found = files / "rows.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        if row["outcome"] == "passed":
            found[row["case"]] = row
    return list(found.values())


def _networks(files: Path) -> list[dict[str, Any]]:
    """A row for each task, with a median and percentiles in place of every single run."""
    found = []
    for path in sorted(files.glob("networks*.json")):
        try:
            rows = json.loads(path.read_text())["rows"]
        except ValueError:
            continue
        for row in rows:
            for result in row["results"].values():
                seconds = result.pop("seconds")
                if seconds:
                    cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
                    result |= {"median_s": statistics.median(seconds), "p20_s": cuts[0], "p80_s": cuts[-1]}
                    result["runs"] = len(seconds)
            found.append({"step": path.stem, **row})
    return found


def _machine(files: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((files / "machine.txt").read_text()))
    except (OSError, ValueError):  # the step failed
        return {}


def _commit(machine: dict[str, Any], summary: dict[str, Any], root: Path) -> str:
    """What was measured: the commit, as far as it is known there or has the same sources here."""
    if machine.get("commit", "unknown") != "unknown":
        return str(machine["commit"])
    if summary["sources"] == sources_digest(root):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            process = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            process = None
        if process and process.stdout.strip():
            return process.stdout.strip()
    return f"sources-{summary['sources']}"


def unpack(folder: Path, files: Path) -> dict[str, Any]:
    """Puts what is in the archive of a run into `files`; the run's summary.

    Raises:
        ValueError: the folder holds no such run.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        with tarfile.open(folder / "files.tar.gz") as archive:
            archive.extractall(files, filter="data")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{folder} needs summary.json and files.tar.gz of make gpu-check: {error}") from error
    return dict(summary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with summary.json and files.tar.gz")
    parser.add_argument("--into", type=Path, default=ROOT, help="the repository; default: this one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            summary = unpack(args.folder, Path(unpacked))
        except ValueError as problem:
            print(f"gpu-results: {problem}", file=sys.stderr)
            return 2
        if not summary["gpu"]:
            print("gpu-results: that was a dry run, without a GPU", file=sys.stderr)
            return 2
        found = to_commit(Path(unpacked), summary, args.into)
    for name, content in found.items():
        path = args.into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"{name}: {len(content)} bytes")
    print(f"{len(found)} files of {summary['gpu']}, to be looked at and committed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
