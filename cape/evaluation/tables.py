"""Tables of an evaluation, all made from its store of predictions."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.evaluation import metrics
from cape.evaluation.methods import LEVELS

if TYPE_CHECKING:
    import pyarrow as pa

FLOOR = "replicate floor"

# The paper's MAE in steps: Table 1 (CAPE and its best baseline) and Table 4 (XGBoost); held-out (MAE, AvgAccuracy).
PUBLISHED = {"mlp": 3.79, "rnn": 4.21, "cnn": 2.86, "transformer": 9.03}
PUBLISHED_XGBOOST = {"mlp": 1.98, "rnn": 3.79, "cnn": 2.89, "transformer": 8.71}
PUBLISHED_BASELINE = {"mlp": 4.73, "rnn": 7.03, "cnn": 3.14, "transformer": 16.33}
PUBLISHED_HELD_OUT = {"imdb": (25.63, 0.68), "svhn": (31.64, 0.51)}

LABELS = {
    "paper": "XGBoost, six features, per family (paper)",
    "paper_pooled": "XGBoost, six features, pooled",
    "paper_appendix": "XGBoost 500/6, six features, per family (A.4)",
    "static": "XGBoost, four static features, per family",
    "product": "CAPE product",
    "linear": "linear regression (A.4)",
    "ridge": "ridge (A.4)",
    "random_forest": "random forest (A.4)",
    "svr": "SVR (A.4)",
    "mlp_regressor": "MLP regressor (A.4)",
    "static_linear": "static linear",
    "ntkl": "NTK mean eigenvalue",
    "curve": "curve extrapolation, 60 steps",
    "median": "constant median",
}


@dataclass(frozen=True)
class Table:
    """A titled table: column names, rows of text or numbers, and a note below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, numbers right-aligned, with title and note."""
        cells = [[show(v) for v in row] for row in self.rows]
        right = [any(isinstance(r[j], (int, float)) for r in self.rows) for j in range(len(self.columns))]
        width = [max(len(c), 3, *(len(r[j]) for r in cells), 0) for j, c in enumerate(self.columns)]

        def line(values: list[str]) -> str:
            put = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, width, right, strict=True)]
            return "| " + " | ".join(put) + " |"

        rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(width, right, strict=True)) + "|"
        text = [f"## {self.title}", "", line(list(self.columns)), rule, *map(line, cells)]
        return "\n".join([*text, "", self.note] if self.note else text)

    def csv(self) -> str:
        """Return the table as CSV, numbers in full, nothing for what does not exist."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row])
        return out.getvalue()


def show(value: Any) -> str:
    """Return a cell's text: ``n/a`` for NaN, three significant digits or two decimals for a float."""
    if isinstance(value, float):
        if math.isnan(value):
            return "n/a"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
    return str(value)


def columns_of(predictions: pa.Table) -> dict[str, np.ndarray]:
    """Return the store as numpy columns."""
    return {n: predictions.column(n).to_numpy(zero_copy_only=False) for n in predictions.column_names}


def select(predictions: pa.Table, method: str, family: str = "all", scored: bool = True) -> dict[str, np.ndarray]:
    """Return the numpy columns of one method's (scored) rows of a family, or of all."""
    return _select(columns_of(predictions), method, family, scored)


def _select(store: dict[str, np.ndarray], method: str, family: str, scored: bool = True) -> dict[str, np.ndarray]:
    index = store["method"] == method
    if scored:
        index = index & store["scored"]
    if family != "all":
        index = index & (store["family"] == family)
    return {k: v[index] for k, v in store.items()}


def predicting(store: dict[str, np.ndarray], names: list[str]) -> list[str]:
    """Return the methods that predict at least one row (curve extrapolation cannot without recorded losses)."""
    return [n for n in names if np.isfinite(store["predicted"][store["method"] == n]).any()]


def _order(values: np.ndarray) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values))


def build_tables(predictions: pa.Table, protocol: str) -> dict[str, Table]:
    """Return every table of an evaluation, by file name."""
    store = columns_of(predictions)
    families = sorted(_order(store["family"]), key=lambda f: (list(PUBLISHED).index(f) if f in PUBLISHED else 99, f))
    names = _order(store["method"])
    out = {
        "main": _main(store, families, names, protocol),
        "by_split": _by(store, families, names, "split", f"By split ({protocol})"),
        "by_dataset": _by(store, families, names, "dataset", "By dataset"),
        "by_epsilon": _by(store, families, names, "epsilon", "By ε"),
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
            mine = _select(store, name, family)
            raw = metrics.errors(mine["t_star"], mine["predicted"])
            fitted = metrics.errors(mine["t_star"], mine["calibrated"])
            if fitted["rows"] < raw["rows"]:  # some families had no trials to spare: not the same rows
                fitted = metrics.errors(np.empty(0), np.empty(0))
            rows.append(_main_row(family, LABELS.get(name, name), raw, fitted, _published(name, family, protocol)))
        mine = _select(store, names[0], family)
        every = _select(store, names[0], family, scored=False)
        every = {k: v[every["reached"]] for k, v in every.items()}
        floor = metrics.replicate_floor(every["configuration"], every["t_star"])[every["scored"]]
        raw = metrics.errors(mine["t_star"], floor)
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
        base = _select(store, names[0], family)
        for value in sorted(set(base[column].tolist())):
            cells: list[Any] = [family, f"{value:g}" if isinstance(value, float) else str(value)]
            first = base[column] == value
            cells += [int(first.sum()), float(np.mean(base["t_star"][first]))]
            for name in names:
                mine = _select(store, name, family)
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
        mine = _select(store, name, family, scored=False)
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


def _intervals(store: dict[str, np.ndarray], families: list[str], names: list[str]) -> Table:
    rows = []
    for name in names:
        for family in [*families, *(["all"] if len(families) > 1 else [])]:
            mine = _select(store, name, family)
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
