"""What a run of a sweep needs, with Ray or without: checks before, an account after."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from cape import datasets, families
from cape.config import SweepSpec, TrialSpec
from cape.datasets.known import known
from cape.drawn import draw_model
from cape.errors import ModelError, SpecError, StoreError, first_line
from cape.store import claims, reader
from cape.store.location import Location
from cape.store.provenance import provenance
from cape.store.schema import partition
from cape.store.verify import aside
from cape.sweep.plan import Plan

# Trials are committed in chunks of about this many seconds: long enough that a file and a message cost nothing
# beside them, short enough that little is lost with a killed worker.
CHUNK_SECONDS = 5.0

_LONGEST_NAME = 255  # bytes, of a folder, on nearly every file system

TRIAL_SECONDS = 3 * 3600.0  # default time budget of a trial


@dataclass(frozen=True)
class SweepResult:
    """What lies in the meta-dataset after a sweep: read from its files.

    Attributes:
        rows: number of rows.
        trials: number of trials.
        failed: trials that were run and failed (their rows say why).
        seconds: wall time of this run.
        out: folder of the meta-dataset (a URI as text).
    """

    rows: int
    trials: int
    failed: int
    seconds: float
    out: Path | str

    def __str__(self) -> str:
        failed = f", {self.failed} of them failed" if self.failed else ""
        return f"{self.rows} rows of {self.trials} trials{failed}, in {self.seconds:.1f} s: {self.out}"


@dataclass(frozen=True)
class Job:
    """One run of a sweep: everything that a worker has to be told.

    Attributes:
        run: id of the run; its workers may commit while the meta-dataset names it.
        inline: driver and worker are one process.
        trial_seconds: a trial that takes longer is given up; 0 for no limit.
        chunk_seconds: trials are committed about so often.
        imports: modules that register families or datasets of the user's own.
        import_folders: where the driver found them.
        provenance: what every chunk says of its origin.
    """

    spec: SweepSpec
    location: Location
    data_root: Path | None
    run: str
    began: float
    inline: bool = False
    trial_seconds: float = 0.0
    chunk_seconds: float = CHUNK_SECONDS
    imports: tuple[str, ...] = ()
    import_folders: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)


def check(
    spec: SweepSpec, data_root: str | Path | None, imports: Sequence[str] = (), *, download: bool = True
) -> Path | None:
    """Check a sweep before anything is started; return the data root.

    Args:
        download: look at datasets also where torchvision would have to fetch them first.

    Raises:
        SpecError: too many trials, an unknown family or dataset, two that do not fit each other, or a module that
            cannot be imported.
        DataError: data that is missing or too small.
    """
    if not isinstance(spec, SweepSpec):
        raise SpecError(f"A sweep is a SweepSpec, not {spec!r}; `cape.sweep.plan.read_spec` makes one of a file.")
    Plan(spec)  # refused before data is read, or anything written
    load_imports(imports)
    root = datasets.data_root(data_root)
    for family in spec.families:
        families.get(family)
    for name in spec.datasets:
        if root is None and known(name) is not None and not download:
            continue
        dataset = datasets.load(name, root)
        if spec.task is not None:
            dataset = dataset.with_task(spec.task)
        for family in spec.families:
            if max(map(len, partition(family, name).split("/"))) > _LONGEST_NAME:
                raise SpecError(f"'{name}' is too long to name a folder of rows; give a shorter path, of a link, say.")
            member = families.get(family)
            layout, preprocess = member.layout_for(dataset), member.preprocess_for(spec.preprocess)
            dataset.batch(max(spec.batch_sizes), 0, layout, preprocess=preprocess)
            with suppress(ModelError, RuntimeError):  # which fail one trial
                draw_model(TrialSpec(family, name, 1, 1.0, preprocess=spec.preprocess), dataset)
    return None if root is None else Path(root).resolve()


def load_imports(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Import modules that register families or datasets of the user's own; return the folders that they were found in.

    Args:
        names: of the modules.
        folders: to search beside ``sys.path``: where the driver found them.
    """
    sys.path += [folder for folder in folders if folder not in sys.path]
    found = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is the answer to show
            why = f"{type(error).__name__}: {first_line(error)}"
            hint = f" Name the module, not its file: {Path(name).stem}." if name.endswith(".py") else ""
            raise SpecError(f"The module '{name}' cannot be imported ({why}).{hint}") from error
        if module.__spec__ is not None and module.__spec__.origin is not None:
            levels = name.count(".") + (module.__spec__.submodule_search_locations is not None)
            found.append(str(Path(module.__spec__.origin).resolve().parents[levels]))
    return tuple(dict.fromkeys(found))


