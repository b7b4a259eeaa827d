"""The fitted meta-regressor as an object and as a directory: XGBoost UBJ and JSON (gzip), and nothing pickled.

``card.json`` is for people: preset, features, data fingerprint, out-of-fold metrics, ranges, versions.
``calibration.json.gz`` holds the lines under the trees, the conformal scores and the domain statistics. Boosters are
``model.ubj.gz`` (pooled), ``model-FAMILY.ubj.gz`` and ``reach.ubj.gz`` (a sixth of their size), surfaces
``surface-FAMILY.npz``; the card lists each file with its digest. Eight digits of it are in the file's name
(``model.1a2b3c4d.ubj.gz``), so that a model that is saved over another one replaces nothing but the card, at once.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.config import check_count
from cape.errors import SpecError, StoreError, first_line
from cape.family_names import HEAD_AT_ZERO
from cape.metamodel.domain import Domain
from cape.metamodel.intervals import Conformal, bounds
from cape.metamodel.line import POOLED, Line, margins
from cape.metamodel.presets import Preset
from cape.metamodel.reach import Reach
from cape.metamodel.regressors import in_steps, load_booster, predict_log, xgboost
from cape.metamodel.rows import NUMERIC, as_rows
from cape.metamodel.surface import Surface, smooth, spreads, widths
from cape.paths import local_path

if TYPE_CHECKING:
    import xgboost as xgb

# Before: 1 no lines, 2 no surfaces, 3 and 4 surfaces of another kernel, 5 no share of its own far away, 6 no slopes,
# 7 boosters that are not compressed, 8 names without digests, 9 one look at a head at zero.
FORMAT = 10
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class MetaModel:
    """A meta-regressor: predicts T* of rows, with intervals, p_reach and a domain check.

    Attributes:
        preset: what it was fitted with (after selection).
        families: families whose codes the boosters know.
        boosters: by family, and ``"pooled"``. lines: the lines whose residuals they fit, likewise; empty without.
        surfaces: what is averaged with the boosters, by family; empty without.
        conformal: interval calibration, empty where fitted without.
        domain: domain statistics, None where fitted without calibration.
        reach: p_reach, None where fitted without calibration.
        card: facts for people and programs, JSON values.
    """

    preset: Preset
    families: tuple[str, ...]
    boosters: Mapping[str, xgb.Booster]
    lines: Mapping[str, Line]
    surfaces: Mapping[str, Surface]
    conformal: Conformal
    domain: Domain | None
    reach: Reach | None
    card: Mapping[str, Any]

    def predict_log(self, rows: Any) -> np.ndarray:
        """Return log T*, float64 [n], of a table or ``Rows``."""
        return predict_log(self.boosters, self.lines, self.surfaces, as_rows(rows), self.preset, self.families)

    def predict(self, rows: Any) -> np.ndarray:
        """Return T* in steps, float64 [n], at least 1; whole numbers where the preset says so."""
        return in_steps(self.predict_log(rows), self.preset.whole)

    def width(self, rows: Any) -> np.ndarray:
        """Return by how much an interval is wider than usual, [n]: 1 among the trials fitted on where T* is long."""
        rows = as_rows(rows)
        log_steps = smooth(margins(self.lines, rows), self.surfaces, rows)
        return widths(self.surfaces, rows, log_steps, spreads(self.surfaces, rows))

    def interval(self, rows: Any, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return (low, high) in steps, each [n]; infinite where calibration trials are too few for the level."""
        rows = as_rows(rows)
        log_hat = self.predict_log(rows)
        around = [in_steps(log_hat, whole) for whole in (False, self.preset.whole)]
        pairs = [
            bounds(centre, steps, width * self.conformal.half_width(family, level)[0])
            for centre, steps, width, family in zip(*around, self.width(rows), rows["family"], strict=True)
        ]
        low, high = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(low), np.array(high)

    def p_reach(self, rows: Any) -> np.ndarray:
        """Return the probability of crossing ε at all, [n]; NaN where the model was fitted without it."""
        rows = as_rows(rows)
        if self.reach is None:
            return np.full(len(rows), np.nan)
        return self.reach.probability(rows, self.preset.features, self.families)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the model directory and return it; a model that is there already is whole until its card is replaced.

        Raises:
            SpecError: a URI. StoreError: the directory holds something that is not a meta-regressor.
        """
        out = check_out(directory)
        files = {_file(name): bytes(b.save_raw("ubj")) for name, b in self.boosters.items()}
        files |= {_surface_file(name): _npz(surface.to_arrays()) for name, surface in self.surfaces.items()}
        if self.reach is not None and self.reach.booster is not None:
            files["reach.ubj"] = bytes(self.reach.booster.save_raw("ubj"))
        calibration = {
            "lines": {name: line.to_dict() for name, line in self.lines.items()},
            "conformal": self.conformal.to_dict(),
            "domain": self.domain.to_dict() if self.domain else None,
            "reach": self.reach.to_dict() if self.reach else None,
        }
        files["calibration.json"] = json.dumps(calibration, allow_nan=False).encode()
        files = dict(_packed(name, data) for name, data in files.items())
        digests = {name: _digest(data) for name, data in sorted(files.items())}
        listed = {_marked(name, digest): digest for name, digest in digests.items()}
        card = {
            **self.card,
            "format": FORMAT,
            "preset": self.preset.to_dict(),
            "families": list(self.families),
            "boosters": sorted(self.boosters),
            "surfaces": sorted(self.surfaces),
            "files": listed,
        }
        text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False).encode()
        out.mkdir(parents=True, exist_ok=True)
        before = _listed(out)
        for name, data in files.items():
            _write(out / _marked(name, digests[name]), data)
        _write(out / "card.json", text)
        _remove_stale(out, before, {*listed, "card.json"})
        return out

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> MetaModel:
        """Read a model directory.

        Raises:
            SpecError: what is no path, or a URI. StoreError: no card, a missing or altered file, a newer format, or
                what must be fitted again: surfaces of formats 3 to 6, heads at zero of 7 to 9.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise SpecError(f"A meta-regressor is a MetaModel or the path of its directory, not {directory!r}.")
        path = local_path(directory, "A meta-regressor")
        text = _card_in(path)
        while True:
            try:
                return cls._loaded(path, text)
            except StoreError:
                before, text = text, _card_in(path)
                if text == before:  # else another model was saved meanwhile, and the files of this one are gone
                    raise

    @classmethod
    def _loaded(cls, path: Path, text: bytes) -> MetaModel:
        """Return the model that a card describes."""
        try:
            card = json.loads(text.decode())
            _check_card(card)
            if card["format"] > FORMAT:
                raise StoreError(f"The meta-regressor in {path} has format {card['format']}; upgrade CAPE to read it.")
            if 3 <= card["format"] <= 6 and card.get("surfaces"):
                raise StoreError(f"The surfaces in {path} are of an older version; run `cape fit` again.")
            if card["format"] <= 9 and any(family.endswith(HEAD_AT_ZERO) for family in card["families"]):
                raise StoreError(
                    f"The meta-regressor in {path} knows one look at models whose head starts at zero, and two are made"
                    " now; run `cape fit` again."
                )
            listed = card["files"].items()
            files = dict(_unpacked(_unmarked(name, digest), _read(path / name, digest)) for name, digest in listed)
            needed = {*map(_file, [*card["boosters"], POOLED]), *map(_surface_file, card.get("surfaces", []))}
            if files.keys() - {"reach.ubj"} != {"calibration.json", *needed}:
                raise ValueError("the card lists other files than its boosters and surfaces")
            preset, calibration = Preset.from_dict(card["preset"]), json.loads(files["calibration.json"])
            unknown = [f for f in preset.features if f not in (*NUMERIC, "family")]
            if unknown:
                raise StoreError(
                    f"The meta-regressor in {path} was fitted on the feature '{unknown[0]}', which this version of CAPE"
                    " does not compute; use the version that wrote it, or run `cape fit` again."
                )
            boosters = _Boosters({name: files[_file(name)] for name in [*card["boosters"], POOLED]}, path)
            lines = {name: Line.from_dict(line) for name, line in calibration.get("lines", {}).items()}
            surfaces = {n: _surface(files[_surface_file(n)]) for n in card.get("surfaces", [])}
            conformal = Conformal.from_dict(calibration["conformal"])
            domain = Domain.from_dict(calibration["domain"]) if calibration["domain"] else None
            reach = None
            if calibration["reach"]:
                raw = files.get("reach.ubj")
                reach = Reach(calibration["reach"]["rates"], _booster(raw) if raw else None)
            families = tuple(card["families"])
        except StoreError:
            raise
        except Exception as error:  # whatever an altered file can lead to
            raise StoreError(f"The meta-regressor in {path} is damaged ({error}); run `cape fit` again.") from error
        return cls(preset, families, boosters, lines, surfaces, conformal, domain, reach, card)


