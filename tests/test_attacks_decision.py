"""Decision-based attacks: distances on linear models, only labels read, budgets, and their parts one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.attacks.decision import Oracle, blend, nearest_start, to_boundary
from robeval.attacks.hopskipjump import normal_at
from robeval.core.ball import Ball, vector_norm
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.questions import Answer, Question
from robeval.core.streams import Streams
from tests.problems import attack, exact_distance, linear, network

CASES = [("boundary", "l2"), ("hopskipjump", "l2"), ("hopskipjump", "linf")]
L2, LINF = Ball("l2", math.inf), Ball("linf", math.inf)


def ask_all(part: Generator[Question, Answer, Tensor], logits: Callable[[Tensor], Tensor]) -> Tensor:
    """What a part of an attack returns when every row is open; rows that do not ask get NaN."""
    try:
        question = next(part)
        while True:
            z = logits(question.points)
            if question.only is not None:
                z = z.masked_fill(~question.only[:, None], torch.nan)
            everybody = torch.ones(len(z), dtype=torch.bool)
            question = part.send(Answer(z, everybody, torch.empty(0), torch.empty(0)))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def distances(name: str, model: Classifier, these: Images, norm: str, **settings: Any) -> Tensor:
    return torch.tensor([o.distances[norm] for o in attack(name, model, these, norm, 1, **settings)])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_close_to_the_exact_distance_of_a_linear_model(name: str, norm: str) -> None:
    model, these = linear(2, rows=12)
    ratio = distances(name, model, these, norm, queries=1000) / exact_distance(model, these, norm)
    assert float(ratio.max()) < {"boundary": 1.01, "hopskipjump": 1.2}[name]
    assert float(ratio.mean()) < {"boundary": 1.001, "hopskipjump": 1.06}[name]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_more_queries_come_closer(name: str, norm: str) -> None:
    model, these = network(rows=8)
    few, some, many = (float(distances(name, model, these, norm, queries=q).mean()) for q in (40, 120, 400))
    assert many < 0.95 * some < 0.95 * few


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_only_the_label_is_read(name: str, norm: str) -> None:
    """Logits that hide everything but the predicted class give the same images, bit by bit."""

    class Label(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x)
            return nn.functional.one_hot(z.argmax(1), z.shape[1]).to(z) * 7

    model, these = network(rows=8)
    assert isinstance(model.module, nn.Module)
    seen = attack(name, model, these, norm, 1)
    blind = attack(name, Classifier(Label(model.module), 5), these, norm, 1)
    for a, b in zip(seen, blind, strict=True):
        assert a.example is not None
        assert b.example is not None
        assert torch.equal(a.example, b.example)


@pytest.mark.parametrize("queries", [1, 17, 60])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_small_budgets_are_kept(name: str, norm: str, queries: int) -> None:
    model, these = network(rows=4)
    for o in attack(name, model, these, norm, 1, queries=queries):
        assert o.forwards <= queries + 2  # the verdict's
        assert o.backwards == 0


def test_a_converged_walk_stops_asking() -> None:
    model, these = linear(2, rows=3)
    spent = [o.forwards for o in attack("boundary", model, these, "l2", 1, queries=6000)]
    assert max(spent) < 4000


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", [L2, LINF], ids=["l2", "linf"])
def test_a_blend_keeps_its_share_of_the_distance(ball: Ball) -> None:
    rng = Streams(0, range(6), "t", dtype=torch.float64)
    x0, x, share = rng.uniform(2, 3, 3), rng.uniform(2, 3, 3), rng.uniform()
    point = blend(x0, x, share, ball)
    assert torch.allclose(ball.norm_of(point - x0), share * ball.norm_of(x - x0), atol=1e-12)
    assert torch.allclose(blend(x0, x, torch.ones(6, dtype=torch.float64), ball), x, atol=1e-15)
    assert ((point - x0) * (x - x0) >= 0).all()


@pytest.mark.parametrize("ball", [L2, LINF], ids=["l2", "linf"])
def test_the_line_search_ends_at_the_boundary(ball: Ball) -> None:
    """Misclassified where the mean exceeds 0.71; the lines go from 0.2 to 1."""
    x0 = torch.full((3, 1, 4, 4), 0.2, dtype=torch.float64)
    oracle = Oracle(Untargeted(torch.zeros(3, dtype=torch.int64)), 100, x0)
    asks = torch.tensor([True, True, False])

    def logits(x: Tensor) -> Tensor:
        return torch.stack([torch.full((len(x),), 0.71).double(), x.flatten(1).mean(1)], 1)

    end = ask_all(to_boundary(oracle, x0, torch.ones_like(x0), asks, ball, 1e-3), logits)
    assert ((end[:2] > 0.71) & (end[:2] < 0.71 + 0.8e-3)).all()
    assert (end[2] == 1).all()
    assert oracle.left.tolist() == [90, 90, 100]


def test_no_answer_beyond_the_budget() -> None:
    x0 = torch.zeros(2, 1, 2, 2)
    oracle = Oracle(Untargeted(torch.zeros(2, dtype=torch.int64)), 2, x0)
    everybody, wrong = torch.ones(2, dtype=torch.bool), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    told = [ask_all(oracle.ask(x0, everybody), lambda _: wrong).tolist() for _ in range(3)]
    assert told == [[True, True], [True, True], [False, False]]


def test_more_tries_start_nearer() -> None:
    model, these = network(rows=12)

    def start(tries: int) -> Tensor:
        oracle = Oracle(Untargeted(these.y), 10_000, these.x)
        rng = Streams(0, range(12), "t", dtype=torch.float64)
        x = ask_all(nearest_start(oracle, these.x, L2, rng, tries, 1e-3), model.logits)
        assert (model.logits(x).argmax(1) != these.y)[(x != these.x).flatten(1).any(1)].all()
        return torch.where((x != these.x).flatten(1).any(1), L2.norm_of(x - these.x), torch.inf)

    few, many = start(4), start(32)
    assert (many <= few).all()
    assert (many < few).any()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_estimated_normal_points_across_the_boundary(norm: str) -> None:
    model, these = linear(2, rows=10)
    layer = model.module[1]  # type: ignore[index]
    across = (layer.weight[1 - these.y] - layer.weight[these.y]).detach()
    height = (model.logits(these.x) * torch.tensor([1.0, -1.0])).sum(1).abs()
    on = these.x + (height / across.square().sum(1)).view(-1, 1, 1, 1) * across.view_as(these.x)
    oracle = Oracle(Untargeted(these.y), 400, these.x)
    rng, live = Streams(0, range(10), "t", dtype=torch.float64), torch.arange(10) < 9
    radius = torch.full((10,), 0.01, dtype=torch.float64)
    found = ask_all(normal_at(oracle, on, radius, norm, rng, 500, live, 100), model.logits).flatten(1)
    cosine = (found * across).sum(1) / vector_norm(found, "l2").clamp_min(1e-30) / vector_norm(across, "l2")
    assert (cosine[:9] > 0.9).all()  # 300 probes in 16 dimensions: about 0.96
    assert oracle.left.tolist() == [100] * 9 + [400]
    assert not found[9].any()


# -- against foolbox ---------------------------------------------------------------------------------------------------


class _Spent(Exception):
    """The budget of the reference is used up."""


def foolbox_distances(name: str, model: Classifier, these: Images, norm: str, queries: int) -> Tensor:
    """The nearest misclassified point that foolbox ever asks about within the budget, image by image."""
    foolbox = pytest.importorskip("foolbox", reason="the reference for decision-based attacks")
    best = torch.full((len(these),), math.inf, dtype=torch.float64)
    for k in range(len(these)):
        x0, y, spent = these.x[k : k + 1], these.y[k : k + 1], 0

        class Watched(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                nonlocal spent
                spent += 1
                if spent > queries:
                    raise _Spent
                z = model.logits(x)
                if int(z.argmax()) != int(y):  # noqa: B023 - used before the next image
                    best[k] = min(float(best[k]), float(vector_norm(x - x0, norm)))  # noqa: B023
                return z

        made = (
            foolbox.attacks.HopSkipJumpAttack(constraint=norm)
            if name == "hopskipjump"
            else foolbox.attacks.BoundaryAttack()
        )
        with pytest.raises((_Spent, ValueError)):  # ValueError: no start was found
            made.run(foolbox.PyTorchModel(Watched().eval(), (0, 1), "cpu"), x0, foolbox.criteria.Misclassification(y))
    return best


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_no_farther_than_foolbox(name: str, norm: str) -> None:
    pytest.importorskip("foolbox", reason="the reference for decision-based attacks")
    model, these = network(rows=8, dtype=torch.float32)
    theirs = foolbox_distances(name, model, these, norm, 500)
    mine = distances(name, model, these, norm, queries=500)
    assert theirs.isfinite().any()
    assert mine[theirs.isfinite()].mean() <= theirs[theirs.isfinite()].mean()
