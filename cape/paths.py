"""Which paths are URIs, and what lies in folders of this machine alone; no pyarrow is needed to know it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cape.errors import SpecError

URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def local_path(where: str | os.PathLike[str], what: str) -> Path:
    """Return a path of this machine, with ``~`` resolved.

    Args:
        where: the path.
        what: what is read or written there, for the message.

    Raises:
        SpecError: a URI, which ``Path`` would take for a folder ``s3:``; it may hold credentials and is not repeated.
    """
    uri = URI.match(os.fspath(where))
    if uri:
        raise SpecError(f"{what} lies in a local folder and not at a URI ({uri[0]}...); name a path of this machine.")
    return Path(os.path.expanduser(where))
