"""How fastconv's library is built: `backend` is what pip calls, `extension` is what setup.py calls.

`toolchain` finds what this machine offers, `sources` says what is compiled for which GPUs, `ninjafile` turns both into a
build.ninja.
"""

from importlib.util import find_spec

_missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
if _missing:
    raise SystemExit(
        f"fastconv: the build needs {' and '.join(_missing)}; pip install {' '.join(_missing)}, "
        "or leave out --no-build-isolation"
    )
