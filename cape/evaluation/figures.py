"""Figures of an evaluation, drawn from its store of predictions (matplotlib, no display, no global state)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.errors import DependencyError
from cape.evaluation import metrics
from cape.evaluation.methods import LEVELS
from cape.evaluation.table import FLOOR, LABELS, columns_of, predicting
from cape.metamodel.rows import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cape.evaluation.run import Evaluation
    from cape.metamodel.artifact import MetaModel

COLOURS = ("#3b6fb6", "#d1603d", "#4c9f70", "#8a5fb0", "#b08a2e", "#5a6570")
DPI = 110
SHOWN_POINTS = 3000
CALIBRATION_BINS = 10


def png(figure: Figure) -> bytes:
    """Return a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": ""})
    return buffer.getvalue()


def figures(evaluation: Evaluation) -> dict[str, Figure]:
    """Return the figures of an evaluation by file name."""
    store = columns_of(evaluation.predictions)
    names = [n for n in predicting(store, list(dict.fromkeys(store["method"].tolist()))) if n != FLOOR]
    best = "product" if "product" in names else names[0]
    families = sorted(set(store["family"].tolist()))
    out = {
        "predicted_against_true": _scatter(store, families, best),
        "errors": _errors(store, families, names),
        "residuals": _residuals(store, families, [n for n in names if n in (best, "paper", "static_linear")]),
        "distribution": _distribution(store, families, names[0]),
        "figure_1": _figure_1(store, families, [n for n in names if n in (best, "paper")]),
        "calibration": _calibration(store, families, best),
    }
    if np.isfinite(store["low_90"]).any():
        out["coverage"] = _coverage(store, families, best)
    return out


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("Figures need matplotlib; install it with `pip install matplotlib`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, width: float = 3.6, height: float = 3.4, sharey: bool = False) -> tuple[Figure, list[Any]]:
    columns = min(count, 2) if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure = _figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _of(store: dict[str, np.ndarray], method: str, family: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (true, predicted) of the scored rows that have a prediction."""
    index = (
        (store["method"] == method) & (store["family"] == family) & store["scored"] & np.isfinite(store["predicted"])
    )
    return store["t_star"][index], store["predicted"][index]


def _steps_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _scatter(store: dict[str, np.ndarray], families: list[str], method: str) -> Figure:
    figure, axes = _panels(len(families))
    for axis, family in zip(axes, families, strict=True):
        true, predicted = _of(store, method, family)
        chosen = np.random.default_rng(0).permutation(len(true))[:SHOWN_POINTS]
        # T* is whole: a little horizontal jitter shows how many points lie on one value.
        jitter = np.exp(np.random.default_rng(1).uniform(-0.02, 0.02, len(chosen)))
        axis.scatter(
            true[chosen] * jitter,
            predicted[chosen],
            s=7 if len(true) > 500 else 14,
            alpha=0.35 if len(true) > 500 else 0.7,
            color=COLOURS[0],
            linewidths=0,
        )
        if len(true):
            low = 0.8 * min(true.min(), predicted.min())
            high = 1.25 * max(true.max(), predicted.max())
            axis.plot([low, high], [low, high], color="#222222", lw=1)
            axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
            _steps_axis(axis.xaxis)
            _steps_axis(axis.yaxis)
            axis.tick_params(labelsize=8)
            found = metrics.errors(true, predicted)
            axis.set_title(
                f"{family}\nMAE {found['mae']:.2f} steps, AvgAccuracy {found['avg_accuracy']:.2f}", fontsize=9
            )
        axis.set_xlabel("measured T* (steps)", fontsize=9)
        axis.set_ylabel("predicted T* (steps)", fontsize=9)
        axis.grid(alpha=0.2)
    figure.suptitle(f"Predicted against measured steps, {LABELS.get(method, method)}", fontsize=11)
    return figure


def _colour(method: str) -> str:
    """Return a method's colour: the product's, the paper's, or that of everything else."""
    return COLOURS[0] if method == "product" else COLOURS[1] if method.startswith("paper") else COLOURS[5]


def _errors(store: dict[str, np.ndarray], families: list[str], names: list[str]) -> Figure:
    figure, axes = _panels(len(families), width=4.9, height=0.9 + 0.32 * len(names))
    for axis, family in zip(axes, families, strict=True):
        values = [metrics.errors(*_of(store, name, family))["mae"] for name in names]
        where = np.arange(len(names))[::-1]
        colours = [_colour(n) for n in names]
        finite = [v for v in values if np.isfinite(v)]
        axis.barh(where, np.nan_to_num(values), color=colours, height=0.7)
        limit = max(finite, default=1.0)
        for y, value in zip(where, values, strict=True):
            text = f"{value:.2f}" if np.isfinite(value) else "n/a"
            axis.text(np.nan_to_num(value) + 0.015 * limit, y, text, va="center", fontsize=8)
        lowest = metrics.errors(*_of(store, FLOOR, family))["mae"]
        title = family
        if np.isfinite(lowest):
            axis.axvline(lowest, color="#222222", lw=1, ls="--")
            title += f"  (dashed: replicate floor, {lowest:.2f})"
        axis.set_yticks(where, [n.replace("_", " ") for n in names], fontsize=8)
        axis.set_xlim(0, 1.18 * limit)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("MAE (steps, uncalibrated)", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _residuals(store: dict[str, np.ndarray], families: list[str], names: list[str]) -> Figure:
    figure = _figure(max(5.5, 1.8 * len(families) + 1.5), 3.6)
    axis = figure.subplots()
    width = 0.8 / max(1, len(names))
    for j, name in enumerate(names):
        data = []
        for family in families:
            true, predicted = _of(store, name, family)
            data.append(predicted / np.maximum(true, 1.0))
        where = np.arange(len(families)) + (j - (len(names) - 1) / 2) * width
        boxes = axis.boxplot(
            data,
            positions=where,
            widths=0.85 * width,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
        )
        for box in boxes["boxes"]:
            box.set(facecolor=_colour(name), alpha=0.6)
        for line in boxes["medians"]:
            line.set(color="#222222")
        axis.plot([], [], color=_colour(name), lw=6, alpha=0.6, label=name.replace("_", " "))
    axis.axhline(1.0, color="#222222", lw=0.7, ls=":")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda v, _: f"×{v:g}")
    axis.set_xticks(np.arange(len(families)), families)
    axis.set_ylabel("predicted / measured T*")
    axis.set_title("Residuals by family (box: middle half, whiskers: 5 % to 95 %)", fontsize=10)
    figure.legend(fontsize=8, frameon=False, ncols=len(names), loc="outside lower center")
    axis.grid(axis="y", alpha=0.2)
    return figure


def _coverage(store: dict[str, np.ndarray], families: list[str], method: str) -> Figure:
    figure = _figure(4.6, 4.2)
    axis = figure.subplots()
    axis.plot([0.4, 1], [0.4, 1], color="#222222", lw=1, label="ideal")
    for j, family in enumerate(families):
        index = (store["method"] == method) & (store["family"] == family) & store["scored"]
        true = store["t_star"][index]
        measured = [
            metrics.intervals(true, store[f"low_{round(v * 100)}"][index], store[f"high_{round(v * 100)}"][index])
            for v in LEVELS
        ]
        axis.plot(LEVELS, [m["coverage"] for m in measured], "o-", ms=4, color=COLOURS[j % len(COLOURS)], label=family)
    axis.set(xlabel="level asked for", ylabel="share of measured T* inside", xlim=(0.45, 1), ylim=(0.4, 1.01))
    axis.set_title("Coverage of the prediction intervals", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.2)
    return figure


def _calibration(store: dict[str, np.ndarray], families: list[str], method: str) -> Figure:
    """Draw the mean measured T* of rows with like predictions: on the diagonal, predictions are right on average."""
    figure = _figure(4.8, 4.4)
    axis = figure.subplots()
    ends = []
    for j, family in enumerate(families):
        true, predicted = _of(store, method, family)
        if len(true) < 2 * CALIBRATION_BINS:
            continue
        groups = np.array_split(np.argsort(predicted, kind="stable"), CALIBRATION_BINS)
        x = np.array([predicted[g].mean() for g in groups])
        y = np.array([true[g].mean() for g in groups])
        error = np.array([true[g].std() / np.sqrt(len(g)) for g in groups])
        colour = COLOURS[j % len(COLOURS)]
        axis.errorbar(x, y, yerr=2 * error, fmt="o-", ms=4, lw=1, color=colour, label=family, capsize=2)
        ends += [x.min(), x.max()]
    if ends:
        low, high = 0.8 * min(ends), 1.25 * max(ends)
        axis.plot([low, high], [low, high], color="#222222", lw=1, label="ideal")
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        _steps_axis(axis.xaxis)
        _steps_axis(axis.yaxis)
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel("mean predicted T* of a tenth of the rows (steps)", fontsize=9)
    axis.set_ylabel("their mean measured T* (bars: 2 standard errors)", fontsize=9)
    axis.set_title(f"Calibration, {LABELS.get(method, method)}", fontsize=10)
    axis.grid(alpha=0.2)
    return figure


def _figure_1(store: dict[str, np.ndarray], families: list[str], names: list[str]) -> Figure:
    """Draw errors by learning rate and by batch size: in steps, as the paper's Figure 1, and relative to T*."""
    figure = _figure(9.6, 6.4)
    axes = figure.subplots(2, 2)
    for i, (column, label) in enumerate((("lr", "learning rate"), ("batch_size", "batch size"))):
        values = sorted(set(store[column][store["method"] == names[0]].tolist()))
        for j, family in enumerate(families):
            for name in names:
                index = (store["method"] == name) & (store["family"] == family) & store["scored"]
                index &= np.isfinite(store["predicted"])
                gap = np.abs(store["predicted"] - store["t_star"])
                parts = [index & (store[column] == value) for value in values]
                style = {"color": COLOURS[j % len(COLOURS)], "ls": "-" if name == names[-1] else "--", "marker": "o"}
                steps = [float(gap[p].mean()) if p.any() else np.nan for p in parts]
                share = [
                    float((gap / np.maximum(store["t_star"], 1.0))[p].mean()) if p.any() else np.nan for p in parts
                ]
                text = f"{family}, {LABELS.get(name, name).split(',')[0]}" if i == 0 else None
                axes[0, i].plot(range(len(values)), steps, ms=4, lw=1.2, label=text, **style)
                axes[1, i].plot(range(len(values)), [100 * v for v in share], ms=4, lw=1.2, **style)
        for k, what in enumerate(("MAE (steps)", "mean error / T* (%)")):
            axes[k, i].set_xticks(range(len(values)), [f"{v:g}" for v in values], fontsize=8)
            axes[k, i].set_xlabel(label, fontsize=9)
            axes[k, i].set_ylabel(what, fontsize=9)
            axes[k, i].set_ylim(bottom=0)
            axes[k, i].tick_params(labelsize=8)
            axes[k, i].grid(alpha=0.2)
    figure.suptitle("Figure 1: error by learning rate and batch size, uncalibrated", fontsize=11)
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    return figure


def _distribution(store: dict[str, np.ndarray], families: list[str], method: str) -> Figure:
    figure, axes = _panels(len(families), height=2.5)
    for axis, family in zip(axes, families, strict=True):
        index = (store["method"] == method) & (store["family"] == family) & store["reached"]
        true = store["t_star"][index]
        if len(true):
            # T* is whole: edges at halves, so that no bar is empty only because it holds no whole number.
            edges = np.unique(np.round(np.geomspace(max(1.0, true.min()), true.max() + 1, 31))) - 0.5
            axis.hist(true, bins=edges, color=COLOURS[2])
            axis.set_xscale("log")
            _steps_axis(axis.xaxis)
            axis.axvline(np.median(true), color="#222222", lw=1, ls="--")
            axis.set_title(f"{family}: median {np.median(true):g}, mean {true.mean():.1f}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("measured T* (steps)", fontsize=9)
        axis.set_ylabel("rows", fontsize=9)
    figure.suptitle("The distribution of T*", fontsize=11)
    return figure


def importance(model: MetaModel, rows: Rows) -> Figure:
    """Draw, by family, the mean absolute SHAP value of each feature, and how far a prediction moves without it.

    SHAP is XGBoost's own, with the line's terms; the surface has none. What the whole model, surface included, makes of
    a feature shows in the other panel: the mean change of log T* where its values are dealt out anew among the rows.
    """
    features = model.preset.features
    families = [f for f in rows.families if f in model.families]
    mine = [rows.take(np.flatnonzero(rows["family"] == family)[:SHOWN_POINTS]) for family in families]
    shap = np.array([_shap(model, part, family) for part, family in zip(mine, families, strict=True)])
    moved = np.array([_moved(model, part) for part in mine])
    order = np.argsort(moved.sum(axis=0))
    figure = _figure(9.6, 1.0 + 0.32 * len(features))
    panels = (shap, "mean |SHAP| in log T* (trees and line)"), (moved, "mean change of log T* when dealt out anew")
    for axis, (values, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        left = np.zeros(len(features))
        for i, family in enumerate(families):
            colour = COLOURS[i % len(COLOURS)]
            axis.barh(np.arange(len(features)), values[i][order], left=left, color=colour, label=family, height=0.7)
            left += values[i][order]
        axis.set_yticks(np.arange(len(features)), [features[k] for k in order], fontsize=8)
        axis.set_xlabel(f"{label}, families stacked", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle("What the meta-regressor looks at", fontsize=10)
    return figure


def _shap(model: MetaModel, rows: Rows, family: str) -> np.ndarray:
    """Return the mean absolute SHAP value of each feature over rows of one family, by its trees and its line."""
    from cape.metamodel.line import EPSILON_TERM, POOLED
    from cape.metamodel.regressors import dmatrix

    features = model.preset.features
    booster = model.boosters.get(family, model.boosters[POOLED])
    parts = booster.predict(dmatrix(rows.matrix(features, model.families), features), pred_contribs=True)[:, :-1]
    if line := model.lines.get(family):
        for term, values in zip(line.terms, line.contributions(rows).T, strict=True):
            name = "log_epsilon" if term == EPSILON_TERM else term
            parts[:, features.index(name)] += values - values.mean()
    return np.abs(parts).mean(axis=0)


def _moved(model: MetaModel, rows: Rows) -> np.ndarray:
    """Return the mean change of log T* where each feature's values are exchanged among rows of one family."""
    order = np.random.default_rng(0).permutation(len(rows))
    known = model.predict_log(rows)
    changed = [Rows({**rows.columns, f: rows[f][order]}) for f in model.preset.features]
    return np.array([np.abs(model.predict_log(c) - known).mean() for c in changed])
