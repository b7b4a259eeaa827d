"""Boosters fitted on a GPU, in this process and by Ray Train: as good as those of a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cape.metamodel.fit import fit, fit_table
from cape.metamodel.line import POOLED
from cape.metamodel.presets import PRESETS
from cape.metamodel.regressors import design, predict_log, train_boosters
from cape.metamodel.rows import Rows, read_rows

pytestmark = pytest.mark.gpu

CORPUS = Path(__file__).resolve().parents[2] / "benchmarks" / "corpus" / "plain"
PRESET = PRESETS["product"].replace(trees=200, select=False, surface=0.0)


@pytest.fixture(scope="module")
def mlps() -> Rows:
    pytest.importorskip("xgboost", reason="XGBoost is not installed")
    rows = read_rows(CORPUS)
    return rows.take((rows["family"] == "mlp") & rows.reached & (rows["replicate"] < 30))


def test_boosters_of_a_gpu_predict_as_well(mlps: Rows) -> None:
    left_out = mlps["replicate"] % 5 == 0
    data, unseen, error = design(mlps.take(~left_out), PRESET, ("mlp",)), mlps.take(left_out), {}
    for device in ("cpu", "cuda"):
        boosters = train_boosters(data, PRESET, device)
        where = json.loads(boosters[POOLED].save_config())["learner"]["generic_param"]["device"]
        assert where.startswith(device)
        log_hat = predict_log(boosters, data.lines, {}, unseen, PRESET, ("mlp",))
        error[device] = np.abs(np.exp(log_hat) - unseen["t_star"]).mean()
    assert error["cuda"] == pytest.approx(error["cpu"], rel=0.02)


def test_ray_train_fits_on_the_gpu(mlps: Rows, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    if ray.is_initialized() and not ray.cluster_resources().get("GPU"):
        pytest.skip("the Ray of this test run has no GPU")
    from cape.store.reader import read
    from cape.store.writer import write_shard

    write_shard([r for r in read(CORPUS).to_pylist() if r["trial_id"] in set(mlps["trial_id"])], tmp_path / "meta")
    made = fit(tmp_path / "meta", tmp_path / "model", preset=PRESET)
    here = fit_table(read(tmp_path / "meta"), PRESET)
    error = [np.abs(m.predict(mlps) - mlps["t_star"]).mean() for m in (made, here)]
    assert error[0] == pytest.approx(error[1], rel=0.05, abs=0.02)  # on rows that were fitted, where both are small
