"""The demo's directory: what of it a demo removes. (The demo itself takes minutes: ``make demo``.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from cape import demo
from cape.errors import StoreError
from cape.sweep import driver


class Began(Exception):
    pass


@pytest.fixture(autouse=True)
def _stops_at_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def began(*_: object, **__: object) -> None:
        raise Began

    monkeypatch.setattr(driver, "run_sweep", began)


def filled(out: Path) -> list[Path]:
    """Write what a sweep, a fit and an evaluation leave; return the files."""
    files = [out / "meta" / "_spec.json", out / "model" / "card.json", out / "evaluation" / "main.csv"]
    for path in files:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return files


def test_a_sweep_is_no_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = filled(tmp_path / "runs")
    assert demo.main(["--out", str(tmp_path / "runs")]) == 2
    assert "something other than an earlier demo; name another directory" in capsys.readouterr().err
    assert all(path.read_text() == "{}" for path in files)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="something other"):
        demo.run(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be .*written to"):
        demo.run(tmp_path / "file" / "demo")


def test_an_earlier_demo_is_replaced_and_what_is_not_its_own_stays(tmp_path: Path) -> None:
    out = tmp_path / "new" / "demo"
    with pytest.raises(Began):
        demo.run(out)
    files, own = filled(out), out / "notes.txt"
    own.touch()
    with pytest.raises(Began):
        demo.run(out)
    assert own.exists() and not any(path.parent.exists() for path in files)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Began):
        demo.run(tmp_path / "empty")
