"""Adversarial weight perturbation: oracle O-59."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core.errors import ContractBroken
from robeval.core.streams import Streams
from robeval.train.awp import perturbed_weights
from robeval.train.methods.adv import adv
from robeval.train.passes import counting
from robeval.train.step import Loss, Objective, fill_gradients

F64, GAMMA = torch.float64, 0.01


def network(batchnorm: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batchnorm else []
    layers = [nn.Conv2d(2, 4, 3, padding=1), *norm, nn.Softplus(), nn.Flatten(), nn.Linear(100, 3)]
    return nn.Sequential(*layers).double().train()


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 2, 5, 5, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)


def loss_on(model: nn.Module) -> Objective:
    x, y = batch()
    return lambda: Loss(functional.cross_entropy(model(x), y))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def test_o59_relative_length_and_what_stays() -> None:
    model = network()
    before = copied(model)
    with perturbed_weights(model, loss_on(model), GAMMA):
        for name, w in copied(model).items():
            away = (w - before[name]).double().norm()
            moves = name in ("0.weight", "4.weight")
            expected = GAMMA * before[name].norm() if moves else torch.zeros((), dtype=F64)
            assert abs(float(away - expected)) < 1e-12, name
    assert {p.dim() for p in model.parameters()} == {1, 2, 4}  # biases and BatchNorm were among those that stayed


def test_o59_the_loss_rises_along_the_gradient() -> None:
    model = network(batchnorm=False)
    objective = loss_on(model)
    grads = torch.autograd.grad(objective().total, list(model.parameters()))
    before = copied(model)
    at_w = float(objective().total.detach())
    for gamma in (1e-4, 1e-3, 1e-2):
        with perturbed_weights(model, objective, gamma) as same:
            assert same is objective
            first_order = sum(
                float(gamma * before[name].norm() * g.norm())
                for (name, _), g in zip(model.named_parameters(), grads, strict=True)
                if g.dim() >= 2
            )
            rise = float(objective().total.detach()) - at_w
        assert rise > 0
        assert rise == pytest.approx(first_order, rel=50 * gamma)


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_o59_the_weights_come_back_and_keep_the_step(lr: float) -> None:
    """With lr 0 the weights return; otherwise they have moved by the gradient taken at w + v."""
    model = network(batchnorm=False)
    objective, parameters = loss_on(model), list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    at_w = torch.autograd.grad(objective().total, parameters)
    optimizer = torch.optim.SGD(parameters, lr=lr)
    with perturbed_weights(model, objective, GAMMA) as descended:
        fill_gradients(parameters, descended)
        optimizer.step()
    for p, was in zip(parameters, before, strict=True):
        assert p.grad is not None
        assert float((p.detach() - (was - lr * p.grad)).abs().max()) < 1e-12
    assert any(not torch.allclose(p.grad, g, rtol=1e-6) for p, g in zip(parameters, at_w, strict=True))  # type: ignore[arg-type]


def test_statistics_move_once_and_gradients_stay() -> None:
    model, once = network(), network()
    loss_on(once)()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = copied(model)
    with perturbed_weights(model, loss_on(model), GAMMA) as objective:
        for name, b in model.named_buffers():
            assert torch.equal(b, before[name]), name
        assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())  # type: ignore[arg-type]
        objective()
    assert int(model.state_dict()["1.num_batches_tracked"]) == int(once.state_dict()["1.num_batches_tracked"]) == 1


def test_the_part_that_is_clipped_alone_counts_clipped() -> None:
    model = network(batchnorm=False)
    x, y = batch()
    wild = 1e6 * torch.ones(3, dtype=F64)

    def objective() -> Loss:
        z = model(x)
        return Loss(functional.cross_entropy(z, y), apart=(z * wild).mean(), apart_limit=1e-9)

    before = copied(model)
    with perturbed_weights(model, loss_on(model), GAMMA):
        alone = copied(model)
    with perturbed_weights(model, objective, GAMMA):
        both = copied(model)
    for name in ("0.weight", "3.weight"):
        assert torch.allclose(alone[name], both[name], atol=1e-8)
        assert not torch.allclose(alone[name], before[name], atol=1e-8)


def test_a_loss_that_is_not_a_number_leaves_the_weights() -> None:
    model = network()
    before = copied(model)

    def objective() -> Loss:
        return Loss(model(batch()[0]).sum() * torch.nan)

    with (
        pytest.raises(ContractBroken, match="NaN"),
        perturbed_weights(model, objective, GAMMA, where="epoch 1, step 1"),
    ):
        pytest.fail("the step must not be taken")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    finite = loss_on(model)
    with pytest.raises(ZeroDivisionError), perturbed_weights(model, finite, GAMMA):
        raise ZeroDivisionError
    assert all(torch.allclose(t, before[name], atol=1e-15) for name, t in model.state_dict().items())


def test_passes_of_adv_with_awp() -> None:
    model, (x, y) = network(), batch()
    rng = Streams(5, range(8), "t", dtype=F64)
    with counting(model) as passes:
        for objective in adv(model, x, y, rng, steps=4):
            with perturbed_weights(model, objective, GAMMA) as descended:
                fill_gradients(list(model.parameters()), descended)
    assert (passes.forward, passes.backward) == (8 * (4 + 2), 8 * (4 + 2))
