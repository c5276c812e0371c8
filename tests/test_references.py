"""Other packages' attacks through our verdict and records: no claim of theirs is taken on trust."""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.judge import Outcome
from robeval.evaluate.references import Counted, insist, run_reference
from robeval.evaluate.settings import searches_nearest
from tests.problems import attack, exact_distance, linear, network

pytest.importorskip("pyautoattack", reason="needs the extra robeval[reference]")
pytest.importorskip("torchattacks", reason="needs the extra robeval[reference]")
EPS = {"linf": 0.05, "l2": 0.15, "l1": 0.4}


def outcomes(
    text: str, model: Classifier, these: Images, norm: str = "linf", eps: float | None = None, capacity: int = 256
) -> list[Outcome]:
    spec = catalogue.parse("attacks", text)
    radius = math.inf if searches_nearest(spec) else eps or EPS[norm]
    return list(run_reference(spec, these, Untargeted(these.y), Ball(norm, radius), Backend(model, capacity), seed=3))


@pytest.fixture(scope="module")
def problem() -> tuple[Classifier, Images]:
    return network(rows=40, dtype=torch.float32)


CASES = [
    ("pyautoattack:standard,steps=10,queries=30", "linf"), ("pyautoattack:plus,steps=5,queries=20", "linf"),
    ("pyautoattack:rand,steps=3", "l2"), ("pyautoattack:apgd-ce,restarts=1,steps=10", "l1"),
    ("pyautoattack:apgd-dlr,steps=10", "l2"), ("pyautoattack:apgd-t,steps=5", "linf"),
    ("pyautoattack:fab,steps=5", "l1"), ("pyautoattack:fab-t,steps=5", "l2"),
    ("pyautoattack:square,queries=30", "linf"), ("torchattacks:PGD,steps=20", "linf"),
    ("torchattacks:PGDL2,steps=20,alpha=0.05", "l2"),
    ("torchattacks:APGD,steps=10", "l2"), ("torchattacks:FFGSM", "linf"), ("torchattacks:DeepFool", "l2"),
    ("torchattacks:FAB,steps=5", "linf"), ("torchattacks:CW,steps=20,lr=0.05", "l2"),
]  # fmt: skip


@pytest.mark.parametrize("text, norm", CASES)
def test_a_reference_gives_verified_outcomes(text: str, norm: str, problem: tuple[Classifier, Images]) -> None:
    model, these = problem
    found = outcomes(text, model, these, norm)
    assert [o.position for o in found] == list(range(40))
    assert sum(o.success for o in found) > 5
    minimal = searches_nearest(catalogue.parse("attacks", text))
    for o, x, y in zip(found, these.x, these.y, strict=True):
        assert o.forwards > 2
        if o.success:
            assert o.example is not None
            assert int(model.logits(o.example[None]).argmax()) == o.prediction != int(y)
            assert Ball(norm, math.inf if minimal else EPS[norm]).contains(x[None], o.example[None])
            assert o.distances[norm] == pytest.approx(float(Ball(norm, 1).norm_of((o.example - x)[None].double())))
        else:
            assert (o.example, o.prediction, o.attempt, o.distances[norm]) == (None, int(y), -1, math.inf)


@pytest.mark.parametrize("text", ["pyautoattack:apgd-ce,steps=20,restarts=1", "torchattacks:PGD,steps=20"])
def test_where_the_distance_is_known(text: str) -> None:
    model, these = linear(2, rows=30)
    model.module.float()  # type: ignore[attr-defined]
    these.x = these.x.float()
    exact = exact_distance(model, these, "linf")
    eps = float(exact.median())
    success = torch.tensor([o.success for o in outcomes(text, model, these, eps=eps)])
    assert success[exact < 0.95 * eps].all()
    assert not success[exact > 1.0001 * eps].any()


def test_ours_and_theirs_break_the_same_images(problem: tuple[Classifier, Images]) -> None:
    model, these = problem
    theirs = [o.success for o in outcomes("pyautoattack:apgd-ce,restarts=1,steps=100", model, these)]
    ours = [o.success for o in attack("apgd-ce", model, these, "linf", EPS["linf"], steps=100)]
    assert 10 < sum(theirs) < 40
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1


def test_the_seed_is_ours_and_nothing_outside_moves(problem: tuple[Classifier, Images]) -> None:
    model, these = problem
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    module = model.module
    assert isinstance(module, nn.Module)
    module[0].train()  # type: ignore[index]
    flags = [m.training for m in module.modules()]
    trace = lambda frame, event, arg: None
    sys.settrace(trace)
    try:
        runs = [
            outcomes(text, model, these[torch.arange(8)])
            for text in ["pyautoattack:standard,steps=3,queries=5", "torchattacks:OnePixel", "torchattacks:GN"] * 2
        ]
        assert sys.gettrace() is trace
    finally:
        sys.settrace(None)
    for first, second in zip(runs[:3], runs[3:], strict=True):
        assert [o.margin for o in first] == [o.margin for o in second]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert not logging.getLogger("auto-attack").disabled
    assert [p.grad for p in module.parameters()] == [None] * len(list(module.parameters()))
    assert [m.training for m in module.modules()] == flags
    module.eval()


