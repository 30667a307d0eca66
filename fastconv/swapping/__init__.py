"""The same network, run by fused ops: `swap`; and what that changes in it: `explain`.

How it works, room by room: `regions` replaces each forward of a tree of modules, after `copying` it; `tracing` turns a
forward into a graph, or says why that would not be safe; `matching` knows what the graph's nodes do to memory, and who
reads what, with which `patterns` find what can be fused; `programs` puts `calls` in its place, while `layout` keeps
memory layouts as they were; `staleness` watches what all of it depends on; `explanation` tells the user.
"""

from .explanation import explain
from .regions import swap

__all__ = ["explain", "swap"]
