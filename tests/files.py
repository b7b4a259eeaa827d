"""The files of a meta-dataset, which tests damage, replace and compare."""

from __future__ import annotations

from pathlib import Path

from cape.store.location import Location
from cape.store.reader import Where, list_chunks


def list_files(meta_dir: Where) -> list[Path]:
    """Return the committed Parquet files of a folder, in a stable order."""
    location = Location.of(meta_dir)
    return [Path(location.path(name)) for name in list_chunks(location)]
