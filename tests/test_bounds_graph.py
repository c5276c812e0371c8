"""Networks as operators, regions, intervals and linear bounds: what the proofs stand on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn
from torch.nn import functional

from robeval.bounds.convex import Convex, relu, smooth, softplus
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import graph_of
from robeval.bounds.intervals import intervals
from robeval.bounds.linear import backward
from robeval.bounds.region import Region
from robeval.bounds.rounding import UNIT, gamma
from robeval.bounds.rows import Rows
from robeval.core import catalogue
from robeval.core.errors import ContractBroken
from robeval.core.smooth import SmoothReLU

DOUBLE = torch.float64


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    x = 1.4 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) - 0.2
    return x.clamp(0, 1)


def radii(*eps: float) -> Tensor:
    return torch.tensor(eps, dtype=DOUBLE)


@pytest.mark.parametrize("name", ["digits_cnn", "sgr_cnn", "cnn6", "mlp", "resnet10_nobn", "preactresnet18"])
def test_architectures_of_the_house_are_known(name: str) -> None:
    """graph_of itself compares the logits; here they are compared once more, at other images."""
    build = catalogue.find("models", name).load()
    defaults = build.__kwdefaults__ or {}
    shape = (defaults.get("in_channels", 1), *[defaults.get("size", 32)] * 2)
    torch.manual_seed(0)
    net = build().eval()
    graph = graph_of(net, shape)
    x = images(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(graph.logits(x), net.double()(x), rtol=1e-9, atol=1e-9)


class Functions(nn.Module):
    """The same operators as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 3, 3))
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(functional.conv2d((x - 0.5) / 0.2, self.weight, padding=1))
        h = functional.max_pool2d(h, 2) - functional.avg_pool2d(h, 2)
        h = functional.leaky_relu(h, 0.2).mean((2, 3)).view(x.size(0), -1)
        out: Tensor = self.last(torch.flatten(2 * h, 1))
        return out


def test_functions_and_methods_are_known_too() -> None:
    torch.manual_seed(0)
    net = Functions()
    x = images(4, 1, 6, 6)
    torch.testing.assert_close(graph_of(net, (1, 6, 6)).logits(x), net.double()(x))


class Strange(nn.Module):
    """One forward with a step that no proof knows."""

    def __init__(self, step: Callable[[Tensor], Tensor]):
        super().__init__()
        self.step, self.last = step, nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.step(x.flatten(1)))
        return out


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (torch.sigmoid, "sigmoid"),
        (torch.round, "round"),
        (lambda h: h * h, "product of activations"),
        (lambda h: h / (1 + h), "quotient"),
        (lambda h: h.abs(), "abs"),
        (lambda h: functional.leaky_relu(h, 1.5), "slope 1.5"),
        (lambda h: h - h.mean(0), "mean over images"),
        (lambda h: h[:, :16], "indexing"),
        (lambda h: h.reshape(16, -1).T, "reshape"),
        (lambda h: h if h.sum() > 0 else -h, "forward that depends on its data"),
    ],
)
def test_what_is_not_known_is_refused_by_name(step: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(ContractBroken, match=said) as refusal:
        graph_of(Strange(step), (1, 4, 4))
    assert refusal.value.code == "B03"


def test_a_class_derived_from_a_layer_and_a_hook_are_not_taken_for_the_layer() -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = images(2, 1, 4, 4)
    net = nn.Sequential(nn.Flatten(), Doubled(), nn.Linear(16, 2))
    torch.testing.assert_close(graph_of(net, (1, 4, 4)).logits(x), net.double()(x))
    net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 2))
    net[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ContractBroken, match="hook"):
        graph_of(net, (1, 4, 4))


def test_a_plain_function_has_no_layers() -> None:
    with pytest.raises(ContractBroken, match="plain function"):
        graph_of(lambda x: x.flatten(1), (1, 4, 4))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_minimum_over_ball_and_box(norm: str) -> None:
    """Never above the minimum, and it is reached up to rounding: linf and l1 by linear programs, l2 by a solver."""
    x = images(4, 1, 3, 3)
    region = Region(x, norm, radii(0.01, 0.2, 0.9, 4.0))
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 5, 1, 3, 3, generator=generator, dtype=DOUBLE)
    a[0, 0] = 0
    a[1, 1, 0, 0] = 0
    found = region.minimum(a)
    for i in range(4):
        eps = float(region.eps[i])
        for s in range(5):
            row, start = a[i, s].flatten(), x[i].flatten()
            if norm == "l2":
                best = _l2_minimum(row, start, eps)
            else:
                budget = [[1.0] * 18] if norm == "l1" else None
                room = [(0, min(eps, float(1 - p))) for p in start] + [(0, min(eps, float(p))) for p in start]
                solved = linprog(
                    [*row.tolist(), *(-row).tolist()], budget, None if budget is None else [eps], bounds=room
                )
                best = float(row @ start) + solved.fun
            assert float(found[i, s]) <= best + 1e-9
            assert float(found[i, s]) == pytest.approx(best, abs=1e-6)


