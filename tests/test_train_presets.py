"""The papers' own trainings: every preset resolves to the paper's numbers, and its small size runs the same code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robeval.cli import list_ as listing
from robeval.cli import train as command
from robeval.core import catalogue
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.models.build import fit as fitted_arguments
from robeval.train.augment import read as read_augmentation
from robeval.train.orders import Order, layer
from robeval.train.preset import find, notes, presets, resolve, unwrapped
from robeval.train.recipe import Recipe

TRAINERS = catalogue.methods("trainers")
PAIRS = [(p.name, m) for p in presets().values() for m in p.methods]
#: Methods may lie outside the house; a preset of a method that is not there is not offered.
THERE = [(p, m) for p, m in PAIRS if unwrapped(m)[1] in TRAINERS]
ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"norm": "l2"},
    {"data": "svhn"},
    {"data": "mnist5k"},
    {"data": "cifar100"},
    {"tiny": True},
)


def asked(**told: Any) -> Order:
    return resolve([layer("command line", told)])


def test_there_are_the_four_papers_and_their_own_methods() -> None:
    assert set(presets()) == {"soar", "rat", "sgr", "finlay"}
    assert {("soar", "soar"), ("finlay", "fd-grad"), ("soar", "standard"), ("finlay", "adv")} <= set(THERE)


@pytest.mark.parametrize("preset, method", THERE)
def test_every_preset_resolves_under_every_condition(preset: str, method: str) -> None:
    norms = TRAINERS[unwrapped(method)[1]].facts["norms"]
    for more in ASKED:
        if more.get("norm", "linf") in (norms or ("linf", "l2")):
            order = asked(method=method, preset=preset, **more)
            names = [n for n in Recipe.__dataclass_fields__ if n not in ("norm", "eps")]
            Recipe(**{n: getattr(order, n) for n in names}, norm=order.norm)
            read_augmentation(order.augment)
            shape = (1, 8, 8) if order.tiny else (1, 28, 28) if order.data == "mnist5k" else (3, 32, 32)
            fitted_arguments(order.model, shape, 10, order.model_arg)
            assert notes(order, method)


@pytest.mark.parametrize(
    "preset, method, more, expected, settings",
    [
        # SOAR E.2, E.7: lr 0.004, a tenth from epoch 100, 200 epochs; on SVHN stopped at 130
        ("soar", "soar", {}, {"lr": 0.004, "epochs": 200, "schedule": "milestones:100", "weight_decay": 2e-4,
                              "model": "resnet10_nobn", "normalise": "none"}, {"h": 0.01, "clip": 10}),
        ("soar", "soar", {"data": "svhn:/data"}, {"epochs": 130, "lr": 0.004}, {}),
        ("soar", "trades", {}, {"epochs": 120, "schedule": "milestones:74/89/99"}, {"beta": 9.0, "step_size": 2 / 255}),
        ("soar", "adv", {"norm": "l2"}, {"eps": "1.74"}, {"step_size": 0.44, "l2_init": "image", "eps": 1.74}),
        ("rat", "awp-trades", {}, {"awp": 0.005, "awp_warmup": 10, "lr": 0.1, "weight_decay": 5e-4,
                                   "schedule": "milestones:99/149"}, {"beta": 6.0, "eps": 8 / 255}),
        ("rat", "awp-adv", {"data": "svhn"}, {"awp": 0.01, "awp_warmup": 5, "lr": 0.01}, {"step_size": 1 / 255}),
        ("rat", "trades", {"norm": "l2"}, {"eps": "128/255"}, {"step_size": 15 / 255}),
        ("finlay", "fd-grad", {}, {"augment": "crop-flip:pad=128/255,width=4,cutout=16", "lr": 0.1, "epochs": 200,
                                   "schedule": "milestones:60/120/160x0.2"}, {"weight": 0.1, "h": 0.01}),
        ("finlay", "tulip", {}, {"weight_decay": 5e-4}, {"batchnorm": "train"}),
        ("finlay", "grad-l2", {}, {}, {"grad_norm": "l2", "batchnorm": "train"}),
        ("sgr", "standard", {}, {"optimizer": "adam", "lr": 1e-3, "epochs": 50, "eps": "4/255",
                                 "normalise": "per-image", "model_arg": {"width": "cifar"}}, {}),
        ("sgr", "standard", {"data": "mnist5k"}, {"eps": "32/255", "model_arg": {"width": "mnist"}}, {}),
    ],
)  # fmt: skip
def test_numbers_of_the_papers(
    preset: str, method: str, more: dict[str, str], expected: dict[str, Any], settings: dict[str, Any]
) -> None:
    order = asked(method=method, preset=preset, **more)
    assert {k: getattr(order, k) for k in expected} == expected
    assert {k: order.spec.settings[k] for k in settings} == settings


@pytest.mark.parametrize(
    "more, weight",
    [
        ({}, 0.1),
        ({"settings": {"source": "sign"}}, 0.5),
        ({"settings": {"source": "pgd"}, "eps": 8 / 255}, 0.35),
        ({"settings": {"source": "fgsm"}, "data": "mnist:/data"}, 0.5),
        ({"settings": {"source": "sign"}, "data": "mnist5k"}, 1.0),
        ({"settings": {"source": "lrc"}}, 5.0),
        ({"method": "sgr-cifar-sign"}, 0.5),
        ({"method": "sgr-mnist-sign"}, 1.0),
        ({"settings": {"source": "sign", "weight": 0.7}}, 0.7),
    ],
)
def test_lambda_of_sgr_follows_source_radius_and_data(more: dict[str, Any], weight: float) -> None:
    assert asked(**{"method": "sgr", "preset": "sgr", **more}).spec.settings["weight"] == weight


def test_what_the_user_gives_wins_and_the_small_size_shrinks_the_schedule() -> None:
    order = asked(method="soar:h=0.1", preset="soar", epochs=30, data="digits", tiny=True, eps="2/16")
    assert (order.epochs, order.lr, order.data, order.eps) == (30, 0.004, "digits", "2/16")
    assert (order.spec.settings["h"], order.spec.settings["clip"]) == (0.1, 10.0)
    assert order.schedule == "milestones:1"  # 100 of 200, on the small size's two epochs
    tiny = asked(method="awp-trades", preset="rat", tiny=True)
    assert (tiny.schedule, tiny.awp, tiny.awp_warmup, tiny.model, tiny.epochs) == (
        "milestones:1", 0.005, 0, "digits_cnn", 2
    )  # fmt: skip
    assert asked(method="standard", preset="sgr", model="mlp").model_arg == {}  # width belongs to the paper's network
    assert asked(method="soar", preset="soar", init_from="standard.pt").model == ""


def test_a_method_that_the_paper_does_not_train() -> None:
    with pytest.raises(UsageError, match="preset finlay does not train trades") as caught:
        asked(method="trades", preset="finlay")
    assert "standard, adv, fd-grad" in caught.value.do
    with pytest.raises(UsageError, match="does not train awp-soar"):
        asked(method="awp-soar", preset="soar")
    with pytest.raises(UsageError, match="did you mean soar"):
        asked(method="soar", preset="saor")


def test_the_list_shows_presets_and_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    listing.list_("presets", json=True)
    told = json.loads(capsys.readouterr().out)
    assert {(p, m) for p, row in told.items() for m in row["methods"].split(", ")} == set(THERE)
    listing.list_("presets", "sgr")
    assert "[methods.standard]" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean soar"):
        listing.list_("presets", "saor")
    assert "arXiv" in find("rat").source


@pytest.mark.parametrize("preset, method", THERE)
def test_the_small_size_trains(
    preset: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few(text: str, split: str) -> Images:
        assert text == "digits"
        return load_images(text, split)[torch.arange(84)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robeval.data.load.load", few)
    command.train(method, preset=preset, tiny=True, epochs="1", hold_out="20", batch_size="64", json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["epoch"], told["resumed"]) == (1, "no")
    assert 0 <= told["metrics"]["pgd20_accuracy"] <= told["metrics"]["clean_accuracy"] <= 1
    assert Path(told["model"]).is_file()
