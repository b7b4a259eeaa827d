"""Everything that is scored: presets of the meta-regressor, comparators, baselines and the constant median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cape.baselines.curve_extrapolation import curves
from cape.baselines.ntk import ntkl
from cape.baselines.static_linear import StaticLinear
from cape.errors import SpecError
from cape.metamodel.estimators import COMPARATORS, comparator
from cape.metamodel.fit import fit_table
from cape.metamodel.presets import PRESETS, Preset, preset_named
from cape.metamodel.rows import CAP, PAPER_FEATURES, Rows

ABLATIONS = tuple(name for name in PRESETS if name.startswith("paper_without_"))
FULL_PRESETS = (
    "paper",
    "static",
    "paper_epsilon",
    "paper_appendix",
    "product_static",
    "product_trees",
    "product",
    *ABLATIONS,
)
"""Presets of the full tables: what the probes add, what each feature adds, and appendix A.4."""

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Predicted:
    """Steps [n] (NaN where the method cannot say), intervals by level, and p_reach [n] or None."""

    steps: np.ndarray
    intervals: dict[float, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    p_reach: np.ndarray | None = None


Method = Callable[[Rows, Rows], Predicted]


def methods(presets: Sequence[str | Preset], comparators: Sequence[str], threads: int = 0) -> dict[str, Method]:
    """Return the methods by name, in the order of the tables; raises ``SpecError`` for unknown names."""
    out: dict[str, Method] = {}
    for name in presets:
        preset = preset_named(name)
        out[preset.name] = _preset_method(preset, threads)
    for name in comparators:
        if name not in COMPARATORS:
            comparator(name)  # raises, naming the close match
        out[name] = _comparator_method(name)
    out |= {"static_linear": _static_linear, "ntkl": _ntkl, "curve": _curve, "median": _median}
    if not presets:
        raise SpecError("At least one preset is needed to evaluate.")
    return out


def _preset_method(preset: Preset, threads: int) -> Method:
    calibrate = preset.intervals

    def run(train: Rows, test: Rows) -> Predicted:
        model = fit_table(train, preset, calibrate=calibrate, threads=threads)
        bands = {level: model.interval(test, level) for level in LEVELS} if calibrate else {}
        return Predicted(model.predict(test), bands, model.p_reach(test) if calibrate else None)

    return run


def _by_family(train: Rows, test: Rows, run: Callable[[Rows, Rows], np.ndarray]) -> Predicted:
    """Fit a method per family on plain rows, as the paper does, and on all of these for a family that has none."""
    train = train.take(train.reached & ~train.augmented)
    out = np.full(len(test), np.nan)
    for family in {str(f) for f in test["family"]}:
        mine = test["family"] == family
        rows = train.take(train["family"] == family)
        out[mine] = run(rows if len(rows) else train, test.take(mine))
    return Predicted(out)


def _comparator_method(name: str) -> Method:
    def one(train: Rows, test: Rows) -> np.ndarray:
        x, wanted = train.matrix(PAPER_FEATURES), test.matrix(PAPER_FEATURES)
        usable, complete = np.isfinite(x).all(axis=1), np.isfinite(wanted).all(axis=1)
        out = np.full(len(test), np.nan)
        if usable.any() and complete.any():
            model: Any = comparator(name).fit(x[usable], train["t_star"][usable])
            out[complete] = np.clip(model.predict(wanted[complete]), 1.0, CAP)
        return out

    return lambda train, test: _by_family(train, test, one)


def _static_linear(train: Rows, test: Rows) -> Predicted:
    return _by_family(train, test, lambda a, b: StaticLinear.fit(a).predict(b))


def _median(train: Rows, test: Rows) -> Predicted:
    return _by_family(train, test, lambda a, b: np.full(len(b), np.median(a["t_star"])))


def _ntkl(train: Rows, test: Rows) -> Predicted:
    return Predicted(ntkl(test["log_tau"], test["epsilon"]))


def _curve(train: Rows, test: Rows) -> Predicted:
    if "losses" not in test.columns:
        return Predicted(np.full(len(test), np.nan))
    return Predicted(curves(test["losses"], test["epsilon"]))
