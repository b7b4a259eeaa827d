"""What ground truth costs: rows per second of three ways, and the time to make the paper's rows again.

    python -m benchmarks.truth --device cpu --json results.json [--seconds 80] [--families mlp rnn] [--sizes 32]
        [--only compared|whole] [--compare 3] [--repeat 3] [--no-graphs]
    python -m benchmarks.truth --json results.json --rows META_DIR ... [--workers 2]     (from the rows of a sweep)

The ways: ``naive`` (the published code's, see ``benchmarks.naive``), ``plain`` (the single engine with CAPE's probe)
and ``engine`` (the one that ``run_trials`` chooses). The work is cut into units that are drawn at random, by turns from
each (dataset, batch size): the trials of ``--models`` models where trials may share a stack, one trial elsewhere. The
first ``--compare`` units of each family at B = 32 and at B = 128 run all three ways, the naive one with one trial of
each model (the others of that model cost the same); further units run the engine alone, until ``--fraction`` of the
paper's composition (10,800 CNN rows, 6,480 MLP, 10,800 RNN, 6,480 Transformer) has run; the time of the whole is
extrapolated from them, batch size by batch size. A run ends after ``--seconds``; the same command goes on where it
ended, and says what is left: ``--families``, ``--sizes`` and ``--only`` cut the whole into pieces that share one file.
The ways take turns, each turn beginning with another. Data is decoded, and a few trials have run the same way, before
anything is timed: what counts is a worker's usual shard, not its first. ``plain`` and ``naive`` run under the host
allocator's defaults, as a plain loop does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.composition import from_rows
from benchmarks.naive import naive_rows
from benchmarks.timing import interleave, machine, synchronize, write_json
from cape import datasets, families
from cape.config import ModelSpec, StoppingRule, SweepSpec, TrialSpec
from cape.convergence import Subject, measure, measure_many
from cape.convergence.graphed import use_graphs
from cape.drawn import draw_model
from cape.families.rnn import RecurrentNet
from cape.jsonconfig import canonical_json, stable_hash
from cape.sweep.plan import Plan
from cape.trial import run_trials

COMPOSITION = SweepSpec(name="composition", trials_by_family={"mlp": 60, "transformer": 60})
STACKED_ON_CPU = ("mlp", "rnn")
COMPARED = (32, 128)
WAYS = ("engine", "plain", "naive")
# Trials that begin first, untimed: a stack's worth of them touches the memory that a shard's stacks will use.
WARMING = {"engine": 8, "plain": 1, "naive": 1}

# The largest models of each family.
LARGEST = {
    "mlp": ModelSpec("mlp", "mlp", "vector", (3072,), 10, options={"depth": 4, "width": 1024, "activation": "relu"}),
    "cnn": ModelSpec("cnn", "resnet", "image", (3, 32, 32), 10, options={"base": 64, "repeats": [1, 1, 1]}),
    "rnn": ModelSpec("rnn", "gru", "rows", (32, 96), 10, options={"layers": 3, "hidden": 512, "bidirectional": True}),
    "transformer": ModelSpec(
        "transformer", "vit", "image", (3, 32, 32), 10, options={"dim": 192, "depth": 6, "heads": 3}
    ),
}


def units(family: str, device: str, data: str | None, models: int = 1) -> list[list[TrialSpec]]:
    """Return the family's units of work in the order in which they are to run."""
    by_stratum: dict[tuple[str, int], dict[str, list[TrialSpec]]] = defaultdict(lambda: defaultdict(list))
    for trial in Plan(COMPOSITION).trials():
        if trial.family != family:
            continue
        dataset = datasets.load(trial.dataset, data)
        alone = device == "cpu" and family not in STACKED_ON_CPU
        key = trial.trial_id if alone else canonical_json(draw_model(trial, dataset).to_dict())
        by_stratum[trial.dataset, trial.batch_size][key].append(trial)
    shuffled = []
    for stratum, groups in sorted(by_stratum.items()):
        order = np.random.default_rng(int(stable_hash([family, *stratum], 8), 16)).permutation(len(groups))
        held = [list(groups.values())[i] for i in order]
        step = 1 if device == "cpu" and family not in STACKED_ON_CPU else models
        shuffled.append([sum(held[i : i + step], []) for i in range(0, len(held), step)])
    longest = max(map(len, shuffled))
    return [queue[i] for i in range(longest) for queue in shuffled if i < len(queue)]


