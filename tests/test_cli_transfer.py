"""The command transfer: matrix, tables and runs in one go, and bad words refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from robeval.core.errors import RobevalError
from tests.problems import trained


def command(*words: str) -> tuple[str, BaseException | None]:
    """Runs the command's function as the command line does, in this process: stdout, and what it raised."""
    from robeval.cli.transfer import transfer

    app = typer.Typer()
    app.command()(transfer)
    result = CliRunner().invoke(app, list(words))
    return result.stdout, result.exception


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [
        str(trained(folder / "cnn.pt", "digits_cnn")),
        str(trained(folder / "mlp.pt", "mlp")),
    ]


def test_the_command_writes_matrix_runs_and_both_tables(files: list[str], tmp_path: Path) -> None:
    from robeval.cli.verify import verify as verify_command

    out = str(tmp_path / "runs")
    words = (*files, "--attack", "pgd:steps=5", "--eps", "2/16", "--images", "40", "--out", out)
    text, error = command(*words, "--json", "--table", str(tmp_path / "paper" / "matrix"))
    assert error is None
    document = json.loads(text)
    clean, cnn, mlp = document["rows"]
    for name, own, borrowed in (("on cnn <=", cnn, mlp), ("on mlp <=", mlp, cnn)):
        assert own[name]["k"] < borrowed[name]["k"] <= clean[name]["k"]  # the own gradient is the stronger one
    frame = pd.read_csv(tmp_path / "paper" / "matrix.csv")
    assert frame["on mlp <= k"].tolist() == [r["on mlp <="]["k"] for r in document["rows"]]
    assert r"\toprule" in (tmp_path / "paper" / "matrix.tex").read_text()
    assert document["files"] == [str(tmp_path / "paper" / f"matrix.{e}") for e in ("csv", "tex")]
    text, error = command(*words, "-q", "--format", "markdown")
    assert error is None
    assert "| crafted on | on cnn &lt;= | on mlp &lt;= |" in text
    app = typer.Typer()
    app.command()(verify_command)
    result = CliRunner().invoke(app, [out, "--json"])
    assert result.exit_code == 0
    checked = json.loads(result.stdout)
    assert sum(r["confirmed"] for r in checked) == document["verified"] > 0


@pytest.mark.parametrize(
    "words, code",
    [
        (["one.pt", "--eps", "1/16"], "A04"),
        (["a.pt", "b.pt", "--eps", "1/16", "--format", "docx"], "A04"),
        (["a.pt", "b.pt", "--eps", "1/16", "--attack", "deepfool", "--norm", "l2"], "A06"),
        (["a.pt", "b.pt", "--eps", "1/16", "--norm", "l3"], "A04"),
        (["a.pt", "b.pt", "--eps", "8"], "A03"),
        (["a.pt", "b.pt", "--eps", "1/16"], "M01"),
    ],
)
def test_bad_words_are_refused_before_any_work(words: list[str], code: str, tmp_path: Path) -> None:
    text, error = command(*words, "--out", str(tmp_path / "runs"))
    assert isinstance(error, RobevalError)
    assert error.code == code
    assert text == ""
    assert not (tmp_path / "runs").exists()
