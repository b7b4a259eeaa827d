"""evaluate() and report() from end to end on published rows, and the published accuracy."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from authors import rows

from cape.baselines.rebuilt import rebuild
from cape.config import SweepSpec
from cape.errors import DataError, SpecError, StoreError
from cape.evaluation import Evaluation, evaluate, report
from cape.evaluation.methods import FULL_PRESETS
from cape.evaluation.paper_tables import PROBES
from cape.evaluation.table import Table, select
from cape.evaluation.tables import build_tables
from cape.metamodel.fit import fit_table
from cape.metamodel.presets import PRESETS
from cape.metamodel.rows import PAPER_FEATURES, Rows
from cape.probing import probe
from cape.store.schema import ROW_SCHEMA
from cape.sweep.plan import Plan
from cape.trial import run_trials

SMALL = PRESETS["product"].replace(trees=120, depth=4, learning_rate=0.1, select=False, per_family=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    table = rows(every=8)
    # Curves of the right length and end, so that the curve baseline has something to read.
    ends = zip(table["t_star"].to_pylist(), table["epsilon"].to_pylist(), strict=True)
    losses = [np.geomspace(1.0, 0.99 * epsilon, t + 1)[:64].tolist() for t, epsilon in ends]
    table = table.set_column(table.schema.get_field_index("losses"), "losses", pa.array(losses, pa.list_(pa.float32())))
    return evaluate(table, "in-corpus", out, presets=("paper", "static", SMALL)), out


def test_product_beats_paper_and_every_baseline_but_the_curve(made: tuple[Evaluation, Path]) -> None:
    evaluation, _ = made
    for family in ("mlp", "rnn"):
        ours = evaluation.mae("product", family)
        assert ours < 0.8 * evaluation.mae("paper", family)
        for baseline in ("static_linear", "ntkl", "median"):
            assert evaluation.mae("paper", family) < evaluation.mae(baseline, family)
        assert evaluation.avg_accuracy("product", family) > 0.8


def test_nothing_is_scored_on_calibration_rows(made: tuple[Evaluation, Path]) -> None:
    evaluation, _ = made
    every = select(evaluation.predictions, "product", scored=False)
    scored = select(evaluation.predictions, "product")
    held = set(every["trial_id"]) - set(scored["trial_id"])
    assert 0.08 < len(held) / len(every["trial_id"]) < 0.12
    main = evaluation.tables["main"]
    index = main.columns.index("rows")
    product = [r for r in main.rows if r[1] == "CAPE product" and r[0] == "all"]
    assert product[0][index] == len(scored["trial_id"])


def test_all_tables_come_from_the_store_on_disk(made: tuple[Evaluation, Path]) -> None:
    evaluation, out = made
    again = build_tables(pq.read_table(out / "predictions.parquet"), "in-corpus")
    assert {k: t.csv() for k, t in again.items()} == {k: t.csv() for k, t in evaluation.tables.items()}
    with open(out / "main.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    row = next(r for r in written if r["family"] == "mlp" and r["method"] == "CAPE product")
    assert float(row["MAE"]) == pytest.approx(evaluation.mae("product", "mlp"))
    assert float(row["paper's MAE"]) == 3.79


def test_the_papers_tables_have_its_numbers_beside_ours(made: tuple[Evaluation, Path]) -> None:
    evaluation, _ = made
    first = {(r[0], r[1]): r for r in evaluation.tables["table_1"].rows}
    product = first["rnn", "CAPE product"]
    assert product[3] == pytest.approx(evaluation.mae("product", "rnn")) and product[4:7:2] == (4.21, 0.88)
    best = next(r for k, r in first.items() if k[0] == "rnn" and k[1].startswith("best baseline"))
    assert best[3] == min(evaluation.mae(n, "rnn") for n in ("static_linear", "ntkl")) and best[4] == 7.03
    second = [r for r in evaluation.tables["table_2"].rows if r[0] == "mlp"]
    assert [r[1] for r in second] == ["cifar10", "cifar100", "fashion_mnist", "mnist", "average"]
    assert second[-1][2] == sum(r[2] for r in second[:-1])
    gained = {r[1]: r[5] for r in evaluation.tables["gradient_probes"].rows if r[0] == "mlp"}
    assert gained["four static features"] == 0.0 and gained["product"] > 20


def test_full_tables_name_every_regressor_and_feature(tmp_path: Path) -> None:
    presets = [PRESETS[name].replace(trees=5, select=False, intervals=False) for name in FULL_PRESETS]
    made = evaluate(rows(every=120), presets=presets, comparators=("linear", "ridge"))
    fourth = [r[1] for r in made.tables["table_4"].rows if r[0] == "mlp"]
    assert len(fourth) == 5 and "ridge (A.4)" in fourth
    assert [r[1] for r in made.tables["ablation"].rows[:7]] == ["none", *PAPER_FEATURES]
    assert len(made.tables["gradient_probes"].rows) == 2 * len(PROBES)


def test_costs_and_the_ntk_spectrum_come_from_trials_built_again() -> None:
    spec = SweepSpec(families=("mlp",), datasets=("digits",), lrs=(2e-3,), batch_sizes=(16,), trials_per_cell=16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small lose to a second thread what they gain
    swept = [row for trial in run_trials(Plan(spec).trials()) for row in trial]
    table = pa.Table.from_pylist(swept, schema=ROW_SCHEMA)
    augmented = next(run_trials(Plan(spec.replace(augmented=True, trials_per_cell=1)).trials()))
    for found in (table, pa.Table.from_pylist(augmented, schema=ROW_SCHEMA)):
        first = Rows.from_table(found)
        trial, model, batch = rebuild(first, 0)
        features = probe(model, batch, lr=trial.lr, dataset_size=1)
        assert features.log_g2 == pytest.approx(first["log_g2"][0], rel=1e-7)  # the very same weights and batch
    made = evaluate(table, presets=(SMALL.replace(trees=20, intervals=False),), rebuild=1)
    torch.set_num_threads(threads)
    spent = {r[1]: r[4] for r in made.tables["costs"].rows}
    assert spent["one probe: every learned method with gradient features"] == 1.0
    assert 0 < spent["NTK mean eigenvalue"] < 1 < spent["curve extrapolation, 60 steps"]
    known = select(made.predictions, "ntk_ode")
    assert 0 < np.isfinite(known["predicted"]).sum() <= 15 and known["predicted"][0] != 0


def test_a_floor_from_replicates_and_augmented_rows_that_are_never_scored() -> None:
    table = rows(every=30)
    marks = [None if i % 3 else "{}" for i in range(table.num_rows)]
    mixed = Rows.from_table(table)
    mixed = Rows({**mixed.columns, "augmentation": np.array(marks, dtype=object)})
    # Six "replicates" of each of twenty configurations: the same row with the T* of its neighbours in the cell.
    replicates = Rows.from_table(rows(every=1)).take(np.arange(120))
    replicates = Rows({**replicates.columns, "model": np.array([f"m{i // 6}" for i in range(120)], dtype=object)})
    for name in ("family", "dataset", "batch_size", "lr", "epsilon", "architecture"):
        replicates.columns[name][:] = replicates[name][0]
    made = evaluate(mixed, presets=(SMALL.replace(trees=20),), floor_dir=replicates)
    scored = set(select(made.predictions, "product", scored=False)["trial_id"])
    assert scored == set(mixed["trial_id"][~mixed.augmented])
    floor = select(made.predictions, "replicate floor")
    assert set(floor["split"]) == {"replicates"} and np.isfinite(floor["predicted"]).all()
    first = {r[1]: r for r in made.tables["table_1"].rows if r[0] == floor["family"][0]}
    ratio = first["CAPE product"][3] / first["replicate floor"][3]
    assert first["CAPE product"][7] == pytest.approx(ratio) and first["replicate floor"][2] == 120
    assert any("augmented trials are fitted on" in n for n in made.notes)


def test_one_split_without_models_makes_the_floor_approximate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cape.logs._EVERY_S", 0.0)  # what takes long says how far it is
    known = Rows.from_table(rows(every=40))
    named = np.where(known["dataset"] == "cifar10", None, "{}").astype(object)  # not the last split
    made = evaluate(Rows({**known.columns, "model": named}), "lodo", presets=(PRESETS["paper"].replace(trees=5),))
    splits = list(dict.fromkeys(made.predictions["split"].to_pylist()))
    assert len(splits) > 1 and "cifar10" not in splits[-1]
    said = capsys.readouterr().err
    assert f"1/{len(splits)} splits scored" in said and f"methods of '{splits[-1]}' scored" in said
    assert any("Imported rows carry no model" in n for n in made.notes)


def test_baselines_are_fitted_on_plain_rows_alone() -> None:
    plain = Rows.from_table(rows(every=40))
    extra = {"trial_id": np.char.add("x", plain["trial_id"].astype(str)).astype(object)}
    extra |= {"t_star": 10 * plain["t_star"], "augmentation": np.full(len(plain), "{}", dtype=object)}
    mixed = plain.join(Rows({**plain.columns, **extra}))
    small = (PRESETS["paper"].replace(trees=10),)
    one, other = evaluate(plain, presets=small), evaluate(mixed, presets=small)
    for name in ("static_linear", "median", "paper"):
        assert one.mae(name) == other.mae(name)


def test_report_directory_is_complete_and_can_be_rewritten(made: tuple[Evaluation, Path], tmp_path: Path) -> None:
    evaluation, out = made
    names = {p.name for p in out.iterdir()}
    assert {"predictions.parquet", "report.md", "main.csv", "errors.png", "coverage.png", "residuals.png"} <= names
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    assert "| CAPE product" in (out / "report.md").read_text(encoding="utf-8")
    assert "replicate floor" in evaluation.markdown()
    fewer = {name: table for name, table in evaluation.tables.items() if name != "intervals"}
    (out / "notes.csv").write_text("of the user's own")
    replace(evaluation, tables=fewer).write(out)  # in place of the earlier one, of which nothing stays
    assert {p.name for p in out.iterdir()} == names - {"intervals.csv"} | {"notes.csv"}
    evaluation.write(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="something other than a report"):
        evaluation.write(tmp_path / "mine")


def test_html_report_needs_nothing_outside_itself(made: tuple[Evaluation, Path], tmp_path: Path) -> None:
    evaluation, _ = made
    table = rows(every=8)
    model = fit_table(table, SMALL)
    shown = {"steps": 12.5, "interval_90": [8.0, 20.0], "in_domain": False, "warnings": ["<b>far</b>."]}
    page = report(table, tmp_path / "r.html", model, shown, evaluation=evaluation).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;far&lt;/b&gt;" in page and "12.5" in page
    assert model.card["data"]["fingerprint"] in page
    with pytest.raises(StoreError, match="directory"):
        report(table, tmp_path, evaluation=evaluation)


def test_published_accuracy_with_log_epsilon_in_corpus() -> None:
    size = PRESETS["product"].replace(trees=800, depth=5, learning_rate=0.03, select=False, per_family=True)
    size = size.replace(shares={"mlp": 0.25, "rnn": 0.0})  # what selection finds on these rows
    evaluation = evaluate(rows(), presets=(size,))
    assert size.intervals
    assert evaluation.mae("product", "mlp") <= 0.85
    assert evaluation.mae("product", "rnn") <= 2.6
    table = evaluation.tables["intervals"]
    covered = {r[1]: r[4] for r in table.rows if r[2] == "90%"}
    assert all(88 < covered[f] < 92 for f in ("mlp", "rnn"))


def test_bad_requests_fail_before_any_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(every=200)
    with pytest.raises(SpecError, match="Unknown protocol"):
        evaluate(table, "in_corpus")
    with pytest.raises(SpecError, match="Unknown preset"):
        evaluate(table, presets=("papper",))
    with pytest.raises(SpecError, match="Unknown comparator"):
        evaluate(table, comparators=("xgboost",))
    with pytest.raises(DataError, match="larger sweep"):
        evaluate(table.slice(0, 10))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        evaluate(table, out=tmp_path / "file")
    with pytest.raises(StoreError, match="is a file"):
        evaluate(table, out=tmp_path / "file" / "report")
    few = table.slice(0, 10)
    with pytest.raises(StoreError, match="no meta-regressor in"):
        report(few, tmp_path / "report.html", tmp_path / "absent")
    with pytest.raises(FileExistsError):
        report(few, tmp_path / "file" / "report.html")
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    with pytest.raises(StoreError, match="Nothing can be written to"):
        report(few, tmp_path / "report.html")
    with pytest.raises(StoreError, match="Nothing can be written to"):
        evaluate(table, out=tmp_path / "new" / "report")


def test_table_text_and_csv() -> None:
    table = Table("T", ("a", "b"), (("x", 1.5), ("y", float("nan"))), "note")
    assert "| x   | 1.50 |" in table.markdown() and "| y   |  n/a |" in table.markdown()
    assert table.csv() == "a,b\nx,1.5\ny,\n"
