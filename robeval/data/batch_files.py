"""The files of a data set that comes as a folder or as a .tar.gz of it, read in place and never unpacked to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from robeval.core.errors import FileRefused

MAX_FILE = 512 * 2**20
MAX_TOTAL = 2**30
MAX_MEMBERS = 1000


def is_tar(path: Path) -> bool:
    """A file whose name says that it is a packed folder."""
    return path.is_file() and path.name.lower().endswith((".tar.gz", ".tgz", ".tar"))


def read_files(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Those of the wanted files that a folder or an archive holds, by name without folders.

    Raises:
        FileRefused: a damaged archive (D02), too large (S07), a path that leads outside (S09), a link or device (S10).
    """
    if is_tar(path):
        try:
            return dict(_members(path, wanted))
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError):
            raise FileRefused(f"{path} is damaged or cut short (tar)", code="D02") from None
    found = {name: path / name for name in wanted if (path / name).is_file()}
    for file in found.values():
        _small(file.stat().st_size, str(file))
    return {name: file.read_bytes() for name, file in found.items()}


def _members(path: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """One pass over the archive; every member is looked at, also those that nobody wants."""
    total = 0
    with tarfile.open(path, "r|*") as archive:
        for count, member in enumerate(archive, 1):
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
                raise FileRefused(f"{path} would write outside its folder: {ascii(member.name)[1:81]}", code="S09")
            if not (member.isreg() or member.isdir()):
                what = f" -> {ascii(member.linkname)[1:61]}" if member.linkname else ""
                raise FileRefused(
                    f"{path} holds a link or device ({ascii(member.name)[1:61]}{what}); refused", code="S10"
                )
            total += member.size
            if total > MAX_TOTAL or count > MAX_MEMBERS:
                raise FileRefused(
                    f"{path} would expand to {total / 1e9:.1f} GB in {count} entries"
                    f" (caps {MAX_TOTAL / 1e9:.1f} GB, {MAX_MEMBERS})",
                    code="S07",
                )
            if member.isreg() and name.name in wanted:
                _small(member.size, f"{path}:{name.name}")
                file = archive.extractfile(member)
                assert file
                data = file.read()
                if len(data) != member.size:
                    raise EOFError
                yield name.name, data


def _small(size: int, path: str) -> None:
    if size > MAX_FILE:
        raise FileRefused(f"{path} has {size / 1e9:.1f} GB, too large for a batch of images", code="S07")
