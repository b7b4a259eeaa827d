"""How far the stacked engines and the lower precisions move T*, on real images and the families' own models.

    python -m benchmarks.parity --json parity.json [--trials 200] [--batch 8] [--seconds 80] [--checks identical ...]
        [--tiny]

Checks, each for each family:

* ``identical``: dropout off; T* of a stacked trial against ``measure``, row by row;
* ``dropout``: dropout on, the stack's masks drawn by counters (as on a GPU); the two samples of T* are compared by the
  two-sample Kolmogorov-Smirnov test;
* ``bf16``, ``tf32``: ``measure`` at that precision against float32, dropout off.

Convolutional networks and transformers go through ``vmap`` stacks here, also on a CPU, where ``run_trials`` would train
them one at a time. ``--tiny`` takes narrow models of every kind on the bundled digits instead, which go through the
same code in a fraction of the time; they are counted apart. Trials are cut into small units; a run ends after
``--seconds`` and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import machine, write_json
from cape import datasets
from cape.config import ModelSpec, TrialSpec
from cape.convergence import Outcome, Subject, measure_many
from cape.convergence import stack as stack_module
from cape.convergence import vmapped as vmapped_module
from cape.convergence.batched import measure_singly
from cape.convergence.draws import CounterDraws
from cape.drawn import build_model, draw_model
from cape.jsonconfig import canonical_json

FAMILIES = ("mlp", "cnn", "rnn", "transformer")
CHECKS = ("identical", "dropout", "bf16", "tf32")
DATASETS = ("mnist", "cifar10")
LRS = (5e-4, 1e-3, 2e-3)
EPSILONS = (0.2, 0.15, 0.1)
# Narrow models fall slowly; to these they take as many updates as the families' own to the usual ones.
TINY_EPSILONS = (0.6, 0.5, 0.4)

_IMAGE = (3, 32, 32)
_STAGES = {"repeats": [1, 1, 1], "dropout": 0.1}
_ENCODER = {"depth": 2, "heads": 2, "dropout": 0.1}
TINY = {
    "mlp": [
        ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": depth, "width": 48, "activation": activation})
        for depth in (1, 2, 3)
        for activation in ("relu", "gelu")
    ],
    "cnn": [
        ModelSpec("cnn", "vgg", "image", _IMAGE, 10, options={**_STAGES, "channels": [16, 32, 32], "pool": True}),
        ModelSpec("cnn", "resnet", "image", _IMAGE, 10, options={**_STAGES, "base": 16}),
        ModelSpec("cnn", "mobilenetv2", "image", _IMAGE, 10, options={**_STAGES, "width": 0.5, "stem": 32}),
    ],
    "rnn": [
        ModelSpec("rnn", kind, "rows", (8, 8), 10, options={"layers": n, "hidden": 24, "bidirectional": both})
        for kind in ("lstm", "gru")
        for n in (1, 2)
        for both in (False, True)
    ],
    "transformer": [
        ModelSpec("transformer", "vit", "image", _IMAGE, 10, options={**_ENCODER, "dim": 32, "patch": 8}),
        ModelSpec("transformer", "cct", "image", _IMAGE, 10, options={**_ENCODER, "dim": 32, "stem": 8}),
        ModelSpec(
            "transformer", "pit", "image", _IMAGE, 10,
            options={"dims": [24, 48], "depths": [1, 1], "heads": [2, 2], "patch": 8, "dropout": 0.1},
        ),
    ],
}  # fmt: skip


def units(family: str, args: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Yield (key, trials of one model); each model that is drawn serves four trials with seeds of their own."""
    for number in range(-(-args.trials // 4)):
        name = "digits" if args.tiny else DATASETS[number % 2]
        dataset = datasets.load(name, args.data)
        epsilons = TINY_EPSILONS if args.tiny else EPSILONS
        trials = [
            TrialSpec(family, name, args.batch, LRS[i % 3], seed=1000 * number + i, epsilons=epsilons) for i in range(4)
        ]
        spec = TINY[family][number % len(TINY[family])] if args.tiny else draw_model(trials[0], dataset)
        yield f"{family}{'-tiny' if args.tiny else ''} {number}", [(t, spec, dataset) for t in trials]


def subjects(unit: list[Any], dropout: bool, device: str) -> list[Subject]:
    made = []
    for trial, spec, dataset in unit:
        options = dict(spec.options)
        if "dropout" in options:
            options["dropout"] = max(options["dropout"], 0.1) if dropout else 0.0
        model = build_model(trial, ModelSpec.from_dict({**spec.to_dict(), "options": options})).to(device)
        x, y = dataset.batch(trial.batch_size, trial.seed_for("batch"), spec.layout)
        batch = (x.to(device), y.to(device))
        made.append(Subject(model, batch, trial.lr, trial.epsilons, seed=trial.seed_for("train")))
    return made


def t_star(outcomes: list[Outcome]) -> list[list[int | None]]:
    ordered = sorted(outcomes, key=lambda o: o.index)
    return [list(o.trajectory.t_star.values()) if o.trajectory else [None] * 3 for o in ordered]


def run(check: str, unit: list[Any], device: str) -> list[list[list[int | None]]]:
    """Return T* of the unit's trials in the two ways that the check compares."""
    trials = subjects(unit, check == "dropout", device)
    plain = t_star(list(measure_singly(enumerate(trials), loss="cross_entropy")))
    if check in ("bf16", "tf32"):
        return [plain, t_star(list(measure_singly(enumerate(trials), loss="cross_entropy", precision=check)))]
    if check == "identical":
        return [plain, t_star(list(measure_many(trials, width=4, step_seconds=1.0)))]
    held = stack_module.draws_for, vmapped_module.draws_for
    try:
        stack_module.draws_for = vmapped_module.draws_for = lambda d, slots: CounterDraws(slots, d)  # type: ignore[assignment]
        return [plain, t_star(list(measure_many(trials, width=4, step_seconds=1.0)))]
    finally:
        stack_module.draws_for, vmapped_module.draws_for = held


def summary(held: dict[str, Any]) -> dict[str, Any]:
    """Return, for each check and family, how far T* moved."""
    from scipy.stats import ks_2samp

    result: dict[str, Any] = {}
    for check in CHECKS:
        for family in [f + kind for f in FAMILIES for kind in ("", "-tiny")]:
            pairs = [v for k, v in held.items() if k.startswith(f"{check} {family} ")]
            rows = [(a, b) for one, other in pairs for p, q in zip(one, other) for a, b in zip(p, q)]
            known = [(a, b) for a, b in rows if a is not None and b is not None]
            if not known:
                continue
            moved = np.array([abs(a - b) for a, b in known])
            relative = np.array([abs(a - b) / max(a, 1) for a, b in known])
            about: dict[str, Any] = {"trials": len(rows) // 3, "rows": len(rows), "censored": len(rows) - len(known)}
            about |= {"identical": float((moved == 0).mean()), "within_1": float((moved <= 1).mean())}
            about |= {"median": float(np.median(moved)), "p95": float(np.quantile(moved, 0.95))}
            about |= {"median_relative": float(np.median(relative)), "p95_relative": float(np.quantile(relative, 0.95))}
            about |= {"largest": int(moved.max()), "mean_t_star": float(np.mean([a for a, _ in known]))}
            if check == "dropout":
                # One row a trial, at the smallest ε: the rows of one trial are not independent.
                last = [(p[-1], q[-1]) for one, other in pairs for p, q in zip(one, other)]
                known = [(a, b) for a, b in last if a is not None and b is not None]
                about["ks_p"] = float(ks_2samp([a for a, _ in known], [b for _, b in known]).pvalue)
            result[f"{check} {family}"] = about
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", required=True)
    parser.add_argument("--data")
    parser.add_argument("--trials", type=int, default=200, help="of each family and check")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--tiny", action="store_true", help="narrow models on the bundled digits")
    parser.add_argument("--seconds", type=float, default=80.0)
    args = parser.parse_args()
    args.data = datasets.data_root(args.data)
    path = Path(args.json)
    result = json.loads(path.read_text()) if path.is_file() else {"machine": machine(args.device), "held": {}}
    result["batch"] = args.batch
    began, left = time.perf_counter(), 0
    torch.manual_seed(0)
    for check in args.checks:
        for family in args.families:
            for key, unit in units(family, args):
                name = f"{check} {key}"
                if name in result["held"]:
                    continue
                if time.perf_counter() - began > args.seconds:
                    left += 1
                    continue
                result["held"][name] = run(check, unit, args.device)
                write_json(args.json, result)
    result["summary"] = summary(result["held"])
    write_json(args.json, result)
    for name, about in result["summary"].items():
        print(name, canonical_json(about))
    print(f"{left} units are left; the same command goes on with them." if left else "Complete.")


if __name__ == "__main__":
    main()
