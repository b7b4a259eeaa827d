"""Merge the small files of a meta-dataset, without a moment in which a reader sees a row twice or not at all.

Why not in place: a reader lists a folder and then opens, one after the other, the paths that it found. Between the two,
any merge in place must either remove a path that was listed (the reader fails, or, as ``pyarrow`` does where the path
goes before it is looked at, silently skips its rows) or change what a path holds (rows then move between a path that
was read before the change and one that is read after it, and are seen twice or not at all). No order of renames helps,
whether one file is replaced by the union while the others are emptied, or whole folders are exchanged. What does help:
paths whose files never change and never go.

So the rows are in *generations*: ``_rows.0``, ``_rows.1``, ... The symbolic link ``rows`` names the current one. A
compaction builds the next generation beside it (merged files, and hard links to those that need no merging), flushes
it, and moves the link with one ``rename``. A generation only ever gains files and is deleted only after a time of
grace, so a reader that resolves the link once (``reader.rows_path``, ``os.path.realpath``) reads one generation from
beginning to end and sees every row once. A sweep may go on: its workers commit under the lock, shared, into the
generation that the link names, and the last step here (link what was committed meanwhile, move ``rows``) holds the lock
alone.

A reader that keeps the unresolved ``META/rows`` and lists it in the very instant of the rename can meet both
generations; ``docs/scaling.md`` shows the one-line remedy. An object store has no rename: compact it into another place
(``out``).
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from cape.errors import StoreError
from cape.logs import counted
from cape.store import reader
from cape.store.location import Location, sync_folder
from cape.store.schema import EXTRA_PREFIX, ROW_SCHEMA, ROWS, SPEC_FILE, SPEC_HISTORY
from cape.store.writer import chunk_name, ensure_rows, to_parquet

TARGET_BYTES = 64 * 2**20
ROW_GROUP = 50_000
KEEP_S = 3600.0
_KEY = ["trial_id", "epsilon"]  # of a row
_GENERATION = re.compile(r"_rows\.(\d+)")


@dataclass(frozen=True)
class Compaction:
    """What a compaction did.

    Attributes:
        before, after: number of files.
        rows: rows in the files that were written.
        duplicates: rows left out because the same trial and ε is there before.
        removed: earlier generations that were deleted.
    """

    before: int
    after: int
    rows: int
    duplicates: int = 0
    removed: int = 0

    def __str__(self) -> str:
        dropped = f", {self.duplicates} duplicate rows left out" if self.duplicates else ""
        return f"{self.before} files are {self.after} now{dropped}; {self.removed} earlier generations deleted"


def compact(
    meta_dir: reader.Where,
    *,
    out: reader.Where | None = None,
    target_bytes: int = TARGET_BYTES,
    keep_seconds: float = KEEP_S,
) -> Compaction:
    """Merge files of each (family, dataset) into files of about ``target_bytes``, and leave every row there once.

    Args:
        meta_dir: folder or URI.
        out: write the merged meta-dataset there and leave ``meta_dir`` alone (the only way for an object store).
        target_bytes: size that a file may reach; larger files are left as they are, but for rows that are there twice.
        keep_seconds: an earlier generation is deleted so long after it was replaced; readers that began with it have
            that much time.

    Raises:
        StoreError: no rows there, ``out`` is not empty, a file cannot be read or written, or ``meta_dir`` is a place
            where files cannot be replaced at once.
    """
    location = Location.of(meta_dir)
    if not reader.list_chunks(location):
        raise StoreError(f"{location} holds no rows to compact.")
    if out is not None:
        return _copy(location, reader.rows_folder(location), Location.of(out), target_bytes)
    with replacing(location) as base:
        return _replace(location, base, target_bytes, keep_seconds)


def _replace(location: Location, base: str, target_bytes: int, keep_seconds: float) -> Compaction:
    """Build the next generation and move the link ``rows`` to it."""
    removed = remove_retired(location, base, keep_seconds)
    files = reader.list_chunks(location, base)
    following = next_generation(location)
    plans = _merges(location, base, files, target_bytes)
    rows, duplicates, merged = _merge_all(location, base, plans, location, following, every=False)
    if not merged:
        return Compaction(len(files), len(files), 0, removed=removed)
    kept = publish(location, base, following, merged)
    after = len(reader.list_chunks(location, following))
    return Compaction(kept, after, rows, duplicates, removed + remove_retired(location, following, keep_seconds))


def next_generation(location: Location) -> str:
    """Return the name of a generation that there never was; numbers only go up, also past one left half-built."""
    return f"_rows.{max(int(m[1]) for m in map(_GENERATION.fullmatch, os.listdir(location.path())) if m) + 1}"


def publish(location: Location, base: str, following: str, replaced: set[str]) -> int:
    """Make ``following`` the current generation: it gets all files of ``base`` but those that it replaces.

    Args:
        replaced: paths below ``base``.

    Returns:
        Number of files in ``base``.

    Raises:
        StoreError: ``base`` is not the current generation any more: what was committed since would be lost.
    """
    with location.lock(exclusive=True):
        current = reader.rows_folder(location)
        if current != base:
            raise StoreError(
                f"The rows of {location} are in {current} by now, not in {base}; nothing was changed, try again."
            )
        held = [name[len(base) + 1 :] for name in reader.list_chunks(location, base)]
        for name in held:
            if name not in replaced:
                os.makedirs(os.path.dirname(location.path(f"{following}/{name}")), exist_ok=True)
                os.link(location.path(f"{base}/{name}"), location.path(f"{following}/{name}"))
        for folder, _, _ in os.walk(location.path(following)):
            sync_folder(folder)
        link = location.path(f"{ROWS}.next")
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(following, link)
        os.replace(link, location.path(ROWS))
        sync_folder(location.path())
        os.utime(location.path(base))  # its grace begins now
    return len(held)


@contextmanager
def replacing(location: Location) -> Iterator[str]:
    """Be the only one who makes a next generation, inside the block; give the current one.

    Raises:
        StoreError: files cannot be replaced at once there, or somebody else is at it.
    """
    if location.folder is None or not os.path.islink(location.path(ROWS)):
        raise StoreError(
            f"The rows of {location} cannot be replaced at once (an object store, a file system without symbolic links,"
            " or a folder that an early version wrote); `cape store compact --out FOLDER` copies it to where they can."
        )
    with location.lock(exclusive=True, name=".compact", wait=False):
        yield reader.rows_folder(location)  # not before the lock: whoever held it may have moved the link


def _copy(source: Location, base: str, target: Location, target_bytes: int) -> Compaction:
    """Write the merged meta-dataset into an empty place."""
    if reader.list_chunks(target):
        raise StoreError(f"{target} holds rows already; choose an empty place for the compacted meta-dataset.")
    files = reader.list_chunks(source, base)
    plans = _merges(source, base, files, target_bytes)
    rows, duplicates, _ = _merge_all(source, base, plans, target, ensure_rows(target), every=True)
    for name in (SPEC_FILE, *source.list(SPEC_HISTORY)):
        content = source.read(name)
        if content is not None:
            target.write(name, content)
    return Compaction(len(files), len(reader.list_chunks(target)), rows, duplicates)


def _merges(location: Location, base: str, files: list[str], target_bytes: int) -> list[tuple[str, list[str]]]:
    """Return (partition, names) of files to be merged, about ``target_bytes`` together; each large file alone."""
    groups: dict[tuple[str, bool], list[tuple[str, int]]] = defaultdict(list)
    sizes = location.filesystem.get_file_info([location.path(name) for name in files])
    for name, info in zip(files, sizes):
        folder, file = name[len(base) + 1 if base else 0 :].rsplit("/", 1)
        groups[folder, file.startswith(EXTRA_PREFIX)].append((file, info.size))
    plans = []
    for (folder, _), members in groups.items():
        together: list[str] = []
        total = 0
        for file, size in sorted(members, key=lambda m: m[1]):
            if together and total + size > target_bytes:
                plans.append((folder, together))
                together, total = [], 0
            together.append(file)
            total += size
        plans.append((folder, together))
    return plans


def _merge_all(
    source: Location, base: str, plans: list[tuple[str, list[str]]], target: Location, into: str, *, every: bool
) -> tuple[int, int, set[str]]:
    """Write every merge, and where not ``every`` file is to be written, none that would hold what it holds already.

    Returns:
        Rows written, rows left out because the same trial and ε is there before, and the files (below ``base``) whose
        rows these are.
    """
    rows = duplicates = 0
    replaced: set[str] = set()
    plans = sorted(plans, key=lambda plan: (plan[0], len(plan[1]) > 1))  # a file that stays has its rows before others
    for folder, members in groupby(counted(plans, len(plans), "merges"), key=lambda plan: plan[0]):
        seen: set[tuple[str, float]] = set()
        for _, names in members:
            paths = [f"{base}/{folder}/{name}".lstrip("/") for name in names]
            stays = len(names) == 1 and not every
            table = union(source, paths, _KEY if stays else None)
            kept = [
                i
                for i, key in enumerate(zip(*(table[column].to_pylist() for column in _KEY)))
                if key not in seen and not seen.add(key)  # type: ignore[func-returns-value]
            ]
            if stays and len(kept) == table.num_rows:
                continue
            replaced.update(f"{folder}/{name}" for name in names)
            duplicates += table.num_rows - len(kept)
            if not kept:
                continue
            if stays:
                table = union(source, paths)
            if len(kept) < table.num_rows:
                table = table.take(kept)
            name = chunk_name(table["trial_id"].to_pylist(), extra=names[0].startswith(EXTRA_PREFIX))
            target.write(f"{into}/{folder}/{name}", to_parquet(table, ROW_GROUP))
            rows += table.num_rows
    return rows, duplicates, replaced


def union(location: Location, names: list[str], columns: list[str] | None = None) -> pa.Table:
    """Return the rows of files (all columns or some) as one table; raises ``StoreError`` where one cannot be read."""
    try:
        # What a turned bit made wrong must not get a new checksum.
        tables = [
            pq.read_table(
                location.path(n),
                columns=columns,
                partitioning=None,
                filesystem=location.filesystem,
                page_checksum_verification=True,
            )
            for n in names
        ]
        if any(not set(_KEY) <= set(t.column_names) for t in tables):
            raise pa.ArrowInvalid(reader.NOT_ROWS)
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(
            f"A file of {location} cannot be read, nothing was changed; `cape store verify` names it: {error}"
        ) from error
    metadata = dict(tables[0].schema.metadata or {})
    for other in tables[1:]:  # what the files do not agree on (a device, a revision) is said of none of them
        known = other.schema.metadata or {}
        metadata = {k: (v if known.get(k) == v else b"several") for k, v in metadata.items()}
    schema = reader.common_schema([t.schema for t in tables])  # imported files may disagree on a column of their own
    plain = [_as(t, schema).replace_schema_metadata(None) for t in tables]
    return pa.concat_tables(plain, promote_options="permissive").replace_schema_metadata(metadata)


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table whose columns beyond ours have the types that they have in ``schema``."""
    own = [schema.field(f.name) if f.name not in ROW_SCHEMA.names else f for f in table.schema]
    return table.cast(pa.schema(own))


def remove_retired(location: Location, current: str, keep_seconds: float) -> int:
    """Delete generations replaced long enough ago (and what a killed compaction left); return how many are gone."""
    count = 0
    for name in os.listdir(location.path()):
        if name == current or not _GENERATION.fullmatch(name):
            continue
        if time.time() - os.stat(location.path(name)).st_mtime >= keep_seconds:
            location.delete_tree(name)
            count += not location.exists(name)  # what cannot be deleted stays for the next compaction
    return count
