"""Training on bounds: what the loss is where it is known, what it bounds, how it grows, and that proofs follow."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.bounds.crown import crown
from robeval.bounds.graph import graph_of, live_graph
from robeval.bounds.ibp import ibp as proof_by_ibp
from robeval.bounds.intervals import intervals
from robeval.bounds.region import Region
from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.bounding import batch_statistics, ramped
from robeval.train.craft import crafted
from robeval.train.initial import seeded
from robeval.train.memory import Memory
from robeval.train.orders import layer as asked
from robeval.train.preset import resolve
from robeval.train.step import Loss, fill_gradients, objectives
from tests.laws.test_trainers import problem
from tests.proofs import Branches

F64 = torch.float64
AT_ONCE = {"warmup": 0.0, "ramp": 0.0}
BOTH = pytest.mark.parametrize("name", ["ibp", "crown-ibp"])


def loss_of(name: str, model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, **given: Any) -> Loss:
    """The loss of a mini-batch, with the whole radius unless a ramp is given."""
    method = catalogue.find("trainers", name)
    rng = Streams(0, range(len(x)), name, dtype=x.dtype)
    return next(objectives(method.load(), model, x, y, rng, method.bind({**AT_ONCE, **given}), memory))()


def data(n: int = 12, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Images with pixels at both ends of the box."""
    g = torch.Generator().manual_seed(seed)
    return (1.6 * torch.rand(n, 1, 4, 4, generator=g, dtype=dtype) - 0.3).clamp(0, 1), torch.arange(n) % 3


def dense(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).to(
        dtype
    )


def with_batchnorm(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Branches(nn.ReLU()), nn.Flatten(),
        nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip


def flat_grad(loss: Loss, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, list(model.parameters()))])


