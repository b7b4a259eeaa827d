"""What is said beside the results: some things once in a process, and how far something long is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

_EVERY_S = 10.0  # as a sweep's lines in a file
T = TypeVar("T")


@cache
def log_once(logger: logging.Logger, level: int, line: str) -> None:
    """Log a line at a level of ``logging`` unless this logger has logged it at that level before."""
    logger.log(level, line)


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield items and say on standard error, every ten seconds, how many are through; nothing where all take less."""
    shown = time.monotonic()
    for through, item in enumerate(items):
        if time.monotonic() - shown >= _EVERY_S:
            shown = time.monotonic()
            print(f"{through}/{total} {what}", file=sys.stderr, flush=True)
        yield item
