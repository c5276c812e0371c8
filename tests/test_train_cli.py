"""``robeval train`` end to end on digits, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from robeval.cli import train as command
from robeval.cli.train import spec_of
from robeval.core import catalogue
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.models.load import load as load_model
from robeval.train.job import Job, run_job
from robeval.train.recipe import Recipe


def small(text: str, split: str) -> Images:
    images = load_images(text, split)
    return images[torch.arange(160)]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command as a function, on 160 digits and one epoch of large batches, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robeval.data.load.load", small)

    def call(method: str, **options: Any) -> None:
        command.train(method, **{"epochs": 1, "batch_size": 80, "eps": "2/16", "json": True, **options})

    return call


def test_train_resume_and_load(quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adv.pt"
    quick("adv", setting=["steps=2"], model_arg=["act=smooth"], out=out, epochs=2)
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == str(out)
    assert document["steps"] == 4
    assert document["resumed"] == "no"
    assert document["metrics"]["forward_per_step"] == 3
    assert (tmp_path / "adv.pt.train" / "log.csv").is_file()
    classifier = load_model(out)
    assert classifier.info["architecture"] == "digits_cnn"
    assert classifier.info["arguments"]["act"] == "smooth"
    recipe = classifier.info["recipe"]
    assert recipe["method"] == "adv"
    assert recipe["settings"] == {**catalogue.parse("trainers", "adv").settings, "eps": 0.125, "steps": 2}
    assert recipe["epochs"] == 2
    assert classifier.info["metrics"]["clean_accuracy"] == document["metrics"]["clean_accuracy"]
    mean = classifier.info["normalise"]["mean"][0]
    assert mean == pytest.approx(float(small("digits", "train").x.mean()), abs=1e-4)
    before = out.read_bytes()
    quick("adv", setting=["steps=2"], model_arg=["act=smooth"], out=out, epochs=2)
    again = json.loads(capsys.readouterr().out)
    assert again["resumed"] == "finished"
    assert again["metrics"] == document["metrics"]
    assert out.read_bytes() == before
    with pytest.raises(UsageError, match="used epochs 2, you gave 1"):
        quick("adv", setting=["steps=2"], model_arg=["act=smooth"], out=out)
    quick("adv", setting=["steps=2"], model_arg=["act=smooth"], out=out, fresh=True)
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_init_from_and_the_words_on_the_screen(quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick("standard", out=tmp_path / "standard.safetensors", json=False)
    said = capsys.readouterr()
    assert "held out: clean" in said.out
    assert "next: robeval attack" in said.err
    assert str(tmp_path / "standard.safetensors.train" / "log.csv") in said.err.replace("\n", "")
    quick("soar:init=pgd1", init_from=str(tmp_path / "standard.safetensors"), out=tmp_path / "soar.pt")
    soar = json.loads(capsys.readouterr().out)
    assert "FROM_SCRATCH" not in [w["code"] for w in soar["warnings"]]
    assert (soar["metrics"]["forward_per_step"], soar["metrics"]["backward_per_step"]) == (3, 4)
    quick("soar:init=zero", out=tmp_path / "bare.pt")
    assert {"FROM_SCRATCH", "RISKY_SETTING"} <= {w["code"] for w in json.loads(capsys.readouterr().out)["warnings"]}
    with pytest.raises(UsageError, match="disagree"):
        quick("soar", init_from=str(tmp_path / "standard.safetensors"), model_arg=["act=smooth"], out=tmp_path / "x.pt")


def test_a_model_for_other_images_is_refused(quick: Any, tmp_path: Path) -> None:
    quick("standard", out=tmp_path / "standard.pt")
    three = Images(torch.rand(20, 3, 8, 8), torch.arange(20) % 10, torch.arange(20), "t", [str(i) for i in range(10)])
    job = Job(catalogue.parse("trainers", "standard"), Recipe(epochs=1), tmp_path / "y.pt", init_from="standard.pt")
    with pytest.raises(ContractBroken, match="takes images"):
        run_job(job, three)


@pytest.mark.parametrize(
    "method, options, sentence",
    [
        ("sqar", {}, "did you mean soar"),
        ("adv", {"setting": ["stepps=3"]}, "did you mean"),
        ("adv", {"norm": "l1"}, "does not support l1"),
        ("adv", {"norm": "l3"}, "unknown norm"),
        ("adv", {"eps": "8"}, "did you mean 8/255"),
        ("standard", {"eps": "8/0"}, "divides by zero"),
        ("standard", {"optimizer": "sdg"}, "did you mean sgd"),
        ("standard", {"schedule": "cosin"}, "did you mean cosine"),
        ("standard", {"lr": "fast"}, "lr must be a number"),
        ("standard", {"out": Path("model.onnx")}, "must end in .pt"),
        ("standard", {"weights": "hee"}, "unknown initial weights"),
        ("soar", {"setting": ["samples=0"]}, "at least 1"),
    ],
)
def test_bad_words_get_one_sentence_and_leave_nothing(
    quick: Any, tmp_path: Path, method: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        quick(method, **options)
    assert not list(tmp_path.glob("*.pt"))


def test_norm_eps_and_settings_reach_the_method() -> None:
    spec, eps = spec_of("adv", "l2", "1/2", {"steps": "3"})
    assert (spec.settings["norm"], spec.settings["eps"], spec.settings["steps"], eps) == ("l2", 0.5, 3, 0.5)
    spec, eps = spec_of("adv:eps=4/255", "linf", "8/255", {})
    assert spec.settings["eps"] == eps == 4 / 255
    spec, eps = spec_of("fd-grad", "l1", "0.5", {})
    assert (spec.settings["norm"], eps) == ("l1", 0.5)
    spec, eps = spec_of("standard", "l2", "0.5", {})
    assert (spec.settings, eps) == ({}, 0.5)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['robeval', 'train', '--help']\n"
        "from robeval.cli.app import app\n"
        "try: app(prog_name='robeval')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    for word in ("--init-from", "--hold-out", "soar", "fd-grad", "Training loop", "Examples"):
        assert word in done.stdout
