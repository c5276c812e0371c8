"""Branch and bound against every pattern of signs, against alpha-crown, and against points of the region."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor, nn

from robeval.bounds import bab as module
from robeval.bounds.alpha_crown import alpha_crown
from robeval.bounds.bab import bab
from robeval.bounds.cells import Cells, Kinks
from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import graph_of
from robeval.bounds.multipliers import Task, bounded, passed
from robeval.bounds.region import Region
from robeval.core.errors import ContractBroken, UsageError
from tests.proofs import KINDS, margins, points, random_graph, random_region, slack

F64 = torch.float64
Array = NDArray[np.float64]


def small(kind: str, act: nn.Module, seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A network of few neurons whose first class wins by little in the middle of things."""
    torch.manual_seed(seed)
    shape = (1, 2, 2) if kind == "dense" else (1, 3, 3)
    if kind == "dense":
        body = [nn.Flatten(), nn.Linear(4, 8), act, nn.Linear(8, 6), act, nn.Linear(6, 3)]
    else:
        body = [nn.Conv2d(1, 2, 2), act, nn.Conv2d(2, 3, 2, padding=1, stride=2), act, nn.Flatten(), nn.Linear(12, 3)]
    net = nn.Sequential(*body).double()
    for p in net.parameters():
        p.data = torch.randn_like(p) * 1.5 * (2 / max(1, p[0].numel())) ** 0.5
    return net, shape


