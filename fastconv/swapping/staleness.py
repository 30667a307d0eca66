"""What is watched: whether a trace still means what its module does, and whether prepared weights are still those."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import backends, library, measured
from . import patterns
from .calls.call import Prepared
from .tracing.contents import ClassPlace, Place
from .tracing.modules import BOOKKEEPING, REGION, has_hooks, hooks_of, is_leaf, is_region
from .tracing.reading import Reads

if library.LOADED:
    from .. import _C


class Watch:
    """Everything that a trace of a module depends on, as it is now."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        for module in filter(is_region, modules):
            vars(module).setdefault(REGION, None)  # else it would count as an attribute that is added later
        self._modules = modules
        self._all = [vars(m) for m in modules]
        inlined = [m for m in modules if m is root or not is_leaf(m)]
        leaves = [m for m in modules if m is not root and is_leaf(m)]
        self._attributes = [(vars(m), name) for m in inlined for name in vars(m) if name not in BOOKKEEPING]
        of_layers = patterns.attributes()
        self._attributes += [(vars(m), name) for m in leaves for name in of_layers if name in vars(m)]
        scripted = torch.jit.ScriptModule
        # Of a ModuleList, too, whose content forwards go through.
        self._children = [m._modules for m in modules if not isinstance(m, scripted)]
        stores = [store for m in leaves if not isinstance(m, scripted) for store in (m._parameters, m._buffers)]
        self._tensors = [(store, name) for store in stores for name in store]
        # The root's own hooks run around its forward as ever.
        self._hooks = [hooks for m in modules if m is not root and not has_hooks(m) for hooks in hooks_of(m)]
        self._state = self._observe()
        self._reads: list[Place | ClassPlace] = []
        self._of_leaves: list[tuple[dict[str, Any], str, Any]] = []

    def add(self, reads: Reads, depends_on: Iterable[tuple[nn.Module, str]]) -> None:
        """What the forward was seen to read beside the attributes of its modules; and attributes of layers on which
        it depends that what was found in it holds."""
        self._reads = reads.places
        self._of_leaves = [*reads.of_leaves, *((vars(m), name, vars(m)[name]) for m, name in depends_on)]

    def _observe(self) -> list[Any]:
        state: list[Any] = [module.training for module in self._modules]
        state += map(type, self._modules)
        state += map(len, self._all)
        state += [attributes.get(name) for attributes, name in self._attributes]
        state += [store.get(name) is None for store, name in self._tensors]
        for children in self._children:
            state += children.keys()
            state += children.values()
        return state

    def holds(self) -> bool:
        """Whether all of it is still so: modes, classes, attributes with their content, submodules, parameters that
        are there, globals and variables that were read, and no hooks where there were none."""
        return self.attributes_hold() and all(place.holds() for place in self._reads)

    def holds_compiled(self) -> bool:
        """As `holds`, while torch.compile looks on."""
        return self.attributes_hold() and all(place.holds_compiled() for place in self._reads)

    def attributes_hold(self) -> bool:
        state = self._observe()
        if len(state) != len(self._state) or not all(map(operator.is_, state, self._state)) or any(self._hooks):
            return False
        return all(store.get(name) is value for store, name, value in self._of_leaves)


class PreparedWeights:
    """What the calls of one program have prepared, kept up to date together.

    The state that is compared: the identity, version, address, size, strides and dtype of every tensor, the
    batch norms' eps, the convolutions' geometry, which tables of this machine are in force, the number of threads, and
    for the CPU a fingerprint of the data. Every write that torch counts changes the version. A write that it does not
    count (through ``.data``, NumPy or another library) is seen
    if it changes one of the bytes of which the fingerprint is taken: all of a tensor of up to 4 KiB (batch norms,
    biases), and of a larger one 64 stretches of 64 bytes, evenly spread from its first byte to its last. So a tensor
    that was overwritten as a whole is always noticed, and a single number changed in that way may not be.
    """

    def __init__(self, prepared: Sequence[Prepared]) -> None:
        self._prepared = prepared
        self._state: list[Any] | None = None
        self._pending: list[Any] | None = None
        self._tensors: list[Tensor] = []  # keeps the identities in _state unique
        self._lock = threading.Lock()
        self._slots = [slot for one in prepared for slot in one.sources()]

    def refresh(self) -> bool:
        """Makes everything ready for the present parameters; False if they have only just changed.

        Parameters that change between any two forwards, as in training, are not worth preparing: after a change it
        takes a second forward with the same ones.
        """
        tensors, state = self._observe()
        if state == self._state:
            return True
        with self._lock:
            if state == self._state:
                return True
            if self._state is not None and state != self._pending:
                self._pending = state
                return False
            for one in self._prepared:
                one.prepare()
            self._tensors, self._state = tensors, state
        return True

    def _observe(self) -> tuple[list[Tensor], list[Any]]:
        tensors = [store[name] for store, name in self._slots]
        addresses = list(map(Tensor.data_ptr, tensors))
        sizes = list(map(operator.attrgetter("nbytes"), tensors))
        try:
            versions = list(map(operator.attrgetter("_version"), tensors))
        except RuntimeError:  # tensors made in inference mode have no version
            versions = [None if t.is_inference() else t._version for t in tensors]
        state = [
            list(map(id, tensors)),
            addresses,
            sizes,
            versions,
            list(map(Tensor.stride, tensors)),
            list(map(operator.attrgetter("dtype"), tensors)),
            [one.settings() for one in self._prepared],
            torch._C._get_mkldnn_enabled(),
            backends.current(),
            measured.generation(),
            torch.get_num_threads(),
        ]
        if tensors and tensors[0].device.type == "cpu":
            state.append(_C.fingerprint(addresses, sizes))
        return tensors, state
