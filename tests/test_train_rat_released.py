"""What the authors of RAT released: oracles O-56, O-57 and O-58, and the loss against its formula."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core.errors import ContractBroken, UsageError
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.methods.rat_released import convolutions, rat_released, row_sums, soft_labels, towards
from robeval.train.methods.trades import trades
from robeval.train.noise import Shifted, gaussian, most_divergent
from robeval.train.passes import counting
from robeval.train.step import Loss, fill_gradients

F64, STEPS, EPS = torch.float64, 3, 0.1


def network(classes: int = 4, batchnorm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batchnorm else []
    layers: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(100, 20)]
    return nn.Sequential(*layers, nn.Softplus(), nn.Linear(20, classes)).double().train()


def batch(classes: int = 4, n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 2, 5, 5, generator=g, dtype=F64), torch.randint(classes, (n,), generator=g)


def streams(n: int = 8) -> Streams:
    return Streams(5, range(n), "t", dtype=F64)


def loss_of(model: nn.Module, classes: int = 4, **options: Any) -> Loss:
    x, y = batch(classes)
    (objective,) = rat_released(model, x, y, streams(), Memory(), **{"eps": EPS, "steps": STEPS} | options)
    return objective()


def test_o56_targets() -> None:
    t = torch.tensor([3.0, 1, 0, 2], dtype=F64)
    labels = soft_labels(t, 0.8)
    expected = torch.tensor([0.2, 0.2667, 0, 0.5333], dtype=F64)
    assert torch.allclose(labels[0], expected, atol=1e-4)
    assert torch.allclose(soft_labels(5 * t - 7, 0.8), labels, atol=1e-12)  # only differences and proportions count
    g = torch.Generator().manual_seed(0)
    for cc in (0.0, 0.5, 0.98, 1.0):
        labels = soft_labels(torch.randn(10, generator=g, dtype=F64), cc)
        assert torch.allclose(labels.sum(1), torch.ones(10, dtype=F64), atol=1e-12)
        assert torch.allclose(labels.diagonal(), torch.full((10,), 1 - cc, dtype=F64), atol=1e-12)
        assert (labels >= 0).all()


def test_o56_nothing_to_share_by() -> None:
    for t in (torch.ones(4), torch.tensor([0.0, 5, 0, 0])):
        labels = soft_labels(t.double(), 0.6)
        assert torch.allclose(labels[1], torch.tensor([0.2, 0.4, 0.2, 0.2], dtype=F64), atol=1e-12)
        assert labels.isfinite().all()


def test_o57_row_sums() -> None:
    model, (x, y) = network(), batch()
    head = model[-1]
    assert isinstance(head, nn.Linear)
    z, sums = row_sums(model, x, y)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), y), head.weight)
    assert float((sums - gradient.sum(1)).abs().max()) < 1e-12
    assert float(sums.abs().max()) > 1e-3
    assert z.requires_grad
    assert not sums.requires_grad


def test_o58_divergence_from_a_soft_label() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, generator=g, dtype=F64, requires_grad=True)
    label = torch.rand(5, 4, generator=g, dtype=F64)
    label[:, 2] = 0  # soft labels hold zeros
    label = label / label.sum(1, keepdim=True)
    loss = towards(label, z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert float((gradient - (z.softmax(1) - label) / 5).abs().max().detach()) < 1e-12
    plain = functional.kl_div(z.log_softmax(1), label, reduction="batchmean")
    assert float((loss - plain).detach()) == pytest.approx(0, abs=1e-12)
    assert abs(float(towards(z.detach().softmax(1), z).detach())) < 1e-12


@pytest.mark.parametrize("script, second", [("wrn", 0.25), ("preactresnet18", 0.2)])
@pytest.mark.parametrize("fix_bug", [False, True])
@pytest.mark.parametrize("classes, cc", [(10, 0.8), (100, 0.98)])
def test_the_loss_against_its_formula(script: Any, second: float, fix_bug: bool, classes: int, cc: float) -> None:
    model, alpha, (x, y) = network(classes), 0.3, batch(classes)
    head = model[-1].weight
    u = gaussian(model, 0.01, Memory().generator(), {"0.weight", "0.bias"}.__contains__)
    step_size = 2.5 * EPS / STEPS
    x_adv = most_divergent(Shifted(model, u), x, y, streams(), norm="linf", eps=EPS, steps=STEPS, step_size=step_size)
    z, z_adv = model(x), model(x_adv)
    a, b = (
        torch.autograd.grad(functional.cross_entropy(out, y), head, retain_graph=True)[0].sum(1) for out in (z, z_adv)
    )

    def kl_from(t: Tensor, out: Tensor) -> Tensor:
        t = (t - t.min()) / (t - t.min()).sum()
        rows = t.repeat(classes, 1).fill_diagonal_(0)
        rows = (cc * rows / rows.sum(1, keepdim=True)).fill_diagonal_(1 - cc)
        return functional.kl_div(out.log_softmax(1), rows[y], reduction="batchmean")

    squares = a**2 - b**2
    expected = (
        (1 - alpha) * functional.cross_entropy(z, y)
        + alpha / 2 * (kl_from(a.abs() - b.abs(), z_adv) + kl_from(b.abs() - a.abs(), z))
        + alpha * second * (kl_from(squares if fix_bug else -squares, z_adv) + kl_from(-squares, z))
        + 6 * functional.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")
    )
    loss = loss_of(model, classes, alpha=alpha, sigma=0.01, script=script, fix_bug=fix_bug)
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    ours = torch.autograd.grad(loss.total, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_without_soft_labels_and_noise_it_is_trades(norm: Any, eps: float) -> None:
    x, y = batch()
    common: Any = {"norm": norm, "eps": eps, "step_size": 0.05, "beta": 4.0, "steps": STEPS}
    loss = loss_of(network(batchnorm=True), alpha=0.0, sigma=0.0, **common)
    (objective,) = trades(network(batchnorm=True), x, y, streams(), **common)
    assert abs(float((loss.total - objective().total).detach())) < 1e-12


def test_noise_is_on_convolutions_only_and_goes_away() -> None:
    model = network(batchnorm=True)
    assert convolutions(model) == {"0.weight", "0.bias"}
    named = nn.Sequential(OrderedDict(conv1=nn.Conv2d(2, 2, 3), shortcut=nn.Conv2d(2, 2, 1), fc=nn.Flatten()))
    assert convolutions(named) == {"conv1.weight", "conv1.bias"}  # by name, where names say it
    before = [p.detach().clone() for p in model.parameters()]
    still, noisy = (float(loss_of(model, sigma=sigma).total.detach()) for sigma in (0.0, 0.5))
    assert still != noisy
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_statistics_move_once_for_each_of_both_batches() -> None:
    model = network(batchnorm=True)
    loss_of(model)
    assert int(model.state_dict()["1.num_batches_tracked"]) == 2


def test_passes() -> None:
    model, (x, y) = network(), batch()
    with counting(model) as passes:
        for objective in rat_released(model, x, y, streams(), Memory(), steps=10):
            fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (8 * (10 + 3), 8 * (10 + 1))


class Wrapped(nn.Module):
    """Asks its head first, and a linear layer of another use last."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.head = nn.Linear(50, 4), nn.Linear(50, 4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(x.flatten(1))
        self.other(x.flatten(1))
        return z


def test_the_layer_that_makes_the_logits_is_found() -> None:
    model, (x, y) = Wrapped().double(), batch()
    _, sums = row_sums(model, x, y)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), y), model.head.weight)
    assert torch.allclose(sums, gradient.sum(1), atol=1e-12)
    assert not model.head._forward_hooks


@pytest.mark.parametrize("last", [nn.ReLU(), nn.BatchNorm1d(4), nn.Hardtanh(-0.01, 0.01)])
def test_logits_that_no_linear_layer_made_are_refused(last: nn.Module) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 4), last).double()
    with pytest.raises(ContractBroken, match=r"nn\.Linear") as caught:
        loss_of(model)
    assert caught.value.code == "L02"


@pytest.mark.parametrize("options, word", [({"alpha": 1.5}, "alpha"), ({"cc": -0.1}, "cc"), ({"sigma": -1.0}, "sigma")])
def test_bad_settings(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        loss_of(network(), **options)
