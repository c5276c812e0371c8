"""Structured gradient regularization against closed forms and algorithm 1 by hand: O-35 to O-37, O-42 to O-50."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.correlated import centred, pixel_covariance, second_moment
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.train.covariance import Matrix, covariance_of
from robeval.train.fit import fit
from robeval.train.gradients import inner, input_grad
from robeval.train.memory import Memory
from robeval.train.methods.sgr import sgr
from robeval.train.passes import counting
from robeval.train.perturbations import perturbation
from robeval.train.recipe import Recipe
from robeval.train.step import Loss, Objective, fill_gradients

F64 = torch.float64
SOURCES = ("grad", "sign", "fgsm", "pgd", "deepfool", "data", "lrc", "identity")
GOLDEN_W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]], dtype=F64)
GOLDEN_X = torch.tensor([[[[0.5, -0.5]]]], dtype=F64)


def linear(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=F64)
    layer.weight.data = weight.clone()
    return nn.Sequential(nn.Flatten(), layer)


def softplus_cnn(channels: int = 2) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(100, 3)]
    return nn.Sequential(*layers).double()


def batch(n: int = 6, channels: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, 5, 5, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)


def asked(model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, **settings: Any) -> Objective:
    """The objective of one mini-batch."""
    memory = Memory() if memory is None else memory
    return next(iter(sgr(model, x, y, Streams(0, range(len(x)), "sgr", dtype=x.dtype), memory, **settings)))


def penalty(model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, **settings: Any) -> float:
    return float(asked(model, x, y, memory, **{"weight": 1.0, **settings})().logs["penalty"])


def gn(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(input_grad(model, x, y)[1].flatten(1).square().sum(1).mean() / 2)


def test_o35_the_gradient_of_a_softmax_linear_model() -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 7, generator=g, dtype=F64), torch.rand(5, 1, 1, 7, generator=g, dtype=F64)
    y = torch.arange(5) % 4
    expected = w[y] - linear(w)(x).softmax(1) @ w
    assert torch.allclose(-input_grad(linear(w), x, y)[1].flatten(1), expected, rtol=0, atol=1e-12)


def test_o36_golden_values() -> None:
    model, y = linear(GOLDEN_W), torch.tensor([0])
    p = model(GOLDEN_X).softmax(1)[0]
    assert p.tolist() == pytest.approx([0.6914385, 0.1542808, 0.1542808], abs=1e-7)
    g = -input_grad(model, GOLDEN_X, y)[1].flatten()
    assert g.tolist() == pytest.approx([0.4628423, -0.4628423], abs=1e-7)
    assert penalty(model, GOLDEN_X, y, source="identity", scale=1.0) == pytest.approx(0.2142230, abs=1e-7)
    sigma = torch.tensor([[3.0, 0.5], [0.5, 1.0]], dtype=F64)
    for c, omega in ((2.0, 0.3213345), (0.5, 0.0803336)):  # the mean of the diagonal is 2
        memory = Memory({"moment": sigma})
        assert penalty(model, GOLDEN_X, y, memory, source="data", scale=c) == pytest.approx(omega, abs=1e-7)


@pytest.mark.parametrize("representation", ["full", "covfun"])
def test_o37_independent_pixels_give_c_times_gn(representation: str) -> None:
    model, (x, y) = softplus_cnn(), batch()
    expected = 0.0614 * gn(model, x, y)
    kind: dict[str, Any] = {"source": "identity", "representation": representation, "scale": 0.0614}
    assert penalty(model, x, y, **kind) == pytest.approx(expected, abs=1e-12)
    for a in (0.01, 1.0, 300.0):
        memory = Memory()
        asked(model, x, y, memory, **kind)
        memory.tensors["moment"] = a * memory.tensors["moment"]
        assert penalty(model, x, y, memory, **kind) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("source", ["grad", "sign"])
def test_o42_algorithm_1_by_hand(source: str) -> None:
    """Zero start, sigma = c / Avg, and the square of ten times the perturbations changes nothing."""
    model, memory, beta, c = softplus_cnn(), Memory(), 0.3, 0.05
    sigma_hat = torch.zeros(50, 50, dtype=F64)
    for step in range(4):
        x, y = batch(seed=step)
        loss, g = input_grad(model, x, y)
        xi = 10 * (g if source == "grad" else g.sign())
        sigma_hat = (1 - beta) * sigma_hat + beta * second_moment(xi)
        omega = c / sigma_hat.diagonal().mean() / 2 * inner(g, (g.flatten(1) @ sigma_hat).view_as(g)).mean()
        memory.step = step
        got = asked(
            model, x, y, memory, source=source, representation="full", beta=beta, scale=c, weight=0.7
        )()  # fmt: skip
        assert float(got.logs["penalty"]) == pytest.approx(0.7 * float(omega), rel=1e-12)
        assert float(got.total.detach()) == pytest.approx(float(loss.detach().mean()) + 0.7 * float(omega), rel=1e-12)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)


def test_the_gradient_is_that_of_algorithm_1() -> None:
    """The covariance is a constant: only the form's own gradient is descended."""
    model, (x, y) = softplus_cnn(), batch()
    parameters = list(model.parameters())
    fill_gradients(parameters, asked(model, x, y, source="grad", representation="full", scale=0.05, weight=2.0))
    leaf = x.clone().requires_grad_()
    loss, g = input_grad(model, leaf, y, create_graph=True)
    covariance = second_moment(g.detach())
    scaled = 0.05 / covariance.diagonal().mean() * covariance
    expected = torch.autograd.grad(loss.mean() + inner(g, (g.flatten(1) @ scaled).view_as(g)).mean(), parameters)
    for p, e in zip(parameters, expected, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, e, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("source", SOURCES)
def test_both_representations_agree_where_the_covariance_is_stationary(source: str) -> None:
    """On images of 2 pixels each covariance with equal diagonal depends on the distance alone."""
    g = torch.Generator().manual_seed(0)
    model = linear(torch.randn(3, 2, generator=g, dtype=F64))
    x = torch.rand(8, 1, 1, 2, generator=g, dtype=F64)
    x = torch.cat([x, x.flip(-1)])
    y = torch.arange(16) % 3
    one = Memory()
    short = asked(model, x, y, one, source=source, scale=0.05)()
    moment = one.tensors["moment"][0, 0]
    full = Memory({"moment": torch.tensor([[moment[0], moment[1]], [moment[1], moment[0]]], dtype=F64)})
    whole = penalty(model, x, y, full, source="data", scale=0.05, weight=0.1)
    assert float(short.logs["penalty"]) == pytest.approx(whole, rel=1e-10)


def test_o46_noise_without_decay_length_is_gn() -> None:
    model, (x, y) = softplus_cnn(), batch()
    for representation in ("full", "covfun"):
        kind: dict[str, Any] = {"source": "lrc", "zeta": 0.05, "representation": representation, "scale": 1.0}
        assert penalty(model, x, y, inter=0.0, **kind) == pytest.approx(gn(model, x, y), abs=1e-8)
        assert penalty(model, x, y, inter=0.5, **kind) != pytest.approx(gn(model, x, y), rel=0.01)  # channels mix


def test_o47_the_mean_perturbation_adds_its_slope() -> None:
    model, (x, y) = softplus_cnn(), batch()
    xi = perturbation("fgsm", model, x, Streams(0, range(6), "t", dtype=F64), eps=0.05)
    mu, sigma = xi.mean(0), 0.05 / xi.square().mean()
    w = input_grad(model, x, y)[1]
    assert torch.allclose(inner(w, w + xi.mean(0)) - inner(w, w), inner(w, mu.expand_as(w)), rtol=0, atol=1e-12)
    both = [penalty(model, x, y, source="fgsm", eps=0.05, scale=0.05, psd="none", mean=m) for m in (True, False)]
    assert both[0] - both[1] == pytest.approx(float(sigma.sqrt() * inner(w, mu.expand_as(w)).mean()), abs=1e-12)
    fixed = [penalty(model, x, y, source="identity", scale=0.05, mean=m) for m in (True, False)]
    assert fixed[0] == fixed[1]


def test_o48_the_link_with_noise() -> None:
    """E loss(x + xi) - loss(x) is the trace of the Hessian; the penalty is that only on average over y ~ p."""
    std, n = 0.01, 100_000
    g = torch.Generator().manual_seed(1)
    model, x = linear(torch.randn(3, 6, generator=g, dtype=F64)), torch.rand(1, 1, 1, 6, generator=g, dtype=F64)
    xi = std * torch.randn(n, 1, 1, 6, generator=g, dtype=F64)
    p = model(x).softmax(1)[0].detach()
    weight = next(model.parameters()).detach()
    trace = float((p[:, None] * weight.square()).sum() - (p @ weight).square().sum())
    omega = []
    for label in range(3):
        y = torch.full((1,), label)
        with torch.no_grad():
            at = nn.functional.cross_entropy(model(x), y)
            pairs = [nn.functional.cross_entropy(model(x + s * xi), y.expand(n)) for s in (1, -1)]
        rise = float((pairs[0] + pairs[1]) / 2 - at)
        assert rise == pytest.approx(std**2 / 2 * trace, rel=0.01)
        omega.append(penalty(model, x, y, source="identity", scale=std**2))
    assert sum(float(share) * o for share, o in zip(p, omega, strict=True)) == pytest.approx(std**2 / 2 * trace)
    assert max(abs(o / (std**2 / 2 * trace) - 1) for o in omega) > 0.1  # the dropped term


@pytest.mark.parametrize("representation", ["full", "covfun"])
@pytest.mark.parametrize(
    "source, forward, backward",
    [("grad", 1, 2), ("sign", 1, 2), ("fgsm", 2, 3), ("pgd", 5, 6), ("data", 1, 2), ("lrc", 1, 2), ("identity", 1, 2)],
)
def test_passes_are_those_of_the_table(source: str, forward: int, backward: int, representation: str) -> None:
    model, (x, y) = softplus_cnn(), batch()
    with counting(model) as passes:
        objective = asked(model, x, y, source=source, steps=4, representation=representation)
        fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (6 * forward, 6 * backward)


@pytest.mark.parametrize("source", SOURCES)
def test_one_update_however_often_the_objective_is_evaluated(source: str) -> None:
    """At other weights the covariance is the constant that the first evaluation left."""
    model, (x, y), memory = softplus_cnn(), batch(), Memory()
    objective = asked(model, x, y, memory, source=source, representation="full", scale=0.05, weight=1.0)
    first = float(objective().logs["penalty"])
    kept = {name: t.clone() for name, t in memory.tensors.items()}
    assert float(objective().logs["penalty"]) == first
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    again = float(objective().logs["penalty"])
    g = input_grad(model, x, y)[1]
    scaled = Matrix(0.05 / kept["moment"].diagonal().mean() * kept["moment"])
    assert again == pytest.approx(float(inner(g, scaled.product(g)).mean()) / 2, rel=1e-10)
    assert all(torch.equal(t, kept[name]) for name, t in memory.tensors.items())
    assert int(memory.tensors.get("updates", 1)) == 1


def test_updates_can_be_rarer() -> None:
    model, (x, y), memory = softplus_cnn(), batch(), Memory()
    spent = []
    for step in range(6):
        memory.step = step
        with counting(model) as passes:
            asked(model, x, y, memory, source="fgsm", update_every=3)()
        spent.append(passes.forward // len(x))
    assert spent == [2, 1, 1, 2, 1, 1]
    assert int(memory.tensors["updates"]) == 2


@pytest.mark.parametrize("representation", ["full", "covfun"])
def test_the_data_covariance_needs_no_scaling(representation: str) -> None:
    model, (x, y) = softplus_cnn(), batch()
    all_, labels = batch(40, seed=9)
    train = Images(all_, labels, torch.arange(40), "problem", ["a", "b", "c"])
    memory = Memory(train=train)
    got = penalty(model, x, y, memory, source="data", representation=representation)
    assert float(memory.tensors["scale"]) == pytest.approx(float(centred(all_).diagonal().mean()), rel=1e-12)
    g = input_grad(model, x, y)[1]
    if representation == "full":
        assert got == pytest.approx(float(inner(g, Matrix(centred(all_)).product(g)).mean()) / 2, rel=1e-10)
    covariance = covariance_of(memory.tensors["moment"], (2, 5, 5), "none")
    assert float(covariance.variance) == pytest.approx(float(memory.tensors["scale"]), rel=1e-10)


def test_o44_an_indefinite_covariance_is_told() -> None:
    """A linear model whose gradient is the eigenvector of the negative eigenvalue."""
    whole = (8.0 * pixel_covariance(32, 32, 8.0).log()).round().div(8.0).exp()  # exp(-round(r) / 8)
    worst = torch.linalg.eigh(whole)[1][:, 0]
    model = linear(torch.stack([worst, -worst]))
    x, y = torch.full((2, 1, 32, 32), 0.5, dtype=F64), torch.tensor([0, 1])
    kind: dict[str, Any] = {"source": "lrc", "inter": 0.0, "scale": 1.0, "weight": 1.0}
    length = 2 * gn(model, x, y)
    broken, mended = (asked(model, x, y, **kind, psd=psd)().logs for psd in ("none", "auto"))
    assert broken["indefinite"] == 1
    assert float(broken["penalty"]) == pytest.approx(-0.733 / 2 * length, rel=2e-3)
    assert mended["indefinite"] == 0 <= float(mended["penalty"])
    assert float(broken["lowest_eigenvalue"]) <= -0.733
    assert asked(model, x, y, **kind, psd="spectral")().logs["indefinite"] == 0


def test_perturbations_leave_the_predicted_class() -> None:
    model, (x, _) = linear(torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=F64)), batch()
    model.train()
    own = model(x).argmax(1)
    g = input_grad(model, x, own)[1]
    rng = Streams(0, range(6), "t", dtype=F64)
    assert torch.allclose(perturbation("fgsm", model, x, rng, eps=0.1), (x + 0.1 * g.sign()).clamp(0, 1) - x, atol=1e-9)
    xi = perturbation("pgd", model, x, rng, eps=0.1, steps=3)
    assert 0.05 < float(xi.abs().max()) <= 0.06 + 1e-9  # three steps of eps / 5
    assert (input_grad(model, x + xi, own)[0] > input_grad(model, x, own)[0]).all()
    assert (model(x + perturbation("deepfool", model, x, rng)).argmax(1) != own).all()
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_o50_deepfool_on_a_line() -> None:
    """f(x) = 0.6 a - 0.8 b + 0.1 at (0.5, 0.5), where it is 0: moved to (0.5, 0.75), where it is -0.2."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, dtype=F64))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0], [0.6, -0.8]]))
        model[1].bias.copy_(torch.tensor([0.0, 0.1]))
    x = torch.tensor([[[[0.5, 0.75]]]], dtype=F64)
    xi = perturbation("deepfool", model, x, Streams(0, [0], "t", dtype=F64)).flatten() / 1.02
    assert float(xi.norm()) == pytest.approx(0.2, abs=2e-6)
    assert torch.allclose(xi, 0.2 * torch.tensor([0.6, -0.8], dtype=F64), atol=2e-6)


def test_batchnorm_is_frozen_in_the_penalty() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, dtype=F64), *softplus_cnn())
    x, y = batch()
    model.train()
    objective = asked(model, x, y, source="grad", scale=0.05, weight=1.0)
    with counting(model) as passes:
        got: Loss = objective()
    assert passes.forward == 2 * len(x)
    with torch.no_grad():
        clean = float(nn.functional.cross_entropy(model(x), y))
    assert float(got.total.detach() - got.logs["penalty"]) == pytest.approx(clean, rel=1e-12)
    model.eval()
    halves = [penalty(model, x[i : i + 3], y[i : i + 3], source="identity", scale=1.0) for i in (0, 3)]
    model.train()
    assert penalty(model, x, y, source="identity", scale=1.0) == pytest.approx(sum(halves) / 2, rel=0.5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("source", ["sign", "data"])
def test_a_killed_training_goes_on_with_its_covariance(source: str, tmp_path: Path) -> None:
    x, y = batch(24, seed=4)
    train = Images(x.float(), y, torch.arange(24), "problem", ["a", "b", "c"])
    method = catalogue.parse("trainers", f"sgr:source={source}")
    recipe = Recipe(epochs=2, batch_size=8, lr=0.01, awp=0.01)  # evaluates each objective twice

    def train_in(folder: str, until: int = 99) -> tuple[dict[str, Any], nn.Module]:
        def progress(step: int, *_: object) -> None:
            if step == until:
                raise Killed

        model = softplus_cnn().float()
        result = fit(
            model, train, method=method, folder=tmp_path / folder, recipe=recipe, save_steps=1, on_progress=progress
        )
        return result.rows[-1], model

    row, model = train_in("a")
    with pytest.raises(Killed):
        train_in("b", until=2)
    again = train_in("b")[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert row["indefinite"] == 0 < row["penalty"]
    assert row["lowest_eigenvalue"] < float(x.var())
    assert (row["forward_per_step"], row["backward_per_step"]) == (2, 4)
    kept = torch.load(tmp_path / "b" / "state.pt", weights_only=True)["memory"]
    assert kept["moment"].shape == (2, 2, 7)
    assert int(kept.get("updates", 6)) == 6
    assert float(kept["scale"]) == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-5)


def test_a_memory_that_was_saved_goes_on_the_same() -> None:
    model, memory = softplus_cnn(), Memory()
    for step in range(3):
        memory.step = step
        asked(model, *batch(seed=step), memory, source="sign")()
    file = io.BytesIO()
    torch.save(memory.tensors, file)
    file.seek(0)
    loaded = Memory(torch.load(file, weights_only=True), step=3)
    memory.step = 3
    assert penalty(model, *batch(seed=3), memory, source="sign") == penalty(
        model, *batch(seed=3), loaded, source="sign"
    )
    assert int(loaded.tensors["updates"]) == 4


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"beta": 1.5}, {"scale": 0.0}, {"update_every": 0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="sgr needs"):
        asked(softplus_cnn(), *batch(), **bad)


def test_the_papers_strengths_have_names() -> None:
    assert catalogue.parse("trainers", "sgr-transfer-sign").settings["weight"] == 0.2
    assert catalogue.parse("trainers", "sgr-mnist-pgd").settings["eps"] == 32 / 255
    assert catalogue.parse("trainers", "sgr-lrc").settings["source"] == "lrc"