class _Boosters(Mapping[str, "xgb.Booster"]):
    """Boosters that are read when they are first asked for: importing XGBoost takes longer than a prediction."""

    def __init__(self, files: Mapping[str, bytes], path: Path) -> None:
        self._files, self._path = files, path
        self._read: dict[str, xgb.Booster] = {}

    def __getitem__(self, name: str) -> xgb.Booster:
        if name not in self._read:
            try:
                self._read[name] = _booster(self._files[name])
            except ValueError as error:
                raise StoreError(f"The meta-regressor in {self._path} is damaged ({error}); fit it again.") from error
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def check_out(directory: str | os.PathLike[str]) -> Path:
    """Return the directory as a path, or raise ``StoreError`` where it holds anything but a meta-regressor.

    What a fit left that was killed while it saved is no reason to refuse.
    """
    out = local_path(directory, "A meta-regressor")
    whole = out.is_dir() and (out / "card.json").is_file()
    if out.exists() and not whole and not (out.is_dir() and all(_OWN.fullmatch(f.name) for f in out.iterdir())):
        raise StoreError(f"{out} exists and holds no meta-regressor; name an empty or new directory to write one.")
    return out


def default_model() -> MetaModel:
    """Return the meta-regressor that ships with CAPE, or raise ``StoreError`` where this build has none."""
    if not (WEIGHTS / "card.json").is_file():
        raise StoreError(
            "This build of CAPE ships no meta-regressor; run `cape sweep` and `cape fit` to make one and pass its"
            " directory as meta_model (--meta-model on the command line)."
        )
    return MetaModel.load(WEIGHTS)


