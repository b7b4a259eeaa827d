"""Any Parquet file in the Hugging Face image or text layout, or a table whose metadata names a target, as a dataset.

| columns | dataset |
|---|---|
| ``image`` (struct with ``bytes``), ``label`` (whole numbers) | images, classification |
| ``text``, ``label`` (whole numbers) | hashed texts (of ``NAME@SIZE``: words), classification; sequences |
| numbers and texts, schema metadata ``target`` | standardized features, regression |

Schema metadata read where present: ``full_train_size`` (else the row count), ``num_classes`` and ``label_names`` (else
Hugging Face's own ``huggingface`` features, else the largest label plus one; at most a million). Where the metadata
names a ``target``, the file is a table whatever its columns are called.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cape.datasets import images, tabular, text
from cape.datasets.dataset import Dataset, check_labels, fingerprint_file
from cape.datasets.images import SIDE, Images
from cape.datasets.known import Known
from cape.errors import DataError, first_line

_GRAY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_READ_ERRORS = (OSError, pa.ArrowException, UnicodeError)  # the last one of a path that is not UTF-8


def load(path: Path, name: str | None = None, known: Known | None = None) -> Dataset:
    """Open a Parquet file as a dataset. Labels are read now, images and texts when a batch needs them.

    Args:
        path: the file.
        name: the dataset's name; the path where there is none.
        known: what a dataset of that name has to be.

    Raises:
        DataError: no such file, not Parquet, empty, without the columns or with two of one name, of another kind
            than ``known``, or with labels that are missing, not whole numbers, out of the declared range or too many.
    """
    if not path.is_file():
        raise DataError(f"There is no data file {path}; name another file, or set --data-root or CAPE_DATA.")
    try:
        file = pq.ParquetFile(path)
        schema, rows = file.schema_arrow, file.metadata.num_rows
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)}); fetch or write it again.") from error
    if rows == 0:
        raise DataError(f"{path} has no rows.")
    metadata = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (schema.metadata or {}).items()}
    twice = [column for column in schema.names if schema.names.count(column) > 1]
    if twice:
        raise DataError(f"{path} has several columns '{twice[0]}'; rename or remove all but one.")
    kind = _kind(schema, metadata, path)
    if known is not None and kind != known.kind:
        expected = {"image": "images", "text": "texts", "table": "a table with a target"}
        raise DataError(f"{path} holds {expected[kind]}, but '{name}' needs {expected[known.kind]}.")
    size = _full_train_size(metadata, known, rows, path)
    opened = _Opened(path, name or str(path), schema, metadata, size, known)
    return {"image": _image_dataset, "text": _text_dataset, "table": _table_dataset}[kind](opened)


@dataclass(frozen=True)
class _Opened:
    path: Path
    name: str
    schema: pa.Schema
    metadata: dict[str, str]
    full_train_size: int
    known: Known | None


def _image_dataset(opened: _Opened) -> Dataset:
    labels, class_names = _labels(opened)
    known = opened.known
    shape = _image_shape(opened.path)
    if known is not None and (shape[0] == 1) != known.gray:
        found, needed = ("gray", "colour") if shape[0] == 1 else ("colour", "gray")
        raise DataError(f"{opened.path} holds {found} images, but '{opened.name}' has {needed} ones.")
    source = ParquetImages(opened.path, labels, shape, known)
    return _dataset(opened, "classification", len(class_names), images.LAYOUTS, class_names, source, shape[0] == 1)


def _text_dataset(opened: _Opened) -> Dataset:
    labels, class_names = _labels(opened)
    column = _read(opened.path, ["text"]).column("text")
    if column.null_count:
        raise DataError(f"{column.null_count} rows of {opened.path} have no text.")
    lengths = pc.utf8_length(column).to_numpy().astype(np.int64)
    source = text.HashedText(partial(_read_texts, opened.path), labels, lengths, str(opened.path))
    return _dataset(opened, "classification", len(class_names), text.LAYOUTS, class_names, source)


def _table_dataset(opened: _Opened) -> Dataset:
    source = tabular.from_table(_read(opened.path), opened.metadata["target"], str(opened.path))
    return _dataset(opened, "regression", 1, tabular.LAYOUTS, (), source)


def _dataset(
    opened: _Opened,
    task: str,
    outputs: int,
    layouts: tuple[str, ...],
    class_names: tuple[str, ...],
    source: Any,
    gray: bool = False,
) -> Dataset:
    return Dataset(
        name=opened.name,
        task=task,
        outputs=outputs,
        full_train_size=opened.full_train_size,
        layouts=layouts,
        gray=gray,
        class_names=class_names,
        fingerprint=fingerprint_file(opened.path),
        source=source,
    )


class ParquetImages(Images):
    """Images of a Parquet file, decoded when first needed and then kept (uint8, in this process only)."""

    def __init__(self, path: Path, labels: np.ndarray, shape: tuple[int, int, int], known: Known | None) -> None:
        super().__init__(labels, shape, known.standard if known else None, known.reference if known else None)
        self.path = path
        self._named = known is not None
        self._forget()

    def _forget(self) -> None:
        self._encoded: pa.ChunkedArray | None = None
        self._decoded: np.ndarray | None = None
        self._ready: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": None, "_decoded": None, "_ready": None}

    def pixels(self, index: np.ndarray) -> np.ndarray:
        if self._decoded is None or self._ready is None:
            self._decoded = np.empty((len(self), *self.shape), dtype=np.uint8)  # pages are touched row by row
            self._ready = np.zeros(len(self), dtype=bool)
        for row in index[~self._ready[index]].tolist():
            self._decoded[row] = self._decode(row, self.shape)
            self._ready[row] = True
        if self._ready.all():
            self._encoded = None
        return self._decoded[index]

    def pixels_for(self, index: np.ndarray, side: int) -> np.ndarray:
        """Decode at that side, and keep nothing: large images would fill the memory.

        They are normalized by the statistics of those of :meth:`pixels`. Datasets with a name are 32x32 or smaller.
        """
        if self._named:
            return self.pixels(index)
        return np.stack([self._decode(row, (self.shape[0], side, side)) for row in index.tolist()])

    def _decode(self, row: int, shape: tuple[int, int, int]) -> np.ndarray:
        if self._encoded is None:
            self._encoded = _image_bytes(_read(self.path, ["image.bytes"]).column("image"))
        return decode(self._encoded[row].as_py(), shape, f"Row {row} of {self.path}")


def decode(data: bytes | None, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """Return an encoded image as uint8 [C, H, W], resized (bilinear) where it has another size.

    Raises:
        DataError: no bytes, bytes that are no image, or an image of more than 8 bits a channel.
    """
    channels, height, width = shape
    with _open_image(data, where) as image:
        try:
            converted = image.convert("L" if channels == 1 else "RGB")
            if converted.size != (width, height):
                from PIL import Image

                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
            array = np.asarray(converted, dtype=np.uint8)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise _undecodable(where, error) from error
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _open_image(data: bytes | None, where: str) -> Any:
    from PIL import Image

    if not data:
        raise DataError(f"{where} holds no image bytes (only files that carry their images inside can be read).")
    try:
        image = Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _undecodable(where, error) from error
    if image.mode in _DEEP_MODES:
        raise DataError(f"{where} holds an image of mode '{image.mode}'; convert it to 8 bits a channel.")
    return image


def _undecodable(where: str, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    # Pillow names the file, which is a place in memory here.
    why = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return DataError(f"{where} holds an image that cannot be decoded ({why}); remove or replace it.")


def _image_shape(path: Path) -> tuple[int, int, int]:
    """Tell the shape from 16 images all over the file: gray where all are, then native up to 32x32; colour is 32x32."""
    gray, size = True, (SIDE, SIDE)
    for row, data in _some_images(path, 16):
        with _open_image(data, f"Row {row} of {path}") as image:
            gray = gray and image.mode in _GRAY_MODES
            size = image.size if row == 0 else size
    if not gray:
        return (3, SIDE, SIDE)
    width, height = size if max(size) <= SIDE else (SIDE, SIDE)
    return (1, height, width)


def _some_images(path: Path, count: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield images all over the file, each with its row; row groups that hold none of them are not read."""
    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            rows = np.unique(np.linspace(0, starts[-1] - 1, count).astype(int))
            groups = np.searchsorted(starts, rows, "right") - 1
            for group in np.unique(groups).tolist():
                column = _image_bytes(file.read_row_group(group, columns=["image.bytes"]).column("image"))
                for row in rows[groups == group].tolist():
                    yield row, column[row - starts[group]].as_py()
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _image_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(column, "bytes")


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged ({first_line(error)}); fetch or write it again.")


