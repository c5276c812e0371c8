"""Looking ahead in a random search: other passes, the same search; and what the engine knows is not asked again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robeval.attacks.lookahead import Lookahead
from robeval.attacks.simba import cosines, low_frequencies_first, simba
from robeval.attacks.square import square
from robeval.attacks.squares import bump, dipole
from robeval.core.ball import Ball, vector_norm
from robeval.core.classifier import Classifier
from robeval.core.goal import Goal, Untargeted
from robeval.core.questions import Attack, Gradient, Logits, Proposals
from robeval.core.streams import Streams
from robeval.engine.backend import Backend
from robeval.engine.drive import drive
from robeval.engine.judge import Judge, Outcome
from robeval.engine.run import Plan, run
from tests.problems import attack, images, network

EPS = {"linf": 0.03, "l2": 0.12, "l1": 0.3}


def found(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """What a search found and how many queries that took, passes left aside."""
    return [
        (o.success, o.prediction, o.margin, o.attempt, o.iterations, tuple(o.distances.values()),
         None if o.example is None else o.example.numpy().tobytes())
        for o in outcomes
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, norm", [("square", "linf"), ("square", "l2"), ("square", "l1"), ("simba", "linf"), ("simba-dct", "l2")]
)
def test_looking_ahead_never_changes_the_search(name: str, norm: str) -> None:
    model, these = network(rows=30)
    one = attack(name, model, these, norm, EPS[norm], lookahead=1)
    many = attack(name, model, these, norm, EPS[norm], lookahead=16)
    assert 0 < sum(o.success for o in one) < len(one)
    assert found(one) == found(many)
    assert sum(o.forwards for o in many) >= sum(o.forwards for o in one)  # what was discarded is counted
    for o in one:
        assert o.forwards == o.iterations + 2 * o.success


def test_an_image_looks_ahead_by_its_own_history() -> None:
    ahead = Lookahead(2, 16, torch.device("cpu"))
    rows = torch.arange(2)
    assert ahead.length(rows).tolist() == [1, 1]
    for _ in range(200):
        ahead.learn(rows, torch.tensor([1, 10]), torch.tensor([True, False]))
    assert ahead.length(rows).tolist() == [1, 16]
    ahead.learn(rows, torch.tensor([1, 1]), torch.tensor([True, True]))
    assert ahead.length(rows)[1] == 16  # one acceptance after long silence does not make it shy
    for _ in range(30):
        ahead.learn(rows, torch.tensor([1, 1]), torch.tensor([True, True]))
    assert ahead.length(rows).tolist() == [1, 1]


def ladder(x0: Tensor, goal: Goal, ball: Ball, rng: Streams) -> Attack:
    """Asks four points from one state and tells what it was told."""
    rows = torch.tensor([0, 2])
    steps = torch.arange(1, 5)[None, :, None, None, None] / 100
    points = x0[rows][:, None] + steps
    only = torch.tensor([[True, False, True, True], [True, True, True, True]])
    at = yield Proposals(rows, points, only, lambda goal, z, least: z[:, 0] >= least, args=(torch.tensor([2.5, 99.0]),))
    ladder.told = at  # type: ignore[attr-defined]
    return None


class Rows(nn.Module):
    """Logit 0 is a hundred times the rise over 0.5; class 1 wins at 4 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        rise = 100 * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([rise, torch.where(rise > 3.5, rise + 1, rise - 9)], 1)


def test_points_after_the_first_accepted_one_are_discarded_unseen() -> None:
    model = Rows().double()
    these = images(torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), 2)
    backend = Backend(Classifier(model, 2), 16)
    outcomes = list(run(Plan("ladder", ladder, black_box=True), these, Untargeted(these.y), Ball("linf", 0.1), backend))
    told = ladder.told  # type: ignore[attr-defined]
    assert told.first.tolist() == [2, 4]  # 0.53 is the first at 2.5 or more; the second row accepts nothing
    by_position = {o.position: o for o in outcomes}
    assert not by_position[0].success  # its fourth point is adversarial, but comes after the accepted one
    assert by_position[0].iterations == 2  # the point that was masked out was not tried, the last one discarded
    assert by_position[0].forwards == 3
    assert by_position[2].success
    assert by_position[2].iterations == 4
    assert by_position[1].iterations == by_position[1].forwards == 0
    assert backend.counts.forwards == 3 + 4 + 2


def test_the_same_question_without_the_engine() -> None:
    x0 = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    attacked = ladder(x0, Untargeted(torch.zeros(3, dtype=torch.int64)), Ball("linf", 0.1), Streams(0, [0, 1, 2], "x"))
    with pytest.raises(ValueError, match="returned no point"):
        drive(attacked, Rows().double(), Untargeted(torch.zeros(3, dtype=torch.int64)))
    assert ladder.told.first.tolist() == [2, 4]  # type: ignore[attr-defined]


