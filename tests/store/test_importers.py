"""The authors' published CSVs, read as rows of ours."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as pds
import pytest

from cape.errors import DataError, SpecError
from cape.store import reader
from cape.store.importers import import_csv
from cape.store.verify import verify

MakeRows = Callable[..., list[dict[str, Any]]]
HEADER = (
    "dataset,learning_rate,batch_size,epsilon,logP,logB,logG2,logTau,logLR,logN,T_star,converged,censored_reason,"
    "logInitLoss,logFinalLoss"
)
LINE = "FashionMNIST,0.001,32,0.1,13.4,3.4657,6.5,6.6,-6.9,11.0,5,True,,0.99,-1.42"


@pytest.fixture(scope="module")
def reference() -> Path:
    """The folder of the published CSVs; they are not part of this repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "reference"
    root = Path(os.environ.get("CAPE_REFERENCE") or beside)
    if not (root / "authors_meta_dataset_mlp.csv").exists():
        pytest.skip("no published CSVs: set CAPE_REFERENCE to their folder")
    return root


@pytest.mark.parametrize(("family", "rows"), [("mlp", 6480), ("rnn", 10800)])
def test_published_rows_and_values(reference: Path, tmp_path: Path, family: str, rows: int) -> None:
    path = reference / f"authors_meta_dataset_{family}.csv"
    assert import_csv(path, family, tmp_path) == rows
    assert import_csv(path, family, tmp_path) == rows  # a second time adds nothing
    table = reader.read(tmp_path)
    assert table.num_rows == rows
    assert pc.count_distinct(table["trial_id"]).as_py() == rows
    assert set(table["family"].to_pylist()) == {family}
    assert set(table["dataset"].to_pylist()) == {"mnist", "fashion_mnist", "cifar10", "cifar100"}
    assert pc.all(table["converged"]).as_py()
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert pc.sum(table["t_star"]).as_py() == sum(int(line["T_star"]) - 1 for line in lines)
    first = lines[0]
    same = reader.read(tmp_path, filter=pds.field("log_g2") == float(first["logG2"])).to_pylist()
    assert len(same) == 1
    row = same[0]
    assert row["t_star"] == int(first["T_star"]) - 1
    for ours, theirs in {"log_p": "logP", "log_tau": "logTau", "log_n": "logN", "log_l0": "logInitLoss"}.items():
        assert row[ours] == float(first[theirs])
    assert (row["lr"], row["batch_size"], row["epsilon"]) == (0.0005, 32, 0.1)
    assert row["log_epsilon"] == math.log(0.1)
    assert row["log_b"] == pytest.approx(math.log(32)) and row["log_lr"] == pytest.approx(math.log(0.0005))
    assert row["l0"] == pytest.approx(math.exp(float(first["logInitLoss"])))
    assert row["final_loss"] <= row["epsilon"] * row["l0"]  # so logInitLoss and logFinalLoss mean what we say


def test_two_imports_share_a_folder_and_unknown_columns_stay(tmp_path: Path) -> None:
    plain, wide = tmp_path / "plain.csv", tmp_path / "wide.csv"
    plain.write_text(f"{HEADER}\n{LINE}\n")
    wide.write_text(f"{HEADER},architecture,gpu,seed\n{LINE},vit,A4000,3\n{LINE},vit,A4000,4\n")
    out = tmp_path / "meta"
    assert import_csv(plain, "mlp", out) == 1
    assert import_csv(wide, "transformer", out) == 2
    rows = {(r["family"], r["replicate"]): r for r in reader.read(out).to_pylist()}
    assert set(rows) == {("mlp", 0), ("transformer", 0), ("transformer", 1)}
    assert [r["gpu"] for r in rows.values()].count("A4000") == 2
    assert rows["transformer", 1]["architecture"] == "vit"
    assert rows["transformer", 1]["csv_seed"] == 4 and rows["transformer", 1]["seed"] is None
    assert rows["mlp", 0]["dataset"] == "fashion_mnist" and rows["mlp", 0]["t_star"] == 4


def test_a_trial_that_was_cut_short_is_censored(tmp_path: Path) -> None:
    lines = [LINE.replace(",5,True,,", f",{t},False,{why},") for t, why in ((5001, "max_steps"), (301, "plateau"))]
    path = tmp_path / "cut.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    assert import_csv(path, "mlp", tmp_path / "meta") == 2
    rows = sorted(reader.read(tmp_path / "meta").to_pylist(), key=lambda r: r["stopped_at"])
    assert [(r["t_star"], r["converged"], r["stop_reason"], r["stopped_at"]) for r in rows] == [
        (None, False, "plateau", 300),
        (None, False, "cap", 5000),
    ]


