"""What a sweep is expected to take: from its own rows where there are any, else from the package's measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cape.config import SweepSpec, TrialSpec
from cape.store import writer
from cape.store.location import Location
from cape.sweep.estimate import MEASURED_SECONDS, Pace, estimate, measured_seconds, trial_seconds_of
from cape.sweep.plan import Group

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "sweep_cpu.json"


def test_the_packages_times_are_those_that_were_measured() -> None:
    measured = json.loads(RESULTS.read_text())["costs"]["families"]
    assert set(measured) == set(MEASURED_SECONDS) == {"mlp", "cnn", "rnn", "transformer"}
    for family, kinds in MEASURED_SECONDS.items():
        for kind, times in kinds.items():
            found = {int(b): m["seconds_mean"] for b, m in measured[family][kind].items()}
            assert times == pytest.approx(found, rel=0.06), (family, kind)  # two digits


def test_other_batch_sizes_take_time_in_proportion() -> None:
    times = MEASURED_SECONDS["transformer"]["gray"]
    assert len(times) > 1
    for b, seconds in times.items():
        assert measured_seconds("transformer", "mnist", b) == pytest.approx(seconds)
    assert measured_seconds("transformer", "mnist", 256) == pytest.approx(4 * times[64])  # from the nearest
    assert measured_seconds("transformer", "mnist", 16) == pytest.approx(times[32] / 2)
    # Three channels cost more than one; a dataset that is not known may have three.
    for name in ("cifar10", "svhn", "imdb", "/data/mine.parquet"):
        assert measured_seconds("cnn", name, 32) == MEASURED_SECONDS["cnn"]["colour"][32]
    assert measured_seconds("cnn", "fashion_mnist", 32) == MEASURED_SECONDS["cnn"]["gray"][32]
    assert math.isnan(measured_seconds("mine", "mnist", 32))


def test_a_pace_is_that_of_the_family_else_of_all() -> None:
    pace = Pace()
    assert pace.seconds("mlp", 3.0, 5) == 3.0 and math.isnan(pace.seconds("mine", math.nan, 5))
    pace.add("mlp", 10.0, 5.0, 100)
    assert pace.seconds("mlp", 3.0, 5) == pytest.approx(6.0)
    assert pace.seconds("cnn", 3.0, 5) == pytest.approx(6.0)
    pace.add("cnn", 10.0, 20.0, 2)
    assert pace.seconds("cnn", 3.0, 5) == pytest.approx(1.5)
    assert pace.seconds("rnn", 5.0, 5) == pytest.approx(4.0)  # 20 s where 25 were expected
    pace.add("mine", 8.0, math.nan, 4)
    assert pace.seconds("mine", math.nan, 5) == pytest.approx(10.0)
    assert pace.seconds("rnn", 5.0, 5) == pytest.approx(4.0)


def test_rows_of_a_faster_device_scale_what_it_has_not_run(tmp_path: Path) -> None:
    """Trials of one cell, at a tenth of the package's time, say something of every other."""

    def rows(batch_size: int, seconds: float) -> list[dict[str, Any]]:
        trials = [TrialSpec("cnn", "mnist", batch_size, 1e-3, (0.1,), seed) for seed in range(2)]
        shared = {"family": "cnn", "dataset": "mnist", "batch_size": batch_size, "epsilon": 0.1, "device": "fast"}
        return [{**shared, "trial_id": t.trial_id, "probe_seconds": 0.0, "truth_seconds": seconds} for t in trials]

    writer.write_shard(rows(32, measured_seconds("cnn", "mnist", 32) / 10), tmp_path)
    spec = SweepSpec(families=("cnn", "rnn"), datasets=("mnist", "cifar10"), batch_sizes=(32, 64), trials_per_cell=2)
    seconds, source = trial_seconds_of(spec, Location.of(tmp_path))
    assert source.startswith("2 trials") and source.endswith("on fast")
    for family, dataset, batch_size in (("cnn", "mnist", 32), ("cnn", "cifar10", 64), ("rnn", "mnist", 32)):
        expected = measured_seconds(family, dataset, batch_size) / 10
        assert seconds(Group(family, dataset, batch_size, 1)) == pytest.approx(expected)
    whole = sum(
        2 * 3 * measured_seconds(f, d, b) / 10 for f in spec.families for d in spec.datasets for b in spec.batch_sizes
    )
    assert estimate(spec, Location.of(tmp_path)).worker_hours == pytest.approx(whole / 3600)
