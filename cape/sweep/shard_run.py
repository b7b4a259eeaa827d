"""One shard in progress: chunks of trials, and what to do about trials that never come back.

A trial can end its process (a crash in native code, the kernel's out-of-memory killer), poison its CUDA context, or
hang. None of them can be caught where they happen, so a worker notes the trials that are under way in a *flight
record* before it begins them. Whoever runs the shard next finds the record. Several suspects run in sections, each of
which is noted and committed by itself, so that the next death leaves an ``_SECTIONS``-th of them: one trial among n
costs log(n) deaths until it is the only suspect. A trial that ended its process ``MAX_TRIES`` times while it was the
only one under way is committed as failed.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from cape.config import TrialSpec
from cape.errors import CapeError, StoreError
from cape.store import reader, writer
from cape.store.claims import Claim
from cape.sweep.job import Job
from cape.sweep.plan import Plan, Shard
from cape.trial import Row, failed_rows, run_trials

MAX_TRIES = 3

# Trials that ``run_trials`` gets at once: enough to train side by side, few enough to note and to suspect.
_WINDOW = 256

# A new process takes seconds; trials that run in parts of a stack lose a part of what stacking gains. With eight
# sections, 256 suspects are one after three deaths.
_SECTIONS = 8

FLIGHTS = "_flights"
TRIES = "_tries"


class Flight:
    """The record of the trials that this process has under way.

    In a folder it is written for every trial (some microseconds). In an object store, where a write is a request, only
    for suspects; a shard whose worker died there becomes suspect as a whole.

    Attributes:
        waiting: trials handed to ``run_trials`` whose models are not built yet. They are suspects only while no trial
            is under way: drawing a model or opening a dataset, too, can end a process.
        trials: those under way, in training or being built.
        suspects: whether what runs now had been under way when an earlier process ended.
    """

    def __init__(self, job: Job, shard: Shard) -> None:
        self._location = job.location
        self._name = f"{FLIGHTS}/{uuid.uuid4().hex}.json"
        self._about = {"run": job.run, "shard": shard.key, "inline": job.inline, "pid": os.getpid()}
        self._handle: int | None = None
        self.waiting: dict[str, None] = {}
        self.trials: dict[str, None] = {}
        self.suspects = False
        self._blamed = False

    def wait(self, trials: Iterable[TrialSpec]) -> None:
        """Note trials before they are handed over."""
        self.waiting = dict.fromkeys(t.trial_id for t in trials)
        self._write(None)

    def begin(self, trial: TrialSpec) -> None:
        """Note a trial before its model is built."""
        self.waiting.pop(trial.trial_id, None)
        self.trials[trial.trial_id] = None
        self._write(None)

    def end(self, trial_id: str) -> None:
        """Note that a trial came back."""
        self.waiting.pop(trial_id, None)
        self.trials.pop(trial_id, None)
        self._write(None)

    @property
    def count(self) -> int:
        """Number of trials that one of which must come back within its budget times this."""
        return len(self.trials or self.waiting)

    def blame(self, error: str) -> None:
        """Note why the trials under way will not come back; the record stays for the next process."""
        self._write(error)
        self._blamed = True

    def land(self) -> None:
        """Remove the record, unless a trial was blamed: whatever else ended the shard was not a trial's fault."""
        if self._blamed:
            return
        self.waiting, self.trials = {}, {}
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._location.delete(self._name)

    def _write(self, error: str | None) -> None:
        if self._location.folder is None and not self.suspects:
            return
        record = {**self._about, "trials": list(self.trials or self.waiting), "error": error}
        content = json.dumps(record).encode() + b"\n"  # what a longer record before it left behind follows the newline
        if self._location.folder is None:
            self._location.write(self._name, content)
            return
        try:
            if self._handle is None:
                path = self._location.path(self._name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.pwrite(self._handle, content, 0)
        except OSError as failed:  # a full disk, say: no trial's fault
            raise self._location.failure(self._name, failed) from failed


class ShardRun:
    """Run a shard's trials that are not committed yet; each ``step`` runs and commits a chunk.

    Args:
        job: the run.
        shard: what to run.
        device: where.

    Raises:
        StoreError: the shard's worker died ``MAX_TRIES`` times without beginning a trial.
    """

    def __init__(self, job: Job, shard: Shard, device: str | torch.device) -> None:
        self._job, self._shard, self._device = job, shard, device
        self._location = job.location
        group = shard.group
        self._claim = Claim(self._location, job.run, shard.key)
        self._claim.take()  # before what is done is read: whoever had the shard could commit in between
        done: set[str] = set()
        if self._claim.earlier:  # a run begins with what is missing: only its own earlier attempts have committed since
            done = reader.done_trials(self._location, group.family, group.dataset)
        self._flight = Flight(job, shard)
        self._gave_up = 0
        suspects = self._take_over(done)
        skip = done | suspects.keys()
        others = (t for t in Plan(job.spec).trials_of(shard) if not skip or t.trial_id not in skip)
        self._rows = self._run(suspects, others)
        self._watch = _Watch(job.trial_seconds, self._hung) if job.trial_seconds else None

    def _take_over(self, done: set[str]) -> dict[str, TrialSpec]:
        """Return the trials that were under way when an earlier process ended; note how far the shard is.

        A trial that has used up its tries is committed as failed and added to ``done``.
        """
        earlier, had = self._claim.earlier, len(done)
        records = {name: _record(self._location.read(name)) for name in self._location.list(FLIGHTS)}
        trials: dict[str, TrialSpec] = {}
        if any(record.get("trials") for record in records.values()) or earlier:
            trials = {t.trial_id: t for t in Plan(self._job.spec).trials_of(self._shard) if t.trial_id not in done}
        suspects: dict[str, TrialSpec] = {}
        given_up = []
        for name, record in records.items():
            mine = [i for i in record.get("trials", ()) if i in trials]
            # A process that ended together with its driver was not ended by its trial, unless they are one process.
            blamed = record.get("run") == self._job.run or record.get("inline")
            if len(mine) == 1 and blamed and self._charge(mine[0], name, record.get("error")):
                given_up.append((name, mine[0]))
                continue
            suspects.update({i: trials[i] for i in mine})
            if mine:
                self._location.delete(name)
        barren = 0
        if earlier and not suspects and not given_up and earlier.get("done") == had:
            barren = int(earlier.get("barren", 0)) + 1
            if barren >= MAX_TRIES:
                raise StoreError(
                    f"Workers died {barren} times before they began a trial of {self._shard.group.family}; see the"
                    " worker's log, and check the memory and the device of its node."
                )
            if self._location.folder is None:
                suspects = dict(trials)
        self._claim.note({"done": had, "barren": barren})
        for name, trial_id in given_up:
            done.add(trial_id)  # also where the shard is another's by now, who finds the record
            if self._commit(self._failed(trials[trial_id])):
                self._gave_up += 1
                self._location.delete(name)
        return suspects

    def _charge(self, trial_id: str, flight: str, error: str | None) -> bool:
        """Count a try that ended its process; return whether it was the last.

        A flight counts once: whoever finds its record may end, or lose the shard, before the record is gone.
        """
        name = f"{TRIES}/{trial_id}.json"
        flights = dict.fromkeys([*_record(self._location.read(name)).get("flights", ()), flight])
        error = error or "its process died without an exception"
        noted = {"flights": list(flights), "error": error}
        self._location.write(name, json.dumps(noted).encode())
        return len(flights) >= MAX_TRIES

    def _failed(self, trial: TrialSpec) -> list[Row]:
        noted = _record(self._location.read(f"{TRIES}/{trial.trial_id}.json"))
        text = f"given up after {len(noted.get('flights', ()))} tries: {noted.get('error')}"
        return failed_rows(trial, self._device, self._job.spec.spec_hash, text)

    def _run(self, suspects: dict[str, TrialSpec], others: Iterator[TrialSpec]) -> Iterator[list[Row]]:
        """Yield the rows of one trial after the other; no rows where what came before them is to be committed."""
        self._flight.suspects = True
        for section in sections(list(suspects.values())):
            yield from self._window(section)
            yield []
        self._flight.suspects = False
        while window := list(islice(others, _WINDOW)):
            yield from self._window(window)

    def _window(self, trials: list[TrialSpec]) -> Iterator[list[Row]]:
        def begun(trial: TrialSpec) -> None:
            self._flight.begin(trial)
            self._progressed()

        job = self._job
        self._flight.wait(trials)
        self._progressed()
        for rows in run_trials(trials, self._device, job.data_root, job.spec.spec_hash, begun=begun):
            self._flight.end(rows[0]["trial_id"])
            self._progressed()
            yield rows

    def _progressed(self) -> None:
        if self._watch is not None:
            self._watch.expect(self._flight.count)

    def _hung(self, seconds: float) -> None:
        """End this process: nothing else stops a trial that hangs in native code. The next one finds the record."""
        self._flight.blame(f"no result within its time budget of {seconds:g} s")
        os.kill(os.getpid(), signal.SIGKILL)

    def step(self) -> dict[str, Any]:
        """Run trials for about ``chunk_seconds``, commit them and return what was done: numbers, and ``done``."""
        start = time.monotonic()
        chunk: list[Row] = []
        trials = failed = 0
        ended = False
        self._progressed()
        try:
            for rows in self._rows:
                if not rows:
                    break
                chunk += rows
                trials += 1
                failed += rows[0].get("stop_reason") == "failed"
                if time.monotonic() - start > self._job.chunk_seconds:
                    break
            else:
                ended = True
            if self._watch is not None:
                self._watch.expect(0)
            ran = time.monotonic()
            written = self._commit(chunk)
        except CapeError:
            self.close()  # data that is missing, a disk that is full: no trial's fault
            raise
        except Exception as error:  # a poisoned device, or a bug: this process must not go on
            text = " ".join(str(error).split())
            self._flight.blame(f"{type(error).__name__}: {text}"[:500])
            raise
        done = ended or not written
        if done:
            self.close()
        given_up, self._gave_up = self._gave_up, 0
        return {
            "done": done,
            "fenced": not written,
            "family": self._shard.group.family,
            "dataset": self._shard.group.dataset,
            "batch_size": self._shard.group.batch_size,
            "shard": self._shard.key,
            "trials": given_up + (trials if written else 0),
            "rows": given_up * len(self._job.spec.epsilons) + (len(chunk) if written else 0),
            "failed": given_up + (failed if written else 0),
            "run_seconds": ran - start,
            "commit_seconds": time.monotonic() - ran,
        }

    def _commit(self, chunk: list[Row]) -> bool:
        """Commit a chunk; return False where the shard is no longer ours."""
        if not chunk:
            return True
        written = writer.write_shard(
            chunk,
            self._location,
            provenance={**self._job.provenance, "device": str(chunk[0]["device"])},
            allowed=self._claim.holds,
        )
        if written:
            for row in chunk:
                if row.get("stop_reason") == "failed":
                    self._location.delete(f"{TRIES}/{row['trial_id']}.json")
        return bool(written)

    def close(self) -> None:
        """Stop: trials under way are dropped and not blamed."""
        if self._watch is not None:
            self._watch.close()
        self._flight.land()


def sections(trials: list[TrialSpec]) -> Iterator[list[TrialSpec]]:
    """Yield suspects in at most ``_SECTIONS`` parts of about the same size."""
    size = -(-len(trials) // _SECTIONS)
    for start in range(0, len(trials), size or 1):
        yield trials[start : start + size]


class _Watch:
    """Call ``late(budget)`` when ``count`` trials under way bring nothing for ``count`` times the budget."""

    def __init__(self, budget: float, late: Any) -> None:
        self._budget, self._late = budget, late
        self._deadline: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="cape-trial-budget", daemon=True).start()

    def expect(self, count: int) -> None:
        """Begin to wait again, for one of ``count`` trials; for nothing where it is zero."""
        self._deadline = time.monotonic() + self._budget * count if count else None

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._budget / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._late(self._budget)
                return


def _record(content: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads((content or b"{}").split(b"\n", 1)[0])
    except ValueError:  # cut off while it was written
        return {}
    return value if isinstance(value, dict) else {}
