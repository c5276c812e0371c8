"""The laws that every attack in the folder obeys. A new file is tested by existing."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from robeval.core import catalogue
from robeval.core.ball import NORMS, Ball
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.errors import UsageError
from robeval.core.goal import Untargeted
from robeval.core.questions import Gradient, Logits
from robeval.core.streams import Streams
from robeval.engine import cohort
from robeval.engine.cohort import waves
from robeval.engine.judge import Judge, Outcome
from robeval.evaluate.settings import attempts_of
from tests.problems import attack, attack_cases, exact_distance, images, linear, network, quick

CASES = attack_cases()
EPS = {"linf": 0.05, "l2": 0.15, "l1": 0.4}
#: Attacks that pass through bigger balls on their way; the judge counts nothing there.
WANDERS = {("apgd", "l1"): 3, ("apgd-t", "l1"): 3}
#: Questions that an attack asks besides one per step and wave of attempts.
MORE_QUESTIONS = {"apgd": 4, "apgd-t": 8}
#: Questions per step: FAB looks at the linearised model and at the new point in two phases.
QUESTIONS = {"fab": 2, "fab-t": 2}
#: Minimal-norm attacks come within this factor of the exact distance on a linear model: those that see gradients, and
#: those that see nothing but the predicted class, with so many queries.
FACTOR, BLIND_FACTOR = 1.05, 1.3
BLIND: dict[str, dict[str, float]] = {"boundary": {"queries": 500}, "hopskipjump": {"queries": 500}}
#: Attacks that need more than the laws' short budget to get so near.
LONGER: dict[str, dict[str, float]] = {
    "ddn": {"steps": 200},
    "cw-l2": {"iterations": 60, "learning_rate": 0.003, "c": 0.03, "searches": 6},
    "logbarrier": {"outer": 6, "inner": 20, "dt": 0.04, "alpha": 0.01},
    **BLIND,
}


def facts(name: str) -> dict[str, object]:
    return dict(catalogue.find("attacks", name).facts)


def told(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """Everything that an outcome says, in comparable form."""
    return [
        (o.success, o.prediction, o.margin, o.attempt, o.iterations, o.forwards, o.backwards, o.first_success_forward,
         tuple(o.distances.items()), None if o.example is None else o.example.numpy().tobytes())
        for o in outcomes
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_1_strong_where_the_distance_is_known(name: str, norm: str) -> None:
    model, these = linear(2, rows=40)
    exact = exact_distance(model, these, norm)
    eps = float(exact.median())
    outcomes = attack(name, model, these, norm, eps, **LONGER.get(name, {}))
    if facts(name).get("search") == "minimal":
        found = torch.tensor([o.distances[norm] for o in outcomes])
        assert (found <= (BLIND_FACTOR if name in BLIND else FACTOR) * exact).all()
    elif facts(name).get("access") != "black-box":
        near = exact < 0.8 * eps
        assert near.any()
        assert all(o.success for o, close in zip(outcomes, near, strict=True) if close)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_2_never_closer_than_possible(name: str, norm: str) -> None:
    model, these = linear(4, rows=40)
    exact = exact_distance(model, these, norm)
    outcomes = attack(name, model, these, norm, 1.5 * float(exact.median()))
    for o, distance in zip(outcomes, exact, strict=True):
        assert o.distances[norm] >= distance * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_3_an_image_does_not_feel_its_neighbours(name: str, norm: str, dtype: torch.dtype) -> None:
    model, these = network(rows=18, dtype=dtype)
    settings = {"restarts": 3} if "restarts" in quick(name) and not name.endswith("-t") else {}
    settings |= {"steps": 12, "queries": 60}
    outcomes = attack(name, model, these, norm, EPS[norm], **settings)
    whole = told(outcomes)
    if facts(name).get("search") != "minimal" and name != "noise":
        assert 0 < sum(o.success for o in outcomes) < len(outcomes)  # both fates are compared
    for capacity in (1, 7):
        assert told(attack(name, model, these, norm, EPS[norm], capacity=capacity, **settings)) == whole
    order = torch.randperm(len(these), generator=torch.Generator().manual_seed(3))
    shuffled = told(attack(name, model, these[order], norm, EPS[norm], capacity=5, **settings))
    assert [shuffled[k] for k in order.argsort().tolist()] == whole


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_4_nothing_is_read_from_rows_that_did_not_ask(
    name: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, these = network()
    before = told(attack(name, model, these, norm, EPS[norm]))
    monkeypatch.setattr(cohort, "BLANK", math.nan)
    assert told(attack(name, model, these, norm, EPS[norm])) == before


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_5_every_point_lies_in_the_ball_and_the_box(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    look = Judge.look

    def watch(
        self: Judge, rows: torch.Tensor, attempts: torch.Tensor, points: torch.Tensor, logits: torch.Tensor
    ) -> Iterator[Outcome]:
        ball = Ball(norm, WANDERS.get((name, norm), 1) * self.ball.eps)
        seen.append(bool(ball.contains(self.images.x[rows], points).all()))
        return look(self, rows, attempts, points, logits)

    monkeypatch.setattr(Judge, "look", watch)
    model, these = network(dtype=torch.float32)
    these.x[:6] = these.x[:6].round()  # images on the faces of the box
    these.y = model.logits(these.x).argmax(1)
    outcomes = attack(name, model, these, norm, EPS[norm])
    assert seen
    assert all(seen)
    for o, x, y in zip(outcomes, these.x, these.y, strict=True):
        if o.success:
            assert o.example is not None
            assert Ball(norm, o.distances[norm]).contains(x[None], o.example[None])
            assert int(model.logits(o.example[None]).argmax()) == o.prediction != int(y)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_6_budgets_are_kept(name: str, norm: str) -> None:
    model, these = network()
    settings = quick(name, model.classes)
    outcomes = attack(name, model, these, norm, EPS[norm] / 4)
    attempts = attempts_of(catalogue.find("attacks", name), settings)
    side_by_side = len(waves(attempts, at_once=facts(name).get("search") == "minimal"))
    if settings.get("queries"):
        assert max(o.iterations for o in outcomes) <= settings["queries"] + 1
    if "steps" in settings:
        steps = settings["steps"] * side_by_side * QUESTIONS.get(name, 1) + settings.get("descent", 0)
        assert max(o.iterations for o in outcomes) <= steps + MORE_QUESTIONS.get(name, 2)
    if facts(name).get("access") == "black-box":
        assert not any(o.backwards for o in outcomes)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_7_the_seed_decides(name: str, norm: str) -> None:
    model, these = network()
    assert told(attack(name, model, these, norm, EPS[norm], seed=5)) == told(
        attack(name, model, these, norm, EPS[norm], seed=5)
    )


@pytest.mark.parametrize("kind", ["constant", "flat"])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_8_zero_gradients_do_not_crash(name: str, norm: str, kind: str) -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zero = 0 * x.flatten(1).sum(1)
            levels = [2.0, 1.0, 0.0] if kind == "flat" else [1.0, 1.0, 1.0]
            return torch.stack([zero + level for level in levels], 1)

    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    these = images(x, torch.zeros(5, dtype=torch.int64), 3)
    outcomes = attack(name, Classifier(Flat(), 3), these, norm, EPS[norm], queries=20)
    assert [o.success for o in outcomes] == [False] * 5
    assert all(math.isinf(o.distances["l2"]) for o in outcomes)


@pytest.mark.parametrize("name", list(catalogue.methods("attacks")))
def test_law_9_undeclared_norms_are_refused(name: str) -> None:
    for norm in set(NORMS) - set(catalogue.find("attacks", name).facts["norms"]):
        with pytest.raises(UsageError, match=f"{name} has no {norm} form"):
            choose("attacks", [name], norm)


def test_law_10_every_attack_and_setting_is_in_the_help() -> None:
    run = [sys.executable, "-c", "from robeval.cli.app import main; main()", "attack", "--help"]
    text = subprocess.run(
        run,
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    ).stdout
    for method in catalogue.methods("attacks").values():
        assert method.name in text
        for setting in method.settings:
            assert f"{setting.name}=" in text


@pytest.mark.parametrize("name", list(catalogue.methods("attacks")))
def test_attacks_only_propose(name: str) -> None:
    """An attack is a generator that knows neither the model nor the engine."""
    function = catalogue.find("attacks", name).load()
    assert inspect.isgeneratorfunction(function)
    assert list(inspect.signature(function).parameters)[:4] == ["x0", "goal", "ball", "rng"]
    model, these = network(rows=3)
    norm = catalogue.find("attacks", name).facts["norms"][0]
    x0 = these.x
    first = next(
        function(
            x0,
            Untargeted(these.y),
            Ball(norm, EPS[norm]),
            Streams(0, [1, 2, 3], name, dtype=x0.dtype),
            **quick(name, model.classes),
        ),
        None,
    )
    assert first is None or isinstance(first, (Logits, Gradient))
    assert model.classes == 5
