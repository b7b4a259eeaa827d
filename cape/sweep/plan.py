"""The full, ordered, deterministic list of trials of a sweep.

The trials of one *group* (family, dataset, batch size: what can be trained side by side) are numbered so that every
replicate goes once through all learning rates before the next replicate begins. A trial's seed depends on the sweep's
seed, its cell and its replicate, and on nothing else: adding replicates or cells to a sweep changes no trial that was
there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cape.config import Augmentation, SweepSpec, TrialSpec
from cape.errors import SpecError, did_you_mean
from cape.jsonconfig import canonical_json, derive_seed, stable_hash

# The paper's grid (section 5.1) is the default of SweepSpec.
PRESETS: dict[str, SweepSpec] = {
    "paper": SweepSpec(name="paper"),
    "cpu": SweepSpec(
        name="cpu",
        batch_sizes=(32, 64),
        trials_per_cell=8,
        trials_by_family={"mlp": 40, "rnn": 10},
    ),
    "demo": SweepSpec(
        name="demo",
        datasets=("digits",),
        lrs=(1e-3, 2e-3),
        batch_sizes=(16, 32),
        trials_per_cell=4,
        trials_by_family={"mlp": 20, "transformer": 2},
    ),
    "smoke": SweepSpec(
        name="smoke",
        families=("mlp",),
        datasets=("digits",),
        lrs=(1e-3, 2e-3),
        batch_sizes=(16,),
        trials_per_cell=2,
    ),
}

# What the demo takes from a data root: the first two that lie there, a gray and a colour one where possible, with half
# the trials of each (the time stays the same); digits (bundled with scikit-learn) where there is none of them.
_DEMO_DATASETS = ("mnist", "cifar10", "fashion_mnist", "svhn", "cifar100")

_LARGEST_PLAN = 10_000_000
_MARK = "\0"  # in no name, so that a trial's JSON can be cut where it stands


def preset(name: str, data_root: str | Path | None = None) -> SweepSpec:
    """Return a preset by name; ``demo`` sweeps two of the image datasets that lie in ``data_root`` (a Parquet folder).

    Raises:
        SpecError: no preset of that name.
    """
    if name not in PRESETS:
        raise SpecError(f"Unknown preset '{name}'.{did_you_mean(name, PRESETS)}")
    spec = PRESETS[name]
    if name == "demo" and data_root is not None:
        found = tuple(d for d in _DEMO_DATASETS if (Path(data_root) / f"{d}.parquet").is_file())
        share = len(found[:2]) or 1
        return spec.replace(
            datasets=found[:2] or spec.datasets,
            trials_per_cell=spec.trials_per_cell // share,
            trials_by_family={family: count // share for family, count in spec.trials_by_family.items()},
        )
    return spec


def read_spec(source: str | Path, data_root: str | Path | None = None) -> SweepSpec:
    """Return the sweep that a preset's name or a JSON file describes.

    Raises:
        SpecError: neither a preset nor a file, or a file that does not describe a sweep.
    """
    path = Path(source)
    if str(source) in PRESETS or (path.suffix != ".json" and not path.exists()):
        return preset(str(source), data_root)
    try:
        return SweepSpec.from_json(path.read_text(encoding="utf-8-sig"))
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise SpecError(f"There is no file {path}; a preset is one of {', '.join(PRESETS)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read as JSON text: {error}") from error


@dataclass(frozen=True)
class Group:
    """Trials that differ only in learning rate and replicate.

    Attributes:
        count: number of trials.
    """

    family: str
    dataset: str
    batch_size: int
    count: int


@dataclass(frozen=True)
class Shard:
    """Trials of one group, by their positions in it: what one worker runs in one go."""

    group: Group
    positions: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def key(self) -> str:
        """12 hex digits that name the shard by its content, in its claim and in the log."""
        group = self.group
        positions = hashlib.blake2b(np.asarray(self.positions, np.int64).tobytes(), digest_size=16).hexdigest()
        return stable_hash([group.family, group.dataset, group.batch_size, positions], 12)


class Plan:
    """A sweep's trials, expanded only as they are asked for.

    Args:
        spec: the sweep.

    Raises:
        SpecError: more than ten million trials.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.groups = tuple(
            Group(f, d, b, len(spec.lrs) * spec.trials_by_family.get(f, spec.trials_per_cell))
            for f in spec.families
            for d in spec.datasets
            for b in spec.batch_sizes
        )
        trials = sum(group.count for group in self.groups)  # maybe more than `len` can return
        if trials > _LARGEST_PLAN:
            raise SpecError(f"The sweep has {trials} trials, more than {_LARGEST_PLAN}; split it into several.")

    def __len__(self) -> int:
        """Number of trials."""
        return sum(group.count for group in self.groups)

    @property
    def rows(self) -> int:
        """Number of rows: one for each trial and ε."""
        return len(self) * len(self.spec.epsilons)

    @property
    def cells(self) -> int:
        """Number of (family, dataset, batch size, lr)."""
        return len(self.groups) * len(self.spec.lrs)

    def trial(self, group: Group, position: int) -> TrialSpec:
        """Return one trial by its place in its group."""
        spec = self.spec
        replicate, i = divmod(int(position), len(spec.lrs))
        cell = (group.family, group.dataset, group.batch_size, spec.lrs[i])
        seed = derive_seed(spec.seed, *cell, replicate)
        augmentation, model_seed = self._task(cell, replicate, seed)
        return TrialSpec(
            *cell,
            epsilons=spec.epsilons,
            seed=seed,
            replicate=replicate,
            task=spec.task,
            precision=spec.precision,
            preprocess=spec.preprocess,
            stopping=spec.stopping,
            augmentation=augmentation,
            model_seed=model_seed,
        )

    def _task(
        self, cell: tuple[str, str, int, float], replicate: int, seed: int
    ) -> tuple[Augmentation | None, int | None]:
        """Return a trial's augmentation, and the seed of its model where replicates share it."""
        spec, shared = self.spec, None
        if spec.replicates > 1:
            shared = derive_seed(spec.seed, *cell, "model", replicate // spec.replicates)
        if not spec.augmented:
            return None, shared
        drawn = derive_seed(seed if shared is None else shared, "augmentation")
        return Augmentation.draw(drawn, spec.finer, spec.faint, spec.narrow), shared

    def trials(self) -> Iterator[TrialSpec]:
        """Yield every trial, in order."""
        for group in self.groups:
            for position in range(group.count):
                yield self.trial(group, position)

    def trials_of(self, shard: Shard) -> Iterator[TrialSpec]:
        """Yield the trials of a shard, in order."""
        for position in shard.positions:
            yield self.trial(shard.group, position)

    def ids(self, group: Group) -> np.ndarray:
        """Return the ids of a group's trials as numbers, [count] uint64, in order.

        The same as ``int(trial.trial_id, 16)``, in about 3 µs a trial (60 µs in an augmented sweep): what all trials of
        a cell have in common is hashed, or at least written, once.
        """
        spec, cells = self.spec, []
        for i, lr in enumerate(spec.lrs):
            own = self.trial(group, i).to_dict()
            names = sorted({"augmentation", "model_seed", "replicate", "seed"} & own.keys())
            text = canonical_json({**own, **dict.fromkeys(names, _MARK)})
            first, *others = (part.encode() for part in text.split(canonical_json(_MARK)))
            cell = (group.family, group.dataset, group.batch_size, lr)
            seeds = hashlib.blake2b((canonical_json([spec.seed, *cell])[:-1] + ",").encode(), digest_size=8)
            cells.append((cell, names, seeds, hashlib.blake2b(first, digest_size=32), others))
        plain = names == ["replicate", "seed"]
        found = np.empty(group.count, np.uint64)
        for position in range(group.count):
            replicate, i = divmod(position, len(cells))
            cell, names, seeds, hashes, others = cells[i]
            number, seeds, hashes = b"%d" % replicate, seeds.copy(), hashes.copy()
            seeds.update(number + b"]")
            seed = int.from_bytes(seeds.digest(), "big") >> 1
            if plain:
                hashes.update(b"%b%b%d%b" % (number, others[0], seed, others[1]))
            else:
                augmentation, model_seed = self._task(cell, replicate, seed)
                values: dict[str, Any] = {"replicate": replicate, "seed": seed, "model_seed": model_seed}
                if augmentation is not None:
                    values["augmentation"] = augmentation.to_dict()
                for name, rest in zip(names, others, strict=True):
                    hashes.update(canonical_json(values[name]).encode() + rest)
            found[position] = int.from_bytes(hashes.digest()[:8], "big")
        return found

    def all_ids(self) -> np.ndarray:
        """Return the ids of all trials as numbers, [len(plan)] uint64, in order."""
        return np.concatenate([self.ids(group) for group in self.groups])

    def missing(self, done: np.ndarray | None = None) -> list[Shard]:
        """Return, for each group, the trials that are not done as one shard of any length.

        Args:
            done: ids of trials as numbers (``store.reader.done_ids``).
        """
        if done is None or not len(done):
            return [Shard(group, range(group.count)) for group in self.groups]
        done, left = np.unique(done), []
        for group in self.groups:
            ids = self.ids(group)
            places = np.minimum(np.searchsorted(done, ids), len(done) - 1)
            positions = np.flatnonzero(done[places] != ids)
            if len(positions) == group.count:
                left.append(Shard(group, range(group.count)))
            elif len(positions):
                left.append(Shard(group, positions))
        return left
