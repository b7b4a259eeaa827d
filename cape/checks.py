"""What is no model or no batch that could be run: said in one sentence, before or while it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cape.errors import CapeError, ModelError, first_line
from cape.memory import device_failed
from cape.samples import Samples
from cape.state import Inputs, overlaps, tensors_of


def check_batch(batch: Any) -> tuple[Inputs, Tensor, int]:
    """Return (inputs, targets, batch size) of a batch, or raise ``ModelError`` where it is none."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ModelError("A batch is a pair (inputs, targets).")
    x, y = batch
    if not isinstance(y, Tensor) or y.dim() == 0:
        raise ModelError("The targets of a batch must be a tensor whose first dimension is the batch.")
    if y.shape[0] == 0:
        raise ModelError("The batch is empty; at least one sample is needed.")
    if not Samples.of(x, len(y)).tensors():
        raise ModelError(
            f"No input is a tensor of {y.shape[0]} samples, as the targets are; inputs and targets have the batch as"
            " their first dimension."
        )
    if any(t.is_meta for t in (*tensors_of(x), y)):
        raise ModelError("The batch is on the device 'meta' and holds no numbers; put it where the model is.")
    return x, y, int(y.shape[0])


def check_dense(samples: Samples) -> None:
    """Raise ``ModelError`` where samples lie in a tensor that cannot be cut into them."""
    if any(t.layout is not torch.strided for t in samples.tensors()):
        raise ModelError(
            "The samples of an input lie in a sparse or a nested tensor, which the probe cannot look into; give a dense"
            " one (`.to_dense()`, or padded)."
        )


@contextmanager
def running(model: nn.Module, how: str = "") -> Iterator[None]:
    """Run a model for the first time: what its own code raises becomes a ``ModelError`` that says so.

    What is no fault of model or batch, a device that failed or that is full, stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CapeError) or device_failed(error):
            raise
        name, where = type(model).__name__, f" {how}" if how else ""
        first = first_line(error)
        few = " Use a batch of at least 2 samples." if "more than 1 value per channel" in first else ""
        raise ModelError(f"{name} cannot run on this batch{where} ({type(error).__name__}: {first}).{few}") from error


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad and hold a number, each once, by name.

    Raises:
        ModelError: there is none, or one has no shape or no numbers yet.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    lazy = [n for n, p in found.items() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ModelError(f"The parameter '{lazy[0]}' has no shape yet; run the model once on a batch to initialize it.")
    meta = [n for n, p in found.items() if p.is_meta]
    if meta:
        raise ModelError(
            f"The parameter '{meta[0]}' is on the device 'meta' and holds no numbers; build the model on a real one."
        )
    inferred = [n for n, p in found.items() if p.is_inference()]
    if inferred:
        raise ModelError(
            f"The parameter '{inferred[0]}' was made in inference mode, so that no optimizer could train it; build the"
            " model outside of `torch.inference_mode()`."
        )
    computed = [n for n, p in found.items() if not p.is_leaf]
    if computed:
        raise ModelError(
            f"The parameter '{computed[0]}' is computed from another tensor (copying a scripted module makes such), so"
            " that no optimizer could train it; build or script the model anew."
        )
    shared = [n for n, p in found.items() if overlaps(p)]
    if shared:
        raise ModelError(f"Numbers of the parameter '{shared[0]}' share their memory; make it of a clone (`.clone()`).")
    found = {n: p for n, p in found.items() if p.numel()}
    if not found:
        raise ModelError("The model has no trainable parameter.")
    return found
