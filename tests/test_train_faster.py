"""Channels-last layout and torch.compile in training: same numbers, plain weights, exact resume, clear refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.errors import MachineError, UsageError
from robeval.models.activations import activation
from robeval.models.load import load
from robeval.train.initial import seeded
from robeval.train.job import Job, run_job
from robeval.train.recipe import Recipe
from robeval.train.resume import identity_of
from tests.test_train_fit import Stop, go, images, same, stop_at

OPTIONS: list[dict[str, bool]] = [{"channels_last": True}, {"channels_last": True, "compile": True}]
#: Methods that differentiate once, among them one that listens to layers and one that takes the first layer away.
ONCE = ("standard", "adv:steps=2,eps=0.1", "fd-grad:penalty_space=normalised", "rat-released:steps=2,eps=0.1")
TWICE = ("soar:eps=0.1", "gn", "sgr", "llr")


class Normalised(nn.Sequential):
    """A network that begins with a part called normalise, with two convolutions and perhaps BatchNorm."""

    def __init__(self, batchnorm: bool) -> None:
        super().__init__()
        self.normalise = nn.Softplus()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6) if batchnorm else nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24, 3))


def network(batchnorm: bool = False) -> nn.Module:
    return seeded(lambda: Normalised(batchnorm), 4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything of torch.compile but the compiler: traced, and differentiated ahead of time. Counts traces."""
    traced: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        traced.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    return traced


def train(folder: Path, spec: str, batchnorm: bool = False, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    result: tuple[Any, dict[str, Tensor]] = go(
        folder, spec, module=network(batchnorm), **{"epochs": 1, "batch_size": 24, "select": "last", **options}
    )
    return result


@pytest.mark.parametrize("spec", ONCE)
def test_options_change_only_rounding(tmp_path: Path, quick: list[int], spec: str) -> None:
    plain, expected = train(tmp_path / "plain", spec)
    for k, option in enumerate(OPTIONS):
        result, weights = train(tmp_path / str(k), spec, **option)
        assert list(weights) == list(expected)
        assert all(w.is_contiguous() for w in weights.values())
        assert all(torch.allclose(weights[n], expected[n], rtol=0, atol=1e-5) for n in expected)
        assert result.rows[0]["forward_per_step"] == plain.rows[0]["forward_per_step"]
    assert quick


@pytest.mark.parametrize("option", OPTIONS)
def test_batchnorm_keeps_its_modes(tmp_path: Path, quick: list[int], option: dict[str, bool]) -> None:
    _, expected = train(tmp_path / "plain", "fd-grad", batchnorm=True)
    _, weights = train(tmp_path / "fast", "fd-grad", batchnorm=True, **option)
    assert all(torch.allclose(weights[n], expected[n], rtol=0, atol=1e-5) for n in expected)


@pytest.mark.parametrize("spec", TWICE)
def test_differentiating_twice(tmp_path: Path, quick: list[int], spec: str) -> None:
    _, expected = train(tmp_path / "plain", spec)
    _, weights = train(tmp_path / "layout", spec, channels_last=True)
    assert all(torch.allclose(weights[n], expected[n], rtol=0, atol=1e-4) for n in expected)
    module = network()
    with pytest.raises(UsageError, match=f"{spec.split(':')[0]} differentiates the network twice") as error:
        go(tmp_path / "compiled", spec, module=module, compile=True)
    assert error.value.code == "A04"
    assert not (tmp_path / "compiled").exists()
    assert "forward" not in vars(module)


def test_smooth_activations_compile_in_parts_that_may_be_differentiated_twice(tmp_path: Path, quick: list[int]) -> None:
    """Their own derivatives keep them out of the compiled graph; what is left must give the same second derivatives."""
    build = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), activation("smooth"), nn.Flatten(), nn.Linear(16, 3))
    how: dict[str, Any] = {"epochs": 1, "batch_size": 24, "select": "last"}
    _, expected = go(tmp_path / "plain", "gn:weight=10", module=seeded(build, 4), **how)
    _, weights = go(tmp_path / "fast", "gn:weight=10", module=seeded(build, 4), compile=True, **how)
    assert quick
    assert all(torch.allclose(weights[n], expected[n], rtol=0, atol=1e-5) for n in expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, quick: list[int], option: dict[str, bool]) -> None:
    how: dict[str, Any] = {"epochs": 2, "save_steps": 1, "select": "best", "average": "ema", "average_decay": 0.9}
    _, expected = train(tmp_path / "whole", "adv:steps=2,eps=0.1", **how, **option)
    for step in (2, 4):
        with pytest.raises(Stop):
            train(tmp_path / "broken", "adv:steps=2,eps=0.1", **how, **option, on_progress=stop_at(step))
    result, weights = train(tmp_path / "broken", "adv:steps=2,eps=0.1", **how, **option)
    assert result.resumed == "yes"
    assert same(weights, expected)


def test_weights_are_in_that_layout_while_it_trains(tmp_path: Path) -> None:
    module, seen = network(), []
    weight = dict(module.named_parameters())["features.2.weight"]

    def look(done: int, total: int, text: str) -> None:
        assert weight.grad is not None
        seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (weight, weight.grad)])

    go(tmp_path, "standard", module=module, channels_last=True, on_progress=look)
    assert seen and all(all(both) for both in seen)
    assert weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


def test_what_a_training_is(tmp_path: Path) -> None:
    assert identity_of("adv", {}, Recipe()).keys() & {"channels_last", "compile"} == set()
    assert identity_of("adv", {}, Recipe(compile=True))["compile"] == "True"
    train(tmp_path, "standard")
    with pytest.raises(UsageError, match="used channels_last unset, you gave True"):
        train(tmp_path, "standard", channels_last=True)


def test_a_compiler_that_fails_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(MachineError, match=r"torch\.compile failed: .*no compiler here") as error:
        train(tmp_path, "standard", compile=True)
    assert error.value.code == "E05"


def test_the_model_file_is_plain(tmp_path: Path, quick: list[int]) -> None:
    recipe = Recipe(epochs=1, batch_size=24, eps=0.1, channels_last=True, compile=True)
    job = Job(catalogue.parse("trainers", "standard"), recipe, tmp_path / "m.pt", held_out=0)
    run_job(job, images())
    classifier = load(str(job.out))
    state = classifier.module.state_dict()  # type: ignore[attr-defined]
    assert not any("_orig_mod" in name for name in state)
    assert all(w.is_contiguous() for w in state.values())
    told = torch.load(job.out, weights_only=True)["recipe"]
    assert told["channels_last"] is told["compile"] is True
