"""The public face: ``predict`` for one model, ``rank`` for several."""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cape.checks import check_batch, running
from cape.config import check_count, check_epsilon, check_lr
from cape.convergence.later import with_later
from cape.errors import CapeError, SpecError
from cape.family_names import HEAD_AT_ZERO
from cape.metamodel.artifact import MetaModel, resolve
from cape.metamodel.intervals import Conformal, bounds, check_level
from cape.metamodel.regressors import in_steps
from cape.metamodel.rows import row_from_features
from cape.probing import Features, probe
from cape.recognize import check_family, infer_family, known_best, read_by
from cape.state import call, map_tensors, ordinary_tensor, preserved
from cape.surroundings import undisturbed
from cape.tasks import TASK_LOSS, Loss, LossLike
from cape.timing import StepTimer

if TYPE_CHECKING:
    from cape.state import Inputs

# Losses under their other names, as the meta-dataset's tasks know them.
_SAME_LOSS = {
    "sequence_cross_entropy": "cross_entropy",
    "mse": "half_mse",
    "one_hot_mse": "half_mse",
    "bce": "binary_cross_entropy",
}
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Prediction:
    """How many optimizer steps a model needs until its loss is ε times its first value.

    Attributes:
        steps: predicted T*, at least 1; a whole number where the meta-regressor's preset makes it one.
        epochs: ``steps`` in passes over the training set.
        p_reach: probability that ε is reached at all, from the censored trials of the meta-dataset; NaN where that is
            not known: without calibration, and outside the domain.
        in_domain: nothing about the model, lr, N, B, ε or loss lies outside what the meta-regressor was fitted on.
        warnings: sentences, empty where ``in_domain`` and the interval is sound.
        features: the probe's result.
        family: the family that the meta-regressor took the model for (``dense``, or ``dense, head at zero``); None
            where unknown.
        epsilon, lr, batch_size, dataset_size: what was asked.
    """

    steps: float
    epochs: float
    p_reach: float
    in_domain: bool
    warnings: tuple[str, ...]
    features: Features = field(repr=False)
    family: str | None
    epsilon: float
    lr: float
    batch_size: int
    dataset_size: int
    _centre: float = field(repr=False, compare=False)
    _conformal: Conformal = field(repr=False, compare=False)
    _width: float = field(repr=False, compare=False)
    _timer: StepTimer = field(repr=False, compare=False)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Return (low, high) in steps that hold T* with probability ``level``, given that ε is reached.

        The upper end is infinite where the family has too few calibration trials for the level, or none.
        """
        half_width = self._conformal.half_width(self.family, check_level(level))[0]
        if (
            not self.in_domain
        ):  # that half of the predictions are the very number of steps holds of models like those seen
            share = _NORMAL.inv_cdf(0.5 + level / 2) / _NORMAL.inv_cdf(0.95)
            half_width = max(half_width, share * self._conformal.half_width(self.family, 0.9)[0])
        half_width *= self._width
        return bounds(self._centre, self.steps, half_width)

    def time(self, step_seconds: float | None = None) -> float:
        """Return the seconds that ``steps`` take; without ``step_seconds`` a few real steps are timed, once, here."""
        return self.steps * (self._timer.seconds() if step_seconds is None else _positive(step_seconds, "step_seconds"))

    def cost(self, usd_per_hour: float, step_seconds: float | None = None) -> float:
        """Return the dollars that ``steps`` cost at an hourly price of the machine."""
        return self.time(step_seconds) / 3600.0 * check_price(usd_per_hour)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; bounds that are infinite are None, and so is a time that was never measured."""
        low, high = self.interval(0.9)
        measured = self._timer.measured
        return {
            "steps": self.steps,
            "interval_90": [low, high if math.isfinite(high) else None],
            "epochs": self.epochs,
            "p_reach": self.p_reach if math.isfinite(self.p_reach) else None,
            "in_domain": self.in_domain,
            "warnings": list(self.warnings),
            "family": self.family,
            "epsilon": self.epsilon,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "dataset_size": self.dataset_size,
            "seconds": None if measured is None else _known(self.steps * measured),
            "features": self.features.as_dict(),
        }