def _l2_minimum(a: Tensor, x: Tensor, eps: float) -> float:
    """By sequential quadratic programming."""
    ball = {"type": "ineq", "fun": lambda v: eps**2 - v @ v, "jac": lambda v: -2 * v}
    room = [(-p, 1 - p) for p in x.tolist()]
    start = (-1e-3 * eps * a / a.norm().clamp_min(1e-12) + x).clamp(0, 1) - x
    slope = a.numpy()
    how = {"ftol": 1e-14, "maxiter": 500}
    solved = minimize(
        lambda v: v @ slope, start.numpy(), jac=lambda v: slope, bounds=room, constraints=[ball], options=how
    )
    return float(a @ x) + float(solved.fun)


@pytest.mark.parametrize("act", [relu(), relu(0.1), smooth(), softplus(1.0, 20.0), softplus(5.0, 20.0)])
@pytest.mark.parametrize("at", [None, 0.0, 0.3, 1.0])
def test_lines_lie_below_and_above_the_activation(act: Convex, at: float | None) -> None:
    ends = torch.tensor(
        [-30.0, -3.0, -0.6, -0.5, -0.2, -1e-9, 0.0, 1e-9, 0.3, 0.5, 0.7, 3.999, 4.001, 21.0], dtype=DOUBLE
    )
    low, high = (t.flatten() for t in torch.meshgrid(ends, ends, indexing="ij"))
    low, high = low[low <= high], high[low <= high]
    position = None if at is None else torch.full_like(low, at)
    down, floor, up, top = act.lines(low, high, position)
    bottom, ceiling = act.interval(low, high)
    for share in torch.linspace(0, 1, 101, dtype=DOUBLE):
        u = torch.minimum(low + share * (high - low), high)
        value = act.value(u)
        assert (down * u + floor <= value).all()
        assert (value <= up * u + top).all()
        assert (bottom <= value).all()
        assert (value <= ceiling).all()
    if act.bend is not None:
        u = torch.linspace(-1, 1, 2001, dtype=DOUBLE, requires_grad=True)
        (first,) = torch.autograd.grad(act.value(u).sum(), u, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), u)
        for a, b in pairwise((0, 400, 900, 1001, 1500, 2000)):
            assert second[a : b + 1].max() <= act.bend(u[a : a + 1].detach(), u[b : b + 1].detach())
        torch.testing.assert_close(first.detach(), act.slope(u.detach()))


def test_windows_and_whole_maps_give_the_same_bounds() -> None:
    """Strides, padding, dilation, groups and a branch; every neuron of the last map, near the border and inside."""
    torch.manual_seed(2)

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.two = nn.Conv2d(4, 4, 1)

        def forward(self, h: Tensor) -> Tensor:
            return self.one(h) - 0.5 * self.two(h)

    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=2, dilation=2), nn.ReLU(), Branch(), SmoothReLU(),
        nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2 * 3 * 3, 2),
    )  # fmt: skip
    graph = graph_of(net, (1, 12, 12))
    for norm, eps in (("linf", 0.02), ("l2", 0.1), ("l1", 0.3)):
        region = Region(images(3, 1, 12, 12), norm, radii(eps, eps / 3, 0.0))
        found, lines = relaxed(graph, region, tight=False)
        node = next(k for k in reversed(range(len(graph.nodes))) if len(graph.nodes[k].shape) == 3)
        shape = graph.nodes[node].shape
        which = torch.arange(torch.Size(shape).numel())[None].expand(3, -1)
        windows = Rows.neurons(which, shape, region.x)
        assert windows.origin is not None
        small = backward(graph, region, node, windows, found, lines)
        large = backward(graph, region, node, windows.whole(), found, lines)
        torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-9)


def test_crown_is_within_the_intervals() -> None:
    """Interval by interval, and strictly tighter somewhere."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    graph = graph_of(net, (1, 4, 4))
    region = Region(images(5, 1, 4, 4), "linf", radii(0.01, 0.05, 0.1, 0.2, 0.5))
    loose, (tight, _) = intervals(graph, region), relaxed(graph, region, tight=True)
    assert all(
        (t.low >= w.low - 1e-9).all() and (t.high <= w.high + 1e-9).all() for t, w in zip(tight, loose, strict=True)
    )
    assert (tight[4].high - tight[4].low).sum() < 0.95 * (loose[4].high - loose[4].low).sum()


def test_a_margin_of_zero_is_never_proven() -> None:
    """Two equal logits: in exact arithmetic the margin is 0, and rounding must not lift the bound above it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        row = torch.randn(1, 64, generator=generator).repeat(2, 1) * 1e3
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
        net[1].weight.data = row
        graph = graph_of(net, (1, 8, 8))
        x = images(2, 1, 8, 8)
        for name in ("ibp", "crown"):
            proof = catalogue.find("bounds", name).load()(
                graph, Region(x, "linf", radii(0.1, 0.0)), torch.zeros(2).long()
            )
            assert (proof.margin() <= 0).all()


def test_gamma_bounds_the_rounding_of_sums_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4097, generator=generator, dtype=DOUBLE) for _ in range(2))
    exact = sum((int(p * 2**60) * int(q * 2**60) for p, q in zip(a.tolist(), b.tolist(), strict=True)), 0) / 2**120
    sizes = float((a.abs() * b.abs()).sum())
    for order in range(10):
        way = torch.randperm(len(a), generator=torch.Generator().manual_seed(order))
        assert abs(float(a[way] @ b[way]) - exact) <= gamma(len(a)) * sizes + 2e-17 * sizes
    assert gamma(1) >= UNIT
