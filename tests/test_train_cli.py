"""``robeval train`` end to end on digits, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from robeval.cli import train as command
from robeval.core import catalogue
from robeval.core.errors import ContractBroken, FileRefused, UsageError
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.models.load import load as load_model
from robeval.train.job import Job, run_job
from robeval.train.orders import Order, from_file, layer, to_toml
from robeval.train.preset import resolve
from robeval.train.recipe import Recipe


def asked(**told: Any) -> Order:
    """What a command line alone comes to."""
    return resolve([layer("command line", told)])


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
    order = asked(method="adv", norm="l2", eps="1/2", settings={"steps": "3"})
    settings = order.spec.settings
    assert (settings["norm"], settings["eps"], settings["steps"], order.eps) == ("l2", 0.5, 3, "1/2")
    order = asked(method="adv:eps=4/255", eps="8/255")
    assert (order.spec.settings["eps"], order.eps) == (4 / 255, "4/255")
    order = asked(method="fd-grad", norm="l1", eps=0.5)
    assert (order.spec.settings["norm"], order.eps) == ("l1", "0.5")
    order = asked(method="standard", norm="l2", eps=0.5)
    assert (order.spec.settings, order.eps) == ({}, "0.5")
    assert asked(method="soar-snapshot-2020").eps == "0.03"
    assert asked(method="soar-snapshot-2020", eps="8/255").eps == "8/255"


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


def test_each_layer_wins_over_the_one_before(
    quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(
        'method = "adv"\nlr = 0.5\nbatch-size = 32\nmomentum = 0.7\n[settings]\nsteps = 3\nstart = "zero"\n'
    )
    monkeypatch.setenv("ROBEVAL_TRAIN_BATCH_SIZE", "16")
    monkeypatch.setenv("ROBEVAL_TRAIN_SEED", "5")
    command.train(config=tmp_path / "mine.toml", setting=["steps=4"], seed="0", print_config=True)
    told = capsys.readouterr().out
    (tmp_path / "resolved.toml").write_text(told)
    resolved = from_file(tmp_path / "resolved.toml")
    assert [resolved[k] for k in ("lr", "momentum", "batch-size", "seed", "epochs")] == [0.5, 0.7, 16, 0, 20]
    assert (resolved["settings"]["steps"], resolved["settings"]["start"]) == (4, "zero")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    command.train(config=tmp_path / "resolved.toml", print_config=True)
    assert capsys.readouterr().out == told  # nothing is lost on the way
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("method, awp", [("awp-adv", (0.01, 0)), ("awp-trades", (0.005, 10)), ("awp-mart", (0.005, 0))])
def test_awp_names_set_the_perturbation_unless_it_is_given(method: str, awp: tuple[float, int]) -> None:
    order = asked(method=method)
    assert (order.method, order.awp, order.awp_warmup) == (method.removeprefix("awp-"), *awp)
    assert order.out == f"{method}.pt"
    assert order.label == method
    given = asked(method=f"{method}:steps=3", awp="0.02")
    assert (given.awp, given.awp_warmup, given.label) == (0.02, awp[1], f"{method}:steps=3")


def test_the_new_settings_of_the_loop_reach_the_model_file(
    quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick("standard", out="s.pt", epochs=2)
    more = {"average": "ema", "average_decay": "0.5", "clip_gradient": "1", "surrogate": "s.pt"}
    quick("awp-adv:steps=1", out="a.pt", select_from="test", json=False, **more)
    said = capsys.readouterr()
    assert "test-selected (optimistic): clean" in said.out
    assert "warning[TEST_SELECTED]" in said.err
    info = load_model(tmp_path / "a.pt").info
    recipe = info["recipe"]
    assert [recipe[k] for k in ("awp", "average", "average_decay", "clip_gradient")] == [0.01, "ema", 0.5, 1.0]
    assert (recipe["metrics_on"], recipe["metrics_images"]) == ("test-selected (optimistic)", 160)
    assert {"transfer_accuracy", "averaged_pgd20_accuracy"} <= set(info["metrics"])
    said_accuracy = f"clean {info['metrics']['averaged_clean_accuracy']:.1%}"
    assert said_accuracy in said.out  # of the weights in the file, which are the averaged ones
    quick("adv:steps=1", out="b.pt")
    recipe = load_model(tmp_path / "b.pt").info["recipe"]
    assert (recipe["metrics_on"], recipe["metrics_images"]) == ("held-out training images", 16)


@pytest.mark.parametrize(
    "text, place, sentence",
    [
        ("epocs = 3", "mine.toml", 'unknown key "epocs"; did you mean epochs'),
        ("epochs = 2.5", "mine.toml", "epochs must be a whole number, got '2.5'"),
        ("epochs = [1]", "mine.toml", "epochs must be text, a number, true or false"),
        ("settings = 3", "mine.toml", "settings must be a table"),
        ("[settings]\nstepps = 3", "mine.toml", "did you mean steps"),
        ("[settings]\nsteps = 'many'", "mine.toml", "steps of adv must be a number"),
        ("[settings]\nstart = 'nowhere'", "mine.toml", "unknown start of adv"),
        ("preset = 'saor'", "", "did you mean soar"),
        ("preset = 'finlay'\nmethod = 'trades'", "", "does not train trades"),
        ("average = 'mean'", "", "unknown average"),
        ("average-decay = 2", "", "must lie in"),
    ],
)
def test_bad_files_are_told_with_their_name(quick: Any, tmp_path: Path, text: str, place: str, sentence: str) -> None:
    (tmp_path / "mine.toml").write_text('method = "adv"\n'[: 0 if "method" in text else None] + text)
    with pytest.raises(UsageError, match=sentence) as caught:
        quick(None, config=tmp_path / "mine.toml")
    assert place in caught.value.where
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_files_and_variables_that_cannot_be_read(quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileRefused, match="cannot read"):
        quick("adv", config=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(FileRefused, match="is not TOML"):
        quick("adv", config=tmp_path / "bad.toml")
    with pytest.raises(UsageError, match="no method named"):
        quick(None)
    with pytest.raises(UsageError, match="expected key=value"):
        quick("adv", setting=["steps"])
    monkeypatch.setenv("ROBEVAL_TRAIN_EPOX", "3")
    with pytest.raises(UsageError, match="did you mean epochs") as caught:
        quick("adv")
    assert "ROBEVAL_TRAIN" in caught.value.where


def test_text_numbers_and_nothing_survive_a_file() -> None:
    order = asked(method="trades", lr="1/3", eps="0.031", settings={"step-size": "2/255", "beta": 1.5}, data='a"b\\c')
    told = tomllib.loads(to_toml(order))
    again = resolve([layer("file", told)])
    assert (again.lr, again.eps, again.data, again.spec) == (1 / 3, "0.031", 'a"b\\c', order.spec)
    none = asked(method="mma", settings={"d_max": "none"})
    assert resolve([layer("file", tomllib.loads(to_toml(none)))]).spec == none.spec
