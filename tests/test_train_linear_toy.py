"""The linear model that motivates SOAR (Ma et al. 2020, section 2): oracles O-01 to O-03."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robeval.train.gradients import exact_hvp, inner
from robeval.train.recipe import Recipe, make_optimizer

F64 = torch.float64
D, EPS = 12, 0.3


def squared_error(x: Tensor, w: Tensor, label: Tensor) -> Tensor:
    """Half the squared residual of <w, x> against a fixed label. -> (n,)."""
    return 0.5 * (x @ w - label).square()


def sample(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images whose only entry is the first, weights that also use the others, and the labels <e_1, x>."""
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(n, D, dtype=F64)
    x[:, 0] = 3 * torch.rand(n, generator=g, dtype=F64) - 0.75
    return x, torch.randn(D, generator=g, dtype=F64) + 1.0 * (torch.arange(D) == 0), x[:, 0].clone()


def closed_form(x: Tensor, w: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """L(w) plus the first-order term, and the second-order term."""
    wasted = w[1:].abs().sum()
    residual = x @ w - label
    return squared_error(x, w, label).mean() + EPS * residual.mean() * wasted, EPS**2 / 2 * wasted**2


def test_o01_the_second_order_expansion_is_exact_and_the_first_is_short_by_its_last_term() -> None:
    x, w, label = sample(50)
    delta = torch.cat([torch.zeros(1, dtype=F64), EPS * w[1:].sign()]).expand_as(x)
    first_order, rest = closed_form(x, w, label)
    leaf = x.clone().requires_grad_()
    loss = squared_error(leaf, w, label)
    (g,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    tangent = loss + inner(g, delta)
    bent = tangent + inner(exact_hvp(g, leaf, delta), delta) / 2
    there = squared_error(x + delta, w, label).mean()
    assert abs(float(there - first_order - rest)) < 1e-12
    assert abs(float(bent.mean().detach() - there)) < 1e-12
    assert abs(float(tangent.mean().detach() - first_order)) < 1e-12
    assert float(rest) > 0.01


def test_o02_the_squared_l1_norm_of_gaussian_weights() -> None:
    d, sigma, n = 50, 0.3, 400_000
    g = torch.Generator().manual_seed(0)
    mean = sum(float((sigma * torch.randn(n // 8, d, generator=g)).abs().sum(1).square().mean()) for _ in range(8)) / 8
    expected = d * sigma**2 + d * (d - 1) * 2 / math.pi * sigma**2
    assert expected == pytest.approx(144.87, abs=0.005)
    assert mean == pytest.approx(expected, rel=0.003)


def descend(start: Tensor, x: Tensor, label: Tensor, penalised: bool, steps: int, weight_decay: float = 0.0) -> Tensor:
    """Weights after full-batch gradient descent."""
    module = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(start[None])
    optimizer = make_optimizer(Recipe(lr=0.3, momentum=0.0, weight_decay=weight_decay), module)
    for _ in range(steps):
        optimizer.zero_grad()
        w = module.weight[0]
        loss = sum(closed_form(x, w, label)) if penalised else squared_error(x, w, label).mean()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    return module.weight.detach()[0]


def test_o03_descent_alone_keeps_the_wasted_weights_and_the_penalty_unlearns_them() -> None:
    x, w, label = sample(50)
    w[0] = 2.0  # a residual above 0, where the sign of the weights is the worst direction
    plain = descend(w, x, label, False, 200)
    assert torch.equal(plain[1:], w[1:])
    assert float(plain[0]) == pytest.approx(1, abs=1e-9)
    regularized = descend(w, x, label, True, 800)
    assert float(regularized[1:].abs().max()) < 1e-3


def test_o03_ridge_shrinks_the_useful_weight_by_its_second_moment() -> None:
    x, w, label = sample(50)
    penalty = 0.2
    ridge = descend(w, x, label, False, 400, weight_decay=penalty)
    second = float(x[:, 0].square().mean())
    assert float(ridge[0]) == pytest.approx(second / (second + penalty), abs=1e-9)
    mean = float(x[:, 0].mean())
    assert abs(float(ridge[0]) - mean / (mean + penalty)) > 0.01  # what the paper prints
    assert float(ridge[1:].abs().max()) < 1e-9
