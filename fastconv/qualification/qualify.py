"""`qualify`: the kernels proved and timed on this machine, for the calls of a model; `auto` then takes what won."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..operators import backends, measured, table_files, tables
from ..operators.fingerprint import fingerprint
from ..operators.tables import Candidate, Entry
from . import conformance
from .calls import OperatorCall
from .candidates import REFERENCE, Contender, contenders
from .collecting import Collected, calls_of
from .examination import Options
from .processes import Died, Worker
from .progress import Progress
from .reporting import Qualification
from .worker import worker

# How many seconds a candidate may be silent: it compiles, float64 is computed beside it, it is timed.
PATIENCE = {"cpu": 300.0, "cuda": 60.0}
_ROUNDS = 3


def qualify(
    model_or_ops: nn.Module | Callable[..., Any],
    *example_inputs: Any,
    inference: bool = True,
    training: bool = True,
    search: bool = False,
    among: Iterable[str] | None = None,
    allow_lost_nan: bool = False,
    again: bool = False,
    show: bool = True,
) -> Qualification:
    """Proves and times everything that could run the layers of a model on this machine, and has ``auto`` use what won.

    Each layer is tried as the model calls it: dtype, layout, number of images. Every candidate (aten, cuDNN's fused
    operators, CUDA, Triton and CPU kernels, oneDNN's prepared convolutions) is held against float64 first, forward and
    backward, and timed beside aten if it is right. It runs in a process of its own: one that crashes or hangs costs
    itself alone. What was found is kept in a file of the user's, see `fastconv.operators.table_files`, after each
    layer; after Ctrl-C the same call goes on from there.

    Where CUDA kernels can run, the GPU's instructions come before them, once for a table: those that do not do what the
    kernels were proved with disable the kernels that use them, by name.

    Args:
        model_or_ops: a model, which is neither changed nor swapped; or any function that calls ops of `fastconv.ops`.
        example_inputs: what it is called with, on the device that counts.
        inference, training: whether it is run in evaluation mode without gradients, and in training mode with a
            backward.
        search: also tries block sizes of Triton's kernels, which takes minutes.
        among: only these backends, see `fastconv.use_backend`, and "onednn".
        allow_lost_nan: lets candidates win that turn a NaN into a number, as cuDNN's ReLU may.
        again: also what was measured before.
        show: progress on stderr.

    Raises:
        TypeError: neither a module nor a function was given.
        ValueError: no call of an op was found, or a name in `among` is unknown.

    >>> print(fastconv.qualify(model, torch.randn(32, 3, 224, 224, device="cuda")))
    >>> fast = fastconv.swap(model)
    """
    if not callable(model_or_ops) or isinstance(model_or_ops, type):
        raise TypeError(
            f"fastconv.qualify: got {type(model_or_ops).__name__}, needed a module or a function that calls ops; "
            "pass the model itself"
        )
    device = _device(model_or_ops, example_inputs)
    options = Options(known_backends(among), search, allow_lost_nan)

    def collect() -> Collected:
        return calls_of(model_or_ops, example_inputs, inference=inference, training=training)

    return in_rounds(collect, device, options, again=again, show=show)


def in_rounds(
    collect: Callable[[], Collected], device: torch.device, options: Options, *, again: bool = False, **more: Any
) -> Qualification:
    """As `examine`, of the calls that `collect` finds; and once more, where what won hands on other layouts, for the
    calls that it finds then."""
    fingerprint(device)  # of other devices there is none
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors have it
    collected = Collected()
    seconds = 0.0
    for turn in range(_ROUNDS):
        known = len(collected.calls)
        collected.add(collect())
        if not collected.calls:
            raise ValueError(
                "fastconv.qualify: got a model without convolutions, normalizations or sums that fastconv has an op "
                "for, needed one with some; fastconv.explain(model) says what it found"
            )
        if len(collected.calls) == known:
            break
        found = examine(collected, device, options, again=again and turn == 0, **more)
        seconds += found.seconds
        if found.is_interrupted:
            break
    return replace(found, seconds=seconds, failed=tuple(collected.failed))


def examine(
    collected: Collected,
    device: torch.device,
    options: Options,
    *,
    again: bool = False,
    show: bool = True,
    modules: Sequence[str] = (),
    patience: float | None = None,
    deadline: float | None = None,
) -> Qualification:
    """As `qualify`, of calls that were collected.

    Args:
        modules: what the processes import first, which may add backends.
        patience: seconds that a candidate may take between two signs of life; None for what its device needs.
        deadline: of time.monotonic(), after which no further call is begun.
    """
    here = fingerprint(device)
    path = table_files.path_of(here, table_files.user_folder())
    store = table_files.Store(path, here, options.allow_lost_nan)
    started = time.monotonic()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the other process
    patience = patience or PATIENCE[device.type]
    left_out: dict[tables.Key, str] = {}
    interrupted = False
    # Forwards first: whoever has no time for all of it has these.
    ordered = sorted(collected.calls.items(), key=lambda item: item[1].is_backward)
    known = store.table.entries
    todo = [call for key, call in ordered if again or not _is_known(known.get(key), call, device, options)]
    try:
        with worker(device, modules) as process, Progress("qualify", len(todo), show) as progress:
            if todo:
                _try_instructions(process, store, options, patience, again, progress)
            for call in todo:
                if deadline is not None and time.monotonic() > deadline:
                    interrupted = True
                    break
                progress.step(f"{call.operator} {'x'.join(map(str, call.shape_class.size))}")
                one = _Conversation(call, collected, options, process, store, patience, again)
                reason = one.hold(progress)
                if reason:
                    left_out[call.shape_class] = reason
                progress.advance()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        measured.forget()
        if store.problem:
            measured.use(device, store.table)
        else:
            measured.in_force(device)  # disables what differs, for this process, too
    entries = [store.table.entries[key] for key in collected.calls if key in store.table.entries]
    return Qualification(
        path,
        here["device"],
        tuple(entry for entry in entries if entry.complete),
        left_out,
        time.monotonic() - started,
        interrupted,
        dict(sorted(store.table.disabled.items())),
    )


def _try_instructions(
    worker: Worker, store: table_files.Store, options: Options, patience: float, again: bool, progress: Progress
) -> None:
    """Once for a table; what differs disables kernels there."""
    known = () if again else store.table.conformance
    try:
        for found in conformance.check(worker, options.among, patience, known):
            disabled = found.disabled
            store.conform(found.backend, found.kernels, disabled)
            for instruction, why in found.differs.items():
                progress.note(f"{found.backend}: {instruction} differs on this GPU: {why}")
            if disabled:
                progress.note(f"{found.backend}: {len(disabled)} of {len(found.kernels)} kernels are disabled")
    except Died as error:
        progress.note(f"the instructions were not tried: the process {error}")


def _is_known(entry: Entry | None, call: OperatorCall, device: torch.device, options: Options) -> bool:
    """Whether an entry answers what is asked."""
    if entry is None or not entry.complete:
        return False
    wanted = {one.backend for one in contenders(call, device, options.among)}
    return wanted <= {one.backend for one in entry.candidates} and (entry.searched or not options.search)


def known_backends(names: Iterable[str] | None) -> tuple[str, ...] | None:
    """The names; ValueError if there is no such backend."""
    if names is None:
        return None
    found = tuple(names)
    known = {*backends.names(), backends.PREPARED} - {"auto"}
    if unknown := set(found) - known:
        raise ValueError(
            f"fastconv.qualify: got backends {', '.join(sorted(unknown))}, needed some of {', '.join(sorted(known))}; "
            "see `python -m fastconv info`"
        )
    return found


def _device(model: Any, inputs: Sequence[Any]) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves(list(inputs)) if isinstance(leaf, Tensor)]
    tensors += list(model.parameters())[:1] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


class _Conversation:
    """With workers, about one call, until there is an entry."""

    def __init__(
        self,
        call: OperatorCall,
        collected: Collected,
        options: Options,
        worker: Worker,
        store: table_files.Store,
        patience: float,
        again: bool,
    ) -> None:
        self._call = call
        self._backward = tuple(tuple(one) for one in collected.backward.get(call.shape_class, ()))
        self._options = options
        self._worker = worker
        self._store = store
        self._patience = patience
        before = store.table.entries.get(call.shape_class)
        kept = before.candidates if before is not None and not again else ()
        self._known: dict[str, Candidate] = {_contender(one).key: one for one in kept}

    def hold(self, progress: Progress) -> str:
        """Why the call is left out; "" once its entry is in the table."""
        while True:
            trying: Contender | None = None
            try:
                for message in self._worker.ask(self._request(), self._patience):
                    if "trying" in message:
                        trying = Contender(*message["trying"])
                    elif "candidate" in message:
                        self._keep(tables.candidate(message["candidate"]), progress)
                    elif "entry" in message:
                        self._store.add(tables.entry(message["entry"]))
                    else:
                        return str(message["failed"])
                return ""
            except KeyboardInterrupt:
                self._save()
                raise
            except Died as error:
                if trying is None:
                    return f"the process that was to try it {error}"
                if trying.backend == REFERENCE:
                    return f"aten itself fails: its process {error}"
                known = self._known.get(trying.key)
                if known is None or known.outcome == "ok":
                    self._keep(Candidate(*trying, outcome="refused", reason=f"its process {error}"), progress)
                self._save()

    def _keep(self, found: Candidate, progress: Progress) -> None:
        self._known[_contender(found).key] = found
        if found.outcome != "ok":
            progress.note(f"{self._call.operator}: {_contender(found)} is refused: {found.reason}")

    def _save(self) -> None:
        """What is known so far: a candidate that ended its process is not to end the next."""
        candidates = tuple(self._known.values())
        self._store.add(Entry(*self._call.shape_class, candidates=candidates, complete=False))

    def _request(self) -> dict[str, Any]:
        return {
            "call": self._call.to_json(),
            "known": [tables.plain(one) for one in self._known.values()],
            "backward": [list(one) for one in self._backward],
            "options": asdict(self._options),
            "disabled": list(self._store.table.disabled),
            "threads": torch.get_num_threads(),
            "allow_tf32": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
        }


def _contender(found: Candidate) -> Contender:
    return Contender(found.backend, found.variant)
