"""Ray jobs: a real head on this machine, with token authentication switched on."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from cape import cli
from cape.config import StoppingRule, SweepSpec
from cape.errors import SpecError
from cape.store import reader
from cape.store.location import Location
from cape.sweep import submit
from tests.files import list_files
from tests.sweep.nodes import clean_environment, free_ports, ray_start

SPEC = SweepSpec(
    name="job",
    families=("mlp",),
    datasets=("digits",),
    lrs=(1e-3,),
    batch_sizes=(8,),
    epsilons=(0.9, 0.8),
    trials_per_cell=4,
    stopping=StoppingRule(max_steps=30),
)
TOKEN = "a-token-of-this-test-only-0123456789"
PARSE = cli.build_parser().parse_args
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head; gives the job server's address and the environment that its clients need."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    environment = clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    (dashboard,) = free_ports(1)
    options = (f"--dashboard-port={dashboard}", "--num-cpus=2", "--num-gpus=0")
    address = f"http://127.0.0.1:{dashboard}"
    probe = [sys.executable, "-m", "cape.cli", "status", "--address", address]
    with ray_start("head", folder, environment, *options) as node:
        end = time.monotonic() + 90
        while subprocess.run(probe, env=environment, capture_output=True).returncode:
            assert node.process.poll() is None and time.monotonic() < end, node.log.read_text()[-2000:]
        yield address, environment


@pytest.mark.endurance
def test_a_sweep_is_submitted_followed_attached_to_and_stopped(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head
    spec, out = tmp_path / "spec.json", tmp_path / "meta"
    spec.write_text(SPEC.to_json())

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "cape.cli", *arguments]
        return subprocess.run(
            line, env={**environment, **more}, capture_output=True, text=True, timeout=180, cwd=tmp_path
        )

    without = run("status", "--address", address, RAY_AUTH_MODE="disabled")
    assert without.returncode == 2 and "RAY_AUTH_TOKEN_PATH" in without.stderr and TOKEN not in without.stderr
    sweep = ["submit", "sweep", str(spec), "--out", str(out), "--workers", "1", "--address", address]
    done = run(*sweep)
    assert done.returncode == 0, done.stderr
    job_id = f"cape-sweep-{SPEC.spec_hash}"
    assert f"submitted {job_id}" in done.stderr
    assert "8 rows of 4 trials" in done.stdout  # the job's log
    (path, *_) = list_files(out)
    revision = pq.read_schema(path).metadata[b"cape_git_revision"].decode()
    assert "wheel." in revision  # the code that was sent, not what is installed here
    before = {p: p.stat().st_mtime_ns for p in list_files(out)}
    again = run(*sweep)
    assert again.returncode == 0 and f"submitted {job_id}" in again.stderr  # it is over: run again, with nothing to do
    assert "8 rows of 4 trials" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in list_files(out)} == before
    for file in out.rglob("*"):
        if file.is_file() and file.suffix != ".parquet":
            assert TOKEN.encode() not in file.read_bytes()

    larger = SPEC.replace(trials_per_cell=5000)
    spec.write_text(larger.to_json())
    detached = run(*sweep, "--no-follow")
    assert detached.returncode == 0, detached.stderr
    listed = run("status", "--address", address).stdout
    attached = run(*sweep, "--no-follow")
    assert attached.returncode == 0 and "attaching" in attached.stderr
    (running,) = [line.split()[0] for line in listed.splitlines() if larger.spec_hash in line]
    end = time.monotonic() + 90
    while reader.count_rows(out) <= 8 and time.monotonic() < end:
        time.sleep(0.2)
    stopped = run("stop", running, "--address", address)
    assert stopped.returncode == 0 and stopped.stdout.split() == [running, "STOPPED"], stopped.stderr
    assert 8 < reader.count_rows(out) < 10_000
    assert b'"interrupted"' in (Location.of(out).read("_status.json") or b"")
    missing = run("stop", "cape-sweep-none", "--address", address)
    assert missing.returncode == 2 and "no job" in missing.stderr
    failing = run("submit", "--address", address, "--installed", "sweep", str(spec), "--out", "/dev/null/x")
    assert failing.returncode == 2 and "ended as FAILED" in failing.stderr


def test_the_wheel_is_named_by_its_content_and_holds_no_dependencies(tmp_path: Path) -> None:
    first, second = (submit.build_wheel(tmp_path / name) for name in ("a", "b") if not (tmp_path / name).mkdir())
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as wheel:
        names = wheel.namelist()
        assert "cape/__init__.py" in names and "cape/_revision.txt" in names
        assert not [n for n in names if "__pycache__" in n]
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Requires-Dist" not in metadata  # a worker needs no package index
    version = metadata.split("Version: ")[-1].strip()
    assert version in first.name and "+" in version
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(target), str(first)]
    done = subprocess.run([*command, "--quiet", "--disable-pip-version-check"], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0 and (target / "cape" / "cli.py").is_file(), done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["submit", "sweep", "smoke", "--out", "x", "--address", "head:8265"], "begins with http"),
        (["submit", "dance", "--address", "http://127.0.0.1:9"], "cannot be submitted"),
        (["submit", "sweep", "smoke", "--out", "x", "--address", "http://user:pass@127.0.0.1:9"], "no job server"),
        (["status", "--address", "http://127.0.0.1:9"], "no job server"),
        (["stop", "x", "--address", "http://127.0.0.1:9"], "no job server"),
    ],
)
def test_what_is_wrong_is_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "pass@" not in said


class Jobs:
    """A job server that takes an id once, as Ray's does."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(submission_id=i, status=SimpleNamespace(value=state)) for i, state in self.states.items()
        ]

    def submit_job(self, *, submission_id: str, **_: Any) -> None:
        assert submission_id not in self.states
        self.states[submission_id] = "PENDING"


