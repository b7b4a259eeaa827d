"""What one training step of a model takes, measured when somebody asks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from cape.config import StoppingRule
from cape.tasks import LossLike

if TYPE_CHECKING:
    from cape.state import Inputs

_TIMING_STEPS = 4
# The median of two steps of a millisecond scatters threefold: short ones are timed for so long, or so many of them.
_TIMING_SECONDS, _MOST_TIMED = 0.1, 50
_NEVER = 1e-12  # a fraction of the first loss at which no timing ends


class StepTimer:
    """Measures, when first asked, what one training step of a model takes on the device where it is."""

    def __init__(self, model: nn.Module, batch: tuple[Inputs, Any], loss: LossLike, lr: float) -> None:
        self._arguments = (model, batch, loss, lr)
        self._seconds: float | None = None

    @property
    def measured(self) -> float | None:
        """Seconds per step if they were measured already."""
        return self._seconds

    def seconds(self) -> float:
        """Return the median wall time of a few real, warmed-up AdamW steps; the model is put back bit for bit."""
        if self._seconds is None:
            seconds = self._measure(_TIMING_STEPS)
            if seconds * _TIMING_STEPS < _TIMING_SECONDS:
                seconds = self._measure(min(_MOST_TIMED, math.ceil(_TIMING_SECONDS / seconds)))
            self._seconds = seconds
        return self._seconds

    def _measure(self, steps: int) -> float:
        from cape.convergence import measure

        model, batch, loss, lr = self._arguments
        rule = StoppingRule(max_steps=steps)
        return measure(model, batch, loss=loss, lr=lr, epsilons=(_NEVER,), stopping=rule).step_seconds
