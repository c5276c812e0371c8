"""TRADES: oracles O-24 and O-51, its start, and its l2 attack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core.ball import Ball, vector_norm
from robeval.core.losses import kl, per_sample_loss
from robeval.train.craft import NearBall, crafted, paced
from robeval.train.methods.trades import trades
from tests.test_train_adv import F64, Spy, batch, cnn, streams


def test_o24_no_divergence_and_no_gradient_at_the_image() -> None:
    model, (x, _) = cnn(), batch()
    penalty = kl(model(x), model(x.clone()))
    grads = torch.autograd.grad(penalty.mean(), list(model.parameters()))
    assert float(penalty.detach().abs().max()) < 1e-12
    assert max(float(g.abs().max()) for g in grads) <= 1e-12


def test_o51_the_clean_distribution_comes_first() -> None:
    z, z_adv = torch.tensor([[2.0, 1.0, 0.0]], dtype=F64), torch.tensor([[1.0, 1.5, 0.0]], dtype=F64)
    assert abs(float(kl(z, z_adv)) - 0.2394014) < 1e-7
    assert abs(float(kl(z_adv, z)) - 0.2452511) < 1e-7


def test_divergence_of_certain_networks_is_finite() -> None:
    z = torch.tensor([[1e3, -1e3], [-1e3, 1e3]], requires_grad=True)
    value = kl(z, z.flip(1))
    (g,) = torch.autograd.grad(value.sum(), z)
    assert torch.allclose(value, torch.tensor([2000.0, 2000.0]))
    assert g.isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_loss_and_gradient_run_through_both_distributions(norm: str) -> None:
    model, (x, y) = Spy(cnn()), batch()
    (objective,) = trades(model, x, y, streams(), norm=norm, eps=0.3, steps=3, beta=2.5)  # type: ignore[arg-type]
    loss = objective()
    parameters = list(model.parameters())
    z, z_adv = model.inside(x), model.inside(model.points[-1])
    p, log_q = z.softmax(1), z_adv.log_softmax(1)
    penalty = functional.kl_div(log_q, p, reduction="batchmean")
    expected = functional.cross_entropy(z, y) + 2.5 * penalty
    assert abs(float((loss.total - expected).detach())) < 1e-12
    assert abs(float(loss.logs["penalty"]) - 2.5 * float(penalty.detach())) < 1e-12
    assert float(penalty.detach()) > 1e-4
    got = torch.autograd.grad(loss.total, parameters)
    for a, b in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_the_start_is_beside_the_image_where_the_gradient_is_not_zero() -> None:
    model, (x, y) = cnn(), batch()
    around = NearBall(Ball("linf", 0.1))
    begin = around.sample(x, streams())
    assert float((begin - x)[2:].std()) == pytest.approx(0.001, rel=0.1)  # the first two stand in corners of the box

    def steepness(at: Tensor) -> float:
        leaf = at.clone().requires_grad_()
        return float(torch.autograd.grad(kl(model(x).detach(), model(leaf)).sum(), leaf)[0].abs().max())

    assert steepness(x) < 1e-15
    assert steepness(begin) > 1e-6
    end = crafted(model, x, y, streams(), around, steps=3, loss="kl")
    gain = [float(kl(model(x), model(at)).mean().detach()) for at in (begin, end)]
    assert gain[1] > 50 * gain[0]


def test_the_clean_probabilities_are_asked_once() -> None:
    model, (x, y) = Spy(cnn()), batch()
    next(trades(model, x, y, streams(), eps=0.1, steps=4))
    assert len(model.points) == 5
    assert torch.equal(model.points[0], x)


def test_step_sizes_are_those_of_the_authors() -> None:
    assert paced(0.031, 10) == pytest.approx(0.007, rel=1e-12)
    model, (x, y) = Spy(cnn()), batch()
    next(trades(model, x, y, streams(), steps=10))
    steps = [(b - a)[2:].abs().amax() for a, b in zip(model.points[1:-1], model.points[2:], strict=True)]
    assert max(steps) == pytest.approx(0.007, rel=1e-9)
    model.points.clear()
    next(trades(model, x, y, streams(), norm="l2", eps=0.5, steps=10))
    lengths = torch.stack([vector_norm(b - a, "l2") for a, b in zip(model.points[1:-1], model.points[2:], strict=True)])
    assert float(lengths.max()) <= 0.1 + 1e-9
    assert float(lengths[:3, 2:].max()) == pytest.approx(0.1, rel=1e-4)


def test_in_l2_a_row_without_gradient_goes_sideways() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).double()
    nn.init.zeros_(flat[1].weight)  # type: ignore[arg-type]
    x, y = torch.full((4, 2, 5, 5), 0.5, dtype=F64), torch.zeros(4, dtype=torch.int64)

    def end(norm: str) -> Tensor:
        model = Spy(flat)
        (objective,) = trades(model, x, y, streams(4), norm=norm, eps=0.2, steps=4)  # type: ignore[arg-type]
        assert torch.allclose(objective().total, per_sample_loss(flat(x), y, "ce").mean())
        return vector_norm(model.points[-1] - x, "l2")

    assert torch.allclose(end("l2"), torch.full((4,), 0.2, dtype=F64), rtol=1e-4)
    assert float(end("linf").max()) < 0.02


def test_attack_raises_the_divergence_towards_the_surface() -> None:
    model, (x, y) = Spy(cnn()), batch()
    next(trades(model, x, y, streams(), norm="l2", eps=0.4, steps=10))
    clean = model.inside(x)
    rise = [float(kl(clean, model.inside(at)).mean().detach()) for at in model.points[1:]]
    assert rise[-1] > 100 * rise[0]
    assert rise == sorted(rise)
