"""A user's own Parquet files, and everything that can be wrong with one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cape import datasets
from cape.errors import DataError


def png(mode: str = "L", size: tuple[int, int] = (8, 8), value: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "I;16") else (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(images: list[bytes | None], labels: list[int | None]) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": data, "path": None} for data in images], kind)
    return pa.table({"image": column, "label": pa.array(labels, pa.int64())})


def write(folder: Path, table: pa.Table, name: str = "data.parquet") -> Path:
    pq.write_table(table, folder / name)
    return folder / name


def test_a_users_images(tmp_path: Path) -> None:
    images: list[bytes | None] = [png("RGB", (48, 40)), png("RGB", (20, 20)), png("L", (9, 9))]
    metadata = {"full_train_size": "900", "label_names": '["a", "b", "c"]'}
    table = pictures(images, [0, 2, 1]).replace_schema_metadata(metadata)
    data = datasets.load(write(tmp_path, table))
    assert (data.gray, data.outputs, data.full_train_size, data.class_names) == (False, 3, 900, ("a", "b", "c"))
    x, _ = data.batch(3, 0, "image", preprocess="reference")
    assert x.shape == (3, 3, 32, 32)
    assert torch.isfinite(data.batch(3, 0, "image")[0]).all()  # a constant channel is not divided by zero
    gray = datasets.load(write(tmp_path, pictures([png("L", (20, 10))] * 2, [0, 1]), "gray.parquet"))
    assert gray.gray and gray.sample_shape("rows") == (10, 20) and gray.full_train_size == 2
    large = datasets.load(write(tmp_path, pictures([png("L", (64, 64))] * 2, [0, 1]), "large.parquet"))
    assert large.sample_shape("rows") == (32, 32)
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"]}}}}
    hugging = pictures([png()] * 2, [0, 1]).replace_schema_metadata({"huggingface": json.dumps(names)})
    assert datasets.load(write(tmp_path, hugging, "hf.parquet")).class_names == ("cat", "dog", "eel")


def test_colour_is_seen_wherever_it_begins(tmp_path: Path) -> None:
    images: list[bytes | None] = [*[png("L")] * 40, *[png("RGB")] * 20]
    assert not datasets.load(write(tmp_path, pictures(images, [0] * 60))).gray


def test_the_shape_is_told_without_reading_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[bytes | None] = [*[png("L")] * 63, png("RGB")]
    pq.write_table(pictures(images, [0] * 64), tmp_path / "data.parquet", row_group_size=2)
    read, rows = {name: getattr(pq.ParquetFile, name) for name in ("read", "read_row_group")}, []

    def counted(name: str) -> Callable[..., pa.Table]:
        def call(*args: object, **options: object) -> pa.Table:
            table = read[name](*args, **options)
            rows.append(table.num_rows if "image" in table.column_names else 0)
            return table

        return call

    for name in read:
        monkeypatch.setattr(pq.ParquetFile, name, counted(name))
    data = datasets.load(tmp_path / "data.parquet")
    assert not data.gray and 16 <= sum(rows) <= 32


def test_a_named_target_makes_a_table_whatever_its_columns_are_called(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "image": [1.0, 2.0], "t": [1, 2]}).replace_schema_metadata(TARGET)
    data = datasets.load(write(tmp_path, table))
    assert data.task == "regression" and data.sample_shape("vector") == (3,)


def test_missing_values_take_the_median(tmp_path: Path) -> None:
    table = pa.table({"a": [1.0, None, 3.0, 10.0], "c": ["x", "y", None, "x"], "t": [1, 2, 3, 4]})
    data = datasets.load(write(tmp_path, table.replace_schema_metadata({"target": "t"})))
    x, _ = data.batch(4, 0, "vector")
    filled = np.array([1.0, 3.0, 3.0, 10.0])
    expected = (filled - filled.mean()) / filled.std()
    assert sorted(x[:, 0].tolist()) == pytest.approx(sorted(expected), abs=1e-6)
    assert x.shape == (4, 1 + 3) and data.full_train_size == 4


@pytest.mark.parametrize("scale", [1.0, 1e300, 1e-300])
def test_numbers_of_any_size_are_standardized_alike(tmp_path: Path, scale: float) -> None:
    table = pa.table({"a": [scale * v for v in (-1.5, 1.5, 1.0)], "t": [scale, -scale, 0.0]})
    x, y = datasets.load(write(tmp_path, table.replace_schema_metadata(TARGET))).batch(3, 0, "vector")
    expected = np.array([-1.5, 1.5, 1.0]) - 1 / 3
    assert sorted(x[:, 0].tolist()) == pytest.approx(sorted(expected / expected.std()), rel=1e-6)
    assert sorted(y.tolist()) == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], abs=1e-6)


@pytest.mark.parametrize("value", [0.1, -0.3, 7.0, 1e300])
def test_a_constant_column_becomes_zero(value: float, tmp_path: Path) -> None:
    for rows in (6, 37):
        table = pa.table({"a": [value] * rows, "b": range(rows), "t": [value] * rows})
        x, y = datasets.load(write(tmp_path, table.replace_schema_metadata(TARGET))).batch(rows, 0, "vector")
        assert not x[:, 0].any() and not y.any() and x[:, 1].std() > 0.9


def test_a_channel_that_is_constant_where_statistics_are_taken_is_not_divided_by_their_noise() -> None:
    pixels = np.full((2000, 1, 8, 8), 101, np.uint8)
    pixels[np.setdiff1d(np.arange(2000), np.linspace(0, 1999, 1000).astype(int))] = 201
    x, _ = datasets.from_arrays("two shades", pixels, np.zeros(2000, np.int64)).batch(2000, 0, "vector")
    assert x.abs().max() < 1


def _metadata(**items: str) -> Callable[[], pa.Table]:
    return lambda: pictures([png()] * 3, [0, 1, 2]).replace_schema_metadata(items)


TARGET = {"target": "t"}
WRONG: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "no rows": (lambda: pictures([], []), "has no rows"),
    "no label": (lambda: pa.table({"text": ["a"], "lable": [1]}), "no column 'label'; its columns are text, lable"),
    "nothing known": (lambda: pa.table({"a": [1]}), "neither a column 'image' nor 'text'"),
    "image is text": (lambda: pa.table({"image": ["a"], "label": [1]}), "'image' .* holds string, not structs"),
    "text is numbers": (lambda: pa.table({"text": [1], "label": [1]}), "'text' .* holds int64, not strings"),
    "path only": (lambda: pictures([None, png()], [0, 1]), "Row 0 .* holds no image bytes"),
    "not an image": (lambda: pictures([b"junk"], [0]), "Row 0 .* cannot be decoded \\(of no known format\\)"),
    "16 bits": (lambda: pictures([png("I;16")], [0]), "8 bits a channel"),
    "null label": (lambda: pictures([png()] * 2, [0, None]), "1 rows .* have no label"),
    "negative label": (lambda: pictures([png()] * 2, [0, -1]), "run from -1 to 0; number them from 0"),
    "label too large": (_metadata(num_classes="2"), "run from 0 to 2, but 2 classes"),
    "labels beyond int64": (
        lambda: pa.table({"text": ["a"], "label": pa.array([2**63], pa.uint64())}), "up to 9223372036854775808"
    ),
    "labels are ids": (lambda: pa.table({"text": ["a"], "label": [30_000_000]}), "30000001 classes .* more than"),
    "classes without end": (_metadata(num_classes="1000000000"), "1000000000 classes .* more than"),
    "float label": (lambda: pa.table({"text": ["a"], "label": [0.5]}), "labels .* are double"),
    "null text": (lambda: pa.table({"text": ["a", None], "label": [0, 1]}), "1 rows .* have no text"),
    "bad N": (_metadata(full_train_size="many"), "'full_train_size' .* positive whole number, not 'many'"),
    "bad classes": (_metadata(num_classes="0"), "'num_classes'"),
    "bad names": (_metadata(label_names="{"), "'label_names' .* does not list"),
    "names are a text": (_metadata(label_names='"abc"'), "'label_names' .* does not list"),
    "no target": (lambda: pa.table({"a": [1]}).replace_schema_metadata(TARGET), "no target column 't'"),
    "target alone": (lambda: pa.table({"t": [1]}).replace_schema_metadata(TARGET), "no column beside"),
    "null target": (
        lambda: pa.table({"a": [1, 2], "t": [1, None]}).replace_schema_metadata(TARGET), "must be a number in every row"
    ),
    "infinite": (
        lambda: pa.table({"a": [1.0, np.inf], "t": [1, 2]}).replace_schema_metadata(TARGET), "infinite value"
    ),
    "texts are ids": (
        lambda: pa.table({"a": [str(i) for i in range(1001)], "t": range(1001)}).replace_schema_metadata(TARGET),
        "'a' .* 1001 different texts, .* leave it out",
    ),
    "two of a name": (
        lambda: pa.Table.from_arrays([pa.array([1, 2])] * 3, ["a", "a", "t"]).replace_schema_metadata(TARGET),
        "several columns 'a'",
    ),
    "odd column": (
        lambda: pa.table({"a": [[1], [2]], "t": [1, 2]}).replace_schema_metadata(TARGET), "neither numbers nor text"
    ),
    "empty column": (
        lambda: pa.table({"a": pa.array([None, None], pa.float64()), "t": [1, 2]}).replace_schema_metadata(TARGET),
        "'a' .* is empty",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_with_one_sentence(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    path = write(tmp_path, make())
    with pytest.raises(DataError, match=message) as caught:
        datasets.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path, data_root: Path) -> None:
    content = (data_root / "svhn.parquet").read_bytes()
    for name, data in {"cut": content[:5000], "junk": b"junk" * 100, "empty": b""}.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            datasets.load(path)
    (tmp_path / "svhn.parquet").write_bytes(content[:2000] + bytes(4000) + content[6000:])
    with pytest.raises(DataError, match=r"svhn\.parquet .*(is damaged|cannot be decoded)"):
        datasets.load("svhn", tmp_path).batch(1000, 0, "image")


def test_an_undecodable_image_is_named_when_its_row_is_drawn(tmp_path: Path) -> None:
    whole = png()
    images: list[bytes | None] = [whole] * 40
    images[1], images[3] = whole[:40], None  # the shape is told from others
    data = datasets.load(write(tmp_path, pictures(images, [0] * 40)))
    with pytest.raises(DataError, match=r"Row (1|3) of "):
        data.batch(40, 0, "vector", preprocess="reference")


def test_a_file_of_another_kind_under_a_known_name(tmp_path: Path) -> None:
    write(tmp_path, pa.table({"text": ["a", "b"], "label": [0, 1]}), "mnist.parquet")
    with pytest.raises(DataError, match="holds texts, but 'mnist' needs images"):
        datasets.load("mnist", tmp_path)
    write(tmp_path, pictures([png()], [0]), "imdb.parquet")
    with pytest.raises(DataError, match="holds images, but 'imdb' needs texts"):
        datasets.load("imdb", tmp_path)
    write(tmp_path, pictures([png()], [0]), "cifar10.parquet")
    with pytest.raises(DataError, match="gray images, but 'cifar10' has colour"):
        datasets.load("cifar10", tmp_path)
    write(tmp_path, pictures([png("RGB")], [10]), "svhn.parquet")
    with pytest.raises(DataError, match="10 classes are declared"):
        datasets.load("svhn", tmp_path)
    short = write(tmp_path, pa.table({"text": ["a", "b"], "label": [0, 1]}), "short.parquet")
    with pytest.raises(DataError, match="longer than 64"):
        datasets.load(short).with_task("sequence")


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, pa.table({"text": ["a", "b"], "label": [0, 1]}))
    first = datasets.load(path)
    write(tmp_path, pa.table({"text": ["a", "b", "c"], "label": [0, 1, 2]}))
    second = datasets.load(path)
    assert (len(first), len(second)) == (2, 3) and first.fingerprint != second.fingerprint