class Counting(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.points = inner, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x)
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["simba", "square"])
def test_every_query_is_counted_and_stays_in_the_ball_by_construction(name: str) -> None:
    """SimBA in the pixel basis at step 8/255, without any projection: no pixel is visited twice."""
    model, these = network(rows=12, dtype=torch.float32)
    counting = Counting(model.module)  # type: ignore[arg-type]
    backend = Backend(Classifier(counting, 5), 4, floor=1)
    ball, settings = Ball("linf", 8 / 255), {"step": 8 / 255} if name == "simba" else {"queries": 100}
    function = partial(simba if name == "simba" else square, lookahead=16, **settings)  # type: ignore[arg-type]
    outcomes = list(run(Plan(name, function, black_box=True), these, Untargeted(these.y), ball, backend))
    assert sum(o.forwards for o in outcomes) == backend.counts.forwards == sum(map(len, counting.points))
    nearest = torch.cat([(p[:, None] - these.x).abs().amax((2, 3, 4)).amin(1) for p in counting.points])
    assert nearest.max() <= 8 / 255 * (1 + 1e-6) + 1e-9  # also the 8-bit forms of the verdicts


def test_pixel_steps_need_no_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model, these = network(rows=8)
    expected = attack("simba", model, these, "linf", 0.03, step=0.03)
    only_box = Ball.limits

    def no_ball(self: Ball, x0: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x0), torch.ones_like(x0)

    monkeypatch.setattr("robeval.attacks.simba.Ball.limits", no_ball)
    free = attack("simba", model, these, "linf", 0.03, step=0.03)
    monkeypatch.setattr("robeval.attacks.simba.Ball.limits", only_box)
    assert [o.iterations for o in free] == [o.iterations for o in expected]
    assert [o.margin for o in free] == pytest.approx([o.margin for o in expected], abs=1e-9)


def test_known_clean_logits_are_not_paid_for() -> None:
    def twice(x0: Tensor, goal: Goal, ball: Ball, rng: Streams) -> Attack:
        at = yield Logits(x0)
        assert at.logits.shape == (len(x0), 5)
        at = yield Gradient(x0 + 0.001, "ce")
        return None

    model, these = network(rows=10)
    for clean, forwards in ((None, 2), (model.logits(these.x).detach(), 1)):
        backend = Backend(model, 16)
        outcomes = list(run(Plan("twice", twice), these, Untargeted(these.y), Ball("linf", 0.01), backend, clean=clean))
        assert [o.forwards - 2 * o.success for o in outcomes] == [forwards] * 10


def test_numbered_draws_belong_to_their_number() -> None:
    streams = Streams(3, [7, 8, 9], "m")
    rows = torch.tensor([2, 0])
    numbers = torch.tensor([[5, 6, 7], [0, 1, 2]])
    words = streams.numbered(rows, numbers, 6)
    assert words.shape == (2, 3, 6)
    again = Streams(3, [9], "m").numbered(torch.tensor([0]), torch.tensor([[7, 5]]), 6)
    assert torch.equal(again[0], words[0, [2, 0]])
    assert len(set(words.flatten().tolist())) == words.numel()
    assert not set(words[1].flatten().tolist()) & set(streams.bits(64)[0].tolist())
    many = Streams(0, range(50), "m").numbered(torch.arange(50), torch.arange(100).expand(50, -1), 2)
    assert abs(float(many.double().mean()) / 2**32 - 0.5) < 0.01


def test_cosines_are_orthonormal_and_begin_with_the_mean() -> None:
    rows = cosines(9)
    torch.testing.assert_close(rows @ rows.T, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(rows[0], torch.full((9,), 1 / 3, dtype=torch.float64))


def test_low_frequencies_come_first_and_none_twice() -> None:
    order = low_frequencies_first(Streams(0, [1, 2], "s"), torch.Size((2, 6, 6)), 2, 3)
    assert torch.equal(order.sort(1).values, torch.arange(72).expand(2, -1))
    place = order % 36
    highest = torch.maximum(place // 6, place % 6)
    assert (highest[:, :8] < 2).all()  # 2 channels of a 2 x 2 corner
    assert (highest[:, 8:50] < 5).all()  # then up to 5 x 5
    assert not torch.equal(order[0], order[1])


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_dipoles_have_unit_norm_and_two_signs(size: int, norm: str) -> None:
    pattern = dipole(size, norm)
    assert float(pattern.norm(p=2 if norm == "l2" else 1)) == pytest.approx(1)
    assert (pattern[size // 2 :] < 0).all()
    assert (pattern[: size // 2] > 0).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_dipoles_are_the_references(size: int, norm: str) -> None:
    squares = pytest.importorskip("pyautoattack.square", reason="needs the extra robeval[reference]")
    made = squares.SquareAttack(lambda x: x, norm=norm.upper(), eps=1.0, device="cpu")
    theirs = made.eta_rectangles(size // 2, size)
    ours = bump(size // 2, size, norm)
    ours = ours / (ours.norm() if norm == "l2" else ours.abs().sum())
    torch.testing.assert_close(ours.float(), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_square_uses_the_whole_ball(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no box is near, every point lies at distance eps."""
    model, these = network(rows=6)
    these.x[:] = 0.5
    these.y = model.logits(these.x).argmax(1)
    seen, look = [], Judge.look

    def watch(self: Judge, rows: Tensor, attempts: Tensor, points: Tensor, logits: Tensor) -> Iterator[Outcome]:
        seen.append(vector_norm(points - 0.5, norm))
        return look(self, rows, attempts, points, logits)

    monkeypatch.setattr(Judge, "look", watch)
    attack("square", model, these, norm, 0.2, queries=40)
    assert torch.cat(seen).max() <= 0.2
    assert torch.cat(seen).min() >= 0.2 * (1 - 1e-5)
