"""Curvature regularization against closed forms: oracles O-18, O-27, O-62, O-73."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robeval.core import catalogue
from robeval.core.errors import UsageError
from robeval.models.normalise import Normalize
from robeval.train.gradients import input_grad
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

A = torch.tensor([2.0, -1.0], dtype=F64)
QUADRATIC = Valued(lambda x: 0.5 * (A * x * x).sum(1))


@pytest.mark.parametrize("square, expected", [(False, 2.3717082), (True, 5.625)])
def test_o62_golden_values(square: bool, expected: float) -> None:
    options: dict[str, Any] = {"gamma": 1.0, "h": "1.5", "square": square}
    value = penalty_of("cure", QUADRATIC, single(1.0, 1.0), torch.tensor([0]), **options)
    exact = 1.5 * float((A * torch.tensor([1.0, -1.0], dtype=F64)).norm()) / 2**0.5  # h ||A v||
    assert abs(value - (exact**2 if square else exact)) < 1e-9
    assert abs(value - expected) < 1e-7


def test_the_l2_step_goes_along_the_gradient() -> None:
    value = penalty_of(
        "cure", QUADRATIC, single(1.0, 1.0), torch.tensor([0]), gamma=1.0, h="0.5", square=False, norm="l2"
    )
    v = A / A.norm()  # the gradient at (1, 1) is A itself
    assert abs(value - 0.5 * float((A * v).norm())) < 1e-9


@pytest.mark.parametrize("epoch, h", [(0, 0.1), (1, 0.4), (4, 3.0), (9, 3.0)])
def test_h_follows_the_epoch(epoch: int, h: float) -> None:
    options: dict[str, Any] = {"gamma": 2.0, "square": False}
    model, (x, y) = softplus_cnn(), batch()
    scheduled = penalty_of("cure", model, x, y, Memory(epoch=epoch), h="0.1/0.4/0.8/1.8/3", **options)
    assert scheduled == penalty_of("cure", model, x, y, h=str(h), **options)
    assert scheduled != penalty_of("cure", model, x, y, h="0.2", **options)


@pytest.mark.parametrize("square", [True, False])
def test_both_gradients_keep_their_graph_and_the_direction_does_not(square: bool) -> None:
    """The direction is made of signs, so that the numerical derivative sees it as the constant that it is."""
    model = softplus_cnn()
    objective = objective_of("cure", model, *batch(), gamma=50.0, h="1", square=square)
    assert slope_error(model, objective) < 1e-6
    plain = value_and_gradient(model, objective_of("cure", model, *batch(), gamma=0.0))[1]
    assert float((value_and_gradient(model, objective)[1] - plain).norm()) > 0.01 * float(plain.norm())


def test_passes() -> None:
    assert passes_of("cure", softplus_cnn(), *batch()) == (2, 3)
    assert passes_of("cure", softplus_cnn(batchnorm=True).train(), *batch()) == (3, 3)
    model = nn.Sequential()
    model.add_module("normalise", Normalize([0.5], [0.25]).double())
    model.add_module("network", softplus_cnn())
    assert passes_of("cure", model, *batch(), penalty_space="normalised") == (2, 3)


def test_behind_the_normalisation_it_is_the_penalty_of_the_network_alone() -> None:
    network, (x, y) = softplus_cnn(), batch()
    model = nn.Sequential()
    model.add_module("normalise", Normalize([0.5], [0.25]).double())
    model.add_module("network", network)
    options: dict[str, Any] = {"gamma": 3.0, "square": False, "h": "0.7"}
    inside = penalty_of("cure", model, x, y, penalty_space="normalised", **options)
    assert inside == pytest.approx(penalty_of("cure", network, (x - 0.5) / 0.25, y, **options), rel=1e-12)
    assert inside != pytest.approx(penalty_of("cure", model, x, y, **options), rel=1e-2)
    assert isinstance(model[0], Normalize)


@pytest.mark.parametrize("square", [True, False])
def test_o18_a_repeated_batch_changes_nothing(square: bool) -> None:
    one, three = repeated("cure", 1, square=square), repeated("cure", 3, square=square)
    assert abs(one[0] - three[0]) < 1e-12
    assert torch.allclose(one[1], three[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("square", [True, False])
def test_o73_a_sample_without_gradient(norm: str, square: bool) -> None:
    model, (x, y) = dead_at_zero(), batch()
    x[0] = 0
    gradient = value_and_gradient(model, objective_of("cure", model, x, y, norm=norm, square=square))[1]
    assert gradient.isfinite().all()
    assert penalty_of("cure", model, x[:1], y[:1], norm=norm, square=square) == 0


def test_o27_autocast_is_switched_off() -> None:
    plain, cast = under_autocast("cure")
    assert plain == cast
    assert plain > 0


def test_batchnorm_penalty_keeps_images_apart() -> None:
    model, (x, y) = softplus_cnn(batchnorm=True).train(), batch()
    whole = float(loss_of("cure", model, x, y, square=False).logs["penalty"])
    apart = [penalty_of("cure", model.eval(), x[i : i + 1], y[i : i + 1], square=False) for i in range(len(x))]
    assert whole == pytest.approx(sum(apart) / len(x), rel=1e-12)


def test_the_presets_and_the_fact() -> None:
    code, paper = (catalogue.parse("trainers", name).settings for name in ("cure-code", "cure-paper"))
    assert (code["square"], code["gamma"], code["penalty_space"]) == (False, 4.0, "normalised")
    assert paper == catalogue.parse("trainers", "cure").settings
    assert catalogue.find("trainers", "cure").facts["reproduction"] == "contested"


@pytest.mark.parametrize("h", ["0", "-1", "0.1//0.2", "fast", ""])
def test_a_bad_h_is_refused(h: str) -> None:
    with pytest.raises(UsageError, match="h of cure"):
        objective_of("cure", softplus_cnn(), *batch(), h=h)


def test_a_linear_loss_has_no_curvature() -> None:
    a = torch.tensor([3.0, -4.0], dtype=F64)
    model, x, y = Valued(lambda x: x @ a + 20), single(0.2, 0.6), torch.tensor([0])
    assert float(input_grad(model, x, y)[1].norm()) == pytest.approx(5)
    assert penalty_of("cure", model, x, y, square=False) < 1e-9
