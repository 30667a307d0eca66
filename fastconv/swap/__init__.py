"""The same network, run by fused ops: `swap`.

How it works, file by file: `regions` copies the tree of modules and replaces each forward; `tracing` turns a forward
into a graph; `effects` knows what the graph's nodes do to memory; `patterns` finds what can be fused; `programs`
puts the calls of `fused` and `prepared` in its place; `layout` keeps memory layouts as they were.
"""

from __future__ import annotations

from torch import nn

from . import regions

__all__ = ["swap"]


def swap(model: nn.Module) -> nn.Module:
    """A copy of a model that computes the same with fused ops; the model itself is left as it is.

    The two are one set of weights: the copy has the same Parameters and buffers, the very objects, under the same
    names, and whatever happens to them in either model (an optimizer's step, ``load_state_dict``, ``half()``) is seen
    by both. Make a ``copy.deepcopy`` of the result for one of its own. Modes (``train()``, ``eval()``), hooks and
    submodules belong to each model alone.

    The copy is of a subclass of the model's class and differs in the forwards only. They run, in the order of what
    applies:

    - without gradients: convolutions with batch norm in evaluation mode folded in, residual and activation attached,
      and weights packed for the processor. What is packed follows every change of the weights, see
      `fastconv.swap.prepared.PreparedConvs`.
    - with gradients, or under ``torch.compile``, ``torch.export`` and autocast: the differentiable ops of
      `fastconv.ops`.
    - otherwise, and wherever a forward cannot be traced safely, the forward as it was written.

    Only what the graph of the forward proves safe is fused; `fastconv.explain` says what that is, and why not the
    rest.

    Args:
        model: any module.

    >>> fast = fastconv.swap(model)
    >>> print(fastconv.explain(fast))
    """
    fast = regions.clone(model)
    regions.install(fast)
    regions.trace_ahead(fast)
    return fast
