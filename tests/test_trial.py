"""A trial's rows: where probe and T* meet, from nothing but a seed."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cape import datasets, families
from cape import trial as trial_module
from cape.baselines.rebuilt import rebuild
from cape.config import Augmentation, ModelSpec, StoppingRule, TrialSpec
from cape.convergence import measure
from cape.drawn import Drawn, build_model, built, draw, draw_model
from cape.errors import DataError, ModelError, SpecError
from cape.feature_names import FEATURE_NAMES
from cape.logs import log_once
from cape.metamodel.rows import Rows
from cape.probing import probe
from cape.store.schema import ROW_SCHEMA
from cape.trial import run_trials, trial_of

TIMES = ("probe_seconds", "truth_seconds", "step_seconds")


def mlp_trial(seed: int = 0, **changes: object) -> TrialSpec:
    settings = {"family": "mlp", "dataset": "digits", "batch_size": 16, "lr": 1e-3, "seed": seed, **changes}
    return TrialSpec(**settings)  # type: ignore[arg-type]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def features_of(row: dict) -> dict[str, float]:
    return {name: row[name] for name in FEATURE_NAMES if row[name] is not None}


def test_the_rows_of_a_trial_say_what_the_probe_and_the_trajectory_say() -> None:
    trial = mlp_trial(seed=3)
    (rows,) = run_trials([trial], sweep_hash="abc")
    assert [row["epsilon"] for row in rows] == [0.2, 0.15, 0.1]
    dataset = datasets.load("digits")
    spec = draw_model(trial, dataset)
    model = build_model(trial, spec)
    batch = dataset.batch(16, trial.seed_for("batch"), spec.layout)
    features = probe(model, batch, lr=1e-3, dataset_size=dataset.full_train_size).as_dict()
    truth = measure(model, batch, lr=1e-3, seed=trial.seed_for("train"))
    for row in rows:
        assert set(row) <= set(ROW_SCHEMA.names)
        assert features_of(row) == pytest.approx(features_of(features), rel=1e-6)
        assert all(value == np.float32(value) for value in features_of(row).values())
        assert row["t_star"] == truth.t_star[row["epsilon"]] > 0
        assert row["converged"] and row["stop_reason"] is None and "error" not in row
        assert row["log_epsilon"] == math.log(row["epsilon"])
        assert row["stopped_at"] == truth.stopped_at and row["l0"] == truth.l0
        assert row["losses"] == truth.losses[:64].tolist()
        assert (row["trial_id"], row["sweep_hash"], row["seed"]) == (trial.trial_id, "abc", 3)
        assert ModelSpec.from_dict(json.loads(row["model"])) == spec
        assert row["architecture"] == spec.architecture and row["task"] == "classification"
        assert all(row[name] > 0 for name in TIMES)


def test_a_row_names_its_trial() -> None:
    augmentation, short = Augmentation(seed=2, classes=0.0, zeroed=0.5), StoppingRule(max_steps=3)
    for trial in (
        TrialSpec("encoder", "digits", 16, 1e-3, seed=5, precision="bf16", stopping=short),
        TrialSpec("mlp", "digits", 32, 3e-4, seed=6, preprocess="reference", augmentation=augmentation, stopping=short),
        TrialSpec("mlp", "digits", 16, 1e-3, seed=7, task="multilabel", model_seed=3, stopping=short),
    ):
        rows = next(run_trials([trial]))
        drawn = draw(trial, None).spec
        assert drawn is not None
        expected = trial.replace(model=drawn, task=drawn.task, stopping=StoppingRule(), model_seed=None)
        found, batch = trial_of(rows[0]), built(trial).batch
        assert found == expected
        again, model, (x, y) = rebuild(Rows.from_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA)), 0)
        assert again == expected and torch.equal(x, batch[0]) and torch.equal(y, batch[1])
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built(trial).model.parameters(), strict=True))


def test_a_trial_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    alone = without_times(next(run_trials([mlp_trial(seed=1)])))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    _, after_another, other = (without_times(rows) for rows in run_trials([mlp_trial(2), mlp_trial(1), mlp_trial(5)]))
    assert after_another == alone
    assert other[0]["losses"] != alone[0]["losses"]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_engine_decides_nothing_but_the_time() -> None:
    model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 2, "width": 32, "activation": "gelu"})
    trials = [mlp_trial(seed, model=model, lr=lr) for seed, lr in enumerate([5e-4, 1e-3, 2e-3] * 3)]
    trials.insert(4, mlp_trial(77))

    def by_id(**options: object) -> dict[str, list[dict]]:
        return {rows[0]["trial_id"]: without_times(rows) for rows in run_trials(trials, **options)}  # type: ignore[arg-type]

    stacked, single = by_id(), by_id(engine="single")
    assert len(stacked) == len(single) == 10
    for name, rows in stacked.items():  # several are probed at once: the per-sample norms agree to rounding
        for one, other in zip(rows, single[name], strict=True):
            assert features_of(one) == pytest.approx(features_of(other), rel=1e-6)
            assert all(one[n] == other[n] for n in set(one) - {"log_g2", "log_tau"})
    assert all(row["step_seconds"] > 0 for rows in run_trials(trials) for row in rows)
    with pytest.raises(SpecError, match="Unknown engine"):
        next(run_trials(trials, engine="stack"))


def test_a_trial_that_finds_no_memory_beside_a_stack_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 1, "width": 16, "activation": "relu"})
    trials = [mlp_trial(seed, model=model) for seed in range(6)]
    expected = {rows[0]["trial_id"]: without_times(rows) for rows in run_trials(trials)}
    prepare, refused = trial_module.prepare, []

    def tight(drawn: Drawn, device: torch.device) -> object:
        if drawn.trial.seed == 5 or (drawn.trial.seed == 3 and not refused):
            refused.append(drawn.trial.seed)
            raise torch.OutOfMemoryError("no room")
        return prepare(drawn, device)

    monkeypatch.setattr(trial_module, "prepare", tight)
    found = {rows[0]["trial_id"]: without_times(rows) for rows in run_trials(trials)}
    assert refused[:2] == [3, 5] and len(found) == 6
    assert found.pop(trials[5].trial_id)[0]["error"] == "OutOfMemoryError: no room"
    assert found == {trial_id: expected[trial_id] for trial_id in found}


def test_a_family_that_cannot_be_stacked_runs_singly_and_the_log_says_why_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.head(x)

    monkeypatch.setattr(type(families.get("mlp")), "build", lambda self, spec: Doubled())
    log_once.cache_clear()
    model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 1, "width": 16, "activation": "relu"})
    with caplog.at_level(logging.INFO, logger="cape"):
        rows = [rows[0] for rows in run_trials([mlp_trial(seed, model=model) for seed in range(3)])]
    assert all(row["converged"] for row in rows)
    assert [r.getMessage() for r in caplog.records] == [
        "mlp Doubled runs singly: Doubled has no stacked layer, and on a CPU vmap is no faster than one at a time."
    ]


def test_trials_that_share_a_stack_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 1, "width": 16, "activation": "relu"})
    trials = [mlp_trial(seed, model=model) for seed in range(6)]
    build = type(families.get("mlp")).build

    def sometimes(self: object, spec: ModelSpec) -> torch.nn.Module:
        if torch.initial_seed() in {trials[0].seed_for("init"), trials[3].seed_for("init")}:
            raise RuntimeError("a broken model")
        return build(self, spec)  # type: ignore[arg-type]

    monkeypatch.setattr(type(families.get("mlp")), "build", sometimes)
    found = {rows[0]["trial_id"]: rows for rows in run_trials(trials)}
    assert [found[t.trial_id][0]["stop_reason"] for t in trials] == ["failed", None, None, "failed", None, None]
    assert all(row["converged"] for i in (1, 2, 4, 5) for row in found[trials[i].trial_id])


def test_a_censored_trial_is_recorded_as_such() -> None:
    (rows,) = run_trials([mlp_trial(stopping=StoppingRule(max_steps=1))])
    assert [row["t_star"] for row in rows] == [None] * 3
    assert {(row["converged"], row["stop_reason"], row["stopped_at"]) for row in rows} == {(False, "cap", 1)}
    assert all(row["log_g2"] is not None for row in rows)


def test_a_trial_that_fails_leaves_the_next_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.get("mlp")
    build = type(family).build

    def sometimes(self: object, spec: ModelSpec) -> torch.nn.Module:
        if torch.initial_seed() == mlp_trial(1).seed_for("init"):
            raise RuntimeError("a broken\nmodel")
        if torch.initial_seed() == mlp_trial(2).seed_for("init"):
            raise ModelError("NaN outputs.")
        return build(self, spec)  # type: ignore[arg-type]

    monkeypatch.setattr(type(family), "build", sometimes)
    good, broken, nan, last = run_trials([mlp_trial(0), mlp_trial(1), mlp_trial(2), mlp_trial(3)])
    assert {(r["stop_reason"], r["error"]) for r in broken} == {("failed", "RuntimeError: a broken model")}
    assert {(r["stop_reason"], r["error"]) for r in nan} == {("failed", "ModelError: NaN outputs.")}
    assert [r["t_star"] for r in broken] == [None] * 3 and not any(r["converged"] for r in broken)
    assert all(r["converged"] for r in good + last)


@pytest.mark.parametrize("method", ["sample", "build"])
def test_whatever_a_family_raises_fails_one_trial(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    family = type(families.get("mlp"))
    whole, calls = getattr(family, method), iter([True, False])

    def sometimes(*arguments: object, **options: object) -> object:
        if next(calls):
            raise KeyError("width")
        return whole(*arguments, **options)

    monkeypatch.setattr(family, method, sometimes)
    rows = {r[0]["seed"]: r[0] for r in run_trials([mlp_trial(0), mlp_trial(1)], engine="single")}
    assert rows[0]["error"] == "ModelError: The family 'mlp' failed: KeyError: 'width'." and rows[1]["converged"]
    monkeypatch.setattr(family, method, lambda *_, **__: 3)
    ((failed, *_),) = run_trials([mlp_trial(0)])
    assert failed["stop_reason"] == "failed" and "The family 'mlp' failed" in failed["error"]


def test_a_device_that_failed_is_not_the_trials_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def sticky(self: object, spec: ModelSpec) -> torch.nn.Module:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(families.get("mlp")), "build", sticky)
    with pytest.raises(torch.AcceleratorError):
        next(run_trials([mlp_trial()]))


def test_what_no_trial_could_survive_is_raised() -> None:
    with pytest.raises(SpecError):
        next(run_trials([mlp_trial(family="mpl")]))
    with pytest.raises((SpecError, DataError)):
        next(run_trials([mlp_trial(dataset="digitz")]))
    with pytest.raises(DataError):
        next(run_trials([mlp_trial(batch_size=10**6)]))


@pytest.mark.parametrize(("dataset", "task"), [("diabetes", "regression"), ("digits", "multilabel")])
def test_other_tasks(dataset: str, task: str) -> None:
    short = StoppingRule(max_steps=30)
    (rows,) = run_trials([mlp_trial(dataset=dataset, task=task, stopping=short, lr=2e-3)])
    assert {row["task"] for row in rows} == {task}
    assert all(row.get("error") is None and row["losses"][0] > row["losses"][-1] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mlp", "cnn", "rnn", "transformer"])
def test_every_family_on_real_images(family: str, data_root: Path) -> None:
    trial = TrialSpec(family, "mnist", batch_size=8, lr=1e-3, epsilons=(0.7,), stopping=StoppingRule(max_steps=15))
    (rows,) = run_trials([trial], data_root=data_root)
    (row,) = rows
    assert row.get("error") is None
    assert row["stop_reason"] in (None, "cap") and row["final_loss"] < row["l0"]
    assert all(math.isfinite(row[n]) for n in FEATURE_NAMES if n != "log_tau_full")


def test_a_trial_that_cannot_be_probed_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 1, "width": 16, "activation": "relu"})
    trials = [mlp_trial(seed, model=model) for seed in range(5)]
    expected = {rows[0]["trial_id"]: features_of(rows[0]) for rows in run_trials(trials)}
    build = type(families.get("mlp")).build

    def sometimes(self: object, spec: ModelSpec) -> torch.nn.Module:
        made = build(self, spec)  # type: ignore[arg-type]
        if torch.initial_seed() == trials[2].seed_for("init"):
            torch.nn.init.constant_(next(made.parameters()), math.nan)
        return made

    monkeypatch.setattr(type(families.get("mlp")), "build", sometimes)
    found = {rows[0]["trial_id"]: rows[0] for rows in run_trials(trials)}
    failed = found.pop(trials[2].trial_id)
    assert failed["stop_reason"] == "failed" and "NaN" in failed["error"] and len(found) == 4
    assert all(features_of(row) == pytest.approx(expected[name], rel=1e-6) for name, row in found.items())


def test_trials_of_one_model_and_two_tasks_share_no_stack() -> None:
    model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 1, "width": 16, "activation": "relu"})
    trials = [mlp_trial(seed, model=model, task=task) for seed in range(2) for task in ("classification", "multilabel")]
    found = {rows[0]["trial_id"]: rows[0] for rows in run_trials(trials)}
    single = {rows[0]["trial_id"]: rows[0] for rows in run_trials(trials, engine="single")}
    assert len(found) == 4
    for name, row in found.items():
        assert (row["l0"], row["t_star"], row["task"]) == (
            single[name]["l0"],
            single[name]["t_star"],
            single[name]["task"],
        )
