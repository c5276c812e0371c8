"""Random search: what is accepted, and how far an image looks ahead: several proposals from one state at once."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.goal import Goal


def lowers(goal: Goal, z: Tensor, margin: Tensor) -> Tensor:
    """The margin falls below what it was. (n, K), (n,) -> (n,) bool."""
    return goal.margin(z) < margin


class Lookahead:
    """Number of proposals that each image asks at once, from its own history alone.

    Proposals behind the first accepted one are wasted, so an image looks ahead by a fraction of the usual distance
    between its acceptances: one at a time while every other proposal is accepted, ``most`` when few are. The numbers
    are integers, so that they are the same whatever the batch.

    Args:
        rows: Number of images.
        most: Most proposals at once; 1 asks them one at a time.
        device: Where the counters live.
    """

    #: An image asks one proposal more for each so many proposals that lie between two acceptances.
    SPARING = 6

    def __init__(self, rows: int, most: int, device: torch.device):
        self.most = most
        self.gap = torch.ones(rows, dtype=torch.int64, device=device)
        self.since = torch.zeros_like(self.gap)

    def length(self, rows: Tensor) -> Tensor:
        """Proposals to ask at once. (m,) -> (m,)."""
        return (1 + torch.maximum(self.gap[rows], self.since[rows]) // self.SPARING).clamp(max=self.most)

    def learn(self, rows: Tensor, tried: Tensor, accepted: Tensor) -> None:
        """What came of it.

        Args:
            rows: (m,).
            tried: (m,) proposals tried, the accepted one included.
            accepted: (m,) bool, the last of them was accepted.
        """
        since = self.since[rows] + tried
        self.gap[rows] = torch.where(accepted, (3 * self.gap[rows] + since) // 4, self.gap[rows])
        self.since[rows] = since.masked_fill(accepted, 0)
