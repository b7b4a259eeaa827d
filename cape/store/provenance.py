"""Where rows come from: what the schema metadata of every chunk says beside its version."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from cape.config import SweepSpec

REVISION_FILE = "_revision.txt"  # in a wheel that `cape submit` made: the checkout is not there to ask


def provenance(spec: SweepSpec) -> dict[str, str]:
    """Return what is known of a sweep's rows before any worker runs; a worker adds its device.

    Nothing here comes from the environment or the command line: neither can leak a secret into the data.
    """
    return {
        "spec_hash": spec.spec_hash,
        "precision": spec.precision,
        "git_revision": git_revision(),
        "torch_version": torch.__version__,
    }


@lru_cache(maxsize=1)
def git_revision() -> str:
    """Return the commit that the package was taken from, ``+changes`` where files differ from it, or ``unknown``."""
    package = Path(__file__).resolve().parents[1]
    written = package / REVISION_FILE
    if written.is_file():
        return written.read_text().strip()
    if not (package.parent / ".git").exists():  # installed into somebody else's repository, perhaps
        return "unknown"
    try:
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit


def _git(where: Path, *arguments: str) -> str:
    command = ["git", "-C", str(where), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
