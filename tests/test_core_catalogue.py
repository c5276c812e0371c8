"""The folder is the registry."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robeval.core import catalogue
from robeval.core.errors import FileRefused, UsageError
from robeval.core.numbers import number, pretty, radii, radius

ROOT = Path(__file__).parents[1]

NEW_ATTACK = '''"""A test attack."""

from __future__ import annotations

from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import attack
from robeval.core.goal import Goal
from robeval.core.questions import Attack
from robeval.core.streams import Streams


@attack(source="Nobody 2026, A test", norms=("linf",), access="black-box")
def brand_new(x0: Tensor, goal: Goal, ball: Ball, rng: Streams, *, strength: float = 0.5) -> Attack:
    """Moves every pixel down.

    Used by a test only.

    Args:
        strength: Share of eps.

    Shapes:
        x0 (n, C, H, W) in [0, 1]; returns the same shape.
    Cost:
        1 forward pass per open image.
    Source:
        None.
    Departs:
        In nothing.
    """
    return ball.project(x0, x0 - strength * ball.eps)
    yield
'''


def test_specs_carry_every_setting_and_a_label() -> None:
    spec = catalogue.parse("attacks", "pgd:steps=50,restarts=3")
    assert spec.settings == {
        "steps": 50, "step_size": None, "relative_step": None, "loss": "ce", "confidence": None, "restarts": 3,
        "random_start": True, "samples": 1,
    }  # fmt: skip
    assert spec.label == "pgd:restarts=3,steps=50"
    assert catalogue.parse("attacks", "pgd:restarts=3,steps=50").config_hash == spec.config_hash
    assert catalogue.parse("attacks", "pgd").config_hash != spec.config_hash
    preset = catalogue.parse("attacks", "pgd20x50:loss=cw")
    assert (preset.label, preset.settings["restarts"], preset.settings["loss"]) == ("pgd20x50:loss=cw", 50, "cw")
    assert catalogue.parse("attacks", "apgd_ce") == catalogue.parse("attacks", "apgd-ce")
    assert catalogue.parse("attacks", "pgd:step_size=2/255").settings["step_size"] == 2 / 255


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pdg", 'unknown attack "pdg"; did you mean pgd'),
        ("pgd:stepz=3", 'unknown setting of pgd "stepz"; did you mean steps'),
        ("pgd:steps=0", "steps of pgd must be at least 1"),
        ("pgd:steps=two", "steps of pgd must be a number"),
        ("pgd:steps=2.5", "steps of pgd must be a whole number"),
        ("pgd:loss=cee", 'unknown loss of pgd "cee"'),
        ("pgd:steps", "settings are written key=value"),
        ("pgd:random_start=maybe", "random_start of pgd must be true or false"),
    ],
)
def test_wrong_specs_get_one_sentence(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        catalogue.parse("attacks", text)


REFERENCE = '''
@reference(source="Nobody 2026, A test", norms=("linf", "l2"), needs="NEEDS", word="tool",
           by_word={"saw axe": {"norms": ("l1",), "search": "minimal"}})
def outside(model, x, y, ball, seed, *, tool: str = "hammer", depth: int = 3, **settings):
    """Runs a tool."""
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reference in a package of its own, which is there as soon as its folder says so."""
    (tmp_path / "outside_house").mkdir()
    (tmp_path / "outside_house" / "__init__.py").touch()
    (tmp_path / "outside_house" / "outside.py").write_text(REFERENCE.replace("NEEDS", "json"))
    monkeypatch.syspath_prepend(str(tmp_path))
    kind = dataclasses.replace(catalogue.KINDS["references"], package="outside_house")
    monkeypatch.setitem(catalogue.KINDS, "references", kind)
    catalogue.methods.cache_clear()
    yield tmp_path / "outside_house" / "outside.py"
    monkeypatch.undo()
    catalogue.methods.cache_clear()


def test_a_reference_is_named_by_its_first_bare_word(outside: Path) -> None:
    plain = catalogue.parse("attacks", "outside")
    assert (plain.label, plain.method.kind, plain.method.name) == ("outside:hammer", "references", "outside:hammer")
    assert plain.settings == {"tool": "hammer", "depth": 3}
    spec = catalogue.parse("attacks", "outside:axe,depth=5,grip=none,sharp=yes,force=1/4,blows=7,fast=true")
    assert spec.settings == {
        "tool": "axe", "depth": 5, "grip": None, "sharp": "yes", "force": 0.25, "blows": 7, "fast": True
    }  # fmt: skip
    assert spec.label == "outside:axe,blows=7,depth=5,fast=True,force=0.25,grip=None,sharp=yes"
    assert catalogue.parse("attacks", spec.label) == spec
    assert (spec.method.facts["norms"], spec.method.facts["search"]) == (("l1",), "minimal")
    assert (plain.method.facts["norms"], plain.method.facts.get("search")) == (("linf", "l2"), None)
    assert catalogue.parse("attacks", "outside:depth=5").label == "outside:hammer,depth=5"
    assert spec.config_hash != catalogue.parse("attacks", "outside:saw,depth=5").config_hash
    assert catalogue.find("references", "outside").name == "outside"
    assert "outside" not in catalogue.methods("attacks")


