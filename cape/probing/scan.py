"""One or two forward passes on two samples: where the batch is at every use of a parameter; whether samples meet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cape.errors import ModelError
from cape.memory import device_failed
from cape.probing.intercept import Interceptor
from cape.probing.layout import Verdict, interacts, judge, judge_one, two_samples
from cape.samples import Samples
from cape.state import Kept, call, seed_draws

_log = logging.getLogger(__name__)

INTERACTING = (
    "The model's samples influence each other (changing one sample changes another's output), so there is no"
    " per-sample gradient; a batch norm without running statistics does this: use running statistics or another"
    " normalization."
)
_SHARED = (
    " An input that all samples share may have as many rows as the batch has samples, by chance; then use another batch"
    " size."
)
INTERACTING_BACKWARD = (
    "The model's samples influence each other in its backward pass (one sample's gradient depends on another's), so"
    " there is no per-sample gradient; a hook or a custom function that normalizes gradients over the batch does this,"
    " or a normalization over the batch behind a gate that starts at zero: take it out, or normalize each sample"
    " alone."
)
_WEIGHT_KINDS = ("convolution", "grouped convolution", "linear", "product", "contract")
_CONVOLUTION_CHUNK = 16  # samples of a network of dense convolutions
_CHUNK = 64  # samples of any other network: no slower than 128 where it was measured, and half the memory


@dataclass(frozen=True)
class Scan:
    """What was seen.

    Attributes:
        verdicts: of every use, in order; ``None`` where the inputs of two samples cannot be told apart, an empty list
            where the uses cannot be matched.
        outputs: of the two samples, [2, ...]; ``None`` where they could not be run.
        once: there was one pass: the record must see what the verdicts say, or it takes a second one.
    """

    verdicts: list[Verdict] | None
    outputs: Tensor | None
    once: bool = False


def scan(model: nn.Module, samples: Samples, params: Sequence[nn.Parameter], kept: Kept, *, once: bool = False) -> Scan:
    """Look at two samples of the batch; ``once``: in one pass where that is enough.

    Raises:
        ModelError: the samples influence each other.
    """

    def look(two: Samples, rewind: bool = True) -> tuple[Interceptor, Any]:
        if rewind:
            kept.rewind()
        seed_draws(0, kept.devices)
        mode = Interceptor(params, 2, None, kept.before_write)
        with mode:
            out = call(model, mode.inputs(two.inputs))
        return mode, out.detach() if isinstance(out, Tensor) else out

    first = None
    for kinds in ("fib", "f", "i"):  # lengths and masks can decide what happens: then they must stay as they are
        pair = two_samples(samples, kinds)
        if pair is None:
            continue
        try:
            first = first or look(pair[0], rewind=not once or kinds != "fib")  # once: nothing has run before
            if once and len(samples) > 2 and not first[0].mismatch and _of_two(first[1]):
                verdicts = judge_one(first[0].sightings)
                if verdicts is not None:
                    return Scan(verdicts, first[1], once=True)
            changed, out = look(pair[1])
        except Exception as error:  # whatever a model raises on two samples, it may still accept the whole batch
            if device_failed(error):
                raise
            if kinds == "fib":
                _log.debug("a scan of two samples failed: %s", error)
            continue
        outputs = [first[1], out]
        if all(_of_two(o) for o in outputs):
            if len(samples) == 2:  # no other sample will tell whether the second one moves the first
                turned = [look(p.take(torch.tensor([1, 0])))[1].flip(0) for p in pair]
            if interacts(*outputs) or (len(samples) == 2 and interacts(*turned)):
                raise interacting(samples)
        found = judge(first[0].sightings, changed.sightings)
        if first[0].mismatch or changed.mismatch:  # derivatives inside the model
            return Scan([], first[1])
        if found:
            return Scan(found, first[1])
    return Scan(None, None) if first is None else Scan([], first[1])


class InteractingError(ModelError):
    """A model's samples influence each other."""


def interacting(samples: Samples) -> InteractingError:
    """Return the error of a model whose samples influence each other; several inputs may not all be samples."""
    return InteractingError(INTERACTING + (_SHARED if sum(samples.own) > 1 else ""))


def _of_two(out: Any) -> bool:
    return isinstance(out, Tensor) and out.dim() > 0 and out.shape[0] == 2


def pieces_of(batch_size: int, step: int) -> list[slice]:
    """Cut a batch into pieces of about ``step`` samples, never of one."""
    count = max(1, min(-(-batch_size // max(step, 1)), batch_size // 2))
    bounds = [batch_size * i // count for i in range(count + 1)]
    return [slice(lo, hi) for lo, hi in zip(bounds, bounds[1:], strict=False)]


def automatic_chunk(verdicts: list[Verdict] | None, device: torch.device, batch_size: int) -> int:
    """Return how many samples run at a time: on a CPU, transients must stay in cache, or in the allocator."""
    keys = [v.key for v in verdicts or ()]
    if device.type != "cpu" or all(key[2] <= 2 for key in keys):
        return batch_size  # dense layers only: their transients are small
    kinds = [key[0] for key in keys if key[0] in _WEIGHT_KINDS]
    if kinds and 2 * kinds.count("convolution") >= len(kinds) and "grouped convolution" not in kinds:
        return min(batch_size, _CONVOLUTION_CHUNK)
    return min(batch_size, _CHUNK)
