"""Which gradients a probe's norms are of, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cape.errors import ModelError, SpecError
from cape.probing.taps import leaves_behind
from cape.tasks import Loss

TAUS = ("true_logit", "full", "hutchinson")
_COTANGENTS = 16  # of a full Jacobian, in one backward pass


@dataclass(frozen=True)
class Norms:
    """What one pass over a batch gives.

    Attributes:
        g2: ‖∇θ ℓ_b‖² of each sample, [B] float64 (Eq. 10).
        tau: squared gradient norm of the target logit of each sample, [B] float64.
        tau_full: the same for the whole output (Eq. 11), exact or estimated; ``None`` unless asked for.
        losses: each sample's loss in eval mode, [B].
        fallback: names of the parameters that interception could not follow.
    """

    g2: Tensor
    tau: Tensor
    tau_full: Tensor | None
    losses: Tensor
    fallback: tuple[str, ...]

    def first(self, n: int) -> Norms:
        """Return the norms of the first ``n`` samples."""
        full = None if self.tau_full is None else self.tau_full[:n]
        return Norms(self.g2[:n], self.tau[:n], full, self.losses[:n], self.fallback)

    @staticmethod
    def joined(parts: list[Norms]) -> Norms:
        """Return the norms of a batch from those of its pieces, in order."""
        full = [p.tau_full for p in parts if p.tau_full is not None]
        return Norms(
            torch.cat([p.g2 for p in parts]),
            torch.cat([p.tau for p in parts]),
            torch.cat(full) if full else None,
            torch.cat([p.losses for p in parts]),
            tuple(sorted({n for p in parts for n in p.fallback})),
        )


@dataclass(frozen=True)
class Wanted:
    """The gradients of the loss, of the target logit and, where ``tau`` is not ``true_logit``, of the whole output.

    Attributes:
        criterion: the loss.
        tau: one of ``TAUS``.
        probes: number of sign vectors for ``hutchinson``.
        parameters: that the norms are over. The loss must depend on them by the outputs alone.
        copies: whether the batch is one sample, two times.
        piece: the samples of a batch of ``size`` that are at hand, all of them where ``None``: the sign vectors are
            drawn for the whole batch, so that they do not depend on how it is cut.

    Raises:
        SpecError: an unknown tau.
    """

    criterion: Loss
    tau: str = "true_logit"
    probes: int = 8
    parameters: tuple[Tensor, ...] = ()
    copies: bool = False
    piece: slice | None = None
    size: int = 0

    def __post_init__(self) -> None:
        if self.tau not in TAUS:
            raise SpecError(f"Unknown tau '{self.tau}'. Known: {', '.join(TAUS)}.")

    def of_piece(self, piece: slice, size: int) -> Wanted:
        """Return the same for a piece of a batch."""
        return replace(self, piece=piece, size=size)

    def cotangents(self, out: Any, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the losses [B] and the cotangents [K, *out.shape], in portions that fit one backward pass.

        The first portion begins with the loss's and the target logit's.

        Raises:
            ModelError: outputs and targets cannot belong together, or the loss is not finite.
        """
        if self.copies and isinstance(out, Tensor) and out.dim() > 0 and len(out) == 2:  # the loss may know one alone
            losses, portions = replace(self, copies=False, piece=None).cotangents(out[:1], y[:1])
            return losses.repeat(2), [v.repeat_interleave(2, 1) for v in portions]
        self.criterion.check(out, y)
        leaf = out.detach()
        with torch.enable_grad():
            losses, of_loss, of_logit = self.criterion.cotangents(leaf, y)
        if {id(t) for t in leaves_behind([losses])} & {id(p) for p in self.parameters}:
            raise ModelError(
                f"The loss '{self.criterion.name}' uses parameters of the model itself; move what it computes with them"
                " into the model's forward."
            )
        losses = losses.detach()
        if not bool(torch.isfinite(losses).all()):
            raise ModelError("The loss is NaN or infinite at initialization; check the targets and the loss function.")
        first = torch.stack([of_loss, of_logit])
        if self.tau == "true_logit":
            return losses, [first]
        outputs = leaf.shape[1:].numel()
        if self.tau == "full":
            rows = torch.eye(outputs, dtype=leaf.dtype, device=leaf.device).unsqueeze(1).expand(-1, len(leaf), -1)
        else:
            generator = torch.Generator().manual_seed(0)
            piece, size = (slice(None), len(leaf)) if self.piece is None else (self.piece, self.size)
            signs = torch.randint(0, 2, (self.probes, size, outputs), generator=generator)[:, piece] * 2 - 1
            rows = signs.to(leaf)
        others = [part.reshape(-1, *leaf.shape) for part in rows.split(_COTANGENTS)]
        return losses, [first, *others]

    def norms(self, losses: Tensor, total: Tensor, fallback: tuple[str, ...] = ()) -> Norms:
        """Return the norms from those of every cotangent, [ΣK, B]."""
        total = total.clamp(min=0)
        full = None
        if self.tau != "true_logit":
            full = total[2:].sum(0) / (self.probes if self.tau == "hutchinson" else 1)
        return Norms(total[0], total[1], full, losses, fallback)
