"""Small random networks, and points of their regions that try to contradict a proof."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robeval.bounds.graph import Graph, graph_of
from robeval.bounds.region import Region
from robeval.core.ball import Ball, per_row
from robeval.core.smooth import SmoothReLU
from robeval.core.streams import Streams

SHAPE = (2, 5, 5)


class Branches(nn.Module):
    """x + branch, and a shortcut with a weight of its own."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1))
        self.shortcut = nn.Conv2d(4, 4, 1, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.inner(x)) - self.shortcut(x)


def activations() -> list[nn.Module]:
    return [nn.ReLU(), nn.LeakyReLU(0.2), SmoothReLU(), nn.Softplus(beta=4)]


def body(kind: str, act: nn.Module) -> list[nn.Module]:
    """Layers up to the logits."""
    if kind == "linear":
        return [nn.Flatten(), nn.Linear(50, 4)]
    if kind == "dense":
        return [nn.Flatten(), nn.Linear(50, 12), act, nn.Linear(12, 9), act, nn.Linear(9, 4)]
    if kind == "strided":
        return [
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            act,
            nn.Conv2d(4, 6, 2, groups=2),
            act,
            nn.Flatten(),
            nn.Linear(24, 4),
        ]
    if kind == "pools":
        pool: list[nn.Module] = (
            [nn.AvgPool2d(2, 1)] if not isinstance(act, nn.ReLU) else [nn.MaxPool2d(2, 1), nn.AvgPool2d(2)]
        )
        side = 4 if len(pool) == 1 else 2
        return [
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            act,
            *pool,
            nn.Flatten(),
            nn.Linear(4 * side * side, 4),
        ]
    return [nn.Conv2d(2, 4, 3, padding=1), act, Branches(act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]


KINDS = ("linear", "dense", "strided", "pools", "branches")


def random_graph(
    kind: str, act: nn.Module, seed: int, *, single: bool = False, gain: float = 2.0
) -> tuple[Graph, nn.Module]:
    """A network with random weights and statistics, and what proofs read of it."""
    torch.manual_seed(seed)
    net = nn.Sequential(*body(kind, act)).eval()
    for m in net.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            m.weight.data *= gain
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.weight.data.normal_()
    net = net if single else net.double()
    return graph_of(net, SHAPE), net


def random_region(norm: str, eps: float, seed: int, rows: int = 3) -> Region:
    """Images with many pixels at the ends of the box."""
    generator = torch.Generator().manual_seed(seed)
    x = (1.6 * torch.rand(rows, *SHAPE, generator=generator, dtype=torch.float64) - 0.3).clamp(0, 1)
    return Region(x, norm, torch.linspace(eps / 2, eps, rows, dtype=torch.float64))


def margins(graph: Graph, x: Tensor, y: Tensor) -> Tensor:
    """f_y - f_j with infinity at j = y."""
    z = graph.logits(x)
    return (z.gather(1, y[:, None]) - z).scatter(1, y[:, None], torch.inf)


def points(graph: Graph, region: Region, y: Tensor, seed: int, steps: int = 6) -> Iterator[Tensor]:
    """Random points of the regions, and iterates of a descent on the margin against every rival."""
    n = len(region.x)
    rng = Streams(seed, list(range(n)), "points", dtype=torch.float64)
    # One ball of radius 1 is as good as one for each image: what is drawn shrinks with eps.
    for k in range(6):
        v = Ball(region.norm, 1.0).sample(torch.full_like(region.x, 0.5), rng) - 0.5
        v = v / (2 * v.abs().flatten(1).amax(1)).clamp_min(1)[:, None, None, None] if k % 2 else v.sign() * 1.0
        yield inside(region, region.x + v)
    for rival in range(graph.classes):
        point = region.x.clone()
        for _ in range(steps):
            point.requires_grad_()
            z = graph.logits(point)
            (g,) = torch.autograd.grad((z[:, rival] - z.gather(1, y[:, None])[:, 0]).sum(), point)
            step = Ball(region.norm, 1.0).ascent(g, point.detach()) * per_row(region.eps, g) / 2
            point = inside(region, point.detach() + step)
            yield point


def inside(region: Region, point: Tensor) -> Tensor:
    """The point pulled into ball and box, with nothing to spare for rounding."""
    rows = [
        Ball(region.norm, float(e)).project(x[None], p[None])
        for x, p, e in zip(region.x, point, region.eps, strict=True)
    ]
    moved = torch.cat(rows)
    v = (moved - region.x) * (1 - 1e-12)
    return (region.x + v).clamp(0, 1)


def slack(graph: Graph, region: Region, y: Tensor, lower: Tensor, seed: int) -> float:
    """Least excess of a margin at any tried point over its lower bound; a sound bound never lets it fall below 0."""
    least = torch.inf
    for point in points(graph, region, y, seed):
        assert region.contains(point).all()
        gap = (margins(graph, point, y) - lower)[lower.isfinite()]
        least = min(least, float(gap.min()))
    return least
