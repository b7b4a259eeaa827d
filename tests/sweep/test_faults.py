"""Whatever is killed, a resume completes the plan: every trial once, with the same numbers.

Real processes, real signals. ``CAPE_FAULT_TABLE=FILE`` writes what was counted in each case.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cape.config import StoppingRule, SweepSpec
from cape.store import reader
from cape.store.verify import Verification, verify
from cape.sweep.driver import run_sweep
from cape.sweep.inline import run_inline
from cape.sweep.plan import Plan
from cape.sweep.shard_run import FLIGHTS, TRIES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SLOW = SweepSpec(
    name="slow",
    families=("slow",),
    datasets=("digits",),
    lrs=(1e-3, 2e-3),
    batch_sizes=(8,),
    epsilons=(0.9, 0.8),
    trials_per_cell=15,
    stopping=StoppingRule(max_steps=30),
)
IMPORTS = ("faulty",)
QUICK: dict[str, Any] = {"chunk_seconds": 0.3, "imports": IMPORTS, "progress": False}
TOTAL = 60  # rows of SLOW


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], tuple[Any, ...]]:
    """The numbers of SLOW, measured in peace."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker of one CPU: sums over threads differ in their last bits
    out = run_inline(SLOW, tmp_path_factory.mktemp("truth"), **QUICK).out
    torch.set_num_threads(threads)
    return numbers(Path(out))


def numbers(out: Path) -> dict[tuple[str, float], tuple[Any, ...]]:
    columns = ["trial_id", "epsilon", "t_star", "log_g2", "final_loss"]
    rows = reader.read(out, columns=columns).to_pylist()
    return {(r["trial_id"], r["epsilon"]): (r["t_star"], r["log_g2"], r["final_loss"]) for r in rows}


def check(out: Path) -> Verification:
    return verify(out, lambda spec: Plan(spec).all_ids())


def account(what: str, before: int, out: Path, **more: Any) -> None:
    """Assert that a sweep is complete and sound, and write a line of the fault table."""
    found = check(out)
    assert found.sound and found.missing == 0, str(found)
    if table := os.environ.get("CAPE_FAULT_TABLE"):
        path = Path(table)
        lines = json.loads(path.read_text()) if path.exists() else []
        lines = [line for line in lines if line["killed"] != what]
        counted = {"rows_before": before, "rows_after": found.rows, "planned_trials": found.planned}
        lines.append({"killed": what, **counted, "duplicates": found.duplicates, "sound": found.sound, **more})
        path.write_text(json.dumps(lines, indent=1) + "\n")


def command(spec: SweepSpec, out: Path, *options: str) -> tuple[list[str], dict[str, Any]]:
    path = out.parent / "spec.json"
    path.write_text(spec.to_json())
    line = [sys.executable, "-m", "cape.cli", "sweep", str(path), "--out", str(out), "--import", "faulty"]
    line += ["--quiet", "--resume", "--chunk-seconds", "0.3", *options]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
    return line, {"env": environment, "cwd": out.parent, "stderr": subprocess.PIPE, "text": True}


def start(spec: SweepSpec, out: Path, *options: str) -> subprocess.Popen[str]:
    line, settings = command(spec, out, *options)
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, **settings)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def workers(out: Path) -> list[int]:
    """Return the processes that have a trial under way."""
    found = []
    for path in (out / FLIGHTS).glob("*.json"):
        try:
            record = json.loads(path.read_text().split("\n", 1)[0])
        except (ValueError, FileNotFoundError):
            continue
        if record["trials"] and alive(record["pid"]):
            found.append(record["pid"])
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def some_rows(out: Path, most: int = TOTAL - 12) -> Callable[[], int]:
    def count() -> int:
        rows = reader.count_rows(out)
        assert rows <= most, "too late: the sweep was faster than the test"
        return rows

    return count


def address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "meta"


def test_a_worker_that_is_killed_twice(ray_session: None, out: Path, truth: dict) -> None:
    before: list[int] = []

    def kill() -> None:
        for _ in range(2):
            wait_for(some_rows(out))
            pid = wait_for(lambda: workers(out))[0]
            before.append(reader.count_rows(out))
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: not alive(pid))

    killer = threading.Thread(target=kill)
    killer.start()
    result = run_sweep(SLOW, out, workers=2, **QUICK)
    killer.join()
    assert (result.rows, result.failed, len(before)) == (TOTAL, 0, 2)
    assert numbers(out) == truth
    account("worker, SIGKILL in mid-chunk, twice", before[0], out)


def test_a_driver_that_is_killed_and_one_that_is_interrupted(ray_session: None, out: Path, truth: dict) -> None:
    driver = start(SLOW, out, "--address", address(), "--workers", "1")
    try:
        before = wait_for(some_rows(out))
    finally:
        driver.kill()
        driver.wait()
    # Its workers live a little longer; what they do from now on is fenced off by the run that takes over.
    second = start(SLOW, out, "--address", address(), "--workers", "1")
    wait_for(lambda: some_rows(out)() > before)
    between = reader.count_rows(out)
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert between <= reader.count_rows(out) < TOTAL
    stopped = reader.count_rows(out)
    result = run_sweep(SLOW, out, resume=True, workers=2, **QUICK)
    assert (result.rows, result.failed) == (TOTAL, 0)
    assert numbers(out) == truth
    account("driver, SIGKILL", before, out)
    account("driver, Ctrl-C (SIGINT)", stopped, out)


