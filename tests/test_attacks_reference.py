"""Our attacks against the reference package on a small network, paired image by image."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from robeval.attacks.apgd import apgd, checkpoints
from robeval.attacks.apgd_l1 import sparse_ascent
from robeval.attacks.squares import side
from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.goal import LOSSES, Untargeted, dlr_towards, ranked_rivals
from robeval.core.images import Images
from robeval.core.questions import Attack
from robeval.core.streams import Streams
from robeval.engine.drive import drive
from tests.problems import attack, network

autopgd = pytest.importorskip("pyautoattack.autopgd_base", reason="needs the extra robeval[reference]")
squares = pytest.importorskip("pyautoattack.square", reason="needs the extra robeval[reference]")
EPS = 0.04


def reference_apgd(model: object, norm: str, eps: float) -> object:
    made = autopgd.APGDAttack(
        model, n_restarts=1, n_iter=100, verbose=False, eps=eps, norm=norm, eot_iter=1, rho=0.75, seed=0, device="cpu",
        logger=logging.getLogger("reference"),
    )  # fmt: skip
    made.loss = "ce"
    return made


@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", EPS), ("l2", "L2", 0.12)])
def test_law_11_apgd_ce_is_no_weaker(norm: str, theirs: str, eps: float) -> None:
    model, these = network(rows=100, dtype=torch.float32)
    adversarial = reference_apgd(model.logits, theirs, eps).perturb(these.x, these.y)  # type: ignore[attr-defined]
    broken = int((model.logits(adversarial).argmax(1) != these.y).sum())
    mine = sum(o.success for o in attack("apgd-ce", model, these, norm, eps, steps=100))
    assert 10 < broken < 90
    assert mine >= broken - 1


def test_law_11_square_is_no_weaker() -> None:
    model, these = network(rows=100, dtype=torch.float32)
    made = squares.SquareAttack(
        model.logits, p_init=0.8, n_queries=300, eps=EPS, norm="Linf", n_restarts=1, seed=0, verbose=False,
        device="cpu", resc_schedule=False,
    )  # fmt: skip
    broken = int((model.logits(made.perturb(these.x, these.y)).argmax(1) != these.y).sum())
    mine = sum(o.success for o in attack("square", model, these, "linf", EPS, queries=300))
    assert 10 < broken < 90
    assert mine >= broken - 2


def best_losses(start: Tensor, norm: str, eps: float, loss: str, rank: int, model: Classifier, these: Images) -> Tensor:
    """Best loss of each image over a run of ours that begins at the given points."""
    goal, targets = Untargeted(these.y), 4 if loss == "dlr-targeted" else 0
    best = torch.full((len(these),), -torch.inf, dtype=torch.float64)
    target = ranked_rivals(goal, model.logits(these.x), torch.full_like(these.y, rank))
    measured = (lambda z: dlr_towards(goal, z, target)) if targets else (lambda z: LOSSES[loss](goal, z))

    def logits(x: Tensor) -> Tensor:
        z = model.logits(x)
        if not torch.equal(x, these.x):
            best.copy_(torch.maximum(best, measured(z.detach())))
        return z

    rng = Streams(0, range(len(these)), "t", [rank] * len(these), dtype=torch.float64)
    steps: Attack
    if norm == "l1":
        steps = sparse_ascent(these.x, start, Ball(norm, eps), loss, (), 100, True, 1)
    else:
        kind = "dlr" if targets else loss
        steps = apgd(these.x, goal, Ball(norm, eps), rng, loss=kind, targets=targets)  # type: ignore[arg-type]
    logits(drive(steps, logits, goal))
    return best


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", EPS), ("l2", "L2", 0.12), ("l1", "L1", 0.4)])
def test_apgd_follows_the_reference_step_by_step(
    norm: str, theirs: str, eps: float, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same start the best loss of every image is the same to 1e-6."""
    if norm == "l1" and loss == "dlr-targeted":
        pytest.skip("l1 differs in its steps, not in its losses")
    model, these = network(rows=30, classes=6)
    torch.manual_seed(0)
    start = Ball(norm, eps).project(these.x, these.x + 0.02 * torch.randn_like(these.x))
    made = autopgd.APGDAttack_targeted if loss == "dlr-targeted" else autopgd.APGDAttack
    reference = made(
        model.logits, n_restarts=1, n_iter=100, verbose=False, eps=eps, norm=theirs, eot_iter=1, rho=0.75, seed=0,
        device="cpu", logger=logging.getLogger("reference"),
    )  # fmt: skip
    reference.loss, rank = loss, 2
    reference.y_target = ranked_rivals(Untargeted(these.y), model.logits(these.x), torch.full_like(these.y, rank))
    reference.init_hyperparam(these.x)
    _, _, expected, _ = reference.attack_single_run(these.x, these.y, x_init=start)
    monkeypatch.setattr("robeval.core.ball.REL", 0.0)  # the reference leaves no room for rounding
    monkeypatch.setattr(Ball, "surface", lambda self, x0, rng: start)
    gained = best_losses(start, norm, eps, loss, rank, model, these) - expected
    apart = gained.abs()
    if norm == "l1":  # the reference projects in float32: pixels next to zero decide how many are moved the next time
        assert apart.median() < 1e-6
        assert gained.mean() > -0.02 * expected.abs().mean()
        return
    # In l2 a converged image's loss moves by rounding alone, which decides whether its step is halved.
    assert apart.max() < (1e-6 if norm == "linf" else 2e-2)
    assert (apart < 1e-6).double().mean() >= (1.0 if norm == "linf" else 0.8)


def test_apgd_checkpoints_are_the_papers() -> None:
    assert torch.tensor(checkpoints(100)).cumsum(0).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]


def test_square_sides_follow_the_published_schedule() -> None:
    reference = squares.SquareAttack(lambda x: x, n_queries=10_000, eps=0.1, p_init=0.8, resc_schedule=False)
    for query in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6001, 8001, 9999):
        expected = max(round((reference.p_selection(query) * 28 * 28) ** 0.5), 1)
        assert side(query, 0.8, 28, 28) == expected