def resolve(meta_model: MetaModel | str | os.PathLike[str] | None) -> MetaModel:
    """Return a meta-regressor from itself, from its directory, or the default one."""
    if meta_model is None:
        return default_model()
    return meta_model if isinstance(meta_model, MetaModel) else MetaModel.load(meta_model)


def _check_card(card: Any) -> None:
    """Raise ``ValueError`` or ``KeyError`` where a card lacks what its readers take for granted."""
    if type(card["format"]) is not int or card["format"] < 1:
        raise ValueError(f"its format is {card['format']!r}")
    if card["format"] > FORMAT:
        return  # which may say things in another way
    data = card["data"]
    for name, values in {"families": card["families"], "datasets": data["datasets"], "tasks": data["tasks"]}.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"the {name} in its card are no list of names")
    if not card["families"]:
        raise ValueError("its card names no family")
    for name in ("rows", "trials", "calibration_trials"):
        check_count(data[name], name, minimum=0)


_MARK = r"(\.[0-9a-f]{8})?"
_OWN = re.compile(
    rf"\.?(model.*\.ubj(\.gz)?|surface-.*\.npz|reach{_MARK}\.ubj(\.gz)?|calibration{_MARK}\.json(\.gz)?|card\.json)(\.\d+)?"
)
_ABANDONED_AFTER_S = 3600.0
"""A file that no card names is another save's, which goes on, or was killed if the file is older than this."""


def _file(name: str) -> str:
    return "model.ubj" if name == POOLED else f"model-{name}.ubj"


def _surface_file(family: str) -> str:
    return f"surface-{family}.npz"


def _packed(name: str, data: bytes) -> tuple[str, bytes]:
    """Return a file's name and content on disk: all but surfaces, which are already, is compressed, without a date."""
    return (name, data) if name.endswith(".npz") else (f"{name}.gz", gzip.compress(data, mtime=0))


def _unpacked(name: str, data: bytes) -> tuple[str, bytes]:
    """Undo ``_packed``."""
    return (name.removesuffix(".gz"), gzip.decompress(data)) if name.endswith(".gz") else (name, data)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _marked(name: str, digest: str) -> str:
    """Return a file's name with the digest's first digits in it, before what says its kind."""
    kind = next(kind for kind in (".ubj.gz", ".json.gz", ".npz") if name.endswith(kind))
    return f"{name.removesuffix(kind)}.{digest[:8]}{kind}"


def _unmarked(name: str, digest: str) -> str:
    """Undo ``_marked``; a name of before format 9 is returned as it is."""
    head, mark, kind = name.rpartition(f".{digest[:8]}.")
    return f"{head}.{kind}" if mark else name


def _card_in(path: Path) -> bytes:
    """Return the text of a directory's card, or raise ``StoreError`` where there is none."""
    try:
        return (path / "card.json").read_bytes()
    except OSError as error:
        raise StoreError(
            f"There is no meta-regressor in {path}; run `cape fit META_DIR --out {path}` to make one."
        ) from error


def _listed(out: Path) -> set[str]:
    """Return the files that the card of a directory lists; none where it has no card that can be read."""
    try:
        return set(json.loads((out / "card.json").read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remove_stale(out: Path, before: Iterable[str], now: Iterable[str]) -> None:
    """Remove the files of the model that was there before, and what killed saves left, but for those of the one now."""
    for name in {f.name for f in out.iterdir() if _OWN.fullmatch(f.name)} - set(now):
        with suppress(FileNotFoundError):  # another save was faster
            if name in before or time.time() - (out / name).stat().st_mtime > _ABANDONED_AFTER_S:
                (out / name).unlink()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _surface(data: bytes) -> Surface:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return Surface.from_arrays(arrays)


def _booster(data: bytes) -> xgb.Booster:
    xgb = xgboost()
    try:
        return load_booster(bytearray(data))
    except xgb.core.XGBoostError as error:
        raise ValueError(f"XGBoost cannot read a booster: {first_line(error)}") from error


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read") from error
    if _digest(data) != digest:
        raise ValueError(f"{path.name} was changed")
    return data
