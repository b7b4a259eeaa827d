"""Datasets by name: where their files are, and the registry for a user's own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from cape.dataset_names import CHARACTERS, split_side
from cape.datasets import bundled
from cape.datasets.dataset import Dataset
from cape.datasets.known import KNOWN
from cape.datasets.sized import sized
from cape.errors import CapeError, DataError, SpecError, did_you_mean, first_line

Loader = Callable[[Path | None], Dataset]

_BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": bundled.digits, "diabetes": bundled.diabetes}
_USERS: dict[str, Loader] = {}
_LOADED: dict[tuple[str, str, int, int], Dataset] = {}


def names() -> tuple[str, ...]:
    """Return the names that :func:`load` knows, the user's own last."""
    own = [name for name in _USERS if name not in KNOWN and name not in _BUNDLED and name not in CHARACTERS]
    return (*KNOWN, *CHARACTERS, *_BUNDLED, *own)


def register(name: str, loader: Loader) -> None:
    """Add a dataset of one's own (or replace the one of that name).

    Args:
        name: for specs and the command line.
        loader: called with the data root (or ``None``), returns a ``Dataset``; see ``cape.datasets.from_arrays``.
            Its result is kept, so it runs once in a process. Worker processes must register it as well.

    Raises:
        SpecError: a name that would be read as a path, or a loader that cannot be called.
    """
    if not isinstance(name, str) or not name or name.endswith(".parquet") or "/" in name:
        raise SpecError(f"'{name}' cannot name a dataset: it is empty or would be read as a path.")
    if not callable(loader):
        raise SpecError(f"The loader of '{name}' must be callable, not {loader!r}.")
    _USERS[name] = loader
    for key in [key for key in _LOADED if key[0] == name]:
        del _LOADED[key]


def data_root(explicit: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of Parquet files: the argument, else ``CAPE_DATA``, else ``../shared/data`` beside the
    checkout where it exists, else ``None`` (then torchvision downloads).

    Raises:
        DataError: the argument or ``CAPE_DATA`` names a folder that does not exist.
    """
    named = explicit or os.environ.get("CAPE_DATA")
    if named:
        root = Path(named).expanduser()
        if not root.is_dir():
            origin = "given" if explicit else "named by CAPE_DATA"
            raise DataError(f"The data root {root} ({origin}) is not a folder; name one that holds Parquet files.")
        return root
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return beside if beside.is_dir() else None


def load(name: str | os.PathLike[str], data_root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return a dataset by name, or that of a Parquet file by its path; kept, so that a second call costs nothing.

    Args:
        name: one of :func:`names`, or a path that ends in ``.parquet``. ``NAME@SIZE`` is a dataset of images or
            texts at another size (``cape.datasets.sized``): ``mnist@28``, ``cifar10@224``, ``imdb@64``.
        data_root: see :func:`cape.datasets.data_root`; not used for a path or a bundled dataset.

    Raises:
        SpecError: an unknown name, or what is no name.
        DataError: a folder or file that is missing, or data that cannot be used.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise SpecError(f"A dataset is named by a name or a path that ends in .parquet, not by {name!r}.")
    name = os.fspath(name)
    base, side = split_side(name)
    if side is not None and name not in _USERS:
        return sized(load(base, data_root), side)
    if name.endswith(".parquet"):
        return _from_file(Path(name).expanduser(), name)
    if name in _USERS:
        root = _resolve(data_root)
        return _kept((name, str(root), 0, 0), lambda: _from_user(name, root))
    if name in _BUNDLED:
        return _kept((name, "", 0, 0), _BUNDLED[name])
    if name in CHARACTERS:
        sequence = load(CHARACTERS[name], data_root).with_task("sequence")
        return dataclasses.replace(sequence, name=name)
    if name not in KNOWN:
        raise SpecError(f"Unknown dataset '{name}'.{did_you_mean(name, names())} A path ends in .parquet.")
    root = _resolve(data_root)
    if root is not None:
        return _from_file(root / f"{name}.parquet", name)

    from cape.datasets import torchvision_source

    return _kept((name, "", 0, 0), lambda: torchvision_source.load(name, KNOWN[name]))


_resolve = data_root  # `load` has an argument of that name


def _from_file(path: Path, name: str) -> Dataset:
    from cape.datasets import parquet

    path = path.absolute()
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a character that no path can have
        return parquet.load(path, name, KNOWN.get(name))  # which says what is missing
    key = (name, str(path), status.st_mtime_ns, status.st_size)  # a file that was written again is read again
    return _kept(key, lambda: parquet.load(path, name, KNOWN.get(name)))


def _from_user(name: str, root: Path | None) -> Dataset:
    try:
        dataset = _USERS[name](root)
    except CapeError:
        raise
    except Exception as error:  # the user's own code: whatever it raises is the answer to show
        raise DataError(f"The loader of '{name}' failed: {type(error).__name__}: {first_line(error)}.") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"The loader of '{name}' returned {type(dataset).__name__}, not a cape.datasets.Dataset.")
    return dataset


def _kept(key: tuple[str, str, int, int], make: Callable[[], Dataset]) -> Dataset:
    if key not in _LOADED:
        _LOADED[key] = make()
    return _LOADED[key]
