"""SOAR against closed forms: oracles O-05, O-07 to O-19."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.streams import Streams
from robeval.train.gradients import exact_hvp, fd_hvp, input_grad
from robeval.train.methods.soar import hz_length, kappa, soar
from robeval.train.passes import counting
from robeval.train.starts import radius_left, soar_start
from robeval.train.step import fill_gradients

F64 = torch.float64


class Fixed:
    """Draws that are given: vectors for shaped calls, scalars for calls without a shape."""

    def __init__(self, vectors: Tensor, scalars: Tensor):
        self.vectors, self.scalars = vectors, scalars

    def normal(self, *shape: int) -> Tensor:
        return self.vectors if shape else self.scalars


class Logistic(nn.Module):
    """Two classes with logits (0, <w, x>), so that the loss of class 1 is softplus(-<w, x>)."""

    def __init__(self, *w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(t), t], 1)


def softplus_cnn() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 25, 3)]
    return nn.Sequential(*layers).double()


def batch(n: int, *shape: int, classes: int = 3) -> tuple[Tensor, Tensor, Streams]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, *shape, generator=g, dtype=F64)
    return x, torch.randint(classes, (n,), generator=g), Streams(5, range(n), "t", dtype=F64)


def logistic_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    return leaf, input_grad(model, leaf, y, create_graph=True)[1]


def gaussian(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64)


GOLDEN = (torch.ones(1, 1, 1, 2, dtype=F64), torch.tensor([1]))
DRAWS = (torch.tensor([[[[1.0, 2.0]]]], dtype=F64), torch.tensor([0.5], dtype=F64))


@pytest.mark.parametrize(
    "norm, hvp, expected, tolerance",
    [
        ("linf", "exact", 0.5980472022, 1e-9),
        ("l2", "exact", 0.5921839943, 1e-9),
        ("linf", "fd", 0.5980472022, 3e-5),
        ("l2", "fd", 0.5921839943, 3e-5),
    ],
)
def test_o05_golden_value(norm: str, hvp: str, expected: float, tolerance: float) -> None:
    options: Any = {"norm": norm, "eps": 0.1, "init": "zero", "hvp": hvp}
    (objective,) = soar(Logistic(0.6, -0.8), *GOLDEN, Fixed(*DRAWS), **options)  # type: ignore[arg-type]
    loss = objective()
    assert abs(float(loss.logs["penalty"]) / expected - 1) < tolerance
    assert abs(float(loss.total.detach()) - 0.7981388694 - float(loss.logs["penalty"])) < 1e-9


def test_o05_length_and_half_eps() -> None:
    model = Logistic(0.6, -0.8)
    leaf, g = logistic_gradient(model, *GOLDEN)
    length = hz_length(model, leaf, GOLDEN[1], g, *DRAWS, hvp="exact", h=0.01)
    assert abs(float(length.detach()) - 1.1726415729) < 1e-9
    assert abs(kappa("linf", 0.05, 2) * float(length.detach()) - 0.5892523904) < 1e-9


def test_o07_proposition_1_holds_with_the_rms_and_not_with_the_mean() -> None:
    n = 400_000
    model = Logistic(-2.0)  # softplus(2x) at 0 has gradient 1 and curvature 1
    x, y = torch.zeros(n, 1, 1, 1, dtype=F64), torch.ones(n, dtype=torch.int64)
    zd, z1 = gaussian(n, 1, 1, 1)
    leaf, g = logistic_gradient(model, x, y)
    length = hz_length(model, leaf, y, g, zd, z1, hvp="exact", h=0.01).detach()
    k, loss = kappa("linf", 1.0, 1), 0.0
    assert k == 1
    true_maximum = loss + 1 + 0.5
    assert abs(float(k * length.mean() - 0.5) - (2 * math.sqrt(2 / math.pi) - 0.5)) < 0.005 * 1.0958
    assert float(k * length.mean() - 0.5) < true_maximum - 0.3
    assert abs(float(k * length.square().mean().sqrt() - 0.5) - true_maximum) < 0.005 * 1.5


def test_o08_o09_moments_of_the_length() -> None:
    n = 400_000
    model = Logistic(0.6, -0.8, 0.5)
    x = torch.tensor([0.2, 0.9, 0.4], dtype=F64).reshape(1, 1, 1, 3).expand(n, -1, -1, -1)
    y = torch.ones(n, dtype=torch.int64)
    leaf, g = logistic_gradient(model, x, y)
    length = hz_length(model, leaf, y, g, *gaussian(n, 1, 1, 3), hvp="exact", h=0.01).detach()
    w = model.w.detach()
    f = torch.sigmoid(x[0].flatten() @ w)
    r, u, square = f - 1, f * (1 - f), w @ w
    frobenius = u**2 * square**2 + 2 * r**2 * square + 1
    assert abs(float(length.square().mean() / frobenius) - 1) < 0.005
    ratio = float(length.mean() / frobenius.sqrt())
    assert math.sqrt(2 / math.pi) - 0.002 < ratio < 1.0


def test_o10_constant_classifier() -> None:
    model = softplus_cnn()
    for p in model.parameters():
        nn.init.zeros_(p)
    n = 20_000
    x, y, _ = batch(n, 2, 5, 5)
    zd, z1 = gaussian(n, 2, 5, 5)
    leaf, g = logistic_gradient(model, x[:64], y[:64])
    length = hz_length(model, leaf, y[:64], g, zd[:64], z1[:64], hvp="fd", h=0.01).detach()
    assert torch.equal(length, z1[:64].abs())
    assert abs(float(z1.abs().mean()) / math.sqrt(2 / math.pi) - 1) < 0.01


def test_o11_exact_product_is_the_explicit_matrix_times_z() -> None:
    model, (x, y, _) = softplus_cnn(), batch(3, 2, 5, 5)
    zd, z1 = gaussian(3, 2, 5, 5)
    leaf, g = logistic_gradient(model, x, y)
    length = hz_length(model, leaf, y, g, zd, z1, hvp="exact", h=0.01).detach()
    for i in range(3):
        one = lambda t, i=i: input_grad(model, t.view(1, 2, 5, 5), y[i : i + 1], create_graph=True)[0].sum()
        hessian = torch.autograd.functional.hessian(one, x[i].flatten())
        gradient = g[i].detach().flatten()[:, None]
        matrix = torch.cat([torch.cat([hessian, gradient], 1), torch.cat([gradient.T, torch.ones(1, 1, dtype=F64)], 1)])
        expected = (matrix @ torch.cat([zd[i].flatten(), z1[i : i + 1]])).norm()
        assert abs(float(length[i] / expected) - 1) < 1e-12


def test_o12_finite_differences_approach_the_exact_product_linearly() -> None:
    model, (x, y, _) = softplus_cnn(), batch(8, 2, 5, 5)
    zd, z1 = gaussian(8, 2, 5, 5)
    parameters = list(model.parameters())

    def value_and_gradient(hvp: str, h: float) -> tuple[Tensor, Tensor]:
        leaf, g = logistic_gradient(model, x, y)
        length = hz_length(model, leaf, y, g, zd, z1, hvp=hvp, h=h)
        grads = torch.autograd.grad(length.mean(), parameters, allow_unused=True, materialize_grads=True)
        return length.detach(), torch.cat([t.flatten() for t in grads])

    exact, exact_grad = value_and_gradient("exact", 0.0)
    errors = []
    for h in (0.1, 0.01, 0.001):
        value, grad = value_and_gradient("fd", h)
        errors.append(float((value - exact).norm() / exact.norm()))
        assert errors[-1] < 5 * 6.7e-5 * h
        assert float((grad - exact_grad).norm() / exact_grad.norm()) < 5 * 3e-4 * h
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_o13_hessian_of_a_softmax_linear_model() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    model = nn.Sequential(nn.Flatten(), layer)
    x, y, _ = batch(5, 1, 2, 2)
    leaf, g = logistic_gradient(model, x, y)
    v = gaussian(5, 1, 2, 2)[0]
    product = exact_hvp(g, leaf, v).detach().flatten(1)
    w, p = layer.weight.detach(), model(x).softmax(1).detach()
    for i in range(5):
        expected = w.T @ (p[i].diag() - torch.outer(p[i], p[i])) @ w @ v[i].flatten()
        assert torch.allclose(product[i], expected, rtol=0, atol=1e-12)


def test_o14_a_kink_is_seen_by_the_difference_only() -> None:
    h = 0.01
    x = torch.full((1, 1), -h / 2, dtype=F64)

    def gradient(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        return torch.autograd.grad(leaf.relu().sum(), leaf)[0]

    v = torch.ones(1, 1, dtype=F64)
    assert float(fd_hvp(gradient, x, v, h)) == 1 / h
    leaf = x.requires_grad_()
    (g,) = torch.autograd.grad(leaf.relu().sum(), leaf, create_graph=True)
    assert float(exact_hvp(g, leaf, v)) == 0


def test_o15_kappa() -> None:
    assert abs(kappa("linf", 8 / 255, 3072) - 2.0117878) < 1e-6
    assert abs(kappa("linf", 4 / 255, 3072) - 0.8779469) < 1e-6
    assert abs(8 / 255 * math.sqrt(3072) - 1.7388432) < 1e-6
    assert kappa("l2", 1.0, 3072) == 1.0


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 0.7)])
@pytest.mark.parametrize("init", ["zero", "rand", "pgd1"])
def test_o16_start(norm: str, eps: float, init: str) -> None:
    model, (x, y, rng) = softplus_cnn(), batch(16, 2, 5, 5)
    x[:4] = x[:4].round()  # on the box
    start = soar_start(model, x, y, rng, init=init, norm=norm, eps=eps)
    away = (start - x).flatten(1)
    length = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert float(length.max()) <= eps / 2 + 1e-7
    assert float(start.min()) >= 0
    assert float(start.max()) <= 1
    assert not start.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert (init == "zero") == torch.equal(start, x)


@pytest.mark.parametrize(
    "options, forward, backward",
    [({"init": "pgd1"}, 3, 4), ({"init": "zero"}, 2, 3), ({"init": "rand"}, 2, 3), ({"samples": 4}, 6, 7)],
)
def test_o17_passes(options: dict[str, Any], forward: int, backward: int) -> None:
    model, (x, y, rng) = softplus_cnn(), batch(6, 2, 5, 5)
    with counting(model) as passes:
        (objective,) = soar(model, x, y, rng, **options)
        fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (6 * forward, 6 * backward)


def gradient_of(model: nn.Module, x: Tensor, y: Tensor, rng: Any, **options: Any) -> tuple[float, Tensor]:
    (objective,) = soar(model, x, y, rng, **options)
    logs = fill_gradients(list(model.parameters()), objective)
    return logs["loss"], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("init", ["zero", "pgd1"])
@pytest.mark.parametrize("hvp", ["fd", "exact"])
def test_o18_a_repeated_batch_changes_nothing(init: str, hvp: str) -> None:
    model, (x, y, _) = softplus_cnn(), batch(4, 2, 5, 5)
    streams = lambda m: Streams(5, list(range(4)) * m, "t", dtype=F64)
    one = gradient_of(model, x, y, streams(1), init=init, hvp=hvp)
    three = gradient_of(model, x.repeat(3, 1, 1, 1), y.repeat(3), streams(3), init=init, hvp=hvp)
    assert abs(one[0] - three[0]) < 1e-12
    assert torch.allclose(one[1], three[1], rtol=0, atol=1e-12)


def test_o19_clip_modes() -> None:
    model, (x, y, rng) = softplus_cnn(), batch(4, 2, 5, 5)
    with torch.no_grad():
        list(model.parameters())[2].mul_(200)
        y = model(x).argmin(1)  # confidently wrong: every ||Hz|| is far above 10
    plain = gradient_of(model, x, y, Fixed(*gaussian(4, 2, 5, 5)), init="zero", weight=0.0)
    k = kappa("linf", 8 / 255, 50)
    at_limit = gradient_of(model, x, y, Fixed(*gaussian(4, 2, 5, 5)), init="zero")
    assert abs(at_limit[0] - plain[0] - 10 * k) < 1e-6
    assert torch.allclose(at_limit[1], plain[1], rtol=1e-6, atol=1e-6)
    value = gradient_of(model, x, y, Fixed(*gaussian(4, 2, 5, 5)), init="zero", clip_on="value")
    assert abs(value[0] - plain[0] - 10) < 1e-6
    (objective,) = soar(model, x, y, rng, init="zero", clip_on="grad")
    logs = fill_gradients(list(model.parameters()), objective)
    with_penalty = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float((with_penalty - plain[1]).norm()) == pytest.approx(10, abs=1e-6)
    assert logs["gradient_clipped"] == 1
    (objective,) = soar(model, x, y, rng, init="zero")
    loss = objective()
    assert float(loss.logs["clipped"]) == 1


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 0.7)])
def test_o16_the_first_authors_start(norm: str, eps: float) -> None:
    model, (x, y, rng) = softplus_cnn(), batch(16, 2, 5, 5)
    x[:4] = x[:4].round()
    start = soar_start(model, x, y, rng, init="pgd1_author", norm=norm, eps=eps)
    ball = Ball(norm, eps)
    random = ball.sample(x, batch(16, 2, 5, 5)[2])
    assert torch.equal(start, ball.project(x, random + eps / 4 * ball.ascent(input_grad(model, random, y)[1])))
    length = ball.norm_of(start - x)
    assert float(length.max()) <= eps * (1 + 1e-7)
    assert float(length.max()) > 0.75 * eps  # a start in the whole ball, not in half of it
    assert float(start.min()) >= 0
    assert float(start.max()) <= 1
    assert not start.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_papers_start_draws_in_the_half_ball_and_steps_by_it(norm: str) -> None:
    model, (x, y, rng), half = softplus_cnn(), batch(16, 2, 5, 5), Ball(norm, 0.1)
    start = soar_start(model, x, y, rng, init="pgd1", norm=norm, eps=0.2)
    random = half.sample(x, batch(16, 2, 5, 5)[2])
    assert torch.equal(start, half.project(x, random + 0.1 * half.ascent(input_grad(model, random, y)[1])))


@pytest.mark.parametrize("init, left", [("zero", 0.2), ("rand", 0.1), ("pgd1", 0.1), ("pgd1_author", 0.2)])
def test_o15_the_radius_that_the_start_leaves(init: str, left: float) -> None:
    assert radius_left(init, 0.2, split=True) == left
    assert radius_left(init, 0.2, split=False) == 0.2


def test_the_snapshot_limits_the_length_and_the_gradient() -> None:
    settings = catalogue.parse("trainers", "soar-snapshot-2020").settings
    wanted = {"init": "pgd1_author", "h": 0.03, "eps": 0.03, "weight": 0.5, "clip_on": "norm", "clip": 10.0}
    assert {k: settings[k] for k in wanted} == wanted
    assert settings["grad_clip"] == 30
    model, (x, y, _) = softplus_cnn(), batch(4, 2, 5, 5)
    draws = gaussian(4, 2, 5, 5)
    plain = gradient_of(model, x, y, Fixed(*draws), init="zero", weight=0.0)
    loose = gradient_of(model, x, y, Fixed(*draws), init="zero")
    own = float((loose[1] - plain[1]).norm())
    same = gradient_of(model, x, y, Fixed(*draws), init="zero", grad_clip=2 * own)
    tight = gradient_of(model, x, y, Fixed(*draws), init="zero", grad_clip=own / 2)
    assert same[0] == pytest.approx(loose[0], rel=1e-12)
    assert torch.allclose(same[1], loose[1], rtol=0, atol=1e-12)
    assert torch.allclose(tight[1] - plain[1], (loose[1] - plain[1]) / 2, rtol=0, atol=1e-12)
    with torch.no_grad():
        list(model.parameters())[2].mul_(200)
        y = model(x).argmin(1)
    (objective,) = soar(model, x, y, Fixed(*draws), init="zero", grad_clip=1.0)  # type: ignore[arg-type]
    loss = objective()
    assert float(loss.logs["clipped"]) == 1  # both limits at once
    assert loss.apart is not None
    assert float(loss.apart.detach()) == pytest.approx(10 * kappa("linf", 8 / 255, 50))


def logistic_expansion() -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Gradient and Hessian of a logistic loss by autograd; the weights, r = f - y and u = f (1 - f) by hand."""
    w, x = torch.tensor([0.6, -0.8], dtype=F64), torch.tensor([[[[1.0, 0.7]]]], dtype=F64)
    leaf = x.clone().requires_grad_()
    _, g = input_grad(Logistic(0.6, -0.8), leaf, torch.tensor([1]), create_graph=True)
    rows = [exact_hvp(g, leaf, torch.eye(2, dtype=F64)[i].view_as(x)).flatten() for i in range(2)]
    f = float(torch.sigmoid(x.flatten() @ w))
    return g.detach().flatten(), torch.stack(rows), w, f - 1, f * (1 - f)


def test_o04_gradient_and_hessian_of_the_logistic_loss() -> None:
    g, hessian, w, r, u = logistic_expansion()
    assert torch.allclose(g, r * w, rtol=0, atol=1e-12)
    assert torch.allclose(hessian, u * torch.outer(w, w), rtol=0, atol=1e-12)


def test_o06_the_expansion_is_largest_along_the_weights() -> None:
    g, hessian, w, r, u = logistic_expansion()
    rho = 0.3
    angle = torch.linspace(0, 2 * math.pi, 20001, dtype=F64)
    d = rho * torch.stack([angle.cos(), angle.sin()], 1)
    rise = d @ g + 0.5 * ((d @ hessian) * d).sum(1)
    length = float(w.norm())
    expected = abs(r) * rho * length + 0.5 * u * rho**2 * length**2
    along = math.copysign(rho, r) * w / length
    assert float(along @ g + 0.5 * along @ hessian @ along) == pytest.approx(expected, abs=1e-10)
    assert float(rise.max()) <= expected + 1e-10
    assert float(rise.max()) == pytest.approx(expected, abs=1e-6)
