"""What a sweep, a trial and a model are, as frozen dataclasses with a JSON round trip.

``SweepSpec`` is what a user writes; a plan expands it into ``TrialSpec`` objects; a family draws a ``ModelSpec``
from a trial's seed. Every seed is a hash of what it is for, so that a trial keeps its numbers whatever else is
in the sweep (trials can be added to a cell, and cells to a sweep, without changing those that exist).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

from cape.errors import SpecError, did_you_mean
from cape.jsonconfig import JsonConfig, derive_seed, stable_hash, uniforms

TASKS = ("classification", "regression", "sequence", "multilabel")
LAYOUTS = ("vector", "rows", "image", "tokens")
PRECISIONS = ("float32", "tf32", "bf16")
PREPROCESSING = ("standard", "reference")


def check_lr(lr: float) -> float:
    """Return a learning rate that is positive and finite, or raise ``SpecError``."""
    if not isinstance(lr, Real) or isinstance(lr, bool) or not (math.isfinite(lr) and lr > 0):
        raise SpecError(f"The learning rate must be a positive number, not {lr!r}.")
    return float(lr)


def check_epsilon(epsilon: float) -> float:
    """Return an ε strictly between 0 and 1, or raise ``SpecError``."""
    if not isinstance(epsilon, Real) or isinstance(epsilon, bool) or not 0.0 < epsilon < 1.0:
        raise SpecError(f"ε must lie strictly between 0 and 1, not {epsilon!r}.")
    return float(epsilon)


def check_epsilons(epsilons: typing.Iterable[float]) -> tuple[float, ...]:
    """Return distinct ε in descending order (the order in which a trajectory crosses them)."""
    if isinstance(epsilons, Real):
        epsilons = (float(epsilons),)
    # What has no dimension is an iterable to Python, a tensor and an array too.
    if not isinstance(epsilons, typing.Iterable) or isinstance(epsilons, str) or getattr(epsilons, "ndim", 1) == 0:
        raise SpecError(f"epsilons must be numbers between 0 and 1, not {epsilons!r}.")
    values = tuple(sorted({check_epsilon(e) for e in epsilons}, reverse=True))
    if not values:
        raise SpecError("At least one ε is needed.")
    return values


def check_count(value: int, what: str, minimum: int = 1) -> int:
    """Return a whole number of at least ``minimum`` (NumPy's too), or raise ``SpecError`` that names what it counts."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise SpecError(f"{what} must be a whole number of at least {minimum}, not {value!r}.")
    return int(value)


def check_seed(seed: int) -> int:
    """Return a seed that torch takes, or raise ``SpecError``."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
        raise SpecError(f"seed must be a whole number of 64 bits, not {seed!r}.")
    return int(seed)


def _check_choice(value: str, choices: tuple[str, ...], what: str) -> str:
    if value not in choices:
        raise SpecError(f"Unknown {what} '{value}'.{did_you_mean(value, choices)}")
    return value


def check_precision(precision: str) -> str:
    """Return one of ``PRECISIONS``, or raise ``SpecError``."""
    return _check_choice(precision, PRECISIONS, "precision")


@dataclass(frozen=True)
class StoppingRule(JsonConfig):
    """When a trajectory ends (paper §4; design: plateau exit, cap, divergence).

    Attributes:
        max_steps: cap on the number of optimizer updates.
        plateau_window: number of most recent losses over which the relative gain is taken.
        plateau_tolerance: the trajectory is a plateau when (first - last) / first over the window is below it.
    """

    max_steps: int = 5000
    plateau_window: int = 200
    plateau_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_count(self.max_steps, "max_steps")
        if check_count(self.plateau_window, "plateau_window") < 2:
            raise SpecError(f"plateau_window must be at least 2, not {self.plateau_window!r}.")
        tolerance = self.plateau_tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 <= tolerance < math.inf:
            raise SpecError(f"plateau_tolerance must be zero or more, not {tolerance!r}.")


@dataclass(frozen=True)
class ModelSpec(JsonConfig):
    """One model drawn from a family: enough to build it anywhere.

    Attributes:
        family: registered family name.
        architecture: name within the family, e.g. ``"resnet"``.
        layout: what the model takes: ``vector`` [B, d], ``rows`` [B, T, d], ``image`` [B, C, H, W] or
            ``tokens`` [B, T] int64.
        input_shape: shape of one sample, without the batch dimension.
        outputs: units of the head (classes, labels, vocabulary or 1).
        task: one of ``TASKS``.
        options: the family's own choices (depth, width, ...), JSON values.
    """

    family: str
    architecture: str
    layout: str
    input_shape: tuple[int, ...]
    outputs: int
    task: str = "classification"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice(self.task, TASKS, "task")
        _check_choice(self.layout, LAYOUTS, "layout")
        check_count(self.outputs, "outputs")


@dataclass(frozen=True)
class Augmentation(JsonConfig):
    """What makes another task of a dataset (design: augmented trials); ``cape.datasets.augmented`` applies it.

    Attributes:
        seed: which classes are kept.
        classes: how many classes are kept, of C: 2 at 0, all at 1, ``round(2 * (C / 2) ** classes)`` between.
        split: each class that is kept is cut, sample by sample at random, into ``round((200 / C) ** split)`` classes.
        random_labels: share of the samples whose label is drawn at random.
        noise: standard deviation of the normal noise added to each input, in units of the inputs' own.
        zeroed: share of the inputs (each number of each sample) that become zero, after the noise.
        log_scale: natural logarithm of the factor that all inputs are multiplied by, last.
        gray: images only: the mean of the channels in place of them.
        pooled: images only: the mean of each 2x2 pixels in place of them.
        samples: the size N of the full training set that the probe is told.
        columns: so many sums of the inputs with normal weights, drawn once and for all, in place of them: as few
            numbers as a table has; None: the inputs as they are.
    """

    LATER: ClassVar[tuple[str, ...]] = ("split", "columns")

    seed: int = 0
    classes: float = 1.0
    random_labels: float = 0.0
    noise: float = 0.0
    zeroed: float = 0.0
    log_scale: float = 0.0
    gray: bool = False
    pooled: bool = False
    samples: int | None = None
    split: float = 0.0
    columns: int | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "random_labels", "zeroed", "split"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SpecError(f"An augmentation's {name} is a share between 0 and 1, not {getattr(self, name)!r}.")
        if not (math.isfinite(self.noise) and self.noise >= 0 and math.isfinite(self.log_scale)):
            raise SpecError(f"An augmentation cannot have noise {self.noise!r} and log_scale {self.log_scale!r}.")
        if self.samples is not None:
            check_count(self.samples, "samples")
        if self.columns is not None:
            check_count(self.columns, "columns")

    @classmethod
    def draw(cls, seed: int, finer: bool = False, faint: bool = False, narrow: bool = False) -> Augmentation:
        """Return the augmentation of a seed.

        Each change but the last two is made with the chance named, so that trials near the plain ones are common:
        a class subset .7 (where ``finer``: no subset, but classes that are cut up, .7); random labels .35, up to all;
        noise .35, up to the inputs' own deviation; zeroed .4, from nearly none to .98 (log-uniform in what stays);
        gray .25; pooled .25; scale e^(-4..1) and N in 10^3..10^6 (log-uniform) always. Where ``faint``, inputs that
        hardly tell samples apart, as hashed texts do: zeroed always, and scale e^(-4.5..-2). Where ``narrow``, tables:
        2 to 64 columns, N in 10^2..10^6 (both log-uniform), scale e^(-2..1), and nothing that is done to images.
        """
        classes, labels, noise, zeroed, gray, pooled, scale, samples = uniforms(seed)

        def often(chance: float, u: float) -> float:
            """Return 0 with the chance 1 - ``chance``, else a number of [0, 1)."""
            return max(0.0, (u - 1.0) / chance + 1.0)

        return cls(
            seed=seed,
            classes=1.0 if finer else round(1.0 - often(0.7, classes), 4),
            split=round(often(0.7, classes), 4) if finer else 0.0,
            random_labels=round(often(0.35, labels), 4),
            noise=round(often(0.35, noise), 4),
            zeroed=round(1.0 - 0.02 ** (zeroed if faint else often(0.4, zeroed)), 4),
            log_scale=round(2.5 * scale - 4.5 if faint else 3.0 * scale - 2.0 if narrow else 5.0 * scale - 4.0, 4),
            gray=gray < 0.25 and not narrow,
            pooled=pooled < 0.25 and not narrow,
            samples=round(10.0 ** (2.0 + 4.0 * samples if narrow else 3.0 + 3.0 * samples)),
            columns=round(2.0 * 32.0**gray) if narrow else None,
        )


@dataclass(frozen=True)
class TrialSpec(JsonConfig):
    """One trial: one model, one dataset, one probe batch, one learning rate, one seed.

    The model is drawn from ``seed`` by the family unless ``model`` names one; or from ``model_seed``, which trials that
    differ in nothing but their initialization, batch and dropout masks (replicates) have in common. ``task`` overrides
    the dataset's own.
    """

    LATER: ClassVar[tuple[str, ...]] = ("augmentation", "model_seed")

    family: str
    dataset: str
    batch_size: int
    lr: float
    epsilons: tuple[float, ...] = (0.20, 0.15, 0.10)
    seed: int = 0
    replicate: int = 0
    task: str | None = None
    precision: str = "float32"
    preprocess: str = "standard"
    stopping: StoppingRule = field(default_factory=StoppingRule)
    model: ModelSpec | None = None
    augmentation: Augmentation | None = None
    model_seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_count(self.batch_size, "batch_size"))
        object.__setattr__(self, "lr", check_lr(self.lr))
        object.__setattr__(self, "epsilons", check_epsilons(self.epsilons))
        _check_choice(self.precision, PRECISIONS, "precision")
        _check_choice(self.preprocess, PREPROCESSING, "preprocess")
        if self.task is not None:
            _check_choice(self.task, TASKS, "task")

    @property
    def trial_id(self) -> str:
        """16 hex digits that name the trial by its content."""
        return stable_hash(self.to_dict())

    @property
    def cell(self) -> tuple[str, str, int, float]:
        """(family, dataset, batch size, lr): trials that share it form a cell."""
        return (self.family, self.dataset, self.batch_size, self.lr)

    def seed_for(self, purpose: str) -> int:
        """Return the seed of one purpose (``model``, ``init``, ``batch``, ``train``), independent of the others."""
        shared = purpose == "model" and self.model_seed is not None
        return derive_seed(self.model_seed if shared else self.seed, purpose)


@dataclass(frozen=True)
class SweepSpec(JsonConfig):
    """A sweep: the grid of cells and how many trials each holds (paper §5.1).

    Trials number ``len(families) * len(datasets) * len(batch_sizes) * len(lrs) * trials_per_cell``;
    rows number that times ``len(epsilons)``. ``trials_by_family`` overrides ``trials_per_cell`` for a family.

    Where ``augmented``, every trial draws an ``Augmentation`` of its own, with more classes instead of fewer where
    ``finer``, small, mostly empty inputs where ``faint`` and few inputs where ``narrow``. ``replicates``: so many
    trials of a cell, one after the other, share their model and augmentation and differ in their other seeds.
    """

    LATER: ClassVar[tuple[str, ...]] = ("augmented", "finer", "faint", "narrow", "replicates")

    name: str = "sweep"
    families: tuple[str, ...] = ("mlp", "cnn", "rnn", "transformer")
    datasets: tuple[str, ...] = ("mnist", "fashion_mnist", "cifar10", "cifar100")
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    batch_sizes: tuple[int, ...] = (32, 64, 128)
    epsilons: tuple[float, ...] = (0.20, 0.15, 0.10)
    trials_per_cell: int = 100
    trials_by_family: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    task: str | None = None
    precision: str = "float32"
    preprocess: str = "standard"
    stopping: StoppingRule = field(default_factory=StoppingRule)
    augmented: bool = False
    finer: bool = False
    faint: bool = False
    narrow: bool = False
    replicates: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilons", check_epsilons(self.epsilons))
        self._check_types()
        for what in ("families", "datasets", "lrs", "batch_sizes"):
            values = getattr(self, what)
            if not values:
                raise SpecError(f"{what} must not be empty.")
            if len(set(values)) != len(values):
                raise SpecError(f"{what} names a value twice: {list(values)}.")
        for lr in self.lrs:
            check_lr(lr)
        for b in self.batch_sizes:
            check_count(b, "batch_sizes")
        check_count(self.trials_per_cell, "trials_per_cell")
        check_count(self.replicates, "replicates")
        for how in ("finer", "faint", "narrow"):
            if getattr(self, how) and not self.augmented:
                raise SpecError(f"'{how}' says how trials are augmented; set 'augmented' as well.")
        for family, count in self.trials_by_family.items():
            if family not in self.families:
                raise SpecError(f"trials_by_family names '{family}', which is not among the families.")
            check_count(count, f"trials_by_family.{family}")
        _check_choice(self.precision, PRECISIONS, "precision")
        _check_choice(self.preprocess, PREPROCESSING, "preprocess")
        if self.task is not None:
            _check_choice(self.task, TASKS, "task")

    @property
    def spec_hash(self) -> str:
        """16 hex digits that name the sweep by its content."""
        return stable_hash(self.to_dict())
