"""The stopping rule: exact whatever the chunks, and in the stated order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cape.config import StoppingRule
from cape.convergence.stopping import TrajectoryScan
from cape.errors import SpecError


def one_by_one(losses: list[float], rule: StoppingRule, epsilons: tuple[float, ...]) -> dict[str, object]:
    """The rule as the design words it, one loss after the other."""
    crossings: dict[float, int | None] = dict.fromkeys(epsilons)
    for t, loss in enumerate(losses):
        if not math.isfinite(loss):
            return {"t_star": crossings, "reason": "diverged", "at": t}
        for epsilon in epsilons:
            if crossings[epsilon] is None and loss <= epsilon * losses[0]:
                crossings[epsilon] = t
        if crossings[min(epsilons)] is not None:
            return {"t_star": crossings, "reason": "reached", "at": t}
        if t + 1 >= rule.plateau_window:
            first = losses[t + 1 - rule.plateau_window]
            if (first - loss) / first < rule.plateau_tolerance:
                return {"t_star": crossings, "reason": "plateau", "at": t}
        if t >= rule.max_steps:
            return {"t_star": crossings, "reason": "cap", "at": t}
    return {"t_star": crossings, "reason": None, "at": None}


loss_values = st.one_of(
    st.floats(min_value=1e-6, max_value=10.0),
    st.sampled_from([0.1, 0.2, 0.5, 1.0, 1.0, 1.0, float("nan"), float("inf")]),
)


@settings(max_examples=300, deadline=None)
@given(
    losses=st.lists(loss_values, min_size=1, max_size=60),
    cuts=st.lists(st.integers(min_value=1, max_value=20), min_size=1, max_size=60),
    max_steps=st.integers(min_value=1, max_value=70),
    window=st.integers(min_value=2, max_value=30),
    tolerance=st.sampled_from([0.0, 1e-4, 0.3]),
    epsilons=st.sampled_from([(0.1,), (0.2, 0.15, 0.1), (0.9, 0.5)]),
)
def test_any_chunking_gives_the_result_of_a_check_after_every_step(
    losses: list[float], cuts: list[int], max_steps: int, window: int, tolerance: float, epsilons: tuple[float, ...]
) -> None:
    rule = StoppingRule(max_steps=max_steps, plateau_window=window, plateau_tolerance=tolerance)
    expected = one_by_one(losses, rule, epsilons)
    scan = TrajectoryScan(rule, epsilons)
    position, i = 0, 0
    while position < len(losses):  # chunks go on past the end, as a device that ran ahead delivers them
        size = cuts[i % len(cuts)]
        scan.feed(losses[position : position + size])
        position, i = position + size, i + 1
    assert scan.t_star == expected["t_star"]
    assert scan.stop_reason == expected["reason"]
    assert scan.stopped_at == expected["at"]
    seen = losses if scan.stopped_at is None else losses[: scan.stopped_at + 1]
    np.testing.assert_array_equal(scan.losses, seen)


def test_a_window_needs_exactly_its_number_of_losses() -> None:
    scan = TrajectoryScan(StoppingRule(max_steps=100, plateau_window=5, plateau_tolerance=1e-4), (0.1,))
    assert not scan.feed([1.0, 1.0, 1.0, 1.0])
    assert scan.feed([1.0])
    assert (scan.stop_reason, scan.stopped_at) == ("plateau", 4)


def test_a_crossing_exactly_at_epsilon_counts_and_one_loss_may_cross_several() -> None:
    scan = TrajectoryScan(StoppingRule(), (0.5, 0.25))
    assert scan.feed([2.0, 1.0, 0.5])
    assert scan.t_star == {0.5: 1, 0.25: 2}
    jump = TrajectoryScan(StoppingRule(), (0.5, 0.25))
    assert jump.feed([2.0, 0.1])
    assert jump.t_star == {0.5: 1, 0.25: 1}


def test_minus_infinity_is_divergence_and_crosses_nothing() -> None:
    scan = TrajectoryScan(StoppingRule(), (0.2, 0.1))
    assert scan.feed([1.0, float("-inf")])
    assert scan.stop_reason == "diverged"
    assert scan.t_star == {0.2: None, 0.1: None}


def test_history_grows_beyond_its_first_allocation() -> None:
    losses = np.linspace(2.0, 1.0, 3001)
    scan = TrajectoryScan(StoppingRule(max_steps=3000), (0.1,))
    for start in range(0, len(losses), 700):
        scan.feed(losses[start : start + 700])
    assert (scan.stop_reason, scan.stopped_at) == ("cap", 3000)
    np.testing.assert_array_equal(scan.losses, losses)


@pytest.mark.parametrize("epsilons", [(), (0.0,), (1.0,), (-0.1,), (float("nan"),)])
def test_epsilons_outside_the_open_interval_are_refused(epsilons: tuple[float, ...]) -> None:
    with pytest.raises(SpecError):
        TrajectoryScan(StoppingRule(), epsilons)
