"""Evaluate a meta-dataset under a protocol: fit, predict, keep every prediction, and make all tables from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.baselines.rebuilt import Cost, rebuilt
from cape.config import check_count
from cape.errors import DataError, StoreError
from cape.evaluation import metrics, protocols
from cape.evaluation.methods import LEVELS, Predicted, methods
from cape.evaluation.table import FLOOR, Table
from cape.evaluation.tables import build_tables, cost_table
from cape.logs import counted
from cape.metamodel.presets import Preset
from cape.metamodel.rows import read_rows
from cape.paths import local_path

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
        from cape.evaluation.table import select

        rows = select(self.predictions, method, family)
        return metrics.errors(rows["t_star"], rows["predicted"])[name]

    def write(self, out: str | os.PathLike[str]) -> Path:
        """Write predictions.parquet, report.md, a CSV per table and a PNG per figure; returns the directory.

        What an earlier evaluation wrote there is removed: everything in it comes from one store of predictions.
        """
        import pyarrow.parquet as pq

        from cape.evaluation.figures import figures, png

        directory = check_report_dir(out)
        directory.mkdir(parents=True, exist_ok=True)
        drawn = figures(self)
        text = self.markdown() + "".join(f"\n![{name}]({name}.png)\n" for name in drawn)
        files = {f"{name}.csv": table.csv().encode() for name, table in self.tables.items()}
        files |= {f"{name}.png": png(figure) for name, figure in drawn.items()}
        files["report.md"] = text.encode()
        store = directory / "predictions.parquet"
        for name in _files_of(store):
            (directory / name).unlink(missing_ok=True)
        noted = self.predictions.replace_schema_metadata({FILES: json.dumps(sorted(files))})
        pq.write_table(noted, store, compression="zstd")
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return directory


FILES = "cape.files"
"""Key in the metadata of a store of predictions: the files that were made from it, beside it."""


def _files_of(store: Path) -> list[str]:
    """Return the names of the files that an evaluation wrote beside its store; none where there is no such store."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        noted = pq.read_schema(store).metadata or {}
    except (OSError, pa.ArrowInvalid):  # a writer that was killed had written nothing else
        return []
    return json.loads(noted.get(FILES.encode(), b"[]"))


def check_writable(folder: Path) -> None:
    """Raise ``StoreError`` where a report cannot be written to a folder: before minutes of fitting, not after."""
    if not os.access(folder, os.W_OK):
        raise StoreError(f"Nothing can be written to {folder}; name another place for the report.")


def check_report_dir(out: str | os.PathLike[str]) -> Path:
    """Return the report directory, or raise ``StoreError`` where it cannot be made or holds something else."""
    directory = local_path(out, "A report")
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir():
        raise StoreError(f"{nearest} is a file; name a directory to write the report to.")
    check_writable(nearest)
    if directory.exists() and any(directory.iterdir()) and not (directory / "predictions.parquet").exists():
        raise StoreError(f"{directory} holds something other than a report; name an empty or new directory.")
    return directory


def evaluate(
    meta_dir: Any,
    protocol: str = "in-corpus",
    out: str | os.PathLike[str] | None = None,
    *,
    presets: Sequence[str | Preset] = ("paper", "static", "product"),
    comparators: Sequence[str] = (),
    test_dir: Any | None = None,
    floor_dir: Any | None = None,
    rebuild: int = 0,
    data_root: str | os.PathLike[str] | None = None,
    threads: int = 0,
) -> Evaluation:
    """Evaluate the meta-regressor and the baselines on a meta-dataset.

    Args:
        meta_dir: a meta-dataset's directory, its table, or a sequence of these. Augmented rows are fitted on by the
            presets that take them, and never scored.
        protocol: a key of ``protocols.PROTOCOLS``. out: report directory to write, or None.
        presets: what to fit and score. comparators: regressors of appendix A.4 to score too.
        test_dir: the test meta-dataset of fresh and held-out.
        floor_dir: a meta-dataset of replicates (trials that differ in nothing but the seed) for the replicate floor;
            without, the floor is that of test rows that happen to be replicates.
        rebuild: trials per family whose models are built again, for the full-spectrum NTK baseline and for what each
            method costs. data_root: where their datasets are.
        threads: XGBoost threads; see ``regressors.thread_count``.

    Raises:
        SpecError, DataError, StoreError: unknown names, a negative ``rebuild``, too few trials, a directory that is
            not a report.
    """
    protocols.check_protocol(protocol)
    check_count(rebuild, "rebuild", minimum=0)
    runners = methods(presets, comparators, threads)
    if out is not None:
        check_report_dir(out)  # before minutes of fitting
    rows = read_rows(meta_dir)
    test, replicates = (None if d is None else read_rows(d) for d in (test_dir, floor_dir))
    notes: list[str] = []
    failed = int(rows.failed.sum()) + (int(test.failed.sum()) if test is not None else 0)
    if failed:
        notes.append(f"{failed} rows of failed trials are left out.")
    rows = rows.take(~rows.failed)
    test = test.take(~test.failed) if test is not None else None
    made, more = protocols.splits(rows, protocol, test)
    notes += more
    parts = []
    costs: list[Cost] = []
    approximate = False
    for number, split in enumerate(counted(made, len(made), "splits scored")):
        held = protocols.calibration_rows(split.test, seed=number)
        configuration, unsure = protocols.configurations(split.test)
        for name, run in counted(runners.items(), len(runners), f"methods of '{split.name}' scored"):
            parts.append(_part(split, name, run(split.train, split.test), held, configuration))
        if rebuild:
            steps, spent = rebuilt(split.test, rebuild, data_root, seed=number)
            costs += spent
            parts.append(_part(split, "ntk_ode", Predicted(steps), held, configuration))
        if replicates is None:
            parts.append(_floor(split, held, configuration))
            approximate |= unsure
    if replicates is not None:
        known = replicates.take(replicates.reached & ~replicates.augmented)
        configuration, approximate = protocols.configurations(known)
        alone = protocols.Split("replicates", known, known)
        parts.append(_floor(alone, np.zeros(len(known), dtype=bool), configuration))
    if approximate:
        notes.append(
            "Imported rows carry no model: the replicate floor tells them apart by parameter count, approximately."
        )
    censored = sum(int((~s.test.reached).sum()) for s in made)
    if censored:
        notes.append(f"{censored} test rows never reached their ε; errors are taken over those that did.")
    if not any(np.isfinite(p["predicted"]).any() for p in parts if p["method"][:1] == "curve"):
        notes.append("The meta-dataset records no losses, so curve extrapolation is n/a.")
    if not rebuild:
        notes.append(
            "The full-spectrum NTK baseline (`ntk_ode`) and measured costs need trials built again (`--rebuild N`);"
            " they are not in these tables."
        )
    predictions = _concat(parts)
    if not len(predictions):
        raise DataError("No test row reached its ε; nothing can be scored.")
    tables = build_tables(predictions, protocol)
    if costs:
        tables["costs"] = cost_table(costs)
    result = Evaluation(protocol, predictions, tables, tuple(notes))
    if out is not None:
        result.write(out)
    return result


def _floor(split: protocols.Split, held: np.ndarray, configuration: np.ndarray) -> dict[str, Any]:
    """Return the floor's predictions as a part: the median T* of the trials that differ in nothing but the seed."""
    steps = np.full(len(split.test), np.nan)
    reached = split.test.reached
    steps[reached] = metrics.replicate_floor(configuration[reached], split.test["t_star"][reached])
    return _part(split, FLOOR, Predicted(steps), held, configuration)


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
