"""``robeval diagnose`` and the end of ``robeval attack``, end to end on real digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robeval.reports.verdict import FOOT
from tests.command import here as robeval
from tests.problems import trained

ATTACK = ("--attack", "pgd:steps=3", "--eps", "2/16", "--images", "24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    place = tmp_path_factory.mktemp("diagnose")
    trained(place / "m.pt", "mlp", hidden=32)
    return place


def test_an_attack_ends_with_its_diagnosis(folder: Path) -> None:
    code, out, err = robeval("attack", "m.pt", *ATTACK, "--out", "a", cwd=folder)
    assert code == 0, err
    flat = " ".join(out.split())
    assert "robust accuracy <= " in flat
    assert "Linf eps 2/16; diagnostics: quick, " in flat
    assert FOOT in flat
    code, out, err = robeval("attack", "m.pt", *ATTACK, "--out", "a", "--json", cwd=folder)  # finds all done
    assert code == 0, err
    document = json.loads(out)
    assert document["headlines"][0].startswith("robust accuracy <= ")
    assert "tests" in document["diagnostics"]
    code, out, err = robeval("table", "a", cwd=folder)
    assert code == 0, err
    assert FOOT in " ".join(out.split())
    code, _, err = robeval("verify", "a", "-q", cwd=folder)
    assert code == 0, err


def test_a_number_without_diagnosis_says_so_everywhere(folder: Path) -> None:
    code, out, err = robeval("attack", "m.pt", *ATTACK, "--no-diagnose", "--out", "b", cwd=folder)
    assert code == 0, err
    assert "diagnostics: not run)" in " ".join(out.split())
    code, _, err = robeval("table", "b", cwd=folder)
    assert code == 2
    assert "error[T06]" in err
    code, out, err = robeval("table", "b", "--allow-undiagnosed", "--format", "markdown", cwd=folder)
    assert code == 0, err
    assert "m †" in out
    assert "diagnostics not run" in out


def test_diagnose_prints_rows_verdict_and_foot(folder: Path) -> None:
    words = ("diagnose", "m.pt", "--eps", "2/16", "--images", "24", "--out", "c")
    code, out, err = robeval(*words, cwd=folder)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("robust accuracy <= ")
    assert lines[2].startswith("Diagnostics (quick, 24 images, ")
    assert [line.split()[0] for line in lines[4:8]] == ["D1", "D2", "D3", "D4"]
    assert FOOT in lines
    code, out, err = robeval(*words, "--json", cwd=folder)
    document = json.loads(out)
    assert document["foot"] == FOOT
    assert document["verdict"] in (2, 3, 4)
    assert {t["id"] for t in document["tests"]} >= {f"D{k}" for k in range(1, 11)} | {"K9", "X7"}
    code, _, err = robeval("diagnose", "m.pt", "--eps", "1/16,2/16", cwd=folder)
    assert (code, "error[A04]" in err) == (2, True)


SOFTMAX = """
from torch import nn

def probabilities():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))
"""


def test_a_broken_contract_stops_an_attack_and_is_diagnosed(folder: Path) -> None:
    import torch
    from torch import nn

    (folder / "soft.py").write_text(SOFTMAX)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))
    torch.save(net.state_dict(), folder / "soft.pt")
    model = ("soft.pt", "--arch", "soft.py:probabilities", "--eps", "1/16", "--images", "24", "--out", "d")
    code, _, err = robeval("attack", *model, "--attack", "pgd:steps=3", cwd=folder)
    assert code == 4
    assert not (folder / "d").exists()
    code, out, err = robeval("diagnose", *model, "--fail-on", "failed", "--json", cwd=folder)
    assert code == 7, err
    document = json.loads(out[: out.rindex('{"error"')])
    assert document["verdict"] == 1
    assert document["text"].startswith("NOT USABLE: ")
    assert "D3 the outputs look like probabilities" in document["text"]


def test_list_diagnostics(folder: Path) -> None:
    code, out, err = robeval("list", "diagnostics", "--json", cwd=folder)
    assert code == 0, err
    assert json.loads(out)["repeatability"]["question"] == "same answer twice?"
