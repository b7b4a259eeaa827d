"""A table as text, Markdown and CSV, and the store of predictions as columns."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

FLOOR = "replicate floor"

LABELS = {
    "paper": "XGBoost, six features, per family (paper)",
    "paper_pooled": "XGBoost, six features, pooled",
    "paper_appendix": "XGBoost 500/6, six features, per family (A.4)",
    "static": "XGBoost, four static features, per family",
    "paper_epsilon": "XGBoost, six features and log ε, per family",
    "product": "CAPE product",
    "product_static": "product without what needs a gradient",
    "product_trees": "product without the smooth surface",
    "linear": "linear regression (A.4)",
    "ridge": "ridge (A.4)",
    "random_forest": "random forest (A.4)",
    "svr": "SVR (A.4)",
    "mlp_regressor": "MLP regressor (A.4)",
    "static_linear": "static linear",
    "ntkl": "NTK mean eigenvalue",
    "ntk_ode": "NTK spectrum, residual and lr",
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
    return select_rows(columns_of(predictions), method, family, scored)


def select_rows(store: dict[str, np.ndarray], method: str, family: str, scored: bool = True) -> dict[str, np.ndarray]:
    index = store["method"] == method
    if scored:
        index = index & store["scored"]
    if family != "all":
        index = index & (store["family"] == family)
    return {k: v[index] for k, v in store.items()}


def predicting(store: dict[str, np.ndarray], names: list[str]) -> list[str]:
    """Return the methods that predict at least one row (curve extrapolation cannot without recorded losses)."""
    return [n for n in names if np.isfinite(store["predicted"][store["method"] == n]).any()]
