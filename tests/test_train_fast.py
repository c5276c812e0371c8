"""One-step, free and mixed adversarial training, and what the whole adversarial family shares.

Oracles O-17, O-64, O-65, O-68, O-69.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.errors import UsageError
from robeval.train.awp import perturbed_weights
from robeval.train.memory import Memory
from robeval.train.methods.adv import adv
from robeval.train.methods.adv_augment import adv_augment
from robeval.train.methods.fgsm_at import fgsm_at
from robeval.train.methods.free_at import free_at
from robeval.train.passes import counting
from robeval.train.step import fill_gradients, objectives
from robeval.train.warnings import after_epoch
from tests.test_train_adv import F64, Spy, batch, cnn, logistic, streams
from tests.test_train_fit import Stop, go, same, stop_at

#: Every method of the family with its cost in passes: forward, backward.
FAMILY = [
    ("fgsm-at", 2, 2),
    ("fgsm-at-zero", 2, 2),
    ("free-at:replays=5", 5, 5),
    ("adv-augment:steps=4", 6, 5),
    ("fgsm-augment", 3, 2),
    ("adv-augment:steps=4,norm=l2,eps=0.8", 6, 5),
    ("trades:steps=4", 7, 5),
    ("trades:steps=4,norm=l2,eps=0.8", 7, 5),
    ("mart:steps=4", 6, 5),
    ("mart:steps=4,norm=l2,eps=0.8", 6, 5),
    ("mma:steps=4", 17, 5),
    ("mma:steps=4,norm=l2,d_max=0.8,eps_min=0.1", 17, 5),
    ("omma:steps=4", 16, 5),
]


def start(text: str, model: nn.Module, memory: Memory | None = None) -> Any:
    """A method on the eight images of ``batch``."""
    spec, (x, y) = catalogue.parse("trainers", text), batch()
    memory = memory or Memory(ids=torch.arange(len(x)))
    return objectives(spec.method.load(), model, x, y, streams(), spec.settings, memory)


@pytest.mark.parametrize("text, forward, backward", FAMILY)
def test_o17_passes(text: str, forward: int, backward: int) -> None:
    model = cnn()
    with counting(model) as passes:
        for objective in start(text, model):
            fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (8 * forward, 8 * backward)


@pytest.mark.parametrize("text", [text for text, _, _ in FAMILY])
def test_o65_every_point_stays_in_ball_and_box(text: str) -> None:
    spec, (x, _) = catalogue.parse("trainers", text), batch()
    eps = 1.05 * spec.settings["d_max"] if spec.settings.get("d_max") else spec.settings.get("eps", 1.05 * 32 / 255)
    model, memory = Spy(cnn()), Memory(ids=torch.arange(8))
    for _ in range(2):  # the second time with what the first remembered
        for objective in start(text, model, memory):
            fill_gradients(list(model.parameters()), objective)
    assert len(model.points) >= 4
    for point in model.points:
        away = (point - x).flatten(1)
        length = away.norm(dim=1) if spec.settings.get("norm") == "l2" else away.abs().amax(1)
        assert float(length.max()) <= eps * (1 + 1e-6)
        assert float(point.min()) >= 0
        assert float(point.max()) <= 1


@pytest.mark.parametrize("text", [text for text, _, _ in FAMILY])
def test_o68_crafting_leaves_the_running_statistics(text: str) -> None:
    model = cnn(batchnorm=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objective = next(start(text, model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    objective()
    two = text.partition(":")[0] in ("adv-augment", "fgsm-augment", "trades", "mart", "mma")
    assert int(model.state_dict()["1.num_batches_tracked"]) == 1 + two


@pytest.mark.parametrize("text", [text for text, _, _ in FAMILY])
def test_o69_parameter_gradients_are_left_alone(text: str) -> None:
    model = cnn()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    next(start(text, model))()
    assert all(p.requires_grad and torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())


@pytest.mark.parametrize("init, step_size", [("random", 0.2), ("zero", None)])
def test_o64_one_step_is_the_worst_case_of_a_linear_model(init: Any, step_size: float | None) -> None:
    w = torch.tensor([0.7, -1.3, 0.4, 2.0], dtype=F64)
    x = torch.full((3, 1, 2, 2), 0.5, dtype=F64) + torch.linspace(-0.1, 0.1, 3, dtype=F64).reshape(3, 1, 1, 1)
    y = torch.ones(3, dtype=torch.int64)
    (objective,) = fgsm_at(logistic(w), x, y, streams(3), eps=0.1, step_size=step_size, init=init)
    expected = functional.softplus(-(x.flatten(1) @ w - 0.1 * w.abs().sum())).mean()
    assert abs(float(objective().total.detach() - expected)) < 1e-12


def test_o64_fgsm_is_pgd_with_one_step_from_the_image() -> None:
    model, (x, y) = cnn(), batch()
    (one,) = fgsm_at(model, x, y, streams(), eps=0.1, init="zero")
    (other,) = adv(model, x, y, streams(), eps=0.1, steps=1, step_size=0.1, start="zero")
    assert torch.equal(one().total, other().total)


def test_fgsm_at_steps_a_quarter_further_than_eps() -> None:
    model, (x, y) = Spy(cnn()), batch()
    (objective,) = fgsm_at(model, x, y, streams(), eps=0.1)
    objective()
    begin, end = model.points
    assert torch.equal(begin, Ball("linf", 0.1).sample(x, streams()))
    inner = (end - x).abs() < 0.1 - 1e-9
    moved = (end - begin).abs()[inner & (end > 0) & (end < 1)]
    assert len(moved) > 5
    assert torch.allclose(moved, torch.full_like(moved, 0.125), atol=1e-12)


def free_steps(model: nn.Module, memory: Memory, replays: int = 3, rows: int = 8) -> list[float]:
    x, y = batch()
    memory.ids = torch.arange(rows)
    settings = {"eps": 0.1, "step_size": 0.04, "replays": replays}
    steps = objectives(free_at, model, x[:rows], y[:rows], streams(rows), settings, memory)
    return [fill_gradients(list(model.parameters()), objective)["loss"] for objective in steps]


def test_free_at_moves_images_along_the_gradient_of_the_same_pass() -> None:
    model, memory, (x, y) = Spy(cnn()), Memory(), batch()
    free_steps(model, memory)
    assert len(model.points) == 3
    assert torch.equal(model.points[0], x)
    ball = Ball("linf", 0.1)
    expected = x
    for at in model.points:
        assert torch.allclose(at, expected, atol=1e-12)
        leaf = at.clone().requires_grad_()
        (g,) = torch.autograd.grad(functional.cross_entropy(model.inside(leaf), y), leaf)
        expected = ball.project(x, at + 0.04 * g.sign())
    assert torch.allclose(memory.tensors["delta"], expected - x, atol=1e-12)


def test_free_at_hands_its_perturbation_to_the_next_mini_batch() -> None:
    model, memory, (x, _) = Spy(cnn()), Memory(), batch()
    free_steps(model, memory)
    held = memory.tensors["delta"].clone()
    free_steps(model, memory, rows=5)  # the short batch at the end of an epoch
    assert torch.allclose(model.points[3], x[:5] + held[:5], atol=1e-12)
    assert torch.equal(memory.tensors["delta"][5:], held[5:])
    assert memory.tensors["delta"].shape == x.shape
    assert not torch.equal(memory.tensors["delta"][:5], held[:5])
    with pytest.raises(UsageError, match="at least 1"):
        free_steps(model, memory, replays=0)


def test_free_at_under_weight_perturbation_uses_the_gradient_that_was_descended() -> None:
    model, memory, (x, y) = cnn(), Memory(ids=torch.arange(8)), batch()
    steps = free_at(model, x, y, streams(), memory, eps=0.1, step_size=0.04, replays=1)
    with perturbed_weights(model, next(steps), 0.5) as objective:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(functional.cross_entropy(model(leaf), y), leaf)
        fill_gradients(list(model.parameters()), objective)
    assert next(steps, None) is None
    assert torch.allclose(memory.tensors["delta"], Ball("linf", 0.1).project(x, x + 0.04 * g.sign()) - x, atol=1e-12)


@pytest.mark.parametrize(
    "text, epochs, lr", [("free-at:replays=2,eps=0.1", 2, 0.01), ("mma:steps=2,bisections=4,d_max=0.3", 6, 0.1)]
)
def test_a_stopped_run_with_a_memory_ends_with_the_same_bits(tmp_path: Path, text: str, epochs: int, lr: float) -> None:
    options: dict[str, Any] = {"epochs": epochs, "save_steps": 1, "lr": lr}
    whole, expected = go(tmp_path / "whole", text, **options)
    for step in (2, 4 * epochs - 3):
        with pytest.raises(Stop):
            go(tmp_path / "broken", text, on_progress=stop_at(step), **options)
    saved = torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["memory"]
    assert all((t != 0).float().mean() > 0.1 for t in saved.values())  # there is something to lose
    result, resumed = go(tmp_path / "broken", text, **options)
    assert result.resumed == "yes"
    assert result.rows[-1]["loss"] == whole.rows[-1]["loss"]
    assert same(resumed, expected)


def test_adv_augment_never_looks_at_the_label_while_crafting() -> None:
    model, (x, y) = Spy(cnn()), batch()
    for labels in (y, (y + 1) % 3):
        (objective,) = adv_augment(model, x, labels, streams(), eps=0.1, steps=3)
        objective()
    assert len(model.points) == 10
    assert torch.equal(model.points[4], model.points[9])
    seen = model.inside(x).argmax(1)
    (other,) = adv(model, x, seen, streams(), eps=0.1, steps=3, step_size=0.02, start="zero")
    other()
    assert torch.equal(model.points[4], model.points[13])


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_adv_augment_mixes_two_losses_and_logs_two_accuracies(mix: float) -> None:
    model, (x, y) = Spy(cnn()), batch()
    (objective,) = adv_augment(model, x, y, streams(), eps=0.1, steps=2, mix=mix)
    loss = objective()
    z, z_adv = model.inside(x), model.inside(model.points[-1])
    expected = (1 - mix) * functional.cross_entropy(z, y) + mix * functional.cross_entropy(z_adv, y)
    assert abs(float((loss.total - expected).detach())) < 1e-12
    assert float(loss.logs["train_accuracy"]) == float((z_adv.argmax(1) == y).double().mean())
    assert float(loss.logs["clean_train_accuracy"]) == float((z.argmax(1) == y).double().mean())


def test_label_leaking_is_told_from_these_two() -> None:
    row = {"confidence_clean": 0.8, "grad_nonzero": 16.0, "train_accuracy": 0.6, "clean_train_accuracy": 0.5}
    found = lambda **more: [n.code for n in after_epoch([{**row, **more}], robust=True, size=16, classes=10)]
    assert found() == ["LABEL_LEAKING"]
    assert found(clean_train_accuracy=0.7) == []


def test_a_mixture_outside_its_range_is_refused() -> None:
    x, y = batch()
    with pytest.raises(UsageError, match="mix of adv-augment"):
        next(adv_augment(cnn(), x, y, streams(), mix=1.5))


def test_names_that_users_know() -> None:
    parsed = {name: catalogue.parse("trainers", name) for name in ("fast-at", "omma", "fgsm-augment", "mart-wrn")}
    assert parsed["fast-at"].method.name == "fgsm-at"
    assert (parsed["omma"].method.name, parsed["omma"].settings["clean"]) == ("mma", 0.0)
    assert (parsed["fgsm-augment"].method.name, parsed["fgsm-augment"].settings["steps"]) == ("adv-augment", 1)
    assert (parsed["mart-wrn"].method.name, parsed["mart-wrn"].settings["beta"]) == ("mart", 6.0)


def test_copies_of_the_batch_change_no_gradient() -> None:
    """Losses are means over the batch, attacks look at each image alone."""
    model, (x, y) = cnn(), batch()

    def gradient(times: int) -> list[Tensor]:
        many = Memory(ids=torch.arange(8 * times))
        points, labels = x.repeat(times, 1, 1, 1), y.repeat(times)
        total = []
        for text in ("trades:steps=2", "mart:steps=2", "fgsm-at-zero", "adv-augment:steps=2"):
            spec = catalogue.parse("trainers", text)
            rng = streams(8 * times)
            rng.key = (rng.key[0][:8].repeat(times, 1), rng.key[1][:8].repeat(times, 1))
            objective = next(iter(objectives(spec.method.load(), model, points, labels, rng, spec.settings, many)))
            total += list(torch.autograd.grad(objective().total, list(model.parameters())))
        return total

    for once, thrice in zip(gradient(1), gradient(3), strict=True):
        assert torch.allclose(once, thrice, atol=1e-12)