def affine(net: nn.Sequential, shape: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """Matrices and vectors between the activations."""
    parts: list[list[nn.Module]] = [[]]
    for m in net:
        if isinstance(m, nn.ReLU | nn.LeakyReLU):
            parts.append([])
        else:
            parts[-1].append(m)
    found, x = [], torch.zeros(1, *shape, dtype=F64)
    for part in parts:
        f = nn.Sequential(*part)
        with torch.no_grad():
            at = f(x)
            unit = torch.eye(x.numel(), dtype=F64).view(-1, *x.shape[1:])
            found.append(((f(unit) - at).flatten(1).T.numpy(), at.flatten().numpy()))
            x = torch.zeros_like(at)
    return found


def pieces(layers: list[tuple[Array, Array]], box: Any, leak: float) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Every linear piece of the network in a box: logits M x + c where A x <= b."""
    d = len(box)

    def walk(k: int, m: Array, c: Array, a: Array, b: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
        w, v = layers[k]
        m, c = w @ m, w @ c + v
        if k == len(layers) - 1:
            yield m, c, a, b
            return
        patterns = [(np.zeros(0), a, b)]
        for row, height in zip(m, c, strict=True):
            longer = []
            for slopes, a1, b1 in patterns:
                for slope, sign in ((1.0, 1.0), (leak, -1.0)):
                    a2, b2 = np.vstack([a1, -sign * row]), np.append(b1, sign * height)
                    if linprog(np.zeros(d), a2, b2, bounds=box).status == 0:
                        longer.append((np.append(slopes, slope), a2, b2))
            patterns = longer
        for slopes, a1, b1 in patterns:
            yield from walk(k + 1, slopes[:, None] * m, slopes * c, a1, b1)

    yield from walk(0, np.eye(d), np.zeros(d), np.zeros((0, d)), np.zeros(0))


def exact(net: nn.Sequential, region: Region, y: int, leak: float) -> Tensor:
    """The least margins of one image over its region by a linear program for each piece. -> (K,)."""
    box = list(zip(region.low.flatten().tolist(), region.high.flatten().tolist(), strict=True))
    layers = affine(net, tuple(region.x.shape[1:]))
    least = np.full(len(layers[-1][1]), np.inf)
    for m, c, a, b in pieces(layers, box, leak):
        for j in set(range(len(c))) - {y}:
            found = linprog(m[y] - m[j], a, b, bounds=box)
            if found.status == 0:
                least[j] = min(least[j], found.fun + c[y] - c[j])
    return torch.from_numpy(least)


@pytest.mark.parametrize(
    ("kind", "leak", "seed", "least", "most"),
    [("dense", 0.0, 104, 0.08, 0.18), ("dense", 0.2, 104, 0.08, 0.18), ("conv", 0.0, 106, 0.08, 0.14)],
)
def test_the_verdict_is_that_of_every_pattern_of_signs(
    kind: str, leak: float, seed: int, least: float, most: float
) -> None:
    net, shape = small(kind, nn.LeakyReLU(leak) if leak else nn.ReLU(), seed)
    x = torch.rand(1, *shape, dtype=F64)
    last = net[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias -= net(x)[0]
        last.bias[0] += 1.0
    graph, y = graph_of(net, shape), torch.tensor([0])
    radii = torch.linspace(least, most, 4, dtype=F64)
    together = Region(x.expand(4, *shape), "linf", radii)
    proof, before = bab(graph, together, y.expand(4)), alpha_crown(graph, together, y.expand(4))
    assert proof.witness is not None
    proven, seen = (proof.lower > 0).all(1), proof.witness.isfinite().flatten(1).all(1)
    for i in range(4):
        true = exact(net, together.take(torch.tensor([i])), 0, leak)
        assert (proof.lower[i] <= true + 1e-9).all()
        assert abs(float(true.min())) > 1e-3  # a least margin of 0 cannot be decided
        assert bool(proven[i]) == bool(true.min() > 0)
        assert bool(seen[i]) == bool(true.min() < 0)
    assert proven.any() and seen.any()
    assert (proven & ~(before.lower > 0).all(1)).any() or kind == "conv"


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2)], ids=["relu", "leaky"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_lies_below_the_bound_and_alpha_crown_never_above(kind: str, act: nn.Module) -> None:
    for seed, norm in enumerate(("linf", "l2", "l1")):
        graph, _ = random_graph(kind, act, seed)
        region = random_region(norm, {"l2": 0.4, "linf": 0.06, "l1": 1.5}[norm], seed)
        y = graph.logits(region.x).argmax(1)
        proof = bab(graph, region, y, branches=24, steps=8)
        assert (proof.lower >= alpha_crown(graph, region, y, steps=8).lower).all()
        assert slack(graph, region, y, proof.lower, seed) >= 0
        assert proof.witness is not None
        seen = proof.witness.isfinite().flatten(1).all(1)
        assert not (seen & (proof.lower > 0).all(1)).any()
        for i in seen.nonzero()[:, 0]:
            one = i[None]
            assert region.take(one).contains(proof.witness[one]).all()
            assert (graph.logits(proof.witness[one]).argmax(1) != y[one]).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_cases_raise_the_bound_in_every_norm(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_try", lambda *_: None)  # a witness would end the search
    graph, _ = random_graph("dense", nn.ReLU(), 1)
    region = random_region(norm, {"l2": 0.5, "linf": 0.08, "l1": 2.0}[norm], 1)
    y = graph.logits(region.x).argmax(1)
    with torch.no_grad():  # as the runner calls it
        start, more = bab(graph, region, y, branches=0), bab(graph, region, y, branches=60)
    torch.testing.assert_close(start.lower, alpha_crown(graph, region, y).lower)
    assert (more.lower >= start.lower).all()
    assert (more.lower > start.lower + 1e-3).any()


def test_every_choice_of_lines_and_multipliers_holds_where_the_signs_do() -> None:
    for seed, kind in enumerate(("dense", "strided", "branches")):
        graph, _ = random_graph(kind, nn.ReLU(), seed)
        region = random_region("l2", 1.0, seed)
        y = graph.logits(region.x).argmax(1)
        found, _ = relaxed(graph, region, tight=False)
        kinks = Kinks.of(graph)
        tried = list(points(graph, region, y, seed))
        image = torch.arange(3).repeat_interleave(4)
        rival = (y[image] + 1 + torch.arange(12) % 3) % 4
        # The signs that the neurons have at some point of the region, a few of them assumed.
        values = [graph.values(p) for p in tried]
        signs = [kinks.row({k: v[k] for k in kinks.places}, 3).sign() for v in values]
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(12, signs[0].shape[1], generator=generator) < 0.1
        side = (signs[-1][image] * kept).to(torch.int8)
        dial = torch.rand(side.shape, generator=generator, dtype=F64)
        dial = torch.where(side == 0, dial, 5 * dial)
        cells = Cells(image, rival, side, dial, torch.full((12,), -torch.inf, dtype=F64), torch.zeros_like(image))
        task = Task(kinks, region, y, found)
        random, best = passed(task, cells), bounded(task, cells, 10, 0.25).cells.lower
        assert (best >= random).all()
        inside = 0
        for point, sign in zip(tried, signs, strict=True):
            holds = ((sign[image] == side) | (side == 0)).all(1)
            margin = margins(graph, point, y)[image, rival]
            assert (margin >= best)[holds].all()
            inside += int(holds.sum())
        assert inside >= 12


def test_limits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = random_graph("dense", nn.ReLU(), 1)
    region = random_region("linf", 0.15, 1)
    y = graph.logits(region.x).argmax(1)
    used = torch.zeros(3, dtype=torch.int64)

    def counted(task: Task, cells: Cells, steps: int, rate: float) -> Any:
        if steps:
            used.add_(torch.bincount(cells.image, minlength=3))
        return bounded(task, cells, steps, rate)

    monkeypatch.setattr(module, "bounded", counted)
    monkeypatch.setattr(module, "_try", lambda *_: None)
    bab(graph, region, y, branches=0, steps=3)
    assert used.tolist() == [0, 0, 0]
    short = bab(graph, region, y, branches=31, steps=3).lower
    assert used.max() in (30, 31)
    used.zero_()
    assert (bab(graph, region, y, branches=200, steps=3).lower >= short - 1e-9).all()
    assert 31 < used.max() <= 200
    used.zero_()
    bab(graph, region, y, branches=10**6, seconds=1e-9, steps=3)
    assert used.tolist() == [0, 0, 0]


def test_what_cannot_be_split_is_refused() -> None:
    graph, _ = random_graph("dense", nn.Softplus(), 0)
    region = random_region("linf", 0.1, 0)
    y = graph.logits(region.x).argmax(1)
    with pytest.raises(ContractBroken, match="softplus") as refusal:
        bab(graph, region, y)
    assert refusal.value.code == "B01"
    graph, _ = random_graph("dense", nn.ReLU(), 0)
    for wrong in ({"branches": -1}, {"seconds": 0.0}):
        with pytest.raises(UsageError):
            bab(graph, region, y, **wrong)  # type: ignore[arg-type]
