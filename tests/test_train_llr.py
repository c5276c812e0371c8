"""Local linearity regularization against closed forms: oracles O-18, O-27, O-63, O-68, O-73."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.streams import Streams
from robeval.train.gradients import inner, input_grad
from robeval.train.memory import Memory
from robeval.train.step import objectives
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
    slope_error,
    softplus_cnn,
    under_autocast,
    value_and_gradient,
)

A = torch.tensor([2.0, -1.0], dtype=F64)


def gammas(model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """Difference from the tangent, and displacement, of 40 copies of one image, each with its own random start."""
    x, y = torch.full((40, 1, 1, 2), 0.5, dtype=F64), torch.zeros(40, dtype=torch.int64)
    loss, g = input_grad(model, x, y)
    found = points_of(model, x, y, **options)
    away, _ = input_grad(model, found, y)
    return (away - loss - inner(found - x, g)).abs(), (found - x).flatten(1)


def points_of(model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, **options: Any) -> Tensor:
    """The last points that the trainer asks the network about: those that its attack found."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    loss_of("llr", model, x, y, memory, **options)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("ascent", ["sign", "adam"])
def test_o63_a_linear_loss_is_its_own_tangent(ascent: str) -> None:
    a = torch.tensor([3.0, -4.0], dtype=F64)
    model = Valued(lambda x: x @ a + 20)
    gamma, delta = gammas(model, eps=0.1, ascent=ascent)
    assert float(gamma.max()) < 1e-9
    x, y = torch.full((40, 1, 1, 2), 0.5, dtype=F64), torch.zeros(40, dtype=torch.int64)
    slope = penalty_of("llr", model, x, y, eps=0.1, ascent=ascent, linearity=0.0, slope=3.0)
    assert slope == pytest.approx(3 * float((delta @ a).abs().mean()), rel=1e-9)


@pytest.mark.parametrize(
    "options", [{"steps": 60, "step_size": 0.005}, {"steps": 60, "ascent": "adam", "step_size": 0.01}]
)
def test_o63_the_attack_finds_the_largest_difference_of_a_quadratic_loss(options: dict[str, Any]) -> None:
    model = Valued(lambda x: 2 + 0.5 * (A * x * x).sum(1))
    gamma, delta = gammas(model, eps=0.1, **options)
    assert float(gamma.max()) <= 0.01 + 1e-9
    assert float(gamma.max()) >= 0.99 * 0.01
    best = delta[gamma.argmax()]
    assert abs(float(best[0])) == pytest.approx(0.1, abs=1e-6)
    # Half of the box's starts lead to the other, lower maximum, at delta_2 = +-0.1.
    assert float(gamma.min()) >= 0.99 * 0.005


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("ascent", ["sign", "adam"])
def test_passes(steps: int, ascent: str) -> None:
    assert passes_of("llr", softplus_cnn(), *batch(), steps=steps, ascent=ascent) == (steps + 2, steps + 2)
    apart = softplus_cnn(batchnorm=True).train()
    assert passes_of("llr", apart, *batch(), steps=steps, ascent=ascent) == (steps + 3, steps + 2)
    assert passes_of("llr", apart, *batch(), steps=steps, batchnorm="clean") == (steps + 2, steps + 2)


