"""Merging files while others read and write: every reader sees every row once, at every moment."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest

from cape.errors import StoreError
from cape.store import reader, writer
from cape.store.compact import compact, publish
from cape.store.location import Location
from cape.store.retry import retry
from cape.store.verify import verify
from tests.files import list_files

MakeRows = Callable[..., list[dict[str, Any]]]
ROOT = Path(__file__).resolve().parents[2]

# A plain reader in a process of its own, with nothing of ours: it resolves the link once and reads what it finds.
READER = """
import os, sys, time
import pyarrow.dataset as pds
meta, least, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end, reads = time.monotonic() + seconds, 0
generations = set()
print("ready", flush=True)
while time.monotonic() < end and (reads < 12 or len(generations) < 4):
    where = os.path.realpath(os.path.join(meta, "rows"))
    table = pds.dataset(where, partitioning="hive").to_table(columns=["trial_id", "epsilon"])
    keys = list(zip(table["trial_id"].to_pylist(), table["epsilon"].to_pylist()))
    assert len(set(keys)) == len(keys), f"{len(keys) - len(set(keys))} rows twice in {where}"
    assert len(keys) >= least, f"{least - len(keys)} rows not there in {where}"
    least = len(keys)
    generations.add(os.path.basename(where))
    reads += 1
