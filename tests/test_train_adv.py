"""Adversarial training and its inner loop: oracles O-17, O-64, O-65, O-68, O-69."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core.ball import Ball
from robeval.core.classifier import fixed_parameters
from robeval.core.streams import Streams
from robeval.train.gradients import exact_hvp, fd_hvp, input_grad
from robeval.train.methods.adv import adv
from robeval.train.modes import bn_mode
from robeval.train.passes import counting
from robeval.train.starts import L2_STARTS, starting
from robeval.train.step import fill_gradients

F64 = torch.float64


class Spy(nn.Module):
    """Remembers every point that it was asked about."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside, self.points = inside, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach())
        z: Tensor = self.inside(x)
        return z


def cnn(batchnorm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batchnorm else []
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)).double()


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 5, 5, generator=g, dtype=F64)
    x[0], x[1] = 0, 1  # corners of the box
    return x, torch.randint(3, (n,), generator=g)


def streams(n: int = 8) -> Streams:
    return Streams(5, range(n), "t", dtype=F64)


def logistic(w: Tensor) -> nn.Sequential:
    layer = nn.Linear(len(w), 2, bias=False).double()
    layer.weight.data = torch.stack([torch.zeros_like(w), w])
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize("start, step_size", [("random", 0.2), ("zero", 0.1)])
def test_o64_one_step_is_the_worst_case_of_a_linear_model(start: str, step_size: float) -> None:
    w = torch.tensor([0.7, -1.3, 0.4, 2.0], dtype=F64)
    x = torch.full((3, 1, 2, 2), 0.5, dtype=F64) + torch.linspace(-0.1, 0.1, 3, dtype=F64).reshape(3, 1, 1, 1)
    y, eps = torch.ones(3, dtype=torch.int64), 0.1
    options: Any = {"eps": eps, "steps": 1, "step_size": step_size, "start": start}
    (objective,) = adv(logistic(w), x, y, streams(3), **options)
    loss = objective()
    margin = x.flatten(1) @ w
    expected = functional.softplus(-(margin - eps * w.abs().sum())).mean()
    assert abs(float(loss.total.detach() - expected)) < 1e-12


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.8)])
@pytest.mark.parametrize("start", ["random", "zero"])
def test_o65_every_point_stays_in_ball_and_box(norm: str, eps: float, start: str) -> None:
    model, (x, y) = Spy(cnn()), batch()
    for l2_init in L2_STARTS if norm == "l2" and start == "random" else ["ball"]:
        options: Any = {"norm": norm, "eps": eps, "steps": 4, "start": start, "l2_init": l2_init}
        [objective() for objective in adv(model, x, y, streams(), **options)]
    assert len(model.points) >= 5
    for point in model.points:
        away = (point - x).flatten(1)
        length = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
        assert float(length.max()) <= eps * (1 + 1e-6)
        assert float(point.min()) >= 0
        assert float(point.max()) <= 1


def test_l2_starts_have_their_radii() -> None:
    n, d = 2000, 50
    x = torch.full((n, 2, 5, 5), 0.5, dtype=F64)
    ball, rng = Ball("l2", 0.3), streams(n)
    radius = {name: (starting(ball, name).sample(x, rng) - x).flatten(1).norm(dim=1) / 0.3 for name in L2_STARTS}
    assert float(radius["ball"].mean()) == pytest.approx(d / (d + 1), abs=0.01)
    assert float(radius["radius"].mean()) == pytest.approx(0.5, abs=0.03)
    for name in ("sphere", "cube", "image"):
        assert torch.allclose(radius[name], torch.ones(n, dtype=F64), atol=1e-5), name


def test_o17_passes() -> None:
    model, (x, y) = cnn(), batch()
    with counting(model) as passes:
        (objective,) = adv(model, x, y, streams(), steps=10)
        fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (8 * 11, 8 * 11)


@pytest.mark.parametrize("mode", ["eval", "train_noupdate"])
def test_o68_crafting_leaves_the_running_statistics(mode: Any) -> None:
    model, (x, y) = cnn(batchnorm=True).train(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with bn_mode(model, mode), fixed_parameters(model):
        input_grad(model, x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    for craft in (mode, "train"):
        one = cnn(batchnorm=True).train()
        [objective() for objective in adv(one, x, y, streams(), steps=3, craft=craft)]
        assert int(one.state_dict()["1.num_batches_tracked"]) == (1 if craft != "train" else 4)


def test_o68_batch_statistics_mix_the_images() -> None:
    model, (x, y) = cnn(batchnorm=True), batch()

    def others_gradient(mode: Any) -> float:
        leaf = x.clone().requires_grad_()
        with bn_mode(model, mode):
            loss = functional.cross_entropy(model(leaf), y, reduction="none")[0]
        return float(torch.autograd.grad(loss, leaf)[0][1:].abs().max())

    assert others_gradient("train_noupdate") > 1e-4
    assert others_gradient("eval") == 0


@pytest.mark.parametrize("filled", [False, True])
def test_o69_helpers_leave_parameter_gradients_alone(filled: bool) -> None:
    model, (x, y) = cnn(), batch()
    if filled:
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
    leaf = x.clone().requires_grad_()
    _, g = input_grad(model, leaf, y, create_graph=True)
    exact_hvp(g, leaf, torch.ones_like(x))
    fd_hvp(lambda at: input_grad(model, at, y)[1], x, torch.ones_like(x), 0.01)
    input_grad(model, x, y, keep_graph=True)
    [objective() for objective in adv(model, x, y, streams(), steps=2)]
    for p in model.parameters():
        assert p.requires_grad
        assert torch.equal(p.grad, torch.full_like(p, 7.0)) if filled else p.grad is None  # type: ignore[arg-type]
