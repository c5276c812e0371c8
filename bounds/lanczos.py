"""Extreme eigenvalues of many symmetric operators at once, from matrix-vector products alone.

Machinery of the bounds, no bound itself. Every row is an operator of its own, such as the Hessian of one image's loss;
one call of the product serves all rows, each row stops on its own residual, and finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robeval.core.errors import ContractBroken

Product = Callable[[Tensor], Tensor]
End = Literal["largest", "smallest", "both"]

#: From so few rows none is sent away any more: a new graph would cost more than it saves.
FEW = 8


@dataclass
class Spectrum:
    """What was found, one entry per row, float64.

    Args:
        largest: Largest Ritz value found; never above the largest eigenvalue, up to rounding.
        smallest: Smallest Ritz value found.
        residual_largest: Some eigenvalue lies within this distance of ``largest``.
        residual_smallest: The same for ``smallest``.
        products: Operator-vector products until the row was done, int64.
        converged: The wanted ends met the tolerance.
        vector: (n, size), unit Ritz vector of ``largest``; empty unless asked for.
    """

    largest: Tensor
    smallest: Tensor
    residual_largest: Tensor
    residual_smallest: Tensor
    products: Tensor
    converged: Tensor
    vector: Tensor

    @property
    def norm(self) -> Tensor:
        """Spectral norm as far as seen. -> (n,)."""
        return torch.maximum(self.largest.abs(), self.smallest.abs())


def lanczos(
    products: Callable[[Tensor], Product],
    draw: Callable[[Tensor, int], Tensor],
    rows: int,
    size: int,
    *,
    end: End = "largest",
    starts: int = 2,
    least: int = 12,
    steps: int | None = None,
    tolerance: float = 1e-3,
    vectors: bool = False,
) -> Spectrum:
    """The Lanczos process with full reorthogonalisation, batched over rows and stopped per row.

    Args:
        products: Given row numbers (m,), returns the product (m, size) -> (m, size) of those rows' operators. Called
            again with fewer rows whenever half of a large batch is done, so that it can drop what those rows held.
        draw: Random vectors for some rows, (m,), number -> (m, size); the same row and number give the same vector.
        rows: Number of operators n.
        size: Their dimension.
        end: Which end of the spectrum must converge.
        starts: Independent random starts; the most extreme value found counts, since one start can miss it.
        least: Products before the residual is believed.
        steps: Most products per start; none means 50, or 100 from 10,000 dimensions on.
        tolerance: Largest residual relative to the eigenvalue.
        vectors: Also the Ritz vector of the largest value.

    Shapes:
        products (m, size) -> (m, size); all results (n,).
    Source:
        Lanczos 1950; Parlett 1980, The Symmetric Eigenvalue Problem, chapters 11 and 13: the residual of the Ritz pair
        (theta, Q s) is beta_m |s_m|, and an eigenvalue lies that close to theta.
    Raises:
        ContractBroken: a product is NaN or infinite.
    """
    limit = min(steps or (50 if size < 10_000 else 100), size)
    least = min(least, limit)
    found, _ = _start(products, draw, 0, rows, size, end, least, limit, tolerance, vectors)
    for again in range(1, starts):
        number = again * (limit + 1)
        other, _ = _start(products, draw, number, rows, size, end, least, limit, tolerance, vectors)
        found = _better(found, other)
    return found


def tridiagonal(
    products: Callable[[Tensor], Product],
    draw: Callable[[Tensor, int], Tensor],
    rows: int,
    size: int,
    *,
    steps: int,
    number: int = 0,
) -> Tensor:
    """The matrices Q^T H Q of so many steps from one random start per row, whatever has converged.

    Args:
        products: As for :func:`lanczos`.
        draw: The same.
        rows: Number of operators n.
        size: Their dimension.
        steps: Products per row, at most ``size``.
        number: Number of the start's random vector.

    Returns:
        (n, steps, steps) float64.
    """
    _, t = _start(products, draw, number, rows, size, "both", steps, steps, 0.0, False)
    return t[:, :steps, :steps]


def _better(a: Spectrum, b: Spectrum) -> Spectrum:
    """The more extreme of two findings, row by row, each with its own residual."""
    up, down = b.largest > a.largest, b.smallest < a.smallest
    return Spectrum(
        torch.where(up, b.largest, a.largest),
        torch.where(down, b.smallest, a.smallest),
        torch.where(up, b.residual_largest, a.residual_largest),
        torch.where(down, b.residual_smallest, a.residual_smallest),
        a.products + b.products,
        a.converged & b.converged,
        torch.where(up[:, None], b.vector, a.vector),
    )


def _unit(v: Tensor) -> Tensor:
    length: Tensor = v.norm(dim=1, keepdim=True)
    return v / length.clamp_min(torch.finfo(v.dtype).tiny)


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """``w`` without its part in the span of ``basis``; twice is enough (Parlett 1980, section 6.9)."""
    for _ in range(2):
        w = w - (w[:, None, :] @ basis.mT @ basis)[:, 0]  # as columns the same takes 4 to 14 times as long
    return w


def _start(
    products: Callable[[Tensor], Product],
    draw: Callable[[Tensor, int], Tensor],
    number: int,
    rows: int,
    size: int,
    end: End,
    least: int,
    limit: int,
    tolerance: float,
    vectors: bool,
) -> tuple[Spectrum, Tensor]:
    """One run from one random vector per row, and the tridiagonal matrices of the rows that stayed to the end."""
    held = torch.arange(rows)  # rows still in the batch; ``done`` says which of them are only waiting to leave
    product = products(held)
    q = _unit(draw(held, number))
    held, eps = held.to(q.device), torch.finfo(q.dtype).eps
    double = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(4, rows, **double)  # type: ignore[call-overload]
    count, met = torch.zeros(rows, dtype=torch.int64, device=q.device), torch.zeros(rows, dtype=torch.bool).to(q.device)
    vector = q.new_zeros(rows, size if vectors else 0)
    basis = q.new_empty(rows, min(16, limit), size)
    t = torch.zeros(rows, limit + 1, limit + 1, **double)  # type: ignore[call-overload]
    scale = torch.zeros(rows, **double)  # type: ignore[call-overload]
    done = torch.zeros(rows, dtype=torch.bool, device=q.device)
    for k in range(limit):
        if k == basis.shape[1]:
            basis = torch.cat([basis, torch.empty_like(basis[:, : min(k, limit - k)])], 1)
        basis[:, k] = q
        w = product(q)
        a = (q.double() * w.double()).sum(1)
        w = _orthogonal(w, basis[:, : k + 1])
        b = w.double().norm(dim=1)
        if not (a + b).isfinite().all():
            raise ContractBroken("a Hessian-vector product is NaN or infinite", code="B02", do="try float64=true")
        scale = torch.maximum(scale, torch.maximum(a.abs(), b))
        # Below the rounding of the products nothing new is left: the basis spans an invariant subspace.
        broken = (b <= 16 * eps * scale) | (k + 1 == size)
        b = b.masked_fill(broken, 0)
        t[:, k, k], t[:, k, k + 1], t[:, k + 1, k] = a, b, b
        if k + 1 >= least or k + 1 == limit:
            open_ = (~done).nonzero()[:, 0]
            theta, s = torch.linalg.eigh(t[open_, : k + 1, : k + 1])
            residual = b[open_, None] * s[:, -1, :].abs()
            top, low, top_error, low_error = theta[:, -1], theta[:, 0], residual[:, -1], residual[:, 0]
            # A residual cannot be smaller than the rounding of the products.
            floor = 16 * eps * theta.abs().amax(1)
            good = torch.ones_like(open_, dtype=torch.bool)
            if end != "smallest":
                good &= top_error <= torch.maximum(tolerance * top.abs(), floor)
            if end != "largest":
                good &= low_error <= torch.maximum(tolerance * low.abs(), floor)
            new = good | broken[open_] | (k + 1 == limit)
            where = held[open_[new]]
            out[:, where] = torch.stack([top, low, top_error, low_error])[:, new]
            count[where], met[where] = k + 1, good[new]
            if vectors:
                weights = s[new, :, -1:].to(basis.dtype)
                vector[where] = (basis[open_[new], : k + 1].mT @ weights)[:, :, 0]
            done[open_[new]] = True
            if done.all():
                break
        q = w / b.clamp_min(torch.finfo(torch.float64).tiny)[:, None].to(w.dtype)
        if len(done) > FEW and done.sum() * 2 >= len(done):
            keep = ~done
            held, q, basis, t, scale, broken = held[keep], q[keep], basis[keep], t[keep], scale[keep], broken[keep]
            done = done[keep]
            product = products(held.cpu())
        if broken.any():  # go on in what is left of the space
            fresh = draw(held[broken].cpu(), number + k + 1)
            q[broken] = _unit(_orthogonal(_unit(fresh), basis[broken, : k + 1]))
    return Spectrum(out[0], out[1], out[2], out[3], count, met, vector), t
