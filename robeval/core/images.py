"""A labelled set of images whose ids travel with the rows everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from robeval.core.errors import ContractBroken


@runtime_checkable
class Unread(Protocol):
    """Pixels that stay in their files until they are indexed, and are in [0, 1] by the way they are read."""

    def chosen(self, rows: Tensor) -> Tensor:
        """Some of the rows, still unread."""

    def digest(self) -> bytes:
        """What stands for the pixels in a fingerprint."""


@dataclass
class Images:
    """Images, labels and where they come from.

    Args:
        x: (N, C, H, W) floating point in [0, 1]; a plain tensor, or `Unread` pixels, which every use but these reads:
            indexing reads the rows, choosing rows and moving to a device read none.
        y: (N,) int64 class numbers.
        ids: (N,) int64, index of each image in its split.
        name: Data set and split, such as ``digits/test``.
        classes: Class names, in label order.
        note: How the subset was chosen, for tables.

    Raises:
        ContractBroken: values outside [0, 1], NaN, wrong lengths, labels out of range, or no image.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    name: str
    classes: Sequence[str]
    note: str = ""

    def __post_init__(self) -> None:
        if self.x.dim() != 4:
            raise ContractBroken(
                f"images have shape {tuple(self.x.shape)}, expected (N, C, H, W)", code="D05", where=self.name
            )
        if not len(self.x) == len(self.y) == len(self.ids):
            raise ContractBroken(f"{len(self.x)} images, {len(self.y)} labels", code="D12", where=self.name)
        if not len(self.x):
            raise ContractBroken("no image is left", code="D13", where=self.name)
        if not isinstance(self.x, Unread):
            self._check_pixels()
        out = (self.y < 0) | (self.y >= len(self.classes))
        if out.any():
            first = int(out.nonzero()[0])
            raise ContractBroken(
                f"label {int(self.y[first])} at image {int(self.ids[first])}, classes are 0 to {len(self.classes) - 1}",
                code="D10",
                where=self.name,
            )

    def _check_pixels(self) -> None:
        parts = self.x.split(4096)  # the check makes copies
        bad = torch.cat([~torch.isfinite(part.flatten(1)).all(1) for part in parts])
        if bad.any():
            which = ", ".join(str(int(i)) for i in self.ids[bad][:5])
            raise ContractBroken(f"{int(bad.sum())} images hold NaN or Inf: ids {which}", code="D08", where=self.name)
        low, high = float(self.x.min()), float(self.x.max())
        if low < 0 or high > 1:
            hint = "divide by 255" if low >= 0 and high > 2 else "already normalised? the model must normalise inside"
            raise ContractBroken(
                f"images range {low:g} to {high:g}, expected 0 to 1: {hint}",
                code="D06" if low >= 0 else "D07",
                where=self.name,
            )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Images:
        """The chosen rows, with their ids."""
        x = self.x.chosen(rows) if isinstance(self.x, Unread) else self.x[rows]
        return Images(x, self.y[rows], self.ids[rows], self.name, self.classes, self.note)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device), self.ids.to(device), self.name, self.classes, self.note)

    @property
    def fingerprint(self) -> str:
        """sha256 over pixels, labels and ids in this order; for unread pixels over what they say of themselves."""
        digest = hashlib.sha256()
        for part in (self.x, self.y, self.ids):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(
                part.digest() if isinstance(part, Unread) else part.detach().cpu().contiguous().numpy().tobytes()
            )
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Plain facts for the manifest of a run."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "subset": self.note,
            "images": len(self),
            "ids": self.ids.tolist(),
        }
