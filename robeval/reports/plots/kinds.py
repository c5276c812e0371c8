"""The kinds of pictures by name: functions from groups of runs to pictures, none where nothing was stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from robeval.core.errors import unknown
from robeval.reports.gallery import Originals, gallery
from robeval.reports.groups import Group
from robeval.reports.picture import Picture
from robeval.reports.plots.bracket import bracket
from robeval.reports.plots.certified import certified
from robeval.reports.plots.covariance import covariance
from robeval.reports.plots.curves import accuracy
from robeval.reports.plots.density import density
from robeval.reports.plots.distances import distances, passes
from robeval.reports.plots.paths import paths, softmax
from robeval.reports.plots.surfaces import surface, weights
from robeval.reports.plots.waterfall import waterfall

Paint = Callable[[Sequence[Group]], list[Picture]]
KINDS: dict[str, Paint] = {
    "accuracy": accuracy,
    "waterfall": waterfall,
    "bracket": bracket,
    "certified": certified,
    "distances": distances,
    "passes": passes,
    "paths": paths,
    "softmax": softmax,
    "surface": surface,
    "weights": weights,
    "covariance": covariance,
    "density": density,
}
#: Those that stand in the section of a model, in their order.
PAGE = tuple(kind for kind in KINDS if kind != "accuracy")
NAMES = (*KINDS, "gallery")


def pictures(kind: str, groups: Sequence[Group], originals: Mapping[str, Originals]) -> list[Picture]:
    """All pictures of a kind.

    Raises:
        UsageError: no such kind.
    """
    if kind == "gallery":
        return gallery(groups, originals)
    if kind not in KINDS:
        raise unknown("kind of picture", kind, NAMES)
    return KINDS[kind](groups)
