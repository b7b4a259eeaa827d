"""What is said beside the results."""

from __future__ import annotations

import pytest

from cape.logs import counted


def test_what_takes_long_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("cape.logs.time.monotonic", lambda: now[0])
    for seconds, lines in ((1, []), (6, ["2/5 files", "4/5 files"])):
        through = []
        for item in counted("abcde", 5, "files"):
            through.append(item)
            now[0] += seconds
        assert through == list("abcde") and capsys.readouterr().err.splitlines() == lines
