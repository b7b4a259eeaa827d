"""Who is fitted on what and scored on what. The rows of one trial never straddle a split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cape.errors import DataError, SpecError, did_you_mean
from cape.metamodel.fit import FEWEST_TRIALS
from cape.metamodel.rows import Rows

FOLDS = 5
HELD_OUT = ("svhn", "imdb")
CALIBRATION_SHARE = 0.1
CALIBRATION_FEWEST = 10  # test trials of a family below which none is spent on calibration

PROTOCOLS = {
    "in-corpus": "5 folds, stratified over cells, grouped by trial",
    "fresh": "fitted on one meta-dataset, tested on another with other seeds",
    "lodo": "leave one dataset out",
    "loao": "leave one architecture out",
    "lofo": "leave one family out",
    "held-out": "fitted without SVHN and IMDB, tested on them",
}


@dataclass(frozen=True)
class Split:
    """Rows to fit on and rows to score, under a name (the fold, or what was left out)."""

    name: str
    train: Rows
    test: Rows


def check_protocol(name: str) -> str:
    """Return a protocol's name, or raise ``SpecError``."""
    if name not in PROTOCOLS:
        raise SpecError(f"Unknown protocol '{name}'.{did_you_mean(name, PROTOCOLS)}")
    return name


def splits(rows: Rows, protocol: str, test: Rows | None = None) -> tuple[list[Split], list[str]]:
    """Return the splits of a protocol and notes on anything that was shrunk or skipped.

    Args:
        rows: the meta-dataset, failed rows already left out; augmented ones are only ever fitted on.
        test: rows of the test meta-dataset (fresh, held-out); its augmented rows are left out.

    Raises:
        SpecError: an unknown protocol, or a missing or superfluous test meta-dataset.
        DataError: too few trials, or nothing to leave out.
    """
    check_protocol(protocol)
    if test is not None and protocol not in ("fresh", "held-out"):
        raise SpecError(f"The protocol '{protocol}' takes no test meta-dataset; only fresh and held-out do.")
    rows, extra = rows.take(~rows.augmented), rows.take(rows.augmented)
    test = None if test is None else test.take(~test.augmented)
    trials = _reached_trials(rows)
    if trials < 2 * FEWEST_TRIALS:
        raise DataError(
            f"Only {trials} trials that are not augmented reached their ε; an evaluation needs at least"
            f" {2 * FEWEST_TRIALS}. Run a larger sweep."
        )
    if protocol == "in-corpus":
        made, notes = _folds(rows)
    elif protocol == "fresh":
        made, notes = _fresh(rows, test)
    elif protocol == "held-out":
        made, notes = _held_out(rows, test)
    else:
        made, notes = _leave_one_out(rows, protocol)
    if len(extra):
        column = {"lodo": "dataset", "loao": "architecture", "lofo": "family", "held-out": "dataset"}.get(protocol)
        made = [_with_augmented(split, extra, column) for split in made]
        notes.append(
            f"{len(set(extra['trial_id']))} augmented trials are fitted on by the presets that take them, except those"
            " of what a split leaves out; none is scored."
        )
    return made, notes


def _with_augmented(split: Split, extra: Rows, column: str | None) -> Split:
    """Add to a split's training rows the augmented ones that share no value of ``column`` with its test rows."""
    if column is not None:
        extra = extra.take(~np.isin(_left_out(extra, column), np.unique(_left_out(split.test, column))))
    return Split(split.name, split.train.join(extra), split.test)


def _folds(rows: Rows) -> tuple[list[Split], list[str]]:
    notes = []
    trials = rows.trials
    first = np.unique(trials, return_index=True)[1]  # one row per trial
    cells = rows.cells[first]
    smallest = min(sum(rows["family"][first] == f) for f in rows.families)
    count = min(FOLDS, int(smallest))
    if count < FOLDS:
        notes.append(f"The smallest family has {smallest} trials: {max(count, 2)} folds instead of {FOLDS}.")
    count = max(count, 2)
    # Deal the trials of one cell after another round the folds: each cell is spread evenly, and so are the folds.
    shuffled = np.random.default_rng(0).permutation(len(first))
    names = np.array(["|".join(map(str, cells[i])) for i in shuffled])
    dealt = shuffled[np.argsort(names, kind="stable")]
    fold_of_trial = np.empty(len(first), dtype=int)
    fold_of_trial[dealt] = np.arange(len(first)) % count
    assigned = fold_of_trial[trials]
    return [Split(f"fold {k}", rows.take(assigned != k), rows.take(assigned == k)) for k in range(count)], notes


