"""Files that are either whole or absent, and the lock that keeps two writers apart."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import IO

from robeval.core.errors import MachineError

try:
    import fcntl
except ImportError:  # no such locks on Windows: the check for a second writer is left out there
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BUSY = (errno.EACCES, errno.EAGAIN)
_held: dict[tuple[int, str], IO[bytes]] = {}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, tag: str = "") -> None:
    """Write a file so that nobody ever sees a part of it: temporary name, fsync, rename, fsync of the folder.

    Args:
        tag: Ends the temporary name, ``.NAME.TAG.tmp``; a writer removes what its own tag left behind.

    Raises:
        OSError: nothing was written then, or the file is whole but was not made durable.
    """
    temp = path.parent / f".{path.name}.{tag or os.getpid()}.tmp"
    temp.unlink(missing_ok=True)
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def cannot_write(error: OSError, where: Path, safe: str = "") -> MachineError:
    """The error for a disk that is full, read-only or over its quota.

    Args:
        safe: What was saved before, such as ``412 records``.
    """
    what = "disk full" if error.errno in _FULL else f"cannot write: {error.strerror or error}"
    return MachineError(
        what + (f" after {safe}; all of them are safe" if safe else ""),
        code="E03",
        where=str(where),
        do="free space or choose another folder, then give the same command again",
    )


def make_folder(folder: Path) -> None:
    """A folder and its parents.

    Raises:
        MachineError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, folder) from None


class Lock:
    """The right to write one shard of a run, held until :meth:`release` or the end of the process, however it ends.

    Stores of the same process share it. Where the file system has no locks, nobody is kept out.
    """

    def __init__(self, path: Path):
        self.key = (os.getpid(), str(path.resolve()))
        self.path = path

    def taken(self) -> bool:
        """This process has it already."""
        return self.key in _held

    def acquire(self, patience: float = 0.0) -> bool:
        """True when this process has it now; False when another one still does after ``patience`` seconds."""
        if self.taken() or fcntl is None:
            return True
        deadline = time.monotonic() + patience
        file = open(self.path, "ab")  # noqa: SIM115 - open as long as the lock is held
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _BUSY and time.monotonic() < deadline:
                    time.sleep(0.05)  # a reader that tidies up holds it for a moment only
                    continue
                file.close()
                return error.errno not in _BUSY
            _held[self.key] = file
            return True

    def release(self) -> None:
        file = _held.pop(self.key, None)
        if file is not None:
            file.close()