@BOTH
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_on_a_linear_network_the_loss_is_that_of_the_worst_points(name: str, eps: float) -> None:
    """The worst image against each rival is a corner of ball and box."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 3).double()
    model = nn.Sequential(nn.Flatten(), layer)
    x, y = data()
    slope = layer.weight[y][:, None] - layer.weight  # n, K, 16
    low, high = ((x + s * eps).clamp(0, 1).flatten(1)[:, None] for s in (-1, 1))
    margin = (slope * torch.where(slope > 0, low, high)).sum(2) + layer.bias[y][:, None] - layer.bias
    exact = margin.neg().exp().sum(1).log().mean()
    clean = nn.functional.cross_entropy(model(x), y)
    for kappa in (0.0, 0.4):
        total = loss_of(name, model, x, y, eps=eps, kappa=kappa).total
        torch.testing.assert_close(total, kappa * clean + (1 - kappa) * exact, rtol=1e-12, atol=0)


@BOTH
@pytest.mark.parametrize("given", [{"kappa": 1.0, "eps": 0.1}, {"kappa": 0.3, "eps": 0.0}], ids=["kappa", "eps"])
@pytest.mark.parametrize("make", [dense, with_batchnorm])
def test_without_weight_or_radius_it_is_standard_training(name: str, given: dict[str, float], make: Any) -> None:
    """With BatchNorm too: the bounds see the statistics of the clean batch, and gradients flow through them."""
    model, (x, y) = make(), data()
    plain = Loss(nn.functional.cross_entropy(model(x), y))
    mine = loss_of(name, model, x, y, **given)
    torch.testing.assert_close(mine.total, plain.total, rtol=1e-10, atol=0)
    torch.testing.assert_close(flat_grad(mine, model), flat_grad(plain, model), rtol=1e-7, atol=1e-9)


@BOTH
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_no_point_of_the_ball_has_a_larger_loss(name: str, kind: str) -> None:
    if kind == "dense":
        model, (x, y) = dense(), data()
    else:
        model, x, y = problem()
    model.eval()
    for eps in (0.02, 0.1):
        ball, rng = Ball("linf", eps), Streams(0, range(len(x)), "points", dtype=F64)
        points = [ball.sample(x, rng), crafted(model, x, y, rng, ball, steps=10)]
        for row in range(len(x)):
            bounded = float(loss_of(name, model, x[row : row + 1], y[row : row + 1], eps=eps, kappa=0.0).total.detach())
            assert all(bounded >= float(per_sample_loss(model(p).detach(), y, "ce")[row]) - 1e-12 for p in points)


def test_the_bounds_of_training_are_those_of_the_proofs() -> None:
    model, (x, y) = dense(), data()
    region = Region(x, "linf", torch.full((len(x),), 0.1, dtype=F64))
    graph = graph_of(model, (1, 4, 4))
    by_ibp, by_crown = (p.lower for p in (proof_by_ibp(graph, region, y), crown(graph, region, y, intermediate="ibp")))
    assert (by_crown > by_ibp).any()
    for name, more, lower in (
        ("ibp", {}, by_ibp),
        ("crown-ibp", {"beta": 0.0}, by_ibp),
        ("crown-ibp", {"beta": 1.0}, by_crown),
        ("crown-ibp", {"beta": 0.25}, 0.25 * by_crown.masked_fill(by_crown.isinf(), 0) + 0.75 * by_ibp),
    ):
        loss = loss_of(name, model, x, y, eps=0.1, kappa=0.0, **more)
        torch.testing.assert_close(loss.total, (1 + lower.neg().exp().sum(1)).log().mean(), rtol=1e-9, atol=0)
        assert float(loss.logs["bounded_accuracy"]) == float((lower > 0).all(1).to(F64).mean())


@BOTH
def test_float32_gives_the_same_gradient_and_follows_the_weights(name: str) -> None:
    x, y = data()
    double, single = dense(), dense(dtype=torch.float32)
    single.load_state_dict(double.state_dict())
    given = {"eps": 0.1, "kappa": 0.2, **({"beta": 0.5} if name == "crown-ibp" else {})}
    mine = loss_of(name, single, x.float(), y, **given)
    assert mine.total.dtype == torch.float32
    expected = flat_grad(loss_of(name, double, x, y, **given), double)
    torch.testing.assert_close(flat_grad(mine, single).double(), expected, rtol=1e-3, atol=1e-6)
    method = catalogue.find("trainers", name)
    rng = Streams(0, range(len(x)), name, dtype=F64)
    objective = next(objectives(method.load(), double, x, y, rng, method.bind({**AT_ONCE, **given}), Memory()))
    before = float(objective().total)
    with torch.no_grad():
        next(double.parameters()).mul_(1.5)
    assert float(objective().total) == pytest.approx(float(loss_of(name, double, x, y, **given).total), rel=1e-12)
    assert float(objective().total) != pytest.approx(before, rel=1e-3)


def test_the_live_graph_is_the_network_in_each_mode() -> None:
    model, (x, _) = with_batchnorm(), data()
    for training in (True, False, True):
        model.train(training)
        tracked = int(model[1].num_batches_tracked)
        with batch_statistics(model) as statistics:
            z = model(x)
        assert len(statistics) == (3 if training else 0)
        torch.testing.assert_close(live_graph(model, (1, 4, 4), statistics).logits(x), z)
        assert int(model[1].num_batches_tracked) == tracked + training
    with pytest.raises(ContractBroken, match="BatchNorm2d at 1") as told:
        live_graph(model, (1, 4, 4), {})
    assert told.value.code == "B03"


@BOTH
def test_unknown_layers_are_refused_by_name(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)).double()
    with pytest.raises(ContractBroken, match="GELU") as told:
        loss_of(name, model, *data(), eps=0.1)
    assert told.value.code == "B03"


def test_the_ramp() -> None:
    def at(step: int, warmup: float, ramp: float) -> float:
        return ramped(Memory(step=step, batches=10, epochs=10), warmup, ramp)

    assert [at(step, 0.1, 0.5) for step in (0, 10, 35, 60, 99)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [at(step, 0.3, 0.0) for step in (0, 29, 30)] == [0, 0, 1]
    model, (x, y) = dense(), data()
    half = loss_of("ibp", model, x, y, Memory(step=35, batches=10, epochs=10), warmup=0.1, ramp=0.5, eps=0.2, kappa=0.4)
    assert half.logs["bound_radius"] == pytest.approx(0.1)
    now = loss_of("ibp", model, x, y, eps=0.1, kappa=0.7)
    assert float(half.total) == pytest.approx(float(now.total), rel=1e-12)


@pytest.mark.parametrize(
    "name, bad",
    [
        ("ibp", {"kappa": 1.5}),
        ("ibp", {"warmup": 0.7, "ramp": 0.7}),
        ("ibp", {"warmup": math.nan}),
        ("crown-ibp", {"beta": -0.1}),
        ("noise", {"sigma": -1.0}),
    ],
)
def test_bad_settings_are_refused(name: str, bad: dict[str, float]) -> None:
    method = catalogue.find("trainers", name)
    x, y = data()
    rng = Streams(0, range(len(x)), name, dtype=F64)
    with pytest.raises(UsageError) as told:
        next(objectives(method.load(), dense(), x, y, rng, method.bind(bad)))
    assert told.value.code == "A04"


@BOTH
def test_a_trained_network_is_proven_right(name: str) -> None:
    """The proof, in float64, for networks trained as usual and on bounds: all images against hardly any."""
    proven = {}
    for method in ("standard", name):
        model, x, y = problem()
        model[1] = nn.ReLU()
        model.float()
        function, settings = catalogue.find("trainers", method).load(), catalogue.find("trainers", method).bind({})
        settings |= {"eps": 0.15} if method == name else {}
        optimizer, memory = torch.optim.Adam(model.parameters(), 0.02), Memory(epochs=120)
        for step in range(120):
            memory.step = step
            rng = Streams(0, range(len(x)), method, [step] * len(x))
            for objective in objectives(function, model, x.float(), y, rng, settings, memory):
                fill_gradients(list(model.parameters()), objective)
                optimizer.step()
        region = Region(x, "linf", torch.full((len(x),), 0.12, dtype=F64))
        proof = proof_by_ibp(graph_of(copy.deepcopy(model), (1, 4, 4)), region, y)
        proven[method] = float((proof.lower > 0).all(1).to(F64).mean())
    assert proven[name] >= 0.9
    assert proven["standard"] <= 0.5


def test_first_weights_that_keep_intervals_as_wide_as_they_are() -> None:
    def wide() -> nn.Module:
        layers = [layer for _ in range(4) for layer in (nn.Linear(400, 400), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers)

    x = torch.rand(2, 1, 20, 20, dtype=F64, generator=torch.Generator().manual_seed(0))
    width = {}
    for kind in ("he", "ibp"):
        net = seeded(wide, 0, kind)
        found = intervals(graph_of(net, (1, 20, 20)), Region(x, "linf", torch.full((2,), 0.01, dtype=F64)))
        width[kind] = [float((i.high - i.low).mean()) for i in (found[1], found[-1])]
    assert 0.3 < width["ibp"][1] / width["ibp"][0] < 3
    assert width["he"][1] / width["he"][0] > 100


def test_the_method_asks_for_the_last_epoch_and_users_for_another() -> None:
    alone = resolve([asked("command line", {"method": "ibp"})])
    assert (alone.select, alone.weights) == ("last", "ibp")
    assert resolve([asked("command line", {"method": "ibp", "tiny": True})]).epochs == 2
    assert resolve([asked("command line", {"method": "ibp", "select": "best"})]).select == "best"
    assert resolve([asked("command line", {"method": "standard"})]).select == "best"


def test_noise_is_white_and_leaves_the_box() -> None:
    seen: list[Tensor] = []

    class Seeing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :3]

    x, y = torch.full((4000, 1, 4, 4), 0.9, dtype=F64), torch.arange(4000) % 3
    method, model = catalogue.find("trainers", "noise"), Seeing()
    total = [
        next(objectives(method.load(), model, x, y, rng, method.bind({"sigma": sigma})))().total
        for sigma in (0.5, 0.0)
        for rng in [Streams(0, range(len(x)), "noise", dtype=F64)]
    ]
    drawn = (seen[0] - x).flatten(1)
    covariance = drawn.T @ drawn / len(x)
    assert (covariance - 0.25 * torch.eye(16, dtype=F64)).abs().max() < 0.03
    assert drawn.mean(0).abs().max() < 0.03
    assert float(seen[0].max()) > 2
    assert torch.equal(seen[1], x)
    assert total[0] > total[1]
