"""The engine: full batches, exact counts, memory that runs out, models that misbehave."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, MachineError
from robeval.core.goal import Untargeted
from robeval.core.questions import Attack, Gradient, Logits
from robeval.engine.backend import Backend
from robeval.engine.cohort import waves
from robeval.engine.run import Plan, run
from robeval.engine.verdict import judge_points, to_8bit
from tests.problems import attack, images, linear, network


class Counting(nn.Module):
    """Counts the rows of every call, as nothing in the engine does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.widths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.widths.append(len(x))
        return self.inner(x)  # type: ignore[no-any-return]


def counted(model: Classifier) -> tuple[Classifier, Counting]:
    assert isinstance(model.module, nn.Module)
    counting = Counting(model.module)
    return Classifier(counting, model.classes), counting


def pgd_plan(**settings: object) -> Plan:
    return Plan("pgd", partial(pgd, **settings), int(settings.get("restarts", 1)))  # type: ignore[arg-type, call-overload]


def test_reported_passes_are_the_passes_of_the_model() -> None:
    model, these = network(rows=20)
    model, counting = counted(model)
    backend = Backend(model, 16)
    outcomes = list(run(pgd_plan(steps=7, restarts=3), these, Untargeted(these.y), Ball("linf", 0.04), backend))
    assert sum(o.forwards for o in outcomes) == backend.counts.forwards
    assert sum(o.backwards for o in outcomes) == backend.counts.backwards
    assert backend.counts.slots == sum(counting.widths)
    assert backend.counts.calls == len(counting.widths)
    assert set(counting.widths) <= {4, 8, 12, 16}


def test_batches_have_few_shapes_and_little_padding() -> None:
    backend = Backend(network(rows=2)[0], 256)
    assert all(n <= backend.shape(n) < n + 4 for n in range(1, 257))  # on a CPU every row is paid for
    backend.classifier.info["compiled"] = True
    shapes = {backend.shape(n) for n in range(1, 257)}
    assert len(shapes) == 16
    assert max(shapes) == 256
    assert all(backend.shape(n) >= n for n in range(1, 257))
    assert backend.shape(193) == 208
    assert {Backend(backend.classifier, 7).shape(n) for n in range(1, 8)} == {16}


def test_decided_images_cost_nothing_more() -> None:
    model, these = linear(2, rows=30)
    broken = [o for o in attack("pgd", model, these, "linf", 0.3, steps=50, restarts=20) if o.success]
    assert broken
    assert max(o.iterations for o in broken) < 50 / 2
    assert all(o.forwards == o.iterations + 2 for o in broken if o.attempt == 0)  # the verdict's two included


def test_places_of_decided_images_are_filled_again() -> None:
    model, these = network(rows=64)
    backend = Backend(model, 16)
    list(run(pgd_plan(steps=20, restarts=8), these, Untargeted(these.y), Ball("linf", 0.03), backend))
    assert backend.counts.fill > 0.85


def test_waves() -> None:
    assert waves(1, at_once=False) == [[0]]
    assert [len(w) for w in waves(50, at_once=False)] == [1, 8, 16, 16, 9]
    assert sum(waves(50, at_once=False), []) == list(range(50))
    assert waves(5, at_once=True) == [[0, 1, 2, 3, 4]]


