"""The explicit penalty on weights: oracle O-66."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from robeval.train.step import fill_gradients
from tests.penalties import F64, batch, loss_of, objective_of, passes_of, softplus_cnn, value_and_gradient


def test_o66_the_penalty_is_the_optimisers_weight_decay_under_plain_sgd() -> None:
    torch.manual_seed(0)
    explicit = nn.Sequential(
        nn.Flatten(), nn.Linear(50, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)
    ).double()
    coupled = copy.deepcopy(explicit)
    x, y = batch()
    rate = 0.1
    for model, own, theirs in ((explicit, 0.05, 0.0), (coupled, 0.0, 0.05)):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=theirs)
        for _ in range(3):
            fill_gradients(list(model.parameters()), objective_of("weight-decay", model, x, y, weight=own))
            optimizer.step()
    for a, b in zip(explicit.parameters(), coupled.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_value_and_what_it_spares() -> None:
    model, (x, y) = softplus_cnn(batchnorm=True), batch()
    weights = [p.detach() for p in model.parameters() if p.dim() >= 2]
    assert len(weights) == 2
    squares = float(sum(w.square().sum() for w in weights))
    assert float(loss_of("weight-decay", model, x, y, weight=0.3).logs["penalty"]) == pytest.approx(0.15 * squares)
    plain = value_and_gradient(model.eval(), objective_of("weight-decay", model, x, y, weight=0.0))[1]
    decayed = value_and_gradient(model, objective_of("weight-decay", model, x, y, weight=0.3))[1]
    expected = torch.cat(
        [(0.3 * p.detach() if p.dim() >= 2 else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    assert torch.allclose(decayed - plain, expected, rtol=0, atol=1e-12)


def test_a_network_of_biases_alone() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=F64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(x), -1)

    x, y = batch()
    loss = loss_of("weight-decay", Bias(), x, y, weight=5.0)
    assert float(loss.logs["penalty"]) == 0
    assert loss.total.requires_grad


def test_passes() -> None:
    assert passes_of("weight-decay", softplus_cnn(), *batch()) == (1, 1)
