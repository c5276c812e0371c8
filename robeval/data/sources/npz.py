"""numpy archives of images and labels."""

from __future__ import annotations

import io
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from robeval.core.catalogue import dataset
from robeval.core.errors import FileRefused
from robeval.core.images import Images
from robeval.data.arrays import labels, make

MAX_RATIO = 200
MAX_BYTES = 16 * 2**30
IMAGE_KEYS = ("x_{split}", "{split}_images", "x", "images", "X", "data")
LABEL_KEYS = ("y_{split}", "{split}_labels", "y", "labels", "Y", "targets")


@dataset(source="numpy, the NPZ archive format")
def npz(split: str, *, path: str = "") -> Images:
    """An ``.npz`` archive with images and labels.

    Keys are x_train, y_train, x_test, y_test (or train_images, train_labels, ...); a file with only x and y is a test
    set. Pixels are uint8, or floating point in [0, 1]; layouts (N, H, W), (N, C, H, W) and (N, H, W, C) are told apart
    by the axis of 1 or 3 channels. The optional key ``classes`` holds class names.

    Args:
        path: The file.

    Shapes:
        x (N, C, H, W).
    Cost:
        The file is unpacked in memory.
    Source:
        None.
    """
    file = Path(path)
    if not path or not file.is_file():
        raise FileRefused(f'no .npz file at "{path}"', code="D01", do="write npz:/path/to/file.npz")
    with open_archive(file) as archive:
        names = {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
        x_key, y_key = (_key(names, keys, split, file) for keys in (IMAGE_KEYS, LABEL_KEYS))
        x, y = (read_entry(archive, names[key], file) for key in (x_key, y_key))
        classes = [str(c) for c in read_entry(archive, names["classes"], file)] if "classes" in names else None
        if classes is None:  # both splits have one list of classes, whichever labels occur in them
            found = [labels(read_entry(archive, n, file), file.stem) for k, n in names.items() if k in _all_labels()]
            classes = [str(i) for i in range(max(int(t.max(initial=-1)) for t in found) + 1)]
    return make(x, y, name=f"{file.stem}/{split}", classes=classes)


def _all_labels() -> set[str]:
    return {key.format(split=split) for key in LABEL_KEYS for split in ("train", "test")}


def _key(names: dict[str, str], keys: tuple[str, ...], split: str, file: Path) -> str:
    """The first of the keys that the archive has; the bare ones stand for the test split only."""
    wanted = [key.format(split=split) for key in keys if "{" in key or split == "test"]
    found = next((key for key in wanted if key in names), None)
    if found is None:
        held = ", ".join(sorted(names)[:8]) or "nothing"
        raise FileRefused(f"{file} has no {wanted[0]} for the {split} split", code="D01", why=f"it holds {held}")
    return found


def open_archive(file: Path) -> zipfile.ZipFile:
    """The archive, if it is one and no bomb.

    Raises:
        FileRefused: D01, D02 or S07.
    """
    size = file.stat().st_size
    if not size:
        raise FileRefused(f"{file} is empty (0 bytes)", code="D02")
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        with open(file, "rb") as opened:
            cut = opened.read(2) == b"PK"
        what = "is cut short: the zip directory is missing" if cut else "is not an .npz archive"
        raise FileRefused(f"{file} {what}", code="D02" if cut else "D01") from None
    total = sum(e.file_size for e in archive.infolist())
    if total > MAX_RATIO * size or total > MAX_BYTES:
        raise FileRefused(
            f"{file} would expand {total / size:.0f} times to {total / 1e9:.1f} GB"
            f" (caps {MAX_RATIO} times, {MAX_BYTES / 1e9:.0f} GB)",
            code="S07",
        )
    return archive


def read_entry(archive: zipfile.ZipFile, name: str, file: Path) -> np.ndarray[Any, Any]:
    """One array, after its header has been compared with the bytes behind it.

    Raises:
        FileRefused: Python objects (S08), a header that claims more than there is (D02), damage (D02).
    """
    try:
        data = archive.read(name)
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception:
        raise FileRefused(f"{file} is damaged: {name} cannot be read", code="D02") from None
    if dtype.hasobject:
        raise FileRefused(f"{file} holds Python objects; refused", code="S08", where=name)
    claim, have = prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if claim != have:
        raise FileRefused(f"{file}: header of {name} says {claim} bytes, file has {have}", code="D02")
    stream.seek(0)
    array: np.ndarray[Any, Any] = np.load(stream, allow_pickle=False)
    return array
