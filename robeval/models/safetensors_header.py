"""The header of a safetensors file, checked against the file before anything is loaded."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from robeval.core.errors import FileRefused

MAX_HEADER = 100_000_000
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def _impossible(path: Path, why: str) -> FileRefused:
    return FileRefused(f"{path} has an impossible header", code="M09", why=why)


def read_header(path: Path) -> dict[str, Any]:
    """The header as a dictionary, after comparing every tensor's shape with its bytes and all with the file's length.

    Raises:
        FileRefused: cut short (M04), or a header that cannot be true (M09).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise FileRefused(f"{path} is cut short by {8 - len(first)} bytes", code="M04")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            raise _impossible(path, f"it says that it is {length} bytes long")
        if 8 + length > size:
            raise FileRefused(f"{path} is cut short by {8 + length - size} bytes", code="M04")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _impossible(path, "it is not JSON") from None
    if not isinstance(header, dict):
        raise _impossible(path, "it is not a JSON object")
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = entry["data_offsets"]
            claim = prod(entry["shape"]) * SIZES[entry["dtype"]]
            sane = 0 <= start <= stop and claim == stop - start and all(n >= 0 for n in entry["shape"])
        except (TypeError, KeyError, ValueError):
            sane = False
        if not sane:
            raise _impossible(path, f"tensor {name}: shape and bytes do not agree")
        end = max(end, stop)
    missing = 8 + length + end - size
    if missing > 0:
        raise FileRefused(f"{path} is cut short by {missing} bytes", code="M04")
    return header


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata.

    Raises:
        FileRefused: M04 or M09.
    """
    header = read_header(path)
    metadata = header.get("__metadata__") or {}
    try:
        tensors = load_file(path)
    except Exception as error:
        raise _impossible(path, str(error).splitlines()[0][:120]) from None
    return tensors, {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
