"""Recounting: every kind of damage is found, named, and can be set aside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cape.config import StoppingRule, SweepSpec
from cape.errors import StoreError
from cape.store import claims, reader, writer
from cape.store.compact import compact
from cape.store.verify import verify
from cape.sweep.inline import run_inline
from cape.sweep.plan import Plan
from tests.files import list_files

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


def turn_a_bit(path: Path, column: str) -> None:
    """Change a number of a column so that only its page's checksum tells."""
    group = pq.read_metadata(path).row_group(0)
    found = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    content = bytearray(path.read_bytes())
    content[found.data_page_offset + found.total_compressed_size - 3] ^= 0x01
    path.write_bytes(content)


def test_a_finished_sweep_is_sound(meta: Path) -> None:
    found = verify(meta, ids)
    assert found.sound and str(found).endswith("\nsound")
    assert (found.rows, found.trials, found.planned, found.missing, found.duplicates) == (16, 8, 8, 0, 0)
    assert found.versions == {"1": found.files} and found.files >= 2


def test_damage_is_found_named_and_set_aside_and_a_resume_mends_it(meta: Path) -> None:
    truncated, flipped = list_files(meta)[:2]
    whole = reader.read(meta, columns=["trial_id", "epsilon", "t_star", "log_g2"]).to_pylist()
    truncated.write_bytes(truncated.read_bytes()[:-100])
    turn_a_bit(flipped, "l0")
    foreign = truncated.parent / "notes.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    renamed = truncated.parent / f"{'0' * 16}.parquet"
    found = verify(meta, ids)
    assert not found.sound and str(found).endswith("NOT sound")
    assert {name.rsplit("/", 1)[-1] for name, _ in found.unreadable} == {truncated.name, flipped.name}
    assert [name.rsplit("/", 1)[-1] for name, _ in found.foreign] == ["notes.parquet"]
    verify(meta, ids, set_aside=True)
    assert len([p for p in (meta / "_corrupt").rglob("*") if p.is_file()]) == 3
    left = verify(meta, ids)
    assert left.sound and left.missing > 0
    run_inline(SPEC, meta, resume=True, progress=False)
    assert verify(meta, ids).sound and verify(meta, ids).missing == 0

    def key(row: dict) -> tuple:
        return row["trial_id"], row["epsilon"]

    again = reader.read(meta, columns=["trial_id", "epsilon", "t_star", "log_g2"]).to_pylist()
    assert sorted(again, key=key) == sorted(whole, key=key)
    first = list_files(meta)[0]
    first.rename(renamed)
    assert [reason for _, reason in verify(meta, ids).foreign] == ["its trials are not those that its name stands for"]


def test_files_that_are_set_aside_keep_their_paths_and_replace_none(meta: Path) -> None:
    first = list_files(meta)[0]
    other = first.parents[2] / "family=other" / "dataset=digits"
    other.mkdir(parents=True)
    for content in (b"one", b"two"):
        for folder in (first.parent, other):
            (folder / "notes").write_bytes(content + folder.parent.name.encode())
        verify(meta, ids, set_aside=True)
    kept = {str(p.relative_to(meta / "_corrupt")): p.read_bytes() for p in (meta / "_corrupt").rglob("notes*")}
    assert kept == {
        "_rows.0/family=mlp/dataset=digits/notes": b"onefamily=mlp",
        "_rows.0/family=mlp/dataset=digits/notes.1": b"twofamily=mlp",
        "_rows.0/family=other/dataset=digits/notes": b"onefamily=other",
        "_rows.0/family=other/dataset=digits/notes.1": b"twofamily=other",
    }
    assert verify(meta, ids).sound
    (meta / "rows").unlink()
    (meta / "_rows.0" / "family=mlp").rename(meta / "family=mlp")  # rows beside it, as cape 0.1.0 wrote them
    (meta / "family=mlp" / "dataset=digits" / "notes").write_bytes(b"")
    verify(meta, ids, set_aside=True)
    assert verify(meta, ids).sound


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
    path = list_files(meta)[0]
    table = pq.read_table(path, partitioning=None)
    path.unlink()
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    assert verify(meta, ids).incomplete == 1


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        verify(tmp_path / "absent")
    empty = verify(tmp_path)
    assert empty.sound and empty.files == 0 and empty.planned is None


