"""Randomized adversarial training: oracles O-53, O-54 and O-55, passes, noise and BatchNorm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core.errors import ContractBroken, UsageError
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.methods.rat import derivatives, rat
from robeval.train.methods.trades import trades
from robeval.train.noise import Shifted, gaussian, most_divergent
from robeval.train.passes import counting
from robeval.train.step import Loss, fill_gradients

#: What torch says of its own forward differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

F64, STEPS, EPS = torch.float64, 3, 0.1


class Spy(nn.Module):
    """Remembers every point that it was asked about."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside, self.points = inside, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach())
        z: Tensor = self.inside(x)
        return z


def network(batchnorm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batchnorm else []
    layers = [nn.Conv2d(2, 4, 3, padding=1), *norm, nn.Softplus(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(100, 3)]
    return nn.Sequential(*layers).double().train()


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 2, 5, 5, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)


def streams(n: int = 8) -> Streams:
    return Streams(5, range(n), "t", dtype=F64)


def losses(model: nn.Module, memory: Memory | None = None, **options: Any) -> Loss:
    x, y = batch()
    (objective,) = rat(model, x, y, streams(), memory or Memory(), **{"eps": EPS, "steps": STEPS} | options)
    return objective()


def gradients(model: nn.Module, loss: Loss) -> list[Tensor]:
    return list(torch.autograd.grad(loss.total, list(model.parameters())))


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("options", [{"eta": 0.0, "sigma": 0.0}, {"sigma": 0.0}, {"order": 0, "sigma": 0.3}])
def test_o53_without_noise_it_is_trades(norm: Any, eps: float, options: dict[str, Any]) -> None:
    x, y = batch()
    common: Any = {"norm": norm, "eps": eps, "steps": 5, "step_size": 0.03, "beta": 4.0}
    ours, theirs = Spy(network(batchnorm=True)), Spy(network(batchnorm=True))
    loss = losses(ours, **common | options)
    (objective,) = trades(theirs, x, y, streams(), **common)
    expected = objective()
    assert abs(float((loss.total - expected.total).detach())) < 1e-12
    for a, b in zip(gradients(ours, loss), gradients(theirs, expected), strict=True):
        assert float((a - b).abs().max()) < 1e-12
    for a, b in zip(ours.points, theirs.points, strict=False):  # clean image, each step, x and x'
        assert float((a - b).abs().max()) < 1e-12
    assert float((theirs.points[-1] - x).abs().max()) > 0.02
    if options.get("eta") == 0:
        assert len(ours.points) == len(theirs.points)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


def errors(sigma: float) -> tuple[float, float]:
    """Relative errors of the antithetic derivatives."""
    model, (x, _) = network(), batch()
    u = gaussian(model, sigma, torch.Generator().manual_seed(0))
    exact = derivatives(model, x, model(x), u, "exact")
    close = derivatives(model, x, model(x), u, "antithetic")
    first, second = (float(((a - b).norm() / b.norm()).detach()) for a, b in zip(close, exact, strict=True))
    return first, second


def test_o54_antithetic_against_exact() -> None:
    first, second = errors(0.01)
    assert first <= 5e-3
    assert second <= 3e-3
    assert errors(0.02)[0] / first == pytest.approx(4, rel=0.1)  # the error grows with the square of sigma
    assert errors(0.2)[1] > second > 0


def test_o54_the_loss_and_its_gradient_agree() -> None:
    models = {impl: network() for impl in ("antithetic", "exact")}
    close, exact = (losses(model, impl=impl, sigma=1e-3) for impl, model in models.items())
    assert float(close.total.detach()) == pytest.approx(float(exact.total.detach()), rel=1e-6)
    for a, b in zip(gradients(models["antithetic"], close), gradients(models["exact"], exact), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)
    assert float(exact.logs["first_over_zeroth"]) > 0


@pytest.mark.parametrize("impl", ["antithetic", "exact"])
def test_o55_a_model_that_is_linear_in_its_weights(impl: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3, bias=False)).double()
    x, _ = batch()
    u = gaussian(model, 0.01, torch.Generator().manual_seed(0))
    d1, d2 = derivatives(model, x, model(x), u, impl)
    assert float((d1 - x.flatten(1) @ u["1.weight"].T).abs().max().detach()) < 1e-10
    assert float(d2.abs().max().detach()) < 1e-10


