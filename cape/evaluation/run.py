"""Evaluate a meta-dataset under a protocol: fit, predict, keep every prediction, and make all tables from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.errors import DataError, StoreError
from cape.evaluation import metrics, protocols
from cape.evaluation.methods import LEVELS, Predicted, methods
from cape.evaluation.tables import Table, build_tables
from cape.metamodel.presets import Preset
from cape.metamodel.rows import Rows, as_rows

if TYPE_CHECKING:
    import pyarrow as pa

KEPT = ("trial_id", "family", "architecture", "dataset", "batch_size", "lr", "epsilon", "seed", "log_n", "t_star")


@dataclass(frozen=True)
class Evaluation:
    """The outcome of ``evaluate``.

    Attributes:
        protocol: its name.
        predictions: one row per (test row, method): the store that every table and figure is made from.
        tables: by name. notes: what was shrunk, skipped or approximated, as sentences.
    """

    protocol: str
    predictions: pa.Table
    tables: Mapping[str, Table]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Return every table and note as one Markdown document."""
        head = [f"# Evaluation: {self.protocol}", "", protocols.PROTOCOLS[self.protocol].capitalize() + ".", ""]
        body = [part for table in self.tables.values() for part in (table.markdown(), "")]
        notes = ["## Notes", "", *(f"- {note}" for note in self.notes), ""] if self.notes else []
        return "\n".join([*head, *body, *notes])

    def mae(self, method: str, family: str = "all") -> float:
        """Return a method's uncalibrated MAE in steps on the scored rows of a family."""
        return self._metric(method, family, "mae")

    def avg_accuracy(self, method: str, family: str = "all") -> float:
        """Return a method's uncalibrated AvgAccuracy on the scored rows of a family."""
        return self._metric(method, family, "avg_accuracy")

    def _metric(self, method: str, family: str, name: str) -> float:
        from cape.evaluation.tables import select

        rows = select(self.predictions, method, family)
        return metrics.errors(rows["t_star"], rows["predicted"])[name]

    def write(self, out: str | os.PathLike[str]) -> Path:
        """Write predictions.parquet, report.md, a CSV per table and a PNG per figure; returns the directory."""
        import pyarrow.parquet as pq

        from cape.evaluation.figures import figures, png

        directory = check_report_dir(out)
        directory.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.predictions, directory / "predictions.parquet", compression="zstd")
        for name, table in self.tables.items():
            (directory / f"{name}.csv").write_text(table.csv(), encoding="utf-8")
        drawn = figures(self)
        for name, figure in drawn.items():
            (directory / f"{name}.png").write_bytes(png(figure))
        text = self.markdown() + "".join(f"\n![{name}]({name}.png)\n" for name in drawn)
        (directory / "report.md").write_text(text, encoding="utf-8")
        return directory


def check_report_dir(out: str | os.PathLike[str]) -> Path:
    """Return the report directory, or raise ``StoreError`` where it is a file or holds something else."""
    directory = Path(out)
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file; name a directory to write the report to.")
    if directory.exists() and any(directory.iterdir()) and not (directory / "predictions.parquet").exists():
        raise StoreError(f"{directory} holds something other than a report; name an empty or new directory.")
    return directory


