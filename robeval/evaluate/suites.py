"""Suites: attacks that run one after the other over the images still standing."""

from __future__ import annotations

from robeval.core.catalogue import Spec, parse
from robeval.core.errors import unknown

#: Attacks of each suite in order. Those that do not exist in the norm asked for are left out, and the run says so.
SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("fgsm", "fgm", "pgd:steps=10", "apgd-ce:steps=30", "deepfool:steps=20", "square:queries=200"),
    "white-box": ("fgsm", "fgm", "pgd20", "pgd100", "apgd-ce", "pgd20x50", "deepfool"),
}

ABOUT = {
    "quick": "a first look in seconds; weaker than any number one would publish",
    "white-box": "gradient attacks, from one step to 50 restarts",
}


def suite(name: str, norm: str) -> tuple[list[Spec], list[str]]:
    """The attacks of a suite that exist in a norm, and the labels of those that do not.

    Raises:
        UsageError: unknown suite.
    """
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    specs = [parse("attacks", text) for text in SUITES[name]]
    return [s for s in specs if norm in s.method.facts["norms"]], [
        s.label for s in specs if norm not in s.method.facts["norms"]
    ]
