"""Contenders take turns, within their time."""

from fastconv.measure import timing
from fastconv.measure.timing import Result


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    results = {name: Result() for name in calls}
    timing.take_turns(calls, results, allowance=0.0)
    assert "".join(order) == "ab" * timing.FEWEST_RUNS
    timing.take_turns(calls, results, allowance=60.0)
    assert all(len(result.seconds) == timing.MOST_RUNS for result in results.values())


def test_spread():
    assert Result([3.0]).spread == (3.0, 3.0)
    assert Result([5.0, 1.0, 3.0, 2.0, 4.0]).median == 3.0
    assert Result([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]).spread == (2.0, 5.0)


def test_a_budget_is_shared_out():
    budget = timing.Budget(seconds=24.0, tasks=3)
    assert 3.9 < budget.next_task() <= 4.0  # half of a third: the other half is for building and verifying
    assert 5.9 < budget.next_task() <= 6.0
    assert timing.Budget(seconds=-1.0, tasks=1).next_task() == 0.0