def test_nothing_is_printed(problem: tuple[Classifier, Images], capfd: pytest.CaptureFixture[str]) -> None:
    model, these = problem
    plain = Classifier(lambda x: model.logits(x), model.classes)  # without parameters, about which torchattacks prints
    assert outcomes("torchattacks:PGD", plain, these[torch.arange(4)])
    assert outcomes("pyautoattack:square,queries=5", plain, these[torch.arange(4)])
    assert capfd.readouterr() == ("", "")


def test_passes_are_counted_and_shared(problem: tuple[Classifier, Images]) -> None:
    model, these = problem
    rows = [0, 0]

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows[0] += len(x)
            z: Tensor = model.logits(x)
            if z.requires_grad:
                z.register_hook(lambda grad: rows.__setitem__(1, rows[1] + len(grad)))
            return z

    backend = Backend(Classifier(Watched(), model.classes), 16, floor=1)
    spec = catalogue.parse("attacks", "torchattacks:PGD,steps=7")
    told = []
    found = list(
        run_reference(
            spec, these, Untargeted(these.y), Ball("linf", 0.05), backend, on_batch=lambda *said: told.append(said[:2])
        )
    )
    assert told == [(16, 40), (32, 40), (40, 40)]
    assert backend.counts.backwards == rows[1] == 7 * 40
    assert backend.counts.forwards == 7 * 40 + 3 + 2 * 40  # one row a batch tells the number of classes
    assert [o.backwards for o in found] == [7] * 40
    assert {o.forwards for o in found} == {8 + 2}  # 7 and a bit, rounded up
    assert sum(o.forwards for o in found) >= backend.counts.forwards


