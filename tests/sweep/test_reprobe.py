"""Features that are missing in old rows are computed from what the rows say; T* and everything else stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cape import cli
from cape.config import SweepSpec
from cape.errors import StoreError
from cape.feature_names import FEATURE_NAMES, LATER_COLUMNS, head_at_zero
from cape.store import reader
from cape.store.compact import compact
from cape.store.location import Location
from cape.sweep import reprobe as module
from cape.sweep.inline import run_inline
from cape.sweep.reprobe import reprobe
from tests.files import list_files

SPEC = SweepSpec(
    families=("mlp",), datasets=("digits",), lrs=(1e-3,), batch_sizes=(16, 32), trials_per_cell=3, augmented=True
)
NEWEST = FEATURE_NAMES[-1]


def rows_of(meta: Path) -> list[dict[str, Any]]:
    rows = reader.read(meta).to_pylist()
    rows = [{k: v for k, v in r.items() if k != "probe_seconds"} for r in rows]
    return sorted(rows, key=lambda r: (r["trial_id"], r["epsilon"]))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    meta = tmp_path_factory.mktemp("swept") / "meta"
    run_inline(SPEC, meta, progress=False, chunk_seconds=0.001)
    return meta


@pytest.fixture
def old(swept: Path, tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A meta-dataset whose files lack the newest feature, and what its rows should be."""
    meta = tmp_path / "meta"
    shutil.copytree(swept, meta, symlinks=True)
    expected = rows_of(meta)
    for path in list_files(meta):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.drop_columns([NEWEST]), path)
    assert all(r[NEWEST] is None for r in rows_of(meta))
    return meta, expected


def test_missing_features_come_back_as_they_were(
    old: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, expected = old
    monkeypatch.setattr("cape.logs._EVERY_S", 0.0)  # what takes long says how far it is
    found = reprobe(meta)
    assert f"0/{found.files} files probed" in capsys.readouterr().err
    assert (found.trials, found.failed) == (6, 0) and found.files == len(list_files(meta)) > 1
    assert rows_of(meta) == expected
    assert reader.rows_folder(meta) == "_rows.1" and not list(meta.glob("_reprobe*"))
    assert reprobe(meta).files == 0 and reader.rows_folder(meta) == "_rows.1"
    assert run_inline(SPEC, meta, resume=True, progress=False).trials == 6


def test_it_goes_on_where_it_was_interrupted(
    old: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, expected = old
    real, probed = module.probe_trial, []

    def interrupted(*args: Any) -> Any:
        if len(probed) == 4:
            raise KeyboardInterrupt
        probed.append(args[0].seed)
        return real(*args)

    monkeypatch.setattr(module, "probe_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reprobe(meta)
    assert reader.rows_folder(meta) == "_rows.0" and all(r[NEWEST] is None for r in rows_of(meta))
    waiting = {p.name for folder in meta.glob("_reprobe*") for p in folder.rglob("*.parquet")}
    assert 0 < len(waiting) < len(list_files(meta))
    monkeypatch.setattr(module, "probe_trial", real)
    assert reprobe(meta).trials < 6
    assert rows_of(meta) == expected


def test_a_compaction_that_ends_meanwhile_is_kept(
    old: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, expected = old
    lock = Location.lock

    def late(location: Location, **how: Any) -> Any:
        if how.get("name") == ".compact":
            monkeypatch.undo()
            compact(meta)
        return lock(location, **how)

    monkeypatch.setattr(Location, "lock", late)
    assert reprobe(meta).files == 1
    assert reader.rows_folder(meta) == "_rows.2" and rows_of(meta) == expected


def test_rows_that_cannot_be_probed_stay(old: tuple[Path, list[dict[str, Any]]]) -> None:
    meta, expected = old
    path = list_files(meta)[0]
    table = pq.read_table(path, partitioning=None)
    foreign = table.set_column(table.schema.get_field_index("model"), "model", pa.nulls(len(table), pa.string()))
    pq.write_table(foreign, path)
    kept = set(foreign["trial_id"].to_pylist())
    reprobe(meta)
    for row in rows_of(meta):
        assert (row[NEWEST] is None) == (row["trial_id"] in kept)
    assert {r["t_star"] for r in rows_of(meta)} == {r["t_star"] for r in expected}
    with pytest.raises(StoreError, match="no rows to probe"):
        reprobe(meta.parent / "absent")


def test_the_command_with_two_processes(
    old: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    meta, expected = old
    assert cli.main(["store", "reprobe", str(meta), "--workers", "2"]) == 0
    assert "6 trials in" in capsys.readouterr().out
    for got, known in zip(rows_of(meta), expected):  # another process may round the last digit otherwise
        for name, value in known.items():
            assert got[name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value)
    assert os.path.isdir(meta / "_rows.0")  # for readers that began with it


def test_only_heads_at_zero_are_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from before the second look get it; the trials beside them in the same file are not probed."""
    meta, spec = tmp_path / "meta", SPEC.replace(families=("dense",), trials_per_cell=8)
    run_inline(spec, meta, progress=False)
    expected = rows_of(meta)
    zero = {r["trial_id"] for r in expected if head_at_zero(r["log_hidden_pull"])}
    assert 0 < len(zero) < len({r["trial_id"] for r in expected})
    for row in expected:
        assert all((row[column] is not None) == (row["trial_id"] in zero) for column in LATER_COLUMNS)
    for path in list_files(meta):
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns(list(LATER_COLUMNS)), path)
    real, probed = module.probe_trial, []
    monkeypatch.setattr(module, "probe_trial", lambda *args: probed.append(args[0].seed) or real(*args))
    assert reprobe(meta).trials == len(zero) == len(probed)
    assert rows_of(meta) == expected
    assert reprobe(meta).files == 0
