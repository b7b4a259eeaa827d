"""The authors' published meta-datasets as a table of rows, for tests that need real probe features and real T*."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest

from cape.store.importers import import_csv
from cape.store.reader import read

FAMILIES = ("mlp", "rnn")


def reference() -> Path:
    """The folder of the CSVs; tests that need it skip where there is none."""
    root = Path(os.environ.get("CAPE_REFERENCE") or Path(__file__).resolve().parents[2] / "shared" / "reference")
    if not (root / "authors_meta_dataset_mlp.csv").exists():
        pytest.skip("no published meta-datasets: set CAPE_REFERENCE to the folder of their CSVs")
    return root


@cache
def _imported(root: Path) -> pa.Table:
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            import_csv(root / f"authors_meta_dataset_{family}.csv", family, folder)
        return read(folder).sort_by("trial_id")


def rows(every: int = 1, families: tuple[str, ...] = FAMILIES) -> pa.Table:
    """Every ``every``-th row of the families, in the order of their trial ids, which are hashes."""
    import pyarrow.compute as pc

    table = _imported(reference())
    table = table.filter(pc.is_in(table["family"], pa.array(families)))
    return table.take(list(range(0, table.num_rows, every)))
