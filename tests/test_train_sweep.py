"""``robeval sweep`` on digits: grids, files of trainings, resume, divergence, and the summary."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from robeval.cli.app import app
from robeval.core.errors import FileRefused, Incomplete, UsageError
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.train.fit import FitResult
from robeval.train.job import run_job
from tests.command import robeval, start

GRID = ["--epochs", "1", "--batch-size", "80", "--eps", "2/16"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command as a function of its words, on 96 digits, in an empty folder. -> exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robeval.data.load.load", lambda text, split: small(text, split))
    # as `robeval sweep` on the command line, where a stub stands for it otherwise
    monkeypatch.setattr("sys.argv", ["robeval", "sweep"])

    def call(*words: str) -> int:
        return int(app(["sweep", *words], standalone_mode=False) or 0)

    return call


def small(text: str, split: str) -> Images:
    return load_images(text, split)[torch.arange(96)]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_grid_over_a_setting_and_a_flag(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["adv", "--param", "steps=1,2", "--param", "lr=1e-3,1e-2", "--out", "grid", *GRID]
    sweep(*words)
    said = capsys.readouterr()
    assert "grid/summary.csv" in said.err
    held = rows(tmp_path / "grid")
    assert [(r["steps"], r["lr"]) for r in held] == [("1", "1e-3"), ("1", "1e-2"), ("2", "1e-3"), ("2", "1e-2")]
    for row in held:
        assert row["name"] == f"adv-steps={row['steps']},lr={row['lr']}"
        assert (row["method"], row["eps"], row["epoch"], row["status"]) == ("adv", "2/16", "1/1", "complete")
        assert int(row["clean n"]) == 9 and float(row["clean"]) == int(row["clean k"]) / 9
        assert 0 <= float(row["clean low"]) <= float(row["clean"]) <= float(row["clean high"]) <= 1
        assert float(row["seconds"]) > 0 and len(row["file sha256"]) == 12
    assert len({r["file sha256"] for r in held}) == 4
    assert "\\toprule" in (tmp_path / "grid" / "summary.tex").read_text()
    assert "| adv-steps=1,lr=1e-3 |" in (tmp_path / "grid" / "summary.md").read_text()
    # once more: everything is finished, nothing is trained, the summary is the same
    trained: list[FitResult] = []

    def noted(*given: Any, **named: Any) -> FitResult:
        trained.append(run_job(*given, **named))
        return trained[-1]

    monkeypatch.setattr("robeval.train.job.run_job", noted)
    sweep(*words)
    assert [r.resumed for r in trained] == ["finished"] * 4
    assert rows(tmp_path / "grid") == held
    assert "finished already" in capsys.readouterr().err
    # a training of the grid is an ordinary one
    assert sweep(*words, "--print-config") == 0
    assert 'method = "adv"' in capsys.readouterr().out


COMPARISON = """
data = "digits"
eps = "2/16"
epochs = 1
batch-size = 80
[settings]
steps = 2
[[run]]
method = "standard"
[[run]]
name = "lost"
method = "adv"
optimizer = "sgd"
lr = 1e9
[[run]]
name = "tuned"
method = "adv"
init_from = "standard"
settings = { start = "zero" }
[[run]]
name = "orphan"
method = "adv"
surrogate = "lost"
[attack]
attacks = ["fgsm", "pgd:steps=3"]
eps = "1/16,2/16"
images = 20
"""


def test_a_file_with_a_start_an_attack_and_a_training_that_diverges(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.toml").write_text(COMPARISON)
    with pytest.raises(Incomplete, match="2 of 4 trainings are missing: lost, orphan"):
        sweep("comparison.toml", "--out", "c")
    standard, lost, tuned, orphan = rows(tmp_path / "c")
    assert "diverged" in lost["status"] and lost["clean"] == ""
    assert orphan["status"] == "not started: it needs lost"
    assert (standard["status"], tuned["status"]) == ("complete", "complete")
    assert tuned["settings"] == "steps=2,start=zero"
    from robeval.models.load import load as load_model

    assert load_model(tmp_path / "c" / "tuned.pt").info["recipe"]["init_from"] == "c/standard.pt"
    for row in (standard, tuned):
        for eps in ("1/16", "2/16"):
            k, n = row[f"k/n linf {eps}"].split("/")
            assert float(row[f"worst case linf {eps} <="]) == int(k) / int(n)
            assert n == "20"
            assert float(row[f"worst case linf {eps} <= high"]) > int(k) / int(n)
        assert row["worst case linf 2/16 <="] <= row["worst case linf 1/16 <="]
    # the same command tries what is missing again, skips the rest, and says it to machines
    capsys.readouterr()
    assert sweep("comparison.toml", "--out", "c", "--json") == Incomplete.exit_code == 6
    document = json.loads(capsys.readouterr().out)
    assert list(document["failed"]) == ["lost", "orphan"]
    assert [r["name"] for r in document["rows"]] == ["standard", "lost", "tuned", "orphan"]
    # a flag wins over the file: it mends what was lost, and is told what was trained otherwise
    with pytest.raises(Incomplete, match="2 of 4 trainings are missing: standard, tuned"):
        sweep("comparison.toml", "--out", "c", "--lr", "0.01")
    assert "used lr" in capsys.readouterr().err


def test_a_killed_sweep_goes_on_in_processes_and_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["adv", "--param", "steps=1,2", "--data", "blobs:count=60", "--model", "linear", "--epochs", "5", "-q"]
    process = start("sweep", *words, "--out", "killed", cwd=tmp_path)
    second = tmp_path / "killed" / "adv-steps=2.pt.train" / "state.pt"
    while not second.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = (tmp_path / "killed" / "adv-steps=1.pt").stat().st_mtime_ns
    code, _, err = robeval("sweep", *words, "--out", "killed", "--jobs", "2", cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path / "killed" / "adv-steps=1.pt").stat().st_mtime_ns == first  # finished, so left alone
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["robeval", "sweep"])
    app(["sweep", *words, "--out", "whole"], standalone_mode=False)
    killed, whole = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    assert [(r["clean"], r["PGD-20 <="], r["epoch"]) for r in killed] == [
        (r["clean"], r["PGD-20 <="], r["epoch"]) for r in whole
    ]
    for name in ("adv-steps=1", "adv-steps=2"):
        a, b = (torch.load(tmp_path / d / f"{name}.pt", weights_only=True) for d in ("killed", "whole"))
        assert all(torch.allclose(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["adv"], "one or two parameters, got 0"),
        (["adv", "--param", "steps=1", "--param", "lr=1", "--param", "seed=1"], "one or two parameters, got 3"),
        (["adv", "--param", "steps"], "expected key=value,value"),
        (["adv", "--param", "steps="], "expected key=value,value"),
        (["adv", "--param", "steps=1", "--param", "steps=2"], "is given twice"),
        (["adv", "--param", "out=a,b"], "--param out cannot vary"),
        (["adv", "--param", "stepps=1,2"], "did you mean steps"),
        (["adv", "--param", "steps=1,two"], "steps of adv must be a number"),
        (["adv", "--param", "epochs=1,0"], "epochs must be at least 1"),
        (["advv", "--param", "steps=1"], "did you mean adv"),
        (["--param", "steps=1", "--set", "x", "adv"], "expected key=value"),
    ],
)
def test_bad_grids_get_one_sentence_and_leave_nothing(
    sweep: Any, tmp_path: Path, words: list[str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        sweep(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, place, sentence",
    [
        ("", "", "lists no trainings"),
        ("run = 3", "", "lists no trainings"),
        ('[[run]]\nlr = 1', "run 1", "names no method"),
        ('[[run]]\nmethod = "adv"\nlerning = 3', 'run 1 "adv"', 'unknown key "lerning"'),
        ('[[run]]\nmethod = "adv"\n[[run]]\nmethod = "adv"', "", 'two runs are called "adv"'),
        ('[[run]]\nname = "a/b"\nmethod = "adv"', "run 1", "cannot be called"),
        ('[[run]]\nmethod = "adv"\ninit-from = "standrd.pt"', "init-from", "unknown earlier run or file"),
        ('[[run]]\nmethod = "adv"\ninit-from = "b"\n[[run]]\nname = "b"\nmethod = "adv"', "init-from", "unknown ear"),
        ('[[run]]\nmethod = "adv"\n[settings]\nstepps = 2', "[settings]", "did you mean steps"),
        ('[[run]]\nmethod = "adv"\nsettings = {steps = "x"}', 'run 1 "adv"', "must be a number"),
        ('[[run]]\nmethod = "adv"\n[attack]\nattak = 2', "[attack]", "unknown key"),
        ('[[run]]\nmethod = "adv"\n[attack]\neps = 2', "[attack]", "neither attacks nor a suite"),
        ('[[run]]\nmethod = "adv"\n[attack]\nattacks = "pgd"', "[attack]", "must be a list"),
        ('[[run]]\nmethod = "adv"\n[attack]\nattacks = ["pdg"]', "", "did you mean pgd"),
        ('[[run]]\nmethod = "adv"\n[attack]\nsuite = "quik"', "", "did you mean quick"),
    ],
)  # fmt: skip
def test_bad_files_get_one_sentence_with_the_place_and_leave_nothing(
    sweep: Any, tmp_path: Path, text: str, place: str, sentence: str
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises((UsageError, FileRefused), match=sentence) as caught:
        sweep("bad.toml")
    assert place in caught.value.where
    assert [p.name for p in tmp_path.iterdir()] == ["bad.toml"]


def test_help_names_the_flags_it_shares(tmp_path: Path) -> None:
    code, out, _ = robeval("sweep", "--help", cwd=tmp_path)
    assert code == 0 and "--param" in out and "Every flag of robeval train" in out.replace("\n", " ")
    code, _, err = robeval("sweep", "adv", "--param", "steps=1", "--epocs", "3", cwd=tmp_path)
    assert code == 2 and "--epocs" in err


@pytest.mark.parametrize(
    "name, runs", [("fashion_mnist", 15), ("cifar10_resnet10", 5), ("sandwich_digits", 4), ("sandwich_fashion", 4)]
)
def test_the_examples_say_what_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, runs: int
) -> None:
    file = Path(__file__).parents[1] / "examples" / f"{name}.toml"
    monkeypatch.chdir(tmp_path)
    app(["sweep", str(file), "--print-config"], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.count("method = ") == runs
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_correlated_noise(tmp_path: Path) -> None:
    save_linear = "import torch; from robeval.models.build import build; from robeval.models.checkpoint import save"
    code = (
        f"{save_linear}; n = build('linear'); save('a.pt', n, architecture='linear', arguments={{}}, normalise='none',"
    )
    code += " input_shape=(1, 8, 8), classes=[str(i) for i in range(10)], recipe={}, metrics={})"
    script = Path(__file__).parents[1] / "examples" / "lrc_decay.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    for words in (["-c", code], [str(script), "a.pt", *"--data digits --images 20 --draws 3 --zeta 1 4".split()]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    with (tmp_path / "lrc_decay.csv").open() as table:
        told = list(csv.DictReader(table))
    assert [(r["model"], r["zeta"]) for r in told] == [("a", "1.0"), ("a", "4.0")]
    assert all(float(r["low"]) <= float(r["accuracy"]) <= float(r["high"]) for r in told)
    assert (tmp_path / "lrc_decay.png").stat().st_size > 1000
