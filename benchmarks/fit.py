"""What fitting costs beside plain XGBoost, whether workers change the model, and how censored rows are best used.

    python -m benchmarks.fit overhead META_DIR...   40,000 resampled rows: `cape fit` against xgboost.train
    python -m benchmarks.fit workers META_DIR...    the same rows by one Ray Train worker and by two
    python -m benchmarks.fit censored META_DIR...   real rows, cut as a shorter sweep would have: failure time or not

Each adds its part to ``benchmarks/results/fit_cpu.json``. Resampled rows are trials drawn with replacement from the
meta-datasets, under new names: real features and real T*, but no new information.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import machine
from cape.metamodel.fit import fit, fit_table
from cape.metamodel.presets import PRESETS, Preset
from cape.metamodel.regressors import booster_parameters, design, dmatrix, log_steps, predict_log, train_boosters
from cape.metamodel.rows import Rows, read_rows
from cape.metamodel.train import ray_trainer
from cape.store import reader, writer

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "fit_cpu.json"
ROWS = 40_000
CAPS = (0.5, 0.7, 0.9)
SCALES = (0.1, 0.2, 0.3)
SEEDS = (42, 1, 2, 3)


def resample(sources: list[str], out: Path, rows: int = ROWS, seed: int = 0) -> None:
    """Write a meta-dataset of whole trials drawn with replacement until it has ``rows`` rows or a few more."""
    records = [r for s in sources for r in reader.read(s).drop_columns(["losses"]).to_pylist()]
    trials: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        trials.setdefault(record["trial_id"], []).append(record)
    rng, names = np.random.default_rng(seed), sorted(trials)
    made: list[dict[str, Any]] = []
    while len(made) < rows:
        name = names[rng.integers(len(names))]
        made += [{**record, "trial_id": f"{name[:8]}{len(made):08x}"} for record in trials[name]]
    writer.write_shard(made, out)


def plain(meta: Path, preset: Preset) -> float:
    """Return the seconds of reading the rows and of xgboost.train with the preset's parameters, and nothing else."""
    start = time.perf_counter()
    import xgboost as xgb

    data = design(read_rows(meta), preset, ("cnn", "mlp", "rnn", "transformer"))
    matrix = dmatrix(data.x, preset.features, data.y, data.weight)
    xgb.train(booster_parameters(preset), matrix, preset.trees)
    return time.perf_counter() - start


def overhead(sources: list[str]) -> dict[str, Any]:
    """Time `cape fit` and plain XGBoost on the same rows with the same trees."""
    import ray

    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        meta = Path(folder) / "meta"
        resample(sources, meta)
        presets = {"paper_pooled": PRESETS["paper_pooled"], "product, fixed": PRESETS["product"].replace(select=False)}
        for name, preset in presets.items():
            simple = plain(meta, preset)
            start = time.perf_counter()
            made = fit(meta, Path(folder) / "model", preset=preset)
            whole = time.perf_counter() - start
            out[name] = {"plain_seconds": simple, "cape_fit_seconds": whole, "added_seconds": whole - simple}
            out[name]["calibration_trials"] = made.card["data"]["calibration_trials"]
            assert not ray.is_initialized()  # every run paid for starting and stopping Ray
    return {"rows": ROWS, **out}


def workers(sources: list[str]) -> dict[str, Any]:
    """Compare what one and two Ray Train workers fit over several seeds, on rows that none has seen."""
    import ray

    preset = PRESETS["product"].replace(select=False)
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(sources)
        left_out = rows.trials % 5 == 0
        meta = Path(folder) / "meta"
        kept = set(rows["trial_id"][~left_out])
        records = [r for s in sources for r in reader.read(s).to_pylist() if r["trial_id"] in kept]
        writer.write_shard(records, meta)
        test = rows.take(left_out & rows.reached & ~rows.augmented)
        fitted = read_rows(meta)
        here = fit_table(fitted, preset, calibrate=False).predict(test)
        data = design(fitted, preset, fitted.families)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        one = fit(meta, Path(folder) / "one", preset=preset).predict(test)
        out["one worker, largest relative difference from this process"] = float(np.max(np.abs(one / here - 1.0)))
        for n in (1, 2):
            out[f"{n} workers, mae by seed"] = maes = []
            with ray_trainer(Path(folder) / "boosters", n, None) as (trainer, _):
                for seed in SEEDS:
                    seeded = preset.replace(seed=seed)
                    boosters = trainer(data, seeded)
                    log_hat = predict_log(boosters, data.lines, data.surfaces, test, seeded, data.families)
                    maes.append(float(np.abs(np.maximum(1.0, np.exp(log_hat)) - test["t_star"]).mean()))
        ray.shutdown()
        out["test_rows"] = len(test)
    return out


def capped(rows: Rows, most: np.ndarray | float) -> Rows:
    """Return real rows as a sweep that watches each for ``most`` steps, one number or [n], would have recorded them."""
    reached = rows["t_star"] <= most
    return Rows(
        {
            **rows.columns,
            "converged": reached,
            "t_star": np.where(reached, rows["t_star"], np.nan),
            "stopped_at": np.minimum(rows["t_star"], most),
            "stop_reason": np.where(reached, None, "cap"),
        }
    )


def censored(sources: list[str]) -> dict[str, Any]:
    """Compare failure time, exclusion and the paper's 5,000, where a share of T* was cut off; errors on whole T*."""
    from cape.metamodel import regressors

    rows = read_rows(sources)
    rows = rows.take(rows.reached & ~rows.augmented)
    test_index = rows.trials % 4 == 0
    train, test = rows.take(~test_index), rows.take(test_index)
    out: dict[str, Any] = {"train_rows": len(train), "test_rows": len(test)}

    def error(preset: Preset, data: Rows) -> dict[str, float]:
        made = design(data, preset, rows.families)
        boosters = train_boosters(made, preset)
        steps = np.exp(predict_log(boosters, made.lines, made.surfaces, test, preset, rows.families))
        gap, logs = np.abs(steps - test["t_star"]), np.abs(np.log(steps) - log_steps(test["t_star"]))
        return {"mae": float(gap.mean()), "log_error": float(logs.mean())}

    base = PRESETS["product"].replace(select=False, per_family=True)
    out["nothing cut"] = error(base, train)
    for share in CAPS:
        limit = np.full(len(train), np.nan)
        for family in rows.families:
            mine = train["family"] == family
            limit[mine] = np.quantile(train["t_star"][mine], share)
        short = capped(train, np.floor(limit))
        found = {way: error(base.replace(censored=way), short) for way in ("aft", "exclude", "cap")}
        out[f"watched to the {share:.0%} quantile of T*"] = {"censored_rows": int((~short.reached).sum()), **found}
    chosen, scales = regressors.AFT_SCALE, {}
    for scale in SCALES:
        regressors.AFT_SCALE = scale
        scales[f"{scale:g}"] = error(base, short)
    regressors.AFT_SCALE = chosen
    out[f"scale of failure time, {CAPS[-1]:.0%}"] = scales
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overhead", "workers", "censored"))
    parser.add_argument("meta_dir", nargs="+")
    args = parser.parse_args()
    found = {"overhead": overhead, "workers": workers, "censored": censored}[args.part](args.meta_dir)
    found |= {"machine": machine("cpu"), "load_average": os.getloadavg()[0]}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {args.part: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
