"""Folders of image files, one folder a class."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from robeval.core.catalogue import dataset
from robeval.core.errors import ContractBroken, FileRefused
from robeval.core.images import Images
from robeval.data.arrays import make

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
MAX_SIDE = 8192
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
CHANNELS = {"LA": 2, "PA": 2, "RGBA": 4, "CMYK": 4}


@dataset(source="the folder layout of ImageNet and many others")
def folder(split: str, *, path: str = "") -> Images:
    """Images in folders, ``train/CLASS/*.png`` and ``test/CLASS/*.png``; or ``CLASS/*.png`` as a test set alone.

    Classes are numbered in the alphabetical order of the folders of train (of the split itself where there is no
    train). All images must have one size; grey and RGB with 8 bits are read, anything else is refused.

    Args:
        path: The folder.

    Shapes:
        x (N, C, H, W), C 1 or 3.
    Cost:
        About a second for 5,000 small images.
    Source:
        None.
    """
    root = Path(path)
    if not path or not root.is_dir():
        raise FileRefused(f'no folder of images at "{path}"', code="D01", do="write folder:/path/to/folder")
    base = root / split
    if not base.is_dir():
        if split != "test" or (root / "train").is_dir():
            raise FileRefused(f"{root} has no folder {split}/", code="D01", do=f"expected {split}/CLASS/*.png")
        base = root
    classes = class_names(root / "train" if (root / "train").is_dir() else base)
    extra = [c for c in class_names(base) if c not in classes]
    if extra:
        raise ContractBroken(f"class {extra[0]!r} of {base} does not occur in train", code="D10")
    files = [(f, k) for k, name in enumerate(classes) if (base / name).is_dir() for f in image_files(base / name)]
    if not files:
        raise ContractBroken(f"{base} holds no image", code="D13", do=f"expected CLASS/*.png below {base}")
    first = read_image(files[0][0], 0, root)
    x = np.empty((len(files), *first.shape), dtype=np.uint8)
    for i, (file, _) in enumerate(files):
        x[i] = _same(read_image(file, i, root), first, i, file.relative_to(root))
    y = np.array([k for _, k in files])
    return make(x, y, name=f"{root.resolve().name}/{split}", classes=classes)


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


def image_files(base: Path) -> list[Path]:
    """Image files of one class, sorted by name."""
    names = sorted(e.name for e in os.scandir(base) if e.is_file() and e.name.lower().endswith(ENDINGS))
    _printable(names)
    return [base / n for n in names]


def _printable(names: list[str]) -> None:
    bad = next((n for n in names if not n.isprintable()), None)
    if bad is not None:
        raise FileRefused(f"unusable file name {bad!a}", code="S11")


def read_image(file: Path, i: int, root: Path) -> np.ndarray[Any, Any]:
    """One image as (H, W) or (H, W, 3) bytes.

    Raises:
        ContractBroken: broken (D03), or not grey or RGB with 8 bits (D04).
        FileRefused: sides beyond 8192 pixels (S12).
    """
    from PIL import Image

    shown = file.relative_to(root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                if max(image.size) > MAX_SIDE:
                    raise FileRefused(
                        f"image {i} claims {image.size[0]}x{image.size[1]} ({shown})", code="S12", why=f"cap {MAX_SIDE}"
                    )
                if image.mode not in MODES:
                    channels = CHANNELS.get(image.mode)
                    what = f"has {channels} channels" if channels else f"is of mode {image.mode}"
                    raise ContractBroken(
                        f"image {i} {what} ({shown})", code="D04", do="convert all to grey or RGB with 8 bits"
                    )
                return np.asarray(image.convert(MODES[image.mode]))
    except Image.DecompressionBombError:
        raise FileRefused(f"image {i} claims too many pixels ({shown})", code="S12") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError):
        raise ContractBroken(f"image {i} cannot be read ({shown})", code="D03", do="replace or remove it") from None


def _same(image: np.ndarray[Any, Any], first: np.ndarray[Any, Any], i: int, shown: Path) -> np.ndarray[Any, Any]:
    """The image, if its shape is that of the first."""
    if image.shape[:2] != first.shape[:2]:
        sizes = [f"{s.shape[1]}x{s.shape[0]}" for s in (image, first)]
        raise ContractBroken(f"image {i} is {sizes[0]}, the first is {sizes[1]} ({shown})", code="D05")
    if image.ndim != first.ndim:
        raise ContractBroken(
            f"image {i} is {'grey' if image.ndim == 2 else 'RGB'}, the first is not ({shown})", code="D04"
        )
    return image
