"""Whether anyone answers at a Ray cluster's address: Ray itself tries for minutes before it says that nobody does."""

from __future__ import annotations

import re
import socket

from cape.errors import SpecError

_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>[^\s/:]+):(?P<port>\d{1,5})")


def check_address(address: str | None) -> None:
    """Return where an address names no host and port (``auto``, ``local``, None), or where something listens there.

    Raises:
        SpecError: nothing does.
    """
    named = _HOST_AND_PORT.fullmatch(address or "")
    if named is None:
        return
    try:
        socket.create_connection((named["host"], int(named["port"])), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise SpecError(
            f"There is no Ray cluster at '{address}' ({error}); start one there, or leave the address out."
        ) from error
