"""Rows of a meta-dataset: what becomes of models whose head starts at zero."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cape.errors import DataError
from cape.family_names import HEAD_AT_ZERO, LANGUAGE, TOKENS, as_read, relative_of
from cape.feature_names import FEATURE_NAMES, FLOOR, LATER_COLUMNS, LATER_FEATURES
from cape.metamodel.rows import Rows, row_from_features
from cape.store import reader

CORPUS = Path(__file__).resolve().parents[2] / "benchmarks" / "corpus"


def test_ordinary_models_whose_head_starts_at_zero_are_a_family_beside_the_others() -> None:
    features = {"log_lr": 0.0, "log_b": 0.0, "log_hidden_pull": math.log(FLOOR)}
    for family, named in (("dense", "dense, head at zero"), ("mlp", "mlp"), (None, None)):
        row = row_from_features(features, family, 0.1)
        assert row["family"].tolist() == [named]
        assert row_from_features({**features, "log_hidden_pull": -1.0}, family, 0.1)["family"].tolist() == [family]
    assert (
        relative_of("dense, head at zero") == "dense" and relative_of("dense") == "mlp" and relative_of("mlp") is None
    )
    table = reader.read(CORPUS / "ordinary")
    rows = Rows.from_table(table)
    zero = np.array(['"head":"zero"' in model for model in rows["model"]])
    assert zero.any() and zero.tolist() == [family.endswith(HEAD_AT_ZERO) for family in rows["family"]]
    mask, told = rows.told("encoder, head at zero")
    assert set(told["family"]) == {"encoder", "encoder, head at zero"} and mask.sum() == len(told)
    assert told.augmented.tolist() == [family == "encoder" for family in told["family"]]


def test_ordinary_models_of_tokens_are_families_beside_the_others() -> None:
    table = reader.read(CORPUS / "ordinary_tables").slice(0, 80)
    said = [m.replace('"layout":"vector"', '"layout":"tokens"') for m in table.column("model").to_pylist()]
    said[::2] = table.column("model").to_pylist()[::2]
    models = table.set_column(table.column_names.index("model"), "model", pa.array(said))
    plain = Rows.from_table(table)["family"]
    for task, ending in (("classification", TOKENS), ("sequence", LANGUAGE)):
        tasks = models.set_column(table.column_names.index("task"), "task", pa.array([task] * len(table)))
        found = Rows.from_table(tasks)["family"]
        for family, model, now in zip(plain, said, found, strict=True):
            is_read = '"layout":"tokens"' in model
            assert now == (family.removesuffix(HEAD_AT_ZERO) + ending if is_read else family)
    assert relative_of("dense, tokens") == "dense" and as_read("rnn", True, "sequence") == "rnn"


def test_a_head_at_zero_has_the_features_of_its_second_look() -> None:
    table = reader.read(CORPUS / "ordinary")
    rows = Rows.from_table(table)
    zero = np.array([family.endswith(HEAD_AT_ZERO) for family in rows["family"]])
    for name, column in zip(LATER_FEATURES, LATER_COLUMNS, strict=True):
        first, later = (np.array(table.column(c).to_pylist(), dtype=np.float64) for c in (name, column))
        assert np.isnan(later[~zero]).all() and np.isfinite(later[zero]).all()
        assert np.array_equal(rows[name], np.where(zero, later, first))
    told = dict.fromkeys(FEATURE_NAMES, 0.0) | dict.fromkeys(LATER_COLUMNS, 1.0) | {"log_hidden_pull": math.log(FLOOR)}
    row = row_from_features(told, "dense", 0.1)
    assert all(row[name][0] == (name in LATER_FEATURES) for name in FEATURE_NAMES)
    assert row_from_features(told, "mlp", 0.1)["log_g2"][0] == 0.0
    with pytest.raises(DataError, match="reprobe"):
        Rows.from_table(table.drop_columns(list(LATER_COLUMNS)))
    others = table.filter(pa.array(~zero))
    assert Rows.from_table(others.drop_columns(list(LATER_COLUMNS))).families == Rows.from_table(others).families
