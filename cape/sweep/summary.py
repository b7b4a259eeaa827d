"""What a sweep found, as a few lines for the terminal; and what another terminal can see of one that runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cape.errors import StoreError
from cape.store import claims, reader
from cape.store.location import Location
from cape.sweep.plan import Plan
from cape.sweep.progress import clock, status_line

_COLUMNS = ["trial_id", "family", "converged", "stop_reason", "t_star", "truth_seconds", "probe_seconds"]


def summary(meta_dir: str | Path) -> str:
    """Return a table: per family the trials, how they ended (the share of rows that converged), T* and the time spent.

    Raises:
        StoreError: no rows there.
    """
    table = reader.read(meta_dir, columns=_COLUMNS)
    head = ("family", "trials", "rows", "converged", "plateau", "cap", "diverged", "failed", "median T*", "hours")
    lines: list[tuple[str, ...]] = [head]
    for family in sorted(set(table["family"].to_pylist())):
        lines.append(_line(family, table.filter(pc.field("family") == family)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )


def _line(family: str, rows: pa.Table) -> tuple[str, ...]:
    trials = rows.group_by("trial_id").aggregate(
        [("truth_seconds", "max"), ("probe_seconds", "max"), ("stop_reason", "max")]
    )
    reasons = {v["values"]: v["counts"] for v in pc.value_counts(trials["stop_reason_max"]).to_pylist()}
    spent = sum(pc.sum(trials[f"{name}_max"]).as_py() or 0.0 for name in ("truth_seconds", "probe_seconds"))
    median = pc.approximate_median(rows["t_star"]).as_py()
    return (
        family,
        str(trials.num_rows),
        str(rows.num_rows),
        f"{100 * (pc.sum(rows['converged']).as_py() or 0) / rows.num_rows:.0f} %",
        *(str(reasons.get(reason, 0)) for reason in ("plateau", "cap", "diverged", "failed")),
        "-" if median is None else f"{median:.0f}",
        f"{spent / 3600:.2f}",
    )


def status(meta_dir: str | Path) -> str:
    """Return what a sweep's driver last said of itself and how old that is; of a copy, which trials are in it.

    Raises:
        StoreError: no sweep was run there.
    """
    location = Location.of(meta_dir)
    content = location.read(claims.STATUS_FILE)
    if content is None and (spec := reader.read_spec(location)) is not None:
        plan = Plan(spec)
        missing = sum(map(len, plan.missing(reader.done_ids(location))))
        return f"no driver has reported here\n{len(plan) - missing}/{len(plan)} trials are there"
    if content is None:
        raise StoreError(f"No sweep has run in {location}; start one with `cape sweep SPEC --out {location}`.")
    try:
        state: dict[str, Any] = json.loads(content)
        age = time.time() - state["updated"]
        where = f"process {state['pid']} on {state['host']}"
        said = state["state"]
        if said == "running" and not claims.at_work(location):
            said = f"silent for {clock(age)}: killed, or its machine is gone; resume it"
        if said != "running":  # what was committed after its last word, it cannot say
            rows = reader.count_rows(location) if reader.list_chunks(location) else 0
            state |= {"done": len(reader.done_ids(location)), "rows": rows}
        error = f"\nerror: {state['error']}" if state.get("error") else ""
        return f"{said} ({where}, {clock(age)} ago)\n{status_line(state)}{error}"
    except (ValueError, KeyError, TypeError) as error_:
        raise StoreError(f"{location}/{claims.STATUS_FILE} is not a sweep's status: {error_}.") from error_
