"""Read a meta-dataset as an Arrow table, also while a sweep writes to it or a compaction replaces its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from cape.config import SweepSpec
from cape.errors import SpecError, StoreError, did_you_mean, first_line
from cape.store.location import Location
from cape.store.schema import (
    EXTRA_PREFIX,
    PARTITION_COLUMNS,
    PARTITION_SCHEMA,
    ROW_SCHEMA,
    ROWS,
    SPEC_FILE,
    SPEC_HISTORY,
    partition,
)

Where = str | Path | Location

# A bit that turned over is an error, never another number.
_CHECKED = pds.ParquetFileFormat(
    default_fragment_scan_options=pds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


def rows_folder(meta_dir: Where) -> str:
    """Return where the rows are now, relative to the meta-dataset: the generation that ``META/rows`` points to.

    Whoever reads below it reads one generation from beginning to end, whatever a compaction does meanwhile.
    """
    location = Location.of(meta_dir)
    if location.folder is None:
        return ROWS
    try:
        return os.readlink(location.path(ROWS))
    except FileNotFoundError:
        if any(location.folder.glob("family=*/dataset=*")):  # as cape 0.1.0 wrote them
            return ""
        lost = sorted({path.parts[-4] for path in location.folder.glob("_rows.*/family=*/dataset=*/*.parquet")})
        if lost and os.path.lexists(location.path(ROWS)):  # made since: the first file was just written
            return rows_folder(location)
        if lost:  # a copy that left symbolic links out
            raise StoreError(
                f"{location} has lost the link '{ROWS}' to its rows ({', '.join(lost)}); restore it with"
                f" `ln -s {lost[-1]} {location}/{ROWS}`."
            ) from None
        return ROWS
    except OSError:  # a folder, where the file system has no symbolic links
        return ROWS


def rows_path(meta_dir: Where) -> str:
    """Return the path or key to give to another reader (``pyarrow.dataset``, Polars, DuckDB): one generation.

    Raises:
        StoreError: no such folder, or no rows in it.
    """
    location = Location.of(meta_dir)
    base = rows_folder(location)
    if not list_chunks(location, base):
        raise _without_rows(location)
    return location.path(base).rstrip("/")


def list_chunks(meta_dir: Where, base: str | None = None) -> list[str]:
    """Return the committed Parquet files, relative to the meta-dataset, in a stable order."""
    location = Location.of(meta_dir)
    base = rows_folder(location) if base is None else base
    start = len(base) + 1 if base else 0
    return [
        name
        for name in location.list(base, recursive=True)
        if name.endswith(".parquet") and name.startswith("family=", start) and name.rsplit("/", 1)[-1][0] not in "._"
    ]


def read_spec(meta_dir: Where) -> SweepSpec | None:
    """Return the sweep that fills the meta-dataset, or None where there is none.

    Raises:
        StoreError: the file is there but is no sweep.
    """
    return _spec_at(Location.of(meta_dir), SPEC_FILE)


def read_specs(meta_dir: Where) -> list[SweepSpec]:
    """Return every spec that the sweep had, the current one last: it may have been extended.

    Raises:
        StoreError: a file that is no sweep.
    """
    location = Location.of(meta_dir)
    current = read_spec(location)
    earlier = [_spec_at(location, name) for name in location.list(SPEC_HISTORY) if name.endswith(".json")]
    found = [spec for spec in earlier if spec is not None and spec != current]
    return found if current is None else [*found, current]


def _spec_at(location: Location, name: str) -> SweepSpec | None:
    content = location.read(name)
    if content is None:
        return None
    try:
        return SweepSpec.from_json(content.decode())
    except (SpecError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{location}/{name} does not describe a sweep: {error} Put the spec of the sweep in its place."
        ) from error


def open_dataset(meta_dir: Where) -> pds.Dataset:
    """Return the meta-dataset as a ``pyarrow.dataset.Dataset`` with an explicit schema.

    Columns that imported files have beyond ``ROW_SCHEMA`` follow it; rows without them hold null there.

    Raises:
        StoreError: no such folder, no rows in it, or a file that is no Parquet.
    """
    location = Location.of(meta_dir)
    base = rows_folder(location)
    files = list_chunks(location, base)
    if not files:
        raise _without_rows(location)
    extra = [_file_schema(location, n) for n in files if n.rsplit("/", 1)[-1].startswith(EXTRA_PREFIX)]
    return _dataset(location, base, files, common_schema([ROW_SCHEMA, *extra]))


def _dataset(location: Location, base: str, files: Sequence[str], schema: pa.Schema) -> pds.Dataset:
    return pds.dataset(
        [location.path(name) for name in files],
        schema=schema,
        format=_CHECKED,
        filesystem=location.filesystem,
        partitioning=pds.partitioning(PARTITION_SCHEMA, flavor="hive"),
        partition_base_dir=location.path(base),
    )


def read(meta_dir: Where, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
    """Return the rows of a meta-dataset.

    Args:
        meta_dir: folder or URI that a sweep or an import wrote.
        columns: names to read; all where None.
        filter: e.g. ``pyarrow.dataset.field("family") == "mlp"``.

    Raises:
        SpecError: an unknown column.
        StoreError: no such folder, no rows in it, or a file that cannot be read (the message names it).
    """
    dataset = open_dataset(meta_dir)
    for name in columns or ():
        if name not in dataset.schema.names:
            raise SpecError(f"The meta-dataset has no column '{name}'.{did_you_mean(name, dataset.schema.names)}")
    try:
        return dataset.to_table(columns=None if columns is None else list(columns), filter=filter)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(meta_dir, error) from error


def count_rows(meta_dir: Where, filter: pc.Expression | None = None) -> int:
    """Return the number of rows, zero where nothing was written yet."""
    if not list_chunks(meta_dir):
        return 0
    try:
        return int(open_dataset(meta_dir).count_rows(filter=filter))
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(meta_dir, error) from error


def done_ids(meta_dir: Where) -> np.ndarray:
    """Return the committed trials as their ids' numbers, [n] uint64, sorted and distinct: 8 bytes a trial.

    Raises:
        StoreError: a file that cannot be read (the message names it).
    """
    location = Location.of(meta_dir)
    base = rows_folder(location)
    files = list_chunks(location, base)
    if not files:
        return np.empty(0, np.uint64)
    dataset = _dataset(location, base, files, pa.schema([ROW_SCHEMA.field("trial_id")]))
    found: list[np.ndarray] = [np.empty(0, np.uint64)]
    try:
        for batch in dataset.to_batches(columns=["trial_id"]):
            found.append(id_numbers(pc.unique(batch.column(0)).to_pylist()))
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(location, error) from error
    return np.unique(np.concatenate(found))


def id_numbers(trial_ids: Sequence[str]) -> np.ndarray:
    """Return trial ids (16 hex digits) as numbers, [n] uint64; what is no such id is left out."""
    try:
        return np.fromiter((int(i, 16) for i in trial_ids), np.uint64, len(trial_ids))
    except (ValueError, TypeError, OverflowError):  # a foreign file; `cape store verify` names it
        return np.asarray([int(i, 16) for i in trial_ids if is_id(i)], np.uint64)


def is_id(text: object) -> bool:
    """Return whether something is the id of a trial of a sweep: 16 hex digits."""
    return isinstance(text, str) and len(text) == 16 and set(text) <= set("0123456789abcdef")


def done_trials(meta_dir: Where, family: str, dataset: str) -> set[str]:
    """Return the ids of the trials of one (family, dataset) whose rows are committed.

    Raises:
        StoreError: a file that cannot be read (the message names it).
    """
    location = Location.of(meta_dir)
    folder = f"{rows_folder(location)}/{partition(family, dataset)}".lstrip("/")
    done: set[str] = set()
    for name in location.list(folder):
        if not name.endswith(".parquet"):
            continue
        try:
            path = location.path(name)
            table = pq.read_table(path, columns=["trial_id"], partitioning=None, filesystem=location.filesystem)
            done.update(table["trial_id"].to_pylist())
        except (pa.ArrowInvalid, OSError) as error:
            raise _broken(location, name, error) from error
    return done


def unreadable_chunks(meta_dir: Where) -> list[tuple[str, str]]:
    """Return (name, reason) of every committed file that is not whole to its last page, or holds no rows of ours."""
    location = Location.of(meta_dir)
    found = []
    for name in list_chunks(location):
        try:
            table = read_chunk(location, name)
        except (pa.ArrowInvalid, OSError) as error:
            found.append((name, first_line(error)))
        else:
            if table is None:
                found.append((name, NOT_ROWS))
    return found


NOT_ROWS = "no rows of a meta-dataset"
OF_EVERY_ROW = ("trial_id", "sweep_hash", "epsilon", "stop_reason")


def read_chunk(location: Location, name: str) -> pa.Table | None:
    """Return a file's rows, every page's checksum checked; None where it is Parquet of another kind."""
    with pq.ParquetFile(location.path(name), filesystem=location.filesystem, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        ours = [f for f in schema if f.name in ROW_SCHEMA.names]
        alike = all(_kind(f.type) in (_kind(ROW_SCHEMA.field(f.name).type), "null") for f in ours)
        return file.read() if alike and set(schema.names) >= set(OF_EVERY_ROW) else None


def _kind(kind: pa.DataType) -> str:
    """Return what sort of values a type holds: numbers of any width are one sort."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list of {_kind(kind.value_type)}"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return "number"
    return "text" if types.is_string(kind) or types.is_large_string(kind) else str(kind)


