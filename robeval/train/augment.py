"""Random crops, flips and cut-outs that belong to an image and a step, not to a batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from robeval.core.errors import UsageError, unknown
from robeval.core.numbers import number
from robeval.core.settings import pairs
from robeval.core.streams import Streams
from robeval.data.streamed import Streamed

KINDS = ("none", "crop", "crop-flip", "resized-crop", "resized-crop-flip")
SETTINGS = {"crop": ("pad", "width", "cutout"), "resized-crop": ("scale", "cutout"), "none": ("cutout",)}
#: Tries of a place for a resized crop, and the sides' ratios that are drawn from.
TRIES, RATIO = 10, (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for every image in every step.

    Args:
        kind: ``none``; ``crop`` pads and crops at a random place; ``resized-crop`` enlarges a random part, of the full
            image in its file where images are streamed; with ``-flip`` half of the results are mirrored.
        pad: What stands around the image, a grey in [0, 1] (128/255 and 0.5 are in use), or ``reflect``.
        width: Pixels of padding; an eighth of the width if None.
        scale: Smallest share of the area for ``resized-crop``.
        cutout: Side of a square, around a random pixel, that is filled with its own mean colour; 0 for none.
    """

    kind: str = "none"
    pad: float | str = 0.0
    width: int | None = None
    scale: float = 0.08
    cutout: int = 0

    @property
    def flip(self) -> bool:
        return self.kind.endswith("-flip")

    def __call__(self, x: Tensor, rng: Streams) -> Tensor:
        """Shapes: (n, C, H, W) -> same."""
        if self.kind.startswith("crop"):
            x = _crop(x, rng, self)
        elif self.kind.startswith("resized-crop"):
            x = _resized(x, _boxes(rng, self.scale, torch.tensor([x.shape[2:]] * len(x), device=x.device)))
            x = _flipped(x, rng) if self.flip else x
        return _cut_out(x, rng, self.cutout) if self.cutout else x


def read(text: str) -> Augmentation:
    """``crop-flip``, ``crop-flip:pad=reflect``, ``crop-flip:pad=128/255,cutout=16``, ``resized-crop-flip:scale=0.25``.

    Raises:
        UsageError: an unknown name or setting, with the closest ones; a value that makes no sense (A04).
    """
    kind, _, tail = text.partition(":")
    if kind not in KINDS:
        raise unknown("augmentation", kind, KINDS)
    known, found = SETTINGS[kind.removesuffix("-flip")], Augmentation(kind)
    given = pairs(tail, "", text)
    for name in given:
        if name not in known:
            raise unknown(f"setting of augmentation {kind}", name, known)
    pad = given.get("pad", "0")
    if pad != "reflect" and re.match(r"[A-Za-z]", pad):
        raise unknown("padding", pad, ("reflect", "a grey such as 0, 0.5 or 128/255"))
    values = {name: number(given[name], name=f"{name} of augmentation", code="A04") for name in given if name != "pad"}
    for name, limit in (("width", 1), ("cutout", 0)):
        value = values.get(name, limit)
        if value != int(value) or value < limit:
            raise UsageError(f"{name} of augmentation must be a whole number of pixels, got {given[name]}", code="A04")
    if not 0 < values.get("scale", 1) <= 1:
        raise UsageError(f"scale of augmentation must be above 0 and at most 1, got {given['scale']}", code="A04")
    grey = pad if pad == "reflect" else number(pad, name="pad of augmentation", code="A04")
    if isinstance(grey, float | int) and not 0 <= grey <= 1:
        raise UsageError(f"pad of augmentation must be a grey in 0 to 1 or reflect, got {pad}", code="A04")
    width = int(values["width"]) if "width" in values else None
    return Augmentation(kind, grey, width, values.get("scale", found.scale), int(values.get("cutout", 0)))