def test_trials_that_crash_hang_or_poison_their_device_are_given_up(ray_session: None, out: Path) -> None:
    import faulty

    families = ("crashing", "hanging", "poisoned")
    spec = SLOW.replace(families=families, trials_per_cell=2)

    def bad(spec: SweepSpec) -> dict[str, str]:
        return {t.trial_id: t.family for t in Plan(spec).trials() if faulty.is_bad(t.seed_for("init"))}

    while sorted(bad(spec).values()) != sorted(families):  # one bad trial of each
        spec = spec.replace(seed=spec.seed + 1)
    result = run_sweep(spec, out, workers=2, trial_seconds=1.0, **QUICK)
    assert (result.trials, result.failed) == (12, 3)
    rows = {r["trial_id"]: r for r in reader.read(out).to_pylist() if r["stop_reason"] == "failed"}
    assert {i: r["family"] for i, r in rows.items()} == bad(spec)
    errors = {r["family"]: r["error"] for r in rows.values()}
    assert errors["crashing"] == "given up after 3 tries: its process died without an exception"
    assert errors["hanging"] == "given up after 3 tries: no result within its time budget of 1 s"
    assert errors["poisoned"].startswith("given up after 3 tries: AcceleratorError: CUDA error: device-side assert")
    assert not list((out / TRIES).glob("*")) and not list((out / FLIGHTS).glob("*"))
    account("trial that crashes its process / hangs / poisons its device", 0, out, failed=result.failed)


def test_a_trial_that_crashes_the_only_process_is_given_up_at_the_third_resume(out: Path) -> None:
    import faulty

    spec = SLOW.replace(families=("crashing",), trials_per_cell=2, lrs=(1e-3,))
    while sum(faulty.is_bad(t.seed_for("init")) for t in Plan(spec).trials()) != 1:
        spec = spec.replace(seed=spec.seed + 1)
    line, settings = command(spec, out, "--inline")
    codes = [subprocess.run(line, **settings).returncode for _ in range(4)]
    assert codes == [-9, -9, -9, 0]
    assert check(out).failed == 1
    account("inline process, by its own trial, three times", 0, out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_loses_nothing(small_disk: Path, truth: dict) -> None:
    out = small_disk / "meta"
    line, settings = command(SLOW, out, "--inline")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (1024 - 160) * 1024)
    done = subprocess.run(line, **settings)
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    before = reader.count_rows(out)
    assert 0 < before < TOTAL and check(out).sound
    filler.unlink()
    done = subprocess.run(line, **settings)
    assert done.returncode == 0, done.stderr
    assert numbers(out) == truth
    account("disk, full", before, out)


def test_a_corrupt_chunk_is_set_aside_and_run_again(out: Path, truth: dict, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run_inline(SLOW, out, **QUICK)
    broken = reader.list_files(out)[1]
    broken.write_bytes(broken.read_bytes()[:1000])
    lost = check(out)
    assert [name.rsplit("/", 1)[-1] for name, _ in lost.unreadable] == [broken.name]
    run_inline(SLOW, out, resume=True, **QUICK)
    assert f"set aside as _corrupt/{broken.name}" in capsys.readouterr().err
    assert numbers(out) == truth
    account("chunk, truncated", lost.rows, out)


def test_two_runs_at_once_are_refused(ray_session: None, out: Path) -> None:
    first = start(SLOW, out, "--address", address(), "--workers", "1")
    try:
        wait_for(some_rows(out))
        line, settings = command(SLOW, out, "--inline")
        second = subprocess.run(line, **settings)
        assert second.returncode == 2 and f"process {first.pid}" in second.stderr
        told = [sys.executable, "-m", "cape.cli", "sweep", "status", str(out)]
        seen = subprocess.run(told, capture_output=True, text=True, cwd=ROOT)
        assert seen.returncode == 0 and seen.stdout.startswith("running") and "/30 trials" in seen.stdout
    finally:
        first.terminate()  # as `ray job stop` does
        _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and "--resume" in said


@pytest.mark.slow
def test_ten_rounds_of_killing_at_random_moments(ray_session: None, out: Path, truth: dict) -> None:
    """Each round kills a worker or the driver, whatever it is doing then; the last one runs to the end."""
    chance = random.Random(5)
    killed = []
    driver: subprocess.Popen[str] | None = None
    before = 0
    for _ in range(10):
        if driver is None or driver.poll() is not None:
            driver = start(SLOW, out, "--address", address(), "--workers", "2")
            wait_for(lambda d=driver: workers(out) or d.poll() is not None)
        time.sleep(chance.uniform(0.0, 0.6))
        targets = workers(out)
        before = reader.count_rows(out)
        if driver.poll() is not None:
            killed.append("nothing: it was done")
        elif targets and chance.random() < 0.5:
            os.kill(chance.choice(targets), signal.SIGKILL)
            killed.append("worker")
        else:
            driver.kill()
            driver.wait()
            killed.append("driver")
    assert killed.count("worker") >= 2 and killed.count("driver") >= 2, killed
    if driver is not None and driver.poll() is None:
        driver.kill()
        driver.wait()
    result = run_sweep(SLOW, out, resume=True, workers=2, **QUICK)
    assert (result.rows, result.failed) == (TOTAL, 0)
    assert numbers(out) == truth
    account("random: a worker or the driver, ten rounds", before, out, rounds=killed)
