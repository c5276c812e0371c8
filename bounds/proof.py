"""What a proof gives back. Machinery of the proofs, no bound itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.bounds.rows import Rows


@dataclass(frozen=True)
class Proof:
    """What holds for every point of each image's region.

    Args:
        lower: (n, K) float64, lower bounds of f_y - f_j with rounding enclosed; infinite at j = y.
        constant: (n,) the constant L or C that the bound rests on; None where there is none.
        witness: (n, C, H, W) points at which the bound itself saw another class, nan where it saw none; None if it does
            not look.
    """

    lower: Tensor
    constant: Tensor | None = None
    witness: Tensor | None = None

    def margin(self, top: int = 1) -> Tensor:
        """Above 0 where fewer than ``top`` rivals can overtake: the ``top``-th smallest lower bound. -> (n,)."""
        return self.lower.kthvalue(top, dim=1).values


def margins_of(y: Tensor, classes: int, dtype: torch.dtype = torch.float64) -> Rows:
    """Rows of f_y - f_j on the logits, for every class j; that of j = y is zero. (n,) -> K rows for each image."""
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    return Rows(eye[y][:, None, :] - eye, (classes,))


def against(lower: Tensor, y: Tensor) -> Tensor:
    """The same with infinity at the class itself. (n, K) -> (n, K)."""
    return lower.scatter(1, y[:, None], torch.inf)
