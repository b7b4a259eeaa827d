"""The meta-dataset: Parquet files in hive folders, written atomically, read while they grow."""

from cape.store.claims import claim
from cape.store.importers import import_csv
from cape.store.reader import count_rows, read, read_spec
from cape.store.schema import ROW_SCHEMA, SCHEMA_VERSION
from cape.store.writer import write_shard

__all__ = ["ROW_SCHEMA", "SCHEMA_VERSION", "claim", "count_rows", "import_csv", "read", "read_spec", "write_shard"]
