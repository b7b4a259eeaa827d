"""What one sees of a sweep: one line on the terminal, a status file for other terminals, a log of JSON lines."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, TextIO

from cape.errors import StoreError
from cape.store import claims
from cape.store.location import Location
from cape.sweep.estimate import Pace

LOG_FILE = "_log.jsonl"
_RECENT = 50  # chunks over which the rate is taken: what a sweep did an hour ago says little


class Progress:
    """Print ``done/total`` trials, their rate, rows, failures and the time left, in all and by family.

    On a terminal the line is rewritten in place; elsewhere a line is printed every ``every`` seconds and at the end.

    Args:
        todo: trials to run now, by family.
        before: trials that were done before, by family. rows: theirs.
        expected: seconds of one worker that all of ``todo`` is expected to take, by family (NaN: not known).
        enabled: print at all.
        stream: standard error where None.
        every: seconds between lines (a tenth of a second on a terminal).

    Attributes:
        workers: how many share the work.
    """

    def __init__(
        self,
        todo: Mapping[str, int],
        before: Mapping[str, int] | None = None,
        *,
        rows: int = 0,
        expected: Mapping[str, float] | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,
        every: float = 10.0,
    ) -> None:
        self.todo, self.before, self._rows_before = dict(todo), dict(before or {}), rows
        self.expected = {f: (expected or {}).get(f, math.nan) for f in self.todo}
        self.workers = 1
        self._enabled, self._stream = enabled, stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._began = self._shown = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)], maxlen=_RECENT)
        self._spent: Counter[str] = Counter()
        self._reckoned: Counter[str] = Counter()
        self.by_family: Counter[str] = Counter()
        self.rows = self.failed = 0
        self._lock = threading.Lock()  # the thread that writes the status reads while chunks are counted

    @property
    def trials(self) -> int:
        """Trials that this run committed."""
        return sum(self.by_family.values())

    def add(
        self, trials: int, rows: int, failed: int, family: str = "", *, seconds: float = 0.0, expected: float = math.nan
    ) -> None:
        """Count a committed chunk: what it held, the seconds that a worker spent on it, and those expected of it."""
        with self._lock:
            self.by_family[family] += trials
            self.rows += rows
            self.failed += failed
            self._spent[family] += seconds  # type: ignore[assignment]
            self._reckoned[family] += expected  # type: ignore[assignment]
            self._recent.append((time.monotonic(), self.trials))
        if time.monotonic() - self._shown >= self._every:
            self._show()

    def close(self) -> None:
        """Print the last state and end the line."""
        self._show()
        if self._enabled and self._terminal:
            self._print("\n")

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        with self._lock:
            return self._as_dict()

    def _as_dict(self) -> dict[str, Any]:
        pace = Pace()
        for f in self.by_family:
            pace.add(f, self._spent[f], self._reckoned[f], self.by_family[f])
        families: dict[str, dict[str, Any]] = {}
        for f, count in self.todo.items():
            ran, before = self.by_family[f], self.before.get(f, 0)
            expected = self.expected[f] - self._reckoned[f]
            # What is left may be a little where less was expected of what ran: trials are not alike.
            left = pace.seconds(f, max(expected, 0.0) if count > ran else 0.0, count - ran) / self.workers
            families[f] = {"done": before + ran, "total": before + count, "ran": ran, "left": _finite(left)}
        for f, count in self.before.items():
            families.setdefault(f, {"done": count, "total": count, "ran": 0, "left": 0.0})
        now, (since, at) = time.monotonic(), self._recent[0]
        return {
            "done": sum(self.before.values()) + self.trials,
            "total": sum(self.before.values()) + sum(self.todo.values()),
            "ran": self.trials,
            "rows": self._rows_before + self.rows,
            "failed": self.failed,
            "seconds": now - self._began,
            "rate": (self.trials - at) / max(now - since, 1e-9),
            "workers": self.workers,
            "families": families,
        }

    def line(self) -> str:
        """Return the line."""
        return status_line(self.as_dict())

    def _show(self) -> None:
        if not self._enabled:
            return
        self._shown = time.monotonic()
        text = f"{self.line()}\n"
        if self._terminal:  # a line that wraps is not rewritten in place
            text = f"\r{text[: shutil.get_terminal_size().columns - 1].rstrip()}\x1b[K"
        self._print(text)

    def _print(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the reader has gone, or its disk is full: no reason to stop a sweep
            self._enabled = False


def status_line(state: Mapping[str, Any]) -> str:
    """Return what ``Progress.as_dict`` says as one line.

    The times of the families are their shares of the time left, and add up to it. A family that has committed nothing
    yet has an estimate (``~``), or, where nothing is known of it, a ``?``: then there is more left than the line says.
    """
    shares, left, known = [], 0.0, True
    for family, f in state["families"].items():
        if f["done"] >= f["total"]:
            continue
        if f["left"] is None:
            known = False
            shares.append(f"{family} ?")
        else:
            left += f["left"]
            shares.append(f"{family} {'' if f['ran'] else '~'}{clock(f['left'])}")
    if state["done"] >= state["total"]:
        remaining = "done"
    elif not state["ran"]:
        remaining = f"starting, {'about' if known else 'more than'} {clock(left)} left" if left else "starting"
    else:
        remaining = f"{'about' if known else 'more than'} {clock(left)} left"
    by_family = f" ({', '.join(shares)})" if len(state["families"]) > 1 and shares else ""
    failed = f", {state['failed']} failed" if state["failed"] else ""
    return (
        f"{state['done']}/{state['total']} trials, {state['rate']:.2f} trials/s, {state['rows']} rows{failed},"
        f" {clock(state['seconds'])}, {remaining}{by_family}"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Reporter:
    """Tell of a run while it goes on: the line, ``_status.json`` and ``_log.jsonl``.

    An object store has no file to append to: there the log is left out.

    Args:
        location: of the meta-dataset.
        run: id of the run.
        progress: counts and prints.
        seconds: what one trial of a family, a dataset and a batch size is expected to take.
    """

    def __init__(
        self,
        location: Location,
        run: str,
        progress: Progress,
        seconds: Mapping[tuple[str, str, int], float] | None = None,
    ) -> None:
        self._location, self._run, self.progress = location, run, progress
        self._seconds = dict(seconds or {})
        self._about = {"run": run, "host": socket.gethostname(), "pid": os.getpid()}
        self.log("started", todo=progress.todo, before=progress.before)
        self._write("running")
        self._heartbeat = claims.Heartbeat(lambda: self._write("running"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # Tune writes its callbacks to the disk; a stream, a thread and a lock cannot be written

    def chunk(self, done: Mapping[str, Any]) -> None:
        """Count a committed chunk."""
        one = self._seconds.get((done["family"], done.get("dataset", ""), done.get("batch_size", 0)), math.nan)
        spent = done.get("run_seconds", 0.0) + done.get("commit_seconds", 0.0)
        counts = (done["trials"], done["rows"], done["failed"], done["family"])
        self.progress.add(*counts, seconds=spent, expected=done["trials"] * one)
        keep = (
            "family",
            "dataset",
            "batch_size",
            "shard",
            "trials",
            "rows",
            "failed",
            "run_seconds",
            "commit_seconds",
            "waited_seconds",
            "worker",
        )
        self.log("chunk", **{k: done[k] for k in keep if k in done})

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to the log."""
        folder = self._location.folder
        if folder is None:
            return
        line = json.dumps({"time": time.time(), "run": self._run, "event": event, **facts}) + "\n"
        try:
            with open(folder / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:  # a full disk must stop the sweep where rows are lost, not where a line is
            return

    def close(self, state: str, error: str | None = None) -> None:
        """Write the last state: ``finished``, ``interrupted`` or ``failed``."""
        self._heartbeat.close()
        self.progress.close()
        self.log(state, ran=self.progress.trials, rows=self.progress.rows, error=error)
        self._write(state, error)

    def _write(self, state: str, error: str | None = None) -> None:
        status = {**self._about, "state": state, "updated": time.time(), "error": error, **self.progress.as_dict()}
        try:
            self._location.write(claims.STATUS_FILE, json.dumps(status).encode(), durable=False)
        except StoreError:  # as for the log
            return


def _nothing() -> None:
    return None


def clock(seconds: float) -> str:
    """Return a time as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
