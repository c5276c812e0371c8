"""The positive and negative controls: which diagnostic fires on which planted fault, in a small size.

The expectations are those of the pilot in which the tests were chosen, wherever a test fired there, except that

- a test that fires on cross-entropy alone, where the margin is attacked besides, may only warn (x40 under noise);
- the unbounded attack is judged without a random start, so that it stands still on quantised and one-hot models too,
  and only warns where the margin cures it (logits x1000, x40);
- K1 on quantised inputs and on noise, and X1 and X4 on noise and on batch statistics, were finds of a weaker reference
  attack: several losses, whose starts are random, leave nothing there for one step or for a blind search;
- G4 on the constant model is clear: its margin neither moves nor has a gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from robeval.core import catalogue
from robeval.diagnose.finding import FAILED, WARNING, Finding
from robeval.diagnose.subject import Subject
from tests import planted

IMAGES = 32
#: Settings that keep a test quick, by its name.
SMALL: dict[str, dict[str, Any]] = {
    "black-box-only": {"queries": 150, "draws": 20},
    "random-noise": {"draws": 100},
}
TESTS = {
    "D1": "repeatability",
    "D2": "batch-independence",
    "D3": "logits",
    "D5": "hidden-optimisation",
    "D8": "clean-accuracy",
    "G1": "zero-gradient",
    "G2": "nonzero-elements",
    "G3": "graph",
    "G4": "finite-differences",
    "G5": "gradient-norms",
    "G6": "confidence",
    "K1": "iterative-beats-one-step",
    "K4": "eps-monotone",
    "K5": "unbounded-attack",
    "K10": "random-direction",
    "X1": "black-box-only",
    "X2": "loss-disagreement",
    "X3": "transfer",
    "X4": "random-noise",
}
#: Tests that must fail on a model, and those that must at least warn.
MATRIX = {
    "logits-x1000": ("G1 X1 X2 X3", "G2 G5 G6 K5 K10 X4"),
    "logits-x40": ("G1 X1 X2 X3", "G2 G5 G6 K5"),
    "quantised": ("G1 G4 K5 K10 X1 X3 X4", "G2"),
    "detached": ("G1 G3 G4 K5 K10 X1 X3 X4", "G2"),
    "noise": ("D1 D2 G4", ""),
    "shattered": ("G4 K1 K5 X1 X3", "K4 K10 X4"),
    "softmax": ("D3", ""),
    "softmax-x1000": ("D3 G1 K5 K10 X1 X3 X4", "G2"),
    "one-hot": ("D3 G1 G4 K5 K10 X1 X3 X4", "G2"),
    "constant": ("D8 G1 K5 K10", "G2"),
    "batchnorm-train": ("D2", "G4"),
    "purifier": ("D5", "G4 X3"),
    "randomised": ("D1 D2 G4", ""),
    "batch-statistics": ("D2", ""),
}


@cache
def findings(name: str) -> dict[str, Finding]:
    """What the tests of the matrix say of a model."""
    torch.manual_seed(0)
    model, source = planted.model(name), planted.source()
    on = Subject(model, planted.chosen(IMAGES), planted.NORM, planted.EPS, 0, "quick", (), [source])
    chosen = {key: catalogue.find("diagnostics", test) for key, test in TESTS.items()}
    return {key: test.load()(on, **SMALL.get(test.name, {})) for key, test in chosen.items()}


@pytest.mark.parametrize("name", planted.HONEST)
def test_an_honest_model_fails_nothing(name: str) -> None:
    failed = {key: f.measured for key, f in findings(name).items() if f.result == FAILED}
    warned = {key for key, f in findings(name).items() if f.result == WARNING}
    assert failed == {}
    assert warned <= {"X1", "X2"}  # an image or two of 32


@pytest.mark.parametrize("name", MATRIX)
def test_a_planted_fault_is_caught(name: str) -> None:
    failing, seen = (set(keys.split()) for keys in MATRIX[name])
    said = findings(name)
    assert {key for key in failing if said[key].result != FAILED} == set()
    assert {key for key in seen if said[key].result not in (FAILED, WARNING)} == set()


def test_no_single_test_is_enough_and_the_set_is() -> None:
    catches = {key: {n for n in MATRIX if findings(n)[key].result == FAILED} for key in TESTS}
    assert max(map(len, catches.values())) < len(MATRIX)
    assert set().union(*catches.values()) == set(MATRIX)


def test_every_model_of_the_suite_stands_in_the_matrix() -> None:
    assert {*MATRIX, *planted.HONEST} == {*planted.MODELS}
