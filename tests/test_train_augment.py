"""Augmentations: draws that belong to image and step, and what they do to pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robeval.core.errors import UsageError
from robeval.core.streams import Streams
from robeval.data.load import load
from robeval.train.augment import _boxes, augmented, read

X = torch.rand(60, 3, 16, 24, generator=torch.Generator().manual_seed(0))
IDS = list(range(100, 160))


def streams(ids: list[int] = IDS, step: int = 0) -> Streams:
    return Streams(3, ids, "augment", attempts=[step] * len(ids))


def plain(x: Tensor, rng: Streams, kind: str, pad: int) -> Tensor:
    """The crops and flips that trainings have been made with, image by image."""
    corners, flips = rng.integers(2 * pad + 1, 2), None
    if kind == "crop-flip":
        flips = rng.integers(2)
    padded, out = nn.functional.pad(x, (pad, pad, pad, pad)), []
    for i, (row, column) in enumerate(corners.tolist()):
        crop = padded[i, :, row : row + x.shape[2], column : column + x.shape[3]]
        out.append(crop.flip(2) if flips is not None and flips[i] else crop)
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
def test_the_old_kinds_draw_what_they_always_drew(kind: str) -> None:
    assert torch.equal(read(kind)(X, streams()), plain(X, streams(), kind, 3))
    assert torch.equal(read(f"{kind}:pad=0,width=2")(X, streams()), plain(X, streams(), kind, 2))
    small = X[:, :, :8, :8]
    assert torch.equal(read(kind)(small, streams()), plain(small, streams(), kind, 1))
    first = Streams(0, [7, 8, 9, 10], "augment").integers(9, 2).tolist()
    assert first == [[6, 4], [4, 2], [5, 7], [8, 2]], "the streams themselves have changed"


@pytest.mark.parametrize(
    "text", ["none", "crop", "crop-flip:pad=reflect", "crop-flip:pad=128/255,cutout=6", "resized-crop-flip:scale=0.2"]
)
def test_draws_belong_to_image_and_step(text: str) -> None:
    everyone = read(text)(X, streams())
    rows = [41, 3, 17]
    assert torch.equal(read(text)(X[rows], streams([IDS[r] for r in rows])), everyone[rows])
    assert everyone.shape == X.shape and everyone.is_contiguous()
    assert float(everyone.min()) >= 0 and float(everyone.max()) <= 1
    assert (text == "none") == torch.equal(read(text)(X, streams(step=1)), everyone)


@pytest.mark.parametrize("pad", ["reflect", "0.5", "128/255"])
def test_padding_changes_the_border_and_not_the_place(pad: str) -> None:
    zero, other = read("crop-flip:width=4")(X, streams()), read(f"crop-flip:width=4,pad={pad}")(X, streams())
    ones = read("crop-flip:width=4")(torch.ones_like(X), streams())
    inside = ones == 1
    assert 0.5 < float(inside.float().mean()) < 1
    assert torch.equal(zero[inside], other[inside])
    if pad == "reflect":
        ramp = torch.arange(24.0).expand(60, 1, 16, 24) / 24
        around = nn.functional.pad(ramp, (4, 4, 4, 4), mode="reflect")
        crops = read("crop:width=4,pad=reflect")(ramp, streams())
        corners = streams().integers(9, 2).tolist()
        assert all(
            torch.equal(c, around[0, :, a : a + 16, b : b + 24]) for c, (a, b) in zip(crops, corners, strict=True)
        )
    else:
        assert other[~inside].unique().tolist() == [pytest.approx({"0.5": 0.5, "128/255": 128 / 255}[pad])]


def test_cutout_fills_a_square_with_its_own_mean() -> None:
    x = X[:, :, :, :16]
    found = read("none:cutout=6")(x, streams())
    sizes = set()
    for before, after in zip(x, found, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
        sizes.add((bottom - top, right - left))
        patch, filled = before[:, top:bottom, left:right], after[:, top:bottom, left:right]
        torch.testing.assert_close(filled, patch.mean((1, 2), keepdim=True).expand_as(patch))
        after = after.clone()
        after[:, top:bottom, left:right] = patch
        assert torch.equal(after, before)
    assert (6, 6) in sizes and {min(s) for s in sizes} <= {3, 4, 5, 6}
    torch.testing.assert_close(found.mean((2, 3)), x.mean((2, 3)), atol=1e-6, rtol=0)  # the mean stays the mean
    draws = [read("none:cutout=6")(torch.rand(1, 1, 4, 4), streams([i])) for i in range(20)]
    assert all(torch.isfinite(d).all() for d in draws)


def test_cutout_comes_after_the_crop_and_shares_its_draws() -> None:
    crop, both = (read(f"crop-flip{tail}")(X, streams()) for tail in ("", ":cutout=4"))
    kept = (crop == both).float().mean((1, 2, 3))
    assert float(kept.min()) > 0.958 and float(kept.mean()) < 1


def test_resized_crops_have_the_area_and_ratio_that_were_asked_for() -> None:
    ids = list(range(4000))
    sides = torch.tensor([[300, 400]] * len(ids))
    left, top, right, bottom = _boxes(Streams(0, ids, "a"), 0.25, sides).double().unbind(1)
    width, height = right - left, bottom - top
    share, ratio = width * height / 120_000, width / height
    assert float(left.min()) >= 0 and float(top.min()) >= 0 and float(right.max()) <= 400 and float(bottom.max()) <= 300
    assert 0.245 < float(share.min()) < 0.27 and float(share.max()) > 0.95
    assert 0.74 < float(ratio.min()) < 0.77 and 1.31 < float(ratio.max()) < 1.35
    assert float(((left + right) / 2).mean()) == pytest.approx(200, abs=4)
    thin = _boxes(Streams(0, ids[:5], "a"), 1.0, torch.tensor([[10, 100]] * 5))
    assert thin.tolist() == [[44, 0, 57, 10]] * 5  # nothing fits: the middle with ratio 4/3


def test_a_resized_crop_of_everything_is_the_image() -> None:
    square = X[:, :, :, :16].contiguous()
    boxes = _boxes(streams(), 1.0, torch.tensor([[16, 16]] * 60))
    whole = (boxes == torch.tensor([0, 0, 16, 16])).all(1)
    found = read("resized-crop:scale=1")(square, streams())
    torch.testing.assert_close(found[whole], square[whole])
    assert whole.any()
    flat = torch.full((60, 1, 16, 16), 0.3)
    torch.testing.assert_close(read("resized-crop-flip")(flat, streams()), flat)


def test_streamed_images_are_cropped_in_their_files(tmp_path: Path) -> None:
    ramp = np.arange(200, dtype=np.uint8)[None].repeat(150, 0)  # 200 wide, 150 high
    for k in range(6):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / "train" / "a" / f"{k}.png")
    images = load(f"folder:path={tmp_path},stream=true,size=10", "train")
    rows, ids = torch.tensor([4, 1, 5]), [4, 1, 5]
    found = augmented(images.x, rows, streams(ids), "resized-crop:scale=0.1")
    assert found.shape == (3, 1, 10, 10)
    boxes = _boxes(streams(ids), 0.1, torch.tensor([[150, 200]] * 3))
    for crop, (left, _, right, _) in zip(found, boxes.tolist(), strict=True):
        wanted = (torch.arange(10) + 0.5) * (right - left) / 10 + left - 0.5
        torch.testing.assert_close(crop[0] * 255, wanted.expand(10, 10), atol=1.01, rtol=0)
    again = augmented(images.x, rows[:1], streams(ids[:1]), "resized-crop:scale=0.1")
    assert torch.equal(again, found[:1])
    flips = augmented(images.x, rows, streams(ids), "resized-crop-flip:scale=0.1")
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(flips, found, strict=True))
    centre = augmented(images.x, rows, streams(ids), "crop-flip")
    assert torch.equal(centre, read("crop-flip")(images.x[rows], streams(ids)))


@pytest.mark.parametrize("text, words", [
    ("crop-filp", "did you mean crop-flip"),
    ("flip", "unknown augmentation"),
    ("crop-flip:pda=0", "did you mean pad"),
    ("crop:scale=0.5", 'unknown setting of augmentation crop "scale"'),
    ("resized-crop:pad=0", "unknown setting of augmentation resized-crop"),
    ("crop:pad=reflct", "did you mean reflect"),
    ("crop:pad=128", "pad of augmentation must be a grey in 0 to 1 or reflect, got 128"),
    ("crop:pad=-0.1", "must be a grey"),
    ("crop:width=1.5", "width of augmentation must be a whole number of pixels, got 1.5"),
    ("crop:width=0", "width of augmentation must be a whole number"),
    ("crop:cutout=-1", "cutout of augmentation must be a whole number"),
    ("resized-crop:scale=0", "scale of augmentation must be above 0"),
    ("resized-crop:scale=2", "scale of augmentation must be above 0"),
    ("crop:cutout=x", "cutout of augmentation must be a number"),
    ("crop:cutout", "settings are written key=value"),
    ("", "unknown augmentation"),
])  # fmt: skip
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(text)
    assert caught.value.code == "A04"


def test_a_reflection_cannot_be_wider_than_the_image() -> None:
    with pytest.raises(UsageError, match="narrower than 16"):
        read("crop:pad=reflect,width=16")(X, streams())
