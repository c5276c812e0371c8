"""Random crops and flips that belong to an image and an epoch, not to a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from robeval.core.streams import Streams

KINDS = ("none", "crop", "crop-flip")


def augment(x: Tensor, rng: Streams, kind: str) -> Tensor:
    """Pad with zeros by an eighth of the width, crop at a random place, perhaps mirror. Shapes: (n, C, H, W) -> same.

    Args:
        x: Images in [0, 1].
        rng: One stream per image.
        kind: ``none``, ``crop`` or ``crop-flip``.
    """
    if kind == "none":
        return x
    n, _, height, width = x.shape
    pad = max(1, width // 8)
    corner = rng.integers(2 * pad + 1, 2)
    rows = corner[:, :1] + torch.arange(height, device=x.device)
    columns = corner[:, 1:] + torch.arange(width, device=x.device)
    if kind == "crop-flip":
        columns = torch.where(rng.integers(2)[:, None].bool(), columns.flip(1), columns)
    padded = functional.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
