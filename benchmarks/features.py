"""What each set of features, and augmented trials, are worth on data never seen: the design's first measurement.

    python -m benchmarks.features PLAIN --augmented AUG --held-out HELD [--json results.json] [--families mlp rnn]

PLAIN, AUG and HELD are meta-datasets (``ray_jobs/specs``). For every family and set of features one XGBoost regressor
with the settings of the preset ``paper`` is fitted on plain rows, and on plain and augmented ones; nothing is
calibrated. Tests: each dataset of HELD (``svhn``, ``imdb``), and each dataset of PLAIN left out (of both kinds of rows)
in turn, its plain rows pooled under ``left out``. Scored are rows that crossed their ε. ``median``: the constant that
predicts the training rows' median. No row of the training is in a test; the rows of a trial stay together.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.timing import machine, write_json
from cape.errors import DataError
from cape.evaluation import metrics
from cape.feature_names import BATCH_FEATURES, END_FEATURES, SHAPE_FEATURES, SLOW_FEATURES
from cape.metamodel.regressors import dmatrix, log_steps, xgboost
from cape.metamodel.rows import OPTIMIZER_FEATURES, PAPER_FEATURES, STATIC_FEATURES, Rows
from cape.store import reader

WITHOUT_N = tuple(f for f in PAPER_FEATURES if f != "log_n")
SLOW = (*WITHOUT_N, "log_epsilon", "log_l0", *OPTIMIZER_FEATURES, *SLOW_FEATURES)
SHAPE = (*SLOW, *SHAPE_FEATURES, "draw_noise")
SETS: dict[str, tuple[str, ...]] = {
    "static + log ε": (*STATIC_FEATURES, "log_epsilon"),
    "the paper's six": PAPER_FEATURES,
    "six + log ε": (*PAPER_FEATURES, "log_epsilon"),
    "+ optimizer-aware": (*PAPER_FEATURES, "log_epsilon", "log_l0", *OPTIMIZER_FEATURES),
    "the same without log N": (*WITHOUT_N, "log_epsilon", "log_l0", *OPTIMIZER_FEATURES),
    "+ slow-regime signals": SLOW,
    "+ sizes and noise": SHAPE,
    "+ the batch's separation": (*SHAPE, *BATCH_FEATURES),
    "+ the ends": (*SHAPE, *BATCH_FEATURES, *END_FEATURES),
}
CONSTANT = "median"

# The preset `paper` (paper, section 5), whatever features it is given.
TREES = 200
PAPER = {
    "max_depth": 4,
    "learning_rate": 0.05,
    "subsample": 0.9,
    "colsample_bytree": 0.9,
    "reg_alpha": 0.0,
    "reg_lambda": 1.0,
    "seed": 42,
}


def read_rows(meta_dir: str) -> Rows:
    """Return the rows of a meta-dataset that crossed their ε.

    Raises:
        DataError: a probed row lacks a feature: it was written before there was one.
    """
    rows = Rows.from_table(reader.read(meta_dir))
    rows = rows.take(rows.reached & np.isfinite(rows["log_p"]))
    for name in SETS["+ the ends"]:
        if np.isnan(rows[name]).any():
            raise DataError(f"Rows of {meta_dir} lack '{name}'; compute it with `cape store reprobe {meta_dir}`.")
    return rows


def together(*parts: Rows) -> Rows:
    """Return the rows of several meta-datasets as one."""
    names = set.intersection(*(set(p.columns) for p in parts))
    return Rows({n: np.concatenate([p[n] for p in parts]) for n in names})


def tests(plain: Rows, augmented: Rows | None, held: Rows) -> Iterator[tuple[str, Rows, Rows | None, Rows]]:
    """Yield (test, plain rows to fit on, augmented rows to fit on, rows to score)."""
    for name in sorted({str(d) for d in held["dataset"]}):
        yield name, plain, augmented, held.take(held["dataset"] == name)
    for name in sorted({str(d) for d in plain["dataset"]}):
        more = None if augmented is None else augmented.take(augmented["dataset"] != name)
        yield "left out", plain.take(plain["dataset"] != name), more, plain.take(plain["dataset"] == name)


def predict(train: Rows, test: Rows, features: Sequence[str]) -> np.ndarray:
    """Fit the paper's regressor and return the steps that it predicts, [n]."""
    matrix = dmatrix(train.matrix(features), features, log_steps(train["t_star"]))
    booster = xgboost().train({**PAPER, "nthread": 1}, matrix, num_boost_round=TREES)
    return np.exp(booster.predict(dmatrix(test.matrix(features), features)).astype(np.float64))


