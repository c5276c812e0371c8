"""Gradient-norm regularization against closed forms: oracles O-18, O-27, O-36, O-73."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.train.memory import Memory
from tests.penalties import (
    F64,
    Valued,
    batch,
    dead_at_zero,
    loss_of,
    objective_of,
    passes_of,
    penalty_of,
    repeated,
    single,
    slope_error,
    softplus_cnn,
    under_autocast,
    value_and_gradient,
)


def test_o36_golden_value() -> None:
    layer = nn.Linear(2, 3, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]], dtype=F64))
    model = nn.Sequential(nn.Flatten(), layer)
    loss = loss_of("gn", model, single(0.5, -0.5), torch.tensor([0]), weight=1.0)
    assert abs(float(loss.logs["penalty"]) - 0.2142230) < 1e-7
    assert abs(float(loss.total.detach()) - 0.2142230 + float(torch.tensor(0.6914385).log())) < 1e-6


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 12.5),
        ({"power": 1.0}, 5.0),
        ({"grad_norm": "l1"}, 24.5),
        ({"grad_norm": "l1", "power": 1.0}, 7.0),
        ({"grad_norm": "linf"}, 8.0),
        ({"grad_norm": "l2", "power": 3.0}, 125 / 3),
    ],
)
def test_norm_and_power_on_a_linear_loss(options: dict[str, Any], expected: float) -> None:
    a = torch.tensor([3.0, -4.0], dtype=F64)
    model = Valued(lambda x: x @ a + 5)
    x = torch.cat([single(0.2, 0.6), single(0.9, 0.1)])
    assert penalty_of("gn", model, x, torch.tensor([0, 0]), weight=1.0, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"grad_norm": "l1", "power": 1.0}, {"grad_norm": "linf", "power": 1.5}])
def test_nothing_is_detached(options: dict[str, Any]) -> None:
    model = softplus_cnn()
    objective = objective_of("gn", model, *batch(), weight=30.0, **options)
    assert slope_error(model, objective) < 1e-7
    plain = value_and_gradient(model, objective_of("gn", model, *batch(), weight=0.0))[1]
    assert float((value_and_gradient(model, objective)[1] - plain).norm()) > 0.1 * float(plain.norm())


@pytest.mark.parametrize("options", [{"weight": 2.0}, {"grad_norm": "l1", "power": 1.0}])
def test_o18_a_repeated_batch_changes_nothing(options: dict[str, Any]) -> None:
    one, three = repeated("gn", 1, **options), repeated("gn", 3, **options)
    assert abs(one[0] - three[0]) < 1e-12
    assert torch.allclose(one[1], three[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad_norm", ["l2", "l1", "linf"])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_o73_a_sample_without_gradient(grad_norm: str, power: float) -> None:
    model, (x, y) = dead_at_zero(), batch()
    x[0] = 0
    objective = objective_of("gn", model, x, y, weight=1.0, grad_norm=grad_norm, power=power)
    loss, gradient = value_and_gradient(model, objective)
    assert gradient.isfinite().all()
    assert penalty_of("gn", model, x[:1], y[:1], weight=1.0, grad_norm=grad_norm, power=power) == 0
    assert loss > 0


def test_o27_autocast_is_switched_off() -> None:
    plain, cast = under_autocast("gn")
    assert plain == cast
    assert plain > 0


def test_passes() -> None:
    assert passes_of("gn", softplus_cnn(), *batch()) == (1, 2)
    assert passes_of("gn", softplus_cnn(batchnorm=True).train(), *batch()) == (2, 2)
    assert passes_of("gn", softplus_cnn(batchnorm=True).train(), *batch(), batchnorm="train") == (1, 2)


def test_batchnorm_penalty_keeps_images_apart() -> None:
    model, (x, y) = softplus_cnn(batchnorm=True).train(), batch()
    mixed = penalty_of("gn", model, x, y, batchnorm="train")
    whole = loss_of("gn", model, x, y, weight=1.0)
    apart = [penalty_of("gn", model.eval(), x[i : i + 1], y[i : i + 1], weight=1.0) for i in range(len(x))]
    # The statistics moved in the loss's pass, which comes before the penalty's.
    assert float(whole.logs["penalty"]) == pytest.approx(sum(apart) / len(x), rel=1e-12)
    assert mixed != pytest.approx(float(whole.logs["penalty"]) * 0.05, rel=1e-2)


def test_scale_c_is_the_variance_of_a_pixel() -> None:
    x, y = batch()
    train = Images(x / 2, y, torch.arange(len(x)), "t", ["a", "b", "c"])
    memory = Memory(train=train)
    model = softplus_cnn()
    plain, scaled = penalty_of("gn", model, x, y), penalty_of("gn", model, x, y, memory, gn_scale="c")
    centred = (x - x.mean(0)).flatten(1) / 2
    assert scaled / plain == pytest.approx(float((centred.T @ centred / len(x)).diagonal().mean()), rel=1e-12)
    memory.train = None  # what was taken once is remembered, in what a resumed run gets back
    assert penalty_of("gn", model, x, y, Memory(tensors=memory.tensors), gn_scale="c") == scaled


def test_bad_settings_are_refused() -> None:
    model, (x, y) = softplus_cnn(), batch()
    with pytest.raises(UsageError, match="power of gn must be at least 1"):
        objective_of("gn", model, x, y, power=0.5)
    with pytest.raises(UsageError, match="needs the training images"):
        objective_of("gn", model, x, y, gn_scale="c")
