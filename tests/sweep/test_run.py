"""Sweeps of real trials, in this process and on a real Ray."""

from __future__ import annotations

import ast
import collections
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
import torch

from cape.config import StoppingRule, SweepSpec
from cape.errors import DataError, SpecError, StoreError
from cape.store import reader
from cape.store.claims import Claim, start_run
from cape.store.retry import retry
from cape.store.verify import verify
from cape.sweep import driver, shard_run
from cape.sweep.actor import ShardWorker
from cape.sweep.driver import _share, run_sweep
from cape.sweep.inline import run_inline
from cape.sweep.job import Job, running
from cape.sweep.plan import Plan, Shard
from cape.trial import device_name
from tests.files import list_files

SPEC = SweepSpec(
    name="test",
    families=("mlp",),
    datasets=("digits",),
    lrs=(1e-3, 2e-3),
    batch_sizes=(8,),
    epsilons=(0.5, 0.3),
    trials_per_cell=6,
    stopping=StoppingRule(max_steps=200),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """What a Ray worker of one CPU has: sums over threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


QUICK = {"progress": False, "chunk_seconds": 0.05}


def table(out: Path) -> dict[tuple[str, float], tuple[int | None, list[float], float]]:
    """Return (t_star, losses, log_g2) of every row by trial and ε, and check that no row is there twice."""
    rows = reader.read(out).to_pylist()
    found = {(r["trial_id"], r["epsilon"]): (r["t_star"], r["losses"], r["log_g2"]) for r in rows}
    assert len(found) == len(rows)
    return found


def test_inline_writes_every_trial_once(tmp_path: Path) -> None:
    result = run_inline(SPEC, tmp_path / "a", **QUICK)
    plan = Plan(SPEC)
    assert (result.rows, result.trials, result.failed) == (24, 12, 0)
    assert result.out == tmp_path / "a" and result.seconds > 0
    assert {key[0] for key in table(result.out)} == {t.trial_id for t in plan.trials()}
    assert len(list_files(result.out)) > 1
    schema = pq.read_schema(list_files(result.out)[0])
    origin = {k.decode(): v.decode() for k, v in schema.metadata.items() if k.startswith(b"cape_")}
    assert origin["cape_spec_hash"] == SPEC.spec_hash and origin["cape_precision"] == "float32"
    assert origin["cape_schema_version"] == "1" and origin["cape_version"] and origin["cape_git_revision"]
    assert origin["cape_device"] == device_name(torch.device("cpu"))
    again = run_inline(SPEC, tmp_path / "b", **QUICK)
    assert table(again.out) == table(result.out)


def test_ray_gives_the_same_numbers_and_resumes_what_is_missing(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched() -> None:
        raise AssertionError("the driver touched CUDA, and would hold a context on every GPU that it sees")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    ray = run_sweep(SPEC, tmp_path / "ray", workers=2, **QUICK)
    inline = run_inline(SPEC, tmp_path / "inline", **QUICK)
    assert (ray.rows, ray.trials, ray.failed) == (inline.rows, inline.trials, inline.failed)
    whole = table(inline.out)
    assert table(ray.out) == whole
    assert isinstance(ray.out, Path)
    left = {p.name for p in ray.out.iterdir()} - {".lock", ".tmp", "rows", "_rows.0"}
    assert left == {"_spec.json", "_specs", "_status.json", "_log.jsonl", "_flights"}  # not Tune's state, not a claim
    assert not list((ray.out / ".tmp").iterdir()) and not list((ray.out / "_flights").iterdir())

    files = list_files(ray.out)
    kept = {p: p.stat().st_mtime_ns for p in files[2:]}
    for path in files[:2]:
        path.unlink()
    assert 0 < len(table(ray.out)) < 24
    with pytest.raises(StoreError, match="--resume"):
        run_sweep(SPEC, ray.out, **QUICK)
    result = run_sweep(SPEC, ray.out, resume=True, workers=2, **QUICK)
    assert (result.rows, result.trials) == (24, 12)
    assert table(ray.out) == whole
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_nothing_is_started_where_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_inline(SPEC, tmp_path, **QUICK)
    monkeypatch.setattr("cape.sweep.driver._tune", None)
    assert run_sweep(SPEC, tmp_path, resume=True, **QUICK).rows == 24


def test_an_interrupted_sweep_keeps_its_chunks_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = shard_run.ShardRun.step, collections.Counter[str]()

    def stop_at_the_third(self: shard_run.ShardRun) -> dict[str, Any]:
        calls["step"] += 1
        if calls["step"] == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(shard_run.ShardRun, "step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_inline(SPEC, tmp_path, **QUICK)
    assert "--resume" in capsys.readouterr().err
    before = table(tmp_path)
    assert 0 < len(before) < 24
    monkeypatch.setattr(shard_run.ShardRun, "step", step)
    run_inline(SPEC, tmp_path, resume=True, **QUICK)
    after = table(tmp_path)
    assert len(after) == 24 and before.items() <= after.items()


def test_a_second_attempt_at_a_shard_leaves_what_the_first_committed(tmp_path: Path) -> None:
    shard = Shard(Plan(SPEC).groups[0], range(6))
    with running(SPEC, tmp_path, resume=False, data_root=None, chunk_seconds=0.05) as (job, _):
        lost = shard_run.ShardRun(job, shard, "cpu")
        first = lost.step()
        assert 0 < first["trials"] < 6 and not first["done"]
        second, trials = shard_run.ShardRun(job, shard, "cpu"), 0
        # The first worker was given up for lost and lives: it must not commit what the second one runs.
        fenced = lost.step()
        assert fenced["fenced"] and fenced["done"] and fenced["trials"] == 0
        done = False
        while not done:
            chunk = second.step()
            done, trials = chunk["done"], trials + chunk["trials"]
        assert trials == 6 - first["trials"]
        assert len(table(tmp_path)) == 12
        assert shard_run.ShardRun(job, shard, "cpu").step()["done"]


def test_what_a_worker_commits_while_its_shard_is_taken_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was given up for lost commits right after the second one has read what is committed."""
    shard = Shard(Plan(SPEC).groups[0], range(6))
    with running(SPEC, tmp_path, resume=False, data_root=None, chunk_seconds=0.05) as (job, _):
        lost = shard_run.ShardRun(job, shard, "cpu")
        lost.step()
        read = reader.done_trials

        def late(*of: Any) -> set[str]:
            found = read(*of)
            monkeypatch.undo()
            assert lost.step()["fenced"]
            return found

        monkeypatch.setattr(reader, "done_trials", late)
        second = shard_run.ShardRun(job, shard, "cpu")
        while not second.step()["done"]:
            pass
    assert len(table(tmp_path)) == 12


def test_who_lost_a_shard_leaves_no_notes_on_it(tmp_path: Path) -> None:
    claim, after, third = (Claim(tmp_path, run, "shard") for run in [start_run(tmp_path)] * 3)
    claim.take()
    claim.note({"done": 1})
    after.take()
    claim.note({"done": 2})
    assert after.earlier["done"] == 1 and after.holds() and not claim.holds()
    third.take()
    assert third.earlier["done"] == 1  # the second died before it noted anything


def test_no_worker_of_an_earlier_pass_commits_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(SPEC, tmp_path, resume=False, data_root=None, chunk_seconds=0.05) as (job, _):
        lost: list[shard_run.ShardRun] = []

        def tune(job: Job, shards: list[Shard], *_: Any) -> tuple[str | None, bool]:
            if lost:
                assert lost[0].step()["fenced"]
                return None, False
            lost.append(shard_run.ShardRun(job, shards[0], "cpu"))
            assert lost[0].step()["trials"]
            return "its node is gone", False

        monkeypatch.setattr(driver, "_tune", tune)
        assert driver._passes(job, Plan(SPEC).missing(), None, 1, 0, 1, None) is None  # type: ignore[arg-type]
    assert lost


def test_a_death_counts_once_however_often_its_record_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives a trial up may lose the shard before it commits that, and leaves the record to the next one."""
    shard = Shard(Plan(SPEC).groups[0], range(6))
    trial = next(iter(Plan(SPEC).trials_of(shard))).trial_id

    def died(job: Job, number: int) -> None:
        about = {"run": job.run, "shard": shard.key, "inline": False, "pid": 1, "trials": [trial], "error": None}
        (tmp_path / shard_run.FLIGHTS).mkdir(exist_ok=True)
        (tmp_path / shard_run.FLIGHTS / f"{number}.json").write_text(json.dumps(about))

    with running(SPEC, tmp_path, resume=False, data_root=None, chunk_seconds=0.05) as (job, _):
        for number in range(shard_run.MAX_TRIES):
            died(job, number)
            with monkeypatch.context() as lost:
                lost.setattr(shard_run.ShardRun, "_commit", lambda self, rows: None)
                shard_run.ShardRun(job, shard, "cpu")
                shard_run.ShardRun(job, shard, "cpu")
        shard_run.ShardRun(job, shard, "cpu")
    rows = [r for r in reader.read(tmp_path).to_pylist() if r["trial_id"] == trial]
    assert {r["error"] for r in rows} == {"given up after 3 tries: its process died without an exception"}
    assert not list((tmp_path / shard_run.FLIGHTS).glob("*"))


def test_a_trial_that_fails_is_counted_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cape import families

    family = families.get("mlp")
    build, unlucky = type(family).build, next(Plan(SPEC).trials())

    def sometimes(self: Any, spec: Any) -> torch.nn.Module:
        if torch.initial_seed() == unlucky.seed_for("init"):
            raise RuntimeError("out of luck")
        return build(self, spec)

    monkeypatch.setattr(type(family), "build", sometimes)
    result = run_inline(SPEC, tmp_path, **QUICK)
    assert (result.trials, result.failed, result.rows) == (12, 1, 24)
    rows = [r for r in reader.read(tmp_path).to_pylist() if r["stop_reason"] == "failed"]
    assert {(r["trial_id"], r["error"]) for r in rows} == {(unlucky.trial_id, "RuntimeError: out of luck")}

    # A resume passes over it, until it is forgotten.
    again = run_inline(SPEC, tmp_path, resume=True, **QUICK)
    assert (again.trials, again.failed) == (12, 1)
    with pytest.raises(StoreError, match="holds no rows, and so no failed trial"):
        retry(tmp_path / "nothing")
    before = table(tmp_path)
    done = retry(tmp_path)
    assert done.trials == 1 and "1 failed trials" in str(done)
    left = table(tmp_path)
    assert left == {key: row for key, row in before.items() if key[0] != unlucky.trial_id} and len(left) == 22
    assert "nothing was changed" in str(retry(tmp_path))
    monkeypatch.setattr(type(family), "build", build)
    mended = run_inline(SPEC, tmp_path, resume=True, **QUICK)
    assert (mended.trials, mended.failed) == (12, 0)
    assert verify(tmp_path, lambda spec: Plan(spec).all_ids()).sound
    assert len(table(tmp_path)) == 24 and not reader.count_rows(tmp_path, pds.field("stop_reason") == "failed")


def test_failed_trials_alone_leave_an_empty_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cape import families

    def never(self: Any, spec: Any) -> torch.nn.Module:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(families.get("mlp")), "build", never)
    assert run_inline(SPEC, tmp_path, **QUICK).failed == 12
    assert retry(tmp_path).trials == 12 and reader.list_chunks(tmp_path) == []
    monkeypatch.undo()
    assert run_inline(SPEC, tmp_path, resume=True, **QUICK).trials == 12
    assert len(table(tmp_path)) == 24


def test_a_folder_of_another_sweep_is_refused_and_untouched(ray_session: None, tmp_path: Path) -> None:
    run_inline(SPEC, tmp_path, **QUICK)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for run in (run_inline, run_sweep):
        with pytest.raises(StoreError, match=r"another sweep: a cell of mlp has 6 trials there and 5 here"):
            run(SPEC.replace(trials_per_cell=5), tmp_path, resume=True, **QUICK)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_sweep_may_be_extended_and_runs_only_what_is_new(tmp_path: Path) -> None:
    first = run_inline(SPEC, tmp_path, **QUICK)
    before, files = table(tmp_path), {p: p.stat().st_mtime_ns for p in list_files(tmp_path)}
    larger = SPEC.replace(trials_per_cell=8, batch_sizes=(8, 16), lrs=(5e-4, *SPEC.lrs))
    second = run_inline(larger, tmp_path, resume=True, **QUICK)
    assert (first.trials, second.trials) == (12, 48)
    after = table(tmp_path)
    assert before.items() <= after.items() and len(after) == 96
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert [s.spec_hash for s in reader.read_specs(tmp_path)] == [SPEC.spec_hash, larger.spec_hash]
    for change, words in (
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"augmented": True}, "augmented is False there and True here"),
        ({"epsilons": (0.5,)}, "epsilons is"),
        ({"lrs": (5e-4, 1e-3)}, "without 0.002"),
        ({"trials_per_cell": 7}, "a cell of mlp has 8 trials there and 7 here"),
        ({"stopping": StoppingRule(max_steps=9)}, "stopping is"),
    ):
        with pytest.raises(StoreError, match=words):
            run_inline(larger.replace(**change), tmp_path, resume=True, **QUICK)
    assert table(tmp_path) == after


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    """A family or a dataset of a spec becomes part of a path only once the registry knows it, and escaped."""
    out = tmp_path / "a" / "meta"
    for change in ({"families": ("../../up",)}, {"datasets": ("../../up",)}):
        with pytest.raises((SpecError, DataError)):
            run_inline(SPEC.replace(**change), out, **QUICK)
    assert not out.exists()
    out.parent.mkdir()
    outside = tmp_path / "up.parquet"
    _write_images(outside)
    name = f"{tmp_path}/a/../up.parquet"
    run_inline(SPEC.replace(datasets=(name,), trials_per_cell=1), out, **QUICK)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "up.parquet"}
    assert {p.name for p in out.parent.iterdir()} == {"meta"}
    assert set(reader.read(out)["dataset"].to_pylist()) == {name}


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Files and specs may come from anyone; only Ray moves Python objects, between its own processes."""
    import cape

    package = Path(cape.__file__).parent
    for path in [*(package / "sweep").glob("*.py"), *(package / "store").glob("*.py"), package / "cli_sweep.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "np.load", "os.system"), (path, called)
                assert not [k for k in node.keywords if k.arg == "shell"], path


def test_a_path_that_is_too_long_to_name_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    """Its bytes are written as %XX: a short path of another script makes a long name."""
    data = tmp_path / ("数" * 40 + ".parquet")
    _write_images(data)
    with pytest.raises(SpecError, match="too long to name a folder"):
        run_inline(SPEC.replace(datasets=(str(data),)), tmp_path / "meta", **QUICK)
    assert not (tmp_path / "meta").exists()


def test_a_module_that_ends_the_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match=r"'ends_at_once' cannot be imported \(SystemExit: 3\)"):
        run_inline(SPEC, tmp_path / "meta", imports=["ends_at_once"], **QUICK)
    with pytest.raises(SpecError, match="A sweep is a SweepSpec, not 'smoke'"):
        run_inline("smoke", tmp_path / "meta", **QUICK)  # type: ignore[arg-type]
    assert not (tmp_path / "meta").exists()


def test_bad_input_is_found_before_anything_starts(tmp_path: Path) -> None:
    out = tmp_path / "meta"
    for error, spec in (
        (SpecError, SPEC.replace(families=("mlpp",))),
        ((SpecError, DataError), SPEC.replace(datasets=("digitz",))),
        (DataError, SPEC.replace(batch_sizes=(10**6,))),
        (SpecError, SPEC.replace(task="sequence")),
        (SpecError, SPEC.replace(families=("encoder",), datasets=("digits@30",))),
    ):
        with pytest.raises(error):
            run_sweep(spec, out, **QUICK)
    with pytest.raises(SpecError, match="workers"):
        run_sweep(SPEC, out, workers=0)
    with pytest.raises(SpecError, match="gpus_per_worker"):
        run_sweep(SPEC, out, gpus_per_worker=-1)
    assert not out.exists()


@pytest.mark.parametrize(
    ("resources", "workers", "gpus", "expected"),
    [
        ({"CPU": 8.0}, None, None, (1, 0.0, 8)),
        ({"CPU": 8.0}, 2, None, (4, 0.0, 2)),
        ({"CPU": 16.0, "GPU": 4.0}, None, None, (1, 1.0, 4)),
        ({"CPU": 16.0, "GPU": 2.0}, None, 0.25, (1, 0.25, 8)),
        ({"CPU": 16.0, "GPU": 2.0}, 3, 0.5, (1, 0.5, 3)),
        ({"CPU": 4.0, "GPU": 8.0}, None, None, (1, 1.0, 4)),
        ({"CPU": 16.0, "GPU": 4.0}, None, 0.0, (1, 0.0, 16)),
    ],
)
def test_what_a_worker_owns(
    resources: dict[str, float], workers: int | None, gpus: float | None, expected: tuple[int, float, int]
) -> None:
    cpus, share, concurrent = _share(resources, workers, gpus)
    assert (cpus, share, concurrent) == expected
    (bundle,) = ShardWorker.default_resource_request({"cpus": cpus, "gpus": share}).bundles
    assert bundle == {"CPU": float(cpus), **({"GPU": share} if share else {})}


def test_a_gpu_that_is_not_there_is_not_waited_for(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="asks for 1 GPU, but the Ray cluster has 0"):
        run_sweep(SPEC, tmp_path, gpus_per_worker=1, **QUICK)


@pytest.mark.parametrize(
    ("address", "words"),
    [(None, "Ray could not be started on this machine: no room."), ("auto", "no Ray cluster at 'auto': no room.")],
)
def test_a_ray_that_does_not_start_is_one_sentence(
    address: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no room.\nmore")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(SpecError, match=words), driver._cluster(address):
        pass


def test_an_error_that_no_worker_escapes_ends_the_sweep(ray_session: None, tmp_path: Path) -> None:
    """The data disappears after the check: no worker can run a trial, and the sweep says so."""
    data = tmp_path / "gone.parquet"
    _write_images(data)
    spec = SPEC.replace(datasets=(str(data),))

    @contextmanager
    def and_delete(*args: Any, **kwargs: Any) -> Iterator[tuple[Job, Any]]:
        with running(*args, **kwargs) as (job, done):
            data.unlink()
            yield job, done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cape.sweep.driver.running", and_delete)
        with pytest.raises(StoreError, match=r"12 of 12 trials are missing .* --resume\. The error was: .*gone"):
            run_sweep(spec, tmp_path / "meta", workers=2, **QUICK)


def _write_images(path: Path) -> None:
    """Write 32 of the bundled digits as a Parquet file of PNG images and labels."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = []
    for pixels in bunch.images[:32]:
        buffer = io.BytesIO()
        Image.fromarray((pixels * 15).astype("uint8")).resize((28, 28)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": bunch.target[:32].tolist()}), path)
