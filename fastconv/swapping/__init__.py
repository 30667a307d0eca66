"""The same network, run by fused ops: `swap`; and what that changes in it: `explain`.

How it works, file by file: `regions` copies the tree of modules and replaces each forward; `tracing` turns a forward
into a graph, while `observing` sees to it that it does nothing but what is `harmless` and notes what it reads, whose
`contents` can be compared later; `effects` knows what the graph's nodes do to memory; `patterns` finds what can be
fused; `programs` puts the calls of `fused` and `prepared` in its place; `layout` keeps memory layouts as they were;
`explanation` tells the user.
"""

from .explanation import explain
from .regions import swap

__all__ = ["explain", "swap"]
