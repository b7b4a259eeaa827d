"""Configuration as JSON: what is read is what was written, and what is ambiguous is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cape.config import Augmentation, ModelSpec, StoppingRule, SweepSpec, TrialSpec
from cape.errors import SpecError
from cape.jsonconfig import JsonConfig


@pytest.mark.parametrize(
    ("kind", "text", "key"),
    [
        (SweepSpec, '{"seed": 1, "lrs": [0.1], "seed": 2}', "seed"),
        (SweepSpec, '{"stopping": {"max_steps": 1, "max_steps": 1}}', "max_steps"),
        (SweepSpec, '{"trials_by_family": {"mlp": 1, "mlp": 2}}', "mlp"),
        (Augmentation, '{"noise": 0.1, "noise": 0.2}', "noise"),
        (ModelSpec, '{"options": {"depth": 1, "depth": 2}}', "depth"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(kind: type[JsonConfig], text: str, key: str) -> None:
    with pytest.raises(SpecError, match=f"{kind.__name__} is not valid JSON: the key '{key}' is there 2 times"):
        kind.from_json(text)


def test_numbers_and_lists_of_numpy_are_taken_as_pythons_own() -> None:
    spec = SweepSpec(
        families=["mlp"],  # type: ignore[arg-type]
        lrs=np.array([1e-3, 2e-3]),  # type: ignore[arg-type]
        batch_sizes=np.array([32, 64]),  # type: ignore[arg-type]
        trials_per_cell=np.int64(3),  # type: ignore[arg-type]
        trials_by_family={"mlp": np.int32(5)},  # type: ignore[dict-item]
        seed=np.int64(7),  # type: ignore[arg-type]
        stopping={"max_steps": 9},  # type: ignore[arg-type]
    )
    assert SweepSpec.from_json(spec.to_json()) == spec
    assert (spec.lrs, spec.batch_sizes, spec.stopping) == ((1e-3, 2e-3), (32, 64), StoppingRule(max_steps=9))
    trial = TrialSpec("mlp", "digits", np.int64(8), 1e-3)  # type: ignore[arg-type]
    assert trial.trial_id == TrialSpec("mlp", "digits", 8, 1e-3).trial_id


@pytest.mark.parametrize(
    "wrong",
    [
        {"lrs": 1e-3},
        {"lrs": ([1e-3],)},
        {"batch_sizes": 32},
        {"families": None},
        {"families": (1,)},
        {"seed": 1.5},
        {"trials_by_family": None},
        {"stopping": 5},
        {"augmented": "no"},
        {"name": None},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_named(wrong: dict[str, object]) -> None:
    (key,) = wrong
    with pytest.raises(SpecError, match="StoppingRule must be" if key == "stopping" else f"SweepSpec.{key}.* must be"):
        SweepSpec(**wrong)  # type: ignore[arg-type]
