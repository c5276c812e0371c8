"""The smallest constants that are consistent with every adversarial image found."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from robeval.bounds.expansion import expand
from robeval.core.ball import vector_norm
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.store.runstore import RunStore

BATCH = 256


def repaired(
    classifier: Classifier, images: Images, method: dict[str, Any], norm: str, constant: float, runs: list[RunStore]
) -> tuple[float, int]:
    """A bound's constant, raised to what the stored adversarial images prove at least.

    For a first-order bound L >= (l(x + v) - l(x)) / |v|, for a second-order one C >= 2 (l(x + v) - l(x) - <g, v>) /
    |v|^2: a smaller constant contradicts the loss seen at x + v. With the repaired constant no stored image lies below
    its bound; it is still an estimate.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: Clean images; stored images of other ids are left out.
        method: The bound's entry in the manifest: its order and settings.
        norm: Norm of the radius.
        constant: The constant that the bound used.
        runs: Attack runs on the same weights and data.

    Returns:
        The repaired constant and the number of adversarial images that it was checked against.
    """
    place = {(int(i), int(y)): k for k, (i, y) in enumerate(zip(images.ids, images.y, strict=True))}
    loss, temperature = method["settings"]["loss"], float(method["settings"]["temperature"])
    best, seen = constant, 0
    for store in runs:
        frame = store.frame()
        rows = frame[frame["success"] & frame["clean_correct"] & (frame["example"] >= 0)]
        known = [(i, y) in place for i, y in zip(rows["index"], rows["label"], strict=True)]
        rows = rows[pd.Series(known, index=rows.index, dtype=bool)]
        for start in range(0, len(rows), BATCH):
            part = rows.iloc[start : start + BATCH]
            where = torch.tensor([place[int(i), int(y)] for i, y in zip(part["index"], part["label"], strict=True)])
            x, y = images.x[where.to(images.x.device)], images.y[where.to(images.x.device)]
            found = torch.from_numpy(store.examples(part)).to(x)
            clean, there = (expand(classifier, p, y, loss, temperature) for p in (x, found))
            v = (found.double() - x.double()).flatten(1)
            length = vector_norm(v, norm)
            rise = (there.value.detach().double() - clean.value.detach().double())[: len(x)]
            if method["order"] == 2:
                linear = (clean.gradient.double()[: len(x)].flatten(1) * v).sum(1)
                least = 2 * (rise - linear) / length.square()
            else:
                least = rise / length
            best = max(best, float(least[length > 0].max()) if (length > 0).any() else best)
            seen += len(part)
    return best, seen
