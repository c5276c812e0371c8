"""The threat model: which points around an image an attack may use.

This is the one file that knows what a norm is. Everything else asks a :class:`Ball`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robeval.core.errors import UsageError

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}

# A verdict allows for rounding of the norm itself: ||x' - x|| <= eps * (1 + REL) + ABS, computed in float64.
REL, ABS = 1e-6, 1e-9


def per_row(t: Tensor, like: Tensor) -> Tensor:
    """View an (n,) tensor so that it multiplies an (n, C, H, W) one."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def vector_norm(d: Tensor, norm: str) -> Tensor:
    """Norm of each row over all its entries. Shapes: (n, ...) -> (n,)."""
    flat = d.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(flat, dim=1)
        return length
    if norm == "l1":
        return flat.abs().sum(1)
    if norm == "l0":
        return (flat != 0).sum(1).to(d.dtype)
    raise UsageError(f'unknown norm "{norm}"', code="A04", do=f"choose from: {', '.join(NORMS)}")


def project_l1(d: Tensor, radius: float | Tensor) -> Tensor:
    """Nearest point of the l1 ball (Duchi et al. 2008, figure 1). Shapes: (n, ...) -> (n, ...)."""
    flat = d.flatten(1)
    u = flat.abs().sort(dim=1, descending=True).values
    excess = u.cumsum(1) - radius
    k = torch.arange(1, flat.shape[1] + 1, device=d.device, dtype=d.dtype)
    active = (u * k > excess).sum(1, keepdim=True).clamp_min(1)
    shift = (excess.gather(1, active - 1) / active).clamp_min(0)
    return (flat.sign() * (flat.abs() - shift).clamp_min(0)).view_as(d)


def project_l1_in_box(x0: Tensor, d: Tensor, radius: float | Tensor) -> Tensor:
    """Nearest change to ``d`` of l1 norm at most ``radius`` that keeps ``x0`` in the box. (n, ...) -> (n, ...).

    Exact for the intersection of ball and box (Croce and Hein 2021, Mind the box, arXiv:2103.01208, proposition 2.1):
    each entry shrinks by a common amount and stops at the box. The amount is where a decreasing piecewise linear
    function, with a corner where an entry leaves the box and one where it reaches zero, equals the radius.
    """
    change, start = d.flatten(1), x0.flatten(1)
    size, room = change.abs(), torch.where(change > 0, 1 - start, start)
    least = torch.minimum(size, room)  # the change once the box has cut it
    corners, which = torch.cat([(size - room).clamp_min(0), size], 1).sort(1)
    slope = torch.where(which < size.shape[1], -1.0, 1.0).to(d.dtype).cumsum(1)  # to the right of each corner
    fall = (slope[:, :-1] * corners.diff(dim=1)).cumsum(1, dtype=torch.float64)
    height = least.sum(1, keepdim=True) + torch.cat([torch.zeros_like(fall[:, :1]), fall], 1)  # at each corner
    k = (height > radius).sum(1, keepdim=True).clamp_min(1) - 1  # the last corner above the radius
    shrink = (corners.gather(1, k) + (height.gather(1, k) - radius) / -slope.gather(1, k).clamp(max=-1)).to(d.dtype)
    shrunk = torch.minimum((size - shrink.clamp_min(0)).clamp_min(0), room)
    shrunk = shrunk * (radius / shrunk.sum(1, keepdim=True).clamp_min(radius))  # what rounding left over
    outside = least.sum(1, keepdim=True) > radius
    return (change.sign() * torch.where(outside, shrunk, least)).view_as(d)


