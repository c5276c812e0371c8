"""The attacks that search the nearest adversarial point: closed forms, and the peers' own runs step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.attacks.cw_l2 import cw_l2
from robeval.attacks.ddn import ddn
from robeval.attacks.logbarrier import barrier, logbarrier, towards
from robeval.attacks.nearer import within
from robeval.core.ball import Ball, vector_norm
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.questions import Attack, Gradient
from robeval.core.streams import Streams
from robeval.engine.drive import answer
from tests.problems import attack, exact_distance, images, linear, network

INF = math.inf


def trajectory(run: Attack, logits: Callable[[Tensor], Tensor], y: Tensor) -> list[Tensor]:
    """Every point that an attack asks about, in order, and the one that it returns."""
    points, said = [], None
    try:
        while True:
            asked = run.send(said) if said else next(run)
            points.append(asked.points)  # type: ignore[union-attr]
            said = answer(asked, logits, Untargeted(y), torch.ones(len(y), dtype=torch.bool))
    except StopIteration as end:
        return points if end.value is None else [*points, end.value]


def started(function: Callable[..., Attack], x: Tensor, y: Tensor, norm: str, **settings: Any) -> Attack:
    rng = Streams(0, list(range(len(x))), "test", dtype=x.dtype)
    return function(x, Untargeted(y), Ball(norm, INF), rng, **settings)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fmn_reaches_the_boundary_of_a_linear_model(norm: str) -> None:
    model, these = linear(2, rows=30)
    outcomes = attack("fmn", model, these, norm, INF, steps=60)
    found = torch.tensor([o.distances[norm] for o in outcomes], dtype=torch.float64)
    exact = exact_distance(model, these, norm)
    assert (found >= exact * (1 - 1e-9)).all()
    assert (found <= 1.001 * exact).all()


@pytest.mark.parametrize(
    ("name", "norm", "settings", "factor"),
    [
        ("ddn", "l2", {"steps": 200}, 1.01),
        ("cw-l2", "l2", {"searches": 6, "iterations": 100}, 1.05),
        ("logbarrier", "l2", {"outer": 6, "inner": 20, "dt": 0.04, "alpha": 0.01}, 1.05),
        ("logbarrier", "linf", {"outer": 6, "inner": 20, "dt": 0.04, "alpha": 0.01}, 1.05),
    ],
)
def test_close_to_the_boundary_of_a_linear_model(name: str, norm: str, settings: dict[str, Any], factor: float) -> None:
    model, these = linear(2, rows=30)
    exact = exact_distance(model, these, norm)
    far = exact > 0.5 * exact.median()  # the others lie within one step of Adam
    found = torch.tensor([o.distances[norm] for o in attack(name, model, these, norm, INF, **settings)])
    assert (found[far] <= factor * exact[far]).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fmn_projects_each_row_on_its_own_ball(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(6, 1, 3, 3, generator=generator, dtype=torch.float64)
    length = vector_norm(d, norm)
    eps = length * torch.tensor([0.1, 0.5, 0.9, 1.0, 1.5, 30.0], dtype=torch.float64)
    inside = within(d, norm, eps)
    if norm == "l2":  # onto the sphere, which is the nearest point of the ball for rows outside it
        torch.testing.assert_close(vector_norm(inside, norm), eps)
        d, inside, eps = d[:4], inside[:4], eps[:4]
    else:
        torch.testing.assert_close(vector_norm(inside, norm), torch.minimum(length, eps))
        torch.testing.assert_close(inside[3:], d[3:])
    # nearest: the residue makes no acute angle with any other point of the ball
    other = within(torch.randn(d.shape, generator=generator, dtype=torch.float64), norm, eps)
    assert (((d - inside) * (other - inside)).flatten(1).sum(1) <= 1e-9).all()


def test_ddn_radius_swings_by_gamma() -> None:
    model, these = network(rows=12)
    x = 0.5 + 0.1 * (these.x - 0.5)  # grey: the box is far away
    y = model.logits(x).argmax(1)
    points = trajectory(started(ddn, x, y, "l2", steps=40, radius=0.5), model.logits, y)
    assert len(points) == 41
    length = torch.stack([vector_norm(p - x, "l2") for p in points])
    hit = torch.stack([model.logits(p).argmax(1) != y for p in points])
    torch.testing.assert_close(length[1], torch.full_like(length[1], 0.525))
    grown = torch.where(hit[1:-1], 0.95, 1.05).to(length.dtype)
    assert hit.any()
    torch.testing.assert_close(length[2:], length[1:-1] * grown)


def test_a_flat_model_is_left_along_a_random_direction() -> None:
    class Cliff(nn.Module):
        """Flat, but for a step far to one side of each image."""

        def forward(self, x: Tensor) -> Tensor:
            far = (x - 0.5).flatten(1).norm(dim=1) > 0.5
            return torch.stack([~far, far], 1).to(x) + 0 * x.flatten(1).sum(1, keepdim=True)

    x = torch.full((4, 1, 4, 4), 0.5)
    these = images(x, torch.zeros(4, dtype=torch.int64), 2)
    outcomes = attack("ddn", Classifier(Cliff(), 2), these, "l2", INF, steps=60)
    assert all(0.5 < o.distances["l2"] < 0.53 for o in outcomes)
    assert len({o.example.numpy().tobytes() for o in outcomes if o.example is not None}) == 4


def adam_by_torch(model: Classifier, x: Tensor, y: Tensor, c: float, steps: int) -> list[Tensor]:
    """The inner search with torch's own optimiser and autograd through the tanh."""
    w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
    optimizer, points = torch.optim.Adam([w], lr=0.01), []
    for _ in range(steps):
        point = (w.tanh() + 1) / 2
        points.append(point.detach())
        margin = Untargeted(y).margin(model.logits(point))
        loss = ((point - x).square().flatten(1).sum(1) + c * margin.clamp_min(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return points


def test_cw_l2_is_adam_on_the_tanh_variable() -> None:
    model, these = network(rows=6)
    mine = trajectory(
        started(cw_l2, these.x, these.y, "l2", searches=1, iterations=9, c=0.1, bisections=0), model.logits, these.y
    )
    for ours, reference in zip(mine, adam_by_torch(model, these.x, these.y, 0.1, 9), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


def test_cw_l2_searches_c_per_image() -> None:
    """c grows tenfold until a search succeeds and halves the interval from then on."""
    model, these = linear(2, rows=8)
    asked: dict[int, list[Tensor]] = {}
    for searches in (1, 6):
        run = started(cw_l2, these.x, these.y, "l2", searches=searches, iterations=30, bisections=0)
        asked[searches] = trajectory(run, model.logits, these.y)
    assert all(torch.equal(a, b) for a, b in zip(asked[1], asked[6], strict=False))
    hits = torch.stack([model.logits(p).argmax(1) != these.y for p in asked[6]])
    assert hits.any(0).all()
    assert not hits[:30].all()  # the first c is too small for some


def test_cw_l2_aborts_each_image_on_its_own() -> None:
    model, these = network(rows=10)
    together = attack("cw-l2", model, these, "l2", INF, searches=3, iterations=50)
    spent = [o.forwards for o in together]
    assert len(set(spent)) >= 3
    for k in (0, 4, 9):
        alone = attack("cw-l2", model, these[torch.tensor([k])], "l2", INF, searches=3, iterations=50)[0]
        assert (alone.forwards, alone.distances) == (spent[k], together[k].distances)


def test_the_barrier_is_the_log_of_the_probability_gap() -> None:
    z = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
    goal = Untargeted(torch.tensor([0, 0]))
    p = z.softmax(1)
    value = barrier(goal, z)
    torch.testing.assert_close(value[0], (p[0, 1] - p[0, 0]).log())
    z.requires_grad_()
    slope = torch.autograd.grad(barrier(goal, z).sum(), z)[0]
    assert slope[0].abs().sum() > 0
    assert slope[1].abs().sum() == 0  # not misclassified: no barrier, and no NaN


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_pull_shortens_the_distance_by_its_share(norm: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    x = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    before = vector_norm(x - x0, norm)
    after = vector_norm(x + 0.01 * towards(x0, x, norm, 500) - x0, norm)
    assert (after < before).all()
    assert (after >= 0.99 * before - 1e-12).all()


def test_logbarrier_stays_beyond_the_boundary() -> None:
    """A step that crosses the boundary is halved until it does not; the accepted points move towards the image."""
    model, these = network(rows=6)
    run = started(logbarrier, these.x, these.y, "l2", outer=4, inner=40, alpha=1e-4)
    goal, everybody = Untargeted(these.y), torch.ones(6, dtype=torch.bool)
    asked, at, crossed = next(run), None, 0
    while not isinstance(asked, Gradient):
        asked = run.send(answer(asked, model.logits, goal, everybody))
    first = vector_norm(asked.points - these.x, "l2")
    while isinstance(asked, Gradient):
        assert asked.only is not None
        said = answer(asked, model.logits, goal, everybody)
        hit = goal.reached(said.logits) & asked.only
        at = asked.points if at is None else torch.where(hit[:, None, None, None], asked.points, at)
        tried, gone = asked.points, asked.only & ~hit
        crossed += int(gone.sum())
        asked = run.send(said)
        if isinstance(asked, Gradient) and asked.only is not None:
            halved = gone & asked.only & ((asked.points - (tried + at) / 2).abs().flatten(1).amax(1) < 1e-12)
            assert (halved | ~gone | ~asked.only | (vector_norm(tried - at, "l2") <= 1e-6)).all()
    assert crossed > 0
    assert at is not None
    assert goal.reached(model.logits(at)).all()
    assert (vector_norm(at - these.x, "l2") < first).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fmn_no_farther_than_its_peer(norm: str) -> None:
    foolbox = pytest.importorskip("foolbox", reason="the peer is not installed")
    model, these = network(rows=60, dtype=torch.float32)
    peer = {"linf": "LInfFMNAttack", "l2": "L2FMNAttack", "l1": "L1FMNAttack"}[norm]
    assert no_worse(getattr(foolbox.attacks, peer)(steps=60), foolbox, "fmn", model, these, norm, steps=59) >= 57


def test_ddn_no_farther_than_its_peer() -> None:
    foolbox = pytest.importorskip("foolbox", reason="the peer is not installed")
    model, these = network(rows=60, dtype=torch.float32)
    assert no_worse(foolbox.attacks.DDNAttack(steps=60), foolbox, "ddn", model, these, "l2", steps=59) >= 57


def test_cw_l2_no_farther_than_its_peer() -> None:
    foolbox = pytest.importorskip("foolbox", reason="the peer is not installed")
    model, these = network(rows=60, dtype=torch.float32)
    made = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=60)
    assert no_worse(made, foolbox, "cw-l2", model, these, "l2", searches=5, iterations=60) >= 57


def no_worse(made: Any, foolbox: Any, name: str, model: Classifier, these: Any, norm: str, **settings: Any) -> int:
    """On how many images ours is within 1.02 of foolbox's distance."""
    assert isinstance(model.module, nn.Module)
    wrapped = foolbox.PyTorchModel(model.module.eval(), bounds=(0, 1), device="cpu")
    points = made(wrapped, these.x, these.y, epsilons=None)[1]
    fooled = model.logits(points).argmax(1) != these.y
    distance = torch.where(fooled, vector_norm(points.double() - these.x.double(), norm), INF)
    mine = torch.tensor([o.distances[norm] for o in attack(name, model, these, norm, INF, **settings)])
    return int((mine <= 1.02 * distance).sum())
