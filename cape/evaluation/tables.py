"""Tables of an evaluation, all made from its store of predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cape.evaluation import metrics
from cape.evaluation.methods import LEVELS
from cape.evaluation.paper_tables import (
    PUBLISHED,
    PUBLISHED_BASELINE,
    PUBLISHED_HELD_OUT,
    PUBLISHED_XGBOOST,
    paper_tables,
)
from cape.evaluation.table import FLOOR, LABELS, Table, columns_of, predicting, select_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from cape.baselines.rebuilt import Cost


def _order(values: np.ndarray) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values))


def build_tables(predictions: pa.Table, protocol: str) -> dict[str, Table]:
    """Return every table of an evaluation, by file name."""
    store = columns_of(predictions)
    families = sorted(_order(store["family"]), key=lambda f: (list(PUBLISHED).index(f) if f in PUBLISHED else 99, f))
    names = [n for n in _order(store["method"]) if n != FLOOR]
    out = {
        **paper_tables(store, families, names, protocol),
        "main": _main(store, families, names, protocol),
        "by_split": _by(store, families, names, "split", f"By split ({protocol})"),
        "by_dataset": _by(store, families, names, "dataset", "By dataset"),
        "by_epsilon": _by(store, families, names, "epsilon", "By ε"),
        "by_lr": _by(store, families, names, "lr", "By learning rate"),
        "by_batch_size": _by(store, families, names, "batch_size", "By batch size"),
        "corpus": _corpus(store, families, names[0]),
    }
    intervals = _intervals(store, families, names)
    if intervals.rows:
        out["intervals"] = intervals
    return out


def _main(store: dict[str, np.ndarray], families: list[str], names: list[str], protocol: str) -> Table:
    rows = []
    for family in [*families, *(["all"] if len(families) > 1 else [])]:
        for name in names:
            mine = select_rows(store, name, family)
            raw = metrics.errors(mine["t_star"], mine["predicted"])
            fitted = metrics.errors(mine["t_star"], mine["calibrated"])
            if fitted["rows"] < raw["rows"]:  # some families had no trials to spare: not the same rows
                fitted = metrics.errors(np.empty(0), np.empty(0))
            rows.append(_main_row(family, LABELS.get(name, name), raw, fitted, _published(name, family, protocol)))
        floor = select_rows(store, FLOOR, family)
        raw = metrics.errors(floor["t_star"], floor["predicted"])
        nothing = metrics.errors(np.empty(0), np.empty(0))
        rows.append(_main_row(family, FLOOR, raw, nothing, float("nan")))
        if protocol in ("in-corpus", "fresh") and family in PUBLISHED_BASELINE:
            rows.append(_main_row(family, "best baseline of the paper", nothing, nothing, PUBLISHED_BASELINE[family]))
    columns = (
        *("family", "method", "rows", "MAE", "MAE calibrated", "RMSE", "median AE", "R²", "AvgAccuracy"),
        *("AvgAccuracy calibrated", "paper's MAE"),
    )
    note = (
        "MAE, RMSE and median AE in steps. Calibrated: a line in epochs fitted on a tenth of each family's test trials;"
        " neither column is scored on those. The replicate floor is the error of the best predictor that knows all"
        " but the seed, over configurations with at least five trials. The paper's MAE, on its own data: Table 1 beside"
        " the product and the best baseline, Table 4 beside the paper's preset. Curve"
        " extrapolation trains 60 steps first: where T* is at most 60 it only reports what it has seen."
    )
    return Table(f"Errors ({protocol})", columns, tuple(rows), note)


def _main_row(family: str, label: str, raw: dict[str, float], fitted: dict[str, float], paper: float) -> tuple:
    return (
        *(family, label, int(raw["rows"]), raw["mae"], fitted["mae"], raw["rmse"], raw["median_ae"], raw["r2"]),
        *(raw["avg_accuracy"], fitted["avg_accuracy"], paper),
    )


def _published(method: str, family: str, protocol: str) -> float:
    """Return the number that the paper prints for what stands in a row; NaN where it prints none."""
    if protocol not in ("in-corpus", "fresh"):
        return float("nan")
    return {"product": PUBLISHED, "paper": PUBLISHED_XGBOOST}.get(method, {}).get(family, float("nan"))


def _by(store: dict[str, np.ndarray], families: list[str], names: list[str], column: str, title: str) -> Table:
    rows = []
    names = predicting(store, names)
    for family in families:
        base = select_rows(store, names[0], family)
        for value in sorted(set(base[column].tolist())):
            cells: list[Any] = [family, f"{value:g}" if isinstance(value, float) else str(value)]
            first = base[column] == value
            cells += [int(first.sum()), float(np.mean(base["t_star"][first]))]
            for name in names:
                mine = select_rows(store, name, family)
                index = mine[column] == value
                found = metrics.errors(mine["t_star"][index], mine["predicted"][index])
                cells += [found["mae"], found["avg_accuracy"]]
            published = PUBLISHED_HELD_OUT.get(str(value).lower(), (float("nan"),) * 2)
            rows.append((*cells, *published) if column == "dataset" else tuple(cells))
    columns = ["family", column if column != "epsilon" else "ε", "rows", "mean T*"]
    columns += [f"{name} {what}" for name in names for what in ("MAE", "AvgAcc")]
    if column == "dataset":
        columns += ["paper, held out: MAE", "paper, held out: AvgAcc"]
    return Table(title, tuple(columns), tuple(rows), "Uncalibrated, scored rows only.")


def _corpus(store: dict[str, np.ndarray], families: list[str], name: str) -> Table:
    rows = []
    for family in families:
        mine = select_rows(store, name, family, scored=False)
        for dataset in sorted(set(mine["dataset"].tolist())):
            index = mine["dataset"] == dataset
            t = mine["t_star"][index & mine["reached"]]
            found = [float("nan")] * 5
            if len(t):
                found = [float(v) for v in (t.min(), np.median(t), t.mean(), np.quantile(t, 0.9), t.max())]
            trials = len(set(mine["trial_id"][index].tolist()))
            censored = int((index & ~mine["reached"]).sum())
            rows.append((family, str(dataset), trials, int(index.sum()), censored, *found))
    columns = ("family", "dataset", "trials", "rows", "censored", "min T*", "median T*", "mean T*", "90 % T*", "max T*")
    return Table("Test rows", columns, tuple(rows))


def cost_table(costs: Sequence[Cost]) -> Table:
    """Return what each method costs by family, the median over splits; learned methods cost one probe."""
    labels = {
        "probe": "one probe: every learned method with gradient features",
        "ntkl": LABELS["ntkl"],
        "ntk_ode": LABELS["ntk_ode"],
        "curve": LABELS["curve"],
    }
    rows = []
    for family in sorted({c.family for c in costs}):
        for name, label in labels.items():
            mine = [c for c in costs if c.family == family and c.method == name]
            if mine:
                seconds, probes = (float(np.median([getattr(c, k) for c in mine])) for k in ("seconds", "probes"))
                rows.append((family, label, sum(c.trials for c in mine), 1e3 * seconds, probes))
    note = (
        "Measured on models built again, on this machine, each alone. Static features and the constant median need no"
        " pass over the model at all; the meta-regressor's own prediction takes about a millisecond."
    )
    return Table("Cost", ("family", "method", "trials", "ms", "probe-equivalents"), tuple(rows), note)


def _intervals(store: dict[str, np.ndarray], families: list[str], names: list[str]) -> Table:
    rows = []
    for name in names:
        for family in [*families, *(["all"] if len(families) > 1 else [])]:
            mine = select_rows(store, name, family)
            for level in LEVELS:
                low, high = mine[f"low_{round(level * 100)}"], mine[f"high_{round(level * 100)}"]
                if len(low) and not np.isnan(low).all():
                    found = metrics.intervals(mine["t_star"], low, high)
                    rows.append((name, family, f"{level:.0%}", len(low), 100 * found["coverage"], found["width"]))
    columns = ("method", "family", "level", "rows", "coverage %", "median high/low")
    return Table(
        "Intervals",
        columns,
        tuple(rows),
        "Conformal per family, from predictions of trials that were left out of the fit behind them.",
    )
