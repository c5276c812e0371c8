"""Image files in class folders: their names, and one decoded image at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from robeval.core.errors import ContractBroken, FileRefused

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
MAX_SIDE = 8192
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
CHANNELS = {"LA": 2, "PA": 2, "RGBA": 4, "CMYK": 4}
COLOURS = {"rgb": "RGB", "grey": "L"}
#: Images with more pixels are worth a thread; smaller ones spend their time in Python.
LARGE = 128 * 128
#: The shorter side before the centre is cut out, in sizes of the result.
MARGIN = 1.14

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Box: TypeAlias = tuple[float, float, float, float]


def class_names(base: Path) -> list[str]:
    """Names of the class folders, sorted.

    Raises:
        FileRefused: a name that cannot be printed (S11), or no folder at all (D01).
    """
    names = sorted(e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith("."))
    _printable(names)
    if not names:
        raise FileRefused(f"{base} has no class folders", code="D01", do=f"expected CLASS/*.png below {base}")
    return names


def image_files(base: Path) -> list[str]:
    """Names of the image files of one class, sorted.

    Raises:
        FileRefused: a name that cannot be printed (S11).
    """
    names = sorted(e.name for e in os.scandir(base) if e.name.lower().endswith(ENDINGS) and e.is_file())
    _printable(names)
    return names


def _printable(names: list[str]) -> None:
    bad = next((n for n in names if not n.isprintable()), None)
    if bad is not None:
        raise FileRefused(f"unusable file name {bad!a}", code="S11")


@contextmanager
def opened(root: Path, name: str, i: int) -> Iterator[Image.Image]:
    """An image file that nothing has decoded yet; what goes wrong inside is told in one sentence.

    Args:
        root: The folder of the data set.
        name: The file, relative to it.
        i: Number of the image in its split, for messages.

    Raises:
        ContractBroken: broken (D03).
        FileRefused: sides beyond 8192 pixels (S12).
    """
    try:
        with Image.open(root / name) as image:
            if max(image.size) > MAX_SIDE:
                raise FileRefused(
                    f"image {i} claims {image.size[0]}x{image.size[1]} ({name})", code="S12", why=f"cap {MAX_SIDE}"
                )
            yield image
    except Image.DecompressionBombError:
        raise FileRefused(f"image {i} claims too many pixels ({name})", code="S12") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError):
        raise ContractBroken(f"image {i} cannot be read ({name})", code="D03", do="replace or remove it") from None


def decoded(image: Image.Image, name: str, i: int, colour: str) -> Image.Image:
    """Grey or RGB with 8 bits.

    Args:
        image: An opened file.
        name: The file, for messages.
        i: Its number, for messages.
        colour: ``rgb`` or ``grey`` converts grey, RGB and CMYK images; ``auto`` takes grey and RGB as they are.

    Raises:
        ContractBroken: anything else (D04).
    """
    if colour in COLOURS and image.mode in (*MODES, "CMYK"):
        return image.convert(COLOURS[colour])
    if image.mode not in MODES:
        channels = CHANNELS.get(image.mode)
        what = f"has {channels} channels" if channels else f"is of mode {image.mode}"
        raise ContractBroken(f"image {i} {what} ({name})", code="D04", do="convert all to grey or RGB with 8 bits")
    return image.convert(MODES[image.mode])


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The centre of the image, size x size: the shorter side becomes 1.14 size (rounded down), the rest is cut off."""
    short, (width, height) = int(size * MARGIN), image.size
    scale = short / min(width, height)
    width, height = max(short, int(width * scale)), max(short, int(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    return whole.crop((left, top, left + size, top + size))


def cut(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A part of the image, (left, top, right, bottom) in pixels, resized to (width, height)."""
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def each(work: Callable[[int], None], places: Sequence[int], *, threads: bool) -> None:
    """Do all places, several at a time where the images are large: decoding and hashing release Python's lock."""
    workers = min(8, os.cpu_count() or 1, len(places) // 4) if threads else 1
    with warnings.catch_warnings():  # out here, since it is not safe inside a thread
        warnings.simplefilter("ignore")
        if workers < 2:
            for place in places:
                work(place)
            return
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(work, places):
                pass


def as_bytes(image: Image.Image) -> Bytes:
    """(C, H, W) uint8 of a grey or RGB image."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
