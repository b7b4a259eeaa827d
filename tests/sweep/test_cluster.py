"""Two nodes with fake GPUs: workers are pinned to them, and the sweep is completed when a node dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cape.config import StoppingRule, SweepSpec
from cape.store import reader
from cape.store.verify import verify
from cape.sweep.plan import Plan
from tests.sweep.nodes import clean_environment, ray_start

HERE = Path(__file__).resolve().parent
SPEC = SweepSpec(
    name="cluster",
    families=("slow",),
    datasets=("digits",),
    lrs=(1e-3, 2e-3),
    batch_sizes=(8,),
    epsilons=(0.9, 0.8),
    trials_per_cell=150,
    stopping=StoppingRule(max_steps=30),
)


@dataclass(frozen=True)
class Cluster:
    """Two nodes.

    Attributes:
        address: of the head.
        gpus: of each node.
        raylet: gives the process that is the second node.
    """

    address: str
    gpus: int
    raylet: Callable[[], int]


@pytest.fixture(params=["cluster_utils", "ray start"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One GPU on each node of Ray's own test cluster; two on each of two that ``ray start`` makes."""
    (tmp_path / "gpus").mkdir()
    monkeypatch.setenv("CAPE_FAKE_GPUS", str(tmp_path / "gpus"))  # the nodes' workers inherit it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parents[1]}:{HERE}")
    if request.param == "ray start":
        environment = clean_environment(RAY_AUTH_MODE="disabled")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        options = ("--num-cpus=2", "--num-gpus=2")
        with (
            ray_start("head", tmp_path, environment, "--include-dashboard=false", *options) as head,
            ray_start("second", tmp_path, environment, *options, head=head.address) as second,
        ):
            yield Cluster(head.address, 2, second.raylet)
        return
    utils = pytest.importorskip("ray.cluster_utils")
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.wait_for_nodes()
    raylet = lambda: next(p.pid for kind, p in node.live_processes() if kind == "raylet")  # noqa: E731
    yield Cluster(cluster.address, 1, raylet)
    cluster.shutdown()


def nodes_of(cluster: Cluster, environment: dict[str, str]) -> int:
    """Return how many nodes the cluster has, as a driver sees it."""
    code = f"import ray; ray.init({cluster.address!r}, log_to_driver=False); print(len(ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    return int(done.stdout or 0)


@pytest.mark.endurance
def test_workers_are_pinned_and_a_node_that_dies_costs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.json", tmp_path / "meta"
    spec.write_text(SPEC.to_json())
    line = [sys.executable, "-m", "cape.cli", "sweep", str(spec), "--out", str(out), "--address", cluster.address]
    line += ["--gpus-per-worker", "1", "--chunk-seconds", "0.3", "--quiet", "--import", "faulty"]
    line += ["--import", "fake_gpus"]
    environment = dict(os.environ)
    end = time.monotonic() + 150
    while nodes_of(cluster, environment) < 2:
        assert time.monotonic() < end
    driver = subprocess.Popen(line, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        notes: list[dict[str, Any]] = []
        while time.monotonic() < end and len(notes) < 2 * cluster.gpus:
            notes = [json.loads(p.read_text()) for p in (tmp_path / "gpus").glob("*.json")]
            assert driver.poll() is None
            time.sleep(0.05)
        # Every GPU of every node has one worker, and that worker sees no other.
        nodes = {note["node"] for note in notes}
        assert len(nodes) == 2
        owned = {(note["node"], note["visible"]) for note in notes}
        assert owned == {(node, str(gpu)) for node in nodes for gpu in range(cluster.gpus)}
        assert all([str(gpu) for gpu in note["gpus"]] == [note["visible"]] for note in notes)
        while reader.count_rows(out) < 20 and time.monotonic() < end:
            time.sleep(0.02)
        before = reader.count_rows(out)
        assert 20 <= before < 500
        os.kill(cluster.raylet(), signal.SIGKILL)
        _, said = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 0, said[-3000:]
    found = verify(out, lambda s: Plan(s).all_ids())
    assert found.sound and (found.rows, found.missing, found.failed) == (600, 0, 0), str(found)
    if table := os.environ.get("CAPE_FAULT_TABLE"):
        path = Path(table)
        lines = json.loads(path.read_text()) if path.exists() else []
        what = f"node of {cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''}: its raylet, SIGKILL"
        lines = [entry for entry in lines if entry["killed"] != what]
        counted = {"rows_before": before, "rows_after": found.rows, "planned_trials": found.planned}
        lines.append({"killed": what, **counted, "duplicates": 0, "sound": found.sound})
        path.write_text(json.dumps(lines, indent=1) + "\n")
