"""Arrays from files as `Images`: pixel scale, layout and labels are settled here, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from robeval.core.errors import ContractBroken
from robeval.core.images import Images

MAX_CLASSES = 100_000


def make(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], *, name: str, classes: Sequence[str] | None) -> Images:
    """Images of a whole split, ids 0 to N - 1.

    Args:
        x: (N, H, W), (N, C, H, W) or (N, H, W, C); uint8, or floating in [0, 1].
        y: (N,) or (N, 1) whole numbers from 0.
        classes: Class names; the numbers that occur otherwise.

    Raises:
        ContractBroken: layout (D05), scale (D06, D07), type of pixels (D06) or labels (D11, D10), lengths (D12).
    """
    x = layout(x, name)
    y = labels(y, name)
    if len(x) != len(y):
        raise ContractBroken(f"{len(x)} images, {len(y)} labels", code="D12", where=name)
    if x.dtype == np.uint8:
        pixels = torch.from_numpy(np.array(x, order="C")).float().div_(255)
    elif np.issubdtype(x.dtype, np.floating):
        pixels = torch.from_numpy(np.array(x, dtype=np.float32, order="C"))
    else:
        raise ContractBroken(
            f"images are {x.dtype}, expected uint8 or floating point in 0 to 1", code="D06", where=name
        )
    if classes is None:
        classes = [str(i) for i in range(int(y.max(initial=-1)) + 1)]
    return Images(pixels, torch.from_numpy(y), torch.arange(len(y)), name, list(classes))


def layout(x: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """(N, C, H, W) from a layout that can mean one thing only.

    Raises:
        ContractBroken: D05.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4:
        first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
        if first and not last:
            return x
        if last and not first:
            return np.moveaxis(x, 3, 1)
    shown = "x".join(map(str, x.shape))
    raise ContractBroken(
        f"images have shape {shown}: cannot tell which axis holds the channels",
        code="D05",
        where=name,
        do="store (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, or (N, H, W)",
    )


def labels(y: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """(N,) int64.

    Raises:
        ContractBroken: one-hot or floating labels (D11), negative ones (D10).
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        shape = "x".join(map(str, y.shape))
        raise ContractBroken(f"labels are {shape} of {y.dtype}; give class numbers", code="D11", where=name)
    y = y.astype(np.int64)
    if len(y) and y.min() < 0:
        row = int(np.flatnonzero(y < 0)[0])
        raise ContractBroken(f"label {y[row]} at image {row}, classes start at 0", code="D10", where=name)
    if len(y) and y.max() >= MAX_CLASSES:
        row = int(y.argmax())
        raise ContractBroken(f"label {y[row]} at image {row} is no class number", code="D10", where=name)
    return y