def _file_schema(location: Location, name: str) -> pa.Schema:
    try:
        schema = pq.read_schema(location.path(name), filesystem=location.filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise _broken(location, name, error) from error
    return pa.schema([f for f in schema if f.name not in PARTITION_COLUMNS])


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the schema that files of all these can be read with: the first one's, and columns beyond ours after it."""
    fields = {f.name: f for f in schemas[0]}
    for f in (f for schema in schemas[1:] for f in schema):
        known = fields.setdefault(f.name, f)
        if f.name not in ROW_SCHEMA.names and known.type != f.type:
            fields[f.name] = _common(known, f)
    return pa.schema(list(fields.values()), metadata=schemas[0].metadata)


def _common(a: pa.Field, b: pa.Field) -> pa.Field:
    """Return a field that both types can be read as: the wider number, or text."""
    try:
        return pa.unify_schemas([pa.schema([a]), pa.schema([b])], promote_options="permissive").field(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.field(a.name, pa.string())


def _without_rows(location: Location) -> StoreError:
    state = "holds no rows yet" if location.exists() else "does not exist"
    return StoreError(f"The meta-dataset {location} {state}; run `cape sweep` or `cape import-csv` into it first.")


def _unreadable(meta_dir: Where, error: Exception) -> StoreError:
    """Find the file at fault: Arrow's own message does not always name it."""
    location = Location.of(meta_dir)
    for name, reason in unreadable_chunks(location):
        return _broken(location, name, reason)
    return StoreError(f"The meta-dataset {location} cannot be read: {error}")


def _broken(location: Location, name: str, error: Exception | str) -> StoreError:
    reason = error if isinstance(error, str) else first_line(error)
    return StoreError(
        f"{location}/{name} cannot be read ({reason}); `cape sweep --resume` sets such a file aside and runs its"
        " trials again."
    )


def partition_of(name: str) -> tuple[str, str]:
    """Return (family, dataset) of a file by its path."""
    parts = dict(part.split("=", 1) for part in name.split("/") if "=" in part)
    return unquote(parts["family"]), unquote(parts["dataset"])