def evaluate(
    meta_dir: str | os.PathLike[str] | Any,
    protocol: str = "in-corpus",
    out: str | os.PathLike[str] | None = None,
    *,
    presets: Sequence[str | Preset] = ("paper", "product"),
    comparators: Sequence[str] = (),
    test_dir: str | os.PathLike[str] | Any | None = None,
    threads: int = 0,
) -> Evaluation:
    """Evaluate the meta-regressor and the baselines on a meta-dataset.

    Args:
        meta_dir: a meta-dataset's directory, or its table. protocol: a key of ``protocols.PROTOCOLS``.
        out: report directory to write, or None. presets: what to fit and score.
        comparators: regressors of appendix A.4 to score too. test_dir: the test meta-dataset of fresh and held-out.
        threads: XGBoost threads; see ``regressors.thread_count``.

    Raises:
        SpecError, DataError, StoreError: unknown names, too few trials, a directory that is not a report.
    """
    protocols.check_protocol(protocol)
    runners = methods(presets, comparators, threads)
    if out is not None:
        check_report_dir(out)  # before minutes of fitting
    rows, test = _rows(meta_dir), None if test_dir is None else _rows(test_dir)
    notes: list[str] = []
    failed = int(rows.failed.sum()) + (int(test.failed.sum()) if test is not None else 0)
    if failed:
        notes.append(f"{failed} rows of failed trials are left out.")
    rows = rows.take(~rows.failed)
    test = test.take(~test.failed) if test is not None else None
    made, more = protocols.splits(rows, protocol, test)
    notes += more
    parts = []
    for number, split in enumerate(made):
        held = protocols.calibration_rows(split.test, seed=number)
        configuration, approximate = protocols.configurations(split.test)
        for name, run in runners.items():
            predicted = run(split.train, split.test)
            parts.append(_part(split, name, predicted, held, configuration))
    note = "Imported rows carry no model: the replicate floor tells them apart by parameter count, approximately."
    if approximate:
        notes.append(note)
    censored = sum(int((~s.test.reached).sum()) for s in made)
    if censored:
        notes.append(f"{censored} test rows never reached their ε; errors are taken over those that did.")
    if not any(np.isfinite(p["predicted"]).any() for p in parts if p["method"][:1] == "curve"):
        notes.append("The meta-dataset records no losses, so curve extrapolation is n/a.")
    notes.append(
        "The full-spectrum NTK baseline (`ntk_ode`) needs each batch's Gram matrix, which rows do not hold; it is not"
        " in these tables."
    )
    predictions = _concat(parts)
    if not len(predictions):
        raise DataError("No test row reached its ε; nothing can be scored.")
    result = Evaluation(protocol, predictions, build_tables(predictions, protocol), tuple(notes))
    if out is not None:
        result.write(out)
    return result


def _rows(source: Any) -> Rows:
    if isinstance(source, (str, os.PathLike)):
        from cape.store import reader

        return as_rows(reader.read(Path(source)))
    return as_rows(source)


def _part(split: protocols.Split, method: str, made: Predicted, held: np.ndarray, configuration: np.ndarray) -> dict:
    test = split.test
    size = np.exp(test["log_n"])
    calibrated = np.full(len(test), np.nan)
    for family in test.families:
        mine = (test["family"] == family) & test.reached
        spent = mine & held
        line = metrics.epoch_calibration(
            test["t_star"][spent], made.steps[spent], test["batch_size"][spent], size[spent]
        )
        if line is not None:
            calibrated[mine] = metrics.apply_calibration(line, made.steps[mine], test["batch_size"][mine], size[mine])
    columns: dict[str, Any] = {name: test[name] for name in KEPT}
    columns["log_epsilon"] = test["log_epsilon"]
    columns |= {
        "split": np.full(len(test), split.name, dtype=object),
        "method": np.full(len(test), method, dtype=object),
        "configuration": configuration,
        "reached": test.reached,
        "scored": test.reached & ~held,
        "predicted": made.steps,
        "calibrated": calibrated,
        "p_reach": np.full(len(test), np.nan) if made.p_reach is None else made.p_reach,
    }
    for level in LEVELS:
        nothing = np.full(len(test), np.nan)
        low, high = made.intervals.get(level, (nothing, nothing))
        columns[f"low_{round(level * 100)}"], columns[f"high_{round(level * 100)}"] = low, high
    return columns


def _concat(parts: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    def column(name: str) -> pa.Array:
        values = np.concatenate([p[name] for p in parts])
        if values.dtype == object:
            return pa.array([None if v is None else str(v) for v in values], type=pa.string())
        return pa.array(values)

    return pa.table({name: column(name) for name in parts[0]})
