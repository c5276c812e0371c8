"""Two Gaussian clouds among irrelevant inputs."""

from __future__ import annotations

import numpy as np

from robeval.core.catalogue import dataset
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.data.arrays import make


@dataset(source="robeval; two classes whose best classifier is known")
def blobs(
    split: str, *, count: int = 400, irrelevant: int = 50, distance: float = 0.4, noise: float = 0.1, seed: int = 0
) -> Images:
    """Two Gaussian clouds in two inputs, and inputs that say nothing, as images of 1 x (2 + irrelevant) pixels.

    The best direction is the diagonal of the first two inputs, the rest is noise around 1/2; values are clipped to
    [0, 1]. For tests: what a robust model should ignore is known.

    Args:
        count: Images of the split, half of each class.
        irrelevant: Inputs that do not depend on the class.
        distance: Distance of the two centres in each of the two inputs.
        noise: Standard deviation of every input.
        seed: Another number, another draw.

    Shapes:
        x (count, 1, 1, 2 + irrelevant).
    Cost:
        None to speak of.
    Source:
        None.
    """
    if split not in ("train", "test"):
        raise UsageError(f'blobs has the splits train and test, not "{split}"', code="A04")
    if count < 2 or irrelevant < 0 or noise < 0:
        raise UsageError("blobs needs count >= 2, irrelevant >= 0 and noise >= 0", code="A04")
    random = np.random.RandomState([seed, ("train", "test").index(split)])
    y = np.arange(count) % 2
    centre = np.full((count, 2 + irrelevant), 0.5)
    centre[:, :2] += ((y - 0.5) * distance)[:, None]
    x = np.clip(centre + noise * random.standard_normal(centre.shape), 0, 1).astype(np.float32)
    return make(x[:, None, :], y, name=f"blobs/{split}", classes=["0", "1"])
