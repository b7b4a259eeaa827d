"""What a store must never do silently: read a turned bit, lose its rows, take another run's place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cape.errors import StoreError
from cape.store import claims, reader
from cape.store.compact import compact
from cape.store.verify import verify
from cape.sweep.inline import run_inline
from cape.sweep.shard_run import Flight
from tests.store.test_verify import SPEC, ids, meta, swept  # noqa: F401


def turn_a_bit(path: Path, column: str) -> None:
    """Change a number of a column so that only its page's checksum tells."""
    group = pq.read_metadata(path).row_group(0)
    found = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    content = bytearray(path.read_bytes())
    content[found.data_page_offset + found.total_compressed_size - 3] ^= 0x01
    path.write_bytes(content)


def test_a_turned_bit_is_an_error_gets_no_new_checksum_and_a_resume_mends_it(
    meta: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {(r["trial_id"], r["epsilon"]): r["log_g2"] for r in reader.read(meta).to_pylist()}
    path = reader.list_files(meta)[0]
    turn_a_bit(path, "log_g2")
    with pytest.raises(StoreError, match=f"{path.name} cannot be read .*--resume"):
        reader.read(meta)
    with pytest.raises(StoreError, match="nothing was changed"):
        compact(meta, keep_seconds=0)
    run_inline(SPEC, meta, resume=True, progress=False)
    assert path.name in capsys.readouterr().err and verify(meta, ids).sound
    assert {(r["trial_id"], r["epsilon"]): r["log_g2"] for r in reader.read(meta).to_pylist()} == whole


@pytest.mark.parametrize("foreign", [{"a": [1]}, {"trial_id": ["x"], "t_star": ["many"]}], ids=["other", "text"])
def test_parquet_of_another_kind_is_set_aside(meta: Path, foreign: dict[str, list[object]]) -> None:  # noqa: F811
    path = reader.list_files(meta)[0].with_name(f"{'b' * 16}.parquet")
    rest = {"sweep_hash": ["s"], "epsilon": [0.1], "stop_reason": ["cap"]} if "trial_id" in foreign else {}
    pq.write_table(pa.table({**foreign, **rest}), path)
    assert [name.rsplit("/", 1)[-1] for name, _ in verify(meta, ids).foreign] == [path.name]
    assert run_inline(SPEC, meta, resume=True, progress=False).trials == 8
    assert not path.exists() and verify(meta, ids).sound


def test_rows_without_their_link_are_not_taken_for_none(meta: Path) -> None:  # noqa: F811
    compact(meta, keep_seconds=3600)
    kept = (meta / "rows").readlink()
    (meta / "rows").unlink()
    for look in (reader.read, verify, lambda m: run_inline(SPEC, m, resume=True, progress=False)):
        with pytest.raises(StoreError, match=f"lost the link 'rows'.*ln -s {kept} "):
            look(meta)
    (meta / "rows").symlink_to(kept)
    assert verify(meta, ids).sound


def test_rows_that_are_there_twice_are_said(meta: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    path = reader.list_files(meta)[0]
    shutil.copy(path, path.with_name(f"{'c' * 16}.parquet"))
    run_inline(SPEC, meta, resume=True, progress=False)
    assert "there more than once" in capsys.readouterr().err


def test_a_run_that_is_refused_leaves_the_others_spec(meta: Path) -> None:  # noqa: F811
    before = (meta / "_spec.json").read_bytes()
    run = claims.start_run(meta)
    with pytest.raises(StoreError, match="Another run writes"):
        run_inline(SPEC.replace(trials_per_cell=3), meta, resume=True, progress=False)
    assert (meta / "_spec.json").read_bytes() == before
    claims.end_run(meta, run)


def test_a_status_that_is_no_status_stops_nobody(meta: Path) -> None:  # noqa: F811
    (meta / "_run.json").write_text('{"run": "r", "host": "elsewhere", "pid": 1}')
    (meta / "_status.json").write_text('{"run": "r", "updated": "yesterday"}')
    assert run_inline(SPEC, meta, resume=True, progress=False).trials == 8


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cape.sweep.shard_run.os.pwrite", full)
    with pytest.raises(StoreError, match=f"Cannot write {tmp_path}/.*No space left on device.*kept"):
        run_inline(SPEC, tmp_path / "new", progress=False)
    assert Flight.__name__  # whose record it was
