"""What every operator registers with torch beside its kernels: fake, autograd, autocast and vmap.

Schemas and CPU kernels are in the C++ library; without it nothing is registered and the public
functions run the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .. import _library, backends

_fragment = torch.library.Library("fastconv", "FRAGMENT") if _library.LOADED else None
_AUTOCAST_DEVICES = ("cpu", "cuda")


# A rule gets the function to call (the dispatcher's overload, or the reference), the device type
# and the arguments.
AutocastRule = Callable[[Callable[..., Any], str, tuple[Any, ...]], Any]


class Operator:
    """One operator of csrc/schemas.cpp, completed and callable.

    Args:
        name: the name there.
        fake: shape, dtype and layout of the result, and the argument checks.
        setup_context, backward: as for ``torch.library.register_autograd``.
        fold_batch: positions of the arguments whose dimension 0 is a batch: where vmap maps over
            these alone, it becomes one call on a larger batch, otherwise a loop.
    """

    def __init__(
        self,
        name: str,
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        fold_batch: Sequence[int] = (),
    ) -> None:
        if _fragment is None:
            return
        qualified = f"fastconv::{name}"
        self._overload = getattr(torch.ops.fastconv, name).default
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        torch.library.register_vmap(qualified, _vmap_rule(self._overload, fold_batch))

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)


class PublicOperator(Operator):
    """An operator behind a public function.

    Args:
        reference: the meaning of the op in plain aten, with the argument checks; also its fake
            kernel, if there is no simpler one.
        autocast: the rule while autocast is on.
        others: as for `Operator`.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        autocast: AutocastRule,
        fake: Callable[..., Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(name, fake=fake or reference, **others)
        self._reference = reference
        self._autocast = autocast
        if _fragment is not None:
            for device in _AUTOCAST_DEVICES:
                _fragment.impl(name, self._autocast_kernel(device), f"Autocast{device.upper()}")

    def run(self, backend: str | None, input: Tensor, *args: Any) -> Any:
        """The op on the backend that was asked for, or else on the one chosen for the input."""
        if backends.choose(backend, input) != "reference" and not _only_aten_has_derivatives():
            return self._overload(input, *args)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            return self._autocast(self._reference, device, (input, *args))
        return self._reference(input, *args)

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
        excluded = torch._C.DispatchKeySet(key)

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return self._autocast(self._overload, device, args)

        return kernel


def _only_aten_has_derivatives() -> bool:
    """Whether forward mode or torch.func's grad or jvp is on.

    What `register_autograd` registers serves reverse mode alone: in forward mode tangents would be
    lost without a word, and torch.func's transforms refuse.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in interpreters)


# ----------------------------------------------------------------------------------------- autocast


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts what autocast casts: floating tensors other than float64, in lists too."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype is not torch.float64:
            return leaf.to(dtype)
        return leaf

    return pytree.tree_map(one, value)


def autocast_to_low_precision(function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
    """The rule for convolutions: all tensors in the dtype of the autocast context."""
    return function(*cast(args, torch.get_autocast_dtype(device)))


# --------------------------------------------------------------------------------------------- vmap


def _vmap_rule(op: Callable[..., Any], fold_batch: Sequence[int]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        leaves, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)

        def batched(leaf: Tensor, dim: int | None) -> Tensor:
            return leaf.expand(size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)

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
