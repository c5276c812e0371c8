"""Data sets by a short text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from robeval.core import catalogue
from robeval.core.errors import FileRefused, UsageError, unknown
from robeval.core.images import Images
from robeval.data.batch_files import is_tar

#: File names that tell a published set.
PUBLISHED = (
    (r"cifar-100-(python|binary)", "cifar100"),
    (r"cifar-10-(batches-py|batches-bin|python|binary)", "cifar10"),
    (r"data_batch_1(\.bin)?$|test_batch(\.bin)?$", "cifar10"),
    (r"fine_label_names\.txt$", "cifar100"),
    (r"(train|test)_32x32\.mat$", "svhn"),
)


def load(text: str, split: str = "test") -> Images:
    """One split of a data set.

    Args:
        text: ``digits``, ``fashion-mnist``, ``cifar10:/folder``, ``svhn:/folder``, ``idx:/folder``, ``npz:/file.npz``,
            ``folder:path=/folder,size=224``, ``blobs:count=200,noise=0.05``, or just a path whose kind is told by what
            it holds.
        split: ``train`` or ``test``.

    Returns:
        The whole split in file order, ids 0 to N - 1.
    Raises:
        UsageError: unknown data set or setting, with the closest names (exit 2).
        FileRefused: missing, damaged or hostile files (D01, D02, S01, S07 to S12; exit 3).
        ContractBroken: pixels or labels that cannot be used (D03 to D13; exit 4).
    """
    name, colon, rest = text.partition(":")
    known = {n.replace("_", "-"): n for n in catalogue.methods("data")}
    source = known.get(name.strip().replace("_", "-"))
    settings: dict[str, Any] = {}
    if source is None:
        source, settings = _told(text, sorted(known))
    elif colon and re.match(r"\w+=", rest):
        settings = catalogue.parse("data", text).settings
    elif colon:
        settings = {"path": rest}
    method = catalogue.find("data", source)
    images: Images = method.load()(split, **method.bind(settings))
    return images


def _told(text: str, known: list[str]) -> tuple[str, dict[str, Any]]:
    """The source for a bare path.

    Raises:
        FileRefused: no such path, or one that holds nothing known (D01).
        UsageError: a word that is neither a data set nor a path.
    """
    path = Path(text)
    source = _published(path)
    if source:
        return source, {"path": text}
    if path.is_dir():
        if any(re.search(r"-images[-.]idx3-ubyte(\.gz)?$", f.name) for f in path.iterdir()):
            return "idx", {"path": text}
        if any(f.is_dir() for f in path.iterdir()):
            return "folder", {"path": text}
        raise FileRefused(f"{path} holds neither IDX files nor class folders", code="D01")
    if path.is_file():
        if path.suffix == ".npz" or _starts_as_zip(path):
            return "npz", {"path": text}
        raise FileRefused(
            f"{path} is not a data set that robeval reads",
            code="D01",
            do="give an .npz file, a folder or CIFAR's .tar.gz",
        )
    if path.suffix or "/" in text or ":" in text:
        raise FileRefused(f"no data at {text}", code="D01", do=f"a path, or one of: {', '.join(known)}")
    error: UsageError = unknown("data set", text, known)
    raise error


def _published(path: Path) -> str:
    """The source of a folder or archive that has its authors' file names, or an empty text."""
    if path.is_file():
        names = {path.name} if is_tar(path) else set()
    else:
        names = {f.name for f in path.iterdir()} if path.is_dir() else set()
    for pattern, source in PUBLISHED:
        if any(re.match(pattern, name) for name in names):
            return source
    if {"meta", "train", "test"} <= names and (path / "train").is_file():  # the python version of CIFAR-100
        return "cifar100"
    return ""


def _starts_as_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
