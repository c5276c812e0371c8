"""Suites by name and from files, and what runs on few classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from robeval.core.ball import NORMS
from robeval.core.catalogue import parse
from robeval.core.choosing import for_classes
from robeval.core.errors import FileRefused, UsageError
from robeval.evaluate.settings import plan
from robeval.evaluate.suites import SUITES, suite


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SUITES)
def test_every_suite_reads_in_every_norm(name: str, norm: str) -> None:
    if name in ("soar", "rat", "sgr", "finlay", "quick", "white-box", "black-box", "minimal-norm", "full"):
        specs, left_out, _ = suite(name, norm)
        assert specs
        assert all(norm in s.method.facts["norms"] for s in specs)
        assert not set(left_out) & {s.label for s in specs}
    else:
        specs, left_out, each = suite(name, norm)
        assert not left_out  # AutoAttack exists in all three norms
        assert not each


def budget(name: str, norm: str) -> list[tuple[str, int]]:
    return [(s.label.partition(":")[0], plan(s).attempts) for s in suite(name, norm)[0]]


def test_autoattack_is_the_published_one() -> None:
    """Attacks in order with their restarts times targets, attacks.md section 4.1."""
    assert budget("autoattack", "linf") == [("apgd-ce", 1), ("apgd-t", 9), ("fab-t", 9), ("square", 1)]
    assert budget("autoattack", "l2") == budget("autoattack", "linf")
    assert budget("autoattack", "l1") == [("apgd-ce", 5), ("apgd-t", 5), ("fab-t", 9), ("square", 1)]
    assert budget("autoattack-plus", "linf") == [
        ("apgd-ce", 5), ("apgd-dlr", 5), ("fab", 5), ("square", 1), ("apgd-t", 9), ("fab-t", 9),
    ]  # fmt: skip
    assert all(not s.settings["staged"] for s in suite("autoattack-plus", "l1")[0] if s.label.startswith("apgd"))
    assert [s.settings["samples"] for s in suite("autoattack-rand", "linf")[0]] == [20, 20]
    assert [s.settings["queries"] for s in suite("autoattack", "l2")[0] if s.label == "square"] == [5000]


@pytest.mark.parametrize(
    "text, classes, label, attempts",
    [
        ("apgd-t", 10, "apgd-t", 9),
        ("apgd-t", 4, "apgd-t:targets=3", 3),
        ("apgd-t", 3, "apgd-t:loss=cw,targets=2", 2),
        ("apgd-t:steps=7", 2, "apgd-t:loss=cw,steps=7,targets=1", 1),
        ("apgd-dlr", 3, "apgd-dlr", 1),
        ("apgd-dlr", 2, "apgd-dlr:loss=cw", 1),
        ("fab-t", 3, "fab-t:targets=2", 2),
        ("pgd:loss=dlr", 2, "pgd:loss=cw", 1),
        ("apgd-ce:restarts=5", 2, "apgd-ce:restarts=5", 5),
    ],
)
def test_what_runs_on_few_classes_stands_in_its_label(text: str, classes: int, label: str, attempts: int) -> None:
    spec = for_classes(parse("attacks", text), classes)
    assert spec.label == label
    assert plan(spec).attempts == attempts
    assert spec.settings == parse("attacks", label).settings
    assert spec.config_hash == parse("attacks", label).config_hash
    assert for_classes(spec, classes) == spec


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('about = "two attacks"\nattacks = ["pgd:steps=7,restarts=2", "fgsm"]\neach = true\n')
    specs, left_out, each = suite(str(file), "l2")
    assert [s.label for s in specs] == ["pgd:restarts=2,steps=7"]
    assert left_out == ["fgsm"]
    assert each


@pytest.mark.parametrize(
    "text, told",
    [
        ("attacks = 3", "names no attacks"),
        ("attacks = []", "names no attacks"),
        ('about = "x"', "names no attacks"),
        ("attacks = [", "is not TOML"),
        ('attacks = ["pgd"]\neach = 1', "true or false"),
    ],
)
def test_files_that_are_no_suite(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(FileRefused, match=told):
        suite(str(file), "linf")


def test_unknown_names_are_answered(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="autoatack"):
        suite("autoatack", "linf")
    with pytest.raises(FileRefused, match="cannot read"):
        suite(str(tmp_path / "none.toml"), "linf")
    file = tmp_path / "mine.toml"
    file.write_text('attacks = ["pgd"]\nseed = 3\n')
    with pytest.raises(UsageError, match="seed"):
        suite(str(file), "linf")
    file.write_text('attacks = ["fgsm"]\n')
    with pytest.raises(UsageError, match="no attack of the suite"):
        suite(str(file), "l2")
