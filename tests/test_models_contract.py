"""The check of one batch before anything is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.images import Images
from robeval.models.build import build
from robeval.models.contract import check


def images(shape: tuple[int, int, int] = (1, 8, 8), n: int = 50, classes: int = 10) -> Images:
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    return Images(x, torch.arange(n) % classes, torch.arange(n), "noise/test", [str(i) for i in range(classes)])


def good() -> nn.Module:
    torch.manual_seed(0)
    return build("linear")


WEIGHT = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))


def logits(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT


def agreeing() -> Images:
    """Noise, labelled by the linear map itself."""
    noise = images()
    return Images(noise.x, logits(noise.x).argmax(1), noise.ids, noise.name, noise.classes)


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return logits(x)


def overwrites(x: Tensor) -> Tensor:
    x.mul_(0.5)
    return logits(x)


def nan(x: Tensor) -> Tensor:
    return torch.where(x[:, :1, 0, 0] > 0.5, torch.nan, logits(x))


def exits(x: Tensor) -> Tensor:
    sys.exit(3)


BROKEN: list[tuple[str, Callable[[Tensor], Any], str, str]] = [
    ("tuple", lambda x: (logits(x), x), "C03", r"returns a tuple of 2, expected a tensor \(n, K\)"),
    ("shape", lambda x: logits(x)[:, :, None], "C03", r"shape \(32, 10, 1\) for 32 images"),
    ("answers", lambda x: logits(x).long(), "C03", "returns torch.int64"),
    ("one output", lambda x: logits(x)[:, :1], "C04", "has 1 output"),
    ("scalars", lambda x: logits(x)[:, 0], "C04", "has 1 output"),
    ("nine", lambda x: logits(x)[:, :9], "C03", "returns 9 logits, its class list has 10"),
    ("softmax", lambda x: logits(x).softmax(1), "C06", "outputs are probabilities; remove the softmax"),
    ("nan", nan, "C07", r"NaN or Inf logits on \d+ clean images: ids "),
    ("random", lambda x: logits(x) + 9 * torch.randn(len(x), 10), "C12", r"\d+ of 32 images change label between two"),
    (
        "a bit random",
        lambda x: logits(x) + 1e-2 * torch.randn(len(x), 10),
        "C12",
        "logits change by .* between two runs",
    ),
    ("batch mean", lambda x: logits(x - x.mean(0)), "C14", r"other images in the batch \(\d"),
    ("overwrites", overwrites, "C15", "the model overwrites its input"),
    ("exits", exits, "C18", "the model called sys.exit"),
    ("raises", lambda x: x.flatten(1) @ WEIGHT[:5], "C02", r"model fails on 1x8x8 \(mat1 and mat2"),
    ("counts", Counts(), "C13", "a forward pass changes buffer calls"),
]


@pytest.mark.parametrize("module, code, words", [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_models(module: Callable[[Tensor], Any], code: str, words: str) -> None:
    with pytest.raises(ContractBroken, match=words) as caught:
        check(Classifier(module, 10), images())
    assert (caught.value.code, caught.value.exit_code) == (code, 4)


def test_train_mode_is_refused() -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = Classifier(module, 10)
    module.train()
    with pytest.raises(ContractBroken, match="1 BatchNorm2d layer is in train mode"):
        check(model, images())


@pytest.mark.parametrize("shape, code, words", [
    ((3, 8, 8), "D04", "images have 3 channels, the model takes 1"),
    ((1, 9, 9), "C02", "images are 1x9x9, the model takes 1x8x8"),
    ((8, 8, 1), "D05", r"images look like 8x8x1 \(channels last\)"),
])  # fmt: skip
def test_images_of_another_shape(shape: tuple[int, int, int], code: str, words: str) -> None:
    model = Classifier(good(), 10, info={"input_shape": [1, 8, 8]})
    with pytest.raises(ContractBroken, match=words) as caught:
        check(model, images(shape))
    assert caught.value.code == code


@pytest.mark.parametrize("classes, words", [
    (12, "label 10 at image 10, the model has 10 classes, the data have 12"),
    (7, "the model has 10 classes, the data have 7"),
])  # fmt: skip
def test_class_counts_must_agree(classes: int, words: str) -> None:
    with pytest.raises(ContractBroken, match=words) as caught:
        check(Classifier(good(), 10), images(classes=classes))
    assert (caught.value.code, caught.value.exit_code) == ("D10", 4)


def test_a_good_model_passes_without_a_word_and_unchanged() -> None:
    data = agreeing()
    before = data.x.clone()
    assert check(Classifier(logits, 10), data) == []
    assert torch.equal(data.x, before)
    assert check(Classifier(logits, 10), data[torch.arange(1)]) == []


def test_convolutions_with_small_rounding_differences_pass() -> None:
    torch.manual_seed(0)
    module = build("digits_cnn", normalise="per-image")
    assert not [w for w in check(Classifier(module, 10), images()) if "C19" not in w and "C16" not in w]


def test_warnings_for_constant_blind_and_chance_models() -> None:
    constant = check(Classifier(lambda x: logits(x) * 1e-3 + torch.eye(10)[3], 10), agreeing())
    assert "warning[C16] 100 % of answers are class 3" in constant
    detached = check(Classifier(lambda x: logits(x.detach()), 10), agreeing())
    assert len(detached) == 1
    assert detached[0].startswith("warning[G1] no gradient reaches the pixels")
    rounded = check(Classifier(lambda x: logits((x * 8).round() / 8 + 0 * x), 10), agreeing())
    assert any("the gradient at the pixels is exactly zero" in w for w in rounded)
    data = agreeing()
    shuffled = Images(data.x, (data.y + 1) % 10, data.ids, data.name, data.classes)
    assert any(
        w.startswith("warning[C19] clean accuracy on 32 images is 0 %") for w in check(Classifier(logits, 10), shuffled)
    )
