"""Folders of image files, one folder a class."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from robeval.core.catalogue import dataset
from robeval.core.errors import ContractBroken, FileRefused, UsageError
from robeval.core.images import Images
from robeval.data.image_files import MAX_SIDE, class_names, each, image_files
from robeval.data.streamed import ImageFiles, Streamed

#: Pixels of more than so many bytes (as floating point) stay in their files, unless the user says otherwise.
LOADED = 4 * 2**30


@dataset(source="the folder layout of ImageNet and many others")
def folder(
    split: str,
    *,
    path: str = "",
    size: int = 0,
    stream: bool | None = None,
    colour: Literal["auto", "rgb", "grey"] = "auto",
) -> Images:
    """Images in folders, ``train/CLASS/*.png`` and ``test/CLASS/*.png``; or ``CLASS/*.png`` as a test set alone.

    Classes are numbered in the alphabetical order of the folders of train (of the split itself where there is no
    train); ``val/`` stands in for a missing ``test/``. Small sets are loaded whole; of large ones only the rows that
    are asked for are read, by several threads, and up to 1 GiB of decoded images is kept. The pixels are the same
    either way, the fingerprint is not: that of a streamed set covers names, sizes and contents of the files (contents
    of 1,000 of them where there are over 10,000).

    Args:
        path: The folder.
        size: Side of square images: the shorter side is resized to 1.14 times that (rounded down) and the centre is cut
            out. 0 reads images as they are, which must then have one size.
        stream: Leave the pixels in the files; none does so above 4 GiB of floating-point pixels.
        colour: ``rgb`` or ``grey`` converts grey, RGB and CMYK; ``auto`` reads grey or RGB with 8 bits, whichever the
            first image is, and refuses the rest.

    Shapes:
        x (N, C, H, W), C 1 or 3.
    Cost:
        About a second for 5,000 small images; streamed, the same when the rows are first asked for.
    Source:
        Resize and centre cut: Finlay, Oberman 2019, arXiv:1905.11468, ImageNet validation.
    """
    root = Path(path)
    if not path or not root.is_dir():
        raise FileRefused(f'no folder of images at "{path}"', code="D01", do="write folder:/path/to/folder")
    if not 0 <= size <= MAX_SIDE:
        raise UsageError(f"size of folder must be 0 to {MAX_SIDE}, got {size}", code="A04")
    base = _base(root, split)
    classes = class_names(root / "train" if (root / "train").is_dir() else base)
    extra = [c for c in class_names(base) if c not in classes]
    if extra:
        raise ContractBroken(f"class {extra[0]!r} of {base} does not occur in train", code="D10")
    here = "" if base == root else f"{base.name}/"
    found = {k: image_files(base / name) for k, name in enumerate(classes) if (base / name).is_dir()}
    names = [f"{here}{classes[k]}/{n}" for k, files in found.items() for n in files]
    if not names:
        raise ContractBroken(f"{base} holds no image", code="D13", do=f"expected CLASS/*.png below {base}")
    y = np.repeat(np.array(list(found), dtype=np.int64), [len(f) for f in found.values()])
    files, name = ImageFiles(root, names, size, colour), f"{root.resolve().name}/{base.name if here else split}"
    if stream is None:
        stream = 4 * len(names) * prod(files.shape) > LOADED
    x = Streamed(files) if stream else _all(files)
    return Images(x, torch.from_numpy(y), torch.arange(len(y)), name, classes)


def _base(root: Path, split: str) -> Path:
    """The folder of class folders of a split.

    Raises:
        FileRefused: it is not there (D01).
    """
    if (root / split).is_dir():
        return root / split
    if split == "test" and (root / "val").is_dir():
        return root / "val"
    if split != "test" or (root / "train").is_dir():
        raise FileRefused(f"{root} has no folder {split}/", code="D01", do=f"expected {split}/CLASS/*.png")
    return root


def _all(files: ImageFiles) -> torch.Tensor:
    """Every image, (N, C, H, W)."""
    files.room = 0  # the result is kept, not its parts
    x = np.empty((len(files.names), *files.shape), dtype=np.uint8)

    def one(i: int) -> None:
        x[i] = files.read(i)

    each(one, range(len(x)), threads=files.large)
    return torch.from_numpy(x).float().div_(255)
