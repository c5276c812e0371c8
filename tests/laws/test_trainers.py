"""Laws that every trainer in the folder obeys; a new file is tested by existing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.passes import counting
from robeval.train.step import accuracy, fill_gradients, objectives
from tests.test_train_fit import Stop, go, network, same, stop_at

TRAINERS = catalogue.methods("trainers")
EPS = 0.05
#: Settings that make a method quick or a small problem fit; nothing here is needed for a new method to be tested.
FASTER: dict[str, dict[str, Any]] = {
    "adv": {"steps": 3},
    "rat": {"steps": 3},
    "rat-released": {"steps": 3},
    "llr": {"slope": 1.0},
    "adv-augment": {"steps": 3},
    "free-at": {"replays": 4},
    "mart": {"steps": 3, "lr": 0.05},
    "mma": {"steps": 3},
    "trades": {"steps": 3},
}
#: Methods whose loss has a part that belongs to the mini-batch as a whole (targets made from the batch's gradient, a
#: covariance of its perturbations), and the settings that switch it off: the rest must not depend on neighbours.
OF_THE_BATCH: dict[str, dict[str, Any]] = {
    "rat-released": {"alpha": 0.0},
    "sgr": {"source": "identity", "scale": 0.1},
}


def cases() -> list[tuple[str, str]]:
    return [(name, norm) for name, m in TRAINERS.items() for norm in (m.facts["norms"] or ("",))]


def options(name: str, norm: str) -> dict[str, Any]:
    method = TRAINERS[name]
    own = {s.name for s in method.settings}
    given = {"norm": norm, "eps": EPS, **FASTER.get(name, {})}
    return method.bind({k: v for k, v in given.items() if k in own and v != ""})


def problem(n: int = 24) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A smooth convolutional network and three classes that differ in brightness of a quarter."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).double()
    g = torch.Generator().manual_seed(2)
    y = torch.arange(n) % 3
    x = 0.3 + 0.1 * torch.rand(n, 1, 4, 4, generator=g, dtype=torch.float64)
    for k in range(3):
        x[y == k, :, k : k + 2, k : k + 2] += 0.4
    return model, x, y


def run(name: str, norm: str, steps: int = 3, start: nn.Module | None = None) -> tuple[list[float], nn.Sequential]:
    model, x, y = problem()
    if start is not None:
        model.load_state_dict(start.state_dict())
    model.train()
    function, settings = TRAINERS[name].load(), options(name, norm)
    rate = FASTER.get(name, {}).get("lr", 0.2 if start is None else 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses, memory = [], Memory(ids=torch.arange(len(x)), epochs=steps)
    for step in range(steps):
        rng = Streams(7, range(len(x)), name, [step] * len(x), dtype=x.dtype)
        memory.epoch = memory.step = step
        for objective in objectives(function, model, x, y, rng, settings, memory):
            losses.append(fill_gradients(list(model.parameters()), objective)["loss"])
            optimizer.step()
    return losses, model


@pytest.mark.parametrize("name, norm", cases())
def test_the_loss_falls_and_the_classes_are_learnt(name: str, norm: str) -> None:
    warm = TRAINERS[name].facts.get("start") == "standard"
    start = run("standard", "", 14)[1] if warm else None
    losses, model = run(name, norm, 80 if warm else 40, start)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    _, x, y = problem()
    assert float(accuracy(model(x), y)) > 0.9


@pytest.mark.parametrize("name, norm", cases())
def test_o74_same_seed_same_losses(name: str, norm: str) -> None:
    first = run(name, norm)[0]
    torch.manual_seed(99)  # the global generator has no say
    torch.rand(5)
    assert run(name, norm)[0] == first
    assert len(first) >= 3


@pytest.mark.parametrize("name, norm", cases())
def test_modes_and_gradients_are_left_as_they_were(name: str, norm: str) -> None:
    model, x, y = problem()
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = x.clone()
    rng = Streams(7, range(len(x)), name, dtype=x.dtype)
    steps = objectives(TRAINERS[name].load(), model, x, y, rng, options(name, norm), Memory(ids=torch.arange(len(x))))
    objective = next(steps)
    first = objective()
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert first.total.requires_grad
    assert first.total.dim() == 0
    assert 0 <= float(first.logs["train_accuracy"]) <= 1


@pytest.mark.parametrize("name, norm", cases())
def test_o73_a_sample_without_gradient_does_no_harm(name: str, norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        weight, bias = list(model.parameters())[:2]
        bias.fill_(-5.0)
        weight[0] = 2.0  # bright images still pass through one unit
    x = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4), torch.zeros(1, 4, 4)]).double()
    y = torch.tensor([0, 1, 2])
    rng = Streams(0, range(3), name, dtype=x.dtype)
    for objective in objectives(
        TRAINERS[name].load(), model, x, y, rng, options(name, norm), Memory(ids=torch.arange(len(x)))
    ):
        logs = fill_gradients(list(model.parameters()), objective)
        assert all(torch.isfinite(torch.tensor(v)) for v in logs.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name, norm", cases())
def test_an_image_draws_the_same_whatever_the_batch(name: str, norm: str) -> None:
    """The mean of the losses of two half batches is the loss of the whole."""
    model, x, y = problem()
    model.eval()

    def loss_of(rows: slice) -> float:
        rng = Streams(7, list(range(len(x)))[rows], name, dtype=x.dtype)
        memory = Memory(ids=torch.arange(len(x))[rows])
        settings = options(name, norm) | OF_THE_BATCH.get(name, {})
        steps = objectives(TRAINERS[name].load(), model, x[rows], y[rows], rng, settings, memory)
        return float(next(steps)().total.detach())

    halves = (loss_of(slice(0, 12)) + loss_of(slice(12, 24))) / 2
    assert halves == pytest.approx(loss_of(slice(0, 24)), rel=1e-10)


@pytest.mark.parametrize("name, norm", cases())
def test_every_step_costs_at_least_one_pass_each_way(name: str, norm: str) -> None:
    model, x, y = problem()
    with counting(model) as passes:
        rng = Streams(7, range(len(x)), name, dtype=x.dtype)
        memory = Memory(ids=torch.arange(len(x)))
        for objective in objectives(TRAINERS[name].load(), model, x, y, rng, options(name, norm), memory):
            fill_gradients(list(model.parameters()), objective)
    assert passes.forward >= len(x)
    assert passes.backward >= len(x)
    assert passes.forward % len(x) == passes.backward % len(x) == 0


@pytest.mark.parametrize("name", TRAINERS)
def test_a_training_stopped_inside_an_epoch_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    spec = catalogue.parse("trainers", name)
    more = {k: v for k, v in FASTER.get(name, {}).items() if k in spec.settings}
    text = name + "".join(f"{',' if k else ':'}{key}={value}" for k, (key, value) in enumerate(more.items()))
    _, whole = go(tmp_path / "whole", text, module=network())
    with pytest.raises(Stop):
        go(tmp_path / "parts", text, module=network(), save_steps=1, on_progress=stop_at(6))  # of 3 x 4
    result, parts = go(tmp_path / "parts", text, module=network(), save_steps=1)
    assert result.resumed == "yes"
    assert same(parts, whole)


@pytest.mark.parametrize("name", TRAINERS)
def test_facts_and_documentation(name: str) -> None:
    method = TRAINERS[name]
    assert isinstance(method.facts["source"], str)
    assert isinstance(method.facts["robust"], bool)
    assert set(method.facts["norms"]) <= {"linf", "l2", "l1"}
    for section in ("Shapes:", "Cost:", "Source:", "Departs:"):
        assert section in method.doc, section
    assert all(s.doc for s in method.settings), [s.name for s in method.settings if not s.doc]
    assert method.summary.endswith(".")


def blobs(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Two classes told apart by 2 of 52 inputs; the other 50 are noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.5 + 0.1 * torch.randn(n, 1, 4, 13, generator=g)
    centre = torch.where(y == 1, 0.15, -0.15)
    x[:, 0, 0, 0] = 0.5 + centre + 0.05 * torch.randn(n, generator=g)
    x[:, 0, 0, 1] = 0.5 - centre + 0.05 * torch.randn(n, generator=g)
    return x.clamp(0, 1), y


#: Strength at which a method should have unlearnt the noise; another method gets eps 0.05 and the usual rate.
STRONG: dict[str, dict[str, Any]] = {
    "sgr": {"weight": 30.0, "lr": 0.1},
    "soar": {"eps": 0.1, "lr": 0.1, "count": 120},
    "fd-grad": {"norm": "linf", "weight": 0.05, "l1_rescale": True, "lr": 0.1},
    "gn": {"weight": 0.3, "lr": 0.1},
    "foar": {"eps": 0.1, "lr": 0.1},
    "cure": {"gamma": 0.2, "square": False, "h": "0.5", "lr": 0.1},
    "llr": {"lr": 0.1},
    "adv-augment": {"eps": 0.1},
    "free-at": {"count": 20},
}


def on_blobs(name: str, seed: int, *, lr: float = 0.5, count: int = 100, start: Any = None, **given: Any) -> Any:
    """Train a linear model; its weights, the norm of those on noise, and its accuracy on fresh data."""
    x, y = blobs(seed, 64)
    torch.manual_seed(seed)
    layer = nn.Linear(52, 2)
    nn.init.normal_(layer.weight, std=0.5)
    model = nn.Sequential(nn.Flatten(), layer)
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    own = {s.name for s in TRAINERS[name].settings}
    settings = TRAINERS[name].bind({k: v for k, v in given.items() if k in own})
    memory = Memory(ids=torch.arange(len(x)), epochs=count)
    for step in range(count):
        rng = Streams(seed, range(len(x)), name, [step] * len(x))
        memory.epoch = memory.step = step
        for objective in objectives(TRAINERS[name].load(), model, x, y, rng, settings, memory):
            fill_gradients(list(model.parameters()), objective)
            optimizer.step()
    test_x, test_y = blobs(seed + 100, 500)
    weight = (layer.weight[1] - layer.weight[0]).detach()
    return model.state_dict(), float(weight[2:].norm()), float(accuracy(model(test_x), test_y))


@pytest.mark.parametrize("name", [n for n, m in TRAINERS.items() if m.facts["robust"]])
def test_o75_irrelevant_weights_are_unlearnt(name: str) -> None:
    """Standard training keeps the weights of inputs that say nothing; a regularizer halves them at equal accuracy."""
    noise, right = {"standard": 0.0, name: 0.0}, {"standard": 0.0, name: 0.0}
    warm = TRAINERS[name].facts.get("start") == "standard"
    strength = {"eps": 0.05, "steps": 3, **STRONG.get(name, {})}
    for seed in range(3):
        plain = on_blobs("standard", seed)
        kept = on_blobs(name, seed, start=plain[0] if warm else None, **strength)
        for key, result in (("standard", plain), (name, kept)):
            noise[key] += result[1] / 3
            right[key] += result[2] / 3
    assert right["standard"] > 0.95
    assert noise[name] <= 0.5 * noise["standard"]
    assert abs(right[name] - right["standard"]) <= 0.01
