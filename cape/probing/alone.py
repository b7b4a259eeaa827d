"""Does a sample's output depend on that sample alone? A model's passes on other samples beside it tell.

The scan has seen two samples beside each other, and that changing one leaves the other's output. What it cannot see is
looked at here: samples that meet only in the whole batch, or only where they are certain ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cape.memory import device_failed
from cape.probing.layout import moved, varying
from cape.probing.scan import Scan, interacting
from cape.samples import Samples
from cape.state import Inputs, Kept, call, map_tensors, seed_draws


class Alone:
    """Passes of a model on samples of a batch, its state and its draws the same before each.

    Args:
        model: in eval mode.
        kept: what every pass begins with.
        seen: what the scan saw.
    """

    def __init__(self, model: nn.Module, kept: Kept, seen: Scan) -> None:
        self.model, self.kept, self.seen = model, kept, seen

    def begin(self) -> None:
        """Put the model's state and its draws where every pass begins."""
        self.kept.rewind()
        seed_draws(0, self.kept.devices)

    def _look(self, x: Inputs) -> Tensor:
        """Return the model's outputs on inputs, its state and its draws as ever."""
        self.begin()
        # With a graph: the model may take derivatives of its own.
        return call(self.model, map_tensors(Tensor.clone, x)).detach()

    def _beside(self, samples: Samples, chosen: Tensor) -> Tensor | None:
        """Return the outputs of some samples as one batch; ``None`` where the model does not run on such a batch."""
        try:
            out = self._look(samples.take(chosen).inputs)
        except Exception as error:  # whatever a model raises on other samples, it has accepted the batch
            if device_failed(error):
                raise
            return None
        return out if out.dim() > 0 and len(out) == len(chosen) else None

    def ends(self, samples: Samples) -> dict[int, Tensor]:
        """Return the outputs of the first and the last sample beside each other; none where two cannot be run."""
        if len(samples) <= 2 or self.seen.outputs is None:
            return {}
        pair = [len(samples) - 1, 0]
        out = self._beside(samples, torch.tensor(pair))
        if out is None:  # sorted by length, say
            pair.reverse()
            out = self._beside(samples, torch.tensor(pair))
        return {} if out is None else dict(zip(pair, out, strict=True))

    def check(
        self,
        samples: Samples,
        out: Tensor,
        ends: dict[int, Tensor],
        places: dict[int, int],
        suspect: bool,
        anyone: bool,
    ) -> None:
        """Raise where a sample's output depends on which samples it is in one batch with.

        Args:
            ends: outputs of the first and the last sample beside each other. places: of the two that were scanned.
            suspect: something made the samples' rows differ a little: the last digit counts.
            anyone: samples may have met (see ``meeting``), or data chose rows: any may depend on any other.
        """
        size, among = len(out), varying(out)
        doubtful = [place for place, beside in ends.items() if moved(out[place], beside, 0.6, among)]
        for k, place in places.items():
            # A second scan has changed the other sample already.
            share = 0.7 if self.seen.once else 0.5
            alike = self.seen.outputs is not None and not moved(out[place], self.seen.outputs[k], share, among)
            if suspect or not alike:  # else the same as beside one other sample
                doubtful.append(place)
        anyone |= size == 2  # then nobody else has been beside each of them
        x = samples.inputs
        here = self._look(x) if doubtful or anyone else out
        for place in dict.fromkeys(doubtful):
            for other in dict.fromkeys(((place + 1) % size, (place + size // 2) % size, (place - 1) % size)):
                if other == place:
                    continue
                others = torch.full((size,), other, device=out.device)  # not another order of the same
                others[other] = place - 1 if (place - 1) % size != other else (place + 1) % size
                others[place] = place
                beside = self._beside(samples, others)
                if beside is None:
                    continue
                there = beside[place]
                # The last digit counts, where there is reason to look at it and the device repeats it.
                faint = suspect and moved(here[place], there, 1.05, among)
                if faint and torch.equal(here[place], self._look(x)[place]) or moved(here[place], there, 0.7, among):
                    raise interacting(samples)
        every = torch.arange(size, device=out.device)
        # Half of the samples stay; in the others' places are their neighbours, or one of those that stay. The order
        # remains: a model may want its samples sorted by length.
        exchanges = [(every % 2 == 0, every - 1), (every % 2 == 1, (every + 1).clamp(max=size - 1 - size % 2))]
        exchanges += [(every < size // 2, every * 0 + size // 2 - 1), (every >= size // 2, every * 0 + size // 2)]
        for mine, others in exchanges if anyone else ():
            beside = self._beside(samples, torch.where(mine, every, others))
            if beside is not None and moved(here[mine], beside[mine], 0.7, among):
                raise interacting(samples)
