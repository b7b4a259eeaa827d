"""Names of the features, for whoever reads rows and needs no torch."""

from __future__ import annotations

import math
from typing import Any

FLOOR = 1e-6
"""What ratios are cut off at before their logarithm is taken: beyond, they are as good as zero."""

# What tells slow regimes apart; chosen by the error on datasets left out, see docs/data.md.
SLOW_FEATURES = (
    "line_16",
    "log_output_spread",
    "log_weakest_layer",
    "log_last_share",
    "log_move",
    "spread_1",
    "spread_16",
    "log_own_16",
)
# What a model and a batch are, without any pass through the model.
SHAPE_FEATURES = ("log_layers", "log_inputs", "log_outputs")
BATCH_FEATURES = ("log_steepness", "log_hardness", "log_flow")
# What the first and the last weight see, and how the loss depends on it.
END_FEATURES = ("log_hidden_hardness", "log_hidden_size", "log_hidden_pull", "log_entry_pull", "log_late_share")
FEATURE_NAMES = (
    "log_p",
    "log_g2",
    "log_tau",
    "log_tau_full",
    "log_n",
    "log_lr",
    "log_b",
    "log_l0",
    "log_first_step",
    "log_grad_l1",
    "log_grad_l2",
    "line_1",
    "line_4",
    *SLOW_FEATURES,
    *SHAPE_FEATURES,
    "draw_noise",
    *BATCH_FEATURES,
    *END_FEATURES,
)

# What the same probe says of a model whose head starts at zero after ``LATER_UPDATES`` updates (``convergence.later``):
# every feature that training moves. The columns beside the others are null for all other models.
LATER_UPDATES = 2
LATER_FEATURES = (
    *("log_g2", "log_tau", "log_l0", "log_first_step", "log_grad_l1", "log_grad_l2", "line_1", "line_4"),
    *SLOW_FEATURES,
    *END_FEATURES,
)
LATER_COLUMNS = tuple(f"later_{name}" for name in LATER_FEATURES)


def head_at_zero(log_hidden_pull: Any) -> Any:
    """Return whether a model's loss does not depend on what its head sees: a head that starts at zero.

    Takes the feature of a model, or an array of many.
    """
    return log_hidden_pull <= math.log(FLOOR) + 1e-9
