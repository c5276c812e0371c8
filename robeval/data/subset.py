"""Choosing images: always by ids that stay, always with a note of how."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from robeval.core.errors import FileRefused, UsageError
from robeval.core.images import Images
from robeval.data.order import HOLDOUT_SEED, stratified_order

SHUFFLE = "the fixed stratified shuffle"


def _bad(what: str, images: Images) -> UsageError:
    return UsageError(
        what,
        code="A04",
        where=f"{images.name} has {len(images)} images",
        do="write 500, 0:500, first:500, ids or @FILE",
    )


def _take(images: Images, rows: Tensor, note: str) -> Images:
    chosen = images[rows]
    chosen.note = f"{images.note}; {note}" if images.note else note
    return chosen


def subset(images: Images, text: str | None = None, *, first: int | None = None) -> Images:
    """The images that a short text asks for.

    Args:
        images: A whole split.
        text: ``500``: the first 500 of the fixed stratified shuffle; ``a:b``: that range of the same order;
            ``first:500``: the first 500 in file order; ``3,17,90``: these ids; ``@FILE``: ids from a file, one a line
            or separated by commas. None: all, as they come.
        first: The same as ``first:N``.

    Returns:
        The images in the chosen order, ids kept; ``note`` says how they were chosen.
    Raises:
        UsageError: empty or reversed ranges, more images than there are, unknown or repeated ids (A04).
        FileRefused: no such file of ids (D01).
    """
    if text is not None and first is not None:
        raise _bad(f"give either a subset ({text}) or the first {first}, not both", images)
    if first is not None:
        return _first(images, first)
    if text is None:
        return images
    text = text.strip()
    if text.startswith("first:") and re.fullmatch(r"\d+", text[6:]):
        return _first(images, int(text[6:]))
    if re.fullmatch(r"\d+", text):
        count = int(text)
        if not 1 <= count <= len(images):
            raise _bad(f"cannot take {count} images", images)
        return _take(images, stratified_order(images.y)[:count], f"first {count} of {SHUFFLE}")
    span = re.fullmatch(r"(\d*):(\d*)", text)
    if span:
        start, stop = int(span[1] or 0), int(span[2] or len(images))
        if not 0 <= start < stop <= len(images):
            raise _bad(f"cannot take images {text}", images)
        return _take(images, stratified_order(images.y)[start:stop], f"{start}:{stop} of {SHUFFLE}")
    return _by_ids(images, text)


def _first(images: Images, count: int) -> Images:
    if not 1 <= count <= len(images):
        raise _bad(f"cannot take the first {count} images", images)
    return _take(images, torch.arange(count), f"first {count} in file order")


def _by_ids(images: Images, text: str) -> Images:
    where = "given"
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise FileRefused(f"no file of ids at {path}", code="D01")
        try:
            text, where = path.read_text(encoding="utf-8"), f"from {path.name}"
        except UnicodeDecodeError:
            raise FileRefused(f"{path} is not a text file of ids", code="D01") from None
    words = [w for w in re.split(r"[\s,]+", text) if w]
    if not words or not all(re.fullmatch(r"\d{1,18}", w) for w in words):
        raise _bad(f'cannot read the subset "{text[:60]}"', images)
    ids = [int(w) for w in words]
    row = {int(i): r for r, i in enumerate(images.ids)}
    unknown_ids = [i for i in ids if i not in row]
    if unknown_ids:
        raise _bad(f"no image with id {unknown_ids[0]}", images)
    if len(set(ids)) < len(ids):
        raise _bad("an id is given twice", images)
    return _take(images, torch.tensor([row[i] for i in ids]), f"{len(ids)} ids {where}")


def shard(images: Images, i: int, n: int) -> Images:
    """Part ``i`` of ``n`` (counted from 1): every n-th image. The parts together are the whole, none overlaps.

    Raises:
        UsageError: not 1 <= i <= n, or more parts than images (A04).
    """
    if not 1 <= i <= n:
        raise UsageError(f"shard {i}/{n} does not exist", code="A04", do="write --shard 1/4 to --shard 4/4")
    if n > len(images):
        raise UsageError(f"{n} shards of {len(images)} images would be empty", code="A04")
    return _take(images, torch.arange(i - 1, len(images), n), f"shard {i}/{n}")


def read_shard(text: str) -> tuple[int, int]:
    """``2/3`` as (2, 3).

    Raises:
        UsageError: another form (A04).
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f'shard must be i/n with 1 <= i <= n, got "{text}"', code="A04", do="write it like 2/3")
    return int(match[1]), int(match[2])


def holdout(images: Images, count: int) -> tuple[Images, Images]:
    """Split a training set into (train, validation), the validation stratified and in a fixed order of its own.

    Args:
        count: Images of the validation set; fewer than there are.

    Raises:
        UsageError: count below 1 or nothing left to train on (A04).
    """
    if not 1 <= count < len(images):
        raise UsageError(f"cannot hold out {count} of {len(images)} images", code="A04", where=images.name)
    order = stratified_order(images.y, HOLDOUT_SEED)
    kept, held = order[count:].sort().values, order[:count].sort().values
    return _take(images, kept, f"without {count} held out"), _take(images, held, f"{count} held out of training")