def measure(plain: Rows, augmented: Rows | None, held: Rows, fewest: int = 30) -> dict[str, Any]:
    """Return, for one family, {training: {set: {test: scores}}}, and what there was to fit on.

    Args:
        fewest: training rows below which a test is left out.
    """
    found: dict[str, Any] = {"rows": {"plain": len(plain), "augmented": 0 if augmented is None else len(augmented)}}
    for kind in ("plain", "plain + augmented"):
        if kind != "plain" and augmented is None:
            continue
        pooled: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
        for name, base, more, test in tests(plain, augmented, held):
            train = base if kind == "plain" or more is None else together(base, more)
            if len(train) < fewest or not len(test):
                continue
            true = test["t_star"]
            pooled.setdefault((CONSTANT, name), []).append((true, np.full(len(true), np.median(train["t_star"]))))
            for label, features in SETS.items():
                pooled.setdefault((label, name), []).append((true, predict(train, test, features)))
        scores: dict[str, dict[str, Any]] = {}
        for (label, name), parts in pooled.items():
            true, predicted = (np.concatenate(p) for p in zip(*parts, strict=True))
            errors = metrics.errors(true, predicted)
            kept = {k: round(errors[k], 4) for k in ("mae", "avg_accuracy")}
            scores.setdefault(label, {})[name] = {**kept, "rows": len(true), "mean": round(float(true.mean()), 2)}
        found[kind] = scores
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown: MAE in steps, AvgAccuracy."""
    lines = []
    for family, result in found.items():
        columns = [(kind, name) for kind in result if kind != "rows" for name in next(iter(result[kind].values()), {})]
        heads = []
        for kind, name in columns:
            one = result[kind][CONSTANT][name]
            heads.append(f"{name}, {kind} ({one['rows']} rows, mean T* {one['mean']:.1f})")
        rows = result["rows"]
        lines += ["", f"**{family}** ({rows['plain']} plain rows, {rows['augmented']} augmented)", ""]
        lines += [f"| features | {' | '.join(heads)} |", "|" + "---|" * (len(columns) + 1)]
        for label in (CONSTANT, *SETS):
            cells = [result[kind].get(label, {}).get(name) for kind, name in columns]
            shown = ["" if c is None else f"{c['mae']:.2f}, {c['avg_accuracy']:.2f}" for c in cells]
            lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", metavar="PLAIN")
    parser.add_argument("--augmented", metavar="AUG")
    parser.add_argument("--held-out", required=True, metavar="HELD")
    parser.add_argument("--families", nargs="+", metavar="NAME")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    plain, held = read_rows(args.plain), read_rows(args.held_out)
    augmented = read_rows(args.augmented) if args.augmented else None
    found = {}
    for family in args.families or plain.families:
        mine = [r if r is None else r.take(r["family"] == family) for r in (plain, augmented, held)]
        if mine[1] is not None and not len(mine[1]):
            mine[1] = None
        found[family] = measure(*mine)  # type: ignore[arg-type]  # only the second may be None
    print(table(found))
    if args.json:
        write_json(args.json, {"machine": machine("cpu"), "families": found})


if __name__ == "__main__":
    main()
