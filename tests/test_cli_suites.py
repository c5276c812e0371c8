"""AutoAttack on few classes, transfer, comparison, curve, dry run and search precision, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robeval.data.load import load
from robeval.models.build import build
from robeval.models.checkpoint import save
from robeval.store.runstore import RunStore
from tests.command import here as robeval
from tests.problems import trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits models of a few seconds each."""
    home = tmp_path_factory.mktemp("models")
    trained(home / "cnn.pt", "digits_cnn")
    trained(home / "mlp.pt", "mlp")
    trained(home / "wide.pt", "mlp", hidden=96)
    return home


def few(home: Path, classes: int) -> tuple[Path, Path]:
    """A model of the first digits alone, and their test images as an archive."""
    torch.manual_seed(0)
    train, test = load("digits", "train"), load("digits", "test")
    arguments = {"classes": classes, "hidden": 16}
    net = build("mlp", **arguments)
    mine = train.y < classes
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.x[mine]), train.y[mine]).backward()
        optimizer.step()
    names = [str(k) for k in range(classes)]
    model = save(
        home / f"few{classes}.pt", net, architecture="mlp", arguments=arguments, normalise="none",
        input_shape=(1, 8, 8), classes=names, recipe={}, metrics={},
    )  # fmt: skip
    here = test.y < classes
    np.savez(home / f"few{classes}.npz", x=test.x[here].numpy(), y=test.y[here].numpy())
    return model, home / f"few{classes}.npz"


