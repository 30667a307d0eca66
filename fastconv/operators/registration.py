"""What every operator registers with torch beside its kernels: fake, autograd, autocast and vmap.

Schemas and kernels are in the C++ library; without it the public functions run the reference. A
namespace is a set of kernels for all operators: "fastconv" is the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import auto, backends, checks, destinations, library, precision
from .autocast import DEVICES, AutocastRule, below_autocast, dispatch_key
from .schemas import argument_names
from .vmap import mapped

_operators: dict[str, Operator] = {}
_namespaces: dict[str, torch.library.Library] = {}


def add_namespace(name: str) -> None:
    """Completes the operators of ``torch.ops.<name>``, which has those of csrc/schemas.cpp, with kernels."""
    if name not in _namespaces:
        _namespaces[name] = torch.library.Library(name, "FRAGMENT")
        for operator in _operators.values():
            operator.complete(name)


def public(name: str) -> PublicOperator:
    """The operator behind a public function."""
    found = _operators[name]
    assert isinstance(found, PublicOperator)
    return found


class Operator:
    """One operator of csrc/schemas.cpp, completed in every namespace and callable in each.

    Args:
        name: the name there.
        fake: shape, dtype and layout of the result, and the argument checks.
        setup_context, backward: as for ``torch.library.register_autograd``; the context has an
            attribute `namespace` for what the backward calls.
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
        self.name = name
        self._fake = fake
        self._setup_context = setup_context
        self._backward = backward
        self._fold_batch = fold_batch
        self._arguments = argument_names(name)
        self._overloads: dict[str, Callable[..., Any]] = {}
        _operators[name] = self
        for namespace in _namespaces:
            self.complete(namespace)

    def complete(self, namespace: str) -> None:
        qualified = f"{namespace}::{self.name}"
        overload = getattr(getattr(torch.ops, namespace), self.name).default
        self._overloads[namespace] = overload

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.namespace = namespace
            self._setup_context(ctx, inputs, output)

        torch.library.register_fake(qualified, self._fake)
        torch.library.register_autograd(qualified, self._backward, setup_context=setup_context)
        torch.library.register_vmap(qualified, self._vmap_rule(overload))

    def _check_storage(self, args: Sequence[Any]) -> None:
        """Before anything but a kernel reads the arguments; kernels have checks of their own."""
        for name, value in zip(self._arguments, args, strict=True):
            for tensor in destinations.tensors([value]):
                checks.storage(self.name, name, tensor)

    def _vmap_rule(self, overload: Callable[..., Any]) -> Callable[..., Any]:
        on_tensors = mapped(overload, self._fold_batch)

        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            self._check_storage(args)
            return on_tensors(info, in_dims, *args)

        return rule

    def __call__(self, namespace: str, *args: Any) -> Any:
        return self._overloads[namespace](*args)


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
        self._qualified = f"fastconv::{name}"
        self.reference = reference
        self._autocast = autocast
        super().__init__(name, fake=fake or reference, **others)

    def complete(self, namespace: str) -> None:
        super().complete(namespace)
        for device in DEVICES:
            kernel = self._autocast_kernel(self._overloads[namespace], device)
            _namespaces[namespace].impl(self.name, kernel, dispatch_key(device))

    def run(self, backend: str | None, input: Tensor, *args: Any) -> Any:
        """The op on the backend that was asked for, or else on the one chosen for the call."""
        if _only_aten_has_derivatives():
            backends.choose(backend, input, self._qualified)  # its errors
            function = self.reference
        elif auto.is_on(backend, input.device):
            function = self._measured
        else:
            namespace = backends.namespace(backends.choose(backend, input, self._qualified))
            if namespace is not None:
                return self._overloads[namespace](input, *args)
            function = self.reference
        device = input.device.type
        if torch.is_autocast_enabled(device):
            return self._cast(function, device, (input, *args))
        return function(input, *args)

    def _measured(self, *args: Any) -> Any:
        """By the tables of this machine; the arguments are what autocast has made of them."""
        if torch.compiler.is_compiling():
            return getattr(getattr(torch.ops, auto.CHOSEN), self.name)(*args)
        return self.on(auto.choose(self.name, args))(*args)

    def on(self, namespace: str | None) -> Callable[..., Any]:
        """What computes the op in a namespace; None for aten."""
        return self.reference if namespace is None else self._overloads[namespace]

    def _cast(self, function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
        self._check_storage(args)
        return self._autocast(function, device, args)

    def _autocast_kernel(self, overload: Callable[..., Any], device: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            with below_autocast(device):
                return self._cast(overload, device, args)

        return kernel


class OutOperator(PublicOperator):
    """A public operator with an overload ``out``, whose last argument takes the result: a tensor, or one for each.

    Not differentiable, as torch's own ``out=`` is not.
    """

    def __init__(self, name: str, **others: Any) -> None:
        self._out_overloads: dict[str, Callable[..., Any]] = {}
        super().__init__(name, **others)

    def complete(self, namespace: str) -> None:
        super().complete(namespace)
        name = f"{self.name}.out"
        overload = getattr(getattr(torch.ops, namespace), self.name).out
        self._out_overloads[namespace] = overload
        torch.library.register_fake(f"{namespace}::{name}", self._fake_out)
        library = _namespaces[namespace]
        library.impl(name, self._autograd_out_kernel(overload), "Autograd")
        library.impl(name, self._version_kernel(overload), "ADInplaceOrView")
        for device in DEVICES:
            library.impl(name, self._autocast_out_kernel(overload, device), dispatch_key(device))

    def run(self, backend: str | None, input: Tensor, *args: Any, out: Any = None) -> Any:
        """As for every operator; into `out`, if there is one, which is then returned."""
        if out is None:
            return super().run(backend, input, *args)
        if auto.is_on(backend, input.device) and not torch.compiler.is_compiling():
            # Autocast is yet to cast what the choice depends on: it is made once that is done.
            casts = torch.is_autocast_enabled(input.device.type)
            namespace = auto.MEASURED if casts else auto.choose(self.name, (input, *args))
        else:
            namespace = backends.namespace(backends.choose(backend, input, self._qualified))
        if namespace is not None and not _only_aten_has_derivatives():
            self._out_overloads[namespace](input, *args, out)
        else:
            self._refuse_gradients(input, *args, out)
            if not torch.compiler.is_compiling():
                self._check_writable(out)
            destinations.store(self.name, super().run("reference", input, *args), (input, *args), out)
        return out

    def _fake_out(self, *args: Any) -> None:
        *given, out = args
        destinations.check_for(self.name, self._fake(*given), given, out)

    def _autograd_out_kernel(self, overload: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any) -> None:
            self._refuse_gradients(*args)
            with torch._C._AutoDispatchBelowAutograd():
                overload(*args)

        return kernel

    def _autocast_out_kernel(self, overload: Callable[..., Any], device: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> None:
            *given, out = args
            self._refuse_gradients(*args)
            with below_autocast(device):
                found = self._cast(lambda *cast: overload(*cast, out), device, tuple(given))
                if found is not None:  # the rule did without the overload
                    self._check_writable(out)
                    destinations.store(self.name, found, given, out)

        return kernel

    def _version_kernel(self, overload: Callable[..., Any]) -> Callable[..., Any]:
        """Counts the write, so that autograd notices where an older value was needed."""

        def kernel(*args: Any) -> None:
            self._check_writable(args[-1])
            torch.autograd.graph.increment_version(args[-1])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                overload(*args)

        return kernel

    def _check_writable(self, out: Any) -> None:
        for tensor in destinations.tensors([out]):
            destinations.check_writable(self.name, tensor)

    def _refuse_gradients(self, *args: Any) -> None:
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in destinations.tensors(args))
        destinations.check_no_gradient(self.name, wanted)


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


# The library's glue asks for it: the stable ABI does not know torch's switches.
_own = torch.library.Library("fastconv", "FRAGMENT")
_own.define("_allow_tf32() -> bool")
_own.impl("_allow_tf32", precision.allow_tf32, "CompositeExplicitAutograd")

if library.LOADED:
    add_namespace("fastconv")