@undisturbed()
def predict(
    model: nn.Module,
    batch: tuple[Inputs, Any],
    *,
    loss: LossLike = "cross_entropy",
    lr: float,
    dataset_size: int,
    epsilon: float = 0.1,
    meta_model: MetaModel | str | os.PathLike[str] | None = None,
    family: str | None = None,
) -> Prediction:
    """Predict the number of optimizer steps to ε from one mini-batch at initialization, without training.

    Args:
        model: any module, at its initialization; left bit for bit as it was.
        batch: (inputs, targets) as training would see them.
        loss: name, module or callable. lr: learning rate of AdamW. dataset_size: full training-set size N.
        epsilon: fraction of the first loss to reach, in (0, 1).
        meta_model: a meta-regressor or its directory; the one shipped with CAPE where None.
        family: ``mlp``, ``cnn``, ``rnn``, ``transformer``, the ordinary models beside them (``dense``, ``convnet``,
            ``recurrent``, ``encoder``, ``backbone``) or one of your own; where None, inferred from the layers and from
            which of them knows the model best. One that the meta-regressor was not fitted on is out of domain, and has
            no interval.

    Raises:
        SpecError: lr, ε or dataset_size out of range, or a misspelt family.
        ModelError: the model or batch cannot be probed.
        StoreError: no meta-regressor there.
    """
    lr, epsilon = check_lr(lr), check_epsilon(epsilon)
    if not isinstance(model, nn.Module):
        raise SpecError(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
    dataset_size = check_count(dataset_size, "dataset_size")
    regressor = resolve(meta_model)
    check_family(family, regressor.families)
    x, y, batch_size = check_batch(batch)
    criterion = loss if isinstance(loss, Loss) else Loss(loss)
    seen = _seen_losses(regressor)
    known = _known_as(criterion, seen, model, batch)
    # By the known loss: a factor (a sum in the place of a mean, say) changes features, but not what AdamW does.
    probed = loss if known is None or criterion.is_named else known
    features = probe(model, batch, loss=probed, lr=lr, dataset_size=dataset_size)
    told, read = features.as_dict(), read_by(x, y)
    if any(name.endswith(HEAD_AT_ZERO) for name in regressor.families):
        told = with_later(features, model, batch, loss=probed, lr=lr, dataset_size=dataset_size)
    if family is None:
        family = known_best(regressor, infer_family(model), told, epsilon, read)
    elif f"{family}{read}" in regressor.families:
        family = f"{family}{read}"
    row = row_from_features(told, family, epsilon)
    family = row["family"][0]
    log_hat = regressor.predict_log(row)
    steps, centre = (float(in_steps(log_hat, whole)[0]) for whole in (regressor.preset.whole, False))
    inside = True
    warnings: list[str] = []
    if regressor.domain is not None:
        inside, warnings, _ = regressor.domain.check(row)
    if seen and known is None:
        names = ", ".join(sorted({_SAME_LOSS.get(name, name) for name in seen}))
        unseen = (
            f"The loss '{criterion.name}' is not one of those that the meta-regressor was fitted on ({names}, without"
            " smoothing or weights); expect errors larger than the interval says."
        )
        inside, warnings = False, [*warnings, unseen]
    p_reach = float(regressor.p_reach(row)[0]) if inside else math.nan  # nobody knows what happens out there
    if p_reach < 0.5:
        warnings = [*warnings, f"Fewer than half of such models reach ε = {epsilon:g} (p_reach {p_reach:.2f})."]
    if math.isinf(regressor.conformal.half_width(family, 0.9)[0]):
        warnings = [*warnings, "The meta-regressor has too few calibration trials for a 90 % interval."]
    return Prediction(
        steps=steps,
        epochs=steps * batch_size / dataset_size,
        p_reach=p_reach,
        in_domain=inside,
        warnings=tuple(warnings),
        features=features,
        family=family,
        epsilon=epsilon,
        lr=lr,
        batch_size=batch_size,
        dataset_size=dataset_size,
        _centre=centre,
        _conformal=regressor.conformal if family in regressor.families else Conformal(),
        _width=float(regressor.width(row)[0]),
        _timer=StepTimer(model, batch, loss, lr),
    )


@dataclass(frozen=True)
class Ranked:
    """One line of a ranking: a name, its prediction, and what its steps take."""

    name: str
    prediction: Prediction
    seconds: float
    usd: float | None


@dataclass(frozen=True)
class Ranking(Sequence[Ranked]):
    """Models in ascending order of predicted cost (of steps that are not rounded).

    ``print`` it for a table, with intervals of ``level``.
    """

    rows: tuple[Ranked, ...]
    level: float = 0.9

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one JSON object per model, cheapest first."""
        return [
            {
                "name": r.name,
                "rank": i,
                "seconds": _known(r.seconds),
                "usd": _known(r.usd),
                **_without_seconds(r.prediction),
            }
            for i, r in enumerate(self.rows, 1)
        ]

    def __str__(self) -> str:
        priced = any(r.usd is not None for r in self.rows)
        header = [
            "",
            "model",
            "steps",
            f"{100 * self.level:g} % interval",
            "seconds",
            *(["USD"] if priced else []),
            "in domain",
        ]
        lines = [header]
        for i, r in enumerate(self.rows, 1):
            low, high = r.prediction.interval(self.level)
            span = f"{low:.1f} to {high:.1f}" if math.isfinite(high) else "unknown"
            cost = [f"{r.usd:.3g}" if r.usd is not None else ""] if priced else []
            known = "yes" if r.prediction.in_domain else "no"
            lines.append([str(i), r.name, in_words(r.prediction.steps), span, f"{r.seconds:.3g}", *cost, known])
        widths = [max(len(line[j]) for line in lines) for j in range(len(header))]
        left = (1, len(header) - 1)
        return "\n".join(
            "  ".join(
                c.ljust(w) if j in left else c.rjust(w) for j, (c, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def rank(
    candidates: Iterable[tuple[str, nn.Module, tuple[Inputs, Any], float]],
    *,
    loss: LossLike = "cross_entropy",
    dataset_size: int,
    epsilon: float = 0.1,
    usd_per_hour: float | None = None,
    meta_model: MetaModel | str | os.PathLike[str] | None = None,
    level: float = 0.9,
) -> Ranking:
    """Order models by what reaching ε is predicted to cost: predicted steps times the measured seconds of a step.

    Args:
        candidates: (name, model, batch, lr) each. The rest as in ``predict``, shared by all.
        usd_per_hour: price of the machine; adds dollars.
        level: of the intervals in the table.

    Raises:
        SpecError: no candidate, or one that is not such a tuple; and as ``predict``.
    """
    check_level(level)
    if usd_per_hour is not None:
        check_price(usd_per_hour)
    if not isinstance(candidates, Iterable):
        raise SpecError(f"The candidates are tuples (name, model, batch, lr), not {candidates!r}.")
    check_epsilon(epsilon)
    check_count(dataset_size, "dataset_size")
    regressor = resolve(meta_model)
    rows = []
    for candidate in candidates:
        if not isinstance(candidate, (tuple, list)) or len(candidate) != 4:
            raise SpecError("Each candidate is a tuple (name, model, batch, lr).")
        name, model, batch, lr = candidate
        told: dict[str, Any] = {"dataset_size": dataset_size, "epsilon": epsilon, "meta_model": regressor}
        try:
            made = predict(model, batch, loss=loss, lr=lr, **told)
            usd = None if usd_per_hour is None else made.cost(usd_per_hour)
            rows.append(Ranked(str(name), made, made.time(), usd))
        except CapeError as error:
            raise type(error)(f"The candidate '{name}': {error}") from error
    if not rows:
        raise SpecError("There is nothing to rank; give at least one (name, model, batch, lr).")

    # By what is not rounded: two models may need the same number of steps.
    def cost(row: Ranked) -> float:
        found = row.prediction._centre * row.seconds / row.prediction.steps
        return found if math.isfinite(found) else math.inf  # a run that diverges at once has no time of a step

    return Ranking(tuple(sorted(rows, key=cost)), level)


def in_words(steps: float) -> str:
    """Return a number of steps for a person: with a decimal where it is not whole."""
    return f"{steps:.0f}" if steps == round(steps) else f"{steps:.1f}"


def _known(value: float | None) -> float | None:
    """Return a number, None where it is none: of a run that diverges at once no step can be timed."""
    return value if value is not None and math.isfinite(value) else None


def _without_seconds(prediction: Prediction) -> dict[str, Any]:
    return {k: v for k, v in prediction.to_dict().items() if k != "seconds"}


def _seen_losses(regressor: MetaModel) -> list[str]:
    """Return the losses that the meta-dataset's trials trained with."""
    return [TASK_LOSS[t] for t in regressor.card["data"]["tasks"] if t in TASK_LOSS]


def _known_as(criterion: Loss, seen: Sequence[str], model: nn.Module, batch: tuple[Inputs, Any]) -> str | None:
    """Return the one of the losses ``seen`` that a loss is, but for a factor; None where it is none of them.

    What is no name is known by what it does on this batch.
    """
    if criterion.is_named:
        mine = _SAME_LOSS.get(criterion.name, criterion.name)
        return next((name for name in seen if _SAME_LOSS.get(name, name) == mine), None)
    if not seen:
        return None
    x, y, _ = check_batch(map_tensors(lambda t: ordinary_tensor(t).clone(), batch))
    with torch.inference_mode(False), preserved(criterion.beside(model), seed=0), running(model):
        model.eval()
        outputs = call(model, x)
        if not isinstance(outputs, torch.Tensor):
            return None  # the probe says what is wrong with that
        return next((name for name in seen if _same_loss(criterion, Loss(name), outputs.detach(), y)), None)


def _same_loss(a: Loss, b: Loss, outputs: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether two losses and their gradients on a batch are the same numbers, but for one factor, and so is the mean.

    Negative log-likelihoods of a model that returns log-probabilities are cross-entropies: a model's probabilities add
    up to one, so that the gradient may have any multiple of them more.
    """
    with torch.enable_grad():
        try:
            (ours, of_ours, _), (theirs, of_theirs, _) = (loss.cotangents(outputs, targets) for loss in (a, b))
            whole, each = float(a.mean(outputs, targets)), float(ours.detach().mean())
        except Exception:  # whatever a loss raises on outputs and targets that are not its kind
            return False
    if not any(math.isclose(whole, each * count, rel_tol=1e-3) for count in (1, len(ours))):
        return False  # a weighted mean: of a sample alone the weight cancels
    of_same = [of_theirs]
    if b.name == "cross_entropy" and outputs.dim() >= 2 and float(outputs.logsumexp(1).abs().amax()) < 1e-3:
        of_same.append(of_theirs - outputs.exp() / outputs[0, 0].numel())
    return any(_proportional((ours, of_ours), (theirs, of_them)) for of_them in of_same)


def _proportional(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    one, other = (torch.cat([t.detach().double().flatten() for t in pair]) for pair in (ours, theirs))
    factor = float(one @ other / (other @ other))
    return factor > 0.0 and torch.allclose(one, factor * other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def check_price(usd_per_hour: float) -> float:
    """Return an hourly price that is positive and finite, or raise ``SpecError``."""
    return _positive(usd_per_hour, "usd_per_hour")


def _positive(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
        raise SpecError(f"{name} must be a positive number, not {value!r}.")
    return float(value)


class _CallableModule(types.ModuleType):
    """``cape.predict`` names both this module and its function; importing the module must not hide the function."""

    __call__ = staticmethod(predict)


sys.modules[__name__].__class__ = _CallableModule
