"""Forget trials that failed, so that a resume runs them again.

A trial that failed (an error of its own, or a process that it ended three times) has rows that say so, and is done: a
resume passes over it. After a bug is mended or a larger machine found, its rows go, and it is missing like any other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pyarrow.compute as pc

from cape.errors import StoreError
from cape.logs import counted
from cape.store import reader
from cape.store.compact import KEEP_S, next_generation, publish, remove_retired, replacing, union
from cape.store.location import Location
from cape.store.schema import EXTRA_PREFIX
from cape.store.writer import chunk_name, to_parquet


@dataclass(frozen=True)
class Retry:
    """What was forgotten: trials, and files that were written anew or left out."""

    trials: int
    files: int

    def __str__(self) -> str:
        if not self.trials:
            return "no trial failed; nothing was changed"
        return f"{self.trials} failed trials in {self.files} files are forgotten; `cape sweep ... --resume` runs them"


def retry(meta_dir: reader.Where, *, keep_seconds: float = KEEP_S) -> Retry:
    """Leave the rows of failed trials out of a meta-dataset, in a new generation (``store.compact``).

    Readers and a sweep may be at work meanwhile; only a run that begins later runs the trials again.

    Args:
        meta_dir: a folder.
        keep_seconds: the rows as they were are deleted so long after.

    Raises:
        StoreError: no rows there, a file that cannot be read, or a place where files cannot be replaced at once.
    """
    location = Location.of(meta_dir)
    if not reader.list_chunks(location):
        raise StoreError(f"{location} holds no rows, and so no failed trial.")
    with replacing(location) as base:
        trials: set[str] = set()
        replaced = set()
        following = next_generation(location)
        files = reader.list_chunks(location, base)
        for path in counted(files, len(files), "files read"):
            table = union(location, [path])
            failed = pc.equal(table["stop_reason"], "failed").fill_null(False)
            if not pc.any(failed).as_py():
                continue
            trials.update(table.filter(failed)["trial_id"].to_pylist())
            kept = table.filter(pc.invert(failed))
            folder, file = path[len(base) + 1 :].rsplit("/", 1)
            replaced.add(f"{folder}/{file}")
            if kept.num_rows:
                name = chunk_name(kept["trial_id"].to_pylist(), extra=file.startswith(EXTRA_PREFIX))
                location.write(f"{following}/{folder}/{name}", to_parquet(kept))
        if replaced:
            os.makedirs(location.path(following), exist_ok=True)  # every file may be gone
            publish(location, base, following, replaced)
            remove_retired(location, following, keep_seconds)
    return Retry(len(trials), len(replaced))
