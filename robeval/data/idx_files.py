"""The IDX format of MNIST and its relatives, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from robeval.core.errors import FileRefused

MAX_RATIO = 200
STEMS = {"train": "train", "test": "t10k"}


def find_idx(folder: Path, split: str, what: str) -> Path:
    """The file of ``images`` or ``labels`` of a split.

    Raises:
        FileRefused: D01.
    """
    digits = {"images": 3, "labels": 1}[what]
    for stem in (STEMS.get(split, split), split):
        for dot in ("-", "."):
            for ending in ("", ".gz"):
                path = folder / f"{stem}-{what}{dot}idx{digits}-ubyte{ending}"
                if path.is_file():
                    return path
    raise FileRefused(
        f"{folder} has no {what} of the {split} split",
        code="D01",
        do=f"expected {STEMS.get(split, split)}-{what}-idx{digits}-ubyte, also with .gz",
    )


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """One IDX file of bytes as a uint8 array.

    Raises:
        FileRefused: not an IDX file (D01), its size differs from its header (D02), or a bomb (S07).
    """
    packed = path.suffix == ".gz"
    size = path.stat().st_size
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        try:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or magic[3] not in (1, 3, 4):
                raise FileRefused(f"{path} is not an IDX file of bytes", code="D01")
            head = file.read(4 * magic[3])
            if len(head) < 4 * magic[3]:
                raise FileRefused(f"{path} is cut short inside its header", code="D02")
            shape = struct.unpack(f">{magic[3]}I", head)
            count = prod(shape)
            if packed and count > MAX_RATIO * size:
                raise FileRefused(f"{path} would expand {count // size} times (cap {MAX_RATIO} times)", code="S07")
            if not packed and 4 + len(head) + count != size:
                raise FileRefused(
                    f"{path}: header says {count} bytes of data, file has {size - 4 - len(head)}", code="D02"
                )
            data = file.read(count + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise FileRefused(f"{path} is damaged or cut short (gzip)", code="D02") from None
    if len(data) != count:
        raise FileRefused(f"{path}: header says {count} bytes of data, file has {len(data)}", code="D02")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
