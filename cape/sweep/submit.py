"""Run ``cape`` commands as Ray jobs on a cluster, from a machine that need not be part of it.

The package travels as a wheel whose version holds the hash of its content (Ray keeps wheels by name: a rebuilt wheel of
the same name would run the old code). The job's id is the hash of the plan and the place it writes to: to submit twice
is to attach to the job that runs. One that is over runs again, as the same id with the next number behind it: Ray gives
an id once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import os
import re
import shlex
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cape
from cape.errors import DependencyError, SpecError, StoreError
from cape.jsonconfig import stable_hash
from cape.store.provenance import REVISION_FILE, git_revision
from cape.sweep.plan import read_spec

Parse = Callable[[Sequence[str]], argparse.Namespace]

COMMANDS = ("sweep", "fit", "evaluate")
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(
    command: str, arguments: Sequence[str], address: str, parse: Parse, *, ship: bool = True, follow: bool = True
) -> str:
    """Submit a command as a Ray job, or attach to the job that already runs it; return the job's id.

    Args:
        command: one of ``COMMANDS``.
        arguments: what follows the command on the command line. Paths must exist on the cluster; a spec file is sent.
        address: of the job server, e.g. ``http://127.0.0.1:8265``.
        parse: what the command line says, as the job will read it (``cape.cli``'s parser).
        ship: send this package as a wheel; False where every node has CAPE installed.
        follow: print the job's log and return when it is over.

    Raises:
        SpecError: an unknown command, arguments that it does not take, a spec that is none, or an address that cannot
            be reached.
        StoreError: the job failed or was stopped.
    """
    if command not in COMMANDS:
        raise SpecError(f"'{command}' cannot be submitted; choose one of {', '.join(COMMANDS)}.")
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="cape-submit-") as folder:
        name, entrypoint = _prepare(command, list(arguments), parse, Path(folder))
        times = _times(client, name)
        running = [job for job in times.values() if job[1] not in _OVER]
        if running:
            ((job_id, state), *_) = running
            print(f"{job_id} is there already ({state}); attaching.", file=sys.stderr)
        else:
            job_id = f"{name}-{max(times) + 1}" if times else name
            runtime: dict[str, Any] = {"working_dir": f"{folder}/job"}
            if ship:
                runtime["py_modules"] = [str(build_wheel(Path(folder)))]
            client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime)
            print(f"submitted {job_id}", file=sys.stderr)
    if follow:
        _follow(client, job_id)
    return job_id


def _prepare(command: str, arguments: list[str], parse: Parse, folder: Path) -> tuple[str, str]:
    """Return the id of the first such job and its command line; put what it finds beside it into ``folder/job``."""
    job = folder / "job"
    job.mkdir()
    (job / "README").write_text("files of a CAPE job\n")  # Ray sends no empty folder
    parsed = parse([command, *arguments])
    extra: list[str] = []
    if command == "sweep":
        if arguments[0] != parsed.spec or not parsed.out:
            raise SpecError("A sweep needs a spec and a place to write to: cape submit sweep SPEC --out DIR.")
        spec = read_spec(arguments[0])
        (job / "spec.json").write_text(spec.to_json(indent=2))
        arguments = ["spec.json", *arguments[1:]]
        extra = ["--address", "auto", "--resume"]
        name = f"{spec.spec_hash}-{stable_hash(parsed.out, 6)}"
    else:
        extra = ["--address", "auto"] if command == "fit" else []
        name = stable_hash([command, *arguments])
    line = ["python", "-m", "cape.cli", command, *extra, *arguments]
    return f"cape-{command}-{name}", shlex.join(line)


def status(address: str, job_id: str | None = None) -> list[tuple[str, str, str]]:
    """Return (id, state, message) of CAPE's jobs, or of one.

    Raises:
        SpecError: the address cannot be reached, or there is no such job.
    """
    client = connect(address)
    jobs = [j for j in client.list_jobs() if j.submission_id and j.submission_id.startswith("cape-")]
    found = [(j.submission_id, str(j.status.value), " ".join((j.message or "").split())) for j in jobs]
    if job_id is None:
        return sorted(found)
    one = [job for job in found if job[0] == job_id]
    if not one:
        raise SpecError(f"There is no job '{job_id}' at {_plain(address)}; `cape status` lists them.")
    return one


def stop(address: str, job_id: str, timeout: float = 60.0) -> str:
    """Stop a job (SIGTERM: it ends as after Ctrl-C, with every chunk committed) and return its last state."""
    status(address, job_id)
    client = connect(address)
    client.stop_job(job_id)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        state = _state(client, job_id)
        if state in _OVER:
            return str(state)
        time.sleep(0.2)
    raise StoreError(f"The job {job_id} has not stopped within {timeout:g} s; ask again with `cape status`.")


def connect(address: str) -> Any:
    """Return a client of the job server.

    Raises:
        SpecError: it cannot be reached, or does not accept our token.
    """
    try:
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise DependencyError("Ray is not installed; run pip install 'ray[default]'.") from error
    if urlsplit(address).scheme not in ("http", "https"):
        raise SpecError(
            f"The job server's address begins with http:// or https://, e.g. http://127.0.0.1:8265, not"
            f" '{_plain(address)}'."
        )
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
        return client
    except (ConnectionError, RuntimeError, OSError, RayError) as error:
        text = " ".join(str(error).split()).replace(address, _plain(address))
        if any(word in text.lower() for word in ("unauthorized", "authentication", "401", "403", "forbidden", "token")):
            raise SpecError(
                f"The job server at {_plain(address)} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to"
                " the file that the cluster uses."
            ) from None
        raise SpecError(f"There is no job server at {_plain(address)}: {text[:200]}") from None


def _plain(address: str) -> str:
    """Return an address without a user name or password in it."""
    return address.split("://")[0] + "://" + address.split("://")[-1].rsplit("@", 1)[-1]


def _times(client: Any, name: str) -> dict[int, tuple[str, str]]:
    """Return (id, state) of every time that a job was submitted, by its number."""
    found = {}
    for job in client.list_jobs():
        matched = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or "")
        if matched:
            found[int(matched[1] or 1)] = (job.submission_id, str(job.status.value))
    return found


def _state(client: Any, job_id: str) -> str | None:
    return next((str(j.status.value) for j in client.list_jobs() if j.submission_id == job_id), None)


def _follow(client: Any, job_id: str) -> None:
    """Print a job's log until it is over; Ctrl-C lets go of it and leaves it running."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    try:
        while _state(client, job_id) not in _OVER:
            asyncio.run(tail())
            time.sleep(0.2)
    except KeyboardInterrupt:
        print(f"\n{job_id} goes on; `cape stop {job_id}` ends it.", file=sys.stderr)
        raise
    info = client.get_job_info(job_id)
    if str(info.status.value) != "SUCCEEDED":
        message = " ".join((info.message or "").split())[-300:]
        raise StoreError(f"The job {job_id} ended as {info.status.value}: {message}")


def build_wheel(folder: Path) -> Path:
    """Write this package, as it is installed here, as a wheel and return it; no compiler, no index, no dependencies.

    The version is ``<version>+<hash of the content>``; the revision that the rows' provenance names has the same hash.
    """
    package = Path(cape.__file__).resolve().parent
    files = {
        f"cape/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".tmp")
    }
    digest = hashlib.blake2b(digest_size=6)
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    content_hash = digest.hexdigest()
    files[f"cape/{REVISION_FILE}"] = f"{git_revision()} wheel.{content_hash}\n".encode()
    native = any(name.endswith(".so") for name in files)
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"{python}-{python}-{platform}" if native else "py3-none-any"
    version = f"{cape.__version__}+{content_hash}"
    info = f"cape-{version}.dist-info"
    pure = "false" if native else "true"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: cape\nVersion: {version}\n".encode()
    wheel = f"Wheel-Version: 1.0\nGenerator: cape\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
    files[f"{info}/WHEEL"] = wheel.encode()
    record = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"cape-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))  # the same content is the same file
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def default_address() -> str:
    """Return the job server's address from ``RAY_API_SERVER_ADDRESS`` (Ray's own name for it), else loopback."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
