"""The entry points of ``ray_jobs/`` and the files that describe clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cape.store import reader

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "ray_jobs"


def load(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((JOBS / name).read_text())


def test_the_cluster_is_one_that_ray_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = load("cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    head = cluster["available_node_types"]["head"]
    assert head["resources"]["GPU"] == 0
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])


def test_the_kuberay_job_runs_an_entry_point_that_exists() -> None:
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = {"entrypoint", "submissionMode", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"}
    assert set(spec) == known | {"ttlSecondsAfterFinished", "runtimeEnvYAML", "rayClusterSpec"}
    assert (ROOT / spec["entrypoint"].split()[1]).is_file()
    cluster = spec["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert "/dev/shm" in {m["mountPath"] for m in container["volumeMounts"]}
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_image_copies_what_is_there_runs_as_nobody_special_and_wants_a_token() -> None:
    lines = (JOBS / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and line[0].isupper()]
    assert [what for what, _ in steps].count("FROM") == 3 and not [what for what, _ in steps if what == "EXPOSE"]
    for what, rest in steps:
        if what == "COPY" and "--from" not in rest:
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest
    assert [rest for what, rest in steps if what == "USER"] == ["ray"]
    assert any("RAY_AUTH_MODE=token" in rest for what, rest in steps if what == "ENV")
    image = load("cluster.yaml")["docker"]["image"]
    assert f"-t {image} " in "\n".join(lines)


@pytest.mark.parametrize("name", ["sweep", "fit", "evaluate"])
def test_entry_points_take_the_arguments_of_their_command(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(JOBS / f"{name}.py"), "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert f"cape {name}" in done.stdout and "--out" in done.stdout


def test_a_sweep_submitted_twice_runs_once(ray_session: None, tmp_path: Path) -> None:
    import ray

    out = tmp_path / "meta"
    command = [sys.executable, str(JOBS / "sweep.py"), "smoke", "--out", str(out), "--quiet"]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    files = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "12 rows of 4 trials" in done.stdout
        files.append({p: p.stat().st_mtime_ns for p in reader.list_files(out)})
    assert files[0] == files[1]
