"""Upper bounds of the curvature of margins over regions. Machinery of the proofs, no bound itself.

A margin g of a smooth network has the Hessian sum_k J_k^T diag(s''(u_k) a_k) J_k over its activations: u_k what the
k-th one reads, J_k = du_k/dx, a_k the derivative of g by its output. Intervals of all three over a region give an
interval of the Hessian, whose largest eigenvalue is bounded in two ways, of which the smaller counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import Interval
from robeval.bounds.operators import Input, Maximum, Sum
from robeval.bounds.rounding import TINY, UNIT, gamma
from robeval.bounds.slopes import Slopes, mapped, plus, scaled, times


def pushed(graph: Graph, images: Tensor, slopes: Slopes) -> dict[int, Interval]:
    """Intervals of the Jacobian of what each activation reads, one column per pixel, by the chain rule forwards.

    Shapes:
        images (n, C, H, W) -> (n, d, *shape) by node.
    """
    n, d = len(images), images[0].numel()
    eye = torch.eye(d, dtype=images.dtype, device=images.device).expand(n, d, d).view(n, d, *images.shape[1:])
    columns = {0: Interval(eye, eye)}
    wanted: dict[int, Interval] = {}
    last = {i: k for k, node in enumerate(graph.nodes) for i in node.inputs}  # who reads a node last
    for k, node in enumerate(graph.nodes):
        op = node.op
        if isinstance(op, Convex):
            slope = slopes[k]
            assert isinstance(slope, Interval)
            wanted[k] = columns[node.inputs[0]]
            columns[k] = times(wanted[k], slope)
        elif isinstance(op, Sum):
            columns[k] = plus(columns[node.inputs[0]], scaled(columns[node.inputs[1]], op.sign))
        elif not isinstance(op, Input):
            assert not isinstance(op, Maximum)
            columns[k] = mapped(columns[node.inputs[0]], op, op.forward, op.fan)
        for i in node.inputs:
            if last[i] == k:
                columns.pop(i, None)
    return wanted


def bends(op: Convex, at: Interval) -> Interval:
    """Interval of the second derivative: it falls to both sides of one peak, so that an end has the smallest."""
    assert op.bend is not None
    least = torch.minimum(op.bend(at.low, at.low), op.bend(at.high, at.high))
    return Interval((least * (1 - 1e-11) - 2e-15).clamp_min(0), op.bend(at.low, at.high))


def largest_curvature(
    graph: Graph, found: list[Interval], columns: dict[int, Interval], seen: dict[int, Interval], room: Tensor
) -> tuple[Tensor, Tensor]:
    """Upper bounds of the largest eigenvalue of the Hessian of each margin, and of v^T H v with |v_i| <= room_i.

    First, with M >= |J| and D >= s'' a, the norm of the matrix sum M^T D M. Second, the eigenvalue of the Hessian at
    the middle of all intervals, plus the norm of how far the others lie from it, which keeps signs and is far smaller
    on small regions.

    Args:
        graph: A smooth network.
        found: Intervals of all nodes.
        columns: Of :func:`pushed`.
        seen: (n, S, *shape), derivatives of S functions by the output of each activation.
        room: (n, d), how far each pixel can move.

    Returns:
        (n, S), (n, S), at least 0.
    """
    shape = next(iter(seen.values())).low.shape[:2]
    d = room.shape[1]
    above, middle, away = (room.new_zeros(*shape, d, d) for _ in range(3))
    loss = room.new_zeros(shape)
    for k, a in seen.items():
        op = graph.nodes[k].op
        assert isinstance(op, Convex)
        weight = times(a, bends(op, found[graph.nodes[k].inputs[0]]))
        low, high = weight.low.flatten(2), weight.high.flatten(2)
        j_low, j_high = columns[k].low.flatten(2)[:, None], columns[k].high.flatten(2)[:, None]
        j, r = (j_low + j_high) / 2, (j_high - j_low) / 2  # (n, 1, d, m)
        w, s = (low + high) / 2, (high - low) / 2  # (n, S, m)
        r, s = r + 4 * UNIT * (j.abs() + r) + TINY, s + 4 * UNIT * (w.abs() + s) + TINY
        size, most = j.abs() + r, w.abs() + s
        above += (size * high.clamp_min(0)[:, :, None]) @ size.mT
        middle += (j * w[:, :, None]) @ j.mT
        away += (j.abs() * s[:, :, None]) @ j.abs().mT
        away += (r * most[:, :, None]) @ size.mT + (j.abs() * most[:, :, None]) @ r.mT
        # What the products and sums above can lose; a matrix of this kind has a norm of at most its trace.
        loss += 8 * gamma(r.shape[3] + 4 * len(seen)) * (most * size.square().sum(2)).sum(2)
    above = (above + above.mT) / 2
    first = spectral_radius(above)
    second = largest_eigenvalue((middle + middle.mT) / 2) + spectral_radius((away + away.mT) / 2)
    corner = (room[:, None] * (above @ room[:, None, :, None])[..., 0]).sum(2) * (1 + gamma(2 * d))
    return torch.minimum(first, second).clamp_min(0) + loss, corner + loss * room.square().sum(1)[:, None]


def spectral_radius(p: Tensor, steps: int = 8) -> Tensor:
    """Upper bounds of the largest eigenvalues of symmetric matrices without negative entries. (..., d, d) -> (...).

    For any positive v it is at most max_i (Pv)_i / v_i (Collatz and Wielandt); a few power steps make v a good one, and
    a little is added so that no entry vanishes.
    """
    v = p.new_ones(*p.shape[:-1], 1)
    best = p.sum(-1).amax(-1)
    for _ in range(steps):
        v = p @ v
        v = v / v.sum(-2, keepdim=True).clamp_min(TINY) + 1e-6 / p.shape[-1]
        best = torch.minimum(best, ((p @ v) / v)[..., 0].amax(-1))
    return best * (1 + 2 * gamma(p.shape[-1])) + TINY


def largest_eigenvalue(h: Tensor) -> Tensor:
    """Upper bounds of the largest eigenvalues of symmetric matrices. (..., d, d) -> (...).

    If Cholesky's method runs through on (t - c) I - H in floating point, with c of the order of its rounding, then
    t I - H is positive semidefinite. Where it does not for several t, the Frobenius norm serves.

    Source:
        Rump 2006, Verification of positive definiteness, BIT 46, theorem 2.3.
    """
    d = h.shape[-1]
    length = torch.linalg.matrix_norm(h) * (1 + gamma(d * d)) + TINY
    guess = torch.linalg.eigvalsh(h)[..., -1]
    best: Tensor = length
    eye = torch.eye(d, dtype=h.dtype, device=h.device)
    for margin in (1e3, 1e2, 10.0):
        c = 4 * d * gamma(d) * (guess.abs() + length)
        t = guess + margin * c
        _, info = torch.linalg.cholesky_ex((t - c)[..., None, None] * eye - h)
        best = torch.where(info == 0, torch.minimum(best, t + c), best)
    return best
