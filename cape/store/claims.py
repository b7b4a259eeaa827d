"""Claim a meta-dataset for one sweep, extend that sweep, and keep two runs of it from writing at the same time.

A *run* is one driver at work on a sweep. ``_run.json`` names the only run that may commit; ``_runs/<run>.json`` is its
sign of life. A worker holds a *claim*, ``_runs/<run>/<shard>.json``, with a token of its own, and commits only while
the token is the one that it wrote: a worker that was given up for lost and turns out to live, of this run or of an
earlier one, cannot write a trial twice.
The check and the rename happen under the folder's lock, shared, and a shard is taken under the lock, alone: whoever
took it and then reads what is committed sees all that the worker before will ever commit. (An object store has no lock:
there the check comes right before the upload, and what slips through that gap is a duplicate that `cape store verify`
finds.)
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cape.config import SweepSpec
from cape.errors import StoreError
from cape.store import reader
from cape.store.location import Location
from cape.store.schema import SPEC_FILE, SPEC_HISTORY

RUN_FILE = "_run.json"
RUNS = "_runs"
STATUS_FILE = "_status.json"
_SIGN_S = 5.0
_SILENT_S = 30.0  # a run on another machine that has given no sign of life for so long is over

_GRID = ("families", "datasets", "lrs", "batch_sizes")
_COUNTS = ("trials_per_cell", "trials_by_family")


def claim(meta_dir: reader.Where, spec: SweepSpec, *, resume: bool = False) -> None:
    """Make ``meta_dir`` the home of one sweep, or make sure that it is; extend it where ``spec`` only adds trials.

    Raises:
        StoreError: it holds another sweep (the message names what differs), or rows of this one while ``resume`` is
            False, or is not a folder.
    """
    location = check_home(meta_dir)
    held = reader.read_spec(location)
    if held is not None and held != spec:
        lost = differences(held, spec)
        if lost:
            raise StoreError(
                f"{location} holds another sweep: {'; '.join(lost)}. Choose another folder, or give it the spec that it"
                f" holds ({location}/{SPEC_FILE}); a sweep may only be extended."
            )
    if held is not None and not resume and reader.list_chunks(location):
        raise StoreError(
            f"{location} already holds rows of this sweep; add --resume (resume=True) to run what is missing."
        )
    if held != spec:
        for known in filter(None, (held, spec)):
            location.write(f"{SPEC_HISTORY}/{known.spec_hash}.json", known.to_json(indent=2).encode())
        location.write(SPEC_FILE, spec.to_json(indent=2).encode())
    location.remove_abandoned()


def check_home(meta_dir: reader.Where) -> Location:
    """Return where a sweep is to live, or raise ``StoreError`` where that is a file."""
    location = Location.of(meta_dir)
    if location.folder is not None and location.folder.exists() and not location.folder.is_dir():
        raise StoreError(f"{location} is a file; a sweep needs a folder of its own.")
    return location


def differences(held: SweepSpec, wanted: SweepSpec) -> list[str]:
    """Return, as phrases, what ``wanted`` changes or leaves out of ``held``; nothing where it only adds trials."""
    defaults = {name: getattr(SweepSpec, name) for name in SweepSpec.LATER}  # which the JSON leaves out
    a, b = {**defaults, **held.to_dict()}, {**defaults, **wanted.to_dict()}
    found = []
    for key in a:
        if key in _COUNTS or a[key] == b[key]:
            continue
        if key not in _GRID:
            found.append(f"{key} is {a[key]} there and {b[key]} here")
        elif set(a[key]) - set(b[key]):
            missing = [v for v in a[key] if v not in b[key]]
            found.append(f"{key} is {a[key]} there and {b[key]} here, without {', '.join(map(str, missing))}")
    for family in held.families:
        before, after = (s.trials_by_family.get(family, s.trials_per_cell) for s in (held, wanted))
        if family in wanted.families and after < before:
            found.append(f"a cell of {family} has {before} trials there and {after} here")
    return found


def start_run(meta_dir: reader.Where) -> str:
    """Become the one run that may write, and return its id; workers of every earlier run can commit no more.

    Raises:
        StoreError: another run is at work there.
    """
    location = Location.of(meta_dir)
    run = uuid.uuid4().hex[:12]
    with location.lock(exclusive=True):
        held = _json(location, RUN_FILE)
        if held and _at_work(location, held):
            raise StoreError(
                f"Another run writes to {location} (process {held.get('pid')} on {held.get('host')}); stop it first,"
                f" or watch it with `cape sweep status {location}`."
            )
        location.delete_tree(RUNS)
        mine = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": _started(os.getpid())}
        alive(location, run)
        location.write(RUN_FILE, json.dumps(mine).encode())
    return run


def alive(meta_dir: reader.Where, run: str) -> None:
    """Give a sign of life, for those on other machines, whoever holds the lock."""
    sign = json.dumps({"updated": time.time()}).encode()
    with suppress(StoreError):  # a full disk must stop a sweep where rows are lost, not here
        Location.of(meta_dir).write(f"{RUNS}/{run}.json", sign, durable=False)


class Heartbeat:
    """Call something every few seconds, in a thread, until it is closed."""

    def __init__(self, sign: Callable[[], None]) -> None:
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(sign,), name="cape-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _beat(self, sign: Callable[[], None]) -> None:
        while not self._closed.wait(_SIGN_S):
            sign()


def end_run(meta_dir: reader.Where, run: str) -> None:
    """Give the meta-dataset back."""
    location = Location.of(meta_dir)
    with location.lock(exclusive=True):
        if _json(location, RUN_FILE).get("run") == run:
            location.delete(RUN_FILE)
            location.delete_tree(RUNS)


def revoke(meta_dir: reader.Where, run: str) -> None:
    """Take every shard of a run from its worker: none that was given up for lost can commit what is dealt anew."""
    location = Location.of(meta_dir)
    with location.lock(exclusive=True):
        location.delete_tree(f"{RUNS}/{run}")


def is_current(meta_dir: reader.Where, run: str) -> bool:
    """Return whether a run is still the one that may write."""
    return bool(_json(Location.of(meta_dir), RUN_FILE).get("run") == run)


class Claim:
    """A worker's right to commit the trials of one shard, until someone else takes it.

    Args:
        meta_dir: of the sweep.
        run: id of the run.
        shard: key of the shard.

    Attributes:
        earlier: what the attempt before this one left, empty for the first; known once the shard is taken.
    """

    def __init__(self, meta_dir: reader.Where, run: str, shard: str) -> None:
        self._location, self._name = Location.of(meta_dir), f"{RUNS}/{run}/{shard}.json"
        self._run, self._token = run, uuid.uuid4().hex
        self.earlier: dict[str, Any] = {}

    def take(self) -> None:
        """Take the shard from whoever had it, who can commit no more."""
        with self._location.lock(exclusive=True):
            self.earlier = _json(self._location, self._name)
            self._write(self.earlier)

    def note(self, notes: dict[str, Any]) -> None:
        """Leave notes for the next attempt, unless it has the shard already."""
        with self._location.lock():
            if self.holds():
                self._write(notes)

    def _write(self, notes: dict[str, Any]) -> None:
        self._location.write(self._name, json.dumps({**notes, "token": self._token}).encode(), durable=False)

    def holds(self) -> bool:
        """Return whether a commit is still allowed."""
        return is_current(self._location, self._run) and _json(self._location, self._name).get("token") == self._token


def _json(location: Location, name: str) -> dict[str, Any]:
    content = location.read(name)
    try:
        value = json.loads(content or b"{}")
    except ValueError:  # half of a file that its process did not live to finish
        return {}
    return value if isinstance(value, dict) else {}


def at_work(meta_dir: reader.Where) -> bool:
    """Return whether a run is writing, as far as that can be seen from here."""
    location = Location.of(meta_dir)
    held = _json(location, RUN_FILE)
    return bool(held) and _at_work(location, held)


def _at_work(location: Location, held: dict[str, Any]) -> bool:
    if held.get("host") == socket.gethostname():
        since = _started(held.get("pid"))
        return since is not None and since == held.get("since")
    sign = _json(location, f"{RUNS}/{held.get('run')}.json")
    return time.time() - _number(sign.get("updated")) < _SILENT_S


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _started(pid: Any) -> str | None:
    """Return when a process of this machine began (in the kernel's ticks), or None where there is none.

    A zombie is none; where there is no /proc, every process that answers a signal is taken to be the same.
    """
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, TypeError):
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(int(pid), 0)
        except (OSError, ValueError, TypeError):
            return None
        return "unknown"
    return None if fields[0] == "Z" else fields[19]
