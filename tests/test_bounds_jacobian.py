"""Intervals of slopes and Jacobians, and the local Lipschitz bound made of them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from robeval.bounds.convex import Convex, relu, smooth, softplus
from robeval.bounds.graph import graph_of
from robeval.bounds.ibp import ibp
from robeval.bounds.intervals import Interval, intervals
from robeval.bounds.jacobian import jacobian
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region
from robeval.bounds.slopes import derivatives, pulled, secants, slopes
from tests.problems import exact_distance, linear
from tests.proofs import KINDS, activations, margins, points, random_graph, random_region, slack

F64 = torch.float64
CURVES = [relu(), relu(0.2), smooth(), softplus(1.0, 20.0), softplus(5.0, 20.0)]


@pytest.mark.parametrize("op", CURVES, ids=lambda op: op.name)
def test_slopes_of_chords_lie_in_their_interval_and_that_between_the_derivatives(op: Convex) -> None:
    generator = torch.Generator().manual_seed(0)
    width = 10 ** (torch.rand(400, dtype=F64, generator=generator) * 8 - 7)
    low = 2 * torch.randn(400, dtype=F64, generator=generator)
    at = Interval(low, low + width)
    u = low + width * torch.rand(400, dtype=F64, generator=generator)
    chords, tangents = secants(op, at, Interval(u, u)), derivatives(op, at)
    assert (chords.low >= tangents.low).all() and (chords.high <= tangents.high).all()
    assert (chords.high - chords.low < 0.9 * (tangents.high - tangents.low)).any()
    for share in torch.linspace(0, 1, 41, dtype=F64):
        v = low + width * share
        rise, error = op.value(v) - op.value(u), 2e-15 * (1 + u.abs() + v.abs()) + 2 * op.below
        run = v - u
        least = torch.where(run > 0, chords.low, chords.high) * run
        most = torch.where(run > 0, chords.high, chords.low) * run
        assert (rise >= least - error).all() and (rise <= most + error).all()
        point = v.clone().requires_grad_()
        (slope,) = torch.autograd.grad(op.value(point).sum(), point)
        error = 1e-14 + 10 * op.below  # softplus as computed has a kink at its threshold
        assert (slope >= tangents.low - error).all() and (slope <= tangents.high + error).all()


@pytest.mark.parametrize("act", activations(), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_lies_below_the_bound(kind: str, act: nn.Module) -> None:
    for seed, norm in enumerate(("l2", "linf", "l1")):
        graph, _ = random_graph(kind, act, seed, single=seed == 0)
        region = random_region(norm, {"l2": 0.3, "linf": 0.05, "l1": 1.0}[norm], seed)
        y = graph.logits(region.x).argmax(1)
        way: Literal["crown", "ibp"] = "ibp" if seed == 1 else "crown"
        proof = jacobian(graph, region, y, intermediate=way)
        assert slack(graph, region, y, proof.lower, seed) >= 0
        wider = jacobian(graph, Region(region.x, norm, region.eps * 1.3), y, intermediate=way)
        assert (wider.lower <= proof.lower).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", activations(), ids=lambda m: type(m).__name__)
def test_every_gradient_of_the_region_lies_in_the_interval_of_the_jacobian(kind: str, act: nn.Module) -> None:
    graph, _ = random_graph(kind, act, 5)
    region = random_region("linf", 0.05, 5)
    y = graph.logits(region.x).argmax(1)
    rows = margins_of(y, graph.classes).data
    jacobians, _ = pulled(graph, rows, slopes(graph, intervals(graph, region)))
    for point in points(graph, region, y, 5, steps=2):
        x = point.detach().requires_grad_()
        z = graph.logits(x)
        for j in range(graph.classes):
            (g,) = torch.autograd.grad((rows[:, j] * z).sum(), x, retain_graph=True)
            assert (g >= jacobians.low[:, j] - 1e-12).all() and (g <= jacobians.high[:, j] + 1e-12).all()


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_linear_networks_are_exact(norm: str) -> None:
    model, these = linear(4)
    graph = graph_of(model.module, (1, 4, 4))
    distance = exact_distance(model, these, norm)
    near = distance < 0.3  # where the box is out of reach
    assert near.any()
    below = jacobian(graph, Region(these.x, norm, distance * 0.9999), these.y).margin()
    above = jacobian(graph, Region(these.x, norm, distance * 1.0001), these.y).margin()
    assert (below > 0).all()
    assert (above[near] <= 0).all()


def test_where_no_neuron_can_switch_the_bound_is_exact() -> None:
    graph, _ = random_graph("dense", nn.ReLU(), 1)
    x = random_region("l2", 1.0, 1).x.clamp(0.2, 0.8)
    y = graph.logits(x).argmax(1)
    eps = torch.full((3,), 1e-4, dtype=F64)
    lower = jacobian(graph, Region(x, "l2", eps), y).lower
    point = x.clone().requires_grad_()
    gap = margins(graph, point, y)
    for j in range(graph.classes):
        finite = gap[:, j].isfinite()
        (g,) = torch.autograd.grad(gap[:, j][finite].sum(), point, retain_graph=True)
        expect = (gap[:, j] - eps * g.flatten(1).norm(dim=1))[finite].detach()
        torch.testing.assert_close(lower[:, j][finite], expect, rtol=0, atol=1e-9)


def test_better_than_intervals_alone_on_small_balls() -> None:
    graph, _ = random_graph("dense", nn.ReLU(), 2)
    region = random_region("linf", 0.005, 2)
    y = graph.logits(region.x).argmax(1)
    assert (jacobian(graph, region, y, intermediate="ibp").margin() > ibp(graph, region, y).margin()).all()


def test_the_constant_is_the_dual_norm_of_the_decisive_rival() -> None:
    model, these = linear(2)
    graph = graph_of(model.module, (1, 4, 4))
    w = model.module[1].weight  # type: ignore[index]
    found = jacobian(graph, Region(these.x, "linf", torch.full((24,), 0.01, dtype=F64)), these.y).constant
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, (w[0] - w[1]).abs().sum().expand(24), rtol=1e-9, atol=0)
