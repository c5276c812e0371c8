"""Parts of a recipe: schedules, augmentation, starting weights, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robeval.core.errors import UsageError
from robeval.core.streams import Streams
from robeval.train.augment import read
from robeval.train.initial import data_normalisation, seeded
from robeval.train.recipe import Recipe
from robeval.train.schedules import schedule


def test_schedules() -> None:
    steps = schedule("milestones:2/4x0.5", 60, 10)
    assert [steps(s) for s in (0, 19, 20, 39, 40, 59)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert schedule("milestones:1", 20, 10)(10) == pytest.approx(0.1)
    cosine, cyclic = schedule("cosine", 100, 10), schedule("cyclic", 99, 10)
    assert cosine(0) == 1
    assert cosine(50) == pytest.approx(0.5)
    assert 0 < cosine(99) < 0.001
    assert cyclic(49) == 1
    assert cyclic(0) == pytest.approx(cyclic(98)) == pytest.approx(0.02)
    for bad in ("cosin", "milestones:", "milestones:a"):
        with pytest.raises(UsageError):
            schedule(bad, 1, 1)


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"optimizer": "sdg"},
     {"augment": "flip"}, {"select": "first"}, {"norm": "l3"}, {"eps": -0.1}],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Recipe(**bad)


def test_augmentation_belongs_to_the_image() -> None:
    x = torch.rand(40, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    draw = lambda rows: read("crop-flip")(x[rows], Streams(0, rows, "augment"))
    everyone = draw(list(range(40)))
    assert torch.equal(draw([7, 3]), everyone[[7, 3]])
    assert everyone.shape == x.shape
    assert torch.equal(read("none")(x, Streams(0, range(40), "a")), x)
    crops = read("crop")(x, Streams(0, range(40), "augment"))
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    for i in range(40):
        assert any(torch.equal(crops[i], padded[i, :, r : r + 8, c : c + 8]) for r in range(3) for c in range(3))
    flipped = [i for i in range(40) if not torch.equal(everyone[i], crops[i])]
    assert 8 < len(flipped) < 32
    assert all(torch.equal(everyone[i], crops[i].flip(-1)) for i in flipped)


def test_starting_weights_and_normalisation() -> None:
    state = torch.random.get_rng_state()
    a, b = (seeded(lambda: nn.Linear(400, 300), s) for s in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(a.weight, b.weight)
    assert torch.equal(a.weight, seeded(lambda: nn.Linear(400, 300), 0).weight)
    assert float(a.weight.detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert float(seeded(lambda: nn.Linear(400, 300), 0, "torch").weight.detach().abs().max()) <= 1 / 20
    with pytest.raises(UsageError):
        seeded(lambda: nn.Linear(2, 2), 0, "hee")
    x = torch.rand(50, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = data_normalisation(x)
    assert found["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert found["std"] == pytest.approx(x.std((0, 2, 3)).tolist(), abs=1e-4)
