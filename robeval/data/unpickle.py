"""Pickles of plain values and numpy arrays, read without running anything that they name.

An unpickler calls what a file tells it to call. This one knows four names, all of numpy's arrays, and answers each with
a record of its arguments; numpy itself sees nothing but a finished buffer whose length has been compared with its
shape. Every other name is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from robeval.core.errors import FileRefused

KINDS = {"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}


class _Dtype:
    """What a pickle says about a type of numbers, such as ``i8`` and ``<``."""

    def __init__(self, kind: Any = "", *_: Any) -> None:
        self.kind, self.order = kind, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """What a pickle says about an array: shape, type, column order, bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name:
    """What a name in a pickle stands for: it can be called, and nothing in the file can change it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a name has no state")


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", raw)
    return array


def _latin1(text: Any, coding: Any = "latin1") -> bytes:
    """Bytes as Python 3 writes them in the older protocols: as text, with this name to turn it back."""
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise ValueError("bytes in another coding")
    return text.encode("latin1")


NAMES: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _latin1,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    """The one written in Python: it grows with what a file holds, not with the places that it names."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in NAMES:
            raise FileRefused(f"{self.path} wants to run {_shown(full)} when loaded; refused", code="S01")
        return _Name(NAMES[full])


def _shown(name: str) -> str:
    return name[:80] if name.isprintable() else ascii(name[:80])


def unpickle(data: bytes, path: str) -> dict[str, Any]:
    """The dictionary of a batch file; keys as text, arrays as numpy arrays, everything else as it is.

    Args:
        data: The whole file.
        path: Its name, for messages.

    Raises:
        FileRefused: a name other than numpy's (S01), damage (D02), or no dictionary (D01).
    """
    try:
        held = _Unpickler(data, path).load()
    except FileRefused:
        raise
    except Exception:  # a damaged pickle fails in any way
        raise FileRefused(f"{path} is damaged or cut short", code="D02") from None
    if not isinstance(held, dict):
        raise FileRefused(f"{path} holds no dictionary of images and labels", code="D01")
    keys = {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in held.items()}
    return {k: _array(v, path) if isinstance(v, _Array) else v for k, v in keys.items()}


def _array(found: _Array, path: str) -> np.ndarray[Any, Any]:
    """The array that a record describes.

    Raises:
        FileRefused: another type than whole numbers, or more or fewer bytes than its shape says (D02).
    """
    try:
        _, shape, dtype, fortran, raw = found.state
        shape, raw = tuple(int(n) for n in shape), raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        kind, order = str(dtype.kind), str(dtype.order)
    except (TypeError, ValueError, AttributeError):
        raise FileRefused(f"{path} is damaged: an array in it is not described", code="D02") from None
    if kind not in KINDS or order not in ("|", "<", ">", "="):
        raise FileRefused(f"{path} holds an array of {_shown(kind)}, expected whole numbers", code="D02")
    claim = prod(shape) * int(kind[1])
    if min(shape, default=0) < 0 or claim != len(raw):
        raise FileRefused(f"{path}: an array in it claims {claim} bytes and has {len(raw)}", code="D02")
    flat = np.frombuffer(raw, np.dtype((">" if order == ">" else "<") + kind))
    return flat.reshape(shape, order="F" if fortran else "C")
