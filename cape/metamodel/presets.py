"""Presets of the meta-regressor: everything that decides it, given its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cape.errors import SpecError, did_you_mean
from cape.feature_names import BATCH_FEATURES, SHAPE_FEATURES
from cape.jsonconfig import JsonConfig
from cape.metamodel.line import EPSILON_TERM
from cape.metamodel.rows import PAPER_FEATURES, PRODUCT_FEATURES, STATIC_FEATURES

LINE_TERMS = (EPSILON_TERM, "log_first_step", "line_1", "line_4", "log_lr", "log_b")
"""Terms of the physical guess: how much log loss must go, and how much of it AdamW's first steps promise to take."""

CENSORED = ("cap", "exclude", "aft")


@dataclass(frozen=True)
class Preset(JsonConfig):
    """Everything that decides a meta-regressor, given its rows.

    Attributes:
        name: name of the preset.
        features: columns of the matrix, in order.
        trees, depth, learning_rate, subsample, colsample, alpha, lambda_, min_child_weight, seed: XGBoost's.
        per_family: one booster per family, with a pooled one for families without their own.
        equal_families: weight rows so that every family counts equally in the pooled booster.
        monotone: apply ``regressors.MONOTONE``.
        censored: ``"cap"`` regresses uncrossed rows as 5,000; ``"aft"`` as lower bounds of T*, by XGBoost's accelerated
            failure time; ``"exclude"`` leaves them to p_reach.
        select: choose among ``STRUCTURES``, then ``SIZES``, then by family, by cross-validation (``crossfit.select``).
        line: terms of a ridge regression per family whose residuals the trees fit; none where empty.
        surface: share of the smooth surface in a prediction, beside the trees'; 0 fits none. It stands on the line.
        augmented: weight of the rows of augmented trials, which the surface ignores: it learns their noise; 0 leaves
            them out.
        shares: ``surface`` by family, where selection has chosen it. far_shares: the same for trials far from those
            that were fitted on (``surface.FAR``), where it differs.
        whole: predictions are whole numbers of updates, as T* is: the median of what it may be is one of them.
            Intervals keep their centre.
        intervals: whether an evaluation scores its intervals, too (they take cross-fitting).
        early_stopping: rounds without a gain on a tenth of the trials after which trees stop being added (the booster
            is then fitted again on every row with as many); 0 fits all ``trees``.
    """

    name: str
    features: tuple[str, ...] = PAPER_FEATURES
    trees: int = 200
    depth: int = 4
    learning_rate: float = 0.05
    subsample: float = 0.9
    colsample: float = 0.9
    alpha: float = 0.0
    lambda_: float = 1.0
    min_child_weight: float = 1.0
    seed: int = 42
    per_family: bool = False
    equal_families: bool = False
    monotone: bool = False
    censored: str = "cap"
    select: bool = False
    line: tuple[str, ...] = ()
    surface: float = 0.0
    augmented: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    far_shares: Mapping[str, float] = field(default_factory=dict)
    early_stopping: int = 0
    whole: bool = False
    intervals: bool = False

    def __post_init__(self) -> None:
        if self.censored not in CENSORED:
            raise SpecError(
                f"Unknown way to treat censored rows '{self.censored}'.{did_you_mean(self.censored, CENSORED)}"
            )
        for share in (self.surface, *self.shares.values(), *self.far_shares.values()):
            if not 0.0 <= share <= 1.0:
                raise SpecError(f"The share of a surface is from 0 to 1, not {share}.")
        if self.early_stopping < 0 or self.augmented < 0:
            raise SpecError("early_stopping and augmented must be zero or more.")

    def share(self, family: object, far: bool = False) -> float:
        """Return the surface's share in a family's predictions, near the trials fitted on or far from them."""
        near = self.shares.get(str(family), self.surface)
        return self.far_shares.get(str(family), near) if far else near

    def all_surface(self, family: object) -> bool:
        """Say whether a family's predictions are its surface's alone, where it has one: trees are then of no use."""
        return min(self.share(family), self.share(family, far=True)) >= 1.0


_PRODUCT = Preset(
    "product",
    features=PRODUCT_FEATURES,
    trees=800,
    depth=3,
    equal_families=True,
    monotone=True,
    censored="aft",
    select=True,
    line=LINE_TERMS,
    surface=0.5,
    augmented=0.1,
    whole=True,
    intervals=True,
)

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("paper", per_family=True),
        Preset("paper_pooled"),
        Preset("static", features=STATIC_FEATURES, per_family=True),
        Preset("paper_epsilon", features=(*PAPER_FEATURES, "log_epsilon"), per_family=True),
        *(
            Preset(f"paper_without_{f}", features=tuple(g for g in PAPER_FEATURES if g != f), per_family=True)
            for f in PAPER_FEATURES
        ),
        Preset("paper_appendix", trees=500, depth=6, per_family=True),
        _PRODUCT,
        _PRODUCT.replace(name="product_trees", surface=0.0, intervals=False),
        _PRODUCT.replace(
            name="product_static",
            features=(*STATIC_FEATURES, *SHAPE_FEATURES, *BATCH_FEATURES, "log_epsilon", "family"),
            select=False,
            line=(),
            surface=0.0,
            intervals=False,
        ),
    )
}

STRUCTURES: tuple[dict[str, Any], ...] = (
    {"per_family": False, "line": LINE_TERMS},
    {"per_family": True, "line": LINE_TERMS},
    {"per_family": False, "line": ()},
    {"per_family": True, "line": ()},
)
STRUCTURE_SIZE: dict[str, Any] = {"trees": 300, "depth": 3, "learning_rate": 0.1}
SIZES: tuple[dict[str, Any], ...] = (
    {"trees": 300, "depth": 3, "learning_rate": 0.05},
    {"trees": 800, "depth": 3, "learning_rate": 0.05},
    {"trees": 800, "depth": 5, "learning_rate": 0.03},
)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""What selection compares: every structure at ``STRUCTURE_SIZE``, every size of the best structure (both of the trees
alone), then, family by family, how much of the surface near the trials and how much far from them."""


def preset_named(name: str | Preset) -> Preset:
    """Return a preset by name; raises ``SpecError`` for an unknown one."""
    if isinstance(name, Preset):
        return name
    if name not in PRESETS:
        raise SpecError(f"Unknown preset '{name}'.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
