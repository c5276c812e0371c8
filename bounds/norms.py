"""Upper bounds of spectral norms, rounding enclosed. Machinery of the proofs, no bound itself.

Power iteration converges from below, so it never enters here. Every number is at least the norm of the operator with
the given float64 weights: sums of m products carry the error gamma(m) of :mod:`robeval.bounds.rounding`, which is added
before a norm is taken and widens it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.bounds.operators import Affine, Average, Convolution, Dense, Reshape, Scale
from robeval.bounds.rounding import TINY, UNIT, gamma

#: Most entries of an operator that is written down as a matrix, and most rows or columns on its short side.
ENTRIES, SIDE = 1 << 22, 1024


def gram_norm(w: Tensor, steps: int = 14) -> Tensor:
    """Upper bounds of the spectral norms of matrices by Gram iteration.

    |W|^2 = |W^T W|, and a Frobenius norm is at least the spectral norm and at most sqrt(rank) times it; t squarings
    divide that excess by 2^t in the exponent. The rounding of every product, at most gamma(m) |A|_F^2, is added on the
    way back through the square roots, and every t gives a bound, so that the smallest counts.

    Shapes:
        (..., m, n) float64 -> (...).
    Source:
        Delattre, Barthelemy, Araujo, Allauzen 2023, Efficient Bound of Lipschitz Constant for Convolutional Layers by
        Gram Iteration, arXiv:2305.16173, theorem 1.
    """
    a = w if w.shape[-2] >= w.shape[-1] else w.mT
    best = w.new_full(w.shape[:-2], math.inf)
    scales: list[Tensor] = []
    losses: list[Tensor] = []
    for t in range(steps + 1):
        size = torch.linalg.matrix_norm(a) * (1 + gamma(a.shape[-1] * a.shape[-2])) + TINY
        value = size
        for scale, loss in zip(reversed(scales), reversed(losses), strict=True):
            value = ((value + loss) * (1 + 4 * UNIT)).sqrt() * (1 + 4 * UNIT) * scale
        best = torch.minimum(best, value)
        if t == steps:
            break
        scales.append(torch.exp2(size.log2().round()))  # a power of two: the division is exact
        a = a / scales[-1][..., None, None]
        losses.append(4 * gamma(a.shape[-2]) + torch.full_like(size, TINY))  # |A|_F is below 2 now
        a = a.mT @ a
    return best


def frequency_norm(op: Convolution, scale: Tensor | None = None) -> float:
    """Upper bound of a zero-padded convolution's norm, from the same kernel on a torus that is large enough.

    A zero-padded convolution reads an image surrounded by zeros and gives some of the outputs, so it is a part of the
    convolution on every torus on which the kernel, laid over the image, does not meet itself. That one is a block
    matrix (out, in) for each frequency. A stride s reads s * s shifted images of a s-th of the size: channels of their
    own.

    Args:
        op: The convolution; its stride, dilation, padding and groups count.
        scale: Factor of each output channel, (out,), such as that of a normalisation behind it.

    Source:
        Sedghi, Gupta, Long 2019, arXiv:1805.10408; Delattre et al. 2023, arXiv:2305.16173, for zero padding.
    """
    groups, (s1, s2), (p1, p2) = op.options["groups"], op.options["stride"], op.options["padding"]
    kernel = op.weight if scale is None else op.weight * scale[:, None, None, None]
    (d1, d2), (k1, k2) = op.options["dilation"], kernel.shape[2:]
    wide = kernel.new_zeros(*kernel.shape[:2], _up((k1 - 1) * d1 + 1, s1), _up((k2 - 1) * d2 + 1, s2))
    wide[:, :, : (k1 - 1) * d1 + 1 : d1, : (k2 - 1) * d2 + 1 : d2] = kernel
    out, inside = wide.shape[:2]
    b1, b2 = wide.shape[2] // s1, wide.shape[3] // s2
    phases = wide.view(groups, out // groups, inside, b1, s1, b2, s2).permute(0, 1, 2, 4, 6, 3, 5)
    taps = phases.reshape(groups, out // groups, inside * s1 * s2, b1, b2)
    n1, n2 = (
        _places(size, s, p) + b - 1 for size, s, p, b in zip(op.into[1:], (s1, s2), (p1, p2), (b1, b2), strict=True)
    )
    waves1, waves2 = _waves(n1, b1, n1), _waves(n2, b2, n2 // 2 + 1)  # the other half are conjugates
    error = 2 * (gamma(4 * b1 * b2) + 256 * UNIT) * torch.linalg.matrix_norm(taps.abs().sum((3, 4)), dim=(1, 2))
    found = 0.0
    chunk = max(1, (1 << 24) // (4 * taps.shape[1] * taps.shape[2] * len(waves2[0])))
    for g in range(groups):
        rough: list[Tensor] = []
        blocks: list[Tensor] = []
        for start in range(0, n1, chunk):
            block = _transformed(taps[g], waves1, waves2, start, chunk)
            rough.append(gram_norm(block, 3))
            # Only frequencies that may hold the maximum are worth more squarings.
            rank = min(block.shape[-2:])
            keep = rough[-1] >= torch.cat(rough).max() * rank ** -(2.0**-4)
            blocks += [part for part in block[keep].split(64) if len(part)]
            rough[-1] = rough[-1][~keep]
        exact = max(float(gram_norm(block, 12 if min(block.shape[1:]) <= 512 else 7).max()) for block in blocks)
        left = torch.cat(rough)
        found = max(found, exact + float(error[g]), float(left.max()) + float(error[g]) if len(left) else 0.0)
    return found * (1 + 8 * UNIT)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _places(size: int, stride: int, padding: int) -> int:
    """Places m at which one of the entries stride * m + r - padding, r < stride, lies in the image."""
    return (size - 1 + padding) // stride - padding // stride + 1


def _waves(side: int, taps: int, number: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi f a / side, right to 32 units of rounding. (number, taps) each."""
    turns = torch.outer(torch.arange(number), torch.arange(taps)) % side
    angle = turns.double() * (2 * math.pi / side)
    return angle.cos(), angle.sin()


