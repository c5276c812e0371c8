"""Finite-difference gradient penalty against closed forms: oracles O-22, O-23, O-25 to O-29, O-71, O-73."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core.ball import DUAL, Ball, vector_norm
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.models.build import build
from robeval.models.normalise import Normalize
from robeval.train.gradients import inner, input_grad, safe_l2, unit_direction
from robeval.train.measure import measure
from robeval.train.methods.fd_grad import fd_grad
from robeval.train.modes import fp32_exact
from robeval.train.passes import counting
from robeval.train.step import fill_gradients

F64 = torch.float64


class Margin(nn.Module):
    """Logits (0, q(x)), so that the cw loss of class 0 is q(x)."""

    def __init__(self, q: Any):
        super().__init__()
        self.q = q
        self.unused = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        value = self.q(x.flatten(1)) + 0 * self.unused
        return torch.stack([torch.zeros_like(value), value], 1)


def penalty(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> float:
    options = {"weight": 1.0, "loss": "cw", **options}
    (objective,) = fd_grad(model, x, y, Streams(0, range(len(x)), "t"), **options)
    loss = objective()
    return float(loss.logs["penalty"])


def softplus_cnn(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 25, 3)]
    return nn.Sequential(*layers).to(dtype)


def batch(n: int = 8, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Streams]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 5, 5, generator=g, dtype=F64).to(dtype)
    return x, torch.randint(3, (n,), generator=g), Streams(5, range(n), "t", dtype=dtype)


@pytest.mark.parametrize("h", [1.0, 0.01])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"norm": "l2"}, 12.5),
        ({"norm": "linf"}, 12.25),
        ({"norm": "linf", "l1_rescale": True}, 24.5),
        ({"norm": "l1"}, 8.0),
        ({"grad_norm": "l2", "squared": False}, 5.0),
        ({"grad_norm": "l1", "squared": False, "l1_rescale": True}, 7.0),
        ({"grad_norm": "linf", "squared": False}, 4.0),
    ],
)
def test_o22_linear_loss(h: float, order: int, options: dict[str, Any], expected: float) -> None:
    a = torch.tensor([3.0, -4.0], dtype=F64)
    model = Margin(lambda x: x @ a + 0.7)
    x = torch.tensor([[[[0.2, 0.6]]]], dtype=F64)
    assert abs(penalty(model, x, torch.tensor([0]), h=h, order=order, **options) - expected) < 1e-9


def test_o23_quadratic_loss() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g, dtype=F64)
    a, h = root @ root.T, 0.1
    model = Margin(lambda x: 0.5 * ((x @ a) * x).sum(1))
    x = torch.rand(1, 1, 2, 2, generator=g, dtype=F64)
    gradient = a @ x.flatten()
    d = gradient / gradient.norm()
    y = torch.tensor([0])
    first = penalty(model, x, y, h=h, norm="l2", squared=False)
    second = penalty(model, x, y, h=h, norm="l2", squared=False, order=2)
    assert abs(first - float(gradient.norm() + h / 2 * d @ a @ d)) < 1e-9
    assert abs(second - float(gradient.norm())) < 1e-9


def double_backprop(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    _, g = input_grad(model, x, y, create_graph=True)
    value = g.flatten(1).square().sum(1).mean() / 2
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return float(value.detach()), torch.cat([t.flatten() for t in grads])


@pytest.mark.parametrize(
    "h, order, value_error, gradient_error",
    [(0.1, 1, 1.2e-3, 2.2e-3), (0.01, 1, 1.2e-4, 2.2e-4), (0.001, 1, 1.2e-5, 2.2e-5), (0.01, 2, 5e-10, 4e-8)],
)
def test_o25_against_double_backpropagation(h: float, order: int, value_error: float, gradient_error: float) -> None:
    model, (x, y, rng) = softplus_cnn(), batch()
    with torch.no_grad():
        next(model.parameters()).mul_(0.2)  # curvature well below the gradient, as the errors stated assume
    exact, exact_grad = double_backprop(model, x, y)
    grads = []
    for weight in (0.0, 1.0):
        (objective,) = fd_grad(model, x, y, rng, norm="l2", weight=weight, h=h, order=order)
        logs = fill_gradients(list(model.parameters()), objective)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    alone = grads[1] - grads[0]
    assert abs(logs["penalty"] / exact - 1) < 5 * value_error
    assert float((alone - exact_grad).norm() / exact_grad.norm()) < 5 * gradient_error
    assert float(torch.cosine_similarity(alone, exact_grad, dim=0)) > 0.9999


def test_o26_float32_has_a_best_step_and_a_useless_one() -> None:
    x, y, _ = batch()
    exact = input_grad(softplus_cnn(), x, y)[1].flatten(1).norm(dim=1)
    model, (x32, y, _) = softplus_cnn(torch.float32), batch(dtype=torch.float32)
    loss, g = input_grad(model, x32, y)
    errors = {}
    for h in (1e-2, 1e-3, 1e-4, 1e-5):
        with torch.no_grad():
            ahead = per_sample_loss(model(x32 + h * unit_direction(g, "l2")), y, "ce")
        errors[h] = float((((ahead - loss) / h).double() - exact).norm() / exact.norm())
    assert errors[1e-2] < 5 * 8e-4
    assert errors[1e-3] < 5 * 6e-3
    assert errors[1e-5] > 10 * errors[1e-2]


def test_o27_autocast_is_switched_off() -> None:
    model, (x, y, _) = softplus_cnn(torch.float32), batch(dtype=torch.float32)
    plain = penalty(model, x, y, norm="l2", loss="ce")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert penalty(model, x, y, norm="l2", loss="ce") == plain
        with fp32_exact():
            assert model(x).dtype == torch.float32
    assert plain > 0


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_o28_o73_a_sample_without_gradient(norm: Any, squared: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        list(model.parameters())[1].fill_(-0.01)  # at the black image every unit is off
    x = torch.stack([torch.zeros(1, 2, 2, dtype=F64), torch.full((1, 2, 2), 0.9, dtype=F64)])
    y = torch.tensor([0, 1])
    _, g = input_grad(model, x, y)
    assert float(g[0].abs().max()) == 0
    assert float(unit_direction(g, "l2")[0].abs().max()) == 0
    alone = penalty(model, x[:1], y[:1], norm=norm, squared=squared, loss="ce", h=1e-3)
    assert alone == 0
    (objective,) = fd_grad(model, x, y, Streams(0, [0, 1], "t"), norm=norm, squared=squared)
    fill_gradients(list(model.parameters()), objective)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_o73_a_norm_differentiated_twice_at_zero() -> None:
    t = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(safe_l2(t).sum(), t, create_graph=True)
    (again,) = torch.autograd.grad(g.sum(), t, allow_unused=True, materialize_grads=True)
    assert torch.equal(g, torch.zeros_like(g))
    assert torch.equal(again, torch.zeros_like(again))
    (naive,) = torch.autograd.grad(t.square().sum(1).sqrt().sum(), t)
    assert naive.isnan().all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_o29_dual_norms_and_maximisers(norm: str) -> None:
    g = batch()[0] - 0.5
    eps, ball = 0.3, Ball(norm, 0.3)
    best = {
        "linf": eps * g.sign(),
        "l2": eps * unit_direction(g, "l2"),
        "l1": eps * unit_direction(g, "linf"),
    }[norm]
    assert torch.allclose(ball.norm_of(best), torch.full((8,), eps, dtype=F64), rtol=0, atol=1e-12)
    assert torch.allclose(inner(g, best), eps * vector_norm(g, DUAL[norm]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order, forward", [(1, 2), (2, 3)])
def test_passes(order: int, forward: int) -> None:
    model, (x, y, rng) = softplus_cnn(), batch()
    with counting(model) as passes:
        (objective,) = fd_grad(model, x, y, rng, order=order)
        fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (8 * forward, 16)


def normalised(network: nn.Module, mean: float = 0.5, std: float = 0.25) -> nn.Sequential:
    return nn.Sequential(OrderedDict(normalise=Normalize([mean], [std]).double(), network=network))


@pytest.mark.parametrize("order, forward", [(1, 2), (2, 3)])
@pytest.mark.parametrize("grad_norm", ["l2", "l1", "linf"])
def test_behind_the_normalisation_it_is_the_penalty_of_the_network_alone(
    grad_norm: Any, order: int, forward: int
) -> None:
    network, (x, y, rng) = softplus_cnn(), batch()
    options: dict[str, Any] = {"order": order, "h": 0.1, "grad_norm": grad_norm, "weight": 1.0}
    grads, losses = [], []
    for model, images, space in ((normalised(network), x, "normalised"), (network, (x - 0.5) / 0.25, "pixel")):
        with counting(model) as passes:
            (objective,) = fd_grad(model, images, y, rng, penalty_space=space, **options)  # type: ignore[arg-type]
            losses.append(fill_gradients(list(model.parameters()), objective)["loss"])
        assert (passes.forward, passes.backward) == (8 * forward, 16)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert torch.allclose(grads[0], grads[1], rtol=0, atol=1e-12)
    pixel = penalty(normalised(network), x, y, loss="ce", order=order, h=0.1, grad_norm=grad_norm)
    inside = penalty(normalised(network), x, y, loss="ce", penalty_space="normalised", **options)
    assert pixel > 4 * inside  # 1 / std^2 = 16 times as steep, less what the other step sees of the curvature


def test_the_normalisation_is_put_back_and_one_is_needed() -> None:
    model, (x, y, rng) = normalised(softplus_cnn()), batch()
    before = dict(model.named_modules())
    penalty(model, x, y, penalty_space="normalised")
    assert dict(model.named_modules()) == before
    (objective,) = fd_grad(softplus_cnn(), x, y, rng, penalty_space="normalised")
    with pytest.raises(UsageError, match="needs a network that begins with its normalisation"):
        objective()
    built = build("linear", normalise="none", in_channels=2, size=5, height=5, classes=3).double()
    assert penalty(built, x, y, penalty_space="normalised") == penalty(built, x, y)


def test_an_order_of_three_is_refused() -> None:
    model, (x, y, rng) = softplus_cnn(), batch()
    with pytest.raises(UsageError, match="order of fd-grad must be 1 or 2"):
        next(iter(fd_grad(model, x, y, rng, order=3)))


def with_batchnorm() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*layers).double()


def statistics_after_one_pass(x: Tensor) -> dict[str, Tensor]:
    model = with_batchnorm().train()
    model(x)
    return {k: v for k, v in model.state_dict().items() if "running" in k}


def test_batchnorm_penalty_keeps_images_apart() -> None:
    model, (x, y, _) = with_batchnorm(), batch()
    whole = penalty(model, x, y, loss="ce")
    mixed = penalty(model, x, y, loss="ce", batchnorm="train")
    model.load_state_dict({**model.state_dict(), **statistics_after_one_pass(x)})
    apart = [penalty(model.eval(), x[i : i + 1], y[i : i + 1], loss="ce") for i in range(8)]
    assert whole == pytest.approx(sum(apart) / 8, rel=1e-12)
    assert mixed != pytest.approx(whole, rel=1e-3)


def test_o71_nonzero_gradient_entries() -> None:
    x = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    images = Images(x, torch.zeros(6, dtype=torch.int64), torch.arange(6), "t", ["a", "b"])
    layer = nn.Linear(9, 2)
    model = nn.Sequential(nn.Flatten(), layer)
    with torch.no_grad():
        layer.weight[:, 4:] = 0
    assert measure(model, images, Ball("linf", 0.1), seed=0, batch_size=4)["grad_nonzero"] == 4
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([200.0, 0.0]))
    assert measure(model, images, Ball("linf", 0.1), seed=0, batch_size=4)["grad_nonzero"] == 0
