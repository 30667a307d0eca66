"""The table of what was measured as a document: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastconv.operators import tables
from fastconv.operators.tables import Candidate, Entry, Table, TableError, from_json, storable, to_json

WINNER = Candidate(
    "triton",
    {"conv2d_fprop 16bit spatial wide": {"BLOCK_M": 64, "num_warps": 4}},
    outcome="ok",
    error=1e-3,
    baseline_error=2e-3,
    deterministic=False,
    seconds=(1e-5, 9e-6, 2e-5),
    host_seconds=(1e-6, 1e-6, 1e-6),
    graph_seconds=(8e-6, 8e-6, 9e-6),
    ratio=(0.5, 0.4, 0.6),
)
SLOWER = Candidate("cuda", {"conv2d_fprop": "conv2d_fprop_fp16_64x64_sm80"}, outcome="ok", reason="slower by 8 %")
WRONG = Candidate("cudnn", outcome="refused", reason="its largest error is 0.3, allowed is 0.01", keeps_nan=False)
FAMILY = "float16 channels_last 3x3 stride 1, Überlauf"
FORWARD = Entry(
    "conv2d_relu", FAMILY, (8, 56, 56, 64), (WINNER, SLOWER, WRONG), (("conv2d_backward", FAMILY, (8, 56, 56)),)
)
INTERRUPTED = Entry("conv2d_backward", FAMILY, (8, 56, 56), (WRONG,), complete=False)


def table(*entries: Entry) -> Table:
    fingerprint = {"device": "NVIDIA Test", "torch": "2.14.1+cu130"}
    found = {entry.key: entry for entry in entries}
    return Table(fingerprint, disabled={"a_kernel": "wgmma: wrong"}, entries=found, conformance=("cuda",))


def document(*entries: Entry) -> dict[str, Any]:
    """Of a small table, as a file has it."""
    return json.loads(json.dumps(to_json(table(*entries or (FORWARD, INTERRUPTED)))))


# ---------------------------------------------------------------------------------------- there and back

texts = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
words = st.from_regex(r"[A-Za-z0-9_.-]{1,8}( [A-Za-z0-9_.-]{1,8}){0,2}", fullmatch=True)
numbers = st.floats(0, sys.float_info.max)
times = st.none() | st.tuples(numbers, numbers, numbers)
sizes = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
variants = st.dictionaries(words, words | st.dictionaries(words, st.integers(0, 2**16), max_size=3), max_size=3)


def candidates(outcome: str, reasons: st.SearchStrategy[str]) -> st.SearchStrategy[Candidate]:
    return st.builds(
        Candidate,
        words,
        variants,
        outcome=st.just(outcome),
        reason=reasons,
        error=st.none() | numbers,
        baseline_error=st.none() | numbers,
        deterministic=st.booleans(),
        keeps_nan=st.booleans(),
        seconds=times,
        host_seconds=times,
        graph_seconds=times,
    )


right, refused = candidates("ok", st.just("") | texts), candidates("refused", texts)
complete = st.tuples(st.lists(right, min_size=1, max_size=3), st.lists(refused, max_size=2)).map(
    lambda found: tuple(found[0] + found[1])
)
keys = st.tuples(words, texts, sizes)
entries = st.builds(Entry, words, texts, sizes, complete, st.lists(keys, max_size=2).map(tuple))
interrupted = st.builds(
    Entry, words, texts, sizes, st.lists(refused | right, max_size=2).map(tuple), complete=st.just(False)
)
whole_tables = st.builds(
    Table,
    st.dictionaries(words, texts, max_size=3).map(lambda found: {**found, "device": "any"}),
    st.booleans(),
    st.dictionaries(texts, texts, max_size=2),
    st.lists(entries | interrupted, max_size=3).map(lambda found: {entry.key: entry for entry in found}),
    st.sets(words, max_size=2).map(lambda found: tuple(sorted(found))),
)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(whole_tables)
def test_there_and_back(before: Table) -> None:
    text = json.dumps(to_json(before), allow_nan=False)
    after = from_json(json.loads(text))
    assert after == before
    assert json.dumps(to_json(after)) == text


def test_every_field_is_in_the_document() -> None:
    """A field that is added to a class and not to what a document may have would be lost."""
    everything = dataclasses.replace(WINNER, reason="slower by 8 %", keeps_nan=False)
    entry = dataclasses.replace(FORWARD, candidates=(everything,), searched=True, complete=False)
    (found,) = document(entry)["entries"]
    assert set(found) == {field.name for field in dataclasses.fields(Entry)}
    assert set(found["candidates"][0]) == {field.name for field in dataclasses.fields(Candidate)}


def test_equal_tables_have_equal_documents() -> None:
    """Whatever came first."""
    one = table(FORWARD, INTERRUPTED)
    other = table(INTERRUPTED, FORWARD)
    other.fingerprint = dict(reversed(other.fingerprint.items()))
    one.disabled, other.disabled = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    blocks = {"BLOCK_N": 1, "BLOCK_M": 2}
    one.entries["x", "y", ()] = Entry("x", "y", (), (Candidate("triton", {"k": blocks}, outcome="ok"),))
    turned = {"k": dict(reversed(blocks.items()))}
    other.entries["x", "y", ()] = Entry("x", "y", (), (Candidate("triton", turned, outcome="ok"),))
    assert json.dumps(to_json(one)) == json.dumps(to_json(other))


# ----------------------------------------------------------------------------------- what is not taken

FIRST = "table.entries[0]"  # INTERRUPTED: entries are sorted
CANDIDATE = f"{FIRST}.candidates[0]"


def of_table(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(fields)


def of_entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["entries"][0].update(fields)


def of_candidate(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["entries"][0]["candidates"][0].update(fields)


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return change


OK = {"backend": "cpu", "outcome": "ok"}
REFUSED = {"backend": "cpu", "outcome": "refused", "reason": "wrong"}
DAMAGE = {
    "another format": (of_table(format="fastconv table 2"), "table.format", "'fastconv table 2'", tables.FORMAT),
    "no format": (without("format"), "table", "the field 'format'"),
    "no entries": (without("entries"), "table", "the field 'entries'"),
    "an unknown field": (of_table(code="import os"), "a field of table", "'code'", "one of format"),
    "no device": (without("fingerprint", "device"), "table.fingerprint", "the device"),
    "a version that is a number": (of_table(fingerprint={"device": "x", "torch": 2.1}), "table.fingerprint.torch 2.1"),
    "a truth value that is a number": (of_table(allow_lost_nan=1), "table.allow_lost_nan 1", "true or false"),
    "entries by name": (of_table(entries={}), "table.entries", "a list"),
    "a backend that is a path": (of_table(conformance=["../x"]), "table.conformance[0] '../x'", "letters"),
    "a reason that is none": (of_table(disabled={"a": None}), "table.disabled.a", "a text"),
    "a list that is too long": (of_table(entries=[0] * 100_001), "table.entries", "up to 100000"),
    "an entry that is none": (of_table(entries=[None]), f"{FIRST} None", "operator, family"),
    "an entry twice": (lambda d: d["entries"].append(d["entries"][0]), "table.entries[2]", "one of each"),
    "an operator that is a path": (of_entry(operator="../../x"), f"{FIRST}.operator '../../x'", "letters"),
    "two lines": (of_entry(family="a\nb"), f"{FIRST}.family", "one line"),
    "half a surrogate": (of_entry(family="\ud800"), f"{FIRST}.family", "printed"),
    "an empty text": (of_entry(family=""), f"{FIRST}.family ''", "not empty"),
    "a text that is too long": (of_entry(family="x" * 2001), f"{FIRST}.family", "2000 characters"),
    "a size with a fraction": (of_entry(size=[1.5]), f"{FIRST}.size[0] 1.5", "an integer"),
    "a negative size": (of_entry(size=[-1]), f"{FIRST}.size[0] -1", "an integer, 0 to"),
    "a truth value as a size": (of_entry(size=[True]), f"{FIRST}.size[0] True", "an integer"),
    "a size that is too large": (of_entry(size=[2**40 + 1]), f"{FIRST}.size[0]", "an integer, 0 to"),
    "a key with two parts": (of_entry(backward=[["a", "b"]]), f"{FIRST}.backward[0]", "a list of 3"),
    "complete without a winner": (of_entry(complete=True), f"{FIRST}.candidates", "the winner"),
    "complete and empty": (of_entry(complete=True, candidates=[]), f"{FIRST}.candidates", "the winner"),
    "a refused one between": (
        of_entry(complete=True, candidates=[OK, REFUSED, OK]),
        f"{FIRST}.candidates",
        "refused ones last",
    ),
    "no outcome": (without("entries", 0, "candidates", 0, "outcome"), CANDIDATE, "the field 'outcome'"),
    "an unknown outcome": (of_candidate(outcome="fine"), f"{CANDIDATE}.outcome 'fine'", '"ok" or "refused"'),
    "an outcome that is a list": (of_candidate(outcome=["ok"]), f"{CANDIDATE}.outcome", '"ok" or "refused"'),
    "refused without a reason": (of_candidate(reason=""), CANDIDATE, "without a reason"),
    "a backend that is a module": (of_candidate(backend="os;"), f"{CANDIDATE}.backend 'os;'", "letters"),
    "a negative error": (of_candidate(error=-1e-9), f"{CANDIDATE}.error -1e-09", "not negative"),
    "NaN": (of_candidate(error=float("nan")), f"{CANDIDATE}.error nan", "a finite number"),
    "infinity": (of_candidate(baseline_error=float("inf")), f"{CANDIDATE}.baseline_error inf", "a finite number"),
    "more than a float holds": (of_candidate(error=10**400), f"{CANDIDATE}.error", "a finite number"),
    "a truth value as an error": (of_candidate(error=True), f"{CANDIDATE}.error True", "a finite number"),
    "a number in a text": (of_candidate(error="0.1"), f"{CANDIDATE}.error '0.1'", "a finite number"),
    "a time without spread": (of_candidate(seconds=1.0), f"{CANDIDATE}.seconds 1.0", "a list of 3"),
    "two times": (of_candidate(seconds=[1.0, 2.0]), f"{CANDIDATE}.seconds [1.0, 2.0]", "a list of 3"),
    "a time that is negative": (of_candidate(seconds=[1, -2, 3]), f"{CANDIDATE}.seconds[1] -2", "not negative"),
    "a variant in words": (of_candidate(variant="large"), f"{CANDIDATE}.variant 'large'", "names with values"),
    "a kernel that is code": (of_candidate(variant={"k": "f()"}), f"{CANDIDATE}.variant.k 'f()'", "letters"),
    "blocks of a fraction": (of_candidate(variant={"k": {"M": 0.5}}), f"{CANDIDATE}.variant.k.M 0.5", "an integer"),
    "blocks that are huge": (of_candidate(variant={"k": {"M": 65537}}), f"{CANDIDATE}.variant.k.M 65537", "65536"),
    "blocks in blocks": (of_candidate(variant={"k": {"M": {}}}), f"{CANDIDATE}.variant.k.M", "an integer"),
    "blocks with odd names": (of_candidate(variant={"k": {"__;": 1}}), f"a name in {CANDIDATE}.variant.k", "letters"),
    "too many names": (of_candidate(variant={str(i): "k" for i in range(1001)}), f"{CANDIDATE}.variant", "1000"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_taken(name: str) -> None:
    damage, *texts = DAMAGE[name]
    found = document()
    damage(found)
    with pytest.raises(TableError) as caught:
        from_json(found)
    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert message.startswith("got "), message
    assert len(message) < 300, message


@pytest.mark.parametrize("found", [None, [], "table", 3, float("nan"), {}])
def test_what_is_no_table(found: object) -> None:
    with pytest.raises(TableError, match="table"):
        from_json(found)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def damaged(document: Any, data: st.DataObject) -> Any:
    """One value anywhere within replaced, removed, doubled or put under another name."""
    place = document
    while True:
        inside = list(place) if isinstance(place, dict) else range(len(place))
        step = data.draw(st.sampled_from(inside)) if inside else None
        deeper = step is not None and isinstance(place[step], (dict, list)) and place[step]
        if not deeper or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[step]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "add" or step is None:
        if isinstance(place, dict):
            place[data.draw(st.text(max_size=5) | st.sampled_from(["error", "complete"]))] = data.draw(values)
        else:
            place.append(data.draw(values | st.sampled_from(place) if place else values))
    elif action == "remove":
        del place[step]
    else:
        place[step] = data.draw(values)
    return document


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_damage(data: st.DataObject) -> None:
    """It is a table that can be written and read again, or one clear error."""
    found = damaged(damaged(document(), data), data)
    before = copy.deepcopy(found)
    with contextlib.suppress(TableError):
        taken = from_json(found)
        assert from_json(json.loads(json.dumps(to_json(taken), allow_nan=False))) == taken
    assert repr(found) == repr(before)


# ------------------------------------------------------------------------------------- what is put in


def test_reasons_are_shortened() -> None:
    """Those that come from an exception have many lines."""
    entry = dataclasses.replace(INTERRUPTED, candidates=(dataclasses.replace(WRONG, reason="out of\n\tmemory " * 999),))
    reason = storable(entry).candidates[0].reason
    assert reason.startswith("out of memory out of")
    assert reason.endswith("...")
    assert len(reason) == tables.LONGEST


@pytest.mark.parametrize("error", [float("nan"), float("inf"), -1.0])
def test_what_no_table_holds_is_an_error_at_once(error: float) -> None:
    entry = dataclasses.replace(FORWARD, candidates=(dataclasses.replace(WINNER, error=error),))
    with pytest.raises(TableError, match=r"entry\.candidates\[0\]\.error"):
        storable(entry)


def test_what_is_put_in_comes_out() -> None:
    assert storable(FORWARD) == FORWARD
    assert storable(INTERRUPTED) == INTERRUPTED
