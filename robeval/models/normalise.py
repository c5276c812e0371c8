"""Normalisation as the first layer of a network, so that attacks and bounds see pixels in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.errors import UsageError


class Normalize(nn.Module):
    """(x - mean) / std per channel.

    Args:
        mean: One number per channel, or one for all.
        std: The same, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        # Not in the state_dict: the checkpoint's specification holds the numbers.
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)
        self.text = f"mean={list(mean)}, std={list(std)}"

    def extra_repr(self) -> str:
        return self.text

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class PerImageStandardize(nn.Module):
    """(x - mean) / max(std, 1 / sqrt(d)) with the mean and unbiased standard deviation of all d pixels of one image.

    The floor enters as a clamp of the variance, so that a constant image has finite first and second derivatives.

    Shapes:
        (n, C, H, W), same shape back.
    """

    def forward(self, x: Tensor) -> Tensor:
        d = x[0].numel()
        variance, mean = torch.var_mean(x, dim=(1, 2, 3), keepdim=True, correction=min(1, d - 1))
        return (x - mean) / variance.clamp(min=1 / d).sqrt()


def plain(spec: Any) -> str | dict[str, list[float]]:
    """Check a normalisation written as ``none``, ``per-image`` or ``{"mean": [...], "std": [...]}``.

    Raises:
        UsageError: anything else, lengths that differ, or a std that is not above 0.
    """
    if spec in ("none", "per-image"):
        return str(spec)
    if isinstance(spec, Mapping) and set(spec) == {"mean", "std"}:
        try:
            mean, std = ([float(v) for v in spec[key]] for key in ("mean", "std"))
        except (TypeError, ValueError):
            mean, std = [], []
        if len(mean) == len(std) > 0 and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std):
            return {"mean": mean, "std": std}
    raise UsageError(
        f"normalisation {spec!r} is not understood",
        code="A04",
        do='none, per-image, or {"mean": [one per channel], "std": [one per channel, above 0]}',
    )


def normaliser(spec: Any) -> nn.Module:
    """The first layer for a specification that `plain` accepts."""
    spec = plain(spec)
    if isinstance(spec, dict):
        return Normalize(spec["mean"], spec["std"])
    return PerImageStandardize() if spec == "per-image" else nn.Identity()
