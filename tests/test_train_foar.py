"""First-order adversarial regularization against closed forms: oracles O-17, O-18, O-20, O-27, O-29, O-68, O-73."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import softplus

from robeval.core.ball import DUAL, vector_norm
from robeval.train.gradients import inner, input_grad, unit_direction
from tests.penalties import (
    F64,
    Logistic,
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


@pytest.mark.parametrize(
    "norm, golden, worst", [("linf", 0.8751156, 0.8775281), ("l2", 0.8531222, 0.8543552), ("l1", 0.8421256, None)]
)
def test_o20_golden_values(norm: str, golden: float, worst: float | None) -> None:
    loss = loss_of("foar", Logistic(0.6, -0.8), single(1.0, 1.0), torch.tensor([1]), norm=norm, eps=0.1, init="zero")
    assert abs(float(loss.total.detach()) - golden) < 1e-7
    if worst is not None:
        length = {"linf": 1.4, "l2": 1.0}[norm]
        assert abs(float(softplus(torch.tensor(0.2 + 0.1 * length, dtype=F64))) - worst) < 1e-7


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("seed", range(5))
def test_o20_below_the_worst_case_and_close_to_it(norm: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(6, generator=g, dtype=F64)
    x, eps = torch.rand(1, 1, 2, 3, generator=g, dtype=F64), 0.3
    value = float(loss_of("foar", Logistic(*w), x, torch.tensor([1]), norm=norm, eps=eps, init="zero").total.detach())
    q = vector_norm(w[None], DUAL[norm])[0]
    margin = x.flatten() @ w
    worst = float(softplus(-(margin - eps * q)))
    assert value <= worst + 1e-12
    assert worst <= value + float(eps**2 * q**2 / 8) + 1e-12


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_o29_the_penalty_is_the_largest_rise_of_the_tangent(norm: str) -> None:
    model, (x, y), eps = softplus_cnn(), batch(), 0.2
    _, g = input_grad(model, x, y)
    highest = eps * unit_direction(g, DUAL[norm])  # in l1 a single pixel, in l2 along g
    if norm == "linf":
        highest = eps * g.sign()
    assert penalty_of("foar", model, x, y, norm=norm, eps=eps, init="zero") == pytest.approx(
        float(inner(g, highest).mean()), rel=1e-12
    )


@pytest.mark.parametrize("init, forward, backward", [("zero", 1, 2), ("rand", 1, 2), ("pgd1", 2, 3)])
def test_o17_passes(init: str, forward: int, backward: int) -> None:
    assert passes_of("foar", softplus_cnn(), *batch(), init=init) == (forward, backward)


@pytest.mark.parametrize("init", ["rand", "pgd1"])
def test_half_of_the_radius_is_left_after_a_start(init: str) -> None:
    model, (x, y) = softplus_cnn(), batch()
    half, whole = (penalty_of("foar", model, x, y, init=init, split=split) for split in (True, False))
    assert whole == pytest.approx(2 * half, rel=1e-12)
    zero = [penalty_of("foar", model, x, y, init="zero", split=split) for split in (True, False)]
    assert zero[0] == zero[1]
    assert zero[0] != whole


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("init", ["zero", "rand", "pgd1"])
def test_nothing_but_the_start_is_detached(norm: str, init: str) -> None:
    model = softplus_cnn()
    assert slope_error(model, objective_of("foar", model, *batch(), norm=norm, init=init, eps=0.5)) < 1e-7


@pytest.mark.parametrize("options", [{"init": "zero"}, {"init": "pgd1"}, {"init": "pgd1", "norm": "l2"}])
def test_o18_a_repeated_batch_changes_nothing(options: dict[str, Any]) -> None:
    one, three = repeated("foar", 1, **options), repeated("foar", 3, **options)
    assert abs(one[0] - three[0]) < 1e-12
    assert torch.allclose(one[1], three[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_o73_a_sample_without_gradient(norm: str) -> None:
    model, (x, y) = dead_at_zero(), batch()
    x[0] = 0
    gradient = value_and_gradient(model, objective_of("foar", model, x, y, norm=norm, init="zero"))[1]
    assert gradient.isfinite().all()
    assert penalty_of("foar", model, x[:1], y[:1], norm=norm, init="zero") == 0


def test_o27_autocast_is_switched_off_in_the_penalty() -> None:
    plain, cast = under_autocast("foar", init="zero")
    assert plain == cast
    assert plain > 0


def test_o68_batchnorm_is_frozen_unless_asked() -> None:
    model, (x, y) = softplus_cnn(batchnorm=True).train(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    value_and_gradient(model, objective_of("foar", model, x, y))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    loss_of("foar", model, x, y, batchnorm="train")
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