print(reads, len(generations), least)
"""


def test_files_are_merged_and_rows_are_the_same(make_rows: MakeRows, tmp_path: Path) -> None:
    for i in range(12):
        writer.write_shard(
            make_rows(3, first_seed=3 * i), tmp_path, provenance={"device": "x", "git_revision": str(i % 2)}
        )
    writer.write_shard(make_rows(2, family="cnn", dataset="mnist"), tmp_path)
    writer.write_shard([{**r, "note": "n"} for r in make_rows(1, first_seed=90)], tmp_path)
    before = sorted(reader.read(tmp_path).to_pylist(), key=lambda r: (r["trial_id"], r["epsilon"]))
    done = compact(tmp_path)
    assert (done.before, done.after, done.rows, done.duplicates) == (14, 3, 72, 0)
    after = sorted(reader.read(tmp_path).to_pylist(), key=lambda r: (r["trial_id"], r["epsilon"]))
    assert after == before
    (merged,) = [p for p in list_files(tmp_path) if pq.read_metadata(p).num_rows == 72]
    metadata = pq.read_schema(merged).metadata
    assert metadata[b"cape_device"] == b"x" and metadata[b"cape_git_revision"] == b"several"
    assert os.readlink(tmp_path / "rows") == "_rows.1" and (tmp_path / "_rows.0").is_dir()
    again = compact(tmp_path)
    assert (again.before, again.after) == (3, 3) and os.readlink(tmp_path / "rows") == "_rows.1"
    writer.write_shard(make_rows(1, first_seed=200), tmp_path)
    assert compact(tmp_path, keep_seconds=0).removed >= 1  # the grace of the first generation is over
    assert sorted(p.name for p in tmp_path.glob("_rows.*")) == ["_rows.2"]
    assert reader.count_rows(tmp_path) == len(before) + 2


def test_files_grow_to_the_target_and_no_further(make_rows: MakeRows, tmp_path: Path) -> None:
    for i in range(10):
        writer.write_shard(make_rows(20, first_seed=20 * i), tmp_path)
    size = list_files(tmp_path)[0].stat().st_size
    done = compact(tmp_path, target_bytes=int(2.5 * size))
    assert (done.before, done.after) == (10, 5)
    assert reader.count_rows(tmp_path) == 400


def test_a_plain_reader_sees_every_row_once_while_others_write_and_compact(make_rows: MakeRows, tmp_path: Path) -> None:
    """A process reads as fast as it can; two threads write; compactions follow one another."""
    for i in range(20):
        writer.write_shard(make_rows(2, first_seed=10_000 + 2 * i), tmp_path)
    command = [sys.executable, "-c", READER, str(tmp_path), "80", "100"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watcher.stdout is not None and watcher.stdout.readline() == "ready\n"
    errors: list[Exception] = []
    written = [0, 0]

    def write(which: int) -> None:
        try:
            while watcher.poll() is None:
                writer.write_shard(make_rows(2, first_seed=2 * written[which] + 50_000 * which), tmp_path)
                written[which] += 1
                time.sleep(0.01)
        except Exception as error:  # any error at all is what the test looks for
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    compactions = 0
    while watcher.poll() is None:
        compact(tmp_path, target_bytes=50_000)
        compactions += 1
        table = reader.read(tmp_path, columns=["trial_id", "epsilon"]).to_pylist()
        assert len({(r["trial_id"], r["epsilon"]) for r in table}) == len(table)
    for thread in threads:
        thread.join()
    out, err = watcher.communicate()
    assert watcher.returncode == 0, err
    reads, generations, seen = map(int, out.split())
    assert not errors
    assert compactions >= 3 and reads >= 12 and generations >= 4 and seen > 80
    assert reader.count_rows(tmp_path) == 80 + 4 * sum(written)  # nothing that was committed meanwhile was lost


def test_a_reader_that_began_before_keeps_its_files(make_rows: MakeRows, tmp_path: Path) -> None:
    for i in range(5):
        writer.write_shard(make_rows(2, first_seed=2 * i), tmp_path)
    ours, plain = reader.open_dataset(tmp_path), pds.dataset(reader.rows_path(tmp_path), partitioning="hive")
    compact(tmp_path)
    compact(tmp_path)
    assert ours.to_table().num_rows == plain.to_table().num_rows == 20


def test_a_generation_that_cannot_be_deleted_is_not_counted(
    make_rows: MakeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        writer.write_shard(make_rows(2, first_seed=2 * i), tmp_path)
    with monkeypatch.context() as held:
        held.setattr("cape.store.location.shutil.rmtree", lambda *_, **__: None)
        assert compact(tmp_path, keep_seconds=0).removed == 0
    assert compact(tmp_path, keep_seconds=0).removed == 1


def test_what_a_killed_compaction_left_is_passed_over(make_rows: MakeRows, tmp_path: Path) -> None:
    """Kill it with SIGKILL at the worst moments: half-built, and right before the link moves."""
    for i in range(6):
        writer.write_shard(make_rows(2, first_seed=2 * i), tmp_path)
    for moment in ("cape.store.compact.union", "cape.store.compact.os.replace"):
        code = (
            "import os, signal, sys; from unittest import mock; import cape.store.compact as c\n"
            f"with mock.patch({moment!r}, lambda *a: os.kill(os.getpid(), signal.SIGKILL)):\n"
            "    c.compact(sys.argv[1])"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60)
        assert done.returncode == -9
        assert reader.count_rows(tmp_path) == 24 and os.readlink(tmp_path / "rows") == "_rows.0"
    assert compact(tmp_path, keep_seconds=0).after == 1
    assert reader.count_rows(tmp_path) == 24
    assert len(list(tmp_path.glob("_rows.*"))) == 1


@pytest.mark.parametrize("act", [compact, retry])
def test_who_comes_while_another_replaces_the_rows_loses_nothing(
    act: Callable[[Path], object], make_rows: MakeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ends, and rows are committed, right before the second one gets the lock."""
    rows = make_rows(4)
    rows[0]["stop_reason"] = rows[1]["stop_reason"] = "failed"
    for i in (0, 4):
        writer.write_shard(rows[i : i + 4], tmp_path)
    lock = Location.lock

    def late(location: Location, **how: Any) -> Any:
        if how.get("name") == ".compact":
            monkeypatch.undo()
            assert compact(tmp_path).after == 1
            writer.write_shard(make_rows(2, first_seed=10), tmp_path)
        return lock(location, **how)

    monkeypatch.setattr(Location, "lock", late)
    act(tmp_path)
    assert os.readlink(tmp_path / "rows") == "_rows.2"
    assert reader.count_rows(tmp_path) == (12 if act is compact else 10)


def test_a_generation_that_is_not_the_current_one_is_not_replaced(make_rows: MakeRows, tmp_path: Path) -> None:
    for i in range(2):
        writer.write_shard(make_rows(2, first_seed=2 * i), tmp_path)
    compact(tmp_path)
    with pytest.raises(StoreError, match="in _rows.1 by now, not in _rows.0"):
        publish(Location.of(tmp_path), "_rows.0", "_rows.2", set())
    assert reader.count_rows(tmp_path) == 8


