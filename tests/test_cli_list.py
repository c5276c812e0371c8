"""``robeval list``: what a terminal of 80 columns shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from robeval.core import catalogue
from tests.command import here


@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_names_and_settings_stand_unbroken_in_80_columns(kind: str, tmp_path: Path) -> None:
    code, out, err = here("list", kind, cwd=tmp_path, columns=80)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names[: len(catalogue.methods(kind))] == list(catalogue.methods(kind))
    words = {word.rstrip(",;") for word in out.split()}
    for method in catalogue.methods(kind).values():
        assert {f"{s.name}={s.default}" for s in method.settings if " " not in str(s.default)} <= words


def test_each_suite_names_its_attacks(tmp_path: Path) -> None:
    _, out, _ = here("list", "suites", cwd=tmp_path, columns=80)
    assert "attacks: apgd-ce, apgd-t, fab-t, square" in out
