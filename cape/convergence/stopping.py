"""The stopping rule of a trajectory, applied on the host to losses that arrive in chunks of any size.

The rule looks at the losses one by one, in this order, and ends the trajectory at the first that answers:

1. ``diverged``: the loss is NaN or infinite;
2. ``reached``: the loss is at most ε·L_0 for the smallest ε (Eq. 3);
3. ``plateau``: over the last ``plateau_window`` losses, (first - last) / first < ``plateau_tolerance``;
4. ``cap``: ``max_steps`` updates were made.

A device can therefore run ahead of the host by any number of steps: what comes after the end is ignored, and the
result is the one that a check after every single step would have given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cape.config import StoppingRule, check_epsilons
from cape.errors import SpecError

REASONS = ("diverged", "reached", "plateau", "cap")


class TrajectoryScan:
    """Apply a ``StoppingRule`` to the losses L_0, L_1, ... of one trajectory and record every ε crossing.

    Args:
        rule: when the trajectory ends.
        epsilons: fractions of L_0, each strictly between 0 and 1.

    Attributes:
        t_star: for each ε, the first number of updates t with L_t ≤ ε·L_0, or None where there is none (yet).
        stop_reason: one of ``REASONS``, or None while the trajectory goes on.
        stopped_at: number of updates at which the rule ended the trajectory, or None.
    """

    def __init__(self, rule: StoppingRule, epsilons: Iterable[float]) -> None:
        if not isinstance(rule, StoppingRule):
            raise SpecError(f"When to stop is a StoppingRule, not {rule!r}.")
        self.rule = rule
        self.epsilons = check_epsilons(epsilons)
        self.t_star: dict[float, int | None] = dict.fromkeys(self.epsilons)
        self.stop_reason: str | None = None
        self.stopped_at: int | None = None
        self._values = np.empty(256, dtype=np.float64)
        self._count = 0

    def __len__(self) -> int:
        """Number of losses seen, L_0 included."""
        return self._count

    @property
    def losses(self) -> NDArray[np.float64]:
        """L_0..L_t as seen so far, nothing after the end, float64 [t + 1] (a copy)."""
        return self._values[: self._count].copy()

    def feed(self, losses: ArrayLike) -> bool:
        """Take the next losses and return whether the trajectory has ended; losses after the end are ignored."""
        new = np.atleast_1d(np.asarray(losses, dtype=np.float64))
        if self.stop_reason is not None or new.size == 0:
            return self.stop_reason is not None
        start, values = self._append(new)
        early = start < min(self.rule.plateau_window - 1, self.rule.max_steps)
        if early and len(new) == 1 and self._goes_on(float(new[0]), float(values[0])):
            self._count = len(values)
            return False
        l0 = values[0]
        end = self._end_within(values, start)
        if end is not None:
            self.stopped_at = end
            values = values[: end + 1]
        for epsilon, known in self.t_star.items():
            if known is None:
                hits = np.flatnonzero(values[start:] <= epsilon * l0)
                if hits.size and np.isfinite(values[start + hits[0]]):
                    self.t_star[epsilon] = start + int(hits[0])
        self._count = len(values)
        return end is not None

    def _goes_on(self, loss: float, l0: float) -> bool:
        """Return whether a loss, before the plateau rule and the cap can apply, neither ends nor crosses anything.

        Nearly every loss of a trajectory is such a one, and arrays of one number cost far more than comparisons.
        """
        ahead = [epsilon for epsilon, known in self.t_star.items() if known is None]
        return math.isfinite(loss) and not any(loss <= epsilon * l0 for epsilon in ahead)

    def _append(self, new: NDArray[np.float64]) -> tuple[int, NDArray[np.float64]]:
        start, total = self._count, self._count + len(new)
        if total > len(self._values):
            grown = np.empty(max(total, 2 * len(self._values)), dtype=np.float64)
            grown[:start] = self._values[:start]
            self._values = grown
        self._values[start:total] = new
        return start, self._values[:total]

    def _end_within(self, values: NDArray[np.float64], start: int) -> int | None:
        """Return the first index from ``start`` on at which the rule ends the trajectory, and set the reason."""
        rule, new = self.rule, values[start:]
        diverged = ~np.isfinite(new)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            reached = new <= self.epsilons[-1] * values[0]
            plateau = np.zeros(len(new), dtype=bool)
            begin = max(start, rule.plateau_window - 1)  # the first index with a full window behind it
            if begin < len(values):
                first = values[begin - rule.plateau_window + 1 : len(values) - rule.plateau_window + 1]
                plateau[begin - start :] = (first - values[begin:]) / first < rule.plateau_tolerance
        cap = np.arange(start, len(values)) >= rule.max_steps
        stops = diverged | reached | plateau | cap
        if not stops.any():
            return None
        at = int(np.argmax(stops))
        answers = zip(REASONS, (diverged, reached, plateau, cap), strict=True)
        self.stop_reason = next(reason for reason, flags in answers if flags[at])
        return start + at