def _read_texts(path: Path) -> list[str]:
    return _read(path, ["text"]).column("text").to_pylist()


def _kind(schema: pa.Schema, metadata: dict[str, str], path: Path) -> str:
    names = schema.names
    if "target" in metadata:
        return "table"
    for column, kind in (("image", "image"), ("text", "text")):
        if column not in names:
            continue
        if "label" not in names:
            raise DataError(f"{path} has no column 'label'; its columns are {', '.join(names)}.")
        if not _fits(schema.field(column).type, kind):
            needed = "structs with the field 'bytes'" if kind == "image" else "strings"
            raise DataError(f"The column '{column}' of {path} holds {schema.field(column).type}, not {needed}.")
        return kind
    raise DataError(
        f"{path} has neither a column 'image' nor 'text', and no schema metadata 'target'; its columns are"
        f" {', '.join(names)}."
    )


def _fits(kind: pa.DataType, expected: str) -> bool:
    if expected == "text":
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    field = kind.field("bytes").type
    return pa.types.is_binary(field) or pa.types.is_large_binary(field)


def _labels(opened: _Opened) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return checked labels, [n] int64, and one name for each class."""
    where = str(opened.path)
    kind = opened.schema.field("label").type
    if not pa.types.is_integer(kind):
        raise DataError(f"The labels of {where} are {kind}; they must be whole numbers.")
    column = _read(opened.path, ["label"]).column("label")
    if column.null_count:
        raise DataError(f"{column.null_count} rows of {where} have no label.")
    labels = column.to_numpy()
    class_names = _class_names(opened)
    if opened.known is not None:
        classes = opened.known.classes
    elif "num_classes" in opened.metadata:
        classes = _positive(opened.metadata["num_classes"], "num_classes", where)
    else:
        classes = len(class_names) or max(int(labels.max()) + 1, 1)
    check_labels(labels, classes, where)
    if len(class_names) != classes:
        class_names = tuple(str(i) for i in range(classes))
    return labels.astype(np.int64), class_names


def _class_names(opened: _Opened) -> tuple[str, ...]:
    def of_hugging_face(value: Any) -> Any:
        return value["info"]["features"]["label"].get("names", [])

    readers: dict[str, Callable[[Any], Any]] = {"label_names": lambda value: value, "huggingface": of_hugging_face}
    for key, read in readers.items():
        if key not in opened.metadata:
            continue
        try:
            found = read(json.loads(opened.metadata[key]))
            if not isinstance(found, list):  # the letters of a text are no names
                raise TypeError
            return tuple(str(name) for name in found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"The schema metadata '{key}' of {opened.path} does not list the label names.") from error
    return ()


def _full_train_size(metadata: dict[str, str], known: Known | None, rows: int, path: Path) -> int:
    if "full_train_size" in metadata:
        return _positive(metadata["full_train_size"], "full_train_size", str(path))
    return known.full_train_size if known else rows


def _positive(value: str, key: str, where: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise DataError(f"The schema metadata '{key}' of {where} must be a positive whole number, not '{value}'.")
    return number
