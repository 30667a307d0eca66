"""An operator under vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def mapped(op: Callable[..., Any], fold_batch: Sequence[int]) -> Callable[..., Any]:
    """The rule of `op`: one call on a larger batch, or a loop; `fold_batch` as for `registration.Operator`."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        leaves, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)

        def batched(leaf: Tensor, dim: int | None) -> Tensor:
            return leaf.expand(size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)

        if size == 0:  # the shapes are those of a batch of one
            one = [
                leaf if dim is None else leaf.new_zeros(leaf.movedim(dim, 0).shape[1:])
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            results = pytree.tree_map(
                lambda out: out.new_empty(0, *out.shape), op(*pytree.tree_unflatten(one, structure))
            )
            return results, pytree.tree_map(lambda _: 0, results)

        mapped = {i for i, dim in enumerate(in_dims) if any(d is not None for d in pytree.tree_leaves(dim))}
        folded = {i: batched(args[i], in_dims[i]) for i in fold_batch if isinstance(args[i], Tensor)}
        if mapped <= folded.keys() and all(tensor.dim() > 1 for tensor in folded.values()):
            results = op(*(folded[i].flatten(0, 1) if i in folded else arg for i, arg in enumerate(args)))
            results = pytree.tree_map(lambda out: out.unflatten(0, (size, out.shape[0] // size)), results)
        else:
            columns = [
                [leaf] * size if dim is None else leaf.unbind(dim) for leaf, dim in zip(leaves, dims, strict=True)
            ]
            rows = [op(*pytree.tree_unflatten(list(row), structure)) for row in zip(*columns, strict=True)]
            results = pytree.tree_map(lambda *outs: torch.stack(outs), *rows)
        return results, pytree.tree_map(lambda _: 0, results)

    return rule
