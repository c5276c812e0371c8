"""Simple black-box attack."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from robeval.attacks.lookahead import Lookahead, lowers
from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack, Logits, Proposals
from robeval.core.streams import Streams


def cosines(size: int) -> Tensor:
    """Orthonormal cosine vectors, one per row, the slowest first (DCT-II). -> (size, size) float64."""
    k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    rows = (math.pi * k * (2 * i + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def low_frequencies_first(rng: Streams, shape: torch.Size, first: int, stride: int) -> Tensor:
    """A random order of all coordinates, low-frequency corner first, then growing by ``stride``. -> (n, C*H*W)."""
    channels, height, width = shape
    highest = torch.maximum(torch.arange(height)[:, None], torch.arange(width)[None])
    ring = ((highest - first) // stride + 1).clamp_min(0).expand(channels, -1, -1).flatten().to(rng.device)
    return (ring * (1 << 32) + rng.bits(channels * height * width)).argsort(dim=1, stable=True)


@attack(
    source="Guo, Gardner, You, Wilson, Weinberger 2019, Simple Black-box Adversarial Attacks, arXiv:1905.07121,"
    " algorithm 1",
    norms=("linf", "l2"),
    access="black-box",
    presets={"simba-dct": {"basis": "dct"}},
)
def simba(
    x0: Tensor,
    goal: Goal,
    ball: Ball,
    rng: Streams,
    *,
    basis: Literal["pixel", "dct"] = "pixel",
    step: float | None = None,
    queries: int | None = None,
    freq_dims: int = 28,
    stride: int = 7,
    lookahead: int = 16,
) -> Attack:
    """Tries direction after direction of an orthonormal basis, up then down, and keeps what lowers the margin.

    Directions are pixels or cosine waves, in random order. No direction is visited twice, so in linf a pixel step of
    eps stays in the ball by construction; all other forms are projected on the ball.

    Args:
        basis: Pixels, or two-dimensional cosine waves per channel (simba-dct).
        step: Length of one step; none means eps for pixels in linf and 0.2 otherwise.
        queries: Most queries per image, the one at the clean image included; none means all directions once.
        freq_dims: Side of the low-frequency corner whose waves come first.
        stride: By how much that corner grows.
        lookahead: Most proposals asked at once; 1 asks one at a time. The search is the same, only passes differ.

    Shapes:
        x0 (n, C, H, W) in [0, 1].
    Cost:
        1 or 2 forward passes per direction and open image that count, and the proposals that looking ahead discards.
        Every pass is counted; the questions of a record are the queries without the one at the clean image.
    Source:
        Guo et al. 2019, arXiv:1905.07121, algorithm 1, with the standard (pixel) basis or the low-frequency DCT basis.
    Departs:
        Compares margins of logits instead of probabilities, which saturate at 1 in float32 and then hide every
        improvement. A side that the box forbids costs no query. In linf the cosine form clips the sum of all kept
        waves, and remembers the sum before clipping, as the authors' option linf_bound does.
    """
    shape, size = x0.shape[1:], x0[0].numel()
    length = step or (ball.eps if basis == "pixel" and ball.norm == "linf" else 0.2)
    limit = 2 * size + 1 if queries is None else queries
    if basis == "pixel":
        order = rng.permutation(size)
    else:
        order = low_frequencies_first(rng, shape, freq_dims, stride)
        waves = [cosines(n).to(x0) for n in shape[1:]]

    def directions(which: Tensor) -> Tensor:
        """The basis vectors of the given coordinates. (m, L) -> (m, L, C, H, W)."""
        if basis == "pixel":
            pixels: Tensor = x0.new_zeros(*which.shape, size).scatter_(2, which[..., None], 1.0).unflatten(2, shape)
            return pixels
        channel, place = which // (shape[1] * shape[2]), which % (shape[1] * shape[2])
        wave = waves[0][place // shape[2]][..., :, None] * waves[1][place % shape[2]][..., None, :]
        own: Tensor = (channel[..., None] == torch.arange(shape[0], device=x0.device)).to(x0)
        both: Tensor = own[..., None, None] * wave[:, :, None]
        return both

    ahead = Lookahead(len(x0), lookahead, x0.device)
    at = yield Logits(x0)
    x, kept, margin = x0.clone(), torch.zeros_like(x0), goal.margin(at.logits)
    turn, spent = torch.zeros_like(rng.attempt), torch.ones_like(rng.attempt)  # turn 2k: +direction k, 2k + 1: -
    while True:
        rows = (at.open & (turn < 2 * size) & (spent < limit)).nonzero().squeeze(1)
        if not len(rows):
            return None
        span = torch.minimum(ahead.length(rows), 2 * size - turn[rows])
        places = torch.arange(int(span.max()), device=x0.device)
        turns = (turn[rows][:, None] + places).clamp(max=2 * size - 1)
        sign = (1 - 2 * (turns % 2)).to(x0)[..., None, None, None]
        waves_kept = kept[rows][:, None] + length * sign * directions(order[rows].gather(1, turns // 2))
        base = x0[rows][:, None].expand_as(waves_kept).flatten(0, 1)
        points = Ball(ball.norm, ball.eps).project(base, base + waves_kept.flatten(0, 1)).view_as(waves_kept)
        only = (points != x[rows][:, None]).flatten(2).any(2) & (places < span[:, None])
        only &= spent[rows][:, None] + only.cumsum(1) <= limit
        at = yield Proposals(rows, points, only, lowers, args=(margin[rows],))
        better = at.first < len(places)
        taken, each = at.first.clamp(max=len(places) - 1), torch.arange(len(rows), device=x0.device)
        used = torch.where(better, at.first + 1, span)
        spent[rows] += (only & (places < used[:, None])).sum(1)
        margin[rows] = torch.where(better, goal[rows].margin(at.logits[each, taken]), margin[rows])
        pick = better[:, None, None, None]
        x[rows] = torch.where(pick, points[each, taken], x[rows])
        kept[rows] = torch.where(pick, waves_kept[each, taken], kept[rows])
        # After an accepted step the other side of its direction is not tried.
        turn[rows] += torch.where(better, used + (turn[rows] + used) % 2, used)
        ahead.learn(rows, used, better)
