"""The domain check flags what it must, and raises few false alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from authors import rows

from cape.family_names import HEAD_AT_ZERO
from cape.metamodel.crossfit import assign_folds
from cape.metamodel.domain import FALSE_ALARM, Domain
from cape.metamodel.rows import PRODUCT_FEATURES, Rows


@pytest.fixture(scope="module")
def parts() -> tuple[Domain, Rows]:
    every = Rows.from_table(rows(every=2))
    fresh = np.arange(len(every)) % 4 == 0
    known = every.take(~fresh)
    return Domain.fit(known, assign_folds(known, 10), PRODUCT_FEATURES), every.take(fresh)


def _one(rows: Rows, index: int = 0, **changes: object) -> Rows:
    columns = {k: v[index : index + 1].copy() for k, v in rows.columns.items()}
    for name, value in changes.items():
        columns[name] = np.array([value], dtype=columns[name].dtype)
    return Rows(columns)


def test_false_alarms_on_fresh_rows_are_as_rare_as_asked(parts: tuple[Domain, Rows]) -> None:
    domain, fresh = parts
    flagged = [not domain.check(_one(fresh, i))[0] for i in range(1000)]
    assert np.mean(flagged) < 2.5 * FALSE_ALARM


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("log_lr", 0.0, "The learning rate 1 is outside 0.0005 to 0.002"),
        ("log_n", math.log(1797), "The training set size 1797"),
        ("log_epsilon", math.log(0.5), "The target ε = 0.5"),
        ("log_b", math.log(4096), "The batch size 4096"),
        ("log_p", math.log(5e8), "The parameter count 5e+08"),
        ("family", "diffusion", "The family 'diffusion' is not among"),
        ("family", None, "unknown"),
    ],
)
def test_out_of_range_says_which_and_how(parts: tuple[Domain, Rows], column: str, value: object, says: str) -> None:
    domain, fresh = parts
    inside, warnings, _ = domain.check(_one(fresh, **{column: value}))
    assert not inside
    assert any(says in w for w in warnings), warnings
    assert all(w.endswith(".") for w in warnings)


def test_sizes_no_training_model_had_are_named() -> None:
    known = Rows.from_table(rows(every=20))
    sizes = {"log_layers": (3, 5), "log_inputs": (784, 3072), "log_outputs": (10, 100)}
    drawn = {n: np.log(np.random.default_rng(0).choice(v, len(known))) for n, v in sizes.items()}
    known = Rows({**known.columns, **drawn})
    domain = Domain.fit(known, assign_folds(known, 10), PRODUCT_FEATURES)
    inside = [domain.check(_one(known, i)) for i in range(50)]
    assert np.mean([ok for ok, *_ in inside]) > 0.9
    for name, value, says in (
        ("log_layers", 50, "The number of weight tensors 50 is outside 3 to 5,"),
        ("log_inputs", 150_528, "The number of inputs 150528 is outside 784 to 3072,"),
        ("log_outputs", 1000, "The number of outputs 1000 is outside 10 to 100,"),
    ):
        ok, warnings, _ = domain.check(_one(known, **{name: math.log(value)}))
        assert not ok and any(says in w for w in warnings), warnings


def test_gradients_no_training_model_had_are_far(parts: tuple[Domain, Rows]) -> None:
    domain, fresh = parts
    inside, warnings, ratio = domain.check(_one(fresh, log_g2=20.0, log_tau=-20.0))
    assert not inside and ratio > 1
    assert any("times as far" in w for w in warnings)


def test_missing_features_add_nothing(parts: tuple[Domain, Rows]) -> None:
    domain, fresh = parts
    ratios = [domain.check(_one(fresh, i, log_g2=np.nan, log_tau=np.nan))[2] for i in range(200)]
    assert np.isfinite(ratios).all() and np.mean(np.array(ratios) <= 1) > 0.95


def test_json_round_trip_is_exact(parts: tuple[Domain, Rows]) -> None:
    domain, fresh = parts
    again = Domain.from_dict(domain.to_dict())
    for i in range(20):
        assert again.check(_one(fresh, i)) == domain.check(_one(fresh, i))


def test_an_ordinary_family_has_the_training_set_sizes_of_its_relative() -> None:
    """T* does not depend on N, and all of its own trials may have had the same."""
    known = Rows.from_table(rows(every=20))
    family = np.where(known.trials % 2 == 0, "mlp", "dense").astype(object)
    log_n = np.where(family == "dense", np.log(60_000.0), np.linspace(np.log(1e3), np.log(1e6), len(known)))
    known = Rows({**known.columns, "family": family, "log_n": log_n})
    domain = Domain.fit(known, assign_folds(known, 5), PRODUCT_FEATURES)
    own = [log_n[family == "mlp"].min(), log_n[family == "mlp"].max()]
    assert list(domain.ranges["mlp"]["log_n"]) == list(domain.ranges["dense"]["log_n"]) == own
    sizes = known["log_p"][family == "dense"]
    assert domain.ranges["dense"]["log_p"] == (sizes.min(), sizes.max())


def test_a_head_at_zero_may_stand_on_a_model_of_every_size_that_its_relative_has() -> None:
    known = Rows.from_table(rows(every=20))
    family = np.where(known.trials % 4 == 0, f"dense{HEAD_AT_ZERO}", "dense").astype(object)
    zero, log_p = family != "dense", known["log_p"].copy()
    log_p[np.flatnonzero(~zero)[0]] = 25.0
    known = Rows({**known.columns, "family": family, "log_p": log_p})
    domain = Domain.fit(known, assign_folds(known, 5), PRODUCT_FEATURES)
    assert domain.ranges[f"dense{HEAD_AT_ZERO}"]["log_p"] == (log_p.min(), 25.0)
    own = known.take(zero)
    assert all("parameter count" not in w for w in domain.check(_one(own, log_p=25.0))[1])
    assert any("parameter count" in w for w in domain.check(_one(own, log_p=25.1))[1])
