"""MART: oracle O-52 and what its loss trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.train.methods.adv import adv
from robeval.train.methods.mart import boosted, mart, weighted_divergence
from tests.test_train_adv import F64, Spy, batch, cnn, streams

Z, Z_ADV = torch.tensor([[2.0, 1.0, 0.0]], dtype=F64), torch.tensor([[1.0, 1.5, 0.0]], dtype=F64)
Y = torch.tensor([0])


def test_o52_values_on_given_logits() -> None:
    first, second = float(boosted(Z_ADV, Y)), float(weighted_divergence(Z, Z_ADV, Y))
    assert abs(first - 1.8947790) < 1e-6
    assert abs(second - 0.0801418) < 1e-6
    assert abs(first + 5 * second - 2.2954880) < 1e-6
    p, q = Z.softmax(1)[0], Z_ADV.softmax(1)[0]
    plain = -q[0].log() - (1 - q[1]).log() + 5 * (1 - p[0]) * (p * (p.log() - q.log())).sum()
    assert abs(float(plain) - 2.2957084) < 1e-6


class Table(nn.Module):
    """Two rows of logits as weights: one for a dark image, one for anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.clean, self.moved = nn.Parameter(Z[0].clone()), nn.Parameter(Z_ADV[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        at = (x.flatten(1).mean(1) > 0).to(x.dtype)[:, None]
        z: Tensor = (1 - at) * self.clean + at * self.moved + 0 * x.flatten(1).sum(1, keepdim=True)
        return z


def test_o52_total_of_a_training_step() -> None:
    (objective,) = mart(Table(), torch.zeros(1, 1, 2, 2, dtype=F64), Y, streams(1), eps=0.1, steps=2)
    assert abs(float(objective().total.detach()) - 2.2954880) < 1e-6


def test_the_weight_and_both_distributions_are_trained() -> None:
    model, (x, y) = Spy(cnn()), batch()
    (objective,) = mart(model, x, y, streams(), eps=0.1, steps=3, beta=4.0)
    loss, parameters = objective(), list(model.parameters())
    z, z_adv = model.inside(x), model.inside(model.points[-1])
    p, q = z.softmax(1), z_adv.softmax(1)
    others = q.masked_fill(functional.one_hot(y, 3).bool(), 0).amax(1)
    first = functional.cross_entropy(z_adv, y) - (1.0001 - others + 1e-12).log().mean()
    wrong = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
    divergence = functional.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)
    got = torch.autograd.grad(loss.total, parameters)
    whole = torch.autograd.grad(first + 4 * (wrong * divergence).mean(), parameters, retain_graph=True)
    constant = torch.autograd.grad(first + 4 * (wrong.detach() * divergence).mean(), parameters)
    for a, b in zip(got, whole, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert max(float((a - b).abs().max()) for a, b in zip(got, constant, strict=True)) > 1e-6


def test_certain_networks_give_finite_losses_and_gradients() -> None:
    for dtype in (torch.float32, F64):
        z = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
        y = torch.tensor([0, 0])
        total = boosted(z, y) + weighted_divergence(z, z.flip(1), y)
        (g,) = torch.autograd.grad(total.sum(), z)
        assert total.isfinite().all()
        assert g.isfinite().all()


def test_in_l2_the_attack_is_that_of_adversarial_training() -> None:
    model, (x, y) = Spy(cnn()), batch()
    options: Any = {"norm": "l2", "eps": 0.5, "steps": 3}
    for method in (mart, adv):
        (objective,) = method(model, x, y, streams(), **options)
        objective()
    mart_points, adv_points = model.points[:5], model.points[5:]
    assert torch.equal(mart_points[-1], adv_points[-1])
