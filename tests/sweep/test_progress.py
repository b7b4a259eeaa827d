"""What one sees of a sweep while it runs."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

from cape.store.location import Location
from cape.sweep.progress import LOG_FILE, Progress, Reporter, clock, status_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines_and_a_terminal_one_line() -> None:
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        line = Progress({"mlp": 6, "cnn": 4}, {"mlp": 5}, stream=stream, every=0.0)
        line.add(4, 12, 0, "mlp")
        line.add(2, 6, 2, "cnn")
        line.close()
    first, *_, last = log.getvalue().splitlines()
    assert first.startswith("9/15 trials, ") and "(mlp 0:00)" in first
    assert last.startswith("11/15 trials, ") and "18 rows, 2 failed, 0:00" in last and "(mlp 0:00, cnn 0:00)" in last
    assert "\r" not in log.getvalue()
    assert terminal.getvalue().count("\n") == 1 and "\r11/15 trials" in terminal.getvalue()


def test_each_family_has_a_time_of_its_own() -> None:
    state = {"done": 30, "total": 100, "ran": 20, "rows": 60, "failed": 0, "seconds": 100.0}
    families = {
        "mlp": {"done": 20, "total": 30, "ran": 10},  # 10 left at 0.1/s
        "cnn": {"done": 10, "total": 70, "ran": 10},
        "rnn": {"done": 5, "total": 5, "ran": 0},
    }
    line = status_line({**state, "families": families})
    assert line == "30/100 trials, 0.20 trials/s, 60 rows, 1:40, 5:50 left (mlp 1:40, cnn 10:00)"
    assert clock(3723) == "1:02:03"


def test_silence_is_silence_and_counting_goes_on() -> None:
    stream = io.StringIO()
    line = Progress({"mlp": 3}, enabled=False, stream=stream, every=0.0)
    line.add(3, 9, 1, "mlp")
    line.close()
    assert stream.getvalue() == ""
    assert (line.trials, line.rows, line.failed) == (3, 9, 1)


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