def test_a_job_that_is_over_runs_again_and_one_that_runs_is_attached_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = Jobs()
    monkeypatch.setattr(submit, "connect", lambda _: jobs)

    def send() -> str:
        return submit.submit("fit", ["meta", "--out", "model"], "http://head:8265", PARSE, ship=False, follow=False)

    first = send()
    for state in ("PENDING", "RUNNING"):
        jobs.states[first] = state
        assert send() == first and f"({state}); attaching" in capsys.readouterr().err
    for number, state in enumerate(("SUCCEEDED", "FAILED", "STOPPED"), start=2):
        jobs.states = {**dict.fromkeys(jobs.states, "STOPPED"), list(jobs.states)[-1]: state}
        assert send() == send() == f"{first}-{number}"
    assert len(jobs.states) == 4


def test_a_sweep_needs_a_place_to_write_to(tmp_path: Path) -> None:
    for arguments in (
        ["smoke"],
        ["smoke", "--out"],
        ["smoke", "--out="],
        ["--out", "x", "smoke"],
        ["smoke", "--owt=x"],
    ):
        with pytest.raises(SpecError, match="--out|expected one argument|--owt"):
            submit._prepare("sweep", arguments, PARSE, Path(tempfile.mkdtemp(dir=tmp_path)))


def test_both_ways_to_write_an_option_are_one_job(tmp_path: Path) -> None:
    made = []
    for i, out in enumerate((["--out", "/mnt/x"], ["--out=/mnt/x"])):
        (tmp_path / str(i)).mkdir()
        made.append(submit._prepare("sweep", ["smoke", "--data=auto", *out], PARSE, tmp_path / str(i)))
    assert made[0][0] == made[1][0]
    for _, line in made:
        words = shlex.split(line)
        assert words[:4] == ["python", "-m", "cape.cli", "sweep"]
        parsed = cli.build_parser().parse_args(words[3:])
        assert (parsed.spec, parsed.out, parsed.address, parsed.resume) == ("spec.json", "/mnt/x", "auto", True)
