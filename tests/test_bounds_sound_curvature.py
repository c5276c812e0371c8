"""Curvature bounded over whole regions, and the second-order bound as a proof."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robeval.bounds.convex import Convex, smooth, softplus
from robeval.bounds.graph import Graph, graph_of
from robeval.bounds.hessians import bends, largest_curvature, largest_eigenvalue, pushed, spectral_radius
from robeval.bounds.intervals import Interval, intervals
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region
from robeval.bounds.slopes import pulled, slopes
from robeval.bounds.sound_curvature import sound_curvature
from robeval.core.errors import ContractBroken
from robeval.core.smooth import SmoothReLU
from tests.problems import exact_distance, linear
from tests.proofs import KINDS, points, random_graph, random_region, slack

F64 = torch.float64
SMOOTH = [SmoothReLU(), nn.Softplus(beta=4)]
EPS = {"l2": 0.2, "linf": 0.03, "l1": 0.8}


def hessian(graph: Graph, x: Tensor, row: Tensor) -> Tensor:
    """Of <row, logits> at one image. -> (d, d)."""
    shape = x.shape
    return torch.autograd.functional.hessian(  # type: ignore[no-any-return]
        lambda flat: (graph.logits(flat.view(1, *shape)) @ row).sum(), x.flatten()
    )


def test_largest_eigenvalues_from_above() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40):
        a = (
            torch.randn(20, size, size, dtype=F64, generator=generator)
            * 10.0 ** torch.linspace(-12, 12, 20)[:, None, None]
        )
        h = a + a.mT
        h[3] = 0
        true = torch.linalg.eigvalsh(h)[:, -1]
        found = largest_eigenvalue(h)
        assert (found >= true).all()
        assert (found <= true + 1e-8 * torch.linalg.matrix_norm(h) + 1e-200).all()
        p = h.abs()
        radius = torch.linalg.eigvalsh(p)[:, -1]
        assert (spectral_radius(p) >= radius * (1 - 1e-15)).all()
        assert (spectral_radius(p) <= radius * 1.1 + 1e-200).all()


@pytest.mark.parametrize("op", [smooth(), softplus(1.0, 20.0), softplus(5.0, 20.0)], ids=lambda op: op.name)
def test_second_derivatives_lie_in_their_interval(op: Convex) -> None:
    generator = torch.Generator().manual_seed(0)
    low = 2 * torch.randn(300, dtype=F64, generator=generator)
    at = Interval(low, low + 10 ** (torch.rand(300, dtype=F64, generator=generator) * 6 - 5))
    found = bends(op, at)
    for share in torch.linspace(0, 1, 31, dtype=F64):
        u = (at.low + share * (at.high - at.low)).requires_grad_()
        (bend,) = torch.autograd.grad(op.slope(u).sum(), u)
        assert (bend >= found.low - 1e-12).all() and (bend <= found.high + 1e-12).all()
    narrow = bends(op, Interval(low, low))
    assert (narrow.high - narrow.low).max() < 1e-10


@pytest.mark.parametrize("act", SMOOTH, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_constant_lies_above_the_curvature_at_every_point(kind: str, act: nn.Module) -> None:
    graph, _ = random_graph(kind, act, 4)
    region = random_region("l2", 0.25, 4, rows=2)
    y = graph.logits(region.x).argmax(1)
    rows = margins_of(y, graph.classes).data
    found = intervals(graph, region)
    steep = slopes(graph, found)
    _, seen = pulled(graph, -rows, steep)
    if kind == "linear":
        assert not seen
        return
    room = torch.ones(2, 50, dtype=F64)
    columns = pushed(graph, region.x, steep)
    constant, corner = largest_curvature(graph, found, columns, seen, room)
    seen_most = torch.zeros_like(constant)
    for number, point in enumerate(points(graph, region, y, 4)):
        if number % 10 == 0:
            for i in range(2):
                for j in range(graph.classes):
                    h = hessian(graph, point[i].detach(), -rows[i, j])
                    values, vectors = torch.linalg.eigh(h)
                    seen_most[i, j] = torch.maximum(seen_most[i, j], values[-1])
                    sign = vectors[:, -1].sign()  # about the corner of the cube towards which h bends most
                    assert float(sign @ h @ sign) <= float(corner[i, j]) + 1e-9
    assert (seen_most <= constant + 1e-12).all()
    assert (seen_most > 0).any()
    # At a point nothing is uncertain: the constant is the largest eigenvalue itself.
    still = Region(region.x, "l2", torch.zeros(2, dtype=F64))
    at = intervals(graph, still)
    _, here = pulled(graph, -rows, slopes(graph, at))
    exact, _ = largest_curvature(graph, at, pushed(graph, region.x, slopes(graph, at)), here, room)
    for i in range(2):
        for j in range(graph.classes):
            top = max(0.0, float(torch.linalg.eigvalsh(hessian(graph, region.x[i], -rows[i, j]))[-1]))
            # Softplus as computed is 5e-10 below the curved one past its threshold, which the intervals allow for.
            assert float(exact[i, j]) == pytest.approx(top, rel=1e-5, abs=1e-5)
            assert float(exact[i, j]) >= top - 1e-12


@pytest.mark.parametrize("act", SMOOTH, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_lies_below_the_bound(kind: str, act: nn.Module) -> None:
    for seed, norm in enumerate(EPS):
        graph, _ = random_graph(kind, act, seed, single=seed == 0)
        region = random_region(norm, EPS[norm], seed)
        y = graph.logits(region.x).argmax(1)
        proof = sound_curvature(graph, region, y, intermediate="ibp" if seed == 1 else "crown")
        assert slack(graph, region, y, proof.lower, seed) >= 0
        wider = Region(region.x, norm, region.eps * 1.3)
        assert (
            sound_curvature(graph, wider, y, intermediate="ibp" if seed == 1 else "crown").lower <= proof.lower
        ).all()


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_linear_networks_are_exact(norm: str) -> None:
    model, these = linear(4)
    graph = graph_of(model.module, (1, 4, 4))
    distance = exact_distance(model, these, norm)
    near = distance < 0.3
    proof = sound_curvature(graph, Region(these.x, norm, distance * 0.9999), these.y)
    assert (proof.margin() > 0).all()
    assert proof.constant is not None and (proof.constant == 0).all()
    assert (sound_curvature(graph, Region(these.x, norm, distance * 1.0001), these.y).margin()[near] <= 0).all()


def test_a_quadratic_has_its_own_curvature() -> None:
    # Smooth ReLU of w x and of -w x: near 0 the sum bends by 2 * 1.5 w^2 along w and not at all across.
    first, last = nn.Linear(4, 2), nn.Linear(2, 2)
    w = torch.tensor([0.3, -0.2, 0.1, 0.4])
    first.weight.data, first.bias.data = torch.stack([w, -w]), torch.zeros(2)
    first.bias.data = torch.tensor([-0.5 * float(w.sum()), 0.5 * float(w.sum())])
    last.weight.data, last.bias.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0])
    graph = graph_of(nn.Sequential(nn.Flatten(), first, SmoothReLU(), last), (1, 2, 2))
    x = torch.full((1, 1, 2, 2), 0.5, dtype=F64)
    proof = sound_curvature(graph, Region(x, "l2", torch.tensor([1e-3], dtype=F64)), torch.tensor([0]))
    assert proof.constant is not None
    assert float(proof.constant[0]) == pytest.approx(3 * float(w.square().sum()), rel=1e-4)


def test_networks_with_kinks_are_refused_by_name() -> None:
    graph, _ = random_graph("pools", nn.ReLU(), 0)
    region = random_region("l2", 0.1, 0)
    with pytest.raises(ContractBroken, match=r"twice differentiable network; this one has .*ReLU.*MaxPool2d") as caught:
        sound_curvature(graph, region, torch.zeros(3, dtype=torch.int64))
    assert caught.value.code == "B01"


def test_shells_only_help() -> None:
    graph, _ = random_graph("dense", SmoothReLU(), 3)
    region = random_region("l2", 0.3, 3)
    y = graph.logits(region.x).argmax(1)
    one, two, six = (sound_curvature(graph, region, y, shells=k) for k in (1, 2, 6))
    assert (six.lower >= two.lower).all() and (two.lower >= one.lower).all()
    assert (six.margin() > one.margin()).all()
    assert one.constant is not None and six.constant is not None
    torch.testing.assert_close(one.constant, six.constant, rtol=1e-12, atol=0)
