"""Pages and examples say what the code does."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.goal import Untargeted
from robeval.core.records import AttackRecord, Certificate, Diagnosis, describe
from robeval.core.streams import Streams
from robeval.engine.drive import drive

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load(ROOT / "docs" / "generate.py")


@pytest.mark.parametrize("name", GENERATE.PAGES)
def test_generated_pages_are_fresh(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == GENERATE.PAGES[name](), "run: python docs/generate.py"


def test_every_column_is_on_the_page() -> None:
    page = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    for record in (AttackRecord, Certificate, Diagnosis):
        section = page.split(f"## {record.__name__}\n")[1].split("\n## ")[0]
        for name, kind, unit, meaning in describe(record):
            assert f"| `{name}` | {kind} | {unit} | {meaning} |" in section


def test_the_error_page_reads_codes_from_source() -> None:
    source = (
        "def f(x, code='A09'):\n    raise UsageError(f'bad {x}', code=code)\n"
        "def g():\n    raise FileRefused('gone', code='M99')\ndef h():\n    tell('warning[D14] twins')\n"
    )
    assert sorted(GENERATE.raised(ast.parse(source))) == [
        ("A09", 2, "bad ..."),
        ("D14", 0, "(a note; the command goes on)"),
        ("M99", 3, "gone"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_and_example_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    things = [p.name for p in PAGES[:-1] if p.name != "index.md"] + [p.name for p in (ROOT / "examples").glob("*.py")]
    assert [name for name in things if name not in index] == []


def test_the_example_attack_is_read_and_breaks_a_linear_model_at_its_exact_distance() -> None:
    spec = catalogue.parse("attacks", f"{ROOT}/examples/own_attack.py:momentum:steps=5")
    assert (spec.label, spec.settings) == ("momentum:steps=5", {"steps": 5, "decay": 1.0})
    x0 = torch.full((6, 1, 4, 4), 0.5, dtype=torch.float64)
    x0[:, 0, 0, 0] += torch.linspace(0.02, 0.12, 6, dtype=torch.float64)
    w = torch.zeros(16, 2, dtype=torch.float64)
    w[:, 0], w[:, 1] = 1.0, -1.0
    logits = lambda x: (x.flatten(1) - 0.5) @ w
    goal = Untargeted(torch.zeros(6, dtype=torch.long))
    exact = (x0 - 0.5).flatten(1).sum(1) / 16  # every pixel moves by eps
    eps = 0.004
    start = spec.method.load()(x0, goal, Ball("linf", eps), Streams(0, list(range(6)), "momentum"), steps=5)
    x = drive(start, logits, goal)
    assert torch.equal(logits(x).argmax(1) == 1, exact < eps)
    assert (x - x0).abs().max() <= eps + 1e-12
    assert 0 < (exact < eps).sum() < 6


def test_the_example_network_builds_from_the_command_lines_words() -> None:
    from robeval.models.build import build

    network = build(f"{ROOT}/examples/own_network.py:two_layers", width="48", classes=10)
    assert network(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert sum(p.numel() for p in network.parameters()) == 64 * 48 + 48 + 48 * 10 + 10


def test_attack_by_hand_runs_and_loses_accuracy_as_eps_grows() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "attack_by_hand.py")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    accuracy = [float(share) for share in re.findall(r"accuracy.*? ([\d.]+)%", done.stdout)]
    assert len(accuracy) == 4
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[0] > 80 > 50 > accuracy[-1]