@pytest.mark.parametrize("weights", [(1.0, 4.0, 0.0), (0.0, 0.0, 3.0), (2.0, 4.0, 1.2)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_outer_gradient_keeps_its_graph_in_both_terms(weights: tuple[float, float, float], norm: str) -> None:
    model = softplus_cnn()
    clean, linearity, slope = weights
    objective = objective_of("llr", model, *batch(), eps=0.3, norm=norm, clean=clean, linearity=linearity, slope=slope)
    assert slope_error(model, objective) < 1e-6


def test_the_parts_add_up() -> None:
    model, (x, y) = softplus_cnn(), batch()
    found = points_of(model, x, y, eps=0.2)
    loss, g = input_grad(model, x, y)
    away, _ = input_grad(model, found, y)
    rise = inner(found - x, g)
    expected = 2 * loss.mean() + 5 * (away - loss - rise).abs().mean() + 7 * rise.abs().mean()
    total = loss_of("llr", model, x, y, eps=0.2, clean=2.0, linearity=5.0, slope=7.0).total.detach()
    assert float(total) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("shift_first", [False, True])
def test_the_objective_is_a_function_of_the_present_weights(shift_first: bool) -> None:
    """The clean pass that the attack leaves behind serves only the weights that it was made with, and only once."""
    model, (x, y) = softplus_cnn(), batch()
    found = points_of(model, x, y)
    objective = objective_of("llr", model, x, y)
    if not shift_first:
        first = value_and_gradient(model, objective)
        again = value_and_gradient(model, objective)
        assert first[0] == again[0]
        assert torch.equal(first[1], again[1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    loss, g = input_grad(model, x, y)
    away, _ = input_grad(model, found, y)
    rise = inner(found - x, g)
    expected = loss.mean() + 4 * (away - loss - rise).abs().mean() + 3 * rise.abs().mean()
    assert float(objective().total.detach()) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 0.7)])
@pytest.mark.parametrize("ascent", ["sign", "adam"])
def test_o65_the_point_lies_in_ball_and_box(norm: str, eps: float, ascent: str) -> None:
    model, (x, y) = softplus_cnn(), batch()
    x[:3] = x[:3].round()
    found = points_of(model, x, y, norm=norm, eps=eps, ascent=ascent)
    away = (found - x).flatten(1)
    assert float((away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max()) <= eps * (1 + 1e-6)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("step, share", [(0, 0.0), (125, 0.25), (500, 1.0), (9000, 1.0)])
def test_the_radius_ramps(step: int, share: float) -> None:
    model, (x, y) = softplus_cnn(), batch()
    found = points_of(model, 0.4 + 0.2 * x, y, Memory(step=step), eps=0.2, ramp=500, ascent="adam")
    assert float((found - 0.4 - 0.2 * x).abs().max()) == pytest.approx(0.2 * share, abs=1e-12)


def test_the_presets() -> None:
    paper, official = (catalogue.parse("trainers", f"llr-{name}").settings for name in ("paper", "official"))
    assert paper == catalogue.parse("trainers", "llr").settings
    names = ("clean", "linearity", "slope", "steps", "ascent", "ramp")
    assert [official[n] for n in names] == [2.0, 4.0, pytest.approx(4 * 0.3), 10, "adam", 500]
    model, (x, y) = softplus_cnn(batchnorm=True).train(), batch()
    assert passes_of("llr", model, x, y, **official) == (12, 12)


@pytest.mark.parametrize("options", [{}, {"ascent": "adam"}, {"norm": "l2"}])
def test_o18_a_repeated_batch_changes_nothing(options: dict[str, Any]) -> None:
    one, three = repeated("llr", 1, **options), repeated("llr", 3, **options)
    assert abs(one[0] - three[0]) < 1e-12
    assert torch.allclose(one[1], three[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ascent", ["sign", "adam"])
def test_o73_a_sample_without_gradient(ascent: str) -> None:
    model, (x, y) = dead_at_zero(), batch()
    x[0] = 0
    gradient = value_and_gradient(model, objective_of("llr", model, x, y, ascent=ascent, eps=0.001))[1]
    assert gradient.isfinite().all()
    assert penalty_of("llr", model, x[:1], y[:1], ascent=ascent, eps=0.001) == 0


def test_o27_autocast_is_switched_off() -> None:
    plain, cast = under_autocast("llr")
    assert plain == cast
    assert plain > 0


def test_o68_frozen_batchnorm_keeps_images_apart() -> None:
    model, (x, y) = softplus_cnn(batchnorm=True).train(), batch()
    before = model[1].running_mean.clone()
    objective = objective_of("llr", model, x, y)
    assert not torch.equal(model[1].running_mean, before)  # by the loss's own pass, which comes first
    whole = float(objective().logs["penalty"])
    model.eval()
    alone = float(objective_of("llr", model, x, y)().logs["penalty"])
    assert whole == pytest.approx(alone, rel=1e-12)
    halves = [penalty_of("llr", model, x[:3], y[:3]), penalty_in_second_half(model, x, y)]
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-12)


def penalty_in_second_half(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """With the draws that these images have in the whole batch."""
    method = catalogue.methods("trainers")["llr"]
    rng = Streams(5, range(3, 6), "t", dtype=F64)
    (objective,) = objectives(method.load(), model, x[3:], y[3:], rng, method.bind({}))
    return float(objective().logs["penalty"])


def test_o68_perturbed_points_use_the_clean_statistics() -> None:
    model, (x, y) = softplus_cnn(batchnorm=True).train(), batch()
    layer = model[1]
    buffers = layer.running_mean, layer.running_var
    with torch.no_grad():
        expected = model(x)
    moved = layer.running_mean.clone()
    layer.reset_running_stats()
    loss = loss_of("llr", model, x, y, eps=0.0, batchnorm="clean")
    assert float(loss.logs["penalty"]) < 1e-12  # the points are the images, and so are their logits
    assert float(loss.total.detach()) == pytest.approx(float(nn.functional.cross_entropy(expected, y)), rel=1e-12)
    assert layer.running_mean is buffers[0]
    assert layer.running_var is buffers[1]
    assert torch.equal(layer.running_mean, moved)  # once, by the clean pass
    assert all(m.training for m in model.modules())
    assert not layer._forward_pre_hooks