def test_a_reference_without_its_package_is_refused_in_one_sentence(outside: Path) -> None:
    outside.write_text(REFERENCE.replace("NEEDS", "no_such_package"))
    catalogue.methods.cache_clear()
    with pytest.raises(UsageError) as caught:
        catalogue.parse("attacks", "outside:axe")
    assert caught.value.what == "outside:axe needs the package no_such_package, which is not installed"
    assert (caught.value.code, caught.value.do) == ("A07", "pip install 'robeval[reference]'")
    assert list(catalogue.methods("references")) == ["outside"]  # it is listed all the same


def test_bare_words_and_open_settings_are_for_references_only() -> None:
    with pytest.raises(UsageError, match="settings are written key=value"):
        catalogue.parse("attacks", "pgd:linf")
    with pytest.raises(UsageError, match="unknown setting of pgd"):
        catalogue.parse("attacks", "pgd:colour=red")


def test_a_file_outside_the_house(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NEW_ATTACK)
    spec = catalogue.parse("attacks", f"{tmp_path}/mine.py:brand_new:strength=0.25")
    assert (spec.label, spec.settings) == ("brand-new:strength=0.25", {"strength": 0.25})
    assert spec.method.load().__name__ == "brand_new"
    with pytest.raises(UsageError, match="unknown attack in"):
        catalogue.parse("attacks", f"{tmp_path}/mine.py:other")
    with pytest.raises(FileRefused, match="no file at"):
        catalogue.parse("attacks", f"{tmp_path}/gone.py:other")
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(FileRefused, match="not valid Python"):
        catalogue.parse("attacks", f"{tmp_path}/broken.py:other")


def test_a_new_file_needs_no_other_edit(tmp_path: Path) -> None:
    """Dropped into a copy of the house: listed, in the help, in the manifest, and under the laws."""
    for part in ("robeval", "attacks", "bounds", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attacks" / "brand_new.py").write_text(NEW_ATTACK)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def robeval(*words: str) -> str:
        run = [sys.executable, "-c", "from robeval.cli.app import main; main()", *words]
        return subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path, env=env).stdout

    assert "brand-new" in robeval("list", "attacks")
    assert "strength=0.5" in robeval("attack", "--help")
    make = (
        "from robeval.models.build import build; from robeval.models.checkpoint import save;"
        "save('m.pt', build('linear', size=8), architecture='linear', arguments={'size': 8}, normalise='none',"
        " input_shape=(1, 8, 8), classes=[str(k) for k in range(10)], recipe={}, metrics={})"
    )
    subprocess.run([sys.executable, "-c", make], check=True, cwd=tmp_path, env=env)
    robeval("attack", "m.pt", "--attack", "brand-new", "--eps", "1/16", "--images", "20", "-q", "--no-diagnose")
    manifest = json.loads(next((tmp_path / "runs").glob("*/manifest.json")).read_text())
    assert [(m["label"], m["settings"]) for m in manifest["methods"]] == [("brand-new", {"strength": 0.5})]
    laws = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "tests/laws/test_attacks.py",
    ]
    done = subprocess.run([*laws, "-k", "brand-new"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from robeval.core import catalogue; catalogue.methods('attacks');assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_numbers() -> None:
    assert radius("8/255", "linf") == 8 / 255
    assert radii("2/16, 1/16,2/16", "linf") == [1 / 16, 2 / 16]
    assert [pretty(v) for v in (8 / 255, 1 / 16, 0.1, 2.5, float("inf"))] == ["8/255", "1/16", "0.1", "2.5", "inf"]
    for text, code in (("8/0", "A02"), ("nan", "A02"), ("x", "A02"), ("-1/255", "A02"), ("8", "A03"), ("1e999", "A02")):
        with pytest.raises(UsageError) as caught:
            radius(text, "linf")
        assert caught.value.code == code
    assert number("1e-3") == 1e-3
