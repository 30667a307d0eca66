"""setuptools' build_ext, with ninja to do the compiling."""

from __future__ import annotations

import atexit
import fcntl
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from .ninjafile import CPP_JOB_BYTES, Build
from .sources import ROOT
from .toolchain import Toolchain, fail, find_compiler, find_torch, parallel_jobs


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise fail(
                "torch was not found and an unisolated build cannot fetch it; pip install torch, "
                "or name a `torch` folder in FASTCONV_TORCH"
            )
        build = Build(self.distribution.get_version(), Toolchain(find_compiler(), torch))
        build.folder.mkdir(parents=True, exist_ok=True)
        with open(build.folder / ".lock", "w") as lock:
            _acquire(lock, build.folder)
            build.write()
            started = time.monotonic()
            _run_ninja(build.folder)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Processes that have the old one loaded keep it whole.
            fresh = target.with_name(f".{target.name}.new")
            shutil.copy2(build.library, fresh)
            fresh.replace(target)
        # pip and setuptools have much to say after this, so the summary waits for the end.
        atexit.register(print, build.summary(time.monotonic() - started), flush=True)


def _acquire(lock: IO[str], folder: Path) -> None:
    """Until this process ends or closes the file: ninja does not look for another one beside it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another build in {folder}", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _run_ninja(folder: Path) -> None:
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder)]
    jobs = f"-j{parallel_jobs(CPP_JOB_BYTES)}"
    if subprocess.run([*ninja, jobs]).returncode != 0:
        raise fail("the library was not built; the compiler's messages above say why")
    commands = subprocess.check_output([*ninja, "--quiet", "-t", "compdb", "cpp", "cuda"])
    (ROOT / "compile_commands.json").write_bytes(commands)
