"""The time of the paper's whole composition of rows, extrapolated from the rows of a sweep.

Every row says how long its trial's probe and trajectory took (``probe_seconds``, ``truth_seconds``). Trials that share
a stack share its time: while a stack runs, each trial in it is charged an equal part, so that the sum over trials is
the time that passed. Building models, batches and committing rows is not in it (a sixth of an MLP's time, nothing next
to the others').

A sweep that runs for hours is interrupted and stopped for a while now and then. Therefore two figures: ``recorded``
takes the rows as they are; ``steady`` takes a trajectory at no more than its updates at the trial's own median plain
step (``step_seconds``) and a probe at the median of its cell, which pauses do not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cape.config import SweepSpec
from cape.store import reader

CELL = ["family", "dataset", "batch_size"]
_COLUMNS = ["trial_id", *CELL, "probe_seconds", "truth_seconds", "step_seconds", "stopped_at", "device", "augmentation"]


def from_rows(folders: Sequence[str | Path], composition: SweepSpec, workers: int) -> dict[str, Any]:
    """Return the hours that the composition takes, family by family, as a sweep's rows have it.

    Args:
        folders: meta-datasets; a trial that is in several counts once.
        composition: the sweep whose time is wanted.
        workers: of the sweep that wrote the rows, on one machine; it is taken to have as many.

    Returns:
        ``hours`` of the families in ``complete``; for each family ``trials`` measured, their ``share_of_trials``,
        hours of both kinds, and ``borrowed``: cells without a trial, which take the mean of the family's other datasets
        at their batch size. ``cells``: trials, and mean seconds of both kinds for one trial.
    """
    frames = [reader.read(folder, _COLUMNS).to_pandas() for folder in folders]
    trials = pd.concat(frames).drop_duplicates("trial_id")
    trials = trials[trials.augmentation.isna()].dropna(subset=["probe_seconds", "truth_seconds", "stopped_at"])
    plain = (trials.step_seconds * (trials.stopped_at + 1)).fillna(np.inf)
    probe = trials.groupby(CELL, observed=True).probe_seconds.transform("median")
    trials["recorded"] = trials.probe_seconds + trials.truth_seconds
    trials["steady"] = probe + np.minimum(trials.truth_seconds, plain)
    cells = trials.groupby(CELL, observed=True).agg(
        trials=("trial_id", "size"), recorded=("recorded", "mean"), steady=("steady", "mean")
    )
    result: dict[str, Any] = {"extrapolated": True, "workers": workers, "devices": sorted(set(trials.device))}
    families = {family: _family(cells, family, composition, workers) for family in composition.families}
    result["families"] = families
    result["complete"] = [name for name, about in families.items() if "hours" in about]
    result["hours"] = {
        kind: sum(families[name]["hours"][kind] for name in result["complete"]) for kind in ("recorded", "steady")
    }
    result["cells"] = {" ".join(map(str, key)): dict(values) for key, values in cells.to_dict("index").items()}
    return result


def _family(cells: pd.DataFrame, family: str, composition: SweepSpec, workers: int) -> dict[str, Any]:
    each = len(composition.lrs) * composition.trials_by_family.get(family, composition.trials_per_cell)
    wanted = [(family, dataset, size) for dataset in composition.datasets for size in composition.batch_sizes]
    held = cells[cells.index.isin(wanted)]
    about: dict[str, Any] = {
        "trials": int(held.trials.sum()),
        "share_of_trials": float(held.trials.sum() / (each * len(wanted))),
        "borrowed": [" ".join(map(str, key[1:])) for key in wanted if key not in held.index],
    }
    by_size = held.groupby("batch_size")[["recorded", "steady"]].mean()
    if len(by_size) == len(composition.batch_sizes):
        seconds = {
            kind: sum(each * (held if key in held.index else by_size).loc[key if key in held.index else key[2], kind]
                      for key in wanted)
            for kind in ("recorded", "steady")
        }  # fmt: skip
        about["hours"] = {kind: float(value / workers / 3600) for kind, value in seconds.items()}
    return about
