"""The modules of tools/, which is no package: they import each other by their names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import expected
import gpu_model
import hot_kernels
import machine_code
import plans
import sass_tables
import zoo_convolutions

__all__ = ["expected", "gpu_model", "hot_kernels", "machine_code", "plans", "sass_tables", "zoo_convolutions"]
