"""Long-range-correlated noise."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import Ball, per_row
from robeval.core.catalogue import attack
from robeval.core.correlated import exponential, from_file
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits
from robeval.core.streams import Streams

#: Draws that are made together for one image. Always the same number, since the last bits of a matrix product depend
#: on its shape; a multiple of 16 keeps every image's block aligned in memory.
BLOCK = 16


@attack(
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, long-range-correlated noise",
    norms=("l2", "linf"),
    access="black-box",
)
def lrc(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    draws: int = 100,
    zeta: float = 8.0,
    inter: float = 0.5,
    covariance: str = "exponential",
) -> Attack:
    """Gaussian noise that is correlated over many pixels, the worst of several draws.

    Pixels r apart have correlation exp(-r / zeta), those of different channels ``inter`` times that. In l2 every draw
    has length eps, in linf every pixel has standard deviation eps and is clipped to +-eps.

    Args:
        draws: Independent draws per image; the first ones are the same however many there are.
        zeta: Decay length of the correlation, in pixels.
        inter: Correlation of two channels at the same pixel.
        covariance: exponential, or a .npy file with the (d, d) covariance of a training set, d = C * H * W.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        ``draws`` forward passes per open image.
    Source:
        Roth et al. 2018, arXiv:1805.08736, the covariance of the experiments with long-range-correlated noise.
    Departs:
        The paper adds noise of standard deviation s per pixel and bounds no norm. Here l2 rescales each draw to the
        length eps = s * sqrt(d), its length in the mean square, and linf clips at one standard deviation, s = eps.
    """
    shape = (x0.shape[1], x0.shape[2], x0.shape[3])
    noise = exponential(shape, zeta, inter) if covariance == "exponential" else from_file(covariance, shape)
    noise = noise.to(x0)
    open_ = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    for draw in range(draws):
        if draw % BLOCK == 0:
            block = torch.stack([rng.normal(*shape) for _ in range(BLOCK)], 1)
            for row in open_.nonzero().flatten().tolist():  # one product for each image: it never feels its neighbours
                block[row] = noise(block[row])
        d = block[:, draw % BLOCK]
        if ball.norm == "l2":
            d = d / per_row(ball.norm_of(d), d)
        at = yield Logits(ball.project(x0, x0 + ball.eps * d))
        open_ = at.open
    return None
