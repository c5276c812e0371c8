"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from robeval.core.errors import MachineError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write through a temporary name in the same folder, flush to disk, rename, flush the folder.

    Args:
        path: The final name.
        write: Writes the content to the path that it is given.

    Raises:
        MachineError: disk full, read-only or no rights; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(
            f"cannot write {path.name}: {error.strerror or error}",
            code="E03",
            where=str(path.parent),
            why="everything written before is safe",
            do="free space or choose another --out, and run the same command again",
        ) from None


def write_json(path: Path, document: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(document, indent=1, default=str))


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_whole(path, lambda p: _text(p, text))


def make_folder(folder: Path) -> None:
    """A folder and its parents.

    Raises:
        MachineError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"cannot make {folder}: {error.strerror}", code="E03", do="choose a writable folder with --out"
        ) from None


def lock(path: Path) -> IO[bytes]:
    """Hold a file for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        MachineError: another process holds it.
    """
    import fcntl

    handle = path.open("ab")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise MachineError(
            "another robeval is working on this run",
            code="E04",
            where=str(path.parent),
            do="wait for it, or use --shard",
        ) from None
    return handle


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
