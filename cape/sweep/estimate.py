"""How long a sweep will take and how much disk it will fill, from measured times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cape.config import SweepSpec
from cape.datasets.known import known
from cape.store import reader
from cape.store.location import Location
from cape.sweep.plan import Group, Plan
from cape.sweep.shards import cut

_SAMPLE = 200  # files that are looked at in a meta-dataset
_COLUMNS = ["trial_id", "batch_size", "probe_seconds", "truth_seconds", "device"]

# Mean seconds of one trial (probe and trajectory) of one core, on gray and on colour images, by batch size: processor
# time of three trials each, one for each of the paper's learning rates (benchmarks/sweep.py, "costs" in
# results/sweep_cpu.json). A rough guide: a trial takes a tenth or three times its mean, and a core that does other work
# as well takes longer; a user's family has none.
MEASURED_DEVICE = "one core of an AMD EPYC (processor time of three trials of each kind)"
MEASURED_SECONDS: dict[str, dict[str, dict[int, float]]] = {
    "mlp": {"gray": {32: 0.052, 64: 0.077}, "colour": {32: 0.14, 64: 0.18}},
    "cnn": {"gray": {32: 1.9, 64: 4.9}, "colour": {32: 4.8, 64: 10.0}},
    "rnn": {"gray": {32: 1.4}, "colour": {32: 2.4}},
    "transformer": {"gray": {32: 16.0, 64: 25.0}, "colour": {32: 10.0}},
}
ROW_BYTES = 1100.0  # a row with all its losses takes less (tests/store/test_writer_reader.py), a short one a quarter


@dataclass(frozen=True)
class Estimate:
    """What a sweep amounts to.

    Attributes:
        worker_hours: hours of one worker (a GPU, or a CPU core) for all trials.
        bytes: of the Parquet files.
        source: where the times come from.
    """

    cells: int
    trials: int
    rows: int
    shards: int
    worker_hours: float
    bytes: float
    source: str

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.cells} cells, {self.trials} trials, {self.rows} rows, {self.shards} shards",
                f"about {_known(self.worker_hours)} worker-hours (a worker is a GPU, its share of one, or a core), "
                + f"{_size(self.bytes)} of disk",
                f"measured: {self.source}",
            ]
        )


def estimate(spec: SweepSpec, out: Location | None = None, workers: int = 1) -> Estimate:
    """Return what a sweep amounts to, before any of it runs.

    Args:
        spec: the sweep.
        out: a meta-dataset whose rows say how long a trial takes; where it has none, what was measured for the package.
        workers: how many share the work (it decides the shards).
    """
    plan = Plan(spec)
    seconds, source = trial_seconds_of(spec, out)
    total = sum(group.count * seconds(group) for group in plan.groups)
    shards = len(cut(plan.missing(), workers, relative(seconds, spec)))
    row_bytes = _row_bytes(out) or ROW_BYTES
    return Estimate(plan.cells, len(plan), plan.rows, shards, total / 3600, plan.rows * row_bytes, source)


def trial_seconds_of(spec: SweepSpec, out: Location | None = None) -> tuple[Callable[[Group], float], str]:
    """Return the expected seconds of a trial of a group, and where the numbers come from.

    The mean over the trials of ``out`` with the same family, dataset and batch size. Where there are none, the
    package's own measurement, scaled by what the trials of this family (else of all families) in ``out`` took against
    theirs: a faster device is faster at all of them. Where the package has none either, the mean of the family; NaN for
    a family of which nothing is known.
    """
    exact: dict[tuple[str, str, int], list[float]] = {}
    devices: set[str] = set()
    for family, dataset, row in _sample(out) if out is not None else ():
        spent = row["truth_seconds"] + (row["probe_seconds"] or 0.0)
        exact.setdefault((family, dataset, row["batch_size"]), []).append(spent)
        devices.add(str(row["device"]))
    pace = Pace()
    for (family, dataset, batch_size), values in exact.items():
        pace.add(family, sum(values), len(values) * measured_seconds(family, dataset, batch_size), len(values))

    def seconds(group: Group) -> float:
        known = exact.get((group.family, group.dataset, group.batch_size))
        if known:
            return sum(known) / len(known)
        return pace.seconds(group.family, measured_seconds(group.family, group.dataset, group.batch_size), 1)

    count = sum(map(len, exact.values()))
    if count:
        return seconds, f"{count} trials that {out} holds, on {', '.join(sorted(devices))}"
    advice = "a few trials of every family in --out (a small spec, extended later) give your device's times"
    return seconds, f"for this package on {MEASURED_DEVICE}; {advice}"


def measured_seconds(family: str, dataset: str, batch_size: int) -> float:
    """Return what a trial took when the package was measured, for other batch sizes in proportion; NaN if unknown."""
    if family not in MEASURED_SECONDS:
        return math.nan
    about = known(dataset)
    gray = dataset == "digits" or (about is not None and about.gray)
    times = MEASURED_SECONDS[family]["gray" if gray else "colour"]
    nearest = min(times, key=lambda size: abs(math.log(size / batch_size)))
    return times[nearest] * batch_size / nearest


class Pace:
    """How long trials really take, against what was expected of them: by family, and over all families."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[float, float, float]] = {}

    def add(self, family: str, seconds: float, expected: float, trials: float) -> None:
        """Count trials that took ``seconds`` of a worker where ``expected`` (NaN: not known) were expected."""
        before = self._families.get(family, (0.0, 0.0, 0.0))
        self._families[family] = (before[0] + seconds, before[1] + expected, before[2] + trials)

    def seconds(self, family: str, expected: float, trials: float) -> float:
        """Return how long a worker needs for more trials of a family; NaN where nothing is known of it."""
        spent, reckoned, count = self._families.get(family, (0.0, 0.0, 0.0))
        if math.isfinite(expected):
            if not (reckoned > 0):
                known = [f for f in self._families.values() if f[1] > 0]
                spent, reckoned = (sum(f[i] for f in known) for i in (0, 1))
            return expected * spent / reckoned if reckoned > 0 and spent > 0 else expected
        return trials * spent / count if count else math.nan


def relative(seconds: Callable[[Group], float], spec: SweepSpec) -> Callable[[Group], float] | None:
    """Return costs to cut shards by: those of ``seconds``, or None (all the same) where one of them is not known."""
    known = all(math.isfinite(seconds(group)) for group in Plan(spec).groups)
    return seconds if known else None


def _sample(out: Location) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (family, dataset, row) of trials in some of the files, spread over all of them."""
    base = reader.rows_folder(out)
    files = reader.list_chunks(out, base)
    found = []
    for name in files[:: math.ceil(len(files) / _SAMPLE) or 1]:
        family, dataset = reader.partition_of(name)
        try:
            table = pq.read_table(out.path(name), columns=_COLUMNS, partitioning=None, filesystem=out.filesystem)
        except (pa.ArrowInvalid, OSError):  # whoever reads all of it will say so
            continue
        rows = {r["trial_id"]: r for r in table.to_pylist()}.values()
        found += [(family, dataset, row) for row in rows if row["truth_seconds"] is not None]
    return found


def _row_bytes(out: Location | None) -> float | None:
    if out is None:
        return None
    files = reader.list_chunks(out)[:_SAMPLE]
    sizes = [info.size for info in out.filesystem.get_file_info([out.path(name) for name in files])]
    rows = sum(pq.read_metadata(out.path(name), filesystem=out.filesystem).num_rows for name in files)
    return sum(sizes) / rows if rows else None


def _known(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "an unknown number of"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
