"""Images that occur twice, and test images that were trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robeval.data.load import load
from robeval.data.repeats import repeated, trained_on
from tests.command import here
from tests.problems import trained


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty digits of which three occur twice and one three times, and a training split that holds five of them."""
    folder = tmp_path_factory.mktemp("repeats")
    test, train = load("digits", "test"), load("digits", "train")
    rows = np.r_[0:35, 4, 5, 6, 7, 7]
    x, y = test.x.numpy(), test.y.numpy()
    np.savez(
        folder / "set.npz",
        x_test=x[rows], y_test=y[rows], classes=np.arange(10),
        x_train=np.r_[train.x.numpy()[:50], x[30:35]], y_train=np.r_[train.y.numpy()[:50], y[30:35]],
    )  # fmt: skip
    np.savez(folder / "one.npz", x=x[:9], y=y[:9], classes=np.arange(10))
    trained(folder / "m.pt", "linear", size=8)
    return str(folder / "set.npz")


def test_repeated_images_are_counted(archive: str) -> None:
    said = "warning[D14] 5 of 40 images repeat another one; the interval is too narrow by that"
    assert repeated(load(f"npz:{archive}")) == [said]
    assert repeated(load("digits")) == []


def test_test_images_that_were_trained_on_are_counted(archive: str) -> None:
    images = load(f"npz:{archive}")
    assert trained_on(images, f"npz:{archive}") == ["warning[D15] 5 of 40 test images are also in train"]
    assert trained_on(load("digits"), "digits") == []
    alone = f"npz:{Path(archive).parent}/one.npz"
    assert trained_on(load(alone), alone) == []  # no training split


def test_the_commands_say_so_and_go_on(archive: str) -> None:
    folder = Path(archive).parent
    here_now = ("m.pt", "--data", "npz:set.npz", "--eps", "1/16", "--out", "runs")
    code, _, err = here("attack", *here_now, "--attack", "fgsm", "--no-diagnose", cwd=folder)
    assert code == 0
    assert "warning[D14] 5 of 40 images" in err
    assert "D15" not in err  # an attack reads no training split
    code, _, err = here("diagnose", *here_now, "--level", "standard", cwd=folder)
    assert code == 0
    assert "warning[D15] 5 of 40 test images are also in train" in err
