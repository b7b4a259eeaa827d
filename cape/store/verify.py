"""Recount a meta-dataset: is every row there once, is every file whole, does anything not belong there?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cape.config import SweepSpec
from cape.errors import StoreError, first_line
from cape.logs import counted
from cape.store import reader
from cape.store.location import TEMPORARY, Location
from cape.store.schema import CHUNK_PATH
from cape.store.writer import chunk_name

CORRUPT = "_corrupt"  # files that are set aside go here


@dataclass(frozen=True)
class Verification:
    """What was found; ``sound`` where nothing has to be repaired.

    Attributes:
        files, rows, trials: of readable files.
        planned: trials of the plan, None where the folder holds no sweep.
        missing: trials of the plan that are not there yet.
        failed: trials that were run and failed.
        duplicates: rows (trial, ε) that are there more than once, counted without the first.
        incomplete: trials of the plan with another number of rows than the sweep has ε.
        unplanned: trials that carry the sweep's hash and are not in its plan.
        unreadable: (file, reason): truncated, or with a page whose checksum is wrong.
        foreign: (file, reason): not written by a sweep or an import, or renamed.
        leftovers: temporary files of processes that were killed (harmless; the next resume removes them).
    """

    files: int
    rows: int
    trials: int
    planned: int | None
    missing: int
    failed: int
    duplicates: int
    incomplete: int
    unplanned: int
    unreadable: tuple[tuple[str, str], ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()
    leftovers: int = 0
    versions: dict[str, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether what is there is right (trials may still be missing)."""
        return not (self.duplicates or self.incomplete or self.unplanned or self.unreadable or self.foreign)

    def __str__(self) -> str:
        plan = "" if self.planned is None else f", {self.planned} planned, {self.missing} missing"
        lines = [
            f"{self.files} files, {self.rows} rows of {self.trials} trials{plan}, {self.failed} failed",
            f"{self.duplicates} duplicate rows, {self.incomplete} incomplete trials, {self.unplanned} trials outside"
            f" the plan, {self.leftovers} temporary files",
        ]
        lines += [f"unreadable: {name} ({reason})" for name, reason in self.unreadable]
        lines += [f"foreign: {name} ({reason})" for name, reason in self.foreign]
        return "\n".join([*lines, "sound" if self.sound else "NOT sound"])


def verify(
    meta_dir: reader.Where, plan_ids: Callable[[SweepSpec], np.ndarray] | None = None, *, set_aside: bool = False
) -> Verification:
    """Read every byte of a meta-dataset and compare it with its plan.

    Args:
        meta_dir: folder or URI.
        plan_ids: returns the ids of a sweep's trials, [n] uint64 (``Plan(spec).all_ids()``); None: no plan.
        set_aside: move unreadable and foreign files, of whatever kind, to ``_corrupt``; a resume runs their trials
            again.

    Raises:
        StoreError: there is no such folder.
    """
    location = Location.of(meta_dir)
    if not location.exists():
        raise StoreError(f"The meta-dataset {location} does not exist.")
    base = reader.rows_folder(location)
    specs = reader.read_specs(location)
    unreadable, foreign, parts = [], [], []
    versions: Counter[str] = Counter()
    names = [n for n in location.list(base, recursive=True) if base or n.startswith("family=")]
    for name in counted(names, len(names), "files read"):
        below = name[len(base) + 1 :] if base else name
        matched = CHUNK_PATH.fullmatch(below)
        if matched is None:
            foreign.append((name, "not a name that a sweep gives"))
            continue
        try:
            table = reader.read_chunk(location, name)
        except (pa.ArrowInvalid, OSError) as error:
            unreadable.append((name, first_line(error)))
            continue
        if table is None:
            foreign.append((name, reader.NOT_ROWS))
        elif matched["hash"] not in chunk_name(table["trial_id"].to_pylist()):
            foreign.append((name, "its trials are not those that its name stands for"))
        else:
            versions[(table.schema.metadata or {}).get(b"cape_schema_version", b"?").decode()] += 1
            parts.append(table.select(list(reader.OF_EVERY_ROW)).replace_schema_metadata(None))
    table = pa.concat_tables(parts) if parts else None
    counts = _count(table, specs, plan_ids)
    if set_aside:
        for name, _ in (*unreadable, *foreign):
            aside(location, name)
    return Verification(
        files=len(parts),
        **counts,
        unreadable=tuple(unreadable),
        foreign=tuple(foreign),
        leftovers=len(location.list(TEMPORARY)),
        versions=dict(versions),
    )


def aside(location: Location, name: str) -> str:
    """Move a file out of the rows, under the path that it had there, and return where it is now.

    A number follows where a file of that path was set aside before.
    """
    kept = next(k for n in count() if not location.exists(k := f"{CORRUPT}/{name}" + (f".{n}" if n else "")))
    location.write(kept, location.read(name) or b"")
    location.delete(name)
    return kept


def _count(
    table: pa.Table | None, specs: list[SweepSpec], plan_ids: Callable[[SweepSpec], np.ndarray] | None
) -> dict[str, Any]:
    current = specs[-1] if specs else None
    planned = np.sort(plan_ids(current)) if current is not None and plan_ids is not None else None
    if table is None:
        total = None if planned is None else len(planned)
        zeros = dict.fromkeys(("rows", "trials", "failed", "duplicates", "incomplete", "unplanned"), 0)
        return {**zeros, "planned": total, "missing": total or 0}
    by_trial = table.group_by("trial_id").aggregate([([], "count_all"), ("epsilon", "count_distinct")])
    rows, distinct = (by_trial[name].to_numpy() for name in ("count_all", "epsilon_count_distinct"))
    failed = pc.count_distinct(table.filter(pc.field("stop_reason") == "failed")["trial_id"]).as_py()
    found: dict[str, Any] = {
        "rows": table.num_rows,
        "trials": by_trial.num_rows,
        "failed": failed,
        "duplicates": int((rows - distinct).sum()),
        "planned": None,
        "missing": 0,
        "incomplete": 0,
        "unplanned": 0,
    }
    if planned is None or current is None:
        return found
    ids = reader.id_numbers(by_trial["trial_id"].to_pylist())
    hashes = {spec.spec_hash for spec in specs}
    ours = table.filter(pc.is_in(table["sweep_hash"], pa.array(sorted(hashes))))
    our_ids = reader.id_numbers(pc.unique(ours["trial_id"]).to_pylist())
    mine = np.isin(ids, planned)
    found["planned"] = len(planned)
    found["missing"] = len(planned) - int(mine.sum())
    found["incomplete"] = int((distinct[mine] != len(current.epsilons)).sum())
    found["unplanned"] = int((~np.isin(our_ids, planned)).sum())
    return found