@pytest.mark.parametrize(
    "classes, ran",
    [
        (2, ["apgd-ce", "apgd-t:loss=cw,targets=1", "fab-t:targets=1", "square"]),
        (3, ["apgd-ce", "apgd-t:loss=cw,targets=2", "fab-t:targets=2", "square"]),
    ],
)
def test_autoattack_on_few_classes_runs_through_and_says_how(tmp_path: Path, classes: int, ran: list[str]) -> None:
    model, data = few(tmp_path, classes)
    code, out, err = robeval(
        "attack", str(model), "--no-diagnose", "--suite", "autoattack", "--data", f"npz:{data}", "--eps", "0.3",
        "--images", "12", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert f"with {classes} classes apgd-t runs as {ran[1]}" in err
    assert "re-verified" in err
    (run,) = (tmp_path / "runs").iterdir()
    store = RunStore.open(run)
    assert [m["label"] for m in store.manifest()["methods"]] == ran
    frame = store.frame()
    assert set(frame["attack"]) <= {"clean", *ran}
    assert frame.loc[frame["attack"] != "clean", "success"].any()
    for label in ran:
        assert label in out


def test_a_matrix_of_three_models_as_csv_and_latex_in_one_command(folder: Path, tmp_path: Path) -> None:
    models = [str(folder / f"{name}.pt") for name in ("cnn", "mlp", "wide")]
    words = [
        "transfer",
        *models,
        "--attack",
        "pgd:steps=5",
        "--eps",
        "2/16",
        "--images",
        "40",
        "--table",
        "matrix",
        "-q",
    ]
    code, out, err = robeval(*words, cwd=tmp_path)
    assert code == 0, err
    with (tmp_path / "matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) >= 4
    assert "tabular" in (tmp_path / "matrix.tex").read_text()
    assert all(name in out for name in ("cnn", "mlp", "wide"))
    code, again, err = robeval(*words, cwd=tmp_path)
    assert code == 0, err
    assert again.splitlines()[:6] == out.splitlines()[:6]  # the same numbers; the notes below tell seconds
    one = ["attack", models[0], "--transfer-from", models[1], "--attack", "pgd:steps=5", "--eps", "2/16"]
    code, out, err = robeval(*one, "--images", "40", "--out", "one", cwd=tmp_path)
    assert code == 0, err
    assert "transfer:mlp/pgd:steps=5" in out
    assert "re-verified" in err


def test_two_tools_compared_image_by_image(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack", reason="needs the extra robeval[reference]")
    model, words = str(folder / "cnn.pt"), ["--eps", "2/16", "--images", "30", "-q"]
    for name, attack in (("a", "apgd-ce:steps=20"), ("b", "pyautoattack:apgd-ce,steps=20")):
        code, _, err = robeval(
            "attack", model, "--no-diagnose", "--attack", attack, *words, "--out", name, cwd=tmp_path
        )
        assert code == 0, err
    (ours,), (theirs,) = (list((tmp_path / name).iterdir()) for name in "ab")
    code, out, err = robeval("compare", str(ours), str(theirs), cwd=tmp_path)
    assert code == 0, err
    assert "McNemar" in out
    code, out, err = robeval("compare", str(ours), str(theirs), "--json", cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)


def test_a_curve_from_one_run(folder: Path, tmp_path: Path) -> None:
    words = ["--attack", "fmn:steps=20", "--attack", "pgd:steps=5", "--eps", "1/16,2/16", "--each", "--images", "30"]
    code, _, err = robeval("attack", str(folder / "cnn.pt"), "--no-diagnose", *words, "-q", cwd=tmp_path)
    assert code == 0, err
    code, _, err = robeval("curve", "runs", "--out", "curve.png", cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = [float(r["robust"]) for r in rows]
    assert len(rows) > 10
    assert shares == sorted(shares, reverse=True)


def test_a_dry_run_tells_the_bill_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    words = [
        "attack",
        str(folder / "cnn.pt"),
        "--no-diagnose",
        "--suite",
        "autoattack",
        "--eps",
        "2/16",
        "--images",
        "20",
        "--dry-run",
    ]
    code, out, err = robeval(*words, cwd=tmp_path)
    assert code == 0, err
    assert "if all of them stand" in out
    assert not list(tmp_path.iterdir())
    code, out, _ = robeval(*words, "--json", cwd=tmp_path)
    bill = json.loads(out)
    # attacks.md 4.8: a robust image costs the reference 7,857 forwards and 1,910 backwards.
    assert bill["backwards_per_image"] == 100 + 9 * 100 + 9 * 100
    white = 101 + 9 * 101 + 9 * 200
    assert white + 2000 < bill["forwards_per_image"] <= white + 5001  # Square skips proposals that change nothing


def test_a_search_in_half_precision_is_judged_in_full(folder: Path, tmp_path: Path) -> None:
    words = [
        "attack",
        str(folder / "cnn.pt"),
        "--no-diagnose",
        "--attack",
        "pgd:steps=5",
        "--eps",
        "2/16",
        "--images",
        "40",
        "-q",
    ]
    code, _, err = robeval(*words, "--precision", "bfloat16", cwd=tmp_path)
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert RunStore.open(run).manifest()["settings"]["precision"] == "bfloat16"
    assert robeval("verify", "runs", "-q", cwd=tmp_path)[0] == 0
    code, _, err = robeval(*words, "--precision", "float8", cwd=tmp_path)
    assert (code, "unknown precision" in err) == (2, True)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--suite", "black-box"], "--suite does not go with --transfer-from"),
        (["--dry-run"], "--dry-run does not go with --transfer-from"),
        (["--attack", "square"], "no transfer form"),
    ],
)
def test_transfer_says_what_does_not_go_together(folder: Path, tmp_path: Path, words: list[str], told: str) -> None:
    code, _, err = robeval(
        "attack",
        str(folder / "cnn.pt"),
        "--transfer-from",
        str(folder / "mlp.pt"),
        "--eps",
        "0.1",
        *words,
        cwd=tmp_path,
    )
    assert code == 2
    assert told in err
    assert not list(tmp_path.iterdir())


NOISY = """
import torch
from torch import nn
from robeval.models.build import build

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build("digits_cnn")

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))

def noisy():
    return Noisy()
"""


def test_a_model_that_answers_at_random(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    saved = torch.load(folder / "cnn.pt", weights_only=True)["state_dict"]
    prefix = "" if next(iter(saved)).startswith("net.") else "net."
    state = {prefix + key: value for key, value in saved.items()}
    torch.save(state, tmp_path / "random.pt")
    words = ["attack", "random.pt", "--no-diagnose", "--arch", "noisy.py:noisy", "--eps", "3/16", "--images", "10"]
    code, _, err = robeval(*words, "-q", cwd=tmp_path)
    assert code == 4
    assert "between two runs" in err
    assert "--randomised" in err
    code, out, err = robeval(*words, "--randomised", cwd=tmp_path)
    assert code == 0, err
    assert "apgd-dlr:samples=20" in out
    assert "re-verified" in err
    (run,) = (tmp_path / "runs").iterdir()
    store = RunStore.open(run)
    assert store.manifest()["settings"]["randomised"] is True
    frame = store.frame()
    assert frame.loc[frame["attack"] == "apgd-ce:samples=20", "success"].any()
    assert robeval("verify", "runs", cwd=tmp_path)[0] == 0  # another draw may differ; that is no fault
