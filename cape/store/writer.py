"""Write rows so that a reader sees a file whole or not at all, and claim a folder for one sweep."""

from __future__ import annotations

import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import cape
from cape.config import SweepSpec, stable_hash
from cape.errors import StoreError
from cape.store import reader
from cape.store.schema import EXTRA_PREFIX, PARTITION_COLUMNS, ROW_SCHEMA, SPEC_FILE, partition_dir

# A temporary file older than this belongs to a process that was killed, not to one that is writing.
_ABANDONED_AFTER_S = 3600.0


def write_shard(rows: Iterable[Mapping[str, Any]], meta_dir: str | Path, *, prefix: str = "") -> list[Path]:
    """Write rows as one Parquet file for each (family, dataset) among them, atomically.

    The name of a file is the hash of the trials in it: the same trials written twice are one file. Columns that are
    not in ``ROW_SCHEMA`` are kept. All rows of a trial must come in one call.

    Args:
        rows: mappings with at least ``trial_id``, ``family`` and ``dataset``.
        meta_dir: folder of the meta-dataset.
        prefix: beginning of the files' names, by which they can be found again without opening any other.

    Returns:
        The files written.

    Raises:
        StoreError: the folder cannot be written to.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["family"], row["dataset"]].append(row)
    paths = []
    for (family, dataset), group in groups.items():
        schema, extra = _schema_of(group)
        table = pa.Table.from_pylist(group, schema=schema)
        name = stable_hash(sorted({row["trial_id"] for row in group})) + ".parquet"
        name = f"{prefix}-{name}" if prefix else name
        path = partition_dir(Path(meta_dir), family, dataset) / (EXTRA_PREFIX + name if extra else name)
        _write_atomically(table, path)
        paths.append(path)
    return paths


def _schema_of(rows: list[Mapping[str, Any]]) -> tuple[pa.Schema, bool]:
    """Return the schema of the file (partition columns left out) and whether it goes beyond ``ROW_SCHEMA``."""
    fields = [f for f in ROW_SCHEMA if f.name not in PARTITION_COLUMNS]
    names = dict.fromkeys(key for row in rows for key in row if key not in ROW_SCHEMA.names)
    for name in names:
        values = pa.array([row.get(name) for row in rows])
        fields.append(pa.field(name, pa.string() if pa.types.is_null(values.type) else values.type))
    metadata = {**(ROW_SCHEMA.metadata or {}), b"cape_version": cape.__version__.encode()}
    return pa.schema(fields, metadata=metadata), bool(names)


def _write_atomically(table: pa.Table, path: Path) -> None:
    def write(file: Any) -> None:
        pq.write_table(table, file, compression="zstd", use_dictionary=False)

    _replace(path, write)


def _replace(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a hidden temporary file, flush it to the disk and give it its name."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise StoreError(f"Cannot write {path}: {reason}. What was committed before is kept.") from error


def claim(meta_dir: str | Path, spec: SweepSpec, *, resume: bool = False) -> None:
    """Make ``meta_dir`` the folder of one sweep, or make sure that it is.

    Raises:
        StoreError: the folder holds another sweep (the message names what differs), or rows of this one while
            ``resume`` is False, or is not a folder.
    """
    root = Path(meta_dir)
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; a sweep needs a folder of its own.")
    held = reader.read_spec(root)
    if held is None:
        _replace(root / SPEC_FILE, lambda file: file.write(spec.to_json(indent=2).encode()))
        return
    if held != spec:
        raise StoreError(
            f"{root} holds another sweep: {_difference(held, spec)}. Choose another folder, or give it the spec that"
            f" it holds ({root / SPEC_FILE})."
        )
    if not resume and reader.list_files(root):
        raise StoreError(f"{root} already holds rows of this sweep; add --resume (resume=True) to run what is missing.")
    _remove_abandoned(root)


def _difference(held: SweepSpec, wanted: SweepSpec) -> str:
    a, b = held.to_dict(), wanted.to_dict()
    return "; ".join(f"{key} is {a[key]} there and {b[key]} here" for key in a if a[key] != b[key])


def _remove_abandoned(root: Path) -> None:
    """Delete temporary files that killed processes left behind."""
    for path in root.glob("family=*/dataset=*/.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                path.unlink()
        except FileNotFoundError:  # its writer finished in between
            continue
