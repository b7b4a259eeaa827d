"""One line that says how far a sweep is."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


class Progress:
    """Print ``done/total`` trials, their rate, rows, failures and the time left.

    On a terminal the line is rewritten in place; elsewhere a line is printed every ``every`` seconds and at the end.

    Args:
        total: trials to run now.
        before: trials that were done before.
        enabled: print at all.
        stream: standard error where None.
        every: seconds between lines (a tenth of a second on a terminal).
    """

    def __init__(
        self, total: int, before: int = 0, *, enabled: bool = True, stream: TextIO | None = None, every: float = 10.0
    ) -> None:
        self._total, self._before, self._enabled = total, before, enabled
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._began = self._shown = time.monotonic()
        self.trials = self.rows = self.failed = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the stream behind: Tune writes its callbacks to the disk, and a stream cannot be written."""
        return {name: value for name, value in vars(self).items() if name != "_stream"} | {"_enabled": False}

    def add(self, trials: int, rows: int, failed: int) -> None:
        """Count a committed chunk."""
        self.trials += trials
        self.rows += rows
        self.failed += failed
        if time.monotonic() - self._shown >= self._every:
            self._show()

    def close(self) -> None:
        """Print the last state and end the line."""
        self._show()
        if self._enabled and self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def line(self) -> str:
        """Return the line."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self.trials / seconds
        left = f"{_clock((self._total - self.trials) / rate)} left" if self.trials else "starting"
        done, total = self._before + self.trials, self._before + self._total
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{done}/{total} trials, {rate:.2f} trials/s, {self.rows} rows{failed}, {_clock(seconds)}, {left}"

    def _show(self) -> None:
        if not self._enabled:
            return
        self._shown = time.monotonic()
        text = f"\r{self.line()}\x1b[K" if self._terminal else f"{self.line()}\n"
        self._stream.write(text)
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
