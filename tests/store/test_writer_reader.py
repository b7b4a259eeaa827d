"""What is written is read back, whole or not at all, by our reader and by other people's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from cape.config import SweepSpec
from cape.errors import SpecError, StoreError
from cape.store import claims, reader, writer
from cape.store.schema import ROW_SCHEMA
from tests.files import list_files

MakeRows = Callable[..., list[dict[str, Any]]]
SPEC = SweepSpec(name="s", families=("mlp",), datasets=("digits",))


def test_rows_come_back_as_they_went_in(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(3) + make_rows(2, family="cnn", dataset="mnist")
    paths = writer.write_shard(rows, tmp_path)
    assert [p.rsplit("/", 1)[0] for p in paths] == [
        "_rows.0/family=mlp/dataset=digits",
        "_rows.0/family=cnn/dataset=mnist",
    ]
    table = reader.read(tmp_path)
    assert table.schema.names == ROW_SCHEMA.names
    assert table.schema.equals(ROW_SCHEMA)
    key = ("trial_id", "epsilon")
    found = sorted(table.to_pylist(), key=lambda r: [r[k] for k in key])
    for got, wrote in zip(found, sorted(rows, key=lambda r: [r[k] for k in key]), strict=True):
        assert got == {**dict.fromkeys(ROW_SCHEMA.names), **wrote}


def test_columns_and_filters(make_rows: MakeRows, tmp_path: Path) -> None:
    writer.write_shard(make_rows(3) + make_rows(2, dataset="mnist"), tmp_path)
    some = reader.read(tmp_path, columns=["t_star", "dataset"], filter=pds.field("dataset") == "mnist")
    assert some.column_names == ["t_star", "dataset"]
    assert some["dataset"].to_pylist() == ["mnist"] * 4
    assert reader.count_rows(tmp_path) == 10
    assert reader.count_rows(tmp_path, filter=pds.field("epsilon") < 0.15) == 5
    assert reader.count_rows(tmp_path / "nothing") == 0
    with pytest.raises(SpecError, match="Did you mean 't_star'"):
        reader.read(tmp_path, columns=["tstar"])


def test_the_same_trials_written_twice_are_one_file(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(4)
    assert writer.write_shard(rows, tmp_path) == writer.write_shard(rows[::-1], tmp_path)
    assert reader.count_rows(tmp_path) == 8
    assert set(reader.done_ids(tmp_path).tolist()) == {int(r["trial_id"], 16) for r in rows}
    assert reader.done_trials(tmp_path, "mlp", "digits") == {r["trial_id"] for r in rows}
    assert reader.done_trials(tmp_path, "mlp", "mnist") == set()


def test_a_dataset_that_is_a_path_stays_one_folder(make_rows: MakeRows, tmp_path: Path) -> None:
    name = "../data/my set=1.parquet"
    writer.write_shard(make_rows(1, dataset=name), tmp_path)
    assert len(list(tmp_path.glob("rows/family=mlp/*"))) == 1
    assert set(reader.read(tmp_path)["dataset"].to_pylist()) == {name}
    assert len(reader.done_trials(tmp_path, "mlp", name)) == 1


def test_unknown_columns_are_kept_and_null_elsewhere(make_rows: MakeRows, tmp_path: Path) -> None:
    writer.write_shard(make_rows(2), tmp_path)
    writer.write_shard([{**r, "note": "x", "count": 7} for r in make_rows(1, first_seed=10)], tmp_path)
    writer.write_shard([{**r, "count": 0.5} for r in make_rows(1, first_seed=20)], tmp_path)
    table = reader.read(tmp_path)
    assert table.schema.names == [*ROW_SCHEMA.names, *[n for n in table.schema.names if n in ("note", "count")]]
    assert sorted(table["note"].to_pylist(), key=str) == [None] * 6 + ["x"] * 2
    assert sorted(v for v in table["count"].to_pylist() if v is not None) == [0.5, 0.5, 7, 7]


def test_other_readers_see_the_same_rows(make_rows: MakeRows, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    claims.claim(tmp_path, SPEC)
    writer.write_shard(make_rows(3), tmp_path)
    (tmp_path / ".tmp" / "half").write_bytes(b"PAR1")  # what a sweep that runs, or was killed, has beside its rows
    ours = sorted(reader.read(tmp_path)["t_star"].to_pylist())
    for where in (tmp_path, tmp_path / "rows", reader.rows_path(tmp_path)):
        frame = pandas.read_parquet(where)
        assert sorted(frame["t_star"]) == ours and set(frame["family"]) == {"mlp"}
        arrow = pds.dataset(where, partitioning="hive").to_table()
        assert sorted(arrow["t_star"].to_pylist()) == ours and set(arrow["dataset"].to_pylist()) == {"digits"}
        assert sorted(pq.read_table(where)["t_star"].to_pylist()) == ours


def test_polars_sees_the_same_rows(make_rows: MakeRows, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    writer.write_shard(make_rows(3) + make_rows(2, dataset="mnist"), tmp_path)
    (tmp_path / ".tmp" / "half").write_bytes(b"PAR1")
    frame = polars.scan_parquet(tmp_path / "rows", hive_partitioning=True).collect()
    assert sorted(frame["t_star"].to_list()) == sorted(reader.read(tmp_path)["t_star"].to_pylist())
    assert set(frame["dataset"].to_list()) == {"digits", "mnist"}


def test_duckdb_sees_the_same_rows(make_rows: MakeRows, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    writer.write_shard(make_rows(3) + make_rows(2, dataset="mnist"), tmp_path)
    files = f"read_parquet('{tmp_path}/rows/*/*/*.parquet', hive_partitioning=true)"
    assert sorted(duckdb.sql(f"select dataset, count(*) from {files} group by 1").fetchall()) == [
        ("digits", 6),
        ("mnist", 4),
    ]


def test_a_reader_never_sees_part_of_a_file(make_rows: MakeRows, tmp_path: Path) -> None:
    """Read as fast as possible while files of 50 rows each are written: every count is a multiple of 50."""
    stop, counts, errors = threading.Event(), [], []

    def watch() -> None:
        while not stop.is_set():
            try:
                counts.append(reader.count_rows(tmp_path))
                hidden = [p for p in list_files(tmp_path) if p.name.startswith(".")]
                assert not hidden
            except Exception as error:  # any error at all is what the test looks for
                errors.append(error)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    for i in range(40):
        writer.write_shard(make_rows(25, first_seed=1000 * i), tmp_path)
    stop.set()
    thread.join()
    assert not errors
    assert len(counts) > 3 and all(c % 50 == 0 for c in counts)
    assert reader.count_rows(tmp_path) == 2000
    assert not list((tmp_path / ".tmp").iterdir())


def test_a_write_that_fails_leaves_nothing_behind(
    make_rows: MakeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write_shard(make_rows(1), tmp_path)

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="No space left on device"):
        writer.write_shard(make_rows(1, first_seed=5), tmp_path)
    assert reader.count_rows(tmp_path) == 2
    assert not list((tmp_path / ".tmp").iterdir())


def test_files_that_are_no_rows_are_named(make_rows: MakeRows, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        reader.read(tmp_path / "absent")
    with pytest.raises(StoreError, match="holds no rows"):
        reader.read(tmp_path)
    (path,) = writer.write_shard(make_rows(1), tmp_path)
    writer.write_shard(make_rows(1, first_seed=3), tmp_path)
    whole = (tmp_path / path).read_bytes()
    (tmp_path / path).write_bytes(whole[:200])
    for use in (reader.read, reader.count_rows, reader.done_ids):
        with pytest.raises(StoreError, match=path):
            use(tmp_path)


def test_a_folder_belongs_to_one_sweep(make_rows: MakeRows, tmp_path: Path) -> None:
    out = tmp_path / "meta"
    claims.claim(out, SPEC)
    assert reader.read_spec(out) == SPEC
    claims.claim(out, SPEC)  # still empty: nothing to resume
    with pytest.raises(StoreError, match=r"seed is 0 there and 1 here; a cell of mlp has 100 trials there and 3 here"):
        claims.claim(out, SPEC.replace(seed=1, trials_per_cell=3), resume=True)
    writer.write_shard(make_rows(1), out)
    with pytest.raises(StoreError, match="--resume"):
        claims.claim(out, SPEC)
    claims.claim(out, SPEC, resume=True)
    assert reader.count_rows(out) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        claims.claim(tmp_path / "file", SPEC)
    (out / "_spec.json").write_text("{")
    with pytest.raises(StoreError, match="does not describe a sweep"):
        claims.claim(out, SPEC, resume=True)


def test_what_killed_writers_left_is_swept_up_and_nothing_else(make_rows: MakeRows, tmp_path: Path) -> None:
    claims.claim(tmp_path, SPEC)
    (path,) = writer.write_shard(make_rows(1), tmp_path)
    old, fresh = tmp_path / ".tmp" / "a", tmp_path / ".tmp" / "b"
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    assert reader.count_rows(tmp_path) == 2
    claims.claim(tmp_path, SPEC, resume=True)
    assert not old.exists() and fresh.exists() and (tmp_path / path).exists()


def test_files_are_small_and_say_what_wrote_them(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(125)
    for row in rows:
        row["losses"] = [2.0 / (i + 1) for i in range(64)]
    (path,) = writer.write_shard(rows, tmp_path)
    assert (tmp_path / path).stat().st_size / len(rows) < 1100
    file = pq.ParquetFile(tmp_path / path)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.schema_arrow.metadata[b"cape_schema_version"] == b"1"
    assert b"cape_version" in file.schema_arrow.metadata
    assert isinstance(file.schema_arrow.field("t_star").type, type(pa.int32()))
