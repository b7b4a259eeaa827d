"""The full, ordered, deterministic list of trials of a sweep, and its cut into shards.

The trials of one (family, dataset) are numbered so that every replicate goes once through all cells before the next
replicate begins. A trial's seed depends on the sweep's seed, its cell and its replicate, and on nothing else: adding
replicates or cells to a sweep changes no trial that was there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cape.config import SweepSpec, TrialSpec, derive_seed, stable_hash
from cape.errors import SpecError, did_you_mean

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

_SHARDS_PER_WORKER = 16  # enough that a slow shard at the end keeps the others waiting only briefly
_LARGEST_SHARD = 64


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
    if str(source) in PRESETS or (path.suffix != ".json" and not path.is_file()):
        return preset(str(source), data_root)
    try:
        return SweepSpec.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"There is no file {path}; a preset is one of {', '.join(PRESETS)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read as JSON text: {error}") from error


@dataclass(frozen=True)
class Shard:
    """Trials of one (family, dataset), by their positions in the plan: what one worker runs in one go."""

    family: str
    dataset: str
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def key(self) -> str:
        """8 hex digits that name the shard by its content; its files begin with them."""
        return stable_hash([self.family, self.dataset, list(self.positions)], 8)


class Plan:
    """A sweep's trials, expanded only as they are asked for.

    Args:
        spec: the sweep.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.partitions = tuple((f, d) for f in spec.families for d in spec.datasets)
        self._cells = tuple((b, lr) for b in spec.batch_sizes for lr in spec.lrs)

    def __len__(self) -> int:
        """Number of trials."""
        return sum(self.count(family) for family, _ in self.partitions)

    @property
    def rows(self) -> int:
        """Number of rows: one for each trial and ε."""
        return len(self) * len(self.spec.epsilons)

    @property
    def cells(self) -> int:
        """Number of (family, dataset, batch size, lr)."""
        return len(self.partitions) * len(self._cells)

    def count(self, family: str) -> int:
        """Return the number of trials of a family on one dataset."""
        return len(self._cells) * self.spec.trials_by_family.get(family, self.spec.trials_per_cell)

    def trial(self, family: str, dataset: str, position: int) -> TrialSpec:
        """Return one trial by its place among those of its family and dataset."""
        replicate, cell = divmod(position, len(self._cells))
        batch_size, lr = self._cells[cell]
        spec = self.spec
        return TrialSpec(
            family=family,
            dataset=dataset,
            batch_size=batch_size,
            lr=lr,
            epsilons=spec.epsilons,
            seed=derive_seed(spec.seed, family, dataset, batch_size, lr, replicate),
            replicate=replicate,
            task=spec.task,
            precision=spec.precision,
            preprocess=spec.preprocess,
            stopping=spec.stopping,
        )

    def trials(self) -> Iterator[TrialSpec]:
        """Yield every trial, in order."""
        for family, dataset in self.partitions:
            for position in range(self.count(family)):
                yield self.trial(family, dataset, position)

    def trials_of(self, shard: Shard) -> Iterator[TrialSpec]:
        """Yield the trials of a shard, in order."""
        for position in shard.positions:
            yield self.trial(shard.family, shard.dataset, position)

    def missing(self, done: Collection[str] = ()) -> list[Shard]:
        """Return, for each (family, dataset), the trials that are not ``done`` (ids) as one shard of any length."""
        whole = [Shard(family, dataset, range(self.count(family))) for family, dataset in self.partitions]
        if not done:
            return whole
        left = []
        for family, dataset, positions in ((s.family, s.dataset, s.positions) for s in whole):
            kept = tuple(p for p in positions if self.trial(family, dataset, p).trial_id not in done)
            if kept:
                left.append(Shard(family, dataset, kept))
        return left

    def shards(self, workers: int = 1, done: Collection[str] = ()) -> list[Shard]:
        """Cut the trials that are not ``done`` into shards (see ``cut``)."""
        return cut(self.missing(done), workers)


def cut(wholes: Sequence[Shard], workers: int) -> list[Shard]:
    """Cut long shards into pieces, all (family, dataset) interleaved; more workers, smaller pieces."""
    total = sum(map(len, wholes))
    size = min(_LARGEST_SHARD, max(1, total // (_SHARDS_PER_WORKER * max(1, workers))))
    placed: list[tuple[float, Shard]] = []
    for whole in wholes:
        starts = range(0, len(whole), size)
        for i, start in enumerate(starts):
            piece = Shard(whole.family, whole.dataset, whole.positions[start : start + size])
            placed.append(((i + 0.5) / len(starts), piece))
    return [shard for _, shard in sorted(placed, key=lambda item: item[0])]
