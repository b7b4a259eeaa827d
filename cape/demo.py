"""``make demo``: the whole of CAPE on real images, in a few minutes on two cores.

A sweep of all four families through Ray Tune, a meta-regressor fitted through Ray Train, its evaluation against the
baselines, a prediction for a model that was never in the sweep (torchvision's resnet18), checked by training it, and
one HTML page. Every number printed is measured in this run.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cape.errors import CapeError, StoreError

if TYPE_CHECKING:
    from cape.config import SweepSpec
    from cape.evaluation.tables import Table

EPSILON = 0.1
LR = 1e-3
MARK = ".cape-demo"  # lies in what a demo may remove


def run(out: Path, data_root: str | None = None, workers: int | None = None, spec: SweepSpec | None = None) -> None:
    """Run the demo into ``out``, which is replaced where it holds an earlier demo.

    Args:
        out: directory to write. data_root: see ``datasets.data_root``. workers: Tune actors.
        spec: what to sweep; where None, the preset ``demo`` over the image datasets that the data root holds.

    Raises:
        CapeError: as the functions it calls.
    """
    import torch

    import cape
    from cape import datasets
    from cape.evaluation import evaluate, report
    from cape.metamodel.fit import fit
    from cape.sweep.driver import run_sweep
    from cape.sweep.plan import Plan, preset

    began = time.monotonic()
    _claim(out)
    root = datasets.data_root(data_root)
    spec = spec or preset("demo", root)
    plan = Plan(spec)
    _say(f"1. Sweep: {len(plan)} trials of {', '.join(spec.families)} on {', '.join(spec.datasets)}")
    swept = run_sweep(spec, out / "meta", data_root=root, workers=workers)
    print(swept)

    _say("2. Fit the meta-regressor through Ray Train")
    started = time.monotonic()
    meta_model = fit(out / "meta", out / "model")
    print(
        f"fitted on {meta_model.card['data']['trials']} trials in {time.monotonic() - started:.1f} s: {out / 'model'}"
    )

    _say("3. Evaluate, in-corpus: 5 folds, no trial in both parts of a split")
    started = time.monotonic()
    evaluation = evaluate(out / "meta", "in-corpus", out / "evaluation")
    print(_short(evaluation.tables["main"]).markdown())
    print("\nCurve extrapolation trains for 60 steps first, by which time it has mostly seen T* itself.")
    print(f"evaluated in {time.monotonic() - started:.1f} s: {out / 'evaluation'}")

    name = next((d for d in ("cifar10", "svhn") if d in spec.datasets), spec.datasets[-1])
    batch_size = max(spec.batch_sizes)
    _say(f"4. Predict for torchvision's resnet18 on {name}, which the sweep never saw")
    from torchvision.models import resnet18

    dataset = datasets.load(name, root)
    batch = dataset.batch(batch_size, seed=0, layout="image")
    torch.manual_seed(0)
    model = resnet18(num_classes=dataset.outputs)
    started = time.monotonic()
    prediction = cape.predict(
        model, batch, lr=LR, dataset_size=dataset.full_train_size, epsilon=EPSILON, meta_model=meta_model
    )
    took = time.monotonic() - started
    low, high = prediction.interval(0.9)
    print(f"predicted: {prediction.steps:g} steps to ε = {EPSILON:g} (90 % interval {low:.1f} to {high:.1f}),")
    print(f"           {prediction.time():.2f} s on this machine; the prediction itself took {took:.2f} s")
    for warning in prediction.warnings:
        print(f"warning:   {warning}")
    truth = cape.measure(model, batch, lr=LR, epsilons=(EPSILON,))
    steps = truth.t_star[EPSILON]
    print(f"measured:  {'not reached' if steps is None else f'{steps} steps'}, {truth.seconds:.2f} s of training")

    _say("5. Report")
    page = report(out / "meta", out / "report.html", meta_model, prediction, evaluation=evaluation)
    print(f"wrote {page}")
    print(f"\n{swept.rows} rows of {swept.trials} trials; everything took {time.monotonic() - began:.0f} s.")


def _short(table: Table) -> Table:
    """Return the columns of the main table that fit a terminal, without the lines that this sweep leaves empty."""
    wanted = ("family", "method", "rows", "MAE", "median AE", "AvgAccuracy", "paper's MAE")
    kept = [table.columns.index(name) for name in wanted]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows if row[table.columns.index("rows")])
    return dataclasses.replace(table, columns=wanted, rows=rows, note="")


def _say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def _claim(out: Path) -> None:
    """Remove an earlier demo, refuse to remove anything else, and mark the directory as a demo's."""
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / MARK).is_file()):
        raise StoreError(f"{out} holds something other than an earlier demo; name another directory with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
        for name in ("meta", "model", "evaluation"):
            if (out / name).exists():
                shutil.rmtree(out / name)
        (out / "report.html").unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{out} cannot be cleared or written to ({error}); name another directory.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cape.demo", description="The whole of CAPE on real images.")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    parser.add_argument("--data", metavar="DIR", help="folder of Parquet datasets (default: CAPE_DATA, else digits)")
    parser.add_argument("--workers", type=int, metavar="N", help="Tune actors (default: what the machine has)")
    args = parser.parse_args(argv)
    try:
        run(args.out, args.data, args.workers)
    except CapeError as error:
        print(f"cape: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cape: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