def _fresh(rows: Rows, test: Rows | None) -> tuple[list[Split], list[str]]:
    if test is None:
        raise SpecError("The protocol 'fresh' needs a test meta-dataset from other seeds: test_dir (--test).")
    shared = set(rows["trial_id"].astype(str)) & set(test["trial_id"].astype(str))
    if shared:
        raise DataError(
            f"{len(shared)} trials are in both meta-datasets; sweep the test plan with another seed so that none is."
        )
    return [Split("fresh", rows, test)], []


def _held_out(rows: Rows, test: Rows | None) -> tuple[list[Split], list[str]]:
    names = [_plain(d) in HELD_OUT for d in rows.sources]
    inside = np.array(names, dtype=bool)
    if test is None:
        if not inside.any():
            raise DataError("No row is from SVHN or IMDB; sweep them, or pass their meta-dataset as test_dir (--test).")
        test = rows.take(inside)
    train = rows.take(~inside & ~np.isin(rows.sources, np.unique(test.sources)))
    if _reached_trials(train) < FEWEST_TRIALS:
        raise DataError("Too few trials remain once the held-out datasets are left out; sweep more datasets.")
    return [Split(", ".join(sorted({str(d) for d in test["dataset"]})), train, test)], []  # one fit serves them all


def _leave_one_out(rows: Rows, protocol: str) -> tuple[list[Split], list[str]]:
    column = {"lodo": "dataset", "loao": "architecture", "lofo": "family"}[protocol]
    values = rows.keys("family", "architecture") if protocol == "loao" else _left_out(rows, column)
    groups = sorted({v for v in values if not (isinstance(v, tuple) and v[1] is None)})
    if len(groups) < 2:
        raise DataError(f"Leaving one {column} out needs at least two, and the meta-dataset has {len(groups)}.")
    out, notes = [], []
    for group in groups:
        index = np.array([v == group for v in values], dtype=bool)
        name = group[1] if isinstance(group, tuple) else str(group)
        rest = rows.take(~index)
        if protocol == "loao" and group[0] not in rest.families:
            notes.append(f"'{name}' is the only architecture of the family '{group[0]}': not left out.")
        elif _reached_trials(rest) < FEWEST_TRIALS:
            notes.append(f"Too few trials remain without '{name}': not left out.")
        else:
            out.append(Split(name, rest, rows.take(index)))
    if not out:
        raise DataError(f"No {column} can be left out with enough trials to fit on. " + " ".join(notes))
    return out, notes


def _left_out(rows: Rows, column: str) -> np.ndarray:
    """Return str [n]: what a split leaves out whole; a dataset goes with its images at other sizes."""
    return rows.sources if column == "dataset" else rows[column].astype(str)


def calibration_rows(rows: Rows, seed: int = 0) -> np.ndarray:
    """Return bool [n]: rows of the tenth of each family's trials that calibrate and are not scored.

    At least three trials; none where a family has fewer than ten.
    """
    chosen = np.zeros(len(rows), dtype=bool)
    trials = rows.trials
    for family in rows.families:
        mine = np.unique(trials[(rows["family"] == family) & rows.reached])
        if len(mine) >= CALIBRATION_FEWEST:
            count = max(3, int(np.ceil(CALIBRATION_SHARE * len(mine))))
            chosen |= np.isin(trials, np.random.default_rng([seed, len(mine)]).permutation(mine)[:count])
    return chosen


def configurations(rows: Rows) -> tuple[np.ndarray, bool]:
    """Return (object [n]: all that a trial is but its seeds, approximate).

    Rows without their model (imported ones) are told apart by their parameter count, which is approximate.
    """
    approximate = any(m is None for m in rows["model"])
    keys = rows.keys(
        *(
            "family",
            "architecture",
            "model",
            "dataset",
            "task",
            "batch_size",
            "lr",
            "epsilon",
            "precision",
            "preprocess",
        )
    )
    out = np.empty(len(rows), dtype=object)
    for i, (key, model, log_p) in enumerate(zip(keys, rows["model"], rows["log_p"], strict=True)):
        out[i] = str((*key, None if model is not None else round(float(log_p), 6)))
    return out, approximate


def _reached_trials(rows: Rows) -> int:
    return len(np.unique(rows["trial_id"][rows.reached].astype(str)))


def _plain(name: object) -> str:
    return str(name).lower().replace("-", "_").split("_")[0]