def test_the_paper_loss_term_by_term() -> None:
    """Against the equation, written with plain copies of the network."""
    model, (x, y) = network(), batch()
    model.eval()
    options: Any = {"order": 2, "eta": 0.7, "sigma": 0.05, "beta": 3.0, "samples": 2}
    loss = losses(model, **options)
    generator = Memory().generator()
    draws = [gaussian(model, 0.05, generator) for _ in range(2)]

    def at(u: Any, sign: float) -> nn.Module:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.add_(sign * u[name])
        return other

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return functional.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True)

    step_size = 2.5 * EPS / STEPS
    x_adv = most_divergent(at(draws[0], 1), x, y, streams(), norm="linf", eps=EPS, steps=STEPS, step_size=step_size)
    expected = functional.cross_entropy(model(x), y) + 3.0 * divergence(model(x), model(x_adv))
    for u in draws:
        more, less = at(u, 1), at(u, -1)
        d1, d1_adv = ((more(s) - less(s)) / 2 for s in (x, x_adv))
        d2, d2_adv = (more(s) + less(s) - 2 * model(s) for s in (x, x_adv))
        expected = expected + 0.7 / 2 * divergence(d1, d1_adv) + 0.35 / 2 * divergence(d2, d2_adv)
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)

    direct = losses(model, objective="direct", **options)
    pairs = [(at(u, 1)(x), at(u, 1)(x_adv)) for u in draws]
    expected = functional.cross_entropy(model(x), y) + 1.5 * sum(divergence(a, b) for a, b in pairs)
    assert float(direct.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert float(direct.total.detach()) != pytest.approx(float(loss.total.detach()), rel=1e-3)


def test_orders_and_their_eta() -> None:
    model = network()
    zeroth, first, second = (float(losses(model, order=order, eta=0.5).total.detach()) for order in (0, 1, 2))
    assert first < second
    assert zeroth != first
    assert torch.equal(losses(model, order=1).total, losses(model, order=1, eta=0.3).total)
    assert torch.equal(losses(model, order=2).total, losses(model, order=2, eta=0.2).total)


@pytest.mark.parametrize(
    "options, forward",
    [
        ({"order": 2}, 7),
        ({"order": 1}, 7),
        ({"samples": 3}, 15),
        ({"order": 0}, 3),
        ({"eta": 0.0}, 3),
        ({"impl": "exact"}, 5),
        ({"objective": "direct"}, 4),
        ({"objective": "direct", "samples": 3}, 8),
    ],
)
def test_passes(options: dict[str, Any], forward: int) -> None:
    model = network()
    x, y = batch()
    with counting(model) as passes:
        for objective in rat(model, x, y, streams(), Memory(), steps=10, **options):
            fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (8 * (10 + forward), 8 * (10 + 1))


def test_exact_derivatives_need_fixed_statistics() -> None:
    """PyTorch takes the batch's statistics for constants there: D2 is wrong by a tenth and its gradient by half."""
    with pytest.raises(ContractBroken, match="BatchNorm") as caught:
        losses(network(batchnorm=True), impl="exact")
    assert caught.value.code == "L02"
    close, exact = (losses(network(batchnorm=True).eval(), impl=impl, sigma=1e-3) for impl in ("antithetic", "exact"))
    assert float(close.total.detach()) == pytest.approx(float(exact.total.detach()), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"objective": "direct"}])
def test_noise_passes_leave_weights_and_statistics(options: dict[str, Any]) -> None:
    model = network(batchnorm=True)
    before = [p.detach().clone() for p in model.parameters()]
    losses(model, **options)
    assert int(model.state_dict()["1.num_batches_tracked"]) == (1 if options.get("objective") else 2)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert all(m.training and getattr(m, "track_running_stats", True) for m in model.modules())


def test_noise_belongs_to_the_mini_batch() -> None:
    model = network()
    first, again, next_one = (float(losses(model, Memory(step=step, seed=4)).total.detach()) for step in (0, 0, 1))
    assert first == again != next_one
    u = gaussian(model, 0.01, Memory(seed=4).generator())
    every = torch.cat([t.flatten() for t in u.values()])
    assert set(u) == {name for name, _ in model.named_parameters()}
    assert float(every.std()) == pytest.approx(0.01, rel=0.1)


def test_dropout_is_off_while_derivatives_are_taken() -> None:
    plain, dropping = network(), network(dropout=0.5)
    assert float(losses(plain).total.detach()) == float(losses(dropping).total.detach())
    assert dropping[3].training
    assert float(losses(plain, order=0).total.detach()) != float(losses(dropping, order=0).total.detach())


def test_a_shifted_network_is_differentiated_in_the_weights_themselves() -> None:
    model, (x, _) = network(), batch()
    u = gaussian(model, 0.1, torch.Generator().manual_seed(0), lambda name: "weight" in name)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.sub_(2 * u.get(name, torch.zeros_like(p)))
    shifted = Shifted(model, u, -2.0)
    assert torch.equal(shifted(x), moved(x))
    ours = torch.autograd.grad(shifted(x).square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(moved(x).square().sum(), list(moved.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "options, word", [({"order": 3}, "order"), ({"samples": 0}, "samples"), ({"sigma": -1.0}, "sigma")]
)
def test_bad_settings(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        losses(network(), **options)
