"""Per-sample gradient norms of any model, without per-sample gradients.

``per_sample_norms`` scans the model once for its batch layouts (two samples, two forward passes), then runs the
unmodified forward over the batch with every parameter use intercepted, and one input-gradient backward pass that
carries all cotangents (loss, target logit) at once. What interception cannot follow is computed by ``fallback_norms``
for those parameters alone, so that no model is refused and no number is wrong; only models whose samples influence each
other are refused. A chain of dense layers needs none of this: see ``chain``.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cape.checks import check_batch, check_dense, running, trainable
from cape.errors import ModelError
from cape.memory import device_failed, kept_memory
from cape.probing import handlers, ops, products, pulled, raw, recurrent
from cape.probing.alone import Alone
from cape.probing.assemble import group_norms, plan, written_since
from cape.probing.chain import chain_norms, chain_of
from cape.probing.cotangents import hidden
from cape.probing.fallback import drawn_norms, fallback_norms, norms_together
from cape.probing.intercept import Interceptor, Recorded
from cape.probing.layout import middle_samples
from cape.probing.operators import watched_backward, watched_grad
from cape.probing.scan import (
    INTERACTING_BACKWARD,
    InteractingError,
    Scan,
    automatic_chunk,
    pieces_of,
    scan,
)
from cape.probing.taps import gradients_kept, has_own_backward, leaves_behind, takes_turns
from cape.probing.wanted import Norms, Wanted
from cape.samples import Samples
from cape.state import (
    Inputs,
    Kept,
    call,
    eagerly,
    evaluated,
    map_tensors,
    ordinary_tensor,
    preserved,
)
from cape.surroundings import undisturbed
from cape.tasks import Loss, LossLike

_log = logging.getLogger(__name__)

_HANDLER_MODULES = (handlers, products, pulled, raw, recurrent)  # importing them registers the handlers


def per_sample_norms(
    model: nn.Module,
    batch: tuple[Inputs, Tensor],
    *,
    loss: LossLike = "cross_entropy",
    tau: str = "true_logit",
    probes: int = 8,
    micro_batch: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (g2, tau): per-sample squared gradient norms of the loss and of the model's output.

    The model runs in eval mode (batch norm on its running statistics, dropout off); its parameters, buffers, modes,
    gradients and the global RNG are left as they were.

    Args:
        model: any ``nn.Module`` whose outputs have the batch as first dimension.
        batch: (inputs, targets); inputs are a tensor, a tuple (``model(*x)``) or a dict (``model(**x)``).
        loss: a name, an ``nn.Module`` or a callable ``(outputs, targets) -> per-sample or mean loss``.
        tau: ``true_logit``, ``full`` (the whole output Jacobian: one cotangent per output), or ``hutchinson`` (its
            unbiased estimate from ``probes`` random sign vectors).
        probes: number of sign vectors for ``hutchinson``.
        micro_batch: samples run at a time; chosen automatically where ``None``. Results do not depend on it.
        backend: ``auto``, ``native`` or ``torch`` operators.

    Returns:
        Two float64 tensors of shape [B].

    Raises:
        ModelError: samples interact, outputs are not finite, labels are out of range, an empty batch.
        SpecError: an unknown loss, tau or backend.
    """
    trainable(model)
    with running(model):
        norms = all_norms(model, batch, loss=loss, tau=tau, probes=probes, micro_batch=micro_batch, backend=backend)
    return norms.g2, norms.tau if norms.tau_full is None else norms.tau_full