# ---- what must never be done silently: read a turned bit, lose the rows, take another run's place ----


def test_a_turned_bit_is_an_error_gets_no_new_checksum_and_a_resume_mends_it(
    meta: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {(r["trial_id"], r["epsilon"]): r["log_g2"] for r in reader.read(meta).to_pylist()}
    path = list_files(meta)[0]
    turn_a_bit(path, "log_g2")
    with pytest.raises(StoreError, match=f"{path.name} cannot be read .*--resume"):
        reader.read(meta)
    with pytest.raises(StoreError, match="nothing was changed"):
        compact(meta, keep_seconds=0)
    run_inline(SPEC, meta, resume=True, progress=False)
    assert path.name in capsys.readouterr().err and verify(meta, ids).sound
    assert {(r["trial_id"], r["epsilon"]): r["log_g2"] for r in reader.read(meta).to_pylist()} == whole


@pytest.mark.parametrize("foreign", [{"a": [1]}, {"trial_id": ["x"], "t_star": ["many"]}], ids=["other", "text"])
def test_parquet_of_another_kind_is_set_aside(meta: Path, foreign: dict[str, list[object]]) -> None:
    path = list_files(meta)[0].with_name(f"{'b' * 16}.parquet")
    rest = {"sweep_hash": ["s"], "epsilon": [0.1], "stop_reason": ["cap"]} if "trial_id" in foreign else {}
    pq.write_table(pa.table({**foreign, **rest}), path)
    assert [name.rsplit("/", 1)[-1] for name, _ in verify(meta, ids).foreign] == [path.name]
    assert run_inline(SPEC, meta, resume=True, progress=False).trials == 8
    assert not path.exists() and verify(meta, ids).sound


def test_rows_without_their_link_are_not_taken_for_none(meta: Path) -> None:
    compact(meta, keep_seconds=3600)
    kept = (meta / "rows").readlink()
    (meta / "rows").unlink()
    for look in (reader.read, verify, lambda m: run_inline(SPEC, m, resume=True, progress=False)):
        with pytest.raises(StoreError, match=f"lost the link 'rows'.*ln -s {kept} "):
            look(meta)
    (meta / "rows").symlink_to(kept)
    assert verify(meta, ids).sound


def test_rows_that_are_there_twice_are_said(meta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list_files(meta)[0]
    shutil.copy(path, path.with_name(f"{'c' * 16}.parquet"))
    run_inline(SPEC, meta, resume=True, progress=False)
    assert "there more than once" in capsys.readouterr().err


def test_a_run_that_is_refused_leaves_the_others_spec(meta: Path) -> None:
    before = (meta / "_spec.json").read_bytes()
    run = claims.start_run(meta)
    with pytest.raises(StoreError, match="Another run writes"):
        run_inline(SPEC.replace(trials_per_cell=3), meta, resume=True, progress=False)
    assert (meta / "_spec.json").read_bytes() == before
    claims.end_run(meta, run)


def test_a_claim_that_is_no_claim_stops_nobody(meta: Path) -> None:
    (meta / "_run.json").write_text('{"run": "r", "host": "elsewhere", "pid": 1}')
    (meta / "_runs").mkdir()
    (meta / "_runs" / "r.json").write_text('{"updated": "yesterday"}')
    assert run_inline(SPEC, meta, resume=True, progress=False).trials == 8


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cape.sweep.shard_run.os.pwrite", full)
    with pytest.raises(StoreError, match=f"Cannot write {tmp_path}/.*No space left on device.*kept"):
        run_inline(SPEC, tmp_path / "new", progress=False)
