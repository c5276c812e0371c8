"""The laws that every bound in the folder obeys. A new file is tested by existing."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from robeval.bounds.expansion import Reading
from robeval.core import catalogue
from robeval.core.ball import NORMS
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.core.smooth import SmoothReLU
from robeval.core.streams import Streams
from tests.problems import exact_distance, images, linear

#: Proofs have their own laws.
BOUNDS = {name: m for name, m in catalogue.methods("bounds").items() if m.facts["kind"] != "proof"}
#: Settings that keep searches quick in the laws.
SHORT: dict[str, dict[str, Any]] = {
    "clever": {"blocks": 4, "samples": 5},
    "clever-second": {"blocks": 4, "samples": 3},
    "local-l-bound": {"shells": 2, "steps": 4},
    "local-c-bound": {"shells": 2, "samples": 1, "steps": 2},
    "smoothing": {"n0": 20, "n": 400},
}
CASES = [(name, norm) for name, m in BOUNDS.items() for norm in m.facts["norms"]]
ESTIMATES = [(name, norm) for name, norm in CASES if BOUNDS[name].facts["kind"] == "estimate"]


def compute(
    name: str, model: Classifier, these: Images, norm: str, *, batch: int = 256, seed: int = 0, **how: Any
) -> list[Reading]:
    method = catalogue.find("bounds", name)

    def rng(ids: list[int], number: int) -> Streams:
        return Streams(seed, ids, name, [number] * len(ids))

    found: list[Reading] = method.load()(model, these, norm, rng, batch, **method.bind({**SHORT.get(name, {}), **how}))
    return found


def problem(classes: int = 3) -> tuple[Classifier, Images]:
    """A smooth float64 network; two of the images carry a wrong label."""
    generator = torch.Generator().manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        SmoothReLU(),
        nn.Flatten(),
        nn.Linear(64, 12),
        SmoothReLU(),
        nn.Linear(12, classes),
    ).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 3 / max(1, p[0].numel()) ** 0.5
    model = Classifier(net, classes)
    x = torch.rand(18, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = model.logits(x).argmax(1)
    y[:2] = (y[:2] + 1) % classes
    return model, images(x, y, classes)


def told(readings: list[Reading]) -> dict[int, tuple[float, ...]]:
    """What each image was told; NaN stands where a bound has no such number."""
    return {r.index: (r.radius, r.constant, r.loss_value, r.gradient_norm) for r in readings}


def test_there_are_bounds() -> None:
    assert {"l-bound", "c-bound"} <= set(BOUNDS)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_law_1_the_kind_is_stated(name: str) -> None:
    facts = BOUNDS[name].facts
    assert facts["kind"] in ("estimate", "proof", "probabilistic")
    assert set(facts["norms"]) <= set(NORMS)
    assert isinstance(facts["smooth"], bool)
    assert facts["source"]
    if facts["kind"] == "estimate":
        assert "ESTIMATE" in BOUNDS[name].doc
        assert "certificate" not in BOUNDS[name].doc.lower()
    assert list(inspect.signature(BOUNDS[name].load()).parameters)[:4] == ["classifier", "images", "norm", "rng"]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_2_the_seed_decides(name: str, norm: str) -> None:
    model, these = problem()
    first, second = (told(compute(name, model, these, norm, seed=3)) for _ in range(2))
    assert first.keys() == second.keys()
    for index, numbers in first.items():
        assert second[index] == pytest.approx(numbers, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_3_order_and_batches_do_not_matter(name: str, norm: str) -> None:
    model, these = problem()
    before = told(compute(name, model, these, norm))
    shuffled = these[torch.randperm(len(these), generator=torch.Generator().manual_seed(0))]
    for other in (compute(name, model, shuffled, norm), compute(name, model, these, norm, batch=5)):
        after = told(other)
        assert set(after) == set(before)
        for index, numbers in before.items():
            assert after[index] == pytest.approx(numbers, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_law_4_undeclared_norms_are_refused(name: str) -> None:
    for norm in set(NORMS) - set(BOUNDS[name].facts["norms"]):
        with pytest.raises(UsageError, match=f"{name} has no {norm} form"):
            choose("bounds", [name], norm)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_5_misclassified_images_have_radius_0(name: str, norm: str) -> None:
    model, these = problem()
    readings = compute(name, model, these, norm)
    assert [r.index for r in readings] == these.ids.tolist()
    assert [r.radius for r in readings[:2]] == [0, 0]
    assert all(r.prediction != r.label for r in readings[:2])
    assert any(r.radius > 0 for r in readings)
    assert all(r.radius >= 0 and math.isfinite(r.radius) for r in readings)


@pytest.mark.parametrize(("name", "norm"), ESTIMATES)
def test_law_6_exact_on_linear_two_class_models(name: str, norm: str) -> None:
    model, these = linear(2)
    given = {"loss": "cw"} if any(s.name == "loss" for s in BOUNDS[name].settings) else {}
    found = torch.tensor([r.radius for r in compute(name, model, these, norm, **given)], dtype=torch.float64)
    torch.testing.assert_close(found, exact_distance(model, these, norm), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_7_passes_are_counted(name: str, norm: str) -> None:
    model, these = problem()
    calls = []
    counted = Classifier(lambda x: calls.append(len(x)) or model.logits(x), 3)  # type: ignore[func-returns-value]
    readings = compute(name, counted, these, norm)
    assert all(r.forwards >= 1 for r in readings)
    assert all((r.backwards >= 1) == (BOUNDS[name].facts["kind"] == "estimate") for r in readings)
    assert sum(r.forwards for r in readings) <= sum(calls)