def test_the_verdict_decides_not_the_package(
    problem: tuple[Classifier, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates that are far, black, NaN, clean or a rounding away from the ball."""
    model, these = problem
    eps = EPS["linf"]
    goal, ball = Untargeted(these.y), Ball("linf", eps)
    good = [o.example for o in outcomes("torchattacks:PGD,steps=20", model, these) if o.success]
    where = torch.tensor([o.position for o in outcomes("torchattacks:PGD,steps=20", model, these) if o.success])
    edge = (these.x[where] + 1.00002 * (torch.stack([e for e in good if e is not None]) - these.x[where])).clamp(0, 1)
    beyond = goal[where].reached(model.logits(edge)) & ~ball.contains(these.x[where], edge)
    k = int(beyond.nonzero()[0])
    position, x, hit, edge = where[[k]], these.x[where[[k]]], good[k], edge[[k]]
    assert hit is not None

    def candidates(found: Tensor) -> Outcome:
        class Fake:
            def __call__(
                self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, seed: int, **settings: object
            ) -> Tensor:
                model(x)
                return found

        monkeypatch.setattr(catalogue.Method, "load", lambda self: Fake())
        (outcome,) = outcomes("torchattacks:PGD", model, these[position])
        return outcome

    assert candidates(hit[None]).success
    assert not candidates(x).success
    assert not candidates(x + 3 * (hit - x)).success  # adversarial or not, it is outside
    assert not candidates(torch.zeros_like(x)).success
    void = candidates(torch.full_like(x, torch.nan))
    assert (void.success, void.error) == (False, "")
    out = candidates(edge)  # outside by a rounding, and brought back
    assert out.success
    assert out.distances["linf"] <= eps * (1 + 1e-6) + 1e-9


def test_a_model_without_an_answer_is_not_robust(problem: tuple[Classifier, Images]) -> None:
    model, these = problem

    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = model.logits(x)
            clean = (x[:, None] == these.x[None]).flatten(2).all(2).any(1)
            return torch.where(clean[:, None], z, torch.full_like(z, torch.nan))

    found = outcomes("torchattacks:GN,std=0.01", Classifier(Fragile(), 5), these)
    assert {o.error for o in found} == {"the model gave NaN or Inf logits under attack"}


def test_norms_and_searches_of_the_classes() -> None:
    for text, norm in (
        ("torchattacks:PGD", "l2"), ("torchattacks:CW", "linf"), ("torchattacks:PGDL2", "linf"),
        ("torchattacks:FAB", "l1"), ("torchattacks:EADL1", "l2"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"{text} has no {norm} form"):
            choose("attacks", [text], norm)
    assert [s.label for s in choose("attacks", ["pyautoattack", "torchattacks:NewAttack"], "l1")] == [
        "pyautoattack:standard", "torchattacks:NewAttack",
    ]  # fmt: skip
    minimal = [n for n in ("PGD", "CW", "FAB", "DeepFool", "Square", "JSMA", "EADEN")
               if searches_nearest(catalogue.parse("attacks", f"torchattacks:{n}"))]  # fmt: skip
    assert minimal == ["CW", "FAB", "DeepFool", "JSMA", "EADEN"]


def test_every_class_of_the_package_is_known_with_its_norm() -> None:
    """The catalogue's table agrees with what the classes say of themselves and with their constructors."""
    import inspect
    import re

    import torchattacks

    words = " ".join(catalogue.methods("references")["torchattacks"].facts["by_word"]).split()
    assert len(words) == len(set(words))
    for name in words:
        cls = getattr(torchattacks, name)
        facts = catalogue.parse("attacks", f"torchattacks:{name}").method.facts
        said = re.search(r"Distance Measure : (.*)", cls.__doc__)
        if said and "L0" not in said[1] and name != "FAB":  # its success test forgets l1
            assert {n.strip().lower() for n in re.split(", | and ", said[1])} == set(facts["norms"]), name
        takes = inspect.signature(cls.__init__).parameters
        radius = bool({"eps", "max_epsilon"} & set(takes))
        assert (facts.get("search") == "minimal") == (not radius or name == "FAB"), name


@pytest.mark.parametrize(
    "text, says",
    [
        ("torchattacks:PDG", 'unknown attack of torchattacks "PDG"; did you mean'),
        ("torchattacks:LGV", "unknown attack of torchattacks"),
        ("torchattacks:PGD,stepz=3", 'unknown setting of torchattacks:PGD "stepz"; did you mean steps'),
        ("torchattacks:PGD,eps=0.1", 'unknown setting of torchattacks:PGD "eps"'),
    ],
)
def test_what_a_package_does_not_have_is_refused_before_anything_runs(text: str, says: str) -> None:
    spec = catalogue.parse("attacks", text)
    with pytest.raises(UsageError) as caught:
        insist([catalogue.parse("attacks", "pgd"), catalogue.parse("attacks", "pyautoattack"), spec])
    assert caught.value.what.startswith(says)


def test_wrong_words_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match='unknown version of pyautoattack "standrad"; did you mean standard'):
        catalogue.parse("attacks", "pyautoattack:standrad")
    with pytest.raises(UsageError, match="steps of pyautoattack must be at least 1"):
        catalogue.parse("attacks", "pyautoattack:standard,steps=0")


@pytest.mark.parametrize("version, classes, needed", [("standard", 3, 4), ("plus", 2, 3), ("apgd-dlr", 2, 3)])
def test_too_few_classes_get_one_sentence(version: str, classes: int, needed: int) -> None:
    model, these = network(rows=4, classes=classes, dtype=torch.float32)
    with pytest.raises(UsageError, match=f"which needs {needed} classes; the model has {classes}"):
        outcomes(f"pyautoattack:{version}", model, these)


def test_few_classes_are_no_crash_where_they_need_none() -> None:
    model, these = network(rows=6, classes=2, dtype=torch.float32)
    for text in ("pyautoattack:fab-t,steps=3", "pyautoattack:apgd-ce,steps=3", "torchattacks:FAB,steps=3"):
        assert len(outcomes(text, model, these)) == 6


def test_a_packages_failure_is_told_in_one_sentence(problem: tuple[Classifier, Images]) -> None:
    model, these = problem
    with pytest.raises(ContractBroken, match="torchattacks:JSMA failed: IndexError") as caught:
        outcomes("torchattacks:JSMA", model, these)  # it believes in ten classes
    assert caught.value.code == "C21"
    assert len(str(caught.value).splitlines()) <= 4


def test_step_sizes_keep_the_proportion_of_the_classes_defaults(
    problem: tuple[Classifier, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchattacks

    model, these = problem
    seen: dict[str, float] = {}
    for name, norm, share in (("PGD", "linf", 0.25), ("FFGSM", "linf", 1.25), ("PGDL2", "l2", 0.2)):
        cls = getattr(torchattacks, name)
        forward = cls.forward

        def watch(self: object, *args: object, name: str = name, forward: object = forward) -> object:
            seen[name] = self.alpha / self.eps  # type: ignore[attr-defined]
            return forward(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(cls, "forward", watch)
        outcomes(f"torchattacks:{name}", model, these, norm)
        assert seen[name] == pytest.approx(share)
    outcomes("torchattacks:PGD,alpha=0.005", model, these)
    assert seen["PGD"] == pytest.approx(0.1)


def test_counting_sees_every_backward_pass() -> None:
    model = Counted(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3))
    x = torch.rand(5, 1, 2, 2, requires_grad=True)
    z = model(x)
    torch.autograd.grad(z[:, 0].sum(), x, retain_graph=True)
    z[:, 1].sum().backward()
    with torch.no_grad():
        model(x)
    assert (model.forwards, model.backwards, model.calls) == (10, 10, 2)


@pytest.fixture(autouse=True)
def unharmed() -> Iterator[None]:
    """No test may leave the package's logger silent."""
    yield
    assert not logging.getLogger("auto-attack").disabled
