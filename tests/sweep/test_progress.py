"""What one sees of a sweep while it runs."""

from __future__ import annotations

import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from cape.store import claims
from cape.store.location import Location
from cape.sweep.estimate import Pace
from cape.sweep.progress import LOG_FILE, Progress, Reporter, clock, status_line
from cape.sweep.summary import status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines_and_a_terminal_one_line() -> None:
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        line = Progress({"mlp": 6, "cnn": 4}, {"mlp": 5}, stream=stream, every=0.0)
        line.add(4, 12, 0, "mlp", seconds=2.0)
        line.add(2, 6, 2, "cnn", seconds=20.0)
        line.add(2, 6, 0, "cnn", seconds=20.0)
        line.add(2, 6, 0, "mlp", seconds=1.0)
        line.close()
    first, second, *_, last = log.getvalue().splitlines()
    # Nothing was known of either family: the second says what it takes once it has run.
    assert first.startswith("9/15 trials, ") and first.endswith("0:00, more than 0:01 left (mlp 0:01, cnn ?)")
    assert second.endswith("18 rows, 2 failed, 0:00, about 0:21 left (mlp 0:01, cnn 0:20)")
    assert last.startswith("15/15 trials, ") and last.endswith("30 rows, 2 failed, 0:00, done")
    assert "\r" not in log.getvalue()
    assert terminal.getvalue().count("\n") == 1 and "\r15/15 trials" in terminal.getvalue()


def test_a_stream_that_cannot_be_written_to_does_not_stop_a_sweep() -> None:
    class Full(Terminal):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    line = Progress({"mlp": 2}, stream=Full(), every=0.0)
    line.add(1, 3, 0, "mlp")
    line.close()
    assert line.trials == 1


def test_a_line_on_a_terminal_does_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    line = Progress({f"family{i}": 10 for i in range(9)}, stream=terminal, every=0.0)
    line.add(1, 3, 0, "family0", seconds=1.0)
    line.close()
    shown = terminal.getvalue().removeprefix("\r").removesuffix("\x1b[K\n")
    # Where the line is cut depends on the rate's digits, and a space at the cut is not shown.
    assert len(line.line()) > 100 and len(shown) in (38, 39) and shown.startswith("1/90 trials")


def test_a_family_that_has_not_begun_has_an_estimate() -> None:
    """As in a real sweep: hundreds of trials of 0.1 s say nothing of those that take a minute."""
    line = Progress(
        {"mlp": 600, "cnn": 100, "transformer": 50},
        expected={"mlp": 60.0, "cnn": 1000.0, "transformer": 3000.0},
        enabled=False,
    )
    line.workers = 2
    assert line.line().endswith("starting, about 33:50 left (mlp ~0:30, cnn ~8:20, transformer ~25:00)")
    line.add(600, 1800, 0, "mlp", seconds=120.0, expected=60.0)  # this machine takes twice as long as was expected
    assert line.line().endswith("about 1:06:40 left (cnn ~16:40, transformer ~50:00)")
    line.add(10, 30, 0, "cnn", seconds=100.0, expected=100.0)  # but not for these
    state = line.as_dict()
    assert state["families"]["cnn"]["left"] == pytest.approx(450.0)
    assert state["families"]["transformer"]["left"] == pytest.approx(3000 * (220 / 160) / 2)
    assert status_line(state).endswith("(cnn 7:30, transformer ~34:22)")


def test_a_chunk_may_be_counted_while_the_status_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Progress({"mlp": 3, "cnn": 3}, enabled=False)
    line.add(1, 3, 0, "mlp", seconds=1.0, expected=1.0)
    count = threading.Thread(target=line.add, args=(1, 3, 0, "cnn"))
    real = Pace.add

    def meanwhile(*of: Any) -> None:
        if count.ident is None:
            count.start()
            count.join(1.0)
        real(*of)

    monkeypatch.setattr(Pace, "add", meanwhile)
    assert line.as_dict()["ran"] == 1
    count.join()
    assert line.as_dict()["ran"] == 2


def test_the_rate_is_that_of_the_last_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cape.sweep.progress.time.monotonic", lambda: now[0])
    line = Progress({"mlp": 1000, "cnn": 100}, enabled=False)
    for _ in range(10):
        now[0] += 1.0
        line.add(100, 300, 0, "mlp")
    assert line.as_dict()["rate"] == pytest.approx(100.0)
    for _ in range(60):
        now[0] += 10.0
        line.add(1, 3, 0, "cnn")
    assert line.as_dict()["rate"] == pytest.approx(0.1)
    assert clock(3723) == "1:02:03"


def test_silence_is_silence_and_counting_goes_on() -> None:
    stream = io.StringIO()
    line = Progress({"mlp": 3}, enabled=False, stream=stream, every=0.0)
    line.add(3, 9, 1, "mlp")
    line.close()
    assert stream.getvalue() == ""
    assert (line.trials, line.rows, line.failed) == (3, 9, 1)


def test_a_driver_that_was_killed_is_not_said_to_run(tmp_path: Path) -> None:
    run = claims.start_run(tmp_path)
    Reporter(Location.of(tmp_path), run, Progress({"mlp": 3}, {"mlp": 1}, enabled=False))
    assert status(tmp_path).startswith("running (process ")
    held = json.loads((tmp_path / "_run.json").read_text())
    (tmp_path / "_run.json").write_text(json.dumps({**held, "since": "another process's"}))
    assert "killed, or its machine is gone; resume it" in status(tmp_path)


def test_a_driver_that_lives_is_not_said_to_be_killed_however_old_its_last_word(tmp_path: Path) -> None:
    """A disk that is full, say, holds no new word."""
    run = claims.start_run(tmp_path)
    Reporter(Location.of(tmp_path), run, Progress({"mlp": 3}, enabled=False))
    state = json.loads((tmp_path / "_status.json").read_text())
    (tmp_path / "_status.json").write_text(json.dumps({**state, "updated": state["updated"] - 100}))
    assert status(tmp_path).startswith("running (process ") and "1:40 ago" in status(tmp_path)


def test_a_run_leaves_a_status_and_a_log(tmp_path: Path) -> None:
    report = Reporter(Location.of(tmp_path), "abc", Progress({"mlp": 3}, {"mlp": 1}, enabled=False))
    state = json.loads((tmp_path / "_status.json").read_text())
    assert (state["state"], state["done"], state["total"], state["run"]) == ("running", 1, 4, "abc")
    report.chunk({"family": "mlp", "trials": 2, "rows": 6, "failed": 1, "run_seconds": 0.5, "secret": "x"})
    assert pickle.loads(pickle.dumps(report)) is None  # as Tune does with its callbacks
    report.close("failed", "why")
    state = json.loads((tmp_path / "_status.json").read_text())
    assert (state["state"], state["done"], state["failed"], state["error"]) == ("failed", 3, 1, "why")
    events = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "chunk", "failed"]
    assert "secret" not in events[1] and events[1]["trials"] == 2