def _transformed(
    taps: Tensor, waves1: tuple[Tensor, Tensor], waves2: tuple[Tensor, Tensor], start: int, chunk: int
) -> Tensor:
    """Matrices of some frequencies, complex numbers written as 2 x 2 blocks. (out, in, b1, b2) -> (f, 2 out, 2 in)."""
    c1, s1, c2, s2 = (
        w.to(taps.device) for w in (waves1[0][start : start + chunk], waves1[1][start : start + chunk], *waves2)
    )
    both = (
        torch.einsum("oiab,fab->foi", taps, _pairs(c1, c2) - _pairs(s1, s2)),
        torch.einsum("oiab,fab->foi", taps, _pairs(s1, c2) + _pairs(c1, s2)),
    )
    real, imaginary = both
    return torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """a[f, p] b[g, q] for all pairs of frequencies. -> (f g, p, q)."""
    return torch.einsum("fp,gq->fgpq", a, b).flatten(0, 1)


def mixed_norm(op: Affine, into: tuple[int, ...], like: Tensor) -> float:
    """sqrt(|W|_1 |W|_inf), the geometric mean of the largest column sum and the largest row sum of sizes."""
    rows = op.forward(torch.ones(1, *into).to(like), torch.abs)
    columns = op.transpose(torch.ones_like(rows), torch.abs)
    return math.sqrt(float(rows.max()) * float(columns.max())) * (1 + 2 * gamma(rows.numel() + columns.numel()))


def written_norm(ops: list[Affine], into: tuple[int, ...], like: Tensor) -> float:
    """Norm of a chain of operators, written down as one matrix; infinite where that would be too large."""
    blank = torch.zeros(1, *into).to(like)
    for op in ops:
        blank = op.forward(blank)
    inside, outside = math.prod(into), blank.numel()
    if inside * outside > ENTRIES or min(inside, outside) > SIDE:
        return math.inf
    matrix = sizes = torch.eye(inside if inside <= outside else outside).to(like)
    if inside <= outside:
        matrix = sizes = matrix.view(inside, *into)
        for op in ops:
            matrix, sizes = op.forward(matrix), op.forward(sizes, torch.abs)
    else:
        matrix = sizes = matrix.view(outside, *blank.shape[1:])
        for op in reversed(ops):
            matrix, sizes = op.transpose(matrix), op.transpose(sizes, torch.abs)
    error = 2 * gamma(sum(op.fan + 8 for op in ops)) * float(sizes.norm())
    return (float(gram_norm(matrix.flatten(1))) + error) * (1 + 4 * UNIT) + TINY


def chain_norm(ops: list[Affine], into: tuple[int, ...], like: Tensor) -> float:
    """Upper bound of the spectral norm of affine operators one after the other, their constants left out.

    The smaller of the norm of the chain as one matrix, where that is small, and the product of its parts.

    Args:
        ops: First to last.
        into: Shape of what the first one reads.
        like: Says on which device to compute.
    """
    product, at, rest = 1.0, torch.zeros(1, *into).to(like), list(ops)
    while rest:
        op, shape = rest.pop(0), tuple(at.shape[1:])
        at = op.forward(at)
        if isinstance(op, Reshape):
            continue
        if isinstance(op, Scale):
            value = float(op.weight.abs().max()) * (1 + gamma(op.fan))
        elif isinstance(op, Average):
            value = mixed_norm(op, shape, like)
        elif isinstance(op, Dense):
            value = float(gram_norm(op.weight, 14 if min(op.weight.shape) <= 2 * SIDE else 7))
            value = min(value, mixed_norm(op, shape, like))
        else:
            behind = (
                rest[0] if rest and isinstance(rest[0], Scale) and rest[0].weight.numel() == len(op.weight) else None
            )
            scale = None if behind is None else behind.weight.flatten()
            value = frequency_norm(op, scale)
            if behind is None:
                value = min(value, mixed_norm(op, shape, like))
            else:
                rest.pop(0)
        product *= value * (1 + 4 * UNIT)
    return min(product, written_norm(ops, into, like))