def run_engine(unit: list[TrialSpec], device: str, data: str | None, engine: str) -> dict[str, Any]:
    """Time a unit by ``run_trials``."""
    began = time.perf_counter()
    rows = [row for rows in run_trials(unit, device, data, engine=engine) for row in rows]
    synchronize(device)
    seconds = time.perf_counter() - began
    firsts = {row["trial_id"]: row for row in rows}.values()
    failed = [row["error"] for row in firsts if row.get("error")]
    return {
        "seconds": seconds,
        "rows": len(rows),
        "probe_seconds": sum(row.get("probe_seconds") or 0.0 for row in firsts),
        "truth_seconds": sum(row.get("truth_seconds") or 0.0 for row in firsts),
        "failed": failed,
        "t_star": {f"{row['trial_id']} {row['epsilon']}": row.get("t_star") for row in rows},
    }


def run_naive(unit: list[TrialSpec], device: str, data: str | None) -> dict[str, Any]:
    """Time a unit the naive way: one trial of each model, counted as often as the unit has trials of it."""
    models: dict[str, list[TrialSpec]] = defaultdict(list)
    for trial in unit:
        models[canonical_json(draw_model(trial, datasets.load(trial.dataset, data)).to_dict())].append(trial)
    total = {"probe_seconds": 0.0, "truth_seconds": 0.0}
    for alike in models.values():
        middle = sorted(alike, key=lambda t: t.lr)[len(alike) // 2]
        part = naive_rows(middle, device, data, every=device != "cpu")
        for name in total:
            total[name] += part[name] * len(alike)
    rows = sum(len(trial.epsilons) for trial in unit)
    return {"seconds": sum(total.values()), "rows": rows, **total, "trials_run": len(models)}


def work(args: argparse.Namespace) -> Iterator[tuple[str, list[TrialSpec], str, int]]:
    """Yield (unit's key, unit, way, how often it ran before) in the order in which they are to run."""
    queues = {family: units(family, args.device, args.data, args.models) for family in args.families}
    for queue in queues.values() if args.only != "whole" else ():
        for size in [s for s in COMPARED if s in args.sizes]:
            picked = [u[: args.trials] for u in queue if u[0].batch_size == size][: args.compare]
            for turn in range(args.repeat):
                for unit in picked:
                    for i in range(len(WAYS)):
                        yield key_of(unit, "c"), unit, WAYS[(i + turn) % len(WAYS)], turn
    for queue in queues.values() if args.only != "compared" else ():
        ran, total = dict.fromkeys(COMPOSITION.batch_sizes, 0), sum(map(len, queue))
        for unit in queue:
            size = unit[0].batch_size
            if ran[size] >= args.fraction * total / len(ran):
                continue
            ran[size] += len(unit)
            if size in args.sizes:
                yield key_of(unit, "w"), unit, "engine", 0


def key_of(unit: list[TrialSpec], purpose: str) -> str:
    first = unit[0]
    mark = stable_hash([t.trial_id for t in unit], 8)
    return f"{purpose}-{first.family}-{first.dataset}-{first.batch_size}-{mark}"


def peak(device: str, wanted: list[str], before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the share of the device's matrix-product rate that the largest models reach, after each that was missing.

    Alone and, where trials may share a stack, in a stack of four. The rate is taken anew for every family.
    """
    result = dict(before)
    for family in [f for f in wanted if f not in before]:
        spec, size = LARGEST[family], 2048 if device == "cpu" else 8192
        product = partial(torch.matmul, *torch.randn(2, size, size, device=device))
        rate = 2 * size**3 / interleave({"matmul": product}, device, 2.0)["matmul"]["min_ms"] / 1e6
        torch.manual_seed(0)
        model = families.build(spec).to(device)
        x, y = torch.randn(128, *spec.input_shape, device=device), torch.randint(0, 10, (128,), device=device)
        flops = _flops(model, spec, x, y)
        subject = Subject(model, (x, y), epsilons=(1e-6,))
        seconds, work = {"plain": _step(subject, None, 6)}, {"plain": flops}
        if device != "cpu" or family in STACKED_ON_CPU:
            work["stack of 4"] = flops - _left_out(model, x)
            seconds["stack of 4"] = _step(subject, 4, max(2, min(6, int(1.0 / seconds["plain"]))))
        result[family] = {
            "model": spec.to_dict(),
            "matmul_gflops": rate,
            **{
                name: {"gflop_per_step": work[name] / 1e9, "step_ms": s * 1e3, "share": work[name] / s / 1e9 / rate}
                for name, s in seconds.items()
            },
        }
        yield result


def _step(subject: Subject, width: int | None, steps: int) -> float:
    """Return the seconds of one step of one trial."""
    short = subject.stopping.replace(max_steps=steps)
    if width is None:
        outcome = measure(subject.model, subject.batch, epsilons=subject.epsilons, stopping=short)
        return outcome.step_seconds
    several = [Subject(subject.model, subject.batch, 1e-3, subject.epsilons, short, seed) for seed in range(2 * width)]
    done = list(measure_many(several, width=width, step_seconds=1.0))
    late = [o.trajectory.seconds for o in done[width:] if o.trajectory]  # the first are slowed down by first touches
    return float(np.median(late)) / (steps + 1 / 3)  # one pass forward more than updates


def _flops(model: torch.nn.Module, spec: ModelSpec, x: torch.Tensor, y: torch.Tensor) -> float:
    if spec.family == "rnn":  # the fused kernels are not counted: 2 for a product, 3 products
        weights = sum(p.numel() for n, p in model.named_parameters() if "weight" in n and "head" not in n)
        return 6.0 * weights * x.shape[0] * x.shape[1]
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    return float(counter.get_total_flops())


def _left_out(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Return what a stack leaves out: a last layer's backward direction, but for the one position that is read."""
    if not isinstance(model, RecurrentNet) or not model.rnn.bidirectional:
        return 0.0
    last = f"l{model.rnn.num_layers - 1}_reverse"
    weights = sum(p.numel() for n, p in model.rnn.named_parameters() if n.startswith("weight") and n.endswith(last))
    return 6.0 * weights * x.shape[0] * (x.shape[1] - 1)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return rows per second by family and batch size, and the extrapolated time of the whole composition."""
    compared: dict[str, Any] = {}
    whole: dict[str, Any] = {"extrapolated": True, "hours": 0.0}
    for family in COMPOSITION.families:
        for size in COMPARED:
            held = [u for u in result["units"].values() if (u["family"], u["batch_size"]) == (family, size)]
            held = [u for u in held if {"engine", "plain", "naive"} <= u["ways"].keys()]
            if held:
                compared[f"{family} {size}"] = _compare(held)
        sampled = [u for u in result["units"].values() if u["family"] == family and u["purpose"] == "w"]
        counts = {b: 12 * COMPOSITION.trials_by_family.get(family, COMPOSITION.trials_per_cell)
                  for b in COMPOSITION.batch_sizes}  # 4 datasets, 3 learning rates  # fmt: skip
        per = {b: [u for u in sampled if u["batch_size"] == b] for b in counts}
        if all(per.values()):
            trials = {b: sum(u["trials"] for u in us) for b, us in per.items()}
            ran = {b: sum(u["ways"]["engine"]["seconds"] for u in us) for b, us in per.items()}
            share = sum(trials.values()) / sum(counts.values())
            hours = sum(ran[b] * counts[b] / trials[b] for b in counts) / 3600
            whole[family] = {"share_of_trials": share, "hours": hours}
            whole["hours"] += whole[family]["hours"]
    whole["families"] = [f for f in COMPOSITION.families if f in whole]
    return {"compared": compared, "composition": whole}


def _compare(held: list[dict[str, Any]]) -> dict[str, Any]:
    ways = {way: [u["ways"][way] for u in held] for way in ("naive", "plain", "engine")}
    rate = {way: sum(p["rows"] for p in ps) / sum(p["seconds"] for p in ps) for way, ps in ways.items()}
    pairs = [(p["t_star"], e["t_star"]) for p, e in zip(ways["plain"], ways["engine"])]
    moved = [abs(a[k] - b[k]) for a, b in pairs for k in a if a[k] is not None and b[k] is not None]
    trials = sum(u["trials"] for u in held)
    return {
        "trials": trials,
        "rows_per_second": rate,
        "probe_seconds_per_trial": {w: sum(p["probe_seconds"] for p in ps) / trials for w, ps in ways.items()},
        "truth_seconds_per_trial": {w: sum(p["truth_seconds"] for p in ps) / trials for w, ps in ways.items()},
        "engine_over_naive": rate["engine"] / rate["naive"],
        "engine_over_plain": rate["engine"] / rate["plain"],
        "t_star_moved": sum(m > 0 for m in moved),
        "t_star_compared": len(moved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", required=True, help="results so far; the run goes on from them")
    parser.add_argument("--data", help="folder of the Parquet datasets")
    parser.add_argument("--families", nargs="+", default=list(COMPOSITION.families), choices=COMPOSITION.families)
    parser.add_argument("--compare", type=int, default=4, help="units of each family and batch size in all three ways")
    parser.add_argument("--models", type=int, default=4, help="models of a unit, where trials may share a stack")
    parser.add_argument("--trials", type=int, help="of a compared unit at most")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(COMPOSITION.batch_sizes), help="batch sizes")
    parser.add_argument("--only", choices=("compared", "whole"), help="one of the two kinds of units")
    parser.add_argument("--repeat", type=int, default=1, help="turns of the three ways; the fastest of each counts")
    parser.add_argument("--fraction", type=float, default=0.05, help="of the composition that runs for the whole")
    parser.add_argument("--seconds", type=float, default=80.0, help="begin no further unit after this time")
    parser.add_argument("--rows", nargs="+", metavar="META_DIR", help="extrapolate from these rows, and nothing else")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep that wrote --rows")
    parser.add_argument("--no-graphs", action="store_true", help="steps one by one on a GPU too, to compare with")
    parser.add_argument("--peak", action="store_true", help="the share of the device's peak, of --families, alone")
    args = parser.parse_args()
    with use_graphs(not args.no_graphs):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    args.data = datasets.data_root(args.data)
    path = Path(args.json)
    fresh = {"machine": machine(args.device), "graphs": not args.no_graphs, "units": {}}
    result = json.loads(path.read_text()) if path.is_file() else fresh
    if result.get("graphs", True) == args.no_graphs:
        held = "with" if args.no_graphs else "without"
        raise SystemExit(f"{path} holds results {held} graphs; name another file.")
    began, left = time.perf_counter(), 0
    if args.peak:
        for about in peak(args.device, args.families, result.get("peak", {})):
            result["peak"] = about
            write_json(args.json, result)
    elif args.rows:
        result["from_rows"] = from_rows(args.rows, COMPOSITION, args.workers)
        print(json.dumps({k: v for k, v in result["from_rows"].items() if k != "cells"}, indent=1))
    else:
        for key, unit, way, turn in work(args):
            family = unit[0].family
            about = {"family": family, "dataset": unit[0].dataset, "batch_size": unit[0].batch_size}
            start = {**about, "purpose": key[0], "trials": len(unit), "ways": {}}
            held = result["units"].setdefault(key, start)
            before = held["ways"].get(way)
            if before and before["turns"] > turn:
                continue
            if time.perf_counter() - began > args.seconds:
                left += 1
                continue
            engine = "auto" if way == "engine" else "single"
            begin = [trial.replace(stopping=StoppingRule(max_steps=2)) for trial in unit[: WARMING[way]]]
            run_engine(begin, args.device, args.data, engine)
            run = run_naive(unit, args.device, args.data) if way == "naive" else run_engine(
                unit, args.device, args.data, engine
            )  # fmt: skip
            best = run if before is None or run["seconds"] < before["seconds"] else before
            held["ways"][way] = {**best, "turns": turn + 1}
            write_json(args.json, result)
        result["units"] = {k: u for k, u in result["units"].items() if u["ways"]}
    result["summary"] = summary(result)
    write_json(args.json, result)
    for name, about in result["summary"]["compared"].items():
        rate = about["rows_per_second"]
        print(
            f"{name}: naive {rate['naive']:.3g}, plain {rate['plain']:.3g}, engine {rate['engine']:.3g} rows/s:"
            f" {about['engine_over_naive']:.1f}x naive, {about['engine_over_plain']:.2f}x plain; T* moved in"
            f" {about['t_star_moved']} of {about['t_star_compared']} rows ({about['trials']} trials)"
        )
    print(json.dumps(result["summary"]["composition"]))
    print(f"{left} runs are left; the same command goes on with them." if left else "Complete.")


if __name__ == "__main__":
    main()
