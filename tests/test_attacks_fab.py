"""Projections on hyperplanes within the box, and the fast adaptive boundary attack that is made of them."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from robeval.attacks import hyperplanes
from robeval.attacks.fab import START, fab
from robeval.attacks.hyperplanes import shortest_move
from robeval.attacks.nearer import nearer, nearest
from robeval.core.ball import DUAL, NORMS, Ball, vector_norm
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.questions import Gradient, Logits
from robeval.core.streams import Streams
from robeval.engine.backend import Backend
from robeval.engine.drive import answer
from robeval.engine.judge import Outcome
from robeval.engine.run import Plan, run
from tests.problems import exact_distance, linear, network

DOUBLE = torch.float64


def reach(x: Tensor, w: Tensor) -> Tensor:
    """By how much <w, x> can fall within the box. -> (n,)."""
    return (w.clamp_min(0) * x - w.clamp_max(0) * (1 - x)).sum(1)


def cases(kind: str, n: int, d: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points, normals and gaps whose hyperplanes meet the box."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.rand(n, d, generator=g, dtype=DOUBLE), torch.randn(n, d, generator=g, dtype=DOUBLE)
    if kind == "faces":
        x = torch.where(torch.rand(n, d, generator=g) < 0.7, x.round(), x)
    elif kind == "ties":
        w = (2 * w).round() / 2
        w[:, 0] = 1
    elif kind == "sparse":
        w = w * (torch.rand(n, d, generator=g) < 0.3)
        w[:, 0] = 1
    elif kind == "uneven":  # room and steepness run against each other over many orders of magnitude
        w = w.sign() * 10 ** torch.linspace(-6, 0, d, dtype=DOUBLE)
        x = torch.where(w > 0, 0, 1) + w.sign() * 10 ** torch.linspace(0, -6, d, dtype=DOUBLE)
    share = torch.rand(n, generator=g, dtype=DOUBLE)
    sign = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0).double()
    w = w * sign[:, None] if kind != "uneven" else w
    sign = torch.ones_like(sign) if kind == "uneven" else sign
    gap = sign * share * torch.where(sign > 0, reach(x, w), reach(x, -w))
    return x.to(dtype), w.to(dtype), gap.to(dtype)


KINDS = ("plain", "faces", "ties", "sparse", "uneven")


def by_programming(x: Tensor, w: Tensor, gap: Tensor, norm: str) -> float:
    """The least norm by scipy's linear or quadratic programming, for one row."""
    d, a, box = len(x), w.numpy(), [(-float(v), 1 - float(v)) for v in x]
    if norm == "l2":
        feasible = linprog(np.zeros(d), A_eq=a[None], b_eq=[-float(gap)], bounds=box).x
        solved = minimize(
            lambda v: v @ v, feasible, jac=lambda v: 2 * v, bounds=box, method="SLSQP",
            constraints={"type": "eq", "fun": lambda v: a @ v + float(gap), "jac": lambda v: a},
            options={"ftol": 1e-15, "maxiter": 500},
        )  # fmt: skip
        return float(np.sqrt(solved.fun))
    # Bounds t on |d|: one for all in linf, one each in l1.
    sizes = np.ones((d, 1)) if norm == "linf" else np.eye(d)
    k = sizes.shape[1]
    solved = linprog(
        np.r_[np.zeros(d), np.ones(k)],
        A_ub=np.block([[np.eye(d), -sizes], [-np.eye(d), -sizes]]), b_ub=np.zeros(2 * d),
        A_eq=np.r_[a, np.zeros(k)][None], b_eq=[-float(gap)], bounds=box + [(0, None)] * k,
    )  # fmt: skip
    return float(solved.fun)


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("norm", NORMS)
def test_moves_are_the_shortest_that_programming_finds(norm: str, kind: str) -> None:
    x, w, gap = cases(kind, 12, 7)
    found = vector_norm(shortest_move(x, w, gap, norm), norm)
    least = [by_programming(*row, norm) for row in zip(x, w, gap, strict=True)]
    assert torch.allclose(found, torch.tensor(least, dtype=DOUBLE), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_moves_end_on_the_hyperplane_and_in_the_box(norm: str, kind: str, dtype: torch.dtype) -> None:
    x, w, gap = cases(kind, 40, 300, dtype)
    move = shortest_move(x, w, gap, norm)
    unit = torch.finfo(dtype).eps
    assert move.dtype == dtype
    assert ((x + move >= -unit) & (x + move <= 1 + unit)).all()
    left = (gap + (w * move).sum(1)).abs()
    assert (left <= 30 * unit * w.abs().sum(1)).all()
    exact = shortest_move(x.double(), w.double(), gap.double(), norm)
    assert torch.allclose(vector_norm(move, norm).double(), vector_norm(exact, norm), rtol=1e3 * unit)


@pytest.mark.parametrize("norm", NORMS)
def test_far_from_the_box_the_move_is_the_plain_projection(norm: str) -> None:
    g = torch.Generator().manual_seed(1)
    x = 0.5 + 0.2 * (torch.rand(30, 1, 4, 5, generator=g, dtype=DOUBLE) - 0.5)
    w = torch.randn(30, 1, 4, 5, generator=g, dtype=DOUBLE)
    gap = 0.2 * torch.randn(30, generator=g, dtype=DOUBLE)
    move = shortest_move(x, w, gap, norm)
    assert torch.allclose(vector_norm(move, norm), gap.abs() / vector_norm(w, DUAL[norm]), rtol=1e-12)
    if norm == "l2":
        assert torch.allclose(move.flatten(1), -(gap / (w**2).flatten(1).sum(1))[:, None] * w.flatten(1), rtol=1e-12)


@pytest.mark.parametrize(
    ("norm", "x", "w", "gap", "move"),
    [
        ("linf", [0.5], [2.0], 0.4, [-0.2]),
        ("l1", [0.5], [-2.0], 0.4, [0.2]),
        ("linf", [0.5, 0.1], [1.0, 1.0], 0.5, [-0.4, -0.1]),  # the second pixel stops at its face
        ("l2", [0.5, 0.1], [1.0, 1.0], 0.5, [-0.4, -0.1]),
        ("l2", [0.5, 0.5], [3.0, 4.0], -1.0, [0.12, 0.16]),
        ("l1", [0.5, 0.5], [3.0, 4.0], -1.0, [0.0, 0.25]),
        ("l1", [0.5, 0.9], [3.0, 4.0], -1.0, [0.2, 0.1]),  # the steepest first, then the other
        ("l1", [0.5, 0.5], [1.0, 1.0], 0.4, [-0.2, -0.2]),  # ties share
        ("linf", [0.5, 0.1], [1.0, 1.0], 9.0, [-0.5, -0.1]),  # out of reach: the nearest corner
        ("l2", [0.5, 0.1], [1.0, 0.0], 9.0, [-0.5, 0.0]),
        ("l1", [0.5, 0.1], [1.0, 1e-30], 9.0, [-0.5, -0.1]),
        ("l2", [1.0, 0.0], [-5.0, 1e-30], 1e-31, [0.0, 0.0]),  # nothing can move
        ("linf", [0.5, 0.5], [0.0, 0.0], 1.0, [0.0, 0.0]),
        ("l2", [0.5, 0.5], [0.0, 0.0], 0.0, [0.0, 0.0]),
        ("l1", [0.5, 0.5], [0.0, 0.0], -1.0, [0.0, 0.0]),
        ("l1", [0.5, 0.5], [1.0, 2.0], 0.0, [0.0, 0.0]),
        ("l2", [0.5, 0.5], [3e-30, 4e-30], -1e-30, [0.12, 0.16]),  # squares would vanish in float32
        ("linf", [1.0, 0.5], [-1.0, 1e-20], 1e-21, [0.0, -0.1]),  # the only pixel with room is far less steep
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moves_by_hand(
    norm: str, x: list[float], w: list[float], gap: float, move: list[float], dtype: torch.dtype
) -> None:
    found = shortest_move(
        torch.tensor([x], dtype=dtype), torch.tensor([w], dtype=dtype), torch.tensor([gap], dtype=dtype), norm
    )
    assert torch.allclose(found, torch.tensor([move], dtype=dtype), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", NORMS)
def test_a_row_is_bit_for_bit_the_same_in_any_company(norm: str, dtype: torch.dtype) -> None:
    for kind in ("plain", "ties"):
        x, w, gap = cases(kind, 33, 201, dtype)
        whole = shortest_move(x, w, gap, norm)
        for width in (1, 2, 7):
            parts = [
                shortest_move(*rows, norm)
                for rows in zip(x.split(width), w.split(width), gap.split(width), strict=True)
            ]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_nan_neither_hang_nor_spread(norm: str) -> None:
    x, w, gap = cases("plain", 6, 20)
    whole = shortest_move(x, w, gap, norm)
    w[::2], gap[::3] = math.nan, math.nan
    assert torch.equal(shortest_move(x, w, gap, norm)[[1, 5]], whole[[1, 5]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", NORMS)
def test_few_steps_suffice_however_uneven_the_row(
    norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rooms and steepness over the whole range of the exponents, from every part of the reach."""
    steps = 0

    def counted(*args: Any, **more: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return above(*args, **more)

    above = hyperplanes.above
    monkeypatch.setattr(hyperplanes, "above", counted)
    d, span = 2000, 30 if dtype == torch.float32 else 300
    for towards in (-1, 1):
        w = 10 ** (span * torch.linspace(-1, 0, d, dtype=DOUBLE))
        room = 10 ** (towards * span / 2 * torch.linspace(-1, 1, d, dtype=DOUBLE) - span / 2)
        gap = (w * room).sum() * 10 ** -torch.linspace(0.01, span / 2, 20, dtype=DOUBLE)
        steps = 0
        move = shortest_move(room.expand(20, -1).to(dtype), w.expand(20, -1).to(dtype), gap.to(dtype), norm)
        assert steps < 10 + max(96, math.log(d * 10.0**span / torch.finfo(dtype).eps, 4))
        assert torch.allclose(-(w * move.double()).sum(1), gap, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize(
    ("norm", "theirs"), [("linf", "projection_linf"), ("l2", "projection_l2"), ("l1", "projection_l1")]
)
def test_norms_are_those_of_the_reference(norm: str, theirs: str, kind: str) -> None:
    reference = pytest.importorskip("pyautoattack.fab_projections", reason="needs the extra robeval[reference]")
    for d in (2, 16, 200):
        x, w, gap = cases(kind, 60, d)
        gap = gap * torch.linspace(0.1, 1.5, 60, dtype=DOUBLE)  # the last ones out of reach
        mine = vector_norm(shortest_move(x, w, gap, norm), norm)
        assert torch.allclose(
            mine, vector_norm(getattr(reference, theirs)(x, w, (w * x).sum(1) - gap), norm), rtol=1e-6
        )


def found(
    model: Classifier, these: Images, norm: str, eps: float = math.inf, seed: int = 0, **settings: Any
) -> tuple[Tensor, list[Outcome]]:
    """Distances and outcomes of the attack with all its attempts, by image."""
    attempts = settings.get("restarts", 1) * max(settings.get("targets", 0), 1)
    outcomes = run(
        Plan("fab", partial(fab, **settings), attempts), these, Untargeted(these.y), Ball(norm, eps),
        Backend(model, 256), seed=seed, clean=model.logits(these.x).detach(),
    )  # fmt: skip
    ordered = sorted(outcomes, key=lambda o: o.position)
    return torch.tensor([o.distances[norm] for o in ordered], dtype=DOUBLE), ordered


@pytest.mark.parametrize("targets", [0, 1])
@pytest.mark.parametrize("norm", NORMS)
def test_between_two_linear_classes_the_iterates_follow_their_recursion(norm: str, targets: int) -> None:
    """All points lie on one line, at r exact distances from the image."""
    model, these = linear(2)
    r, best = 0.0, math.inf
    for steps in range(1, 12):
        alpha = min(abs(1 - r) / (abs(1 - r) + 1), 0.1)
        r = (1 - alpha) * (r + 1.05 * (1 - r)) + alpha * 1.05
        if r > 1:
            best, r = min(best, r), 0.9 * r
        distance, _ = found(model, these, norm, steps=steps, targets=targets, descent=0)
        assert torch.allclose(distance, best * exact_distance(model, these, norm), rtol=1e-9)


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_linear_distances_within_the_overshoot(norm: str, targets: int) -> None:
    model, these = linear(5, rows=40)
    exact = exact_distance(model, these, norm)
    for eta, slack in ((1.05, 6e-3), (1.001, 1e-3)):
        distance, _ = found(model, these, norm, steps=12, targets=targets, eta=eta, descent=0)
        assert (distance >= exact).all()
        assert (distance <= exact * (1 + slack)).all()


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize(("norm", "theirs"), [("linf", "Linf"), ("l2", "L2"), ("l1", "L1")])
def test_law_11_distances_are_those_of_the_reference(norm: str, theirs: str, targets: int) -> None:
    reference = pytest.importorskip("pyautoattack.fab_pt", reason="needs the extra robeval[reference]")
    model, these = network(rows=60, dtype=torch.float32)  # the reference computes in float32 whatever it is given
    attack = reference.FABAttack_PT(model.logits, norm=theirs, n_iter=50, eps=1.0, device="cpu")
    least = torch.full((60,), math.inf, dtype=DOUBLE)
    for attack.target_class in range(2, 2 + max(targets, 1)):
        x = attack.attack_single_run(these.x, these.y, is_targeted=targets > 0)
        distance = vector_norm(x.double() - these.x.double(), norm)
        least = torch.where(model.logits(x).argmax(1) != these.y, torch.minimum(least, distance), least)
    mine, outcomes = found(model, these, norm, steps=50, targets=targets, descent=0)
    assert least.isfinite().all()
    assert ((mine / least - 1).abs() <= 1e-3).double().mean() >= 0.95
    assert (mine / least).mean() <= 1 + 1e-4
    # The reference spends three forwards more: ours needs neither the clean logits nor a last look of its own.
    assert {o.forwards for o in outcomes} == {100 * max(targets, 1) + 2}
    assert {o.backwards for o in outcomes} == {200}  # of 4 rivals in each step, or of 4 targets


def test_each_attempt_starts_where_it_should_and_goes_for_its_own_class() -> None:
    model, these = network(rows=1, dtype=torch.float32)
    these.x[:] = 0.5  # room for every start
    z, goal = model.logits(these.x).detach(), Untargeted(model.logits(these.x).argmax(1).expand(6))
    x0 = these.x.expand(6, -1, -1, -1)
    ranking = [int(k) for k in z[0].argsort(descending=True)[1:]]

    def second(norm: str, eps: float, **settings: Any) -> Gradient:
        rng = Streams(0, [7] * 6, "fab", range(6))
        asking = fab(x0, goal, Ball(norm, eps), rng, restarts=2, **settings)
        first = next(asking)
        assert isinstance(first, Logits)
        asked = asking.send(answer(first, model.logits, goal, torch.ones(6, dtype=torch.bool)))
        assert isinstance(asked, Gradient)
        return asked

    for norm in NORMS:
        for eps, radius, more in ((math.inf, START[norm], {}), (0.1, 0.05, {}), (0.1, 0.2, {"start_radius": 0.2})):
            asked = second(norm, eps, targets=3, **more)
            assert torch.equal(asked.points[:3], x0[:3])
            away = vector_norm(asked.points[3:] - x0[3:], norm)
            assert (away <= radius * (1 + 1e-5)).all()
            assert (away >= (0.5 if radius > 1 else 1 - 1e-4) * radius).all()  # the box cuts large starts
            assert len(asked.points[3:].flatten(1).unique(dim=0)) == 3
            assert asked.args[0].tolist() == [[k] for k in ranking[:3] * 2]
    asked = second("linf", math.inf)
    assert torch.equal(asked.points[0], x0[0])
    assert not (asked.points[1:] == x0[1:]).flatten(1).all(1).any()
    assert asked.args[0].tolist() == [sorted(ranking)] * 6


@pytest.mark.parametrize(
    ("norm", "radius", "targets"), [("linf", 0.02, 0), ("l2", 0.1, 0), ("l2", 0.1, 2), ("l1", 0.2, 0)]
)
def test_more_restarts_only_help(norm: str, radius: float, targets: int) -> None:
    model, these = network(rows=60)
    one, _ = found(model, these, norm, steps=20, targets=targets)
    four, outcomes = found(model, these, norm, steps=20, targets=targets, restarts=4, start_radius=radius)
    assert (four <= one).all()
    better = four < one
    assert better.any()
    assert all(o.attempt >= max(targets, 1) for o, b in zip(outcomes, better, strict=True) if b)


def test_a_finite_radius_stops_at_the_first_point_within_it() -> None:
    model, these = network(rows=30)
    nearest, _ = found(model, these, "linf", steps=30)
    eps = float(nearest.median())
    within, outcomes = found(model, these, "linf", eps, steps=30)
    assert torch.equal(within <= eps, nearest <= eps)
    assert any(o.forwards < 62 for o in outcomes)


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_the_descent_takes_the_overshoot_back(norm: str, targets: int) -> None:
    """Where the boundary is flat, nothing but rounding and the last shares of the radius is left."""
    model, these = linear(5, rows=40)
    exact = exact_distance(model, these, norm)
    ratio = found(model, these, norm, steps=12, targets=targets)[0] / exact
    assert (ratio >= 1).all()
    assert (ratio <= (1 + 6e-3 if norm == "l1" else 1 + 2e-3)).all()
    assert ratio.mean() < 1 + 1.5e-3


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_the_descent_only_helps_and_costs_its_steps_once_a_start(norm: str, targets: int) -> None:
    model, these = network(rows=60)
    how: dict[str, Any] = {"steps": 20, "targets": targets, "restarts": 3, "start_radius": 0.1}
    without, plain = found(model, these, norm, descent=0, **how)
    nearer, outcomes = found(model, these, norm, descent=30, **how)
    assert (nearer <= without).all()
    assert (nearer < 0.995 * without).double().mean() >= 0.5
    assert {o.forwards - p.forwards for o, p in zip(outcomes, plain, strict=True)} == {3 * 31}
    assert {o.backwards - p.backwards for o, p in zip(outcomes, plain, strict=True)} == {3 * 30}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_descent_follows_a_round_boundary_to_its_nearest_point(norm: str) -> None:
    """Misclassified is what lies outside a ball whose centre is beside the image; the start is in another direction."""
    x0 = torch.full((6, *(1, 4, 4)), 0.5, dtype=DOUBLE)
    centre = torch.zeros(16, dtype=DOUBLE)
    centre[0], radius = 0.1, 0.3
    goal, ball = Untargeted(torch.zeros(6, dtype=torch.int64)), Ball(norm, math.inf)

    def logits(x: Tensor) -> Tensor:
        outside = ((x.flatten(1) - 0.5 - centre) ** 2).sum(1) - radius**2
        return torch.stack([-outside, torch.zeros_like(outside)], 1)

    g = torch.Generator().manual_seed(3)
    towards = torch.randn(6, 16, generator=g, dtype=DOUBLE)
    start = x0 + (centre + 1.001 * radius * towards / towards.norm(dim=1, keepdim=True)).view_as(x0)
    least = torch.full((6,), math.inf, dtype=DOUBLE)
    only = torch.tensor([True, True, True, True, True, False])
    asking = nearer(start, x0, goal, ball, only, 300)
    question = next(asking)
    with contextlib.suppress(StopIteration):
        while True:
            at = answer(question, logits, goal, only)
            assert question.only is only
            length = ball.norm_of(question.points - x0)
            assert (length[only] < least[only] * (1 - 1e-6)).all()  # each success is nearer than those before
            least = torch.where(goal.reached(at.logits) & only, length, least)
            question = asking.send(at)
    # l2: straight away from the centre. linf: the equal move of all pixels, the first one away from the centre.
    exact = 0.2 if norm == "l2" else (-0.1 + math.sqrt(0.1**2 + 16 * (radius**2 - 0.1**2))) / 16
    assert (least[only] >= exact * (1 - 1e-9)).all()
    assert (least[only] <= exact * 1.01).all()


def test_the_nearest_row_of_each_group() -> None:
    distance = torch.tensor([3.0, 2.0, 2.0, math.inf, math.inf, 1.0, math.inf])
    group = torch.tensor([[7, 0], [7, 0], [7, 0], [5, 0], [5, 0], [7, 1], [2, 0]])
    assert nearest(distance, group).tolist() == [False, True, False, False, False, True, False]