@dataclass
class Ball:
    """All points within ``eps`` of an image in a norm, intersected with the pixel box [0, 1].

    Args:
        norm: ``linf``, ``l2`` or ``l1``, over all pixel entries of one image.
        eps: Radius in pixel units; ``inf`` asks for the nearest adversarial point.
    """

    norm: str
    eps: float
    _limits: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f'unknown norm "{self.norm}"', code="A04", do=f"choose from: {', '.join(NORMS)}")
        if not self.eps >= 0:
            raise UsageError(f"eps must be a number >= 0, got {self.eps}", code="A02")

    def norm_of(self, d: Tensor) -> Tensor:
        """Shapes: (n, ...) -> (n,)."""
        return vector_norm(d, self.norm)

    def dual_norm(self, g: Tensor) -> Tensor:
        """Largest <g, d> over the unit ball. Shapes: (n, ...) -> (n,)."""
        return vector_norm(g, DUAL[self.norm])

    def ascent(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """Direction of unit norm along which <g, .> grows fastest; zero where the gradient is zero.

        In l1 the single steepest pixel makes slow progress, so the sign of the 5 % largest entries is used (Tramer
        and Boneh 2019, arXiv:1904.13000, section 5), without pixels of ``x`` that already stand at the box.
        Shapes: (n, ...) -> (n, ...).
        """
        if self.norm == "linf":
            return g.sign()
        if self.norm == "l2":
            # Dividing by the largest entry first keeps tiny gradients from vanishing in the square.
            largest = per_row(vector_norm(g, "linf"), g)
            g = torch.where(largest > 0, g / largest, torch.zeros_like(g))
            return g / per_row(vector_norm(g, "l2"), g).clamp_min(1)  # its largest entry is 1 now, or all are 0
        if x is not None:
            g = g.masked_fill(((x <= 0) & (g < 0)) | ((x >= 1) & (g > 0)), 0)
        flat = g.flatten(1)
        k = max(1, math.ceil(0.05 * flat.shape[1]))
        top = flat.abs().topk(k, dim=1).indices
        sign = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
        return (sign / sign.abs().sum(1, keepdim=True).clamp_min(1)).view_as(g)

    def limits(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each pixel: the box, and for linf the ball too.

        The ends are rounded towards ``x0``, so that the exact distance never exceeds eps, however small eps is.
        """
        if self._limits.get("x0") is not x0:
            low, high = torch.zeros_like(x0), torch.ones_like(x0)
            if self.norm == "linf" and math.isfinite(self.eps):
                exact = x0.double()
                low = torch.maximum(low, (exact - self.eps).to(x0.dtype))
                high = torch.minimum(high, (exact + self.eps).to(x0.dtype))
                low = torch.where(exact - low.double() > self.eps, torch.nextafter(low, x0), low)
                high = torch.where(high.double() - exact > self.eps, torch.nextafter(high, x0), high)
            self._limits = {"x0": x0, "ends": (low, high)}
        ends: tuple[Tensor, Tensor] = self._limits["ends"]
        return ends

    def project(self, x0: Tensor, x: Tensor) -> Tensor:
        """Bring ``x`` into the ball around ``x0`` and the box. Shapes: (n, ...) -> (n, ...).

        linf and l1 give the nearest point. In l2 the ball comes first and the box second, which can only shrink the
        distance, because ``x0`` lies in the box.
        """
        low, high = self.limits(x0)
        if self.norm == "linf" or not math.isfinite(self.eps):
            return torch.minimum(torch.maximum(x, low), high)
        radius = self.eps * (1 - REL)  # leaves room for the rounding of x0 + d
        d = x - x0
        if self.norm == "l2":
            length = per_row(vector_norm(d, "l2"), d)
            d = d * (radius / length.clamp_min(max(radius, torch.finfo(d.dtype).tiny)))
        else:
            d = project_l1_in_box(x0, d, radius)
        return (x0 + d).clamp(0, 1)

    def sample(self, x0: Tensor, rng: Any) -> Tensor:
        """A random point of the ball around each image, uniform before the box. Shapes: (n, ...) -> (n, ...)."""
        shape, size = x0.shape[1:], x0[0].numel()
        if self.norm == "linf":
            d = (2 * rng.uniform(*shape) - 1) * self.eps
        elif self.norm == "l2":
            d = rng.normal(*shape)
            d = d * per_row(self.eps * rng.uniform() ** (1 / size) / vector_norm(d, "l2"), d)
        else:
            # Exponential coordinates over their sum plus one more are uniform in the l1 ball.
            e = -rng.uniform(*shape).clamp_min(1e-30).log()
            more = -rng.uniform().clamp_min(1e-30).log()
            d = e * rng.sign(*shape) * per_row(self.eps / (e.flatten(1).sum(1) + more), e)
        return self.project(x0, x0 + d)

    def surface(self, x0: Tensor, rng: Any) -> Tensor:
        """A random point at distance eps (uniform noise in linf, Gaussian otherwise), then the box. -> (n, ...)."""
        shape = x0.shape[1:]
        d = 2 * rng.uniform(*shape) - 1 if self.norm == "linf" else rng.normal(*shape)
        return self.project(x0, x0 + d * per_row(self.eps / self.norm_of(d), d))

    def contains(self, x0: Tensor, x: Tensor) -> Tensor:
        """The verdict's test: finite, in the box, and within eps in float64 with the stated tolerance. -> (n,) bool."""
        flat = x.flatten(1)
        in_box = ((flat >= 0) & (flat <= 1)).all(1)  # false for NaN as well
        return in_box & (self.norm_of(x.double() - x0.double()) <= self.eps * (1 + REL) + ABS)
