"""The fingerprint of a device: what a measured time holds for."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastconv
from fastconv.measure import environment
from fastconv.operators.fingerprint import differences, digest, fingerprint
from fastconv.operators.table_files import Store, load, path_of
from support.table_files import CPU, HERE, OLDER


def test_the_fingerprint_of_the_cpu() -> None:
    found = fingerprint(CPU)
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
    assert found["fastconv"] == fastconv.__version__
    assert environment.facts()["CPU"].startswith(found["device"])
    assert type(found["torch"]) is str  # torch's own type compares versions, not texts
    json.dumps(found)
    found["device"] = "changed"
    assert fingerprint(CPU)["device"] != "changed"


def test_the_fingerprint_counts_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fingerprint(CPU)["threads"] == str(before + 1)
    finally:
        torch.set_num_threads(before)


def test_the_fingerprint_of_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    found = fingerprint(torch.device("cuda"))
    assert found["device"] == torch.cuda.get_device_name()
    assert found["cudnn"] == str(torch.backends.cudnn.version())
    assert int(found["driver"]) >= 11


def test_the_fingerprint_of_a_made_up_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever its name is, a file holds it."""

    class Library:
        def __init__(self, name: str) -> None:
            if name != "libcuda.so.1":
                raise OSError(name)

        def cuDriverGetVersion(self, version: Any) -> int:
            version._obj.value = 12090
            return 0

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA\tTest\x07 {index}" + "x" * 1000)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    found = fingerprint(torch.device("cuda", 62))
    assert found["device"].startswith("NVIDIA Test 62x")
    assert found["driver"] == "12"
    assert load(Store(path_of(found, tmp_path), found).path, found) is not None

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library("none"))
    assert fingerprint(torch.device("cuda", 63))["driver"] == "unknown"


def test_devices_without_a_fingerprint() -> None:
    with pytest.raises(ValueError, match="got device meta, needed a CPU or a GPU"):
        fingerprint(torch.device("meta"))


def test_the_fingerprint_imports_no_triton() -> None:
    code = "import sys, torch; from fastconv.operators.fingerprint import fingerprint; "
    code += "fingerprint(torch.device('cpu')); assert 'triton' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_digest_is_of_content_and_names(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    found = [digest(room)]
    (room / "a.py").write_text("x = 1")
    found.append(digest(room))
    (room / "a.py").write_text("x = 2")
    found.append(digest(room))
    (room / "a.py").rename(room / "b.py")
    found.append(digest(room))
    assert len(set(found)) == len(found)
    (room / "c.pyc").write_text("x = 3")
    assert digest(room, tmp_path / "none") == found[-1]


def test_the_fingerprint_knows_the_sources() -> None:
    """All of what runs on a device, Triton's kernels among them."""
    package = Path(fastconv.__file__).parent
    rooms = [package / name for name in ("aten_kernels", "triton_kernels")]
    assert fingerprint(CPU)["python"] == digest(*rooms)


def test_differences_are_said() -> None:
    assert differences(HERE, HERE) == ""
    assert differences({**OLDER, "driver": "13"}, HERE) == "torch 2.13.0 (here 2.14.1), driver 13 (here none)"