@undisturbed()
def all_norms(
    model: nn.Module,
    batch: tuple[Inputs, Tensor],
    *,
    loss: LossLike = "cross_entropy",
    tau: str = "true_logit",
    probes: int = 8,
    micro_batch: int | None = None,
    backend: str = "auto",
) -> Norms:
    """Like ``per_sample_norms``, with the losses and the names of the parameters that took the fallback."""
    params = trainable(model)
    wanted = Wanted(Loss(loss), tau, probes, tuple(params.values()))
    with torch.inference_mode(False):  # a caller's inference mode, or its tensors, could not be differentiated
        x, y, batch_size = check_batch(map_tensors(lambda t: ordinary_tensor(t).detach(), batch))
    samples = Samples.of(x, batch_size)
    check_dense(samples)
    chain = chain_of(model, x)
    if chain is not None and isinstance(x, Tensor):
        criterion = wanted.criterion
        drawing = contextlib.nullcontext() if criterion.is_named else preserved(criterion.beside(model), seed=0)
        with torch.inference_mode(False), ops.use_backend(backend), kept_memory(y.device), drawing:
            pieces = [(p, wanted.of_piece(p, batch_size)) for p in pieces_of(batch_size, micro_batch or batch_size)]
            return Norms.joined([chain_norms([chain], x[None, p], y[None, p], w)[0] for p, w in pieces])
    with (
        torch.inference_mode(False),
        evaluated(model, wanted.criterion.beside(model), seed=0) as kept,
        ops.use_backend(backend),
        torch.enable_grad(),
        eagerly(),
        kept_memory(y.device),
    ):
        if batch_size > 1:
            return _followed(model, params, samples, y, wanted, kept, micro_batch)
        pair = torch.tensor([0, 0], device=y.device)  # see reference.py for what torch does to a batch of one
        try:
            return _followed(model, params, samples.take(pair), y[pair], replace(wanted, copies=True), kept).first(1)
        except Exception as error:
            if isinstance(error, InteractingError) or device_failed(error):
                raise
            _log.debug("two copies of the one sample cannot be run: %s", error)
            return _of_one(model, params, samples, y, wanted, kept)


def _followed(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    samples: Samples,
    y: Tensor,
    wanted: Wanted,
    kept: Kept,
    micro_batch: int | None = None,
) -> Norms:
    """Return the norms of two samples or more, every use of a parameter followed."""
    count = len(samples)
    look = partial(scan, model, samples, list(params.values()), kept)

    def run(seen: Scan) -> Norms:
        engine = _Engine(model, params, seen, kept)
        step = micro_batch or automatic_chunk(seen.verdicts, y.device, count)
        parts = []
        for piece in pieces_of(count, step):
            inside = [s if piece.start <= s < piece.stop else None for s in middle_samples(count)]
            places = {k: s - piece.start for k, s in enumerate(inside) if s is not None}
            parts.append(engine.run(samples.take(piece), y[piece], wanted.of_piece(piece, count), places))
        norms = Norms.joined(parts)
        if len(parts) > 1:  # each has seen what couples the samples of one piece
            wanted.criterion.check_alone(torch.cat(engine.outputs), y, norms.losses)
        return norms

    try:
        return run(look(once=True))
    except _UnsettledError as error:
        _log.debug("one scan was not enough: %s", error)
        return run(look())


def _of_one(
    model: nn.Module, params: dict[str, nn.Parameter], samples: Samples, y: Tensor, wanted: Wanted, kept: Kept
) -> Norms:
    """Return the norms of the one sample of a batch, of a model that takes no more: by ordinary backward passes."""
    alone = Alone(model, kept, Scan(None, None))
    alone.begin()
    out = call(model, map_tensors(Tensor.clone, samples.inputs))
    losses, portions = wanted.cotangents(out, y)
    rows = []
    for v in portions:
        alone.begin()
        rows.append(drawn_norms(model, samples, list(v), params, out.detach()))
    return wanted.norms(losses, torch.cat(rows), tuple(params))


def _pull_together(mode: Interceptor, out: Tensor, v: Tensor, retain_graph: bool) -> None:
    """Pull the cotangents v [K, *out.shape] back through the graph between ``out`` and the anchor, all at once.

    Raises:
        RuntimeError: an operator has no batching rule, or works in place on what has no batch dimension.
    """
    with warnings.catch_warnings(), hidden(v) as one:
        warnings.filterwarnings("ignore", "There is a performance drop")  # the operator takes turns instead
        mode.level = torch._C._functorch.peek_interpreter_stack().level()
        watched_grad(out, mode.anchor, one, retain_graph=retain_graph, allow_unused=True)


class _UnsettledError(Exception):
    """The record does not see what a single scan saw."""


