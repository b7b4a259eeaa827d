"""What is said once in a process, however often there is reason to."""

from __future__ import annotations

import logging
from functools import cache


@cache
def log_once(logger: logging.Logger, level: int, line: str) -> None:
    """Log a line at a level of ``logging`` unless this logger has logged it at that level before."""
    logger.log(level, line)
