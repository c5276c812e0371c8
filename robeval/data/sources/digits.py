"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from robeval.core.catalogue import dataset
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.data.order import stratified_order

TEST = 360


@dataset(
    source="Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository;"
    " the 1,797 images of scikit-learn's load_digits",
)
def digits(split: str) -> Images:
    """Handwritten digits, 1,797 grey images of 8x8 pixels, 10 classes: a toy, always at hand.

    Pixels are counts 0 to 16, divided by 16. The split is fixed and stratified: 1,437 images for training, 360 for
    testing; ids count within the split, in the order of scikit-learn.

    Shapes:
        x (N, 1, 8, 8).
    Cost:
        About a second to import scikit-learn.
    Source:
        Alpaydin, Kaynak 1998; scikit-learn's load_digits.
    Departs:
        The original's split by writer is not kept by scikit-learn; this one is random within classes.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise UsageError(f'digits has the splits train and test, not "{split}"', code="A04")
    held = load_digits()
    x = torch.from_numpy((held.images / 16).astype(np.float32))[:, None]
    y = torch.from_numpy(held.target.astype(np.int64))
    order = stratified_order(y)
    rows = (order[:TEST] if split == "test" else order[TEST:]).sort().values
    return Images(x[rows], y[rows], torch.arange(len(rows)), f"digits/{split}", [str(i) for i in range(10)])
