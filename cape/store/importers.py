"""Read the authors' published meta-datasets (CSV) into ours."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from csv import reader as csv_reader
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from cape.config import check_epsilon, check_lr
from cape.errors import CapeError, DataError
from cape.family_names import check_family_name
from cape.jsonconfig import stable_hash
from cape.paths import local_path
from cape.store.reader import Where
from cape.store.schema import ROW_SCHEMA
from cape.store.writer import write_shard

IMPORTED = "imported"  # the sweep_hash of rows that no sweep of ours made

_FEATURES = {
    "logP": "log_p",
    "logB": "log_b",
    "logG2": "log_g2",
    "logTau": "log_tau",
    "logLR": "log_lr",
    "logN": "log_n",
    "logInitLoss": "log_l0",
}
_REQUIRED = ("dataset", "learning_rate", "batch_size", "epsilon", "logP", "logG2", "logTau", "logN", "T_star")
_HANDLED = {*_REQUIRED, *_FEATURES, "converged", "censored_reason", "logFinalLoss", "architecture", "family"}
_DATASETS = {"fashionmnist": "fashion_mnist", "californiahousing": "california_housing"}


def import_csv(csv: str | Path, family: str, out: Where) -> int:
    """Add the rows of a published CSV to a meta-dataset.

    The CSV counts T* from 1 (updates + 1): 1 is subtracted. Each of its rows was trained on its own and becomes a
    trial of its own. Columns that we do not know are kept under their names. Importing a file twice adds nothing.

    Args:
        csv: file with a header line.
        family: family of every row of the file.
        out: folder or URI of the meta-dataset; made where it does not exist.

    Returns:
        The number of rows.

    Raises:
        SpecError: a name that no family can have.
        DataError: no such file, not a CSV, a column missing, or a value that cannot be (the message names the line).
        StoreError: ``out`` cannot be written to.
    """
    path = local_path(csv, "A CSV file")
    check_family_name(family)
    table, digest = _read(path)
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it is not a CAPE meta-dataset.")
    twice = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
    if twice:
        raise DataError(f"{path} has two columns {twice[0]}.")
    if table.num_rows == 0:
        raise DataError(f"{path} holds no rows.")
    replicates: Counter[tuple[Any, ...]] = Counter()
    rows = []
    for i, record in enumerate(table.to_pylist()):
        try:
            row = _row(record, family)
        except (CapeError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}, line {_line(path, i)}: {error}") from error
        cell = (row["architecture"], row["dataset"], row["batch_size"], row["lr"], row["epsilon"])
        row["replicate"] = replicates[cell]
        replicates[cell] += 1
        row["trial_id"] = stable_hash(["import", family, digest, i])
        rows.append(row)
    write_shard(rows, out)
    return len(rows)


def _read(path: Path) -> tuple[pa.Table, str]:
    """Return the CSV as a table and the hash of its content."""
    try:
        content = path.read_bytes()
        content.decode()  # Arrow would take names of another encoding for bytes
        return pa_csv.read_csv(pa.BufferReader(content)), hashlib.blake2b(content, digest_size=16).hexdigest()
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error


def _line(path: Path, record: int) -> int:
    """Return the line on which a record ends: blank lines are none, and quoted cells may have several."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv_reader(file)
        return next(islice((reader.line_num for cells in reader if cells), record + 1, None))


def _row(record: Mapping[str, Any], family: str) -> dict[str, Any]:
    if record["dataset"] is None:
        raise DataError("dataset is empty.")
    converged = _truth("converged", record.get("converged", True))
    steps = _count("T_star", record["T_star"]) if converged or record["T_star"] not in _EMPTY else None
    epsilon = check_epsilon(_number("epsilon", record["epsilon"]))
    lr = check_lr(_number("learning_rate", record["learning_rate"]))
    batch_size = _count("batch_size", record["batch_size"])
    features = {
        ours: (_number if theirs in _REQUIRED else _perhaps)(theirs, record.get(theirs))
        for theirs, ours in _FEATURES.items()
    }
    l0, final = (_exponential(name, record.get(name)) for name in ("logInitLoss", "logFinalLoss"))
    architecture = record.get("architecture")
    row: dict[str, Any] = {name: value for name, value in record.items() if name not in _HANDLED}
    for name in [n for n in row if n in ROW_SCHEMA.names]:
        row[f"csv_{name}"] = row.pop(name)  # not ours, whatever it is: it does not take our column's place
    row.update(features)
    return {
        **row,
        "sweep_hash": IMPORTED,
        "family": family,
        "architecture": None if architecture is None else str(architecture),
        "dataset": _dataset(record["dataset"]),
        "task": "classification",
        "batch_size": batch_size,
        "lr": lr,
        "epsilon": epsilon,
        "log_b": row["log_b"] if row["log_b"] is not None else math.log(batch_size),
        "log_lr": row["log_lr"] if row["log_lr"] is not None else math.log(lr),
        "log_epsilon": math.log(epsilon),
        "t_star": steps - 1 if converged and steps is not None else None,
        "converged": converged,
        "stop_reason": None if converged else _reason(record.get("censored_reason")),
        "stopped_at": steps - 1 if steps is not None else None,
        "l0": l0,
        "final_loss": final,
    }


_EMPTY = (None, "")  # as text's empty cells are
_MOST = 2**31 - 1  # what a column of counts holds
_WORDS = {"true": True, "t": True, "yes": True, "y": True, "1": True, "1.0": True}
_WORDS |= {"false": False, "f": False, "no": False, "n": False, "0": False, "0.0": False}


def _number(name: str, value: Any) -> float:
    """Return a finite number of a CSV, or raise ``DataError``."""
    if isinstance(value, str):  # one cell that is no number makes text of its whole column
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{name} must be a finite number, not {value!r}.")
    return float(value)


def _perhaps(name: str, value: Any) -> float | None:
    """Return a finite number, or None for an empty cell."""
    return None if value in _EMPTY else _number(name, value)


def _exponential(name: str, value: Any) -> float | None:
    """Return what a logarithm of a CSV is of, None for an empty cell, or raise ``DataError``."""
    log = _perhaps(name, value)
    try:
        return None if log is None else math.exp(log)
    except OverflowError as error:
        raise DataError(f"{name} is the logarithm of more than a float64 holds: {value!r}.") from error


def _count(name: str, value: Any) -> int:
    """Return a whole number of at least 1, or raise ``DataError``."""
    number = _number(name, value)
    if number != int(number) or not 1 <= number <= _MOST:
        raise DataError(f"{name} must be a whole number from 1 to {_MOST}, not {value!r}.")
    return int(number)


def _truth(name: str, value: Any) -> bool:
    """Return yes or no as people and programs write them, or raise ``DataError``."""
    found = _WORDS.get(str(value).strip().lower())
    if found is None:
        raise DataError(f"{name} must be true or false, not {value!r}.")
    return found


def _dataset(name: Any) -> str:
    """Return our name of a dataset: ``FashionMNIST`` is ``fashion_mnist``; raise ``DataError`` where none is left."""
    plain = re.sub(r"[\W_]+", "_", str(name).lower()).strip("_")
    if not plain:
        raise DataError(f"dataset must have a letter or a digit, not {name!r}.")
    return _DATASETS.get(plain.replace("_", ""), plain)


def _reason(text: Any) -> str:
    """Return our word for why a published trial was cut short."""
    said = str(text or "").lower()
    if "plateau" in said:
        return "plateau"
    return "diverged" if "nan" in said or "div" in said else "cap"
