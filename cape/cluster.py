"""Whether anyone answers at a Ray cluster's address: Ray itself tries for minutes before it says that nobody does."""

from __future__ import annotations

import re
import socket

from cape.errors import SpecError

_SECONDS = 10.0
_HOST_AND_PORT = re.compile(r"(?:ray://)?(?:\[(?P<six>[^\s\]]+)\]|(?P<host>[^\s/:]+)):(?P<port>\d{1,5})")
_OTHER = re.compile(r"auto|local|(?!https?:)\w+://.*")  # Ray takes clusters of other makes by a module's name


def check_address(address: str | None) -> None:
    """Return where an address names no host and port (``auto``, ``local``, None), or where something listens there.

    Raises:
        SpecError: nothing does, or it is no address.
    """
    named = _HOST_AND_PORT.fullmatch(address or "")
    if named is None:
        if address and not _OTHER.fullmatch(address):
            raise SpecError(f"'{address}' is no Ray cluster's address; it is auto, HOST:PORT or ray://HOST:PORT.")
        return
    try:
        socket.create_connection((named["six"] or named["host"], int(named["port"])), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise SpecError(
            f"There is no Ray cluster at '{address}' ({error}); start one there, or leave the address out."
        ) from error
