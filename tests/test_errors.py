"""What is said of an error of somebody else's code."""

from __future__ import annotations

import pytest

from cape.errors import first_line
from cape.metamodel import artifact


def test_the_first_line_is_what_an_error_says() -> None:
    assert first_line(ValueError("\n  it is wrong.\nin detail")) == first_line("it is wrong.") == "it is wrong"
    assert first_line(AssertionError()) == first_line(AssertionError("\n")) == "no message"


def test_a_booster_whose_error_says_nothing_is_damaged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: object) -> None:
        raise artifact.xgboost().core.XGBoostError("")

    monkeypatch.setattr(artifact, "load_booster", silent)
    with pytest.raises(ValueError, match="cannot read a booster: no message"):
        artifact._booster(b"")