@pytest.mark.parametrize(
    ("act", "words"), [(compact, "0/2 merges"), (retry, "1/4 files read"), (verify, "1/4 files read")]
)
def test_how_far_it_is_is_said_where_that_takes_long(
    act: Callable[[Path], object],
    words: str,
    make_rows: MakeRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for dataset, seed in (("digits", 0), ("digits", 2), ("mnist", 4)):
        writer.write_shard(make_rows(2, dataset=dataset, first_seed=seed), tmp_path)
    act(tmp_path)
    assert not capsys.readouterr().err
    writer.write_shard(make_rows(2, first_seed=6), tmp_path)
    monkeypatch.setattr("cape.logs._EVERY_S", 0.0)
    act(tmp_path)
    assert words in capsys.readouterr().err


def test_into_another_place_duplicates_are_left_behind(make_rows: MakeRows, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    writer.write_shard(make_rows(4), source)
    writer.write_shard(make_rows(3), source)  # the same trials in another file: no sweep of ours writes that
    done = compact(source, out=out)
    assert (done.before, done.after, done.rows, done.duplicates) == (2, 1, 8, 6)
    assert reader.count_rows(source) == 14 and reader.count_rows(out) == 8
    with pytest.raises(StoreError, match="holds rows already"):
        compact(source, out=out)


def test_rows_that_are_there_twice_are_left_once_however_large_their_files(make_rows: MakeRows, tmp_path: Path) -> None:
    """Files that are merged with no other: one holds rows of another, one holds some of its own twice."""
    rows = make_rows(9)
    for part in (rows[:8], rows[4:12], [*rows[12:16], *rows[12:14]], rows[16:]):
        writer.write_shard(part, tmp_path)
    before = {row["trial_id"]: row["t_star"] for row in reader.read(tmp_path).to_pylist()}
    untouched = {p.name for p in list_files(tmp_path)}
    done = compact(tmp_path, target_bytes=1)
    assert (done.before, done.after, done.rows, done.duplicates) == (4, 4, 4 + 4, 4 + 2)
    after = reader.read(tmp_path).to_pylist()
    assert len(after) == 18 and {row["trial_id"]: row["t_star"] for row in after} == before
    assert len(untouched & {p.name for p in list_files(tmp_path)}) >= 2  # linked, not written anew
    again = compact(tmp_path, target_bytes=1)
    assert (again.after, again.rows, again.duplicates) == (4, 0, 0) and os.readlink(tmp_path / "rows") == "_rows.1"


def test_parquet_of_another_kind_is_one_sentence(make_rows: MakeRows, tmp_path: Path) -> None:
    writer.write_shard(make_rows(2), tmp_path)
    (path,) = list_files(tmp_path)
    pq.write_table(pa.table({"x": [1.0]}), path.with_name(f"{'a' * 16}.parquet"))
    for size in (1, 2**20):
        with pytest.raises(StoreError, match="cannot be read, nothing was changed"):
            compact(tmp_path, target_bytes=size)


def test_columns_of_ones_own_may_change_their_type(make_rows: MakeRows, tmp_path: Path) -> None:
    """As a reader sees them: the wider number, or text."""
    for i, value in enumerate([1, 2.5, True, "word", datetime.date(2020, 1, 1)]):
        writer.write_shard([{**row, "note": value, "size": i or 0.5} for row in make_rows(1, first_seed=i)], tmp_path)
    columns = ["trial_id", "epsilon", "note", "size"]
    before = reader.read(tmp_path, columns=columns)
    assert compact(tmp_path).after == 1
    after = reader.read(tmp_path, columns=columns)
    assert after.schema.equals(before.schema) and str(after.schema.field("size").type) == "double"
    assert after.sort_by("trial_id").to_pylist() == before.sort_by("trial_id").to_pylist()
    assert set(after["note"].to_pylist()) == {"1", "2.5", "true", "word", "2020-01-01"}


def test_where_nothing_can_be_replaced_at_once_it_says_so(make_rows: MakeRows, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no rows"):
        compact(tmp_path)
    writer.write_shard(make_rows(2), tmp_path)
    legacy = tmp_path / "legacy"
    (tmp_path / "_rows.0").rename(legacy)
    assert reader.count_rows(legacy) == 4  # a folder as cape 0.1.0 wrote it can still be read
    with pytest.raises(StoreError, match="--out"):
        compact(legacy)
    assert compact(legacy, out=tmp_path / "new").rows == 4
