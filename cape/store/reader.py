"""Read a meta-dataset as an Arrow table, also while a sweep writes to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from cape.config import SweepSpec
from cape.errors import SpecError, StoreError, did_you_mean
from cape.store.schema import (
    EXTRA_PREFIX,
    PARTITION_COLUMNS,
    PARTITION_SCHEMA,
    ROW_SCHEMA,
    SPEC_FILE,
    partition_dir,
)


def list_files(meta_dir: str | Path) -> list[Path]:
    """Return the committed Parquet files, in a stable order; none where the folder does not exist."""
    return sorted(p for p in Path(meta_dir).glob("family=*/dataset=*/*.parquet") if p.name[0] not in "._")


def read_spec(meta_dir: str | Path) -> SweepSpec | None:
    """Return the sweep that fills the folder, or None where there is none.

    Raises:
        StoreError: the file is there but is no sweep.
    """
    path = Path(meta_dir) / SPEC_FILE
    try:
        return SweepSpec.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (SpecError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} does not describe a sweep: {error}") from error


def open_dataset(meta_dir: str | Path) -> pds.Dataset:
    """Return the meta-dataset as a ``pyarrow.dataset.Dataset`` with an explicit schema.

    Columns that imported files have beyond ``ROW_SCHEMA`` follow it; rows without them hold null there.

    Raises:
        StoreError: no such folder, no rows in it, or a file that is no Parquet.
    """
    root, files = Path(meta_dir), list_files(meta_dir)
    if not files:
        state = "holds no rows yet" if root.is_dir() else "does not exist"
        raise StoreError(f"The meta-dataset {root} {state}; run `cape sweep` or `cape import-csv` into it first.")
    fields = {name: ROW_SCHEMA.field(name) for name in ROW_SCHEMA.names}
    for path in files:
        if path.name.startswith(EXTRA_PREFIX):
            for f in _file_schema(path):
                known = fields.setdefault(f.name, f)
                if f.name not in ROW_SCHEMA.names and known.type != f.type:
                    fields[f.name] = _common(known, f)
    return pds.dataset(
        [str(p) for p in files],
        schema=pa.schema(list(fields.values()), metadata=ROW_SCHEMA.metadata),
        format="parquet",
        partitioning=pds.partitioning(PARTITION_SCHEMA, flavor="hive"),
        partition_base_dir=str(root),
    )


def read(meta_dir: str | Path, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
    """Return the rows of a meta-dataset.

    Args:
        meta_dir: folder that a sweep or an import wrote.
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


def count_rows(meta_dir: str | Path, filter: pc.Expression | None = None) -> int:
    """Return the number of rows, zero where nothing was written yet."""
    if not list_files(meta_dir):
        return 0
    try:
        return int(open_dataset(meta_dir).count_rows(filter=filter))
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(meta_dir, error) from error


def done_trials(
    meta_dir: str | Path, family: str | None = None, dataset: str | None = None, prefix: str = ""
) -> set[str]:
    """Return the ids of the trials whose rows are committed: all, or those of one (family, dataset).

    ``prefix`` narrows the search to the files that ``write_shard`` wrote with that prefix.
    """
    if family is not None and dataset is not None:
        folder = partition_dir(Path(meta_dir), family, dataset)
        files = [p for p in folder.glob(f"{prefix}*.parquet") if p.name[0] not in "._"]
    else:
        files = list_files(meta_dir)
    done: set[str] = set()
    for path in files:
        try:
            done.update(pq.read_table(path, columns=["trial_id"], partitioning=None)["trial_id"].to_pylist())
        except (pa.ArrowInvalid, OSError) as error:
            raise _broken(path, error) from error
    return done


def _file_schema(path: Path) -> pa.Schema:
    try:
        return pa.schema([f for f in pq.read_schema(path) if f.name not in PARTITION_COLUMNS])
    except (pa.ArrowInvalid, OSError) as error:
        raise _broken(path, error) from error


def _common(a: pa.Field, b: pa.Field) -> pa.Field:
    """Return a field that both types can be read as: the wider number, or text."""
    try:
        return pa.unify_schemas([pa.schema([a]), pa.schema([b])], promote_options="permissive").field(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.field(a.name, pa.string())


def _unreadable(meta_dir: str | Path, error: Exception) -> StoreError:
    """Find the file at fault: Arrow's own message does not always name it."""
    for path in list_files(meta_dir):
        try:
            pq.ParquetFile(path).close()
        except (pa.ArrowInvalid, OSError) as cause:
            return _broken(path, cause)
    return StoreError(f"The meta-dataset {meta_dir} cannot be read: {error}")


def _broken(path: Path, error: Exception) -> StoreError:
    reason = str(error).splitlines()[0].rstrip(".")
    return StoreError(f"{path} cannot be read ({reason}); delete it and run the sweep again with --resume.")
