"""Where a meta-dataset lies: a folder, or any ``pyarrow.fs`` URI such as ``s3://bucket/runs/paper``.

A folder gets files through a hidden temporary file, an fsync and a rename, and locks through ``flock``. An object store
shows an object whole or not at all by itself and has no locks.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from cape.errors import SpecError, StoreError, first_line
from cape.paths import URI

TEMPORARY = ".tmp"  # folder of half-written files, beside the rows so that no reader lists it
_LOCK = ".lock"

# A temporary file older than this belongs to a process that was killed, not to one that is writing.
ABANDONED_AFTER_S = 3600.0


@dataclass(frozen=True)
class Location:
    """The root of a meta-dataset; all paths that its methods take and return are relative to it, with slashes.

    Attributes:
        target: absolute path of a folder, or a URI.
    """

    target: str

    @classmethod
    def of(cls, where: str | Path | Location) -> Location:
        """Return the location of a path or a URI.

        Raises:
            SpecError: no name, or a URI whose scheme pyarrow does not know.
        """
        if isinstance(where, Location):
            return where
        text = os.fspath(where)
        bare = URI.match(text) and text.rstrip("/").endswith(":")
        if not text or bare or "\0" in text:  # an unset variable's, say: it does not mean the working directory
            raise SpecError(f"{text!r} names no folder; give the path or the URI of a meta-dataset.")
        if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of another encoding, which pyarrow cannot open
            raise SpecError(f"The path {text!r} is not UTF-8 text; choose another name.")
        if not URI.match(text):
            return cls(os.path.abspath(os.path.expanduser(text)))
        if text.startswith("file://"):
            return cls(os.path.abspath(text.removeprefix("file://")))
        found = cls(text.rstrip("/"))
        try:
            found._remote  # noqa: B018  an unknown scheme should fail here, not in a worker
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            reason = _reason(error).replace(found.target, str(found))  # which may hold credentials
            raise SpecError(f"{found} is no place that pyarrow can open: {reason}.") from None
        return found

    def __str__(self) -> str:
        """Return the target without what a URI may hold of credentials."""
        plain = self.target.split("?", 1)[0] if self.folder is None else self.target
        return re.sub(r"://[^/@]*@", "://", plain)

    __repr__ = __str__

    def __reduce__(self) -> tuple[Any, ...]:
        return Location, (self.target,)  # an open file system stays in its process

    @property
    def folder(self) -> Path | None:
        """The folder, or None for a URI."""
        return None if URI.match(self.target) else Path(self.target)

    @cached_property
    def _remote(self) -> tuple[pafs.FileSystem, str]:
        if self.target.startswith("s3://"):
            # A file that is written in one go then takes one request, not the three of a multipart upload.
            known = "&" if "?" in self.target else "?"
            with suppress(pa.ArrowInvalid):  # an early pyarrow does not know the option; what else is wrong, is below
                return pafs.FileSystem.from_uri(f"{self.target}{known}allow_delayed_open=true")
        return pafs.FileSystem.from_uri(self.target)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The file system, for pyarrow."""
        return pafs.LocalFileSystem() if self.folder is not None else self._remote[0]

    def path(self, relative: str = "") -> str:
        """Return the path that ``filesystem`` knows a file by."""
        root = self.target if self.folder is not None else self._remote[1].rstrip("/")
        return f"{root}/{relative}" if relative else root

    def read(self, relative: str) -> bytes | None:
        """Return a file's content, or None where there is no such file."""
        try:
            if self.folder is not None:
                return Path(self.path(relative)).read_bytes()
            with self.filesystem.open_input_stream(self.path(relative)) as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, relative: str = "") -> bool:
        """Return whether there is such a file or folder."""
        return bool(self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound)

    def list(self, relative: str = "", *, recursive: bool = False) -> list[str]:
        """Return the files below a folder, in a stable order, hidden ones too; none where it does not exist."""
        base = self.path(relative)
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=recursive)
        try:
            found = self.filesystem.get_file_info(selector)
        except FileNotFoundError:  # pyarrow forgives a folder that is not there unless it appears just then
            found = self.filesystem.get_file_info(selector)
        prefix = f"{relative}/" if relative else ""
        return sorted(prefix + i.path[len(base) :].lstrip("/") for i in found if i.type == pafs.FileType.File)

    def write(self, relative: str, content: bytes | pa.Buffer, *, durable: bool = True) -> None:
        """Write a file so that it appears whole or not at all, and (``durable``) outlives the machine.

        Raises:
            StoreError: it cannot be written; nothing is left behind.
        """
        try:
            if self.folder is None:
                with self.filesystem.open_output_stream(self.path(relative)) as stream:
                    stream.write(content)
                return
            temporary = self.put_temporary(content, durable=durable)
            self.move(temporary, relative, durable=durable)
        except OSError as error:
            raise self.failure(relative, error) from error

    def put_temporary(self, content: bytes | pa.Buffer, *, durable: bool = True) -> str:
        """Write a hidden temporary file of a folder, flush it to the disk and return its name.

        Raises:
            OSError: it cannot be written; nothing is left behind.
        """
        name = f"{TEMPORARY}/{uuid.uuid4().hex}"
        try:
            os.makedirs(self.path(TEMPORARY), exist_ok=True)
            with open(self.path(name), "xb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError:
            self.delete(name)
            raise
        return name

    def move(self, temporary: str, relative: str, *, durable: bool = True) -> None:
        """Give a temporary file its name, replacing what had it.

        Raises:
            OSError: it cannot be named so; the temporary file is deleted.
        """
        final = self.path(relative)
        try:
            os.makedirs(os.path.dirname(final), exist_ok=True)
            os.replace(self.path(temporary), final)
            if durable:
                sync_folder(os.path.dirname(final))
        except OSError:
            self.delete(temporary)
            raise

    def delete(self, relative: str) -> None:
        """Delete a file; nothing happens where there is none."""
        try:
            if self.folder is not None:
                os.unlink(self.path(relative))
            else:
                self.filesystem.delete_file(self.path(relative))
        except (FileNotFoundError, NotADirectoryError):
            pass

    def delete_tree(self, relative: str) -> None:
        """Delete a folder and all in it that can be deleted; nothing happens where there is none."""
        if self.folder is not None:
            shutil.rmtree(self.path(relative), ignore_errors=True)
        elif self.exists(relative):
            self.filesystem.delete_dir(self.path(relative))

    def remove_abandoned(self) -> int:
        """Delete temporary files that killed processes left behind; return how many."""
        if self.folder is None:
            return 0
        count = 0
        for name in self.list(TEMPORARY):
            try:
                if time.time() - os.stat(self.path(name)).st_mtime > ABANDONED_AFTER_S:
                    os.unlink(self.path(name))
                    count += 1
            except FileNotFoundError:  # its writer finished in between
                continue
        return count

    @contextmanager
    def lock(self, *, exclusive: bool = False, name: str = _LOCK, wait: bool = True) -> Iterator[None]:
        """Hold the folder's lock (shared, or alone) inside the block; an object store has none to hold.

        Raises:
            StoreError: the file system has no locks, the folder cannot be written to, or (``wait`` is False) someone
                else holds the lock.
        """
        if self.folder is None:
            yield
            return
        try:
            os.makedirs(self.target, exist_ok=True)
            handle = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self.failure(name, error) from error
        try:
            how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
            try:
                fcntl.flock(handle, how)
            except BlockingIOError as error:
                raise StoreError(f"Somebody else is at this with {self} just now; try again later.") from error
            except OSError as error:
                raise StoreError(
                    f"The file system of {self} has no file locks ({_reason(error)}); mount it with locks (NFS: not"
                    " 'nolock'), or choose another folder."
                ) from error
            yield
        finally:
            os.close(handle)

    def failure(self, relative: str, error: Exception) -> StoreError:
        """Return the error of a file that cannot be written."""
        named = f"{self}/{relative}"
        reason = _reason(error).replace(self.target, str(self))
        return StoreError(f"Cannot write {named}: {reason}. What was committed before is kept.")


def sync_folder(path: str) -> None:
    """Make the names in a folder outlive the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return first_line(getattr(error, "strerror", None) or error)  # the file is named beside it
