"""What a sweep costs beside its trials: planning, scheduling, committing, resuming.

    python -m benchmarks.sweep plan       a million trials: seconds and memory
    python -m benchmarks.sweep overhead   real MLP trials through Ray: how busy the workers are
    python -m benchmarks.sweep resume     10^5 trials, 99 % done: seconds until the first new trial begins
    python -m benchmarks.sweep costs      seconds of a trial of each family (for cape/sweep/estimate.py)

Each adds its part to ``benchmarks/results/sweep_cpu.json``. The fault table is written by the tests:
``CAPE_FAULT_TABLE=benchmarks/results/sweep_faults.json python -m pytest tests/sweep/test_faults.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.timing import machine
from cape.config import StoppingRule, SweepSpec, TrialSpec
from cape.store import claims, reader, writer
from cape.store.location import Location
from cape.store.schema import PARTITION_COLUMNS, ROW_SCHEMA, partition
from cape.sweep.inline import run_inline
from cape.sweep.job import CHUNK_SECONDS
from cape.sweep.plan import Plan
from cape.sweep.shards import cut

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sweep_cpu.json"
MLP = SweepSpec(name="mlp", families=("mlp",), datasets=("digits",), batch_sizes=(32, 64))


def plan() -> dict[str, Any]:
    """Time a plan of a million trials in a process of its own."""
    code = """
