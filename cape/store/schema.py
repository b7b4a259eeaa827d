"""What a row holds, where a meta-dataset keeps it, and how its files are named.

A meta-dataset is a folder or an object-store prefix::

    META/_spec.json                                      the sweep that fills it (absent where rows were imported)
    META/_specs/<hash>.json                              every spec it had: the sweep may have been extended
    META/rows/family=mlp/dataset=mnist/<hash>.parquet    one chunk of trials each

``META/rows`` is what other people's readers are pointed at. ``family`` and ``dataset`` are in the path and not in the
files, as hive readers expect. In a folder ``rows`` is a symbolic link to ``_rows.<generation>``: a generation only ever
gains files, and `cape store compact` moves the link to a new one (see ``compact.py``).
"""

from __future__ import annotations

import re
from urllib.parse import quote

import pyarrow as pa

from cape.feature_names import FEATURE_NAMES, LATER_COLUMNS

SCHEMA_VERSION = 1
SPEC_FILE = "_spec.json"
SPEC_HISTORY = "_specs"
ROWS = "rows"
PARTITION_COLUMNS = ("family", "dataset")

# Files with this prefix hold columns beyond ROW_SCHEMA; a reader opens only these to learn what they are called.
EXTRA_PREFIX = "extra-"

# Of a chunk below ROWS; early versions wrote the key of a shard before the hash.
CHUNK_PATH = re.compile(r"family=[^/]+/dataset=[^/]+/(?:extra-)?(?:[0-9a-f]{8}-)?(?P<hash>[0-9a-f]{16})\.parquet")

ROW_SCHEMA = pa.schema(
    [
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("sweep_hash", pa.string()),
        pa.field("family", pa.string(), nullable=False),
        pa.field("architecture", pa.string()),
        pa.field("model", pa.string()),  # ModelSpec as JSON
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("task", pa.string()),
        pa.field("batch_size", pa.int32()),
        pa.field("lr", pa.float64()),
        pa.field("epsilon", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("replicate", pa.int32()),
        pa.field("precision", pa.string()),
        pa.field("preprocess", pa.string()),
        pa.field("augmentation", pa.string()),  # Augmentation as JSON; null for a plain trial
        *(pa.field(name, pa.float64()) for name in FEATURE_NAMES),
        *(pa.field(name, pa.float32()) for name in LATER_COLUMNS),  # null but for a model whose head starts at zero
        pa.field("log_epsilon", pa.float64()),
        pa.field("t_star", pa.int32()),  # updates until L_t <= epsilon * L_0; null where censored or failed
        pa.field("converged", pa.bool_()),
        pa.field("stop_reason", pa.string()),  # null where converged; plateau, cap, diverged, failed
        pa.field("stopped_at", pa.int32()),  # updates at which the trajectory ended
        pa.field("l0", pa.float64()),
        pa.field("final_loss", pa.float64()),
        pa.field("losses", pa.list_(pa.float32())),  # L_0..L_63, fewer where the trajectory was shorter
        pa.field("probe_seconds", pa.float64()),
        pa.field("truth_seconds", pa.float64()),
        pa.field("step_seconds", pa.float64()),  # one plain training step, warmed up, on `device`
        pa.field("device", pa.string()),
        pa.field("error", pa.string()),
    ],
    metadata={"cape_schema_version": str(SCHEMA_VERSION)},
)

PARTITION_SCHEMA = pa.schema([ROW_SCHEMA.field(name) for name in PARTITION_COLUMNS])


def partition(family: str, dataset: str) -> str:
    """Return the path of one (family, dataset) below ``ROWS``; a dataset that is a file path becomes one name."""
    return f"family={quote(family, safe='')}/dataset={quote(dataset, safe='')}"
