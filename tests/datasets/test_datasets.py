"""Datasets on the real Parquet samples, the bundled sets, torchvision, and a registry of one's own."""

from __future__ import annotations

import io
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cape import datasets
from cape.datasets import torchvision_source
from cape.datasets.known import KNOWN
from cape.datasets.text import VOCABULARY
from cape.errors import DataError, SpecError

FACTS = {  # name: (outputs, N, rows, gray, vector size, rows' shape)
    "mnist": (10, 60_000, 6_000, True, 784, (28, 28)),
    "fashion_mnist": (10, 60_000, 6_000, True, 784, (28, 28)),
    "cifar10": (10, 50_000, 6_000, False, 3072, (32, 96)),
    "cifar100": (100, 50_000, 10_000, False, 3072, (32, 96)),
    "svhn": (10, 73_257, 1_083, False, 3072, (32, 96)),
    "imdb": (2, 25_000, 4_000, False, 3072, (32, 96)),
}


@pytest.mark.parametrize("name", FACTS)
def test_classification_sets(name: str, data_root: Path) -> None:
    outputs, size, rows, gray, vector, row = FACTS[name]
    data = datasets.load(name, data_root)
    assert (data.outputs, data.full_train_size, len(data), data.gray) == (outputs, size, rows, gray)
    assert data.layouts == ("vector", "rows", "image") and data.task == "classification"
    assert len(data.class_names) == outputs and len(data.fingerprint) == 16
    for layout, shape in {"vector": (vector,), "rows": row, "image": (3, 32, 32)}.items():
        assert data.sample_shape(layout) == shape
        x, y = data.batch(16, 3, layout)
        assert x.shape == (16, *shape) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.shape == (16,) and y.dtype == torch.int64
        again, labels = data.batch(16, 3, layout)
        assert torch.equal(x, again) and torch.equal(y, labels)
        x += 1.0  # a batch is the caller's own: writing to it must not reach the cache
        assert torch.equal(data.batch(16, 3, layout)[0], again)
    assert not torch.equal(data.batch(16, 4, "vector")[0], data.batch(16, 3, "vector")[0])
    # Every layout holds the same samples, and the layout does not change the draw.
    assert torch.equal(data.batch(16, 3, "vector")[1], data.batch(16, 3, "image")[1])


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_pixels_are_those_of_the_file(name: str, data_root: Path) -> None:
    data = datasets.load(name, data_root)
    table = pq.read_table(data_root / f"{name}.parquet")
    index = np.random.default_rng(7).choice(len(data), 5, replace=False)
    raw = np.stack([np.asarray(Image.open(io.BytesIO(table["image"][int(i)]["bytes"].as_py()))) for i in index])
    raw = raw[:, None] if raw.ndim == 3 else raw.transpose(0, 3, 1, 2)
    known = KNOWN[name].standard
    assert known is not None
    mean, std = (np.array(v).reshape(1, -1, 1, 1) for v in (known.mean, known.std))
    expected = torch.from_numpy((raw / 255 - mean) / std).float()

    x, y = data.batch(5, 7, "vector")
    torch.testing.assert_close(x, expected.flatten(1), atol=1e-5, rtol=1e-5)
    assert y.tolist() == [table["label"][int(i)].as_py() for i in index]
    rows = data.batch(5, 7, "rows")[0]
    width = raw.shape[-1]
    for channel in range(raw.shape[1]):
        torch.testing.assert_close(
            rows[:, :, channel * width : (channel + 1) * width], expected[:, channel], atol=1e-5, rtol=1e-5
        )
    image = data.batch(5, 7, "image")[0]
    resized = F.interpolate(expected, (32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    torch.testing.assert_close(image, resized, atol=1e-5, rtol=1e-5)


def test_preprocessing(data_root: Path) -> None:
    data = datasets.load("cifar10", data_root)
    raw = data.batch(64, 0, "image", preprocess="reference")[0]
    assert float(raw.min()) >= 0.0 and float(raw.max()) <= 1.0  # what a CNN gets in the authors' code
    standard, reference = (data.batch(64, 0, "image", preprocess=p)[0] for p in ("standard", "reference_normalized"))
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
    std = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)
    authors = torch.tensor([0.2023, 0.1994, 0.2010]).view(1, 3, 1, 1)
    torch.testing.assert_close(standard, (raw - mean) / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference, (raw - mean) / authors, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(data.batch(64, 0, "vector", preprocess="reference")[0], reference.flatten(1))
    for name in ("mnist", "svhn"):  # published statistics make pixels roughly standard
        x = datasets.load(name, data_root).batch(500, 0, "vector")[0]
        assert abs(float(x.mean())) < 0.15 and 0.85 < float(x.std()) < 1.15
    with pytest.raises(SpecError, match="Did you mean 'standard'"):
        data.batch(2, 0, "image", preprocess="standart")


def test_draws_are_without_replacement_and_cover_the_set() -> None:
    data = datasets.load("diabetes")
    x, _ = data.batch(len(data), 0, "vector")
    assert len(torch.unique(x, dim=0)) == len(data)
    with pytest.raises(DataError, match="443 cannot be drawn without replacement from the 442 rows"):
        data.batch(443, 0, "vector")
    with pytest.raises(SpecError, match="at least 1 sample"):
        data.batch(0, 0, "vector")
    with pytest.raises(SpecError, match="seed"):
        data.batch(1, -1, "vector")
    with pytest.raises(SpecError, match="comes as vector, rows, not as 'image'"):
        data.batch(1, 0, "image")
    with pytest.raises(SpecError, match="comes as"):
        data.sample_shape("tokens")
    with pytest.raises(SpecError, match="serves the tasks regression, not 'multilabel'"):
        data.with_task("multilabel")


def test_only_the_rows_of_a_batch_are_decoded(data_root: Path, tmp_path: Path) -> None:
    path = shutil.copy(data_root / "svhn.parquet", tmp_path / "mine.parquet")
    data = datasets.load(path)
    assert data.name == str(path) and data.full_train_size == 73_257 and data.outputs == 10
    source: Any = data.source
    data.batch(8, 0, "image", preprocess="reference")
    assert int(source._ready.sum()) == 8
    copy = pickle.loads(pickle.dumps(data))
    assert copy == data and copy.source._decoded is None
    assert torch.equal(copy.batch(8, 1, "image")[0], data.batch(8, 1, "image")[0])
    assert len(pickle.dumps(data)) < 20_000  # labels, not pixels
    assert datasets.load(path) is data


def test_imdb_is_hashed(data_root: Path) -> None:
    from sklearn.feature_extraction.text import HashingVectorizer

    data = datasets.load("imdb", data_root)
    texts = pq.read_table(data_root / "imdb.parquet")["text"]
    index = np.random.default_rng(5).choice(len(data), 4, replace=False)
    expected = HashingVectorizer(n_features=3072).transform([texts[int(i)].as_py() for i in index]).toarray()
    x = data.batch(4, 5, "vector")[0]
    torch.testing.assert_close(x, torch.from_numpy(expected).float())
    assert torch.equal(data.batch(4, 5, "rows")[0].flatten(1), x)
    assert torch.equal(data.batch(4, 5, "image")[0].flatten(1), x)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.batch(4, 5, "vector")[0], x) and len(pickle.dumps(data)) < 100_000


def test_characters(data_root: Path) -> None:
    data = datasets.load("imdb_chars", data_root)
    assert (data.task, data.layouts, data.outputs) == ("sequence", ("tokens",), 97)
    assert len(VOCABULARY) == 97
    assert data.full_train_size == 25_000 and data.sample_shape("tokens") == (64,)
    x, y = data.batch(32, 9, "tokens")
    assert x.shape == y.shape == (32, 64) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert int(x.min()) >= 0 and int(x.max()) < 97 and float((x == 0).float().mean()) < 0.01
    texts = set(pq.read_table(data_root / "imdb.parquet")["text"].to_pylist())
    window = "".join(VOCABULARY[t] for t in x[0].tolist())
    assert any(window in text for text in texts)
    assert all(torch.equal(a, b) for a, b in zip((x, y), data.batch(32, 9, "tokens")))
    same = datasets.load("imdb", data_root).batch(32, 9, "tokens", task="sequence")
    assert torch.equal(same[0], x)
    assert torch.equal(pickle.loads(pickle.dumps(data)).batch(32, 9, "tokens")[0], x)


def test_california_housing(data_root: Path) -> None:
    data = datasets.load("california_housing", data_root)
    assert (data.task, data.outputs, data.layouts, data.class_names) == ("regression", 1, ("vector", "rows"), ())
    assert data.full_train_size == len(data) == 20_640 and data.sample_shape("rows") == (13, 1)
    x, y = data.batch(20_640, 0, "vector")
    assert x.shape == (20_640, 13) and y.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert float(x[:, :8].mean(0).abs().max()) < 1e-4 and float((x[:, :8].std(0) - 1).abs().max()) < 1e-3
    assert torch.equal(x[:, 8:].sum(1), torch.ones(20_640)) and set(x[:, 8:].unique().tolist()) == {0.0, 1.0}
    assert abs(float(y.mean())) < 1e-4 and abs(float(y.std()) - 1) < 1e-3
    assert datasets.load(data_root / "california_housing.parquet").batch(3, 0, "rows")[0].shape == (3, 13, 1)


def test_multilabel_is_one_hot(data_root: Path) -> None:
    data = datasets.load("mnist", data_root)
    many = data.with_task("multilabel")
    assert (many.task, many.outputs, many.with_task("multilabel")) == ("multilabel", 10, many)
    _, labels = data.batch(16, 0, "vector")
    _, targets = many.batch(16, 0, "vector")
    assert targets.dtype == torch.float32 and torch.equal(targets, F.one_hot(labels, 10).float())
    assert torch.equal(data.batch(16, 0, "vector", task="multilabel")[1], targets)
    with pytest.raises(SpecError, match="not 'sequence'"):
        data.with_task("sequence")


def test_bundled_sets_need_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPE_DATA", "/nonexistent")
    digits = datasets.load("digits")
    assert (digits.outputs, digits.full_train_size, digits.gray) == (10, 1797, True)
    assert [digits.sample_shape(layout) for layout in digits.layouts] == [(64,), (8, 8), (3, 32, 32)]
    x = digits.batch(1797, 0, "vector")[0]
    assert float(x.mean()) == pytest.approx(0, abs=1e-3) and float(x.std()) == pytest.approx(1, abs=2e-2)
    image = digits.batch(4, 0, "image")[0]
    small = digits.batch(4, 0, "rows")[0][:, None]
    expected = F.interpolate(small, (32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    diabetes = datasets.load("diabetes")
    assert (diabetes.task, len(diabetes), diabetes.sample_shape("rows")) == ("regression", 442, (10, 1))


def test_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_root: Path) -> None:
    monkeypatch.setenv("CAPE_DATA", str(tmp_path))
    assert datasets.data_root() == tmp_path
    assert datasets.data_root(data_root) == data_root
    with pytest.raises(DataError, match=r"no data file .*mnist\.parquet"):
        datasets.load("mnist")
    monkeypatch.setenv("CAPE_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone .named by CAPE_DATA. is not a folder"):
        datasets.load("mnist")
    with pytest.raises(DataError, match="missing .given. is not a folder"):
        datasets.load("imdb_chars", tmp_path / "missing")
    with pytest.raises(SpecError, match="Did you mean 'fashion_mnist'"):
        datasets.load("fasion_mnist", data_root)
    with pytest.raises(DataError, match="no data file"):
        datasets.load(tmp_path / "none.parquet")


# One's own, and torchvision


def test_a_dataset_of_ones_own() -> None:
    from cape.datasets import registry

    calls: list[Path | None] = []
    rng = np.random.default_rng(0)

    def loader(root: Path | None) -> datasets.Dataset:
        calls.append(root)
        return datasets.from_arrays("mine", rng.normal(size=(50, 6)), rng.integers(0, 3, 50), full_train_size=500)

    try:
        datasets.register("mine_test", loader)
        data = datasets.load("mine_test")
        assert datasets.load("mine_test") is data and len(calls) == 1 and "mine_test" in datasets.names()
        assert (data.outputs, data.full_train_size, data.sample_shape("rows")) == (3, 500, (6, 1))
        datasets.register("mine_test", lambda root: "nothing")  # type: ignore[arg-type, return-value]
        with pytest.raises(DataError, match="returned str"):
            datasets.load("mine_test")
        datasets.register("mine_test", lambda root: {}["train"])
        with pytest.raises(DataError, match="loader of 'mine_test' failed: KeyError: 'train'"):
            datasets.load("mine_test")
    finally:
        registry._USERS.pop("mine_test")
    for name in ("", "a.parquet", "a/b"):
        with pytest.raises(SpecError, match="cannot name a dataset"):
            datasets.register(name, loader)
    with pytest.raises(SpecError, match="must be callable"):
        datasets.register("x", 3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"path that ends in \.parquet, not by None"):
        datasets.load(None)  # type: ignore[arg-type]


def test_a_source_that_fails_is_named() -> None:
    class Source:
        def __len__(self) -> int:
            return 4

        def fetch(self, *_: Any) -> Any:
            raise IndexError("row 7")

    data = datasets.Dataset("own", "classification", 2, 4, ("vector",), False, ("a", "b"), "0" * 16, Source())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'own' gave no batch: IndexError: row 7"):
        data.batch(2, 0, "vector")


def test_from_arrays() -> None:
    gray = datasets.from_arrays("g", np.full((4, 16, 16), 7, np.uint8), [0, 1, 0, 1])
    assert gray.gray and gray.batch(4, 0, "image")[0].shape == (4, 3, 32, 32)
    many = [[1, 0], [0, 1], [1, 1], [0, 0]]
    colour = datasets.from_arrays("c", np.zeros((4, 3, 32, 32), np.uint8), many, task="multilabel")
    assert not colour.gray and colour.outputs == 2 and colour.batch(4, 0, "image")[1].shape == (4, 2)
    line = datasets.from_arrays("l", np.zeros((4, 5, 2), np.float32), [0.5, 1, 2, 3], task="regression")
    assert line.sample_shape("rows") == (5, 2) and line.batch(2, 0, "vector")[0].shape == (2, 10)
    named = datasets.from_arrays("n", np.zeros((2, 3)), [0, 1], class_names=["a", "b"])
    assert named.class_names == ("a", "b")
    x = np.zeros((3, 2))
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x, [0, 1]), {}, "3 inputs and 2 targets"),
        ((x[:0], []), {}, "0 inputs"),
        ((x * np.nan, [0, 1, 2]), {}, "NaN"),
        ((x, [0, 1, 5]), {"outputs": 3}, "run from 0 to 5"),
        ((x, [0.5, 1, 2]), {}, "whole numbers"),
        ((x, [0.5, np.nan, 2]), {"task": "regression"}, "NaN"),
        ((x, [[0.5], [1], [0]]), {"task": "multilabel"}, "zeros and ones"),
        ((x.astype(int), [0, 1, 2]), {}, "give images"),
        ((np.zeros((3, 2, 8, 8), np.uint8), [0, 1, 2]), {}, "1 or 3 channels"),
        ((x, [0, 1, 2]), {"class_names": ["a"]}, "1 class names"),
        ((x + 1e300, [0, 1, 2]), {}, "infinite in float32"),
        ((x, [0, 1e300, 2]), {"task": "regression"}, "infinite in float32"),
        ((x, ["a", "b", "c"]), {"task": "regression"}, "must be numbers"),
        ((x[:, :0], [0, 1, 2]), {}, "empty"),
        (([[1.0], [1.0, 2.0]], [0, 1]), {}, "no arrays"),
        ((3, 4), {}, "no inputs and no targets"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(DataError, match=message):
            datasets.from_arrays("w", *arguments, **options)
    for count in ("outputs", "full_train_size"):
        for value in (0, -1, 2.5):
            with pytest.raises(SpecError, match=count):
                datasets.from_arrays("w", x, [0, 0, 0], **{count: value})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="cannot have the task"):
        datasets.from_arrays("w", x, [0, 1, 2], task="sequence")