import json, resource, time
from cape.config import SweepSpec
from cape.sweep.plan import Plan
from cape.sweep.shards import cut
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before, start = rss(), time.perf_counter()
plan = Plan(SweepSpec(trials_per_cell=7000)); ids = plan.all_ids()
listed = time.perf_counter() - start
shards = cut(plan.missing(), 64); cutting = time.perf_counter() - start - listed
missing = plan.missing(ids[::2]); resuming = time.perf_counter() - start - listed - cutting
print(json.dumps({"trials": len(plan), "shards_for_64_workers": len(shards), "ids_seconds": listed,
    "cut_seconds": cutting, "missing_seconds": resuming, "peak_memory_mb": rss(), "of_it_imports_mb": before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return dict(json.loads(done.stdout))


def overhead(seconds: float = 40.0, chunk_seconds: float = CHUNK_SECONDS) -> dict[str, Any]:
    """Sweep real MLP trials with one and with two workers of one core each; say how busy they were."""
    import ray

    from cape.sweep.driver import run_sweep

    with tempfile.TemporaryDirectory() as folder:
        trial = MLP.replace(trials_per_cell=4)
        start = time.perf_counter()
        run_inline(trial, f"{folder}/warm", progress=False)
        start = time.perf_counter()
        run_inline(trial, f"{folder}/paced", progress=False)
        pace = (time.perf_counter() - start) / len(Plan(trial))
        found: dict[str, Any] = {"seconds_of_a_trial": pace, "chunk_seconds": chunk_seconds}
        for workers in (1, 2):
            count = max(1, round(workers * seconds / pace / 6))
            spec = MLP.replace(trials_per_cell=count)
            out = Path(folder) / f"workers{workers}"
            ray.init(
                address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False
            )
            cpu, start = time.process_time(), time.perf_counter()
            result = run_sweep(spec, out, workers=workers, progress=False, chunk_seconds=chunk_seconds)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            ray.shutdown()
            found[f"{workers}_workers"] = {
                **_busy(out),
                "trials": result.trials,
                "wall_seconds": wall,
                "driver_cpu_seconds": cpu,
            }
        return found


def _busy(out: Path) -> dict[str, Any]:
    """Return the busy fraction of each worker between its first and its last commit, from the run's log."""
    events = [json.loads(line) for line in (out / "_log.jsonl").read_text().splitlines()]
    chunks = [e for e in events if e["event"] == "chunk" and e["trials"]]
    by_worker: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for chunk in chunks:
        by_worker[chunk["worker"]].append(chunk)
    workers = []
    for mine in by_worker.values():
        # Steady state: chunk after chunk of one shard. What lies between two shards is given by itself: a long sweep
        # has as many shards for each worker as a short one, give or take a logarithm.
        steady = [c for before, c in zip(mine, mine[1:]) if c["shard"] == before["shard"]]
        changes = [c for before, c in zip(mine, mine[1:]) if c["shard"] != before["shard"]]
        spent = {k: sum(c[k] for c in steady) for k in ("run_seconds", "commit_seconds", "waited_seconds")}
        whole = sum(spent.values())
        workers.append(
            {
                "chunks": len(mine),
                "steady_chunks": len(steady),
                "steady_busy_fraction": spent["run_seconds"] / whole,
                "steady_commit_fraction": spent["commit_seconds"] / whole,
                "steady_waiting_fraction": spent["waited_seconds"] / whole,
                "commit_ms_median": 1e3 * statistics.median(c["commit_seconds"] for c in mine),
                "between_chunks_ms_median": 1e3 * statistics.median(c["waited_seconds"] for c in steady),
                "shard_changes": len(changes),
                "between_shards_ms_median": 1e3 * statistics.median(c["waited_seconds"] for c in changes),
                "whole_run_busy_fraction": sum(c["run_seconds"] for c in mine[1:])
                / sum(c["run_seconds"] + c["commit_seconds"] + c["waited_seconds"] for c in mine[1:]),
            }
        )
    first = min(c["time"] - c["run_seconds"] - c["commit_seconds"] for c in chunks)
    last = max(c["time"] for c in chunks)
    rows = sum(c["rows"] for c in chunks)
    ends = sorted(max(c["time"] for c in mine) for mine in by_worker.values())
    return {
        "workers": workers,
        "rows_per_second": rows / (last - first),
        "steady_seconds": last - first,
        "startup_seconds": first - events[0]["time"],
        "workers_end_apart_seconds": ends[-1] - ends[0],
        "shards": len(cut(Plan(reader.read_spec(out)).missing(), len(by_worker))),  # type: ignore[arg-type]
    }


def resume(files: int) -> dict[str, Any]:
    """Resume 10^5 trials that are 99 % done; ``files`` is how many files they lie in."""
    spec = SweepSpec(
        name="large",
        families=("mlp",),
        datasets=("digits",),
        trials_per_cell=11_112,
        stopping=StoppingRule(max_steps=50),
    )
    plan = Plan(spec)
    with tempfile.TemporaryDirectory() as folder:
        out = Location.of(Path(folder) / "meta")
        claims.claim(out, spec)
        base = writer.ensure_rows(out)
        ids = plan.all_ids()
        done = np.array_split(ids[: int(len(ids) * 0.99)], files)
        for part in done:
            names = [f"{i:016x}" for i in part]
            content = writer.to_parquet(_table(names, spec))
            out.write(f"{base}/{partition('mlp', 'digits')}/{writer.chunk_name(names)}", content, durable=False)
        path = Path(folder) / "spec.json"
        path.write_text(spec.to_json())
        command = [sys.executable, "-m", "cape.cli", "sweep", str(path), "--out", str(out), "--resume", "--quiet"]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--workers", "2"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while not list((out.folder or Path()).glob("_flights/*.json")):
                if process.poll() is not None or time.perf_counter() - start > 120:
                    raise SystemExit("the sweep ended before a trial began")
                time.sleep(0.01)
            first = time.perf_counter() - start
            reported = json.loads(out.read(claims.STATUS_FILE) or b"{}")
        finally:
            process.terminate()
            process.wait()
        return {
            "trials": len(plan),
            "done_before": int(sum(map(len, done))),
            "rows_before": 3 * int(sum(map(len, done))),
            "files": files,
            "seconds_to_first_new_trial": first,
            "counted_as_done": reported.get("done"),
        }


def _table(ids: list[str], spec: SweepSpec) -> pa.Table:
    """Return rows (three ε for each id) that fill every column."""
    n, columns = 3 * len(ids), {}
    rng = np.random.default_rng(0)
    for field in ROW_SCHEMA:
        if field.name in PARTITION_COLUMNS:
            continue
        if field.name == "trial_id":
            columns[field.name] = pa.array(np.repeat(ids, 3).tolist())
        elif field.name == "epsilon":
            columns[field.name] = pa.array(np.tile(spec.epsilons, len(ids)))
        elif pa.types.is_floating(field.type):
            columns[field.name] = pa.array(rng.random(n))
        elif pa.types.is_integer(field.type):
            columns[field.name] = pa.array(rng.integers(1, 100, n)).cast(field.type)
        elif pa.types.is_boolean(field.type):
            columns[field.name] = pa.array([True] * n)
        elif pa.types.is_list(field.type):
            columns[field.name] = pa.array(list(rng.random((n, 20), np.float32)), field.type)
        elif field.name in ("stop_reason", "error"):
            columns[field.name] = pa.nulls(n, pa.string())
        else:
            columns[field.name] = pa.array([spec.spec_hash] * n)
    return pa.table(columns)


def costs(families: list[str], data_root: str | None) -> Iterator[dict[str, Any]]:
    """Measure what a trial takes by family, gray or colour, and batch size; yield what is known after each trial.

    Three trials of a cell, one for each of the paper's learning rates; in processor time of one thread, which depends
    little on what else the machine does. Trials that were measured before are kept.
    """
    known = json.loads(RESULTS.read_text()).get("costs", {}) if RESULTS.exists() else {}
    what = "processor seconds of a trial, one thread, three trials of a cell (one for each learning rate)"
    found: dict[str, Any] = {"what": what, "families": {**known.get("families", {})}}
    warm = SweepSpec(families=("mlp",), datasets=("mnist", "cifar10"), lrs=(1e-3,), batch_sizes=(8,), trials_per_cell=1)
    for trial in Plan(warm).trials():  # libraries and data are loaded once in a process
        _processor_seconds(trial, data_root)
    for batch_size in (32, 64):
        for family in families:
            for kind, dataset in (("gray", "mnist"), ("colour", "cifar10")):
                spec = SweepSpec(families=(family,), datasets=(dataset,), batch_sizes=(batch_size,), trials_per_cell=1)
                cells = found["families"].setdefault(family, {}).setdefault(kind, {})
                seconds = cells.get(str(batch_size), {}).get("seconds", [])
                for trial in list(Plan(spec).trials())[len(seconds) :]:
                    seconds.append(_processor_seconds(trial, data_root))
                    cells[str(batch_size)] = {"seconds": seconds, "seconds_mean": statistics.mean(seconds)}
                    yield found


def _processor_seconds(trial: TrialSpec, data_root: str | None) -> float:
    import torch

    from cape.trial import run_trials

    torch.set_num_threads(1)
    start = time.process_time()
    (rows,) = run_trials([trial], "cpu", data_root)
    seconds = time.process_time() - start
    print(trial.cell, rows[0].get("architecture"), rows[0].get("stopped_at"), seconds, flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("plan", "overhead", "resume", "costs"))
    parser.add_argument("--files", type=int, default=2000, help="resume: files that the trials lie in")
    parser.add_argument("--family", nargs="*", default=["mlp", "cnn", "rnn", "transformer"], help="costs: which")
    parser.add_argument("--data", help="costs: folder of Parquet datasets")
    args = parser.parse_args()
    if args.part == "costs":
        for found in costs(args.family, args.data):
            _save("costs", found)  # trial by trial: it takes its time
    elif args.part == "resume":
        _save(f"resume_{args.files}_files", resume(args.files))
    else:
        _save(args.part, {"plan": plan, "overhead": overhead}[args.part]())
    print(json.dumps(json.loads(RESULTS.read_text()), indent=1))


def _save(name: str, found: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    load = os.getloadavg()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    results[name] = {**found, "machine": machine("cpu"), "load_average": load, "driver_peak_memory_mb": peak}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
