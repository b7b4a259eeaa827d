"""Which run may write to a meta-dataset, as it is seen from another machine."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from cape.config import SweepSpec
from cape.errors import StoreError
from cape.store import claims
from cape.store.location import Location
from cape.sweep import job

SPEC = SweepSpec(families=("mlp",), datasets=("digits",), lrs=(1e-3,), batch_sizes=(8,), trials_per_cell=1)


def test_a_run_that_has_just_begun_on_another_machine_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("cape.store.claims.time.time", lambda: now[0])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("cape.store.claims.socket.gethostname", lambda: "elsewhere")
        run = claims.start_run(tmp_path)
    assert claims.at_work(tmp_path)
    with pytest.raises(StoreError, match="Another run writes .* on elsewhere"):
        claims.start_run(tmp_path)
    now[0] += 29
    with Location.of(tmp_path).lock(exclusive=True):  # a compaction's, say
        claims.alive(tmp_path, run)
    now[0] += 29
    with pytest.raises(StoreError, match="Another run writes"):
        claims.start_run(tmp_path)
    now[0] += 2
    assert not claims.at_work(tmp_path)
    mine = claims.start_run(tmp_path)  # it is silent for too long
    assert [p.name for p in (tmp_path / "_runs").iterdir()] == [f"{mine}.json"]
    claims.alive(tmp_path, run)
    assert claims.is_current(tmp_path, mine)


def test_a_run_gives_signs_of_life_while_it_reads_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()

    def read(_: object) -> np.ndarray:
        assert given.wait(60)
        return np.empty(0, np.uint64)

    monkeypatch.setattr(claims, "_SIGN_S", 0.001)
    monkeypatch.setattr(claims, "alive", lambda *_: given.set())
    monkeypatch.setattr(job, "_done", read)
    with job.running(SPEC, tmp_path, resume=True, data_root=None):
        pass
