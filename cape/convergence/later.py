"""A second look at models whose head starts at zero: what the probe says after their first updates.

At initialization the loss of such a model depends on its head alone: no gradient reaches the layers before it, and the
features say nothing of them. Two updates later they do (docs/evidence.md has what that is worth).
"""

from __future__ import annotations

import logging

from torch import Tensor, nn

from cape.convergence.single import updated
from cape.errors import ModelError
from cape.feature_names import LATER_COLUMNS, LATER_FEATURES, LATER_UPDATES, head_at_zero
from cape.logs import log_once
from cape.probing import Features, probe
from cape.state import Inputs
from cape.tasks import Loss, LossLike

_LOG = logging.getLogger(__name__)


def with_later(
    features: Features, model: nn.Module, batch: tuple[Inputs, Tensor], *, loss: LossLike, lr: float, dataset_size: int
) -> dict[str, float | None]:
    """Return features by name, and of a model whose head starts at zero those after its first updates as well.

    These, ``LATER_COLUMNS``, cost two steps of training and another probe; the model is then put back bit for bit.
    Where two updates leave no loss that can be probed (it is not finite, or zero), they are those at initialization.

    Args:
        features: what ``probe`` says of the model at its initialization.
        model, batch, loss, lr, dataset_size: what it was given.
    """
    found = features.as_dict()
    if not head_at_zero(features.log_hidden_pull):
        return found
    try:
        with updated(model, batch, Loss(loss), lr=lr, updates=LATER_UPDATES):
            later = probe(model, batch, loss=loss, lr=lr, dataset_size=dataset_size).as_dict()
    except ModelError as error:
        log_once(_LOG, logging.WARNING, f"A {type(model).__name__} cannot be probed after its first updates: {error}")
        later = found
    return {**found, **dict(zip(LATER_COLUMNS, (later[name] for name in LATER_FEATURES), strict=True))}