class _Engine:
    """Runs one piece of the batch: a forward pass, and a backward pass for all cotangents or for a few at a time."""

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        seen: Scan,
        kept: Kept,
    ) -> None:
        self.model = model
        self.kept = kept
        self.seen = seen
        self.alone = Alone(model, kept, seen)
        self.params = params
        self.names = {id(p): n for n, p in params.items()}
        self.verdicts = seen.verdicts or []
        self.together = True
        self.outputs: list[Tensor] = []  # of the pieces, in order

    def run(self, samples: Samples, y: Tensor, wanted: Wanted, places: dict[int, int]) -> Norms:
        """Return the norms of a piece of the batch; ``places`` says where the scan's two samples are in it."""
        if self.together:
            try:
                return self._run(samples, y, wanted, places)
            except (ModelError, _UnsettledError):
                raise
            except (RuntimeError, ValueError, TypeError) as error:  # no batching rule, or a derivative of a derivative
                _log.debug("no backward pass with all cotangents at once (%s); they take turns", error)
                self.together = False
        return self._run(samples, y, wanted, places)

    def _run(self, samples: Samples, y: Tensor, wanted: Wanted, places: dict[int, int]) -> Norms:
        size = int(y.shape[0])
        mode = Interceptor(list(self.params.values()), size, self.verdicts, self.kept.before_write, places)
        mode.direct = self.together
        try:
            return self._norms_of(mode, samples, y, wanted, places)
        finally:
            mode.release()

    def _norms_of(
        self, mode: Interceptor, samples: Samples, y: Tensor, wanted: Wanted, places: dict[int, int]
    ) -> Norms:
        ends = self.alone.ends(samples)  # first: the model may write into what the recorded pass has kept
        self.alone.begin()
        before = self.kept.draws()
        with mode:
            out = call(self.model, mode.inputs(samples.inputs))
        drew = before != self.kept.draws()
        moving = mode.out_of_order()
        if self.seen.once and (moving or mode.mismatch or mode.unsettled or not self._same_outputs(out)):
            raise _UnsettledError(f"moving: {moving}, mismatch: {mode.mismatch}, another layout: {mode.unsettled}")
        losses, cotangents = wanted.cotangents(out, y)
        # Where data orders the samples, a sample's place in a product changes, and with it the last digit.
        puzzling = not mode.steered and (moving or any(v.puzzling for v in self.verdicts))
        mode.mismatch = mode.mismatch or moving
        total, leaked = self._backward(mode, out, cotangents, len(samples))
        # Last: further passes may write into buffers that the recorded one has kept.
        # Of two samples, nearly every dimension may be the batch's; two copies of one are alike wherever they meet.
        together = mode.met or mode.steered or (len(samples) == 2 and not wanted.copies)
        self.alone.check(samples, out.detach(), ends, places, puzzling, together)
        missing = {n: p for n, p in self.params.items() if id(p) in leaked}
        if missing and drew:  # another pass would draw other numbers for a sample: these are of this very one
            self.alone.begin()
            total += torch.cat([drawn_norms(self.model, samples, list(v), missing, out.detach()) for v in cotangents])
        elif missing:
            rewind = self.kept.rewind
            total += torch.cat([fallback_norms(self.model, samples, list(v), missing, rewind) for v in cotangents])
        if together and not drew and not self._same_together(samples, cotangents[0], total, out.detach()):
            raise InteractingError(INTERACTING_BACKWARD)
        self.outputs.append(out.detach())
        return wanted.norms(losses, total, tuple(self.names[p] for p in leaked))

    def _same_together(self, samples: Samples, cotangents: Tensor, total: Tensor, out: Tensor) -> bool:
        """Whether a sample's gradient through the whole batch is its own: a gate of zero hides others from outputs."""
        middle = len(samples) // 2
        self.alone.begin()
        whole = norms_together(self.model, samples, list(cotangents), self.params, [middle], out)
        if whole is None:
            return True
        own, limit = total[: len(cotangents), middle], torch.finfo(out.dtype).eps ** 0.6
        return bool(((whole[:, 0] - own).abs() <= limit * torch.maximum(whole[:, 0], own)).all())

    def _same_outputs(self, out: Any) -> bool:
        """Whether the model gives each sample the outputs that it gave each of two."""
        seen = self.seen.outputs
        return isinstance(out, Tensor) and seen is not None and out.shape[1:] == seen.shape[1:]

    def _backward(
        self, mode: Interceptor, out: Tensor, cotangents: Sequence[Tensor], size: int
    ) -> tuple[Tensor, set[int]]:
        """Return the norms of all intercepted parameters, [K, B], and the ids of those that slipped through."""
        count = sum(len(v) for v in cotangents)
        total = torch.zeros(count, size, dtype=torch.float64, device=out.device)
        everything = set(self.names)
        if mode.mismatch:
            return total, everything
        leaves = leaves_behind([out])
        leaked = ({id(p) for p in leaves} & everything) | mode.dropped | written_since(mode.uses, mode.parameters)
        if not out.requires_grad:
            return total, leaked
        work = plan(mode.uses, mode.parameters, leaked)
        rows = total[:0]

        def consume(recorded: Recorded) -> None:
            wanted = work.alone.get(id(recorded))
            if wanted is not None and recorded.gradient is not None:
                both = recorded.use.pull(recorded.gradient, wanted) if recorded.pulls else None
                recorded.pulled, norms = both or (None, recorded.use.norms(recorded.gradient, wanted))
                rows.add_(norms)
            if id(recorded) not in work.waits:
                recorded.gradient = None

        mode.in_backward = True
        with gradients_kept(leaves):
            # Of two samples, a dimension of two may be another one, whatever the scan's two samples showed.
            if (mode.steered or size == 2) and not self._in_order(mode, out, cotangents[0][0]):
                return total, everything
            if (mode.hooked or has_own_backward(out)) and not self._stays_alone(mode, out, cotangents[0][0]):
                raise InteractingError(INTERACTING_BACKWARD)
            mode.on_gradient = consume
            # With no leaf but the anchor, it reaches every use; other leaves would gather gradients of their own.
            together = self.together and all(leaf is mode.anchor for leaf in leaves) and not takes_turns(out)
            passes = list(cotangents) if together else [v for many in cotangents for v in many.split(1)]
            done = 0
            for v in passes:
                rows = total[done : done + len(v)]
                done += len(v)
                try:
                    with mode:  # stays active: a checkpoint recomputes its forward pass in here
                        if together:
                            _pull_together(mode, out, v, retain_graph=done < count)
                        else:
                            watched_backward(out, v[0], retain_graph=done < count)
                except torch.utils.checkpoint.CheckpointError:  # one use was recorded, an equal one was not
                    return torch.zeros_like(total), everything
                if mode.mismatch or mode.late & mode.recorded:
                    return torch.zeros_like(total), everything
                for leaf in leaves:
                    leaf.grad = None
                for parameters, items in work.groups:
                    if parameters:
                        rows.add_(group_norms(parameters, items, len(v), size))
                for recorded in mode.uses:
                    recorded.gradient = None
        return total, leaked | mode.late

    @classmethod
    def _in_order(cls, mode: Interceptor, out: Tensor, v: Tensor) -> bool:
        """Whether every use met the samples in their own order, where data could have permuted them.

        Scaling each sample's cotangent by a power of two must scale its rows of every gradient by just that, exactly.
        """
        place = torch.arange(out.shape[0], device=out.device)
        scale = torch.pow(2.0, (place + place // 5 * 2 + place // 25) % 5).to(torch.float64)  # neighbours have others
        plain = cls._weights(mode, out, v)
        scaled = cls._weights(mode, out, v * scale.to(v.dtype).view(-1, *[1] * (v.dim() - 1)))
        return all(
            torch.allclose(
                scaled[k] / scale.square(),
                plain[k],
                rtol=torch.finfo(v.dtype).eps ** 0.5,
                atol=1e-12 * float(plain[k].max()),
            )
            for k in plain
        )

    @classmethod
    def _stays_alone(cls, mode: Interceptor, out: Tensor, v: Tensor) -> bool:
        """Whether a sample's gradients are the same where no other sample has a cotangent, and no other's arise."""
        only = torch.zeros_like(v)
        only[len(v) // 2] = v[len(v) // 2]
        every, alone = cls._weights(mode, out, v), cls._weights(mode, out, only)
        for k, weights in alone.items():
            here = weights > 1e-9 * every[k].max()
            if int(here.sum()) > 1 or not torch.allclose(weights[here], every[k][here], rtol=0.01):
                return False
        return True

    @staticmethod
    def _weights(mode: Interceptor, out: Tensor, v: Tensor) -> dict[int, Tensor]:
        """Return how much of every use's gradient is each sample's, [B], for one cotangent."""
        seen: dict[int, Tensor] = {}

        def weigh(recorded: Recorded) -> None:
            if recorded.gradient is not None:
                seen[id(recorded)] = recorded.use.weight_of_samples(recorded.gradient)[0]
            recorded.gradient = None

        mode.on_gradient = weigh
        with mode:
            watched_backward(out, v, retain_graph=True)
        for p in mode.parameters.values():
            p.grad = None
        return seen
