"""The one line that says how far a sweep is."""

from __future__ import annotations

import io

from cape.sweep.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines_and_a_terminal_one_line() -> None:
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        line = Progress(10, before=5, stream=stream, every=0.0)
        line.add(4, 12, 0)
        line.add(6, 18, 2)
        line.close()
    assert log.getvalue().splitlines()[-1].startswith("15/15 trials, ")
    assert "30 rows, 2 failed, 0:00" in log.getvalue()
    assert "\r" not in log.getvalue()
    assert terminal.getvalue().count("\n") == 1 and "\r15/15 trials" in terminal.getvalue()


def test_silence_is_silence_and_counting_goes_on() -> None:
    stream = io.StringIO()
    line = Progress(3, enabled=False, stream=stream, every=0.0)
    line.add(3, 9, 1)
    line.close()
    assert stream.getvalue() == ""
    assert (line.trials, line.rows, line.failed) == (3, 9, 1)
