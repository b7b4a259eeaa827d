"""Whatever is killed, a resume completes the plan: every trial once, with the same numbers.

Real processes, real signals. ``CAPE_FAULT_TABLE=FILE`` writes what was counted in each case.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
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
from cape.sweep.job import SweepResult
from cape.sweep.plan import Plan
from cape.sweep.shard_run import FLIGHTS, MAX_TRIES, TRIES
from tests.files import list_files
from tests.sweep.nodes import counters

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


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As a worker of one CPU: sums over threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], tuple[Any, ...]]:
    """The numbers of SLOW, measured in peace."""
    return numbers(Path(run_inline(SLOW, tmp_path_factory.mktemp("truth"), **QUICK).out))


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


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
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


def test_a_worker_that_is_killed_in_mid_chunk(ray_session: None, out: Path, truth: dict) -> None:
    before: list[int] = []

    def kill() -> None:
        wait_for(some_rows(out))
        pid = wait_for(lambda: workers(out))[0]
        before.append(reader.count_rows(out))
        os.kill(pid, signal.SIGKILL)

    earlier = counters("slow")
    killer = threading.Thread(target=kill)
    killer.start()
    result = run_sweep(SLOW, out, workers=2, **QUICK)
    killer.join()
    assert (result.rows, result.failed, len(before)) == (TOTAL, 0, 1)
    assert numbers(out) == truth
    events = [json.loads(line)["event"] for line in (out / "_log.jsonl").read_text().splitlines()]
    assert events.count("worker died") == 1
    # What a worker counts right before its end may be lost with it; nothing is counted twice.
    counted = wait_for(lambda: {key: value for key, value in counters("slow").items() if key not in earlier})
    sums = {what: sum(value for (name, _), value in counted.items() if what in name) for what in ("trials", "rows")}
    assert 0 < sums["trials"] <= TOTAL / 2 and 0 < sums["rows"] <= TOTAL, counted
    account("worker, SIGKILL in mid-chunk", before[0], out)


def test_a_driver_that_is_killed_and_one_that_is_interrupted(ray_session: None, out: Path, truth: dict) -> None:
    driver = start(SLOW, out, "--address", address(), "--workers", "2")
    try:
        before = wait_for(some_rows(out))
        told = run_at_once("sweep", "status", str(out))
        assert told[0] == 0 and told[1].startswith("running") and "/30 trials" in told[1]
        refused = run_at_once("sweep", str(out.parent / "spec.json"), "--out", str(out), "--resume", "--inline")
        assert refused[0] == 2 and f"process {driver.pid}" in refused[2]  # two runs at once
    finally:
        driver.kill()
        driver.wait()
    # Its workers live a little longer; what they do from now on is fenced off by the run that takes over.
    more = SLOW.replace(trials_per_cell=30)  # and extends the sweep
    second = start(more, out, "--address", address(), "--workers", "2")
    wait_for(lambda: reader.count_rows(out) > max(before, TOTAL // 2))
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 130 and "--resume" in said and "Traceback" not in said
    stopped = reader.count_rows(out)
    assert stopped < 2 * TOTAL
    result = run_sweep(more, out, resume=True, workers=2, **QUICK)
    assert (result.rows, result.failed) == (2 * TOTAL, 0)
    assert truth.items() <= numbers(out).items()
    account("driver, SIGKILL; then extended", before, out)
    account("driver, Ctrl-C (SIGINT)", stopped, out)


def run_at_once(*arguments: str) -> tuple[int, str, str]:
    """Run ``cape ...`` in this process (a new one takes seconds to import torch, and the sweep would be over)."""
    from cape import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*arguments, *(["--import", "faulty", "--quiet"] if arguments[1] != "status" else [])])
    return code, out.getvalue(), err.getvalue()


def bad_trials(spec: SweepSpec) -> dict[str, str]:
    import faulty

    return {t.trial_id: t.family for t in Plan(spec).trials() if faulty.is_bad(t.seed_for("init"), t.family)}


def with_one_bad_trial_each(spec: SweepSpec) -> SweepSpec:
    while sorted(bad_trials(spec).values()) != sorted(spec.families):
        spec = spec.replace(seed=spec.seed + 1)
    return spec


def given_up(out: Path) -> dict[str, tuple[str, str]]:
    """Return (family, error) of the trials that were recorded as failed."""
    rows = [r for r in reader.read(out).to_pylist() if r["stop_reason"] == "failed"]
    return {r["trial_id"]: (r["family"], r["error"]) for r in rows}


def run_and_watch(spec: SweepSpec, out: Path, **settings: Any) -> tuple[SweepResult, dict[int, str]]:
    """Run a sweep of two workers; return its result and, by process, what ended those that could say so."""
    blamed: dict[int, str] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            for path in (out / FLIGHTS).glob("*.json"):
                with contextlib.suppress(ValueError, FileNotFoundError):
                    record = json.loads(path.read_text().split("\n", 1)[0])
                    if record["error"]:
                        blamed[record["pid"]] = record["error"]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return run_sweep(spec, out, workers=2, **QUICK, **settings), blamed
    finally:
        ended.set()
        watcher.join()


def test_trials_that_crash_or_poison_their_worker_are_given_up(ray_session: None, out: Path) -> None:
    families = ("crashing", "poisoned")
    spec = with_one_bad_trial_each(SLOW.replace(families=families, lrs=(1e-3,), trials_per_cell=2))
    result, blamed = run_and_watch(spec, out)
    assert (result.trials, result.failed) == (4, 2)
    failed = given_up(out)
    assert {i: family for i, (family, _) in failed.items()} == bad_trials(spec)
    errors = dict(failed.values())
    assert errors["crashing"] == "given up after 3 tries: its process died without an exception"
    assert errors["poisoned"].startswith("given up after 3 tries: AcceleratorError: CUDA error: device-side assert")
    # A process whose device is poisoned is not used again: each try had a process of its own.
    assert len(blamed) == MAX_TRIES and all("AcceleratorError" in error for error in blamed.values())
    wait_for(lambda: not any(alive(pid) for pid in blamed))
    assert not list((out / TRIES).glob("*")) and not list((out / FLIGHTS).glob("*"))
    account("worker, by a trial that always crashes it", 0, out, failed=1)
    account("worker, by a trial that always poisons its device", 0, out, failed=1)


@pytest.mark.endurance
def test_a_trial_that_hangs_its_worker_is_given_up(ray_session: None, out: Path) -> None:
    """The budget is generous: the first trial of a process on a busy machine takes seconds."""
    spec = with_one_bad_trial_each(SLOW.replace(families=("hanging",), lrs=(1e-3,), trials_per_cell=3))
    result, blamed = run_and_watch(spec, out, trial_seconds=20.0)
    assert (result.trials, result.failed) == (3, 1)
    ((failed, (_, error)),) = given_up(out).items()
    assert [failed] == list(bad_trials(spec))
    assert error == "given up after 3 tries: no result within its time budget of 20 s"
    assert len(blamed) >= MAX_TRIES and not any(alive(pid) for pid in blamed)
    account("worker, by a trial that always hangs", 0, out, failed=1)


def test_one_trial_among_many_is_found_in_a_few_deaths(out: Path) -> None:
    """Of 64 trials of one shard, one always ends the process: in sections it is soon the only suspect."""
    spec = SLOW.replace(families=("crashing_among_many",), trials_per_cell=64, lrs=(1e-3,))
    spec = with_one_bad_trial_each(spec)
    settings = {**QUICK, "resume": True, "chunk_seconds": 5.0}
    codes: list[int | None] = []
    suspects: list[int] = []
    while 0 not in codes and len(codes) < 20:
        process = multiprocessing.get_context("fork").Process(target=run_inline, args=(spec, out), kwargs=settings)
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        records = [json.loads(path.read_text().split("\n", 1)[0]) for path in (out / FLIGHTS).glob("*.json")]
        suspects += [len(record["trials"]) for record in records]
    # A stack of 16 and the one that is built for it; at most an eighth of them; the one alone, three times.
    first, *later = suspects
    assert 1 < first <= 17 and all(count <= 3 for count in later) and later[-3:] == [1, 1, 1]
    assert set(codes[:-1]) == {-9} and codes[-1] == 0 and len(codes) <= 1 + 1 + MAX_TRIES + 1
    assert {i: family for i, (family, _) in given_up(out).items()} == bad_trials(spec)
    account("inline process, by one trial of a stack", 0, out, failed=1)


@pytest.mark.parametrize("family", ["hanging", "crashing"])
def test_a_trial_that_takes_the_only_process_with_it_is_given_up(out: Path, family: str) -> None:
    """No Ray: driver and worker are one process, and each resume is another (forked: importing torch takes longer)."""
    spec = with_one_bad_trial_each(SLOW.replace(families=(family,), trials_per_cell=1, lrs=(1e-3,)))
    settings = {**QUICK, "resume": True, "trial_seconds": 0.5}
    codes = []
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=run_inline, args=(spec, out), kwargs=settings)
        process.start()
        process.join(60)
        codes.append(process.exitcode)
    assert codes == [-9, -9, -9, 0]
    reason = "no result within its time budget of 0.5 s" if family == "hanging" else "its process died"
    ((failed, error),) = given_up(out).values()
    assert failed == family and error.startswith(f"given up after 3 tries: {reason}")
    account(f"inline process, by a {family} trial", 0, out, failed=1)


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
    run_inline(SLOW, out, **QUICK)
    broken = list_files(out)[1]
    name = reader.list_chunks(out)[1]
    broken.write_bytes(broken.read_bytes()[:1000])
    lost = check(out)
    assert [name.rsplit("/", 1)[-1] for name, _ in lost.unreadable] == [broken.name]
    run_inline(SLOW, out, resume=True, **QUICK)
    assert f"set aside as _corrupt/{name}" in capsys.readouterr().err
    assert numbers(out) == truth
    account("chunk, truncated", lost.rows, out)


@pytest.mark.endurance
def test_ten_rounds_of_killing_at_random_moments(ray_session: None, out: Path, truth: dict) -> None:
    """Each round ends a worker or the driver, whatever it is doing then; the last run goes to the end."""
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
        elif targets and chance.random() < 0.6:
            os.kill(chance.choice(targets), signal.SIGKILL)
            killed.append("worker: SIGKILL")
        else:
            how = chance.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])  # SIGTERM: as `ray job stop` does
            driver.send_signal(how)
            _, said = driver.communicate(timeout=60)
            assert driver.returncode in (-signal.SIGKILL, 130), said
            killed.append(f"driver: {how.name}")
    ended = {what.split(":")[0] for what in killed}
    assert {"worker", "driver"} <= ended, killed
    if driver is not None and driver.poll() is None:
        driver.kill()
        driver.wait()
    result = run_sweep(SLOW, out, resume=True, workers=2, **QUICK)
    assert (result.rows, result.failed) == (TOTAL, 0)
    assert numbers(out) == truth
    account("random: a worker or the driver, ten rounds", before, out, rounds=killed)
