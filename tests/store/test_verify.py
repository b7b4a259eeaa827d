"""Recounting: every kind of damage is found, named, and can be set aside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cape.config import StoppingRule, SweepSpec
from cape.errors import StoreError
from cape.store import reader, writer
from cape.store.verify import verify
from cape.sweep.inline import run_inline
from cape.sweep.plan import Plan

SPEC = SweepSpec(
    families=("mlp",),
    datasets=("digits",),
    lrs=(1e-3, 2e-3),
    batch_sizes=(8, 16),
    epsilons=(0.6, 0.5),
    trials_per_cell=2,
    stopping=StoppingRule(max_steps=30),
)


def ids(spec: SweepSpec):  # type: ignore[no-untyped-def]
    return Plan(spec).all_ids()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "meta"
    run_inline(SPEC, out, progress=False)
    return out


@pytest.fixture
def meta(swept: Path, tmp_path: Path) -> Path:
    """A finished sweep that a test may damage."""
    return Path(shutil.copytree(swept, tmp_path / "meta", symlinks=True))


def test_a_finished_sweep_is_sound(meta: Path) -> None:
    found = verify(meta, ids)
    assert found.sound and str(found).endswith("\nsound")
    assert (found.rows, found.trials, found.planned, found.missing, found.duplicates) == (16, 8, 8, 0, 0)
    assert found.versions == {"1": found.files} and found.files >= 2


def test_damage_is_found_named_and_set_aside_and_a_resume_mends_it(meta: Path) -> None:
    truncated, flipped = reader.list_files(meta)[:2]
    whole = reader.read(meta, columns=["trial_id", "epsilon", "t_star", "log_g2"]).to_pylist()
    truncated.write_bytes(truncated.read_bytes()[:-100])
    content = bytearray(flipped.read_bytes())
    group = pq.read_metadata(flipped).row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "l0")
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0x01  # one bit of a page
    flipped.write_bytes(content)
    foreign = truncated.parent / "notes.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    renamed = truncated.parent / f"{'0' * 16}.parquet"
    found = verify(meta, ids)
    assert not found.sound and str(found).endswith("NOT sound")
    assert {name.rsplit("/", 1)[-1] for name, _ in found.unreadable} == {truncated.name, flipped.name}
    assert [name.rsplit("/", 1)[-1] for name, _ in found.foreign] == ["notes.parquet"]
    verify(meta, ids, set_aside=True)
    assert len(list((meta / "_corrupt").iterdir())) == 3
    left = verify(meta, ids)
    assert left.sound and left.missing > 0
    run_inline(SPEC, meta, resume=True, progress=False)
    assert verify(meta, ids).sound and verify(meta, ids).missing == 0

    def key(row: dict) -> tuple:
        return row["trial_id"], row["epsilon"]

    again = reader.read(meta, columns=["trial_id", "epsilon", "t_star", "log_g2"]).to_pylist()
    assert sorted(again, key=key) == sorted(whole, key=key)
    first = reader.list_files(meta)[0]
    first.rename(renamed)
    assert [reason for _, reason in verify(meta, ids).foreign] == ["its trials are not those that its name stands for"]


def test_rows_that_are_there_twice_and_trials_of_no_plan_are_counted(meta: Path) -> None:
    rows = [r for r in reader.read(meta).to_pylist()]
    some = sorted({r["trial_id"] for r in rows})[:2]
    writer.write_shard([r for r in rows if r["trial_id"] in some], meta)
    assert verify(meta, ids).duplicates in (0, 4)  # none only where the two had been one chunk
    writer.write_shard([{**r, "trial_id": "f" * 16} for r in rows[:2]], meta)
    writer.write_shard([{**r, "trial_id": "e" * 16, "sweep_hash": "imported"} for r in rows[:2]], meta)
    found = verify(meta, ids)
    assert not found.sound and found.unplanned == 1  # what was imported belongs to no plan


def test_a_trial_without_all_its_rows_is_incomplete(meta: Path) -> None:
    path = reader.list_files(meta)[0]
    table = pq.read_table(path, partitioning=None)
    path.unlink()
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    assert verify(meta, ids).incomplete == 1


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        verify(tmp_path / "absent")
    empty = verify(tmp_path)
    assert empty.sound and empty.files == 0 and empty.planned is None