def augmented(x: Tensor, rows: Tensor, rng: Streams, text: str) -> Tensor:
    """The chosen rows, augmented; of streamed images a resized crop takes its part of the file's full image.

    Args:
        x: Images in [0, 1].
        rows: Which of them.
        rng: One stream per chosen image.
        text: See :func:`read`.

    Raises:
        UsageError: see :func:`read`; a padding wider than a reflection can be (A04).

    Shapes: x (N, C, H, W), rows (n,) -> (n, C, H, W).
    """
    how = read(text)
    if isinstance(x, Streamed) and how.kind.startswith("resized-crop"):
        found = x.cut(rows, partial(_boxes, rng, how.scale))
        found = _flipped(found, rng) if how.flip else found
        return _cut_out(found, rng, how.cutout) if how.cutout else found
    return how(x[rows], rng)


def _crop(x: Tensor, rng: Streams, how: Augmentation) -> Tensor:
    """Pad, crop at a random place, perhaps mirror."""
    n, _, height, width = x.shape
    pad = max(1, width // 8) if how.width is None else how.width
    corner = rng.integers(2 * pad + 1, 2)
    rows = corner[:, :1] + torch.arange(height, device=x.device)
    columns = corner[:, 1:] + torch.arange(width, device=x.device)
    if how.flip:
        columns = torch.where(rng.integers(2)[:, None].bool(), columns.flip(1), columns)
    if isinstance(how.pad, str):
        if pad >= min(height, width):
            raise UsageError(f"a reflection of {width}x{height} pixels is narrower than {pad}", code="A04")
        padded = functional.pad(x, (pad, pad, pad, pad), mode="reflect")
    else:
        padded = functional.pad(x, (pad, pad, pad, pad), value=how.pad)
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _flipped(x: Tensor, rng: Streams) -> Tensor:
    return torch.where(rng.integers(2)[:, None, None, None].bool(), x.flip(3), x)


def _boxes(rng: Streams, scale: float, sides: Tensor) -> Tensor:
    """Parts with a uniform share of the area and a log-uniform ratio: the first of ten tries that fits.

    Where none does, the largest part in the middle whose ratio is allowed.

    Args:
        rng: One stream per image.
        scale: Smallest share of the area.
        sides: (n, 2) heights and widths.

    Returns:
        (n, 4) left, top, right, bottom in whole pixels.
    """
    height, width = sides.double().unbind(1)
    u, place = rng.uniform(TRIES, 2).double(), rng.uniform(2).double()
    area = (height * width)[:, None] * (scale + (1 - scale) * u[..., 0])
    low, high = torch.tensor(RATIO, dtype=torch.float64).log().tolist()
    ratio = (low + (high - low) * u[..., 1]).exp()
    w, h = (area * ratio).sqrt().round().clamp_min(1), (area / ratio).sqrt().round().clamp_min(1)
    fits = (w <= width[:, None]) & (h <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    middle = ~fits.any(1)
    w = torch.where(middle, torch.minimum(width, (height * RATIO[1]).round()), w)
    h = torch.where(middle, torch.minimum(height, (width / RATIO[0]).round()), h)
    place = torch.where(middle[:, None], 0.5, place)
    left = torch.minimum((place[:, 0] * (width - w + 1)).floor(), width - w)  # a draw may round to 1
    top = torch.minimum((place[:, 1] * (height - h + 1)).floor(), height - h)
    return torch.stack([left, top, left + w, top + h], 1).long()


def _resized(x: Tensor, boxes: Tensor) -> Tensor:
    """Parts of images, each resized to the shape of the whole."""
    parts = [
        functional.interpolate(
            image[None, :, top:bottom, left:right], x.shape[2:], mode="bilinear", antialias=True, align_corners=False
        )
        for image, (left, top, right, bottom) in zip(x, boxes.tolist(), strict=True)
    ]
    return torch.cat(parts).clamp(0, 1)  # rounding may leave the box


def _cut_out(x: Tensor, rng: Streams, side: int) -> Tensor:
    """Fill a square around a random pixel, as far as it lies in the image, with its mean, each channel with its own."""
    height, width = x.shape[2:]
    even = 1 - side % 2  # then the square has no middle pixel, and one more place keeps the sides alike
    row = rng.integers(height + even)[:, None] - side // 2
    column = rng.integers(width + even)[:, None] - side // 2
    y, z = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside = ((y >= row) & (y < row + side))[:, None, :, None] & ((z >= column) & (z < column + side))[:, None, None, :]
    mean = (x * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp_min(1)
    return torch.where(inside, mean.clamp(0, 1), x)