def _idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def test_torchvision_reads_what_lies_in_its_cache(tmp_path: Path, data_root: Path) -> None:
    """Real MNIST digits in torchvision's own files, so that nothing is downloaded."""
    table = pq.read_table(data_root / "mnist.parquet").slice(0, 40)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(v["bytes"]))) for v in table["image"].to_pylist()])
    labels = np.array(table["label"].to_pylist())
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(pixels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))
    data = torchvision_source.load("mnist", KNOWN["mnist"], tmp_path)
    assert data.gray and len(data) == data.full_train_size == 40 and data.outputs == 10
    x, y = data.batch(40, 0, "vector")
    index = np.random.default_rng(0).choice(40, 40, replace=False)
    assert y.tolist() == labels[index].tolist()
    expected = (pixels[index].reshape(40, -1) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(x, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 5_000 and torch.equal(copy.batch(40, 0, "vector")[0], x)


def test_one_process_downloads_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: a lock belongs to whoever has opened the file."""
    import torchvision

    entered, overlaps, downloads = threading.Lock(), [], []

    def make(root: str, **_: Any) -> SimpleNamespace:
        overlaps.append(not entered.acquire(blocking=False))
        if not (Path(root) / "whole").exists():
            downloads.append(root)
            time.sleep(0.2)
            (Path(root) / "whole").touch()
        entered.release()
        return SimpleNamespace(data=np.zeros((20, 32, 32, 3), np.uint8), targets=[*range(10)] * 2)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", make)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torchvision_source.load("cifar10", KNOWN["cifar10"], tmp_path), range(4)))
    assert [len(data) for data in found] == [20] * 4
    assert len(downloads) == 1 and not any(overlaps)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # a lock that cannot be opened, as in a cache that is only read
    assert len(torchvision_source.load("cifar10", KNOWN["cifar10"], tmp_path)) == 20


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fail(**_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host.*cifar10\.parquet"):
        torchvision_source.load("cifar10", KNOWN["cifar10"], tmp_path)
    with pytest.raises(DataError, match="torchvision offers no 'imdb'"):
        torchvision_source.load("imdb", KNOWN["imdb"], tmp_path)
