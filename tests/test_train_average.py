"""Averages of weights: oracle O-67, and BatchNorm's statistics for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robeval.core.images import Images
from robeval.train.average import Average, recompute_statistics

F64, RHO = torch.float64, 0.9


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def moved(model: nn.Module, g: torch.Generator) -> dict[str, Tensor]:
    """Random new weights and buffers. -> a copy of the state."""
    for t in [*model.parameters(), *model.buffers()]:
        fresh = torch.rand(t.shape, generator=g, dtype=F64) * 9 + 1
        t.data = fresh.to(t.dtype)
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def images(n: int = 40) -> Images:
    g = torch.Generator().manual_seed(4)
    y = torch.arange(n) * 2 // n  # sorted by class, and the classes differ in brightness
    x = (torch.rand(n, 1, 4, 4, generator=g, dtype=F64) + y[:, None, None, None]) / 2
    return Images(x, y, torch.arange(n), "test/train", ["dark", "bright"])


def test_o67_swa_is_the_arithmetic_mean() -> None:
    model, g, average = network(), torch.Generator().manual_seed(0), Average()
    states = []
    for _ in range(7):
        states.append(moved(model, g))
        average.update(model)
    for name, p in average.network(model).named_parameters():
        mean = torch.stack([s[name] for s in states]).mean(0)
        assert float((p.detach() - mean).abs().max()) < 1e-12, name
    assert average.count == 7


def test_o67_ema_closed_form() -> None:
    model, g, average = network(), torch.Generator().manual_seed(0), Average(RHO)
    states = []
    for _ in range(7):
        states.append(moved(model, g))
        average.update(model)
    t = len(states) - 1
    for name, p in average.network(model).named_parameters():
        closed = RHO**t * states[0][name] + (1 - RHO) * sum(RHO ** (t - s) * states[s][name] for s in range(1, t + 1))
        assert float((p.detach() - closed).abs().max()) < 1e-12, name


@pytest.mark.parametrize("decay", [None, RHO])
def test_buffers_are_those_of_the_last_update(decay: float | None) -> None:
    model, g, average = network(), torch.Generator().manual_seed(0), Average(decay)
    for _ in range(3):
        last = moved(model, g)
        average.update(model)
    moved(model, g)
    for name, b in average.network(model).named_buffers():
        assert torch.equal(b, last[name]), name
        assert b.dtype == last[name].dtype


@pytest.mark.parametrize("decay", [None, RHO])
def test_tensors_and_count_are_the_whole_state(decay: float | None) -> None:
    model, g, average = network(), torch.Generator().manual_seed(0), Average(decay)
    for _ in range(3):
        moved(model, g)
        average.update(model)
    resumed = Average(decay, {name: t.clone() for name, t in average.tensors.items()}, average.count)
    moved(model, g)
    average.update(model)
    resumed.update(model)
    assert all(torch.equal(t, resumed.tensors[name]) for name, t in average.tensors.items())


def test_the_network_itself_is_left_alone() -> None:
    model, g, average = network().train(), torch.Generator().manual_seed(0), Average()
    moved(model, g)
    average.update(model)
    before = moved(model, g)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    averaged = average.network(model, images(), 10)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in averaged.parameters())
    kept = {name: t.clone() for name, t in average.tensors.items()}
    averaged(images().x)  # in train mode
    assert all(torch.equal(t, kept[name]) for name, t in average.tensors.items())


def test_a_shared_weight_is_averaged_under_each_of_its_names() -> None:
    first = nn.Linear(3, 3).double()
    second = nn.Linear(3, 3).double()
    second.weight = first.weight
    model, g, average = nn.Sequential(first, second), torch.Generator().manual_seed(0), Average()
    states = []
    for _ in range(2):
        states.append(moved(model, g))
        average.update(model)
    averaged = average.network(model)
    assert averaged[0].weight is averaged[1].weight  # type: ignore[index]
    assert torch.allclose(averaged[0].weight, (states[0]["0.weight"] + states[1]["0.weight"]) / 2)  # type: ignore[index]


def test_statistics_are_those_of_the_clean_images() -> None:
    """One batch of everything: the layer's own mean and variance, without dropout, whatever they were before."""
    model, g = nn.Sequential(nn.Dropout(0.5), *network()[:2]).double().train(), torch.Generator().manual_seed(0)
    moved(model, g)
    data = images()
    recompute_statistics(model, data, batch_size=len(data))
    z = model[1](data.x).detach().transpose(0, 1).flatten(1)
    assert torch.allclose(model[2].running_mean, z.mean(1), atol=1e-12)
    assert torch.allclose(model[2].running_var, z.var(1), atol=1e-12)
    assert model[2].momentum == 0.1
    assert all(m.training for m in model.modules())


def test_statistics_from_small_batches() -> None:
    """Equal weight for each whole batch, in an order that mixes the classes; the same every time."""
    data = images()
    whole, parts, again = network(), network(), network()
    recompute_statistics(whole, data, batch_size=len(data))
    for model in (parts, again):
        recompute_statistics(model, data, batch_size=9)
    assert int(parts[1].num_batches_tracked) == 4  # 40 images are 4 whole batches of 9
    assert torch.allclose(parts[1].running_var, whole[1].running_var, rtol=0.25)
    assert torch.equal(parts[1].running_var, again[1].running_var)
    small = network()
    recompute_statistics(small, data, batch_size=1000)  # fewer images than a batch
    assert int(small[1].num_batches_tracked) == 1


def test_without_batchnorm_no_pass_is_spent() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()

    def refuse(*_: object) -> None:
        raise AssertionError("a forward pass")

    model.register_forward_hook(refuse)
    recompute_statistics(model, images())
