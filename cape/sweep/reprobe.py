"""Compute the features that a meta-dataset's trials lack and keep their T*: rows from before a feature existed get it.

A trial is probed as a whole; one that lacks nothing stays as it is. Its seeds, its model and its augmentation are in
its rows, so that the probe can be repeated (to rounding: a process may add numbers in another order). Files that were
probed wait in ``_reprobe.<what was computed>`` until all are done; then the next generation of rows is made of them
(see ``store/compact.py``). Killed at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cape import datasets
from cape.errors import ModelError, SpecError, StoreError
from cape.feature_names import FEATURE_NAMES, LATER_COLUMNS, head_at_zero
from cape.jsonconfig import stable_hash
from cape.logs import counted
from cape.store import reader
from cape.store.compact import KEEP_S, next_generation, publish, remove_retired, replacing
from cape.store.location import Location
from cape.store.provenance import git_revision
from cape.store.schema import ROW_SCHEMA
from cape.store.writer import to_parquet
from cape.sweep.job import load_imports
from cape.trial import probe_trial, trial_of

_NEEDED = tuple(f for f in FEATURE_NAMES if f != "log_tau_full")  # which a sweep does not compute
_ALL = (*FEATURE_NAMES, *LATER_COLUMNS)


@dataclass(frozen=True)
class Reprobe:
    """What a reprobe did.

    Attributes:
        files, trials: that got features.
        failed: trials whose probe raised; their rows stay as they were.
    """

    files: int
    trials: int
    failed: int = 0

    def __str__(self) -> str:
        failed = f"; the probe failed for {self.failed} trials, whose rows stay as they were" if self.failed else ""
        return f"{self.trials} trials in {self.files} files were probed anew{failed}"


def reprobe(
    meta_dir: reader.Where,
    *,
    data_root: str | Path | None = None,
    workers: int = 1,
    imports: Sequence[str] = (),
    keep_seconds: float = KEEP_S,
) -> Reprobe:
    """Probe, on the CPU, all trials of which a feature is missing.

    Rows without a model (imported ones) and failed trials stay as they are. No other process may run the sweep of an
    older version meanwhile; what it commits is kept, without the features.

    Args:
        meta_dir: a folder.
        data_root: see ``datasets.data_root``.
        workers: processes, each with the threads that torch takes divided among them.
        imports: modules that register families or datasets of the user's own.
        keep_seconds: see ``store.compact``.

    Raises:
        StoreError: no rows there, or a place where files cannot be replaced at once.
        SpecError, DataError: a family or dataset that is not there.
    """
    if workers < 1:
        raise SpecError(f"workers must be at least 1, not {workers}.")
    location = Location.of(meta_dir)
    if not reader.list_chunks(location):
        raise StoreError(f"{location} holds no rows to probe.")
    root = datasets.data_root(data_root)
    aside = f"_reprobe.{stable_hash([_ALL, git_revision()], 12)}"
    with replacing(location) as base:
        names = [n[len(base) + 1 :] for n in reader.list_chunks(location, base) if _lacks(location, n)]
        done = set(location.list(aside, recursive=True))
        work = partial(
            _probe_file, location, base, aside, root, tuple(imports), max(1, torch.get_num_threads() // workers)
        )
        left = [n for n in names if f"{aside}/{n}" not in done]
        if workers == 1:
            counts = list(counted(map(work, left), len(left), "files probed"))
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, max(1, len(left))), mp_context=context) as pool:
                counts = list(counted(pool.map(work, left), len(left), "files probed"))
        if names:
            following = next_generation(location)
            for name in names:
                content = location.read(f"{aside}/{name}")
                assert content is not None
                location.write(f"{following}/{name}", content)
            publish(location, base, following, set(names))
            remove_retired(location, following, keep_seconds)
        location.delete_tree(aside)
    return Reprobe(len(names), sum(c[0] for c in counts), sum(c[1] for c in counts))


def _lacks(location: Location, name: str) -> bool:
    """Return whether a file has trials that lack a feature."""
    have = pq.read_schema(location.path(name)).names
    columns = [c for c in ("trial_id", "model", *_ALL) if c in have]
    return bool(_lacking(pq.read_table(location.path(name), columns=columns, partitioning=None)))


def _lacking(table: pa.Table) -> set[str]:
    """Return the trials that were probed, but not for every feature."""

    def values(name: str) -> list[Any]:
        return table[name].to_pylist() if name in table.column_names else [None] * len(table)

    needed, later = [values(f) for f in _NEEDED], [values(f) for f in LATER_COLUMNS]
    found = set()
    for i, (trial, model, probed, pull) in enumerate(
        zip(*(values(name) for name in ("trial_id", "model", "log_p", "log_hidden_pull")), strict=True)
    ):
        wanted = [*needed, *later] if pull is not None and head_at_zero(pull) else needed
        if model is not None and probed is not None and any(column[i] is None for column in wanted):
            found.add(trial)
    return found


def _probe_file(
    location: Location, base: str, aside: str, root: Path | None, imports: Sequence[str], threads: int, name: str
) -> tuple[int, int]:
    """Write a file's rows with their features into ``aside``; return (trials probed, trials whose probe failed)."""
    load_imports(imports)
    torch.set_num_threads(threads)
    table = pq.read_table(location.path(f"{base}/{name}"), partitioning=None)
    _, dataset = reader.partition_of(name)
    rows, lacking = table.to_pylist(), _lacking(table)
    found: dict[str, dict[str, Any] | None] = {}
    for row in rows:
        if row["trial_id"] in lacking and row["trial_id"] not in found:
            try:
                features, seconds = probe_trial(trial_of({**row, "dataset": dataset}), "cpu", root)
            except (ModelError, RuntimeError):  # as in a sweep: the trial's fault, not the file's
                found[row["trial_id"]] = None
            else:
                found[row["trial_id"]] = {**features, "probe_seconds": seconds}
        row.update(found.get(row["trial_id"]) or {})
    fields = {f.name: f for f in (*table.schema, *(ROW_SCHEMA.field(n) for n in _ALL))}
    metadata = {**(table.schema.metadata or {}), b"cape_probe_revision": git_revision().encode()}
    location.write(
        f"{aside}/{name}", to_parquet(pa.Table.from_pylist(rows, schema=pa.schema(fields.values(), metadata=metadata)))
    )
    return sum(v is not None for v in found.values()), sum(v is None for v in found.values())
