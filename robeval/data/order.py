"""The one fixed, stratified, shuffled order of a labelled set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SEED = 20200
HOLDOUT_SEED = 20201


def stratified_order(y: Tensor, seed: int = SEED) -> Tensor:
    """A permutation of the rows in which every prefix has nearly the class shares of the whole.

    Inside each class the order is a seeded shuffle; the k-th image of a class of n stands at (k + 1/2) / n of the way.
    For classes of one size every prefix holds each class equally often, up to one image.

    Args:
        y: (N,) class numbers.
        seed: Another number, another order; the default is the order that all subsets use.

    Returns:
        (N,) row numbers. The same on every machine: numpy's RandomState is frozen.
    """
    labels = y.cpu().numpy()
    random = np.random.RandomState(seed)
    place, tie = np.empty(len(labels)), np.empty(len(labels))
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        tie[rows] = random.random_sample(len(rows))  # so that no class always comes first
    return torch.from_numpy(np.lexsort((tie, place)).astype(np.int64))
