"""``robeval history`` on logs with known numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from robeval.cli.history import history as command
from robeval.core.errors import FileRefused, UsageError
from robeval.models.build import build
from robeval.models.checkpoint import save
from robeval.train.log import COLUMNS, write_log

PNG, PDF = b"\x89PNG", b"%PDF"


def trained(folder: Path, name: str, epochs: int, chosen: int, **more: Any) -> Path:
    """A model file and its log, whose accuracies are epoch / 10."""
    rows = []
    for epoch in range(1, epochs + 1):
        row: dict[str, Any] = {c: 0.25 for c in COLUMNS if "averaged" not in c and c not in ("penalty", "warnings")}
        row |= {"epoch": epoch, "seconds": 2.0, "clean_accuracy": epoch / 10, "pgd20_accuracy": epoch / 20}
        rows.append(row | {"warnings": "GRADIENT_MASKING" if epoch == 2 else ""} | more)
    write_log(folder / f"{name}.pt.train" / "log.csv", rows)
    net: nn.Module = build("linear")
    if chosen:
        save(
            folder / f"{name}.pt", net, architecture="linear", arguments={}, normalise="none", input_shape=(1, 8, 8),
            classes=[str(k) for k in range(10)], recipe={"chosen_epoch": chosen}, metrics={},
        )  # fmt: skip
    return folder / f"{name}.pt"


def test_the_chosen_epochs_on_screen_and_every_epoch_in_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = trained(tmp_path, "a", 4, 3), trained(tmp_path, "b", 2, 0, penalty=0.5)
    command([str(a), f"{b}.train"], out=str(tmp_path / "h.png"), json=True)
    told = json.loads(capsys.readouterr().out)
    first, second = told["rows"]
    assert (first["training"], first["epoch"], first["clean"], first["PGD-20 <="]) == ("a", "3/4", 0.3, 0.15)
    assert (second["training"], second["epoch"], second["clean"], second["penalty"]) == ("b", "2/2 *", 0.2, 0.5)
    assert first["warnings"] == "GRADIENT_MASKING (epoch 2)"
    assert first["seconds"] == "8.0"
    assert told["files"] == [str(tmp_path / "h.csv"), str(tmp_path / "h.png")]
    assert (tmp_path / "h.png").read_bytes().startswith(PNG)
    with (tmp_path / "h.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["training"], r["epoch"], r["chosen"]) for r in rows] == [
        ("a", "1", "0"), ("a", "2", "0"), ("a", "3", "1"), ("a", "4", "0"), ("b", "1", "0"), ("b", "2", "0"),
    ]  # fmt: skip
    assert {"training", "chosen"} | set(COLUMNS) == set(rows[0])
    assert (rows[0]["penalty"], rows[4]["penalty"]) == ("", "0.5")


def test_a_folder_a_log_and_a_pdf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = trained(tmp_path, "a", 2, 1)
    trained(tmp_path, "b", 1, 1)
    command([str(tmp_path)], csv=str(tmp_path / "all.csv"))
    said = capsys.readouterr()
    assert "Chosen epochs" in said.out and "2/2" not in said.out
    assert "all.csv" in said.err
    with (tmp_path / "all.csv").open() as file:
        assert [r["training"] for r in csv.DictReader(file)] == ["a", "a", "b"]
    command([str(a), f"{a}.train/log.csv"], out=str(tmp_path / "h.pdf"), json=True)
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1  # the same training once
    assert (tmp_path / "h.pdf").read_bytes().startswith(PDF)


def test_two_trainings_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        trained(tmp_path / name, "adv", 1, 1)
    command([str(tmp_path / "x"), str(tmp_path / "y")], json=True)
    assert [r["training"] for r in json.loads(capsys.readouterr().out)["rows"]] == ["x/adv", "y/adv"]


def test_the_same_logs_give_the_same_plot(tmp_path: Path) -> None:
    a = trained(tmp_path, "a", 3, 2, averaged_clean_accuracy=0.5, averaged_pgd20_accuracy=0.4)
    for name in ("one.png", "two.png"):
        command([str(a)], out=str(tmp_path / name), quiet=True)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_bad_input_gets_one_sentence(tmp_path: Path) -> None:
    a = trained(tmp_path, "a", 2, 1)
    with pytest.raises(UsageError, match=r"must end in .png or .pdf"):
        command([str(a)], out="h.svg")
    with pytest.raises(FileRefused, match="no training log at nowhere"):
        command(["nowhere"])
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    with pytest.raises(FileRefused, match="no column epoch"):
        command([str(tmp_path / "other.csv")])
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(FileRefused, match="not the log of a training"):
        command([str(tmp_path / "empty.csv")])
    (tmp_path / "bare.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(FileRefused, match="no finished epoch"):
        command([str(tmp_path / "bare.csv")])
    command([str(a)], csv=str(tmp_path / "merged.csv"), quiet=True)
    trained(tmp_path, "b", 2, 1)
    command([str(tmp_path)], csv=str(tmp_path / "merged.csv"), quiet=True)
    with pytest.raises(FileRefused, match="several trainings"):
        command([str(tmp_path / "merged.csv")])
