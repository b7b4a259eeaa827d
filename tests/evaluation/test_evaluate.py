"""evaluate() and report() from end to end on published rows, and the published accuracy."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from authors import rows

from cape.errors import DataError, SpecError, StoreError
from cape.evaluation import Evaluation, evaluate, report
from cape.evaluation.table import Table, select
from cape.evaluation.tables import build_tables
from cape.metamodel.fit import fit_table
from cape.metamodel.presets import PRESETS

SMALL = PRESETS["product"].replace(trees=300, depth=4, select=False, per_family=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    table = rows(every=8)
    # Curves of the right length and end, so that the curve baseline has something to read.
    ends = zip(table["t_star"].to_pylist(), table["epsilon"].to_pylist(), strict=True)
    losses = [np.geomspace(1.0, 0.99 * epsilon, t + 1)[:64].tolist() for t, epsilon in ends]
    table = table.set_column(table.schema.get_field_index("losses"), "losses", pa.array(losses, pa.list_(pa.float32())))
    return evaluate(table, "in-corpus", out, presets=("paper", SMALL)), out


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


def test_report_directory_is_complete_and_can_be_rewritten(made: tuple[Evaluation, Path], tmp_path: Path) -> None:
    evaluation, out = made
    names = {p.name for p in out.iterdir()}
    assert {"predictions.parquet", "report.md", "main.csv", "errors.png", "coverage.png", "residuals.png"} <= names
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    assert "| CAPE product" in (out / "report.md").read_text(encoding="utf-8")
    assert "replicate floor" in evaluation.markdown()
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
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;far&lt;/b&gt;" in page and "12.5" in page
    assert model.card["data"]["fingerprint"] in page
    with pytest.raises(StoreError, match="directory"):
        report(table, tmp_path, evaluation=evaluation)


def test_published_accuracy_with_log_epsilon_in_corpus() -> None:
    size = PRESETS["product"].replace(trees=800, depth=5, learning_rate=0.03, select=False, per_family=True)
    evaluation = evaluate(rows(), presets=(size,))
    assert evaluation.mae("product", "mlp") <= 0.85
    assert evaluation.mae("product", "rnn") <= 2.6
    table = evaluation.tables["intervals"]
    covered = {r[1]: r[4] for r in table.rows if r[2] == "90%"}
    assert all(88 < covered[f] < 92 for f in ("mlp", "rnn"))


def test_bad_requests_fail_before_any_fit(tmp_path: Path) -> None:
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


def test_table_text_and_csv() -> None:
    table = Table("T", ("a", "b"), (("x", 1.5), ("y", float("nan"))), "note")
    assert "| x   | 1.50 |" in table.markdown() and "| y   |  n/a |" in table.markdown()
    assert table.csv() == "a,b\nx,1.5\ny,\n"
