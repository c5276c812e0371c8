"""Street view house numbers, the cropped digits."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from robeval.core.catalogue import dataset
from robeval.core.errors import ContractBroken, FileRefused, UsageError
from robeval.core.images import Images
from robeval.data.arrays import make

MAX_RATIO = 200


@dataset(source="Netzer, Wang, Coates, Bissacco, Wu, Ng 2011, Reading digits in natural images")
def svhn(split: str, *, path: str = "") -> Images:
    """SVHN, cropped digits: 73,257 + 26,032 colour images of 32x32 pixels, 10 classes.

    Read from the MATLAB files ``train_32x32.mat`` and ``test_32x32.mat``, in which the digit 0 has the label 10.

    Args:
        path: The folder of the two files.

    Shapes:
        x (N, 3, 32, 32).
    Cost:
        About 5 seconds; 900 MB for the training images.
    Source:
        Netzer et al. 2011.
    """
    if split not in ("train", "test"):
        raise UsageError(f'svhn has the splits train and test, not "{split}"', code="A04")
    file = Path(path) / f"{split}_32x32.mat"
    if not path or not file.is_file():
        raise FileRefused(f'no {split}_32x32.mat in "{path}"', code="D01", do="write svhn:/folder/of/the/mat/files")
    x, y = _read(file)
    wrong = np.flatnonzero((y < 1) | (y > 10))
    if len(wrong):
        raise ContractBroken(
            f"label {y[wrong[0]]} at image {wrong[0]}, those of SVHN are 1 to 10", code="D10", where=str(file)
        )
    return make(x.transpose(3, 2, 0, 1), y % 10, name=f"svhn/{split}", classes=[str(i) for i in range(10)])


def _read(
    file: Path,
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    """X (32, 32, 3, N) and y (N,), after the header has been compared with the file.

    Raises:
        FileRefused: not MATLAB's format or damaged (D02), other arrays (D01), a bomb (S07).
    """
    from scipy.io import loadmat, whosmat

    try:
        shapes = {name: (shape, kind) for name, shape, kind in whosmat(file)}
    except Exception:  # scipy answers a damaged file with whatever goes wrong first
        raise FileRefused(f"{file} is not a MATLAB 5 file, or damaged", code="D02") from None
    if not {"X", "y"} <= set(shapes):
        raise FileRefused(f"{file} holds no X and y, or is cut short", code="D02")
    (shape, kind), (labels, _) = shapes["X"], shapes["y"]
    if len(shape) != 4 or shape[:3] != (32, 32, 3) or kind != "uint8":
        raise FileRefused(
            f"{file}: X is {'x'.join(map(str, shape))} of {kind}, expected 32x32x3xN of uint8", code="D02"
        )
    if prod(shape) > MAX_RATIO * file.stat().st_size:
        raise FileRefused(
            f"{file} would expand {prod(shape) // file.stat().st_size} times (cap {MAX_RATIO} times)", code="S07"
        )
    if prod(labels) != shape[3]:
        raise ContractBroken(f"{shape[3]} images, {prod(labels)} labels", code="D12", where=str(file))
    try:
        held = loadmat(file, variable_names=["X", "y"])
        x, y = np.asarray(held["X"], dtype=np.uint8), np.asarray(held["y"]).astype(np.int64).reshape(-1)
        return x.reshape(shape), y
    except Exception:
        raise FileRefused(f"{file} is damaged or cut short", code="D02") from None
