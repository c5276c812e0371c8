"""Max-margin training: oracles O-60 and O-61, its memory, its hinge and its mixture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from robeval.core.ball import vector_norm
from robeval.core.errors import UsageError
from robeval.train.memory import Memory
from robeval.train.methods.mma import RowBalls, bisect, mma
from tests.test_train_adv import F64, Spy, batch, cnn, logistic, streams

W = torch.tensor([0.7, -1.3, 0.4, 2.0], dtype=F64)


@pytest.mark.parametrize("start, bound", [(0.5, 2.0**-11), (0.05, 2.0**-10), (0.93, 2.0**-10)])
def test_o60_bisection_finds_a_known_boundary(start: float, bound: float) -> None:
    boundary, most = torch.linspace(0.0002, 0.0998, 997, dtype=F64), 0.1
    found = bisect(lambda e: e >= boundary, torch.full_like(boundary, start * most), most)
    error = float((found - boundary).abs().max())
    assert error <= most * bound * (1 + 1e-9)
    assert error > most * bound / 4
    never = bisect(lambda e: torch.zeros_like(e, dtype=torch.bool), torch.full((1,), 0.05, dtype=F64), most)
    assert float(never) == pytest.approx(most, abs=most * 2.0**-10)


def line(margins: list[float]) -> tuple[Tensor, Tensor]:
    """Images of class 1 whose score <w, x> is given."""
    score = torch.tensor(margins, dtype=F64)[:, None]
    x = 0.5 + (score - 0.5 * W.sum()) * W / W.square().sum()
    return x.reshape(-1, 1, 2, 2), torch.ones(len(margins), dtype=torch.int64)


@pytest.mark.parametrize("norm, length", [("linf", float(W.abs().sum())), ("l2", float(W.norm()))])
def test_o61_learned_margins_are_distances_to_a_linear_boundary(norm: Any, length: float) -> None:
    x, y = line([0.1, 0.3, 0.5, -0.2])
    memory, model = Memory(ids=torch.tensor([5, 0, 3, 1])), logistic(W)
    for _ in range(3):
        next(mma(model, x, y, streams(4), memory, norm=norm, d_max=0.3, eps_min=0.02, steps=20))
    found = memory.tensors["margins"]
    assert len(found) == 6
    exact = torch.tensor([0.1, 0.3, 0.5], dtype=F64) / length
    error, rounding = found[[5, 0, 3]] - exact, 1.05 * 0.3 * 2.0**-10
    assert (error >= -rounding).all()
    # In l2 what the random start put across the gradient shrinks only as far as the steps reach; linf has corners.
    assert (error <= rounding + (0.04 * exact if norm == "l2" else 0)).all()
    assert float(found[1]) == 0  # not recognised
    assert found[[2, 4]].tolist() == [0.02, 0.02]  # never seen


def test_o61_images_beyond_d_max_add_nothing_but_count_in_the_mean() -> None:
    x, y = line([0.1, 0.3, 0.9, -0.2])
    memory, model = Memory(ids=torch.arange(4)), Spy(logistic(W))
    for _ in range(2):
        model.points.clear()
        (objective,) = mma(model, x, y, streams(4), memory, d_max=0.1, eps_min=0.02, clean=0.0)
    loss = objective()
    boundary = model.points[-1]
    each = functional.cross_entropy(model.inside(boundary), y, reduction="none")
    assert (memory.tensors["margins"] < 0.1).tolist() == [True, True, False, True]
    assert abs(float((loss.total - each[[0, 1, 3]].sum() / 4).detach())) < 1e-12
    assert each[:2].tolist() == pytest.approx([math.log(2)] * 2, abs=2e-3)  # on the boundary
    assert torch.equal(boundary[3], x[3])
    assert float(loss.logs["margin"]) == float(memory.tensors["margins"].mean())
    assert float(loss.logs["train_accuracy"]) == 0.75


@pytest.mark.parametrize("clean", [1 / 3, 0.8])
def test_the_gradient_is_a_mixture_of_two(clean: float) -> None:
    model, memory, (x, _) = Spy(cnn()), Memory(ids=torch.arange(8)), batch()
    with torch.no_grad():
        list(model.parameters())[2].mul_(10)  # the last layer, so that some images are recognised clearly
    y = model.inside(x).argmax(1)
    (objective,) = mma(model, x, y, streams(), memory, d_max=0.04, steps=4, clean=clean)
    parameters = list(model.parameters())
    got = torch.autograd.grad(objective().total, parameters)
    at, again = model.points[-2:]
    assert torch.equal(again, x)
    counts = memory.tensors["margins"] < 0.04
    assert counts.tolist() == [True, False, True, True, True, False, True, True]
    assert (at != x).flatten(1).any(1).tolist() == [True, True, True, False, False, True, True, False]
    each = functional.cross_entropy(model.inside(at), y, reduction="none") * counts
    plain = torch.autograd.grad(functional.cross_entropy(model.inside(x), y), parameters)
    margin = torch.autograd.grad(each.mean(), parameters)
    for g, a, b in zip(got, plain, margin, strict=True):
        assert torch.allclose(g, clean * a + (1 - clean) * b, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_o65_every_row_has_its_own_ball(norm: str) -> None:
    x, _ = batch()
    eps = torch.linspace(0.02, 0.4, 8, dtype=F64)
    balls = RowBalls(norm, eps.reshape(-1, 1, 1, 1), x)
    far = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    for point in (balls.sample(x, streams()), balls.project(x, far)):
        length = vector_norm(point - x, norm)
        assert (length <= eps * (1 + 1e-6)).all()
        assert float(point.min()) >= 0
        assert float(point.max()) <= 1
    if norm == "linf":
        whole = x + (far - x).clamp(-eps.reshape(-1, 1, 1, 1), eps.reshape(-1, 1, 1, 1))
        assert torch.allclose(balls.project(x, far), whole.clamp(0, 1), atol=1e-12)
    else:
        assert torch.allclose(vector_norm(balls.project(x, far) - x, "l2")[2:4], eps[2:4], rtol=0.2)
    near = x + (far - x) * 1e-3
    assert torch.allclose(balls.project(x, near), near.clamp(0, 1), atol=1e-12)


def test_the_radius_of_the_attack_is_the_margin_of_the_last_time() -> None:
    x, y = line([0.1, 0.3, 0.5])
    memory, model = Memory(ids=torch.arange(3)), Spy(logistic(W))
    next(mma(model, x, y, streams(3), memory, d_max=0.3, eps_min=0.02, steps=3))
    first = (model.points[2] - x).flatten(1).abs().amax(1)
    learnt = memory.tensors["margins"].clone()
    model.points.clear()
    next(mma(model, x, y, streams(3), memory, d_max=0.3, eps_min=0.02, steps=3))
    second = (model.points[2] - x).flatten(1).abs().amax(1)
    assert (first <= 0.02 * (1 + 1e-9)).all()
    assert torch.allclose(second, learnt.clamp_min(0.02), rtol=1e-9)


@pytest.mark.parametrize(
    "given, text", [({"eps_min": 0.2, "d_max": 0.1}, "eps_min of mma"), ({"clean": 1.2}, "clean of mma")]
)
def test_settings_that_make_no_sense(given: Any, text: str) -> None:
    x, y = batch()
    with pytest.raises(UsageError, match=text) as error:
        next(mma(cnn(), x, y, streams(), Memory(ids=torch.arange(8)), **given))
    assert error.value.code == "A04"