def test_more_restarts_break_a_superset_with_the_same_first_attempts() -> None:
    model, these = network(rows=40)
    few, many = (attack("pgd", model, these, "linf", 0.2, steps=3, restarts=r) for r in (1, 8))
    assert sum(o.success for o in many) > sum(o.success for o in few)
    for a, b in zip(few, many, strict=True):
        if a.success:
            assert (b.success, b.attempt, b.distances) == (True, 0, a.distances)


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing() -> None:
    model, these = network(rows=64)
    whole = attack("pgd", model, these, "linf", 0.03, steps=5)

    class Small(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 20:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return self.inner(x)  # type: ignore[no-any-return]

    assert isinstance(model.module, nn.Module)
    small = Classifier(Small(model.module), model.classes)
    backend = Backend(small, 64)
    goal = Untargeted(these.y)
    outcomes = sorted(run(pgd_plan(steps=5), these, goal, Ball("linf", 0.03), backend), key=lambda o: o.position)
    assert backend.capacity == 16
    assert [(o.success, o.margin, o.forwards) for o in outcomes] == [(o.success, o.margin, o.forwards) for o in whole]


def test_memory_goes_before_padding() -> None:
    model, these = network(rows=8)

    def tight(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("CUDA out of memory")
        return model.logits(x)

    backend = Backend(Classifier(tight, model.classes), 64)
    goal = Untargeted(these.y)
    torch.testing.assert_close(backend.logits(these.x, goal), model.logits(these.x))
    assert (backend.capacity, backend.floor) == (2, 2)


def test_memory_that_never_suffices() -> None:
    def greedy(x: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with pytest.raises(MachineError, match="out of memory"):
        Backend(Classifier(greedy, 3), 8).logits(torch.rand(4, 1, 2, 2), Untargeted(torch.zeros(4, dtype=torch.int64)))


def test_a_model_without_gradient_is_named() -> None:
    these = images(torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 2)
    cut = Classifier(lambda x: torch.stack([x.detach().flatten(1).sum(1), -x.detach().flatten(1).sum(1)], 1), 2)
    with pytest.raises(ContractBroken, match="gives no gradient"):
        list(run(pgd_plan(steps=2), these, Untargeted(these.y), Ball("linf", 0.1), Backend(cut)))


def test_nan_under_attack_is_an_error_of_the_model_not_a_success() -> None:
    def poisoned(x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1)
        z = torch.stack([total, 0.2 * total], 1)
        return torch.where((x[:, 0, 0, 0] < 0.45)[:, None], torch.nan, z)

    these = images(torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64), 2)
    outcomes = list(
        run(
            pgd_plan(steps=20, random_start=True),
            these,
            Untargeted(these.y),
            Ball("linf", 0.3),
            Backend(Classifier(poisoned, 2)),
        )
    )
    assert not any(o.success for o in outcomes)
    assert all("NaN" in o.error for o in outcomes)


def test_a_black_box_attack_cannot_ask_for_gradients() -> None:
    model, these = network(rows=3)

    def cheat(x0: Tensor, goal: object, ball: object, rng: object) -> Attack:
        yield Gradient(x0, "ce")
        return None

    plan = Plan("cheat", cheat, black_box=True)
    with pytest.raises(ContractBroken, match="black-box"):
        list(run(plan, these, Untargeted(these.y), Ball("linf", 0.1), Backend(model)))


def test_points_outside_the_ball_never_count() -> None:
    model, these = linear(2, rows=10)

    def far(x0: Tensor, goal: object, ball: object, rng: object) -> Attack:
        yield Logits(1 - x0)  # another image altogether
        return (x0 * 3).clamp(-1, 2)

    outcomes = list(run(Plan("far", far), these, Untargeted(these.y), Ball("linf", 0.01), Backend(model)))
    assert not any(o.success for o in outcomes)


def test_a_verdict_that_fails_does_not_count() -> None:
    """A model that answers otherwise when asked again, in another batch, has not been broken."""

    class Fickle(nn.Module):
        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            z = torch.zeros(len(x), 2, dtype=x.dtype) + 0 * x.flatten(1).sum(1, keepdim=True)
            z[:, self.asked % 2] += 1
            return z

    these = images(torch.rand(4, 1, 2, 2), torch.ones(4, dtype=torch.int64), 2)

    def once(x0: Tensor, goal: object, ball: object, rng: object) -> Attack:
        yield Logits(x0)
        yield Logits(x0)
        return None

    fickle = Fickle()
    outcomes = list(
        run(Plan("once", once), these, Untargeted(these.y), Ball("linf", 0.1), Backend(Classifier(fickle, 2)))
    )
    assert fickle.asked >= 3
    assert not any(o.success for o in outcomes)


def test_8bit_rounding_stays_inside_the_ball_where_a_level_exists() -> None:
    x0 = (torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    ball = Ball("linf", 2.5 / 255)
    x = ball.project(x0, x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)))
    rounded = to_8bit(x0, x, ball)
    assert ball.contains(x0, rounded).all()
    torch.testing.assert_close(rounded * 255, (rounded * 255).round(), rtol=0, atol=1e-4)
    for norm, eps in (("l2", 0.05), ("l1", 0.3)):
        ball = Ball(norm, eps)
        x = ball.project(x0, x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)))
        assert ball.contains(x0, to_8bit(x0, x, ball)).all()


def test_verdicts_are_in_float32_even_under_autocast() -> None:
    model, these = network(rows=8, dtype=torch.float32)
    goal, ball = Untargeted(these.y), Ball("linf", 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = judge_points(Backend(model), these.x, these.x.flip(0), goal, ball)
    outside = judge_points(Backend(model), these.x, these.x.flip(0), goal, ball)
    assert torch.equal(inside.margin, outside.margin)
    assert inside.margin.dtype == torch.float32