def test_datasets_of_any_script_stay_apart(tmp_path: Path) -> None:
    path, names = tmp_path / "names.csv", ["数据", "Données", "中文"]
    path.write_text("\n".join([HEADER, *(LINE.replace("FashionMNIST", n) for n in names)]) + "\n", encoding="utf-8-sig")
    import_csv(path, "mlp", tmp_path / "meta")
    assert set(reader.read(tmp_path / "meta")["dataset"].to_pylist()) == {"数据", "données", "中文"}
    assert verify(tmp_path / "meta").sound
    path.write_text(f"{HEADER}\n{LINE.replace('FashionMNIST', '../..')}\n")
    with pytest.raises(DataError, match="line 2: dataset must have a letter"):
        import_csv(path, "mlp", tmp_path / "other")
    for encoding in ("latin-1", "utf-16"):
        path.write_text(f"{HEADER}\n{LINE.replace('FashionMNIST', 'Données')}\n", encoding=encoding)
        with pytest.raises(DataError, match="names.csv is not UTF-8 text"):
            import_csv(path, "mlp", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "cannot be read as CSV"),
        (HEADER + "\n", "holds no rows"),
        ("a,b\n1,2\n", "has no column dataset"),
        (f"{HEADER}\n{LINE.replace(',0.1,', ',1.5,')}\n", "line 2: ε must lie strictly between 0 and 1"),
        (f"{HEADER}\n{LINE}\n{LINE.replace(',5,True', ',0,True')}\n", "line 3: T_star must be a whole number"),
        (f"{HEADER}\n{LINE}\n{LINE.replace(',5,True', ',five,True')}\n", "line 3: T_star must be a finite number"),
        (f"\n{HEADER}\n\n{LINE}\n\n\n{LINE.replace(',5,True', ',0,True')}\n", "line 7: T_star must be a whole number"),
        (f"{HEADER}\n{LINE.replace('3.4657', '')}\n{LINE.replace('3.4657', 'x')}\n", "line 3: logB must be a finite"),
        (f"{HEADER}\n{LINE.replace(',0.1,', ',nan,')}\n", "line 2: epsilon must be a finite number"),
    ],
)
def test_what_is_not_a_meta_dataset_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        import_csv(path, "mlp", tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        import_csv(tmp_path / "absent.csv", "mlp", tmp_path)
    with pytest.raises(SpecError, match="letters, digits"):
        import_csv(tmp_path / "absent.csv", "../mlp", tmp_path)


def test_imports_and_a_sweep_can_share_a_folder(make_rows: MakeRows, tmp_path: Path) -> None:
    from cape.store.writer import write_shard

    write_shard(make_rows(2), tmp_path)
    path = tmp_path / "more.csv"
    path.write_text(f"{HEADER}\n{LINE}\n")
    import_csv(path, "mlp", tmp_path)
    assert reader.count_rows(tmp_path) == 5


@pytest.mark.parametrize(
    ("word", "converged"), [("no", False), ("N", False), (" False", False), ("yes", True), ("1", True)]
)
def test_yes_and_no_are_read_as_they_are_meant(tmp_path: Path, word: str, converged: bool) -> None:
    path = tmp_path / "words.csv"
    path.write_text(f"{HEADER}\n{LINE.replace('5,True', f'5,{word}')}\n{LINE.replace('5,True', '5,maybe?')}\n")
    with pytest.raises(DataError, match="line 3: converged must be true or false, not 'maybe\\?'"):
        import_csv(path, "mlp", tmp_path / "meta")
    path.write_text(f"{HEADER}\n{LINE.replace('5,True', f'5,{word}')}\n")
    import_csv(path, "mlp", tmp_path / "meta")
    (row,) = reader.read(tmp_path / "meta").to_pylist()
    assert (row["converged"], row["t_star"]) == (converged, 4 if converged else None)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (",32,", ",0,", "batch_size must be a whole number from 1"),
        (",32,", ",32.5,", "batch_size must be a whole number from 1"),
        (",32,", ",1e300,", "batch_size must be a whole number from 1"),
        (",0.001,", ",-1,", "learning rate must be a positive number"),
        (",0.001,", ",inf,", "learning_rate must be a finite number"),
        (",13.4,", ",inf,", "logP must be a finite number"),
        (",13.4,", ",,", "logP must be a finite number"),
        (",13.4,", ",abc,", "logP must be a finite number, not 'abc'"),
        (",5,True", ",1e12,True", "T_star must be a whole number from 1"),
        (",5,True", ",inf,True", "T_star must be a finite number"),
        (",5,True", ",0,False", "T_star must be a whole number from 1"),
        (",5,True", ",7.9,False", "T_star must be a whole number from 1"),
        (",5,True", ",5,", "converged must be true or false"),
        (",0.99,", ",1000,", "logInitLoss is the logarithm of more than a float64 holds"),
        (",0.99,", ",text,", "logInitLoss must be a finite number"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"{HEADER}\n{LINE.replace(old, new, 1)}\n")
    with pytest.raises(DataError, match=f"line 2: .*{sentence}"):
        import_csv(path, "mlp", tmp_path / "meta")


def test_two_columns_of_one_name_are_refused_and_a_numeric_architecture_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    path.write_text(f"{HEADER},logP\n{LINE},9.9\n")
    with pytest.raises(DataError, match="two columns logP"):
        import_csv(path, "mlp", tmp_path / "meta")
    path.write_text(f"{HEADER},architecture\n{LINE},50\n")
    import_csv(path, "mlp", tmp_path / "meta")
    assert reader.read(tmp_path / "meta")["architecture"].to_pylist() == ["50"]
