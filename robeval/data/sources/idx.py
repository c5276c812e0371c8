"""Folders of IDX files: MNIST and its relatives."""

from __future__ import annotations

from pathlib import Path

from robeval.core.catalogue import dataset
from robeval.core.errors import FileRefused
from robeval.core.images import Images
from robeval.data.arrays import make
from robeval.data.idx_files import find_idx, read_idx

CLOTHES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


@dataset(source="LeCun, Cortes, Burges 1998, The MNIST database of handwritten digits, the IDX file format")
def idx(split: str, *, path: str = "") -> Images:
    """A folder of IDX files, plain or gzipped: MNIST, Fashion-MNIST, KMNIST.

    File names are those of MNIST: train-images-idx3-ubyte, t10k-labels-idx1-ubyte and so on. Class names are the
    numbers of the labels.

    Args:
        path: The folder.

    Shapes:
        x (N, 1, H, W).
    Cost:
        About a second for 60,000 images.
    Source:
        LeCun, Cortes, Burges 1998.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        raise FileRefused(f'no folder of IDX files at "{path}"', code="D01", do="write idx:/path/to/folder")
    x, y = (read_idx(find_idx(folder, split, what)) for what in ("images", "labels"))
    classes = [str(i) for i in range(max(10, int(y.max(initial=0)) + 1))]
    return make(x, y, name=f"{folder.resolve().name}/{split}", classes=classes)


@dataset(source="LeCun, Cortes, Burges 1998, The MNIST database of handwritten digits")
def mnist(split: str, *, path: str = "") -> Images:
    """MNIST, 60,000 + 10,000 grey images of handwritten digits of 28x28 pixels, 10 classes.

    Read from the IDX files, plain or gzipped; ``idx`` reads any other set of this format.

    Args:
        path: The folder of the four files, or one that holds them in ``raw`` or ``MNIST/raw``.

    Shapes:
        x (N, 1, 28, 28).
    Cost:
        About a second.
    Source:
        LeCun, Cortes, Burges 1998.
    """
    inside = [Path(path) / part for part in ("MNIST/raw", "raw", "")]
    folder = next((f for f in inside if path and f.is_dir()), None)
    if folder is None:
        raise FileRefused(f'no folder of MNIST at "{path}"', code="D01", do="write mnist:/path/to/folder")
    x, y = (read_idx(find_idx(folder, split, what)) for what in ("images", "labels"))
    return make(x, y, name=f"mnist/{split}", classes=[str(i) for i in range(10)])


@dataset(source="Xiao, Rasul, Vollgraf 2017, Fashion-MNIST, arXiv:1708.07747")
def fashion_mnist(split: str, *, path: str = "/usr/share/datasets/fashion-mnist") -> Images:
    """Fashion-MNIST, 60,000 + 10,000 grey images of 28x28 pixels, 10 kinds of clothes.

    Read from the folder of Debian's package dataset-fashion-mnist, or from another folder of its IDX files.

    Args:
        path: The folder.

    Shapes:
        x (N, 1, 28, 28).
    Cost:
        About a second.
    Source:
        Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747.
    """
    if not Path(path).is_dir():
        raise FileRefused(
            f"Fashion-MNIST is not at {path}",
            code="D01",
            do="sudo apt-get install dataset-fashion-mnist, or give its folder: fashion-mnist:/path/to/folder",
        )
    x, y = (read_idx(find_idx(Path(path), split, what)) for what in ("images", "labels"))
    return make(x, y, name=f"fashion-mnist/{split}", classes=CLOTHES)
