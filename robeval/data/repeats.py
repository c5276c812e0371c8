"""Images that a set holds twice, and test images that were trained on: both make a number look better than it is."""

from __future__ import annotations

import hashlib

from robeval.core.errors import RobevalError
from robeval.core.images import Images, Unread
from robeval.data.load import load


def digests(images: Images) -> list[bytes]:
    """What tells the pixels of one image from those of another, one per image; none for pixels still in their files."""
    if isinstance(images.x, Unread):
        return []
    return [hashlib.blake2b(x.numpy().tobytes(), digest_size=16).digest() for x in images.x.detach().cpu().contiguous()]


def repeated(images: Images) -> list[str]:
    """A warning where images of the set have the same pixels as an earlier one: they are no independent evidence."""
    known = digests(images)
    again = len(known) - len(set(known))
    if not again:
        return []
    return [f"warning[D14] {again} of {len(images)} images repeat another one; the interval is too narrow by that"]


def trained_on(images: Images, data: str) -> list[str]:
    """A warning where images of the set are in the training split of the same data, pixel by pixel.

    Args:
        images: Images of another split.
        data: The data set, as for :func:`robeval.data.load.load`.
    """
    known = digests(images)
    if not known:
        return []
    try:
        train = set(digests(load(data, "train")))
    except RobevalError:  # a set without a training split
        return []
    seen = sum(one in train for one in known)
    return [f"warning[D15] {seen} of {len(images)} test images are also in train"] if seen else []
