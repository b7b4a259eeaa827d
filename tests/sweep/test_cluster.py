"""Two nodes with fake GPUs: workers are pinned to them, and the sweep is completed when a node dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cape.config import StoppingRule, SweepSpec
from cape.store import reader
from cape.store.verify import verify
from cape.sweep.plan import Plan

HERE = Path(__file__).resolve().parent
SPEC = SweepSpec(
    name="cluster",
    families=("slow",),
    datasets=("digits",),
    lrs=(1e-3, 2e-3),
    batch_sizes=(8,),
    epsilons=(0.9, 0.8),
    trials_per_cell=50,
    stopping=StoppingRule(max_steps=30),
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    utils = pytest.importorskip("ray.cluster_utils")
    (tmp_path / "gpus").mkdir()
    monkeypatch.setenv("CAPE_FAKE_GPUS", str(tmp_path / "gpus"))  # the nodes' workers inherit it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    cluster.second = cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.mark.endurance
def test_workers_are_pinned_and_a_node_that_dies_costs_nothing(cluster: Any, tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.json", tmp_path / "meta"
    spec.write_text(SPEC.to_json())
    line = [sys.executable, "-m", "cape.cli", "sweep", str(spec), "--out", str(out), "--address", cluster.address]
    line += ["--gpus-per-worker", "1", "--chunk-seconds", "0.3", "--quiet", "--import", "faulty"]
    line += ["--import", "fake_gpus"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    driver = subprocess.Popen(line, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        notes: list[dict[str, Any]] = []
        end = time.monotonic() + 90
        while time.monotonic() < end and len(notes) < 2:
            notes = [json.loads(p.read_text()) for p in (tmp_path / "gpus").glob("*.json")]
            assert driver.poll() is None
            time.sleep(0.05)
        assert len({note["node"] for note in notes}) == 2  # one worker on each node, not two on one
        assert all(len(note["gpus"]) == 1 and note["visible"] == str(note["gpus"][0]) for note in notes)
        while reader.count_rows(out) < 20 and time.monotonic() < end:
            time.sleep(0.02)
        before = reader.count_rows(out)
        assert 20 <= before < 170
        raylet = next(p for kind, p in cluster.second.live_processes() if kind == "raylet")
        os.kill(raylet.pid, signal.SIGKILL)
        _, said = driver.communicate(timeout=150)
    finally:
        driver.kill()
    assert driver.returncode == 0, said[-3000:]
    found = verify(out, lambda s: Plan(s).all_ids())
    assert found.sound and (found.rows, found.missing, found.failed) == (200, 0, 0), str(found)
    if table := os.environ.get("CAPE_FAULT_TABLE"):
        path = Path(table)
        lines = json.loads(path.read_text()) if path.exists() else []
        lines = [entry for entry in lines if entry["killed"] != "node: its raylet, SIGKILL"]
        counted = {"rows_before": before, "rows_after": found.rows, "planned_trials": found.planned}
        lines.append({"killed": "node: its raylet, SIGKILL", **counted, "duplicates": 0, "sound": found.sound})
        path.write_text(json.dumps(lines, indent=1) + "\n")
