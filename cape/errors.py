"""The few errors that CAPE raises on purpose.

Every message is one clear sentence followed by what to do next. The command line prints it without a
traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CapeError(Exception):
    """Base of every error that CAPE raises on purpose."""


class SpecError(CapeError, ValueError):
    """A configuration, an argument or a name is wrong."""


class DataError(CapeError, ValueError):
    """A dataset is missing, empty, corrupt or does not fit the task."""


class ModelError(CapeError, ValueError):
    """A model or batch cannot be probed or trained: NaN outputs, samples that interact, an empty batch."""


class StoreError(CapeError, RuntimeError):
    """A sweep directory, meta-dataset or model directory is not what it should be."""


class DependencyError(CapeError, ImportError):
    """An optional library is missing; the message names the extra to install."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of what an error of somebody else's code says, or of that text, without its full stop."""
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""
