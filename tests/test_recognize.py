"""Which family a model is taken for, where a meta-regressor has several of its kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cape.family_names import LANGUAGE, TOKENS
from cape.feature_names import FEATURE_NAMES
from cape.recognize import known_best, read_by

FEATURES = dict.fromkeys(FEATURE_NAMES, 0.0)


@dataclass
class Regressor:
    """What ``known_best`` asks of one: half-widths by family, and how far the model is from each."""

    widths: dict[str, float]
    ratios: dict[str, float]
    known: bool = True

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self.widths)

    @property
    def conformal(self) -> Any:
        return SimpleNamespace(half_width=lambda family, level: (self.widths[family], family))

    @property
    def domain(self) -> Any:
        return SimpleNamespace(check=lambda row: (True, [], self.ratios[row["family"][0]])) if self.known else None

    def width(self, row: Any) -> np.ndarray:
        return np.ones(1)


@pytest.mark.parametrize(
    ("widths", "ratios", "family"),
    [
        ({"mlp": 0.1, "dense": 0.5}, {"mlp": 0.9, "dense": 0.9}, "mlp"),  # known five times better
        ({"mlp": 0.25, "dense": 0.5}, {"mlp": 0.9, "dense": 0.9}, "dense"),
        ({"mlp": 0.1, "dense": 0.5}, {"mlp": 2.5, "dense": 0.9}, "dense"),  # but beyond its domain
        ({"mlp": 0.1, "dense": 0.5}, {"mlp": 3.0, "dense": 9.0}, "mlp"),  # which neither knows
        ({"mlp": math.inf, "dense": 0.5}, {"mlp": 0.5, "dense": 9.0}, "dense"),
        ({"mlp": 0.1, "cnn": 0.1}, {"mlp": 5.0, "cnn": 0.1}, "mlp"),
    ],
)
def test_the_papers_family_must_know_a_model_far_better(widths: Any, ratios: Any, family: str) -> None:
    assert known_best(Regressor(widths, ratios), "mlp", FEATURES, 0.1) == family  # type: ignore[arg-type]


def test_without_a_choice_it_is_the_kind() -> None:
    regressor: Any = Regressor({"mlp": 0.1, "dense": 0.5}, {"mlp": 9.0, "dense": 0.1}, known=False)
    assert known_best(regressor, "mlp", FEATURES, 0.1) == "mlp"
    assert known_best(regressor, "linear", FEATURES, 0.1) == "linear"
    assert known_best(Regressor({"dense": 0.5}, {}), "mlp", FEATURES, 0.1) == "dense"  # type: ignore[arg-type]
    assert known_best(regressor, None, FEATURES, 0.1) is None


def test_a_model_of_tokens_is_taken_for_one_where_any_are_known() -> None:
    widths = {"mlp": 0.01, "dense": 0.1, "dense, tokens": 0.5}
    regressor: Any = Regressor(widths, dict.fromkeys(widths, 0.1))
    assert known_best(regressor, "mlp", FEATURES, 0.1, TOKENS) == "dense, tokens"
    assert known_best(regressor, "mlp", FEATURES, 0.1, LANGUAGE) == "mlp"  # it knows none that tell tokens
    assert known_best(regressor, "mlp", FEATURES, 0.1) == "mlp"
    assert known_best(regressor, None, FEATURES, 0.1, TOKENS) is None


def test_what_is_read_is_what_the_batch_says() -> None:
    tokens, labels, values = torch.zeros(4, 7, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 7)
    assert read_by(tokens, labels) == read_by(tokens.int(), labels) == read_by(tokens, values) == TOKENS
    assert read_by((tokens, labels), labels) == read_by({"input_ids": tokens, "mask": values}, labels) == TOKENS
    assert read_by(tokens, tokens) == LANGUAGE
    image = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for x in (values, image, labels, values > 0, (values, tokens)):
        assert read_by(x, labels) == ""
