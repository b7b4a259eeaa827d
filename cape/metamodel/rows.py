"""Rows of a meta-dataset as numpy columns, and the matrix that a regressor sees."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.dataset_names import source_of
from cape.errors import DataError
from cape.family_names import HEAD_AT_ZERO, RELATIVES, as_read, relative_of
from cape.feature_names import (
    BATCH_FEATURES,
    END_FEATURES,
    FEATURE_NAMES,
    LATER_COLUMNS,
    LATER_FEATURES,
    SHAPE_FEATURES,
    SLOW_FEATURES,
    head_at_zero,
)

if TYPE_CHECKING:
    import pyarrow as pa

PAPER_FEATURES = ("log_p", "log_g2", "log_tau", "log_n", "log_lr", "log_b")
STATIC_FEATURES = ("log_p", "log_b", "log_lr", "log_n")
OPTIMIZER_FEATURES = ("log_first_step", "log_grad_l1", "log_grad_l2", "line_1", "line_4")
PRODUCT_FEATURES = (
    *PAPER_FEATURES,
    "log_epsilon",
    "log_l0",
    *OPTIMIZER_FEATURES,
    *SLOW_FEATURES,
    *SHAPE_FEATURES,
    "draw_noise",
    *BATCH_FEATURES,
    *END_FEATURES,
    "family",
)
RELATIVE = "relative"
"""What stands in the place of an augmentation where a row is of the relative of the family that is fitted."""

CAP = 5000.0
"""Cap on updates, and T* of a censored trial in paper mode (design §3)."""

OBJECTS = (
    *("trial_id", "family", "architecture", "model", "dataset", "task", "precision", "preprocess", "augmentation"),
    *("stop_reason", "seed"),
)
NUMERIC = (
    *("batch_size", "lr", "epsilon", "replicate", "t_star", "stopped_at", "probe_seconds", "step_seconds"),
    *FEATURE_NAMES,
    "log_epsilon",
)
REQUIRED = ("family", "dataset", "batch_size", "lr", "epsilon", "t_star", *PAPER_FEATURES)


@dataclass(frozen=True)
class Rows:
    """Rows as columns: text and seeds are object arrays, numbers float64 with NaN for null, all of one length.

    Attributes:
        columns: by name, those of ``OBJECTS`` and ``NUMERIC`` (all-null where the table has none), ``converged``
            (bool), and ``losses`` (object array of float32 arrays or None) where the table has it.
    """

    columns: Mapping[str, np.ndarray]

    @classmethod
    def from_table(cls, table: pa.Table) -> Rows:
        """Read a meta-dataset's table; raises ``DataError`` where a column that every row needs is absent."""
        have = set(table.column_names)
        missing = [c for c in REQUIRED if c not in have]
        if missing:
            raise DataError(f"The meta-dataset lacks the column '{missing[0]}'; is it one that `cape sweep` wrote?")
        n = table.num_rows
        columns: dict[str, np.ndarray] = {}
        for name in OBJECTS:
            values = table.column(name).to_pylist() if name in have else [None] * n
            columns[name] = np.array(values, dtype=object)
        for name in NUMERIC:
            columns[name] = _floats(table.column(name)) if name in have else np.full(n, np.nan)
        if np.isnan(columns["log_epsilon"]).any():
            columns["log_epsilon"] = np.log(columns["epsilon"])
        if "trial_id" not in have:
            columns["trial_id"] = np.array([f"row{i}" for i in range(n)], dtype=object)
        columns["family"] = _families(columns)
        at_zero = _tell_heads_apart(columns, {c: _floats(table.column(c)) for c in LATER_COLUMNS if c in have})
        reached = np.isfinite(columns["t_star"])
        if (at_zero & reached & np.isnan(columns["log_l0"])).any():
            raise DataError(
                "Some rows are of models whose head starts at zero, and are of a version that looked at these only"
                " once; `cape store reprobe` looks again."
            )
        if "converged" in have:
            reached &= np.array([v is True for v in table.column("converged").to_pylist()], dtype=bool)
        columns["converged"] = reached
        if "losses" in have:
            losses = np.empty(n, dtype=object)
            for i, value in enumerate(table.column("losses").to_pylist()):
                losses[i] = None if value is None else np.asarray(value, dtype=np.float32)
            columns["losses"] = losses
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["t_star"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def take(self, index: np.ndarray) -> Rows:
        """Return the rows of a boolean mask or an index array."""
        return Rows({k: v[index] for k, v in self.columns.items()})

    def join(self, other: Rows) -> Rows:
        """Return these rows and those of ``other`` below them; ``losses`` only where both have them."""
        shared = [name for name in self.columns if name in other.columns]
        return Rows({name: np.concatenate([self[name], other[name]]) for name in shared})

    @property
    def reached(self) -> np.ndarray:
        """Bool [n]: the row's ε was crossed, so that ``t_star`` is known."""
        return self.columns["converged"]

    @property
    def failed(self) -> np.ndarray:
        """Bool [n]: the trial raised an error and says nothing about T*."""
        return self.columns["stop_reason"] == "failed"

    @property
    def augmented(self) -> np.ndarray:
        """Bool [n]: the trial's data were augmented, or it is a relative's (``told``).

        Such rows are fitted on where a preset says so, never scored.
        """
        return np.array([a is not None for a in self["augmentation"]], dtype=bool)

    def told(self, family: str) -> tuple[np.ndarray, Rows]:
        """Return the rows that a family learns from, as a mask [n] and as rows.

        They are its own and its relative's (``family_names.relative_of``); the latter count as augmented.
        """
        own = self["family"] == family
        mask = own | (self["family"] == (relative_of(family) or family))
        rows = self.take(mask)
        if mask.sum() == own.sum():
            return mask, rows
        augmentation = rows["augmentation"].copy()
        augmentation[~own[mask]] = RELATIVE
        return mask, Rows({**rows.columns, "augmentation": augmentation})

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families present, sorted."""
        return tuple(sorted({str(f) for f in self["family"] if f is not None}))

    @property
    def trials(self) -> np.ndarray:
        """Int [n]: a number per trial; the rows of one trial share it."""
        return np.unique(self["trial_id"].astype(str), return_inverse=True)[1]

    def keys(self, *names: str) -> np.ndarray:
        """Object [n]: one tuple per row of the named columns (``cell`` is family, dataset, batch size, lr)."""
        out = np.empty(len(self), dtype=object)
        for i, key in enumerate(zip(*(self[n] for n in names), strict=True)):
            out[i] = key
        return out

    @property
    def cells(self) -> np.ndarray:
        """Object [n]: the cell (family, dataset, batch size, lr) of each row."""
        return self.keys("family", "dataset", "batch_size", "lr")

    @property
    def sources(self) -> np.ndarray:
        """Str [n]: the data that each row's dataset is made of (``dataset_names.source_of``)."""
        return np.array([source_of(str(name)) for name in self["dataset"]], dtype=str)

    def target(self, censored: str) -> np.ndarray:
        """Return T* in steps, [n]; NaN where the row is not to be fitted on.

        Args:
            censored: ``"cap"`` regresses an uncrossed ε as 5,000 (paper mode); ``"exclude"`` leaves it to p_reach;
                ``"aft"`` gives the steps that it was watched for, a lower bound of T* (accelerated failure time).
        """
        uncrossed = {"cap": np.full(len(self), CAP), "exclude": np.full(len(self), np.nan), "aft": self["stopped_at"]}
        t = np.where(self.reached, self["t_star"], uncrossed[censored])
        return np.where(self.failed, np.nan, t)

    def matrix(self, features: Sequence[str], families: Sequence[str] = ()) -> np.ndarray:
        """Return float64 [n, len(features)]; missing or non-finite values are NaN, ``family`` is a code."""
        out = np.empty((len(self), len(features)))
        for j, name in enumerate(features):
            out[:, j] = family_codes(self["family"], families) if name == "family" else self[name]
        out[~np.isfinite(out)] = np.nan
        return out

    def fingerprint(self) -> str:
        """Return 16 hex digits of (trial, ε, T*) of every row, whatever their order."""
        lines = sorted(
            f"{t}|{e!r}|{s!r}" for t, e, s in zip(self["trial_id"], self["epsilon"], self["t_star"], strict=True)
        )
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def as_rows(data: Any) -> Rows:
    """Return ``Rows`` from ``Rows`` or a ``pyarrow.Table``."""
    return data if isinstance(data, Rows) else Rows.from_table(data)


def read_rows(source: Any) -> Rows:
    """Return the rows of a meta-dataset's directory, a table, ``Rows``, or a sequence of any of these.

    Raises:
        DataError: a trial that is in two of them. StoreError: a directory without rows.
    """
    if isinstance(source, (str, os.PathLike)):
        from cape.store import reader

        return as_rows(reader.read(os.fspath(source)))  # a ``Path`` of it would be no URI any more
    if not isinstance(source, (list, tuple)):
        return as_rows(source)
    if not source:
        raise DataError("There is no meta-dataset to read; name at least one.")
    out = read_rows(source[0])
    for other in map(read_rows, source[1:]):
        if set(out["trial_id"]) & set(other["trial_id"]):
            raise DataError("Two of the meta-datasets hold the same trial; name each only once.")
        out = out.join(other)
    return out


def row_from_features(features: Mapping[str, Any], family: str | None, epsilon: float) -> Rows:
    """Return one row for prediction from ``Features.as_dict()``; a feature that is None becomes NaN.

    Its family is the one given, or the one beside it whose heads start at zero (``HEAD_AT_ZERO``).
    """
    columns: dict[str, np.ndarray] = {name: np.full(1, np.nan) for name in NUMERIC}
    columns.update({name: np.array([None], dtype=object) for name in OBJECTS})
    for name, value in features.items():
        if name in columns and value is not None:
            columns[name] = np.array([float(value)])
    columns["family"] = np.array([family], dtype=object)
    _tell_heads_apart(columns, {name: np.array([features[name]]) for name in LATER_COLUMNS if name in features})
    columns["epsilon"] = np.array([float(epsilon)])
    columns["log_epsilon"] = np.log(columns["epsilon"])
    columns["lr"] = np.exp(columns["log_lr"])
    columns["batch_size"] = np.exp(columns["log_b"])
    columns["converged"] = np.zeros(1, dtype=bool)
    return Rows(columns)


def _families(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return what the family of each row is called, [n], by what its model reads (``family_names.as_read``)."""
    described = zip(columns["family"], columns["model"], columns["task"], strict=True)
    # The canonical JSON of a ModelSpec: reading each would take longer than all else here.
    return np.array([as_read(f, m is not None and '"layout":"tokens"' in m, t) for f, m, t in described], dtype=object)


def _tell_heads_apart(columns: dict[str, np.ndarray], later: Mapping[str, np.ndarray]) -> np.ndarray:
    """Make ordinary models whose head starts at zero a family by themselves (``HEAD_AT_ZERO``); return which rows [n].

    Of such a model the first gradients see the head alone: its features say other things than another model's. They
    become those of the second look (``later``, by the names of ``LATER_COLUMNS``), NaN where there is none.
    """
    families, nothing = columns["family"], np.full(len(columns["family"]), np.nan)
    at_zero = np.array([f in RELATIVES for f in families], dtype=bool) & head_at_zero(columns["log_hidden_pull"])
    columns["family"] = np.array(
        [f"{f}{HEAD_AT_ZERO}" if zero else f for f, zero in zip(families, at_zero, strict=True)], dtype=object
    )
    for name, column in zip(LATER_FEATURES, LATER_COLUMNS, strict=True):
        columns[name] = np.where(at_zero, later.get(column, nothing), columns[name])
    return at_zero


def family_codes(names: np.ndarray, families: Sequence[str]) -> np.ndarray:
    """Return float [n]: the index of each name among ``families``, NaN for one that is not there."""
    index = {name: float(i) for i, name in enumerate(families)}
    return np.array([index.get(name, np.nan) for name in names])


def _floats(column: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    values = pc.cast(column, pa.float64(), safe=False).to_numpy()
    return np.array(values, dtype=np.float64)
