"""Images and texts at another size: ``NAME@SIZE``."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cape import datasets
from cape.config import Augmentation
from cape.dataset_names import source_of, split_side
from cape.datasets.known import known
from cape.errors import DataError, SpecError
from tests.datasets.test_parquet_files import pictures, write


def test_names() -> None:
    assert split_side("mnist@28") == ("mnist", 28) and split_side("a@b@7") == ("a@b", 7)
    for name in ("mnist", "mnist@", "@28", "mnist@x", "mnist@-1", "mnist@²", "mnist@" + "9" * 5000, "a@2/b.parquet"):
        assert split_side(name) == (name, None)
    assert [source_of(n) for n in ("mnist@28", "imdb@64", "imdb_chars@9", "own")] == ["mnist", "imdb", "imdb", "own"]
    gray = known("mnist@28")
    assert gray is not None and gray.gray and known("imdb_chars") == known("imdb") and known("other@28") is None


def test_images_as_they_are_stored(data_root: Path) -> None:
    x, y = datasets.load("mnist@28", data_root).batch(6, 3, "image")
    pixels, labels = datasets.load("mnist", data_root).batch(6, 3, "vector")
    assert x.shape == (6, 1, 28, 28) and torch.equal(x.flatten(1), pixels) and torch.equal(y, labels)


@pytest.mark.parametrize(("name", "side"), [("cifar10", 20), ("cifar10", 80), ("fashion_mnist", 61), ("digits", 1)])
def test_other_sizes_are_bilinear(name: str, side: int, data_root: Path) -> None:
    dataset = datasets.load(f"{name}@{side}", data_root)
    assert dataset.name == f"{name}@{side}" and dataset.layouts == ("image",)
    x, _ = dataset.batch(5, 0, "image")
    assert tuple(x.shape[1:]) == dataset.sample_shape("image") and x.is_contiguous()
    base = datasets.load(name, data_root)
    images = base.source.normalized(np.random.default_rng(0).choice(len(base), 5, replace=False), "image", "standard")
    expected = F.interpolate(torch.from_numpy(images), (side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_a_users_images_are_decoded_at_the_size_asked_for(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 120, 3), np.uint8)
    for mode, channels in (("RGB", 3), ("L", 1)):
        images = [Image.fromarray(a).convert(mode) for a in noise]
        encoded: list[bytes | None] = []
        for image in images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            encoded.append(buffer.getvalue())
        path = write(tmp_path, pictures(encoded, [0, 1]), f"{mode}.parquet")
        x, y = datasets.load(f"{path}@64").batch(2, 0, "image")
        for values, label in zip(x, y.tolist(), strict=True):
            pixels = np.asarray(images[label].resize((64, 64), Image.Resampling.BILINEAR)).reshape(64, 64, channels)
            wanted = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)).flatten(1)
            # Normalized by the statistics of the dataset: a straight line through all pixels of a channel.
            for pair in zip(values.flatten(1), wanted, strict=True):
                assert torch.corrcoef(torch.stack(pair))[0, 1] > 0.99999
        assert x.std() > 0.8 and datasets.load(path).sample_shape("image") == (3, 32, 32)


def test_it_is_a_dataset_like_any_other(data_root: Path, tmp_path: Path) -> None:
    dataset = datasets.load("fashion_mnist@40", data_root)
    assert len(dataset) == len(datasets.load("fashion_mnist", data_root)) and dataset.full_train_size == 60_000
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.batch(3, 1, "image")[0], dataset.batch(3, 1, "image")[0])
    changed = datasets.augmented(dataset, Augmentation(seed=1, classes=0.0, noise=0.5))
    assert changed.outputs == 2 and changed.batch(4, 0, "image")[0].shape == (4, 1, 40, 40)
    x, y = dataset.batch(4, 0, "image", task="multilabel")
    assert y.shape == (4, 10) and x.shape == (4, 1, 40, 40)
    file = data_root / "fashion_mnist.parquet"
    assert torch.equal(datasets.load(f"{file}@9").batch(2, 0, "image")[1], dataset.batch(2, 0, "image")[1])


def test_what_has_no_size_is_refused(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'california_housing' has neither images nor texts"):
        datasets.load("california_housing@32", data_root)
    for name in ("mnist", "imdb", "imdb_chars"):
        with pytest.raises(SpecError, match=f"'{name}@28@14' names two sizes"):
            datasets.load(f"{name}@28@14", data_root)
        for size in (0, 1025):
            with pytest.raises(SpecError, match="1 to 1,024 pixels"):
                datasets.load(f"{name}@{size}", data_root)
    with pytest.raises(DataError, match="No text of .* is longer than 5 words"):
        datasets.load(f"{texts(tmp_path, 'five words and no more', 'few')}@5").with_task("sequence")
    with pytest.raises(SpecError, match="comes as image, not as 'vector'"):
        datasets.load("mnist@28", data_root).batch(1, 0, "vector")
    with pytest.raises(DataError, match="no data file"):
        datasets.load("nowhere.parquet@28")


def texts(folder: Path, *lines: str) -> Path:
    table = pa.table({"text": list(lines), "label": pa.array(range(len(lines)), pa.int64())})
    return write(folder, table, "texts.parquet")


def test_the_first_words_of_a_text(tmp_path: Path) -> None:
    path = texts(tmp_path, "It's good, GOOD good it's!", "bad: a bad\nidea", "")
    dataset = datasets.load(f"{path}@4")
    assert (dataset.task, dataset.layouts, dataset.outputs) == ("classification", ("tokens",), 3)
    words = ("<padding>", "<other>", "good", "bad", "it's", "a", "idea")  # by how often, then by the alphabet
    assert dataset.source.vocabulary == words and dataset.vocabulary == 7
    x, y = dataset.batch(3, 0, "tokens")
    rows = x[y.argsort()]
    assert rows.dtype == torch.int64 and rows.tolist() == [[4, 2, 2, 2], [3, 5, 3, 6], [0, 0, 0, 0]]
    following = dataset.with_task("sequence")
    assert following.outputs == 7 and following.class_names == words and len(following) == 1
    x, y = following.batch(1, 0, "tokens")
    assert (x.tolist(), y.tolist()) == ([[4, 2, 2, 2]], [[2, 2, 2, 4]])


def test_rare_words_are_one_token(data_root: Path) -> None:
    dataset = datasets.load("imdb@64", data_root)
    assert dataset.vocabulary == len(set(dataset.source.vocabulary)) == 10_000
    again = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 200_000
    (x, y), (same, labels) = dataset.batch(32, 1, "tokens"), again.batch(32, 1, "tokens")
    assert torch.equal(x, same) and torch.equal(y, labels) and x.shape == (32, 64)
    assert 0.01 < float((x == 1).float().mean()) < 0.2 and int(x.max()) < 10_000
    assert torch.equal(y, datasets.load("imdb", data_root).batch(32, 1, "vector")[1])
    for layout in ("vector", "rows", "image"):
        with pytest.raises(SpecError, match="comes as tokens"):
            dataset.batch(1, 0, layout)


@pytest.mark.parametrize(("name", "task"), [("imdb_chars@100", None), ("imdb@20", "sequence")])
def test_the_next_token_is_the_target(name: str, task: str | None, data_root: Path) -> None:
    dataset = datasets.load(name, data_root)
    dataset = dataset.with_task(task) if task else dataset
    x, y = dataset.batch(16, 2, "tokens")
    assert x.shape == y.shape == (16, int(name.split("@")[1])) and torch.equal(x[:, 1:], y[:, :-1])
    assert int(torch.maximum(x.max(), y.max())) < dataset.outputs == dataset.vocabulary
    assert dataset.full_train_size == 25_000 and not torch.equal(x, dataset.batch(16, 3, "tokens")[0])