@contextmanager
def running(
    spec: SweepSpec,
    out: str | Path,
    *,
    resume: bool,
    data_root: str | Path | None,
    inline: bool = False,
    trial_seconds: float = TRIAL_SECONDS,
    chunk_seconds: float = CHUNK_SECONDS,
    imports: Sequence[str] = (),
) -> Iterator[tuple[Job, np.ndarray]]:
    """Check a sweep, claim its meta-dataset, and be its one run inside the block.

    Yields:
        The job, and the ids of the trials that are done already ([n] uint64, see ``reader.done_ids``).

    Raises:
        SpecError, DataError: see ``check``.
        StoreError: the folder holds another sweep, rows of this one while ``resume`` is False, or another run.
    """
    if not (math.isfinite(trial_seconds) and trial_seconds >= 0):
        raise SpecError(f"The time budget of a trial must be zero (none) or more seconds, not {trial_seconds}.")
    if not (math.isfinite(chunk_seconds) and chunk_seconds > 0):
        raise SpecError(f"A chunk must take more than zero seconds, not {chunk_seconds}.")
    began = time.monotonic()
    root = check(spec, data_root, imports)
    location = Location.of(out)
    claims.check_home(location)
    run = claims.start_run(location)
    try:
        with closing(claims.Heartbeat(lambda: claims.alive(location, run))):
            claims.claim(location, spec, resume=resume)  # only now: another run's spec is not ours to extend
            done = _done(location) if resume else np.empty(0, np.uint64)
            job = Job(
                spec,
                location,
                root,
                run,
                began,
                inline=inline,
                trial_seconds=float(trial_seconds),
                chunk_seconds=float(chunk_seconds),
                imports=tuple(imports),
                import_folders=load_imports(imports),
                provenance=provenance(spec),
            )
            yield job, done
    finally:
        claims.end_run(location, run)


def _done(location: Location) -> np.ndarray:
    """Return what is committed; files that are not whole, or no rows, are set aside, and their trials run again."""
    for name, reason in reader.unreadable_chunks(location):
        print(f"{location}/{name} cannot be read ({reason}); set aside as {aside(location, name)}.", file=sys.stderr)
    return reader.done_ids(location)


def finish(job: Job, error: str | None = None) -> SweepResult:
    """Count what was committed.

    Args:
        error: what ended a shard for good.

    Raises:
        StoreError: trials of the plan are missing.
    """
    plan = Plan(job.spec)
    ids = np.sort(plan.all_ids())
    trials = rows = failed = 0
    if reader.list_chunks(job.location):
        table = reader.read(job.location, columns=["trial_id", "stop_reason"])
        for counted, is_failed in (
            (pc.value_counts(table["trial_id"]), False),
            (pc.value_counts(table.filter(pc.field("stop_reason") == "failed")["trial_id"]), True),
        ):
            trial_ids = counted.field("values").to_pylist()
            mine = np.array([reader.is_id(i) for i in trial_ids], dtype=bool)  # else imported, or foreign
            mine[mine] = np.isin(reader.id_numbers([i for i, ours in zip(trial_ids, mine) if ours]), ids)
            if is_failed:
                failed = int(mine.sum())
            else:
                trials, rows = int(mine.sum()), int(counted.field("counts").to_numpy()[mine].sum())
    if trials < len(plan):
        why = f" The error was: {error}" if error else ""
        raise StoreError(
            f"{len(plan) - trials} of {len(plan)} trials are missing in {job.location}; what is there is kept. Run the"
            f" sweep again with --resume.{why}"
        )
    extra = rows - trials * len(job.spec.epsilons)
    if extra > 0:
        print(
            f"{extra} rows of {job.location} are there more than once (a file was copied into it?);"
            f" `cape store compact {job.location}` leaves each once.",
            file=sys.stderr,
        )
    out = job.location.folder or str(job.location)
    return SweepResult(rows, trials, failed, time.monotonic() - job.began, out)
